"""How estimates move, their types, and other properties of single layers.

Properties of all layers are in `parity_tests.laws`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

from bcn_flax import BatchChannelNorm, BatchNorm
from bcn_flax.affine import Moments
from bcn_flax.norms import moving_average
from parity_tests.tolerances import assert_close


def data(shape=(4, 5, 3, 4)):
    return jnp.asarray(np.random.default_rng(0).normal(5, 2, shape), jnp.float32)


def first_output(layer, x):
    return jax.jit(layer.init_with_output)(jax.random.key(0), x)


def moments_of(value, counts=None):
    return Moments(jnp.full((1, 3), value), jnp.full((1, 3), 2 * value), counts=counts)


def test_moving_average_weighs_the_old_value_by_momentum():
    updated = moving_average(moments_of(1.0), moments_of(2.0), 0.75)
    np.testing.assert_array_equal(updated.mean, np.full((1, 3), 1.25))
    np.testing.assert_array_equal(updated.var, np.full((1, 3), 2.5))


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 2.0), (1.0, 1.0)])
def test_moving_average_may_forget_all_or_nothing(momentum, expected):
    updated = moving_average(moments_of(1.0), moments_of(2.0), momentum)
    np.testing.assert_array_equal(updated.mean, np.full((1, 3), expected))


def test_moving_average_keeps_what_it_has_where_nothing_counts():
    batch = moments_of(2.0, counts=jnp.asarray([[1.0, 0.0, 1.0]]))
    updated = moving_average(moments_of(1.0), batch, 0.5)
    np.testing.assert_array_equal(updated.mean, [[1.5, 1.0, 1.5]])


def test_moving_average_has_no_gradient():
    gradient = jax.grad(lambda v: moving_average(moments_of(1.0), moments_of(v), 0.5).var.sum())
    assert gradient(3.0) == 0


@pytest.mark.parametrize(
    ("param_dtype", "stored"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_statistics_are_float32_or_wider(dtype, param_dtype, stored):
    layer = BatchChannelNorm(num_groups=2, param_dtype=param_dtype, use_running_average=False)

    def first_step(x):
        y, variables = layer.init_with_output(jax.random.key(0), x)
        _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return y, variables["params"], updates["batch_stats"]

    y, params, stats = jax.eval_shape(first_step, data().astype(dtype))
    assert {s.dtype for s in jax.tree.leaves(stats)} == {jnp.dtype(stored)}
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    assert y.dtype == jnp.promote_types(dtype, param_dtype)


def test_statistics_are_float64_where_the_parameters_are(x64):
    layer = BatchChannelNorm(num_groups=2, param_dtype=jnp.float64, use_running_average=False)
    init = partial(layer.init, jax.random.key(0))
    variables = jax.eval_shape(init, jnp.asarray(data(), jnp.float64))
    assert {s.dtype for s in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}


def test_scale_and_bias_can_be_left_out():
    layer = BatchChannelNorm(
        num_groups=2, use_running_average=False, use_scale=False, use_bias=False
    )
    full = BatchChannelNorm(num_groups=2, use_running_average=False)
    y, variables = first_output(layer, data())
    assert "params" not in variables
    np.testing.assert_array_equal(y, first_output(full, data())[0])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("make", [nn.BatchNorm, BatchNorm])
def test_the_result_has_the_type_that_flax_gives_it(make, learned):
    layer = make(use_running_average=False, use_scale=learned, use_bias=learned)
    init = partial(layer.init_with_output, jax.random.key(0))
    y, _ = jax.eval_shape(init, data().astype(jnp.bfloat16))
    assert y.dtype == (jnp.float32 if learned else jnp.bfloat16)


def test_the_last_initializers_are_the_channel_norms():
    layer = BatchChannelNorm(
        num_groups=2,
        use_running_average=False,
        scale_init=nn.initializers.constant(3.0),
        bias_init=nn.initializers.constant(5.0),
    )
    params = first_output(layer, data())[1]["params"]
    assert (params["channel_norm"]["scale"] == 3).all()
    assert (params["channel_norm"]["bias"] == 5).all()
    assert (params["batch_norm"]["scale"] == 1).all()
    assert (params["batch_norm"]["bias"] == 0).all()


def test_group_size_is_another_way_to_say_num_groups():
    x = data((2, 3, 3, 12))
    by_size = BatchChannelNorm(num_groups=None, group_size=4, use_running_average=False)
    by_number = BatchChannelNorm(num_groups=3, use_running_average=False)
    actual, expected = (first_output(layer, x)[0] for layer in (by_size, by_number))
    np.testing.assert_array_equal(actual, expected)


def test_numpy_input_is_taken_as_jax_would_take_it():
    """This includes float64, which JAX makes float32 by default."""
    x = np.asarray(data(), np.float64)
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, layer.init_with_output(jax.random.key(0), data())[0])


@pytest.mark.parametrize("evaluate", [True, False])
def test_exports_for_any_batch_and_image_size(evaluate):
    layer = BatchChannelNorm(num_groups=2, use_running_average=evaluate)
    _, variables = first_output(layer, data())

    @jax.jit
    def forward(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    n, h, w = export.symbolic_shape("n, h, w", constraints=["n >= 2"])
    shape = jax.ShapeDtypeStruct((n, h, w, 4), jnp.float32)
    exported = export.export(forward)(variables, shape)
    for sizes in [(2, 5, 3), (4, 9, 8)]:
        x = data((*sizes, 4))
        # For an unknown size the origin is the mean itself, which rounds differently.
        jax.tree.map(
            partial(assert_close, ulps=16, dtype=np.float32),
            exported.call(variables, x),
            forward(variables, x),
        )


def test_one_export_serves_every_platform():
    """Each platform has its own form of the passes over the input."""
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)
    _, variables = first_output(layer, data())

    @jax.jit
    def gradient(variables, x):
        def loss(x):
            return jnp.sum(layer.apply(variables, x, mutable=["batch_stats"])[0] ** 3)

        return jax.grad(loss)(x)

    exported = export.export(gradient, platforms=["cpu", "cuda", "rocm", "tpu"])(variables, data())
    np.testing.assert_allclose(
        exported.call(variables, data()), gradient(variables, data()), rtol=1e-4, atol=1e-5
    )
