"""How far apart two correct programs may be.

The error that is allowed of an array is

    2 * steps * (error * scale + shaken)

twice what one side may err, at each of the `steps` of training so far. `error` is the relative
error of an operation (`relative_error`), `scale` the largest value, and `shaken` how far the array
goes if everything on the way there is shaken by that error (`bcn_flax.parity.shaking`). So what is
allowed grows with depth as errors do in the model at hand, a mean of 1e4 standard deviations costs
the four digits that it must cost, a gradient that is 0 because its terms cancel is held to their
size, not to its own, and a ReLU may open where a rounding can open it. What was stored in a
narrower type in the end may be off by that one rounding too.
"""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from bcn_flax.parity.errors import eps


class Tolerance(NamedTuple):
    """Another tolerance for some of the numbers.

    Attributes:
        names: of which, as they are printed; `*` stands for anything, as in "statistic */var".
        factor: of the error that is allowed; below 1 it is tighter.
        reason: why it must be wider; printed in the report.
    """

    names: str
    factor: float
    reason: str = ""


def relative_error(dtype: DTypeLike, values: float) -> float:
    """The error that an operation may make, if it sums up to `values` numbers.

    Roundings of a sum walk at random, so they grow with the root of the number of its terms, but
    nobody sums in less than float32. Twice that, for the handful of operations around.
    """
    of_a_sum = min(eps(dtype), eps(np.float32)) * float(np.sqrt(values))
    return 2 * (eps(dtype) + of_a_sum)


def roundings(values: float) -> float:
    """How many roundings both sides may be apart, of float32 or wider, after such an operation."""
    return 2 * relative_error(np.float32, values) / eps(np.float32)


def check(tolerances: Sequence[Tolerance]) -> None:
    """Refuse a wider tolerance without a reason.

    Raises:
        ValueError: there is one, or a factor that is not positive.
    """
    for tolerance in tolerances:
        if not tolerance.factor > 0:
            raise ValueError(f"The factor of a tolerance must be positive, but: {tolerance}.")
        if tolerance.factor > 1 and not tolerance.reason.strip():
            raise ValueError(
                f"A wider tolerance needs a reason, which the report prints, but: {tolerance}."
            )


def of(name: str, tolerances: Sequence[Tolerance]) -> Tolerance | None:
    """The last of the tolerances that is for this name."""
    matching = (t for t in reversed(tolerances) if fnmatch.fnmatchcase(name, t.names))
    return next(matching, None)
