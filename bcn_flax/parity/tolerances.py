"""How far apart two correct programs may be.

The error that is allowed of an array is

    roundings(values, steps) * eps(dtype) * (scale + sensitivity)

where `values` is the size of the largest reduction, `steps` counts the steps of training so far,
`scale` is the largest value, and `sensitivity` is what a relative change of 1 in everything on the
way there would change in it, to first order: measured, in float64, by shaking every input, every
parameter and every module's output by one rounding of float32, at random. So an error grows with
depth as it does in the model at hand, a mean of 1e4 standard deviations costs the four digits that
it must cost, and a gradient that is 0 because its terms cancel is held to their size, not to its.
What was stored in a narrower type in the end may be off by that one rounding too.
"""

import fnmatch
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHAKE = 2.0**-24  # relative: the rounding error of float32


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


def roundings(values: float, steps: int = 1) -> float:
    """How many roundings to allow where `values` numbers were summed, and `steps` steps taken.

    Roundings of a sum walk at random, so they grow with the root of the number of its terms; each
    step of training adds its own to those it inherits. 8 for the handful of operations around.
    """
    return 8 * float(np.sqrt(values)) * steps


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
