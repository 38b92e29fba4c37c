"""How numbers are compared, and how far the three sides of the parity tests may be apart."""

import ml_dtypes
import numpy as np


def eps(dtype) -> float:
    """The spacing of numbers at 1, of any floating dtype of NumPy or JAX."""
    return float(ml_dtypes.finfo(dtype).eps)


def assert_close(
    actual, expected, *, ulps: float, dtype, scale=None, stored=None, name: str = "value"
) -> None:
    """`actual` and `expected` differ by at most `ulps` roundings of `dtype` at `scale`.

    `scale` is the size of the terms that were summed to get there, by default the largest expected
    value: a sum that cancels cannot be more precise than its terms. Where the actual value was
    `stored` in a narrower type in the end, it may differ by that one rounding too. Both must be
    non-finite at the same places, in the same way.
    """
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape, f"{name}: {actual.shape} against {expected.shape}"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=name)
    if not finite.any():
        return
    if scale is None:
        scale = max(np.abs(expected[finite]).max(), np.finfo(np.float64).tiny)
    assert np.isfinite(actual[finite]).all(), f"{name}: not finite where the other side is"
    error = np.zeros(actual.shape)
    last_rounding = eps(stored) / 2 * np.abs(expected[finite]) if stored else 0
    difference = np.maximum(np.abs(actual[finite] - expected[finite]) - last_rounding, 0)
    error[finite] = difference / (eps(dtype) * scale)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= ulps, (
        f"{name}: {error.max():.1f} ulps apart at {tuple(map(int, worst))}, {ulps:.1f} allowed: "
        f"{actual[worst]!r} against {expected[worst]!r}"
    )


def roundings(values: int, steps: int = 1) -> float:
    """How many roundings to allow where `values` numbers were summed, and `steps` steps taken.

    Roundings of a sum walk at random, so they grow with the root of the number of its terms; each
    step of training adds its own to those it inherits. 8 for the handful of operations around.
    """
    return 8 * np.sqrt(values) * steps
