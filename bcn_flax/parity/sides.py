"""All that compute, side by side."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from bcn_flax.parity import flax_side
from bcn_flax.parity.errors import eps
from bcn_flax.parity.observations import Observation, Side, Values
from bcn_flax.parity.optimizers import Optimizer
from bcn_flax.parity.phases import Phase
from bcn_flax.parity.tolerances import relative_error
from bcn_flax.parity.twins import Twins

Oracle = Callable[[Mapping[str, Any]], Side]

FLAX, JITTED, EAGER, FLAX_64 = "Flax", "Flax, jitted", "Flax, eager", "Flax in float64"
TORCH, TORCH_64 = "PyTorch", "PyTorch in float64"
SHAKEN = "PyTorch, shaken", "PyTorch, shaken the other way"
SHAKEN_64 = "PyTorch in float64, shaken", "PyTorch in float64, shaken the other way"
ORACLE = "the oracle"


class Precision(NamedTuple):
    """In what numbers are computed, and what follows for their errors.

    Attributes:
        dtype: the narrowest one.
        error: of an operation, relatively.
        shaken: the sides that are shaken by that error, and by its opposite.
    """

    dtype: np.dtype[Any]
    error: float
    shaken: tuple[str, str]


class Precisions(NamedTuple):
    """Of the modules as they are, and in float64."""

    native: Precision
    wide: Precision


def precisions(native: Twins, plan: Sequence[Phase], demanded: DTypeLike | None) -> Precisions:
    """The precision of the numbers as they are, or the wider one that the caller demands.

    Raises:
        ValueError: it is a narrower one.
    """
    seen = native.dtype(plan[0].inputs)
    dtype = np.dtype(demanded or seen)
    if eps(dtype) > eps(seen):
        raise ValueError(
            f"precision may demand more than the numbers' own, {seen}, but {dtype} is less: give a "
            "Tolerance, with a reason."
        )
    given = [x for phase in plan for x in phase.inputs]
    outputs = native.outputs(plan[0].inputs, False)
    values = _largest_reduction([*given, *outputs, *native.leaves()])
    wide = np.dtype(np.float64)
    return Precisions(
        Precision(dtype, relative_error(dtype, values), SHAKEN),
        Precision(wide, relative_error(wide, values), SHAKEN_64),
    )


def _largest_reduction(arrays: Sequence[Any]) -> int:
    """How many numbers are summed at most: all of a channel, or all of a sample."""
    shapes = [x.shape for x in arrays if len(x.shape)]
    return max((math.prod(s) // max(1, min(s[0], s[-1])) for s in shapes), default=1)


def sides(
    native: Twins,
    wide: Twins,
    optimizer: Optimizer,
    errors: Precisions,
    *,
    eager: bool,
    oracle: Oracle | None,
    compare_wide: bool,
) -> dict[str, Side]:
    """All that compute, by name.

    Args:
        native: the modules as they are.
        wide: in float64.
        optimizer: of all.
        errors: by which to shake.
        eager: whether Flax's is to run eagerly too.
        oracle: see `compare`.
        compare_wide: whether there is to be a comparison in float64.
    """
    made: dict[str, Side] = {JITTED: native.flax_side(optimizer, jit=True)}
    if eager:
        made[EAGER] = native.flax_side(optimizer, jit=False)
    made[TORCH] = native.torch_side(optimizer)
    made[TORCH_64] = _Wide(wide.torch_side(optimizer))
    if oracle is not None:
        made[ORACLE] = _Wide(oracle(wide.variables))
    if compare_wide:
        made[FLAX_64] = _Wide(wide.flax_side(optimizer, jit=True))
    for precision in errors if compare_wide else errors[:1]:
        for side, sign in zip(precision.shaken, (1, -1), strict=True):
            made[side] = _Wide(wide.torch_side(optimizer, shake=sign * precision.error))
    return made


class _Wide:
    """A side in float64, that takes inputs of any precision."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def __call__(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        inputs, output_gradients = map(flax_side.in_float64, (inputs, output_gradients))
        return self._side(inputs, output_gradients, train)
