"""One comparison of two arrays, and whether they are as near as two correct programs must be."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bcn_flax.parity import tolerances
from bcn_flax.parity.errors import Error, Worst, eps, error, narrower
from bcn_flax.parity.observations import QUANTITIES, Name, Observation, Values
from bcn_flax.parity.tolerances import SHAKE, Tolerance


class FromTruth(NamedTuple):
    """The largest absolute errors of both sides against the truth."""

    flax: float
    torch: float

    @property
    def farther(self) -> str:
        """Which side is clearly farther from the truth."""
        if max(self) <= 2 * min(self):
            return "neither"
        return "Flax" if self.flax > self.torch else "PyTorch"


class Row(NamedTuple):
    """One comparison.

    Attributes:
        phase: when, such as "training step 1".
        sides: who is compared with whom.
        name: of the numbers.
        error: how far they are apart.
        values: of both sides, where the error is largest for what is allowed.
        worst: the error there, over what is allowed; above 1 it is too large.
        allowed: at that place.
        tolerance: that of the caller, if there is one for this name.
        dtype: the narrower of the two.
        from_truth: how far Flax and PyTorch are from the truth, at most, if it is known.
    """

    phase: str
    sides: tuple[str, str]
    name: Name
    error: Error
    values: tuple[float, float]
    worst: Worst
    allowed: float
    tolerance: Tolerance | None
    dtype: np.dtype[Any]
    from_truth: FromTruth | None = None

    @property
    def passed(self) -> bool:
        """Whether the two sides agree."""
        return self.worst.error <= 1 and not self.error.mismatch


class Truth(NamedTuple):
    """What errors are measured from.

    Attributes:
        expected: the truth, such as PyTorch's module in float64.
        other: the same from elsewhere, such as Flax's module in float64.
        torch: what PyTorch shows in the precision at hand.
    """

    expected: Observation
    other: Observation
    torch: Observation

    def is_known(self, name: Name, difference: Error) -> bool:
        """Whether the two truths are much nearer to each other than what is to be judged."""
        if name not in self.expected:
            return False
        doubt = error(self.other[name], self.expected[name], np.float64)
        return not doubt.mismatch and doubt.absolute.error <= difference.absolute.error / 100


class Allowance(NamedTuple):
    """What the tolerances of one phase follow from.

    Attributes:
        roundings: how many of them are allowed.
        sensitivity: of each number to a relative change of 1 in everything before it.
        precision: the narrowest dtype of arithmetic; None is that of the numbers.
        tolerances: the caller's.
    """

    roundings: float
    sensitivity: Mapping[Name, float]
    precision: Any
    tolerances: Sequence[Tolerance]


def sensitivity(plain: Observation, shaken: Observation) -> dict[Name, float]:
    """How far all numbers went when everything was changed by one rounding, over that rounding."""
    with np.errstate(invalid="ignore"):
        distance = {name: np.abs(shaken[name] - plain[name]) for name in plain}
    return {
        name: float(np.max(d, where=np.isfinite(d), initial=0.0)) / SHAKE
        for name, d in distance.items()
    }


def compare_observations(
    phase: str,
    sides: tuple[str, str],
    actual: Observation,
    expected: Observation,
    allowance: Allowance,
    truth: Truth | None = None,
) -> list[Row]:
    """A row for each number that both sides show.

    Args:
        phase: when.
        sides: who is compared with whom.
        actual: what the one, Flax or PyTorch, shows.
        expected: what the other shows.
        allowance: how far they may be apart.
        truth: to say whether Flax or PyTorch is farther from it.
    """
    rows = []
    for name in sorted((n for n in expected if n in actual), key=_order):
        row = _row(phase, sides, name, actual[name], expected[name], allowance)
        if truth is not None and truth.is_known(name, row.error):
            ends = (actual[name], truth.torch[name])
            errors = (error(x, truth.expected[name], row.dtype).absolute.error for x in ends)
            row = row._replace(from_truth=FromTruth(*errors))
        rows.append(row)
    return rows


def _order(name: Name) -> int:
    """What comes about first explains what differs later."""
    return QUANTITIES.index(name.quantity)


def _row(
    phase: str,
    sides: tuple[str, str],
    name: Name,
    actual: Values,
    expected: Values,
    allowance: Allowance,
) -> Row:
    dtype = narrower(actual.dtype, expected.dtype)
    measured = error(actual, expected, dtype)
    tolerance = tolerances.of(str(name), allowance.tolerances)
    precision = np.dtype(allowance.precision or dtype)
    in_wide = allowance.roundings * eps(precision)
    allowed = in_wide * (measured.scale + allowance.sensitivity.get(name, 0.0))
    # A gradient or a value of exactly 0 on both sides needs no room, only a number to divide by.
    allowed = max(allowed * (tolerance.factor if tolerance else 1.0), np.finfo(np.float64).tiny)
    worst, values, allowed = _worst(actual, expected, allowed, dtype, precision, measured)
    return Row(phase, sides, name, measured, values, worst, allowed, tolerance, dtype)


def _worst(
    actual: Values,
    expected: Values,
    allowed: float,
    dtype: np.dtype[Any],
    precision: np.dtype[Any],
    measured: Error,
) -> tuple[Worst, tuple[float, float], float]:
    """Where the error is largest for what is allowed, the values there, and what is allowed."""
    if actual.shape != expected.shape or not actual.size:
        return Worst(0.0, ()), (np.nan, np.nan), allowed
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    finite = np.isfinite(a) & np.isfinite(b)
    # What is stored in a narrower type than it was computed in is rounded once more.
    stored = eps(dtype) / 2 if eps(dtype) > eps(precision) else 0.0
    room = allowed + stored * np.where(finite, np.abs(b), 0.0)
    with np.errstate(invalid="ignore", over="ignore"):
        used = np.where(finite, np.abs(a - b), 0.0) / room
    index = np.unravel_index(used.argmax(), used.shape)
    if measured.mismatch:
        index = tuple(np.argwhere(~((a == b) | (np.isnan(a) & np.isnan(b)) | finite))[0])
    place = tuple(map(int, index))
    return Worst(float(used[index]), place), (float(a[index]), float(b[index])), float(room[index])
