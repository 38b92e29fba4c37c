"""Facts about layers that their names do not show: transposed convolutions and flattened inputs.

A fact is given by the caller or declared by a PyTorch or an NNX module, and resolved if any of
these knows it. Shapes show the rest, except for square kernels, which may be transposed ones, and
for dense layers that may follow a flatten. These are assumed to be the ordinary case, and the
report says so; or they are ambiguous, and an error, if something in the model speaks against it.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bcn_flax.interop.layouts import LayerFacts, Layout, Path, Shape, may_be_transposed
from bcn_flax.interop.naming import NameMatch, module_and_leaf

Transposed = Collection[str] | Mapping[str, bool | None]
Flattened = Mapping[str, int]
Facts = Mapping[str, LayerFacts]


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
        return module_and_leaf(self.key)[0]

    @property
    def features(self) -> int:
        """The number of output features of the layer."""
        return self.torch_shape[self.layout.features]

    @property
    def is_dense(self) -> bool:
        """Whether it is the kernel of a dense layer."""
        return self.path[-1] == "kernel" and len(self.torch_shape) == 2


def facts_by_source(
    found: NameMatch,
    torch: Facts,
    flax: Mapping[Path, LayerFacts],
    transposed: Transposed,
    flattened: Flattened,
) -> dict[str, Facts]:
    """The facts that each source gives or declares, by PyTorch's modules.

    Args:
        found: the leaf of each tensor, by name.
        torch: declared by PyTorch's module.
        flax: declared by Flax's module, by its own paths.
        transposed: given by the caller.
        flattened: given by the caller.
    """
    if isinstance(transposed, Mapping):
        flags = {path: LayerFacts(flag is not None, flag) for path, flag in transposed.items()}
    else:
        flags = {path: LayerFacts(True) for path in transposed}
    channels = {path: LayerFacts(channels=n) for path, n in flattened.items()}
    in_full = found.renames.in_full
    return {
        "PyTorch's module": torch,
        "Flax's module": {
            module_and_leaf(key)[0]: flax[path[1:-1]]
            for key, path in found.paths.items()
            if path[1:-1] in flax
        },
        "`transposed`": {in_full(path): facts for path, facts in flags.items()},
        "`flattened`": {in_full(path): facts for path, facts in channels.items()},
    }


def resolve(sources: Mapping[str, Facts], key: str) -> LayerFacts:
    """The facts about the layer of a tensor, from all sources; if they differ, the last's."""
    module, _ = module_and_leaf(key)
    resolved = LayerFacts()
    for facts in sources.values():
        stated = facts.get(module, LayerFacts())._asdict()
        resolved = resolved._replace(**{k: v for k, v in stated.items() if v is not None})
    return resolved


def any_transposed(sources: Mapping[str, Facts], found: NameMatch) -> bool:
    """Whether any kernel belongs to a transposed convolution, by the facts or by its shape."""
    kernels = [
        (key, found.tensors[key], found.leaves[path])
        for key, path in found.paths.items()
        if path[-1] == "kernel"
    ]
    return any(
        resolve(sources, key).transposed
        or (may_be_transposed(torch_shape, flax_shape) and flax_shape[-1] != flax_shape[-2])
        for key, torch_shape, flax_shape in kernels
    )


def fact_errors(sources: Mapping[str, Facts], found: NameMatch) -> list[str]:
    """One line for each fact on which sources differ, or that is about no such layer."""
    kernels = {
        module_and_leaf(key)[0]: key for key, path in found.paths.items() if path[-1] == "kernel"
    }
    shapes = {module: found.tensors[key] for module, key in kernels.items()}
    inputs = {module: shape[1] for module, shape in shapes.items() if len(shape) == 2}
    flattened = {module: facts.channels or 0 for module, facts in sources["`flattened`"].items()}
    return [
        *(line for key in kernels.values() for line in _contradictions(sources, key)),
        *(
            f"transposed: {module!r} is no convolution of the state_dict"
            for module in sources["`transposed`"]
            if len(shapes.get(module, ())) < 3
        ),
        *(
            f"flattened: {module!r} is no dense layer of the state_dict"
            for module in flattened
            if module not in inputs
        ),
        *(
            f"flattened: {module!r} has {inputs[module]} inputs, which {channels} does not divide"
            for module, channels in flattened.items()
            if module in inputs and (channels < 1 or inputs[module] % channels)
        ),
    ]


def ambiguities(pairs: Collection[Pair], any_transposed: bool) -> list[str]:
    """One line for each layer of which nothing may be assumed.

    Args:
        pairs: in the order of the `state_dict`, which is that of the layers unless it is
            alphabetical.
        any_transposed: whether there are transposed convolutions. Beside them, a square kernel is
            ambiguous unless its window is a single pixel.
    """
    return [
        *(
            f"ambiguous: {pair.key} has as many inputs as outputs, and there are transposed "
            f"convolutions: pass transposed={{{pair.module!r}: None}} if it belongs to an ordinary "
            "one; otherwise Flax's transpose_kernel, False or True, in place of None"
            for pair in _square_kernels(pairs)
            if any_transposed and _has_window(pair)
        ),
        *(
            f"ambiguous: {dense.key} has {dense.torch_shape[1]} inputs, a multiple of the "
            f"{channels} features of a layer before it. If images of {channels} channels were "
            "flattened, which PyTorch does in another order than Flax, pass "
            f"flattened={{{dense.module!r}: {channels}}}; if none were, pass "
            f"flattened={{{dense.module!r}: {dense.torch_shape[1]}}}"
            for dense, channels, may_be_none in _possible_flattens(pairs)
            if not may_be_none
        ),
    ]


def notes(pairs: Collection[Pair], any_transposed: bool) -> list[str]:
    """Lines for the report: what is assumed, and what is given but unlikely.

    The arguments are those of `ambiguities`.
    """
    ordinary = [
        pair.module for pair in _square_kernels(pairs) if not (any_transposed and _has_window(pair))
    ]
    unflattened = {
        dense.module: channels
        for dense, channels, may_be_none in _possible_flattens(pairs)
        if may_be_none
    }
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
    return lines + _unlikely_channels(pairs)


def _contradictions(sources: Mapping[str, Facts], key: str) -> list[str]:
    module, _ = module_and_leaf(key)
    lines = []
    for fact in LayerFacts._fields:
        values = {who: getattr(facts.get(module), fact, None) for who, facts in sources.items()}
        known = {who: value for who, value in values.items() if value is not None}
        if len({*known.values()}) > 1:
            words = ", ".join(f"{who} says {fact}={value}" for who, value in known.items())
            lines.append(f"contradictory: of {key}, {words}")
    return lines


def _square_kernels(pairs: Collection[Pair]) -> list[Pair]:
    """The kernels that fit convolutions of both kinds, and no source knows which it is."""
    return [
        pair
        for pair in pairs
        if pair.path[-1] == "kernel"
        and pair.facts.transposed is None
        and pair.flax_shape[-1] == pair.flax_shape[-2]
        and may_be_transposed(pair.torch_shape, pair.flax_shape)
    ]


def _has_window(pair: Pair) -> bool:
    return math.prod(pair.torch_shape[2:]) > 1


def _possible_flattens(pairs: Collection[Pair]) -> Iterator[tuple[Pair, int, bool]]:
    """The dense layers that may follow a flatten, of so many channels, and whether they need not.

    A dense layer need not follow one if it has as many inputs as the last convolution before it,
    or a layer since, has features. It may follow one if it has a multiple of these. Both can be
    true only if the order is alphabetical: the features of all convolutions and norms count then,
    as they do for a dense layer that comes first.
    """
    layers, unordered = _layers(pairs), _is_unordered(pairs)
    features = {layer.features for layer in layers if not layer.is_dense}
    for layer in layers:
        if layer.is_dense and layer.facts.channels is None:
            inputs = layer.torch_shape[1]
            channels = max((n for n in features if 1 < n < inputs and inputs % n == 0), default=0)
            if channels and (unordered or inputs not in features):
                yield layer, channels, inputs in features
        if len(layer.torch_shape) > 2 and not unordered:
            features = set()
        features.add(layer.features)


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
