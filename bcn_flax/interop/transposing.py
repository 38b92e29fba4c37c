"""Square kernels, which may belong to convolutions of either sort."""

import math
from collections.abc import Iterable, Mapping

from bcn_flax.interop.layouts import FLIPPED, Known, Shape
from bcn_flax.interop.moving import Pair


def fits(torch_shape: Shape, flax_shape: Shape) -> bool:
    """Whether the shapes are those of a transposed convolution's kernel."""
    return len(flax_shape) > 2 and FLIPPED.torch_shape(flax_shape) == torch_shape


def grouped(torch_shape: Shape, needed: Iterable[Shape]) -> bool:
    """Whether a transposed convolution has fewer outputs than needed, as one of groups has."""
    return any(
        torch_shape != shape
        and (torch_shape[0], *torch_shape[2:]) == (shape[0], *shape[2:])
        and shape[1] % torch_shape[1] == 0
        for shape in needed
        if len(shape) == len(torch_shape)
    )


def undeclared(
    pairs: Iterable[Pair], known: Mapping[str, Known], any_by_shape: bool
) -> tuple[list[str], list[str]]:
    """Complaints, and notes for the report, about kernels of which nobody knows the sort.

    Where there are transposed convolutions, any kernel that moves values in its window is suspect.

    Args:
        pairs: that were found.
        known: of all layers, by key.
        any_by_shape: whether the shape of another kernel is that of a transposed convolution.
    """
    square = [
        pair
        for pair in pairs
        if pair.path[-1] == "kernel"
        and known[pair.key].transposed is None
        and pair.flax_shape[-1] == pair.flax_shape[-2]
        and fits(pair.torch_shape, pair.flax_shape)
    ]
    suspect = any_by_shape or any(k.transposed for k in known.values())
    refused = [pair for pair in square if suspect and math.prod(pair.torch_shape[2:]) > 1]
    presumed = [pair.module for pair in square if pair not in refused]
    problems = [
        f"ambiguous: {pair.key} has as many inputs as outputs, and there are transposed "
        f"convolutions: say transposed={{{pair.module!r}: None}} if it is of an ordinary one, or "
        "Flax's transpose_kernel, False or True, in place of None"
        for pair in refused
    ]
    notes = [
        f"taken for no transposed convolutions: {', '.join(presumed)}; "
        f"transposed={presumed[:1]} says otherwise"
    ]
    return problems, notes if presumed else []
