"""How a test compares numbers within a tolerance of its own."""

import numpy as np

from bcn_flax.parity.errors import eps


def assert_close(
    actual, expected, *, ulps: float, dtype, scale=None, stored=None, name: str = "value"
) -> None:
    """`actual` and `expected` differ by at most `ulps` roundings of `dtype` at `scale`.

    `scale` is the size of the terms that were summed to get there, by default the largest expected
    value: a sum that cancels cannot be more precise than its terms. If the actual value was
    `stored` in a narrower type at the end, it may differ by that one rounding, too. Both must be
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
    assert np.isfinite(actual[finite]).all(), f"{name}: not finite, but the expected value is"
    error = np.zeros(actual.shape)
    last_rounding = eps(stored) / 2 * np.abs(expected[finite]) if stored else 0
    difference = np.maximum(np.abs(actual[finite] - expected[finite]) - last_rounding, 0)
    error[finite] = difference / (eps(dtype) * scale)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= ulps, (
        f"{name}: {error.max():.1f} ulps apart at {tuple(map(int, worst))}, {ulps:.1f} allowed: "
        f"{actual[worst]!r} against {expected[worst]!r}"
    )
