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

import numpy as np

from bcn_flax.interop import layouts
from bcn_flax.interop.layouts import (
    LayerFacts,
    Layout,
    Path,
    Rules,
    Shape,
    may_be_transposed,
    path_name,
    rule_for,
    shape,
)
from bcn_flax.interop.naming import NameMatch, module_of

Transposed = Collection[str] | Mapping[str, bool | None]
Flattened = Mapping[str, int]

# By PyTorch's module, and by the source of the facts about it.
FactTable = Mapping[str, Mapping[str, LayerFacts]]


class Pair(NamedTuple):
    """A tensor of PyTorch and the leaf of Flax's variables that has its values.

    Attributes:
        key: in the `state_dict`.
        torch_shape: of the tensor.
        path: in the variables, from the collection on.
        flax_shape: of the leaf.
        flax_dtype: of the leaf.
        layout: how one becomes the other.
        facts: about their layer.
    """

    key: str
    torch_shape: Shape
    path: Path
    flax_shape: Shape
    flax_dtype: np.dtype[Any]
    layout: Layout
    facts: LayerFacts = LayerFacts()

    @property
    def module(self) -> str:
        """PyTorch's module."""
        return module_of(self.key)

    @property
    def features(self) -> int:
        """The number of output features of the layer."""
        return self.torch_shape[self.layout.features]

    @property
    def is_dense(self) -> bool:
        """Whether it is the kernel of a dense layer."""
        return self.path[-1] == "kernel" and len(self.torch_shape) == 2


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
    places = {module_of(key): path[1:-1] for key, path in found.paths.items()}
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
    pairs, errors = [], _fact_errors(found, table)
    for key, path in found.paths.items():
        pair = _pair(key, tensors[key], path, leaves[path], found.rules, resolve(table, key))
        if isinstance(pair, Pair):
            pairs.append(pair)
        else:
            errors.append(pair)
    # If there are transposed convolutions, a kernel that fits both kinds may well be of one.
    either = [pair for pair in pairs if _may_be_either(pair)]
    any_transposed = _any_transposed(found, table)
    suspect = [p for p in either if any_transposed and math.prod(p.torch_shape[2:]) > 1]
    flattens = _possible_flattens(pairs)
    errors += _ambiguities(suspect, {dense: n for dense, n, need_not in flattens if not need_not})
    notes = _assumptions(
        [pair.module for pair in either if pair not in suspect],
        {dense.module: n for dense, n, need_not in flattens if need_not},
    )
    return LayerMatch(tuple(pairs), errors, (*notes, *_unlikely_channels(pairs)))


def resolve(table: FactTable, key: str) -> LayerFacts:
    """The facts about the layer of a tensor, from all sources; if they differ, the last's."""
    resolved = LayerFacts()
    for facts in table.get(module_of(key), {}).values():
        known = {fact: value for fact, value in facts._asdict().items() if value is not None}
        resolved = resolved._replace(**known)
    return resolved


def _pair(
    key: str, tensor: Any, path: Path, leaf: Any, rules: Rules, facts: LayerFacts
) -> Pair | str:
    """The pair of a tensor and a leaf of the same name, or one line that says why there is none."""
    torch_shape, flax_shape, module = shape(tensor), shape(leaf), module_of(key)
    flax = f"Flax's {path_name(path)} of shape {flax_shape}"
    possible = rule_for(rules, path).layouts(torch_shape, flax_shape, facts)
    fitting = [layout for layout in possible if layout.torch_shape(flax_shape) == torch_shape]
    if not fitting:
        needed = dict.fromkeys(layout.torch_shape(flax_shape) for layout in possible)
        line = f"misshapen: {key} is {torch_shape}, but {flax} "
        if needed:
            line += f"needs {' or '.join(map(str, needed))}"
        else:
            line += "has no counterpart: no rule knows such a shape"
        if facts.transposed and _is_grouped(torch_shape, needed):
            line += "; Flax has no grouped transposed convolution"
        kernel = path[-1] == "kernel" and not facts.transposed
        if kernel and may_be_transposed(torch_shape, flax_shape):
            line += f"; if it is a transposed convolution, pass transposed=[{module!r}]"
        return line
    if len(fitting) > 1:
        return (
            f"ambiguous: {key}, of a transposed convolution, is {torch_shape}, which does not show "
            f"Flax's transpose_kernel: pass transposed={{{module!r}: False}}, or True"
        )
    if layouts.kind(tensor) != layouts.kind(leaf):
        types = f"{key} is {layouts.dtype(tensor)}, but {flax} is {layouts.dtype(leaf)}"
        return f"of another kind: {types}"
    return Pair(key, torch_shape, path, flax_shape, layouts.dtype(leaf), fitting[0], facts)


def _is_grouped(torch_shape: Shape, needed: Iterable[Shape]) -> bool:
    """Whether a transposed convolution has fewer outputs than needed, as one of groups has."""
    return any(
        torch_shape != other
        and (torch_shape[0], *torch_shape[2:]) == (other[0], *other[2:])
        and other[1] % torch_shape[1] == 0
        for other in needed
        if len(other) == len(torch_shape)
    )


def _any_transposed(found: NameMatch, table: FactTable) -> bool:
    """Whether any kernel belongs to a transposed convolution, by facts or by its shape."""
    return any(
        resolve(table, key).transposed
        or (may_be_transposed(found.tensors[key], shape) and shape[-1] != shape[-2])
        for key, path in found.paths.items()
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
    kernels = {module_of(key): key for key, path in found.paths.items() if path[-1] == "kernel"}
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


def _ambiguities(square: Iterable[Pair], flattens: Mapping[Pair, int]) -> list[str]:
    """One line for each layer of which the caller must give a fact."""
    return [
        *(
            f"ambiguous: {pair.key} has as many inputs as outputs, and there are transposed "
            f"convolutions: pass transposed={{{pair.module!r}: None}} if it belongs to an ordinary "
            "one; otherwise Flax's transpose_kernel, False or True, in place of None"
            for pair in square
        ),
        *(
            f"ambiguous: {dense.key} has {dense.torch_shape[1]} inputs, a multiple of the "
            f"{channels} features of a layer before it. If images of {channels} channels were "
            "flattened, which PyTorch does in another order than Flax, pass "
            f"flattened={{{dense.module!r}: {channels}}}; if none were, pass "
            f"flattened={{{dense.module!r}: {dense.torch_shape[1]}}}"
            for dense, channels in flattens.items()
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


def _possible_flattens(pairs: Collection[Pair]) -> list[tuple[Pair, int, bool]]:
    """The dense layers that may follow a flatten, of so many channels, and whether they need not.

    A dense layer need not follow one if it has as many inputs as the last convolution before it,
    or a layer since, has features. It may follow one if it has a multiple of these. Both can be
    true only if the order is alphabetical: the features of all convolutions and norms count then,
    as they do for a dense layer that comes first.
    """
    layers, unordered = _layers(pairs), _is_unordered(pairs)
    features = {layer.features for layer in layers if not layer.is_dense}
    found = []
    for layer in layers:
        if layer.is_dense and layer.facts.channels is None:
            inputs = layer.torch_shape[1]
            channels = max((n for n in features if 1 < n < inputs and inputs % n == 0), default=0)
            if channels and (unordered or inputs not in features):
                found.append((layer, channels, inputs in features))
        if len(layer.torch_shape) > 2 and not unordered:
            features = set()
        features.add(layer.features)
    return found


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
    return [p for p in pairs if p.path[-1] in ("kernel", "scale", "embedding") and p.torch_shape]


def _is_unordered(pairs: Collection[Pair]) -> bool:
    keys = [pair.key for pair in pairs]
    return keys == sorted(keys)
