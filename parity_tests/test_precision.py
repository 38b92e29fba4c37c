"""The error stays within a few roundings of the data, however far the mean is from 0."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bcn_flax import BatchChannelNorm, BatchNorm, ChannelNorm
from bcn_flax.affine import moments
from bcn_flax.parity.errors import eps
from parity_tests import oracle
from parity_tests.tolerances import assert_close

SHAPES = [(2, 4, 4, 16), (3, 33, 35, 8), (1, 256, 256, 8), (64, 32), (2, 5, 6, 7, 8)]
RATIOS = [0, 1, 10, 100, 1e3, 1e4]
BOUND = 32  # ulps of (1 + |mean| / std): the rounding of x alone is worth half of one


def data(shape, ratio, kind="normal"):
    """Float32 data with standard deviation 1 and mean `ratio` in each channel of each sample."""
    z = np.random.default_rng(0).standard_normal(shape)
    space = tuple(range(1, len(shape) - 1))
    if kind == "first value":  # an outlier just where a careless pivot would be
        z[:, *(0 for _ in space)] += 1000
    if kind == "lattice":  # outliers at regular places, as after a strided convolution's transpose
        z[:, *(slice(d // 16, None, max(1, d // 8)) for d in shape[1:-1])] += 1000
    if space:
        z = (z - z.mean(space, keepdims=True)) / z.std(space, keepdims=True)
    return (z + ratio).astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "first value", "lattice"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_are_within_the_bound(shape, kind):
    measure = jax.jit(moments)
    for ratio in RATIOS:
        x = data(shape, ratio, kind)
        m, exact = measure(jnp.asarray(x)), x.astype(np.float64)
        space = tuple(range(1, x.ndim - 1))
        assert_close(
            m.mean_from_zero, exact.mean(space), ulps=BOUND, dtype=np.float32, scale=1 + ratio
        )
        # Measured from an origin nearby, the variance does not see how large the mean is.
        assert_close(m.var, exact.var(space), ulps=BOUND, dtype=np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("layer", "exact", "estimated"),
    [
        (BatchNorm(use_running_average=False), lambda: oracle.BatchNorm(estimate=False), False),
        (ChannelNorm(4), lambda: oracle.ChannelNorm(4), False),
        *(
            (
                BatchChannelNorm(num_groups=4, use_running_average=False, estimate=estimate),
                lambda estimate=estimate: oracle.BatchChannelNorm(4, estimate),
                estimate,
            )
            for estimate in (True, False)
        ),
    ],
    ids=["batch_norm", "channel_norm", "estimated", "batch"],
)
def test_layers_are_within_the_bound(layer, exact, estimated, shape):
    forward = jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x)[0])
    for ratio in RATIOS:
        x = data(shape, ratio)
        expected = exact().forward(x.astype(np.float64))
        # Results beyond 4 standard deviations are rounded themselves in proportion. The running
        # mean is rounded where it is stored; the batch's own is as precise as the deviations.
        scale = max(1, np.abs(expected).max() / 4) * (1 + ratio if estimated else 1)
        assert_close(
            forward(x), expected, ulps=BOUND, dtype=np.float32, scale=scale, name=f"mean {ratio}"
        )


@pytest.mark.parametrize("ratio", [1e6, 1e8])
def test_output_is_finite_where_float32_cannot_tell_the_values_apart(ratio):
    x = data((4, 16, 16, 8), ratio)
    for estimate in (True, False):
        layer = BatchChannelNorm(num_groups=4, use_running_average=False, estimate=estimate)
        variables = layer.init(jax.random.key(0), x)

        def loss(x, layer=layer, variables=variables):
            y, _ = layer.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(y**2)

        value, gradient = jax.value_and_grad(loss)(x)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype):
    """Within one rounding of the exact result for the very same input: all else is float32."""
    x = data((4, 8, 8, 16), 3).astype(dtype)
    layer = BatchChannelNorm(num_groups=4, use_running_average=False, dtype=dtype)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == dtype
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    exact = oracle.BatchChannelNorm(4, estimate=True)
    expected = exact.forward(x.astype(np.float64))
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert (error <= eps(dtype) * np.maximum(np.abs(expected), 2**-6)).all()
    for name, value in updates["batch_stats"]["batch_norm"].items():
        assert value.dtype == np.float32
        assert_close(value, getattr(exact.batch_norm, name), ulps=8, dtype=np.float32, name=name)


def test_an_overflowing_variance_is_infinite_and_not_nan():
    m = moments(jnp.asarray(data((1, 4, 4, 2), 0) * np.float32(1e20)))
    assert np.isposinf(m.var).all()


def test_float32_stays_float32_where_float64_is_enabled(x64):
    x = jnp.asarray(data((2, 4, 4, 8), 1))
    layer = BatchChannelNorm(num_groups=4, use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    step = jax.make_jaxpr(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]))
    assert "f64[2,4,4,8]" not in str(step(variables, x))
    assert "f32[2,4,4,8]" in str(step(variables, x))


def test_a_large_mean_that_all_channels_share_costs_a_channel_norm_nothing():
    """All values are exact in float32, so the large mean has rounded none of them."""
    z = np.round(16 * data((2, 4, 4, 16), 0)) / 16
    y, _ = ChannelNorm(4).init_with_output(jax.random.key(0), z + np.float32(8192))
    expected = oracle.ChannelNorm(4).forward(z.astype(np.float64))
    assert_close(y, expected, ulps=BOUND, dtype=np.float32, scale=np.abs(expected).max())
