"""Weight standardization: its definition, its layers, and which parameters stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bcn_flax import WSConv, WSConvTranspose, WSDense, standardize_kernel
from bcn_flax.parity.errors import eps
from parity_tests import oracle
from parity_tests.tolerances import assert_close

standardize = jax.jit(standardize_kernel, static_argnames="axis")
KERNELS = [(16, 5), (3, 8, 5), (3, 3, 8, 5), (2, 3, 2, 4, 5), (2, 5)]


def kernel_of(shape, mean=0.3, dtype=np.float32):
    return np.random.default_rng(0).normal(mean, 0.2, shape).astype(dtype)


@pytest.mark.parametrize("shape", KERNELS, ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.3, 100.0])
def test_it_is_the_definition(shape, mean):
    kernel = kernel_of(shape, mean)
    expected = oracle.standardize_kernel(kernel.astype(np.float64))
    ratio = 1 + np.abs(mean) / kernel.std()
    scale = ratio * np.abs(expected).max()
    actual = standardize(kernel)
    assert_close(actual, expected, ulps=32, dtype=np.float32, scale=scale)


def test_gradient_is_that_of_the_definition(x64):
    kernel = kernel_of((3, 3, 4, 5), dtype=np.float64)

    def definition(w):
        mean = w.mean((0, 1, 2), keepdims=True)
        var = jnp.var(w, (0, 1, 2), ddof=1, keepdims=True)
        return (w - mean) / jnp.sqrt(var + 1e-5)

    actual, expected = (
        jax.jit(jax.grad(lambda w, f=f: jnp.sum(jnp.sin(f(w)))))(kernel)
        for f in (standardize_kernel, definition)
    )
    assert_close(actual, expected, ulps=1000, dtype=np.float64)


def test_a_constant_kernel_has_a_finite_gradient():
    gradient = jax.jit(jax.grad(lambda w: standardize_kernel(w)[0, 0]))(jnp.ones((4, 2)))
    assert np.isfinite(gradient).all()


def test_output_channels_may_lie_along_any_axis():
    kernel = kernel_of((3, 3, 4, 5))
    moved = standardize(np.moveaxis(kernel, -1, -2), axis=-2)
    np.testing.assert_array_equal(moved, np.moveaxis(standardize(kernel), -1, -2))


def test_masked_weights_come_out_as_0_and_do_not_count():
    kernel = kernel_of((9, 5))
    mask = np.arange(9)[:, None] < np.array([9, 5, 3, 1, 0])
    actual = np.asarray(standardize(kernel, mask=mask))
    for channel in range(3):
        kept = mask[:, channel]
        expected = oracle.standardize_kernel(kernel[kept, channel, None].astype(np.float64))[:, 0]
        assert_close(actual[kept, channel], expected, ulps=64, dtype=np.float32)
    assert (actual[~mask] == 0).all()
    assert np.isfinite(actual).all()


LAYERS = [
    (WSConv(6, (3, 3)), nn.Conv(6, (3, 3))),
    (WSConv(6, (3,), 2, padding="CIRCULAR"), nn.Conv(6, (3,), 2, padding="CIRCULAR")),
    (
        WSConv(6, (2, 2, 2), feature_group_count=2, use_bias=False),
        nn.Conv(6, (2, 2, 2), feature_group_count=2, use_bias=False),
    ),
    (WSConvTranspose(6, (3, 3), (2, 2)), nn.ConvTranspose(6, (3, 3), (2, 2))),
    (
        WSConvTranspose(6, (3, 3), transpose_kernel=True),
        nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
    ),
    (WSDense(6), nn.Dense(6)),
]


def input_of(layer):
    window = getattr(layer, "kernel_size", (0,))
    return jnp.asarray(kernel_of((2, *(5 for _ in window), 4)))


@pytest.mark.parametrize(("layer", "plain"), LAYERS, ids=lambda layer: type(layer).__name__)
def test_layers_are_flaxs_with_a_standardized_kernel(layer, plain):
    """The parameters and, bit for bit, the output of the plain layer with a standardized kernel."""
    x = input_of(layer)
    variables, raw = (jax.jit(model.init)(jax.random.key(0), x) for model in (layer, plain))
    jax.tree.map(np.testing.assert_array_equal, variables, raw)
    axis = -2 if getattr(layer, "transpose_kernel", False) else -1
    kernel = standardize_kernel(raw["params"]["kernel"], axis=axis)
    standardized = {"params": {**raw["params"], "kernel": kernel}}
    np.testing.assert_array_equal(layer.apply(variables, x), plain.apply(standardized, x))


def test_a_kernel_mask_still_masks():
    mask = jnp.ones((3, 3, 4, 6)).at[1:, 1:].set(0)
    layer = WSConv(6, (3, 3), mask=mask)
    x = input_of(layer)
    variables = layer.init(jax.random.key(0), x)
    kernel = standardize_kernel(variables["params"]["kernel"], mask=mask.astype(bool))
    expected = nn.Conv(6, (3, 3)).apply({"params": {**variables["params"], "kernel": kernel}}, x)
    np.testing.assert_array_equal(layer.apply(variables, x), expected)
    # The last pixel of the window is masked, so the last pixel of the image cannot reach the first.
    changed = layer.apply(variables, x.at[:, 1, 1].add(1.0))
    np.testing.assert_array_equal(changed[:, 0, 0], layer.apply(variables, x)[:, 0, 0])


def test_bfloat16_standardizes_in_float32_before_the_cast():
    """With a mean of 500 deviations, bfloat16 weights would lose the deviations."""
    layer = WSDense(6, dtype=jnp.bfloat16, use_bias=False)
    x = jnp.eye(64, dtype=jnp.bfloat16)
    kernel = kernel_of((64, 6), mean=100.0)
    y = layer.apply({"params": {"kernel": jnp.asarray(kernel)}}, x)
    assert y.dtype == jnp.bfloat16
    expected = oracle.standardize_kernel(kernel.astype(np.float64))
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= eps(jnp.bfloat16) * 4


def test_half_precision_parameters_keep_their_type():
    layer = WSConv(6, (3, 3), param_dtype=jnp.bfloat16)
    x = input_of(layer).astype(jnp.bfloat16)
    y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    assert y.dtype == variables["params"]["kernel"].dtype == jnp.bfloat16
