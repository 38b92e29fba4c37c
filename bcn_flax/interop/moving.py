"""Move values between tensors and leaves that were matched, as often as wanted."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from bcn_flax.interop import arrays, naming, torch_side, trees
from bcn_flax.interop.complaints import differences, refuse
from bcn_flax.interop.layouts import Layout, Shape
from bcn_flax.interop.naming import Path
from bcn_flax.interop.torch_side import Tensors
from bcn_flax.interop.trees import Variables


class Pair(NamedTuple):
    """A tensor of PyTorch and the leaf of Flax's variables that has its values.

    Attributes:
        key: in the `state_dict`.
        torch_shape: of the tensor.
        path: in the variables, from the collection on.
        flax_shape: of the leaf.
        flax_dtype: of the leaf.
        layout: how one becomes the other.
    """

    key: str
    torch_shape: Shape
    path: Path
    flax_shape: Shape
    flax_dtype: np.dtype[Any]
    layout: Layout

    @property
    def module(self) -> str:
        """PyTorch's module."""
        return naming.module_and_leaf(self.key)[0]


@dataclass(frozen=True)
class Match:
    """Which tensor of PyTorch is which leaf of Flax's variables; printed, a report.

    Attributes:
        pairs: every leaf of Flax's variables, with its tensor.
        tied: by key, tensors that are one with another in memory, and the key of that.
        left: by key, tensors that have no counterpart in Flax, and why nothing is lost.
        tensors: PyTorch's side as it was matched.
        notes: what was presumed, or is unlikely.
    """

    pairs: tuple[Pair, ...]
    tied: Mapping[str, str]
    left: Mapping[str, str]
    tensors: Tensors = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_flax(self, source: Any, *, partial: bool = False) -> dict[str, Any]:
        """Flax variables with the values of PyTorch's tensors.

        Args:
            source: a `state_dict` or module of the keys and shapes that were matched, or gradients
                under their parameters' names.
            partial: whether tensors may be missing, as statistics are among gradients; their leaves
                are missing in the result then.

        Returns:
            Variables as linen has them, in the dtypes of the leaves that were matched.

        Raises:
            ValueError: a tensor is missing, unexpected or misshapen, a value is too large for its
                new dtype, or tied tensors differ; the message lists all of them.
        """
        tensors = torch_side.tensors(source)
        shapes = {key: arrays.shape(x) for key, x in tensors.items()}
        wanted = {pair.key: pair.torch_shape for pair in self.pairs}
        spare = (self.tied.keys() | self.left.keys()) - wanted.keys()
        problems = differences(shapes, wanted, spare, partial)
        refuse("The tensors must be those that were matched, but:", problems)

        pairs = [pair for pair in self.pairs if pair.key in tensors]
        values = {
            pair.path: pair.layout.to_flax(arrays.values(tensors[pair.key])) for pair in pairs
        }
        problems = [
            f"{pair.key} {problem}"
            for pair in pairs
            for problem in arrays.overflow(values[pair.path], pair.flax_dtype)
        ]
        problems += [
            f"{key} and {other} were one tensor and now differ"
            for key, other in self.tied.items()
            if key in tensors and other in tensors and not _equal(tensors[key], tensors[other])
        ]
        refuse("The values must have a place in Flax, but:", problems)
        return unflatten_dict(
            {pair.path: arrays.to_jax(values[pair.path], pair.flax_dtype) for pair in pairs}
        )

    def to_torch(
        self, variables: Variables | nnx.Module, *, partial: bool = False
    ) -> dict[str, Any]:
        """A PyTorch `state_dict` with the values of Flax variables.

        Args:
            variables: linen variables or an NNX module, with the leaves and shapes that were
                matched, or gradients in the tree of the variables.
            partial: whether leaves may be missing; their tensors are missing in the result then, as
                are those that have no counterpart in Flax.

        Returns:
            Keys, dtypes, devices and kind of array (PyTorch's, NumPy's or JAX's) are those of the
            tensors that were matched; those in `left` are these tensors themselves.

        Raises:
            ValueError: a leaf is missing, unexpected or misshapen, a value is too large for its new
                dtype, or tied tensors would get different values; the message lists all of them.
        """
        leaves = trees.flax_leaves(variables)
        shapes = {trees.name(path): arrays.shape(x) for path, x in leaves.items()}
        wanted = {trees.name(pair.path): pair.flax_shape for pair in self.pairs}
        problems = differences(shapes, wanted, partial=partial)
        refuse("The variables must be those that were matched, but:", problems)

        values = {
            pair.key: pair.layout.to_torch(arrays.values(leaves[pair.path]))
            for pair in self.pairs
            if pair.path in leaves
        }
        for key, other in self.tied.items():
            if other in values:
                values.setdefault(key, values[other])
        problems = [
            f"{key} {problem}"
            for key, x in values.items()
            for problem in arrays.overflow(x, arrays.dtype(self.tensors[key]))
        ]
        problems += [
            f"{key} and {other} are one tensor, for which Flax has different values"
            for key, other in self.tied.items()
            if key in values and other in values and not _equal(values[key], values[other])
        ]
        refuse("The values must have a place in PyTorch, but:", problems)
        moved = {key: arrays.as_kind_of(self.tensors[key], x) for key, x in values.items()}
        return {
            key: moved.get(key, tensor)
            for key, tensor in self.tensors.items()
            if key in moved or not partial
        }

    def __str__(self) -> str:
        """A line for each tensor of PyTorch: where it goes and how, or why not; then the notes."""
        rows = [
            (p.key, f"{p.torch_shape}", "->", trees.name(p.path), f"{p.flax_shape}", p.layout.how)
            for p in self.pairs
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        paired = {pair.key for pair in self.pairs}
        lines += [f"{key}: tied to {o}" for key, o in self.tied.items() if key not in paired]
        lines += [f"{key}: left, as {why}" for key, why in self.left.items()]
        return "\n".join([*lines, *self.notes])


def _equal(x: Any, y: Any) -> bool:
    x, y = arrays.values(x), arrays.values(y)
    return np.array_equal(x, y, equal_nan=True)
