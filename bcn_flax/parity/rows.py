"""One comparison of two arrays, and whether they are as near as two correct programs must be."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from bcn_flax.parity import tolerances
from bcn_flax.parity.errors import Error, Worst, eps, error, narrowest
from bcn_flax.parity.observations import QUANTITIES, Name, Observation, Values
from bcn_flax.parity.tolerances import Tolerance


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

    def distances(self, name: Name, flax: Values, dtype: DTypeLike) -> FromTruth | None:
        """How far both sides are from the truth, if it is known much better than that."""
        if name not in self.expected:
            return None
        shown = flax, self.torch[name], self.other[name]
        *sides, doubt = (_distance(x, self.expected[name], dtype) for x in shown)
        return FromTruth(*sides) if doubt <= max(sides) / 100 else None


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
        return self.worst.error <= 1


class Allowance(NamedTuple):
    """What the tolerances of one phase follow from; see `bcn_flax.parity.tolerances`.

    Attributes:
        dtype: in which the numbers are computed; None for that in which they are stored.
        error: of an operation, relatively.
        steps: of training so far.
        shaken: how far each array went when everything before it was shaken by that error.
        tolerances: the caller's.
    """

    dtype: np.dtype[Any] | None
    error: float
    steps: int
    shaken: Mapping[Name, float]
    tolerances: Sequence[Tolerance]


EXACT = Allowance(None, 0.0, 0, {}, ())


def how_far(plain: Observation, shaken: Observation) -> dict[Name, float]:
    """How far the values of each array went, at most."""

    def distance(x: Values, y: Values) -> float:
        with np.errstate(invalid="ignore"):
            d = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        return float(np.max(d, where=np.isfinite(d), initial=0.0))

    return {name: distance(shaken[name], plain[name]) for name in plain}


def compare_observations(
    phase: str,
    sides: tuple[str, str],
    seen: Mapping[str, Observation],
    allowance: Allowance,
    truth: Truth | None = None,
) -> list[Row]:
    """A row for each number that both sides show.

    Args:
        phase: when.
        sides: who is compared with whom.
        seen: what they show.
        allowance: how far they may be apart.
        truth: to say whether Flax or PyTorch is farther from it.
    """
    actual, expected = (seen[side] for side in sides)
    rows = []
    for name in sorted((n for n in expected if n in actual), key=_order):
        row = _row(phase, sides, name, actual[name], expected[name], allowance)
        if truth is not None:
            row = row._replace(from_truth=truth.distances(name, actual[name], row.dtype))
        rows.append(row)
    return rows


def _distance(x: Values, truth: Values, dtype: DTypeLike) -> float:
    measured = error(x, truth, dtype)
    return np.inf if measured.mismatch else measured.absolute.error


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
    dtype = narrowest((actual.dtype, expected.dtype))
    measured = error(actual, expected, dtype)
    tolerance = tolerances.of(str(name), allowance.tolerances)
    allowed = allowance.error * measured.scale + allowance.shaken.get(name, 0.0)
    allowed *= 2 * allowance.steps * (tolerance.factor if tolerance else 1.0) * bool(eps(dtype))
    # What is stored in a narrower type than it was computed in is rounded once more.
    stored = eps(dtype) / 2 if eps(dtype) > eps(allowance.dtype or dtype) else 0.0
    worst, values, room = _worst(actual, expected, allowed, stored)
    return Row(phase, sides, name, measured, values, worst, room, tolerance, dtype)


def _worst(
    actual: Values, expected: Values, allowed: float, stored: float
) -> tuple[Worst, tuple[float, float], float]:
    """Where the error is largest for what is allowed, the values there, and what is allowed.

    Other shapes, and what is not finite in the same way, are worst of all.
    """
    if actual.shape != expected.shape or not actual.size:
        unlike = np.inf if actual.shape != expected.shape else 0.0
        return Worst(unlike, ()), (np.nan, np.nan), allowed
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        room = allowed + stored * np.abs(b)
        used = np.where(same, 0.0, np.abs(a - b) / room)
    used = np.where(same | (np.isfinite(a) & np.isfinite(b)), used, np.inf)
    place = tuple(map(int, np.unravel_index(used.argmax(), used.shape)))
    return Worst(float(used[place]), place), (float(a[place]), float(b[place])), float(room[place])
