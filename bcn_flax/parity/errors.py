"""How far two arrays are apart, and how far apart two correct programs may be.

The error that is allowed of an array is

    2 * steps * (error * scale + perturbed)

twice the error that one side may make, for each of the `steps` of training so far. `error` is the
relative error of an operation (`relative_error`), `scale` the largest value, and `perturbed` how
far the array moves if everything that it is computed from is perturbed by that error
(`bcn_flax.parity.torch_side.Perturbation`). So the allowed error grows with depth as errors do in
the model at hand. A mean of 1e4 standard deviations may cost the four digits that it has to cost. A
gradient that is 0 because its terms cancel is measured by the size of the terms, not by its own. A
ReLU may open if a rounding can open it. An array that is stored in a narrower type than it is
computed in may be off by that one rounding too.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from bcn_flax.interop.layouts import Array
from bcn_flax.parity.protocol import QUANTITIES, Name, Observation

Index = tuple[int, ...]


class Worst(NamedTuple):
    """The largest error of one kind, and its index."""

    error: float
    place: Index


class Error(NamedTuple):
    """How far an array is from another.

    Attributes:
        absolute: the largest `|a - b|`.
        relative: the largest `|a - b| / max(|a|, |b|)`.
        ulps: the largest `|a - b|` in units in the last place of the larger one.
        scale: the largest finite `|b|`.
        mismatch: how the shapes differ, or where values that are not finite differ; else empty.
    """

    absolute: Worst
    relative: Worst
    ulps: Worst
    scale: float
    mismatch: str = ""

    def ulps_at_scale(self, dtype: DTypeLike) -> float:
        """The largest absolute error in ulps of the largest value."""
        return self.absolute.error / (eps(dtype) * (self.scale or 1))


_NOWHERE = Worst(0.0, ())


def eps(dtype: DTypeLike) -> float:
    """The spacing of the numbers at 1, for any floating dtype of NumPy or JAX; 0 for integers."""
    return float(ml_dtypes.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def narrowest(dtypes: Iterable[DTypeLike]) -> np.dtype[Any]:
    """The least precise of several dtypes."""
    return np.dtype(max(dtypes, key=eps))


def error(actual: Array, expected: Array, dtype: DTypeLike) -> Error:
    """Measure how far `actual` is from `expected`, in ulps of `dtype`.

    Values that are not finite must be the same in both arrays, at the same places; they do not
    count in the errors.
    """
    if actual.shape != expected.shape:
        mismatch = f"has shape {actual.shape} against {expected.shape}, in Flax's order of axes"
        return Error(_NOWHERE, _NOWHERE, _NOWHERE, 0.0, mismatch)
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    a_finite, b_finite = (np.where(finite, x, 0.0) for x in (a, b))
    difference = np.abs(a_finite - b_finite)
    larger = np.maximum(np.abs(a_finite), np.abs(b_finite))
    return Error(
        _largest(difference),
        _largest(difference / np.where(larger > 0, larger, 1)),
        _largest(difference / _ulp(larger, dtype)),
        float(np.abs(b_finite).max(initial=0.0)),
        _mismatch(a, b),
    )


def _largest(errors: Array) -> Worst:
    if not errors.size:
        return _NOWHERE
    index = np.unravel_index(errors.argmax(), errors.shape)
    return Worst(float(errors[index]), tuple(map(int, index)))


def _ulp(x: Array, dtype: DTypeLike) -> Array:
    """The spacing of the numbers of a dtype at `x`; for integers, that of float64."""
    info = ml_dtypes.finfo(dtype if eps(dtype) else np.float64)
    exponent = np.frexp(np.maximum(x, float(info.smallest_normal)))[1] - 1
    return np.ldexp(float(info.eps), exponent)


def _mismatch(a: Array, b: Array) -> str:
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isfinite(a) & np.isfinite(b))
    if same.all():
        return ""
    index = tuple(map(int, np.argwhere(~same)[0]))
    return (
        f"is not finite in the same way at {np.count_nonzero(~same)} of {a.size} places, the first "
        f"at {index}: {a[index]:g} against {b[index]:g}"
    )


def relative_error(dtype: DTypeLike, terms: float) -> float:
    """The relative error that an operation may make if it sums up to so many terms.

    The roundings of a sum are a random walk, so they grow with the square root of the number of
    terms; sums are accumulated in float32 at least. The result is doubled for the few other
    operations around the sum.
    """
    of_a_sum = min(eps(dtype), eps(np.float32)) * float(np.sqrt(terms))
    return 2 * (eps(dtype) + of_a_sum)


def roundings(terms: float) -> float:
    """How many float32 roundings two results of such an operation may be apart."""
    return 2 * relative_error(np.float32, terms) / eps(np.float32)


class Tolerance(NamedTuple):
    """Another tolerance for some of the arrays.

    Attributes:
        pattern: of their names, as printed; `*` matches anything, as in `statistic */var`.
        factor: of the allowed error; below 1 it is tighter.
        reason: why it has to be wider; printed in the report.
    """

    pattern: str
    factor: float
    reason: str = ""

    def matches(self, name: Name) -> bool:
        """Whether the tolerance is for an array of this name."""
        return fnmatch.fnmatchcase(str(name), self.pattern)


class Accuracy(NamedTuple):
    """The largest absolute errors of both sides, measured from a reference."""

    flax: float
    torch: float

    @property
    def less_accurate(self) -> str:
        """The side with a clearly larger error, "Flax" or "PyTorch", or "neither"."""
        if max(self) <= 2 * min(self):
            return "neither"
        return "Flax" if self.flax > self.torch else "PyTorch"


class Reference(NamedTuple):
    """What the accuracy of both sides is measured from.

    Attributes:
        expected: the reference, such as PyTorch's module in float64.
        other: an independent one, such as Flax's module in float64.
        torch: what PyTorch shows in the precision at hand.
    """

    expected: Observation
    other: Observation
    torch: Observation

    def accuracy(self, name: Name, flax: Array, dtype: DTypeLike) -> Accuracy | None:
        """The errors of both sides; None if the two references are not much nearer together."""
        if name not in self.expected:
            return None
        shown = flax, self.torch[name], self.other[name]
        *sides, doubt = (_distance(x, self.expected[name], dtype) for x in shown)
        return Accuracy(*sides) if doubt <= max(sides) / 100 else None


class Row(NamedTuple):
    """The comparison of one array of two implementations.

    Attributes:
        phase: in which it was computed, such as "training step 1".
        implementations: the names of the two.
        name: of the array.
        error: how far the two are apart.
        values: of both, at the place where the error is largest relative to what is allowed.
        worst: the error at that place, divided by what is allowed; above 1 it is too large.
        allowed: at that place.
        tolerance: the caller's, if there is one for this name.
        dtype: the narrower of the two.
        accuracy: of Flax and PyTorch, if a reference is known.
    """

    phase: str
    implementations: tuple[str, str]
    name: Name
    error: Error
    values: tuple[float, float]
    worst: Worst
    allowed: float
    tolerance: Tolerance | None
    dtype: np.dtype[Any]
    accuracy: Accuracy | None = None

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return self.worst.error <= 1

    @property
    def trains(self) -> bool:
        """Whether it is of a step of training."""
        return self.phase.startswith("training")


class Allowance(NamedTuple):
    """What the allowed errors of one phase follow from; see the equation above.

    Attributes:
        dtype: in which the arrays are computed; None for the dtype in which they are stored.
        error: of an operation, relatively.
        steps: of training so far.
        perturbed: how far each array moves if everything before it is perturbed by that error.
        tolerances: the caller's.
    """

    dtype: np.dtype[Any] | None
    error: float
    steps: int
    perturbed: Mapping[Name, float]
    tolerances: Sequence[Tolerance]


EXACT = Allowance(None, 0.0, 0, {}, ())


def largest_differences(one: Observation, other: Observation) -> dict[Name, float]:
    """The largest finite difference between two observations of each array."""

    def distance(x: Array, y: Array) -> float:
        with np.errstate(invalid="ignore"):
            d = np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        return float(np.max(d, where=np.isfinite(d), initial=0.0))

    return {name: distance(other[name], one[name]) for name in one}


def compare_observations(
    phase: str,
    implementations: tuple[str, str],
    seen: Mapping[str, Observation],
    allowance: Allowance,
    reference: Reference | None = None,
) -> list[Row]:
    """A row for each array that both implementations show.

    Args:
        phase: its name.
        implementations: the names of the two.
        seen: what they show, by their names.
        allowance: how far they may be apart.
        reference: to measure the accuracy of Flax and PyTorch.
    """
    actual, expected = (seen[name] for name in implementations)
    rows = []
    for name in sorted((n for n in expected if n in actual), key=_order):
        row = _row(phase, implementations, name, actual[name], expected[name], allowance)
        if reference is not None:
            row = row._replace(accuracy=reference.accuracy(name, actual[name], row.dtype))
        rows.append(row)
    return rows


def _distance(x: Array, reference: Array, dtype: DTypeLike) -> float:
    measured = error(x, reference, dtype)
    return np.inf if measured.mismatch else measured.absolute.error


def _order(name: Name) -> int:
    return QUANTITIES.index(name.quantity)


def _row(
    phase: str,
    implementations: tuple[str, str],
    name: Name,
    actual: Array,
    expected: Array,
    allowance: Allowance,
) -> Row:
    dtype = narrowest((actual.dtype, expected.dtype))
    measured = error(actual, expected, dtype)
    # The last tolerance that matches takes precedence.
    tolerance = next((t for t in reversed(allowance.tolerances) if t.matches(name)), None)
    allowed = allowance.error * measured.scale + allowance.perturbed.get(name, 0.0)
    allowed *= 2 * allowance.steps * (tolerance.factor if tolerance else 1.0) * bool(eps(dtype))
    # An array that is stored in a narrower type than it is computed in is rounded once more.
    stored = eps(dtype) / 2 if eps(dtype) > eps(allowance.dtype or dtype) else 0.0
    worst, values, room = _worst(actual, expected, allowed, stored)
    return Row(phase, implementations, name, measured, values, worst, room, tolerance, dtype)


def _worst(
    actual: Array, expected: Array, allowed: float, stored: float
) -> tuple[Worst, tuple[float, float], float]:
    """The largest error relative to what is allowed, the values there, and what is allowed there.

    It is infinite if the shapes differ, or values that are not finite.
    """
    if actual.shape != expected.shape or not actual.size:
        unequal = np.inf if actual.shape != expected.shape else 0.0
        return Worst(unequal, ()), (np.nan, np.nan), allowed
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        room = allowed + stored * np.abs(b)
        used = np.where(same, 0.0, np.abs(a - b) / room)
    used = np.where(same | (np.isfinite(a) & np.isfinite(b)), used, np.inf)
    place = tuple(map(int, np.unravel_index(used.argmax(), used.shape)))
    return Worst(float(used[place]), place), (float(a[place]), float(b[place])), float(room[place])
