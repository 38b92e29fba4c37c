"""Pair each tensor of PyTorch, or each part of one that is fused, with the leaf of its name."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from bcn_flax.interop import layouts
from bcn_flax.interop.layouts import (
    LayerFacts,
    Layout,
    Path,
    Shape,
    hidden_kernel,
    may_be_transposed,
    path_name,
    shape,
)
from bcn_flax.interop.naming import Link, NameMatch, grouped, module_of


class Part(NamedTuple):
    """A part of a tensor that is fused: from `start` to `stop` along an axis."""

    axis: int
    start: int
    stop: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of the part's values."""
        return (*[slice(None)] * self.axis, slice(self.start, self.stop))

    def __str__(self) -> str:
        """As it is written in Python."""
        return f"[{':, ' * self.axis}{self.start}:{self.stop}]"


class Pair(NamedTuple):
    """A tensor of PyTorch, or a part of it, and the leaf of Flax's variables that has its values.

    Attributes:
        key: in the `state_dict`.
        torch_shape: of the tensor, or of its part.
        path: in the variables, from the collection on.
        flax_shape: of the leaf.
        flax_dtype: of the leaf.
        layout: how one becomes the other.
        facts: about their layer.
        part: of the tensor; `None` if the leaf has all of it.
        added: whether the values are added to those of the leaf's first tensor.
        is_hidden: whether it is a kernel whose inputs are never flattened images.
    """

    key: str
    torch_shape: Shape
    path: Path
    flax_shape: Shape
    flax_dtype: np.dtype[Any]
    layout: Layout
    facts: LayerFacts = LayerFacts()
    part: Part | None = None
    added: bool = False
    is_hidden: bool = False

    @property
    def name(self) -> str:
        """The key, and of a part the index."""
        return f"{self.key}{self.part or ''}"

    def part_of(self, tensor: layouts.Array) -> layouts.Array:
        """The part of the tensor's values."""
        return tensor[self.part.slices] if self.part else tensor

    @property
    def module(self) -> str:
        """PyTorch's module."""
        return module_of(self.key)

    @property
    def is_dense(self) -> bool:
        """Whether it is the kernel of a dense layer."""
        return self.path[-1] == "kernel" and len(self.torch_shape) == 2

    @property
    def features(self) -> int:
        """The number of output features of the layer."""
        return self.torch_shape[self.layout.features]


def pairs_of(
    links: Sequence[Link], tensor: Any, leaves: Mapping[Path, Any], facts: LayerFacts
) -> tuple[list[Pair], list[str]]:
    """The pairs of a tensor, one for each of its leaves, and one line for each that is none."""
    shapes = {link.path: shape(leaves[link.path]) for link in links}
    parts, problems = _parts(shape(tensor), links, shapes)
    found = [
        _pair(link, tensor, part, leaves[link.path], facts)
        for link, part in zip(links, parts, strict=not problems)
    ]
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    return pairs, [*problems, *(pair for pair in found if isinstance(pair, str))]


def fits(found: NameMatch) -> bool:
    """Whether the shapes of all tensors can be those of their leaves, whatever the facts are."""
    for key, links in grouped(found.links, lambda link: link.key).items():
        parts, problems = _parts(found.tensors[key], links, found.leaves)
        if problems:
            return False
        for link, part in zip(links, parts, strict=True):
            flax = found.leaves[link.path]
            torch = _part_shape(found.tensors[key], part)
            kinds = (None, True) if len(flax) > 2 else (None,)
            if not any(_layouts(link, torch, flax, LayerFacts(kind))[1] for kind in kinds):
                return False
    return True


def _part_shape(whole: Shape, part: Part | None) -> Shape:
    if part is None:
        return whole
    return (*whole[: part.axis], part.stop - part.start, *whole[part.axis + 1 :])


def _layouts(
    link: Link, torch_shape: Shape, flax_shape: Shape, facts: LayerFacts
) -> tuple[list[Layout], list[Layout]]:
    """The layouts that the rule proposes, and those of them that fit the shapes."""
    possible = link.rule.layouts(torch_shape, flax_shape, facts)
    return possible, [x for x in possible if x.torch_shape(flax_shape) == torch_shape]


def _pair(link: Link, tensor: Any, part: Part | None, leaf: Any, facts: LayerFacts) -> Pair | str:
    """The pair of a tensor and a leaf of the same name, or one line that says why there is none."""
    torch_shape, flax_shape = _part_shape(shape(tensor), part), shape(leaf)
    key, path, module = f"{link.key}{part or ''}", link.path, module_of(link.key)
    flax = f"Flax's {path_name(path)} of shape {flax_shape}"
    possible, fitting = _layouts(link, torch_shape, flax_shape, facts)
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
    return Pair(
        link.key,
        torch_shape,
        path,
        flax_shape,
        layouts.dtype(leaf),
        fitting[0],
        facts,
        part,
        link.added,
        link.rule.layouts is hidden_kernel,
    )


def _parts(
    whole: Shape, links: Sequence[Link], leaves: Mapping[Path, Shape]
) -> tuple[list[Part | None], list[str]]:
    """The part of a tensor that each of its leaves is; or one line if these do not fill it."""
    axis = links[0].rule.axis
    size = whole[axis] if axis < len(whole) else 0
    row = math.prod(whole) // size if size else 0
    sizes = [math.prod(leaves[link.path]) / row if row else 0 for link in links]
    if len(links) == 1 and (links[0].rule.part is None or sizes == [size]):
        return [None], []
    if sum(sizes) != size or not all(n.is_integer() for n in map(float, sizes)):
        taken = "; ".join(
            f"{path_name(link.path)} {leaves[link.path]} takes {n:g}"
            for link, n in zip(links, sizes, strict=True)
        )
        return [], [
            f"misshapen: {links[0].key} is {whole}, but its parts in Flax take {sum(sizes):g} of "
            f"{size} along axis {axis}: {taken}"
        ]
    stops = [*accumulate(map(int, sizes))]
    return [Part(axis, stop - int(n), stop) for n, stop in zip(sizes, stops, strict=True)], []


def _is_grouped(torch_shape: Shape, needed: Iterable[Shape]) -> bool:
    """Whether a transposed convolution has fewer outputs than needed, as one of groups has."""
    return any(
        torch_shape != other
        and (torch_shape[0], *torch_shape[2:]) == (other[0], *other[2:])
        and other[1] % torch_shape[1] == 0
        for other in needed
        if len(other) == len(torch_shape)
    )
