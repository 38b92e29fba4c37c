"""The layers on a mesh with explicit axes, whose shardings are part of the types.

Other meshes, on which JAX finds the shardings by itself, are in `test_compiled.py`.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bcn_flax.nnx
from bcn_flax import BatchChannelNorm, BatchNorm, ChannelNorm, WSConv
from parity_tests.tolerances import assert_close

SHAPE = (4, 8, 8, 16)
LAYERS = {
    "BatchNorm": BatchNorm(use_running_average=False),
    "in evaluation": BatchNorm(use_running_average=True),
    "ChannelNorm(4)": ChannelNorm(4),
    # On four devices with four channels each: groups within a device, half of one, all.
    **{
        f"BatchChannelNorm({groups})": BatchChannelNorm(
            num_groups=groups, use_running_average=False
        )
        for groups in (8, 2, 1)
    },
}
SPECS = {
    "space": P(None, "data"),
    "channels": P(None, None, None, "model"),
    "batch and channels": P("data", None, None, "model"),
}


@cache
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def put(tree, spec):
    """Each array on the mesh: by `spec`, if that divides it, else a copy on each device."""

    def fits(v):
        lengths = zip(v.shape, (*spec, *[None] * v.ndim), strict=False)
        return all(axis is None or d % mesh().shape[axis] == 0 for d, axis in lengths)

    return jax.tree.map(
        lambda v: jax.device_put(v, NamedSharding(mesh(), spec if fits(v) else P())), tree
    )


def data(shape=SHAPE):
    return jnp.asarray(np.random.default_rng(0).normal(3, 2, shape), jnp.float32)


def step_of(layer, mask=None):
    """Output, statistics and gradients."""

    @jax.jit
    def step(variables, x):
        def loss(params, x):
            every = {**variables, "params": params}
            y, updates = layer.apply(every, x, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updates)

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    return step


def assert_same(actual, expected):
    # Sums of at most 256 values, in another order.
    jax.tree.map(lambda a, e: assert_close(a, e, ulps=256, dtype=np.float32), actual, expected)


@pytest.mark.parametrize(
    ("spec", "params"),
    [
        ("space", "copied"),
        ("channels", "sharded"),
        ("batch and channels", "sharded"),
        ("batch and channels", "copied"),
    ],
)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_gives_what_it_gives_on_one_device(layer, spec, params):
    x, spec = data(), SPECS[spec]
    variables = layer.init(jax.random.key(0), x)
    expected = step_of(layer)(variables, x)
    channels = spec[3:] if params == "sharded" else ()
    with jax.set_mesh(mesh()):
        sharded = put(x, spec)
        actual = step_of(layer)(put(variables, P(*channels)), sharded)
        assert jax.typeof(actual[1][0]) == jax.typeof(sharded)
    assert_same(actual, expected)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_under_a_mask(spec):
    x, layer = data(), LAYERS["BatchChannelNorm(8)"]
    mask = jnp.asarray(np.random.default_rng(1).random(SHAPE) < 0.6)
    variables = layer.init(jax.random.key(0), x)
    expected = step_of(layer, mask)(variables, x)
    with jax.set_mesh(mesh()):
        actual = step_of(layer, put(mask, spec))(put(variables, P(*spec[3:])), put(x, spec))
    assert_same(actual, expected)


def test_gradients_of_a_vmap_over_sharded_parameters():
    x, layer = data(), LAYERS["BatchChannelNorm(8)"]
    variables = layer.init(jax.random.key(0), x)
    params = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v, 4 * v]), variables["params"])

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            y, _ = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sin(y).sum()

        return jax.grad(lambda *args: jax.vmap(loss, (0, None))(*args).sum(), (0, 1))(params, x)

    expected = gradients(params, x)
    with jax.set_mesh(mesh()):
        actual = gradients(put(params, P("model")), put(x, P("data")))
    assert_same(actual, expected)


def test_in_nnx():
    layer = bcn_flax.nnx.BatchChannelNorm(16, num_groups=8, rngs=nnx.Rngs(0))
    x, spec = data(), SPECS["batch and channels"]
    graph, state = nnx.split(layer)

    @jax.jit
    def forward(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer, nnx.BatchStat)

    expected = forward(state, x)
    with jax.set_mesh(mesh()):
        actual = forward(put(state, P("model")), put(x, spec))
    assert_same(actual, expected)


class Block(nn.Module):
    """A tensor-parallel block: its convolution makes the channels of each device there."""

    @nn.compact
    def __call__(self, x):
        x = WSConv(16, (3, 3), use_bias=False)(x)
        return nn.relu(BatchChannelNorm(num_groups=8, use_running_average=False)(x))


def test_standardized_kernels_lie_where_their_channels_do():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 16)), jnp.float32)

    @jax.jit
    def gradient(kernel):
        return jax.grad(lambda w: jnp.sum(jnp.sin(bcn_flax.standardize_kernel(w))))(kernel)

    expected = gradient(kernel)
    with jax.set_mesh(mesh()):
        sharded = put(kernel, P(None, None, None, "model"))
        actual = gradient(sharded)
        assert jax.typeof(actual) == jax.typeof(sharded)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (jnp.float16, jnp.float32))],
)
def test_types_may_be_mixed_however_strict_jax_is(dtype):
    """Narrow inputs and float32 parameters; there Flax's norms raise."""
    x = data((2, 4, 4, 8)).astype(dtype)
    mask = jnp.ones((2, 4, 4, 1), bool)
    with jax.numpy_dtype_promotion("strict"):
        for layer in LAYERS.values():
            layer = layer.clone(**({"num_groups": 4} if hasattr(layer, "num_groups") else {}))
            for dtype_ in None, dtype:
                layer = layer.clone(dtype=dtype_)
                variables = layer.init(jax.random.key(0), x)
                (_, (y, _)) = step_of(layer)(variables, x)
                assert y.dtype == (jnp.float32 if dtype_ is None else dtype)
                step_of(layer, mask)(variables, x)
        model = bcn_flax.nnx.BatchChannelNorm(8, num_groups=4, dtype=dtype, rngs=nnx.Rngs(0))
        assert model(x).dtype == dtype
        assert Block().init_with_output(jax.random.key(0), data((2, 4, 4, 3)))[0].dtype == (
            jnp.float32
        )
