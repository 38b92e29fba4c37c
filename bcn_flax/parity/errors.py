"""How far two arrays are apart, and where."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

Values = np.ndarray[Any, Any]
Index = tuple[int, ...]


class Worst(NamedTuple):
    """The largest error of one kind, and where it is."""

    error: float
    place: Index


class Error(NamedTuple):
    """How far an array is from another.

    Attributes:
        absolute: the largest `|a - b|`.
        relative: the largest `|a - b| / max(|a|, |b|)`.
        ulps: the largest `|a - b|` in units in the last place of the larger one.
        scale: the largest finite `|b|`.
        mismatch: how shapes differ, or where one side is not finite and the other not the same.
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
    """The spacing of numbers at 1, of any floating dtype of NumPy or JAX; 0 of whole numbers."""
    return float(ml_dtypes.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def narrowest(dtypes: Iterable[DTypeLike]) -> np.dtype[Any]:
    """The least precise of dtypes."""
    return np.dtype(max(dtypes, key=eps))


def error(actual: Values, expected: Values, dtype: DTypeLike) -> Error:
    """Measure how far `actual` is from `expected`, in ulps of `dtype`.

    Values that are not finite must be the same on both sides, at the same places; they are left out
    of the errors.
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
        _worst(difference),
        _worst(difference / np.where(larger > 0, larger, 1)),
        _worst(difference / _ulp(larger, dtype)),
        float(np.abs(b_finite).max(initial=0.0)),
        _mismatch(a, b),
    )


def _worst(errors: Values) -> Worst:
    if not errors.size:
        return _NOWHERE
    index = np.unravel_index(errors.argmax(), errors.shape)
    return Worst(float(errors[index]), tuple(map(int, index)))


def _ulp(x: Values, dtype: DTypeLike) -> Values:
    """The spacing of the numbers of a dtype at `x`; of whole numbers, as if in float64."""
    info = ml_dtypes.finfo(dtype if eps(dtype) else np.float64)
    exponent = np.frexp(np.maximum(x, float(info.smallest_normal)))[1] - 1
    return np.ldexp(float(info.eps), exponent)


def _mismatch(a: Values, b: Values) -> str:
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isfinite(a) & np.isfinite(b))
    if same.all():
        return ""
    index = tuple(map(int, np.argwhere(~same)[0]))
    return (
        f"is not finite in the same way at {np.count_nonzero(~same)} of {a.size} places, the first "
        f"at {index}: {a[index]:g} against {b[index]:g}"
    )
