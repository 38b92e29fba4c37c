"""Facts about layers that their names do not show: transposed convolutions and flattened inputs.

A fact is given by the caller or declared by a PyTorch or an NNX module, and resolved if any of
these knows it. Shapes show the rest, except for square kernels, which may be transposed ones, and
for dense layers that may follow a flatten. These are assumed to be the ordinary case, and the
report says so; or they are ambiguous, and an error, if something in the model speaks against it.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from bcn_flax.interop.layouts import (
    LayerFacts,
    Path,
    hidden_kernel,
    may_be_transposed,
)
from bcn_flax.interop.naming import NameMatch, grouped, module_of, natural
from bcn_flax.interop.pairs import Pair, pairs_of

Transposed = Collection[str] | Mapping[str, bool | None]
Flattened = Mapping[str, int]

# By PyTorch's module, and by the source of the facts about it.
FactTable = Mapping[str, Mapping[str, LayerFacts]]


class Flatten(NamedTuple):
    """A dense layer that may follow a flatten.

    Attributes:
        dense: the layer.
        before: the layers whose output may have been flattened, the likeliest first.
        need_not: whether a layer has as many features as it has inputs, which it may follow.
    """

    dense: Pair
    before: tuple[Pair, ...]
    need_not: bool

    @property
    def inputs(self) -> int:
        """The number of its inputs."""
        return self.dense.torch_shape[1]

    @property
    def channels(self) -> int:
        """The likeliest number of channels that were flattened."""
        return self.before[0].features

    @property
    def features(self) -> str:
        """The features of the layers before, in words."""
        first, *others = self.before
        words = [f"{first.features} features of {first.module!r}"]
        return " or the ".join([*words, *(f"{x.features} of {x.module!r}" for x in others)])


class LayerMatch(NamedTuple):
    """Which tensor becomes which leaf, and how, by the facts about their layers.

    Attributes:
        pairs: in PyTorch's order.
        errors: one line for each tensor that does not fit its leaf, and for each fact that is
            contradictory, missing, or about no layer.
        notes: one line for each kind of assumption, and for each fact that is unlikely.
    """

    pairs: tuple[Pair, ...]
    errors: list[str]
    notes: tuple[str, ...]


def fact_table(
    found: NameMatch,
    torch: Mapping[str, LayerFacts],
    flax: Mapping[Path, LayerFacts],
    transposed: Transposed,
    flattened: Flattened,
) -> FactTable:
    """The facts about each layer, by source.

    Args:
        found: the leaf of each tensor, by name.
        torch: what PyTorch's module declares.
        flax: what Flax's module declares, by its own paths.
        transposed: what the caller gives; see `match`.
        flattened: the same.
    """
    if isinstance(transposed, Mapping):
        flags = {path: LayerFacts(flag is not None, flag) for path, flag in transposed.items()}
    else:
        flags = {path: LayerFacts(True) for path in transposed}
    channels = {path: LayerFacts(channels=n) for path, n in flattened.items()}
    places = {module_of(link.key): link.path[1:-1] for link in found.links}
    in_full = found.renames.in_full
    sources = {
        "PyTorch's module": torch,
        "Flax's module": {module: flax[path] for module, path in places.items() if path in flax},
        "`transposed`": {in_full(path): facts for path, facts in flags.items()},
        "`flattened`": {in_full(path): facts for path, facts in channels.items()},
    }
    table: dict[str, dict[str, LayerFacts]] = defaultdict(dict)
    for source, by_module in sources.items():
        for module, facts in by_module.items():
            table[module][source] = facts
    return table


def match_layers(
    found: NameMatch, table: FactTable, tensors: Mapping[str, Any], leaves: Mapping[Path, Any]
) -> LayerMatch:
    """Find the layout of each tensor that has a leaf of its name."""
    pairs: list[Pair] = []
    errors = _fact_errors(found, table)
    for key, links in grouped(found.links, lambda link: link.key).items():
        found_pairs, problems = pairs_of(links, tensors[key], leaves, resolve(table, key))
        pairs += found_pairs
        errors += problems
    # If there are transposed convolutions, a kernel that fits both kinds may well be of one.
    either = [pair for pair in pairs if _may_be_either(pair)]
    any_transposed = _any_transposed(found, table)
    suspect = [p for p in either if any_transposed and math.prod(p.torch_shape[2:]) > 1]
    flattens = _possible_flattens(pairs)
    errors += _ambiguities(suspect, [flatten for flatten in flattens if not flatten.need_not])
    notes = _assumptions(
        [pair.module for pair in either if pair not in suspect],
        {flatten.dense.module: flatten.channels for flatten in flattens if flatten.need_not},
    )
    return LayerMatch(tuple(pairs), errors, (*notes, *_unlikely_channels(pairs)))


def resolve(table: FactTable, key: str) -> LayerFacts:
    """The facts about the layer of a tensor, from all sources; if they differ, the last's."""
    resolved = LayerFacts()
    for facts in table.get(module_of(key), {}).values():
        known = {fact: value for fact, value in facts._asdict().items() if value is not None}
        resolved = resolved._replace(**known)
    return resolved


def _any_transposed(found: NameMatch, table: FactTable) -> bool:
    """Whether any kernel belongs to a transposed convolution, by facts or by its shape."""
    return any(
        resolve(table, key).transposed
        or (may_be_transposed(found.tensors[key], shape) and shape[-1] != shape[-2])
        for key, path, *_ in found.links
        for shape in [found.leaves[path]]
        if path[-1] == "kernel"
    )


def _may_be_either(pair: Pair) -> bool:
    """Whether it fits convolutions of both kinds, and no source knows which it is."""
    return (
        pair.path[-1] == "kernel"
        and pair.facts.transposed is None
        and pair.flax_shape[-1] == pair.flax_shape[-2]
        and may_be_transposed(pair.torch_shape, pair.flax_shape)
    )


def _contradictions(key: str, facts: Mapping[str, LayerFacts]) -> list[str]:
    """One line for each fact on which the sources differ."""
    lines = []
    for fact in LayerFacts._fields:
        values = {source: getattr(known, fact) for source, known in facts.items()}
        known = {source: value for source, value in values.items() if value is not None}
        if len({*known.values()}) > 1:
            words = ", ".join(f"{source} says {fact}={value}" for source, value in known.items())
            lines.append(f"contradictory: of {key}, {words}")
    return lines


def _fact_errors(found: NameMatch, table: FactTable) -> list[str]:
    """One line for each fact on which sources differ, or which is given of no such layer."""
    kernels = {
        module_of(link.key): link.key
        for link in found.links
        if link.path[-1] == "kernel" and link.rule.layouts is not hidden_kernel
    }
    lines = []
    for module, facts in table.items():
        key = kernels.get(module, "")
        shape = found.tensors[key] if key else ()
        lines += _contradictions(key, facts) if key else []
        if "`transposed`" in facts and len(shape) < 3:
            lines.append(f"transposed: {module!r} is no convolution of the state_dict")
        channels = facts.get("`flattened`", LayerFacts()).channels
        if channels is not None and len(shape) != 2:
            lines.append(f"flattened: {module!r} is no dense layer of the state_dict")
        elif channels is not None and (channels < 1 or shape[1] % channels):
            lines.append(
                f"flattened: {module!r} has {shape[1]} inputs, which {channels} does not divide"
            )
    return lines


def _ambiguities(square: Iterable[Pair], flattens: Iterable[Flatten]) -> list[str]:
    """One line for each layer of which the caller must give a fact."""
    return [
        *(
            f"ambiguous: {pair.key} has as many inputs as outputs, and there are transposed "
            f"convolutions: pass transposed={{{pair.module!r}: None}} if it belongs to an ordinary "
            "one; otherwise Flax's transpose_kernel, False or True, in place of None"
            for pair in square
        ),
        *(
            f"ambiguous: {flatten.dense.key} has {flatten.inputs} inputs, a multiple of the "
            f"{flatten.features}. If images of {flatten.channels} channels were flattened, which "
            "PyTorch does in another order than Flax, pass "
            f"flattened={{{flatten.dense.module!r}: {flatten.channels}}}; if none were, pass "
            f"flattened={{{flatten.dense.module!r}: {flatten.inputs}}}"
            for flatten in flattens
        ),
    ]


def _assumptions(ordinary: list[str], unflattened: Mapping[str, int]) -> list[str]:
    """One line for each kind of assumption, with the argument that would correct it."""
    lines = []
    if ordinary:
        lines.append(
            f"assumed to be ordinary convolutions: {', '.join(ordinary)}; otherwise pass "
            f"transposed={ordinary[:1]}"
        )
    if unflattened:
        lines.append(
            f"assumed to follow no flatten: {', '.join(unflattened)}, because the order of the "
            f"layers is unknown; otherwise pass flattened={unflattened}"
        )
    return lines


def _possible_flattens(pairs: Collection[Pair]) -> list[Flatten]:
    """The dense layers that may follow a flatten.

    A dense layer need not follow one if it has as many inputs as the last convolution before it,
    or a layer since, has features. It may follow one if it has a multiple of the features of that
    convolution or of a norm since. Both can be true only if the order is alphabetical: all
    convolutions and norms count then, as they do for a dense layer that comes first.
    """
    layers, unordered = _layers(pairs), _is_unordered(pairs)
    if unordered:
        layers = sorted(layers, key=lambda layer: natural(layer.key))
    # By features, the nearest layer before last.
    images = {layer.features: layer for layer in layers if not layer.is_dense}
    others: set[int] = set()
    found: dict[str, Flatten] = {}
    for layer in layers:
        if layer.is_dense and layer.facts.channels is None:
            inputs = layer.torch_shape[1]
            need_not = inputs in images or inputs in others
            fitting = [n for n in images if 1 < n < inputs and inputs % n == 0]
            if fitting and (unordered or not need_not):
                before = tuple(images[n] for n in reversed(fitting))
                found.setdefault(layer.key, Flatten(layer, before, need_not))
        if len(layer.torch_shape) > 2 and not unordered:
            images, others = {}, set()
        if layer.is_dense:
            others.add(layer.features)
        else:
            images.pop(layer.features, None)
            images[layer.features] = layer
    return [*found.values()]


def _unlikely_channels(pairs: Collection[Pair]) -> list[str]:
    """One line for each given number of channels that no layer before has."""
    layers, unordered = _layers(pairs), _is_unordered(pairs)
    lines = []
    for n, layer in enumerate(layers):
        images = [other.features for other in layers if not other.is_dense]
        before = [other.features for other in layers[:n] if not other.is_dense]
        present = sorted({*(images if unordered or not before else before)})
        channels = layer.facts.channels
        if layer.is_dense and channels not in (None, layer.torch_shape[1], *present):
            lines.append(
                f"flattened: {layer.module!r} is given {channels} channels, but no convolution or "
                f"norm before it has {channels} features; there are {present}"
            )
    return lines


def _layers(pairs: Collection[Pair]) -> list[Pair]:
    names = ("kernel", "scale", "embedding")
    return [p for p in pairs if p.path[-1] in names and p.torch_shape and not p.is_hidden]


def _is_unordered(pairs: Collection[Pair]) -> bool:
    keys = [pair.key for pair in pairs]
    return keys == sorted(keys)
