"""Transforms of JAX and linen, besides the laws in `parity_tests.laws`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bcn_flax import BatchChannelNorm, affine
from parity_tests.draws import random_variables
from parity_tests.laws import assert_same


def batch():
    return np.random.default_rng(0).normal(3, 2, (8, 3, 5, 4))


def test_scan_over_layers_keeps_the_statistics_of_each(x64):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            options = {"num_groups": 2, "param_dtype": jnp.float64, "use_running_average": False}
            return BatchChannelNorm(**options)(x) + 1, None

    scanned = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )()
    variables = jax.jit(scanned.init)(jax.random.key(0), batch(), None)

    @jax.jit
    def scan(x):
        (y, _), updates = scanned.apply(variables, x, None, mutable=["batch_stats"])
        return y, updates

    @jax.jit
    def one_by_one(x):
        stats = []
        for i in range(3):
            layer = jax.tree.map(lambda v, i=i: v[i], variables)
            (x, _), update = Block().apply(layer, x, None, mutable=["batch_stats"])
            stats.append(update)
        return x, jax.tree.map(lambda *s: jnp.stack(s), *stats)

    assert_same(scan(batch()), one_by_one(batch()))


def test_statistics_keep_their_type_through_a_loop(x64):
    """A loop can carry them: float64 input does not make float32 statistics float64."""
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)

    def train(x):
        variables = layer.init(jax.random.key(0), x)

        def step(stats, _):
            _, updates = layer.apply({**variables, "batch_stats": stats}, x, mutable="batch_stats")
            return updates["batch_stats"], None

        return jax.lax.scan(step, variables["batch_stats"], length=3)[0]

    stats = jax.eval_shape(train, batch())
    assert {s.dtype for s in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}


def devices():
    return Mesh(np.asarray(jax.devices()[:4]), ("data",))


@pytest.mark.parametrize("evaluate", [True, False])
def test_gradients_add_up_over_devices(evaluate, x64):
    """In `shard_map`, with the same parameters for several inputs, or the reverse."""
    layer = BatchChannelNorm(num_groups=2, param_dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = jnp.asarray(batch())
    variables = random_variables(layer, x, rng, use_running_average=True)
    stats, params = variables["batch_stats"], variables["params"]
    several = jax.tree.map(lambda v: jnp.stack([v, 2 * v, 3 * v, 4 * v]), params)

    def loss(params, x):
        y, _ = layer.apply(
            {"params": params, "batch_stats": stats}, x, evaluate, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y))

    def over_devices(of_params, of_x):
        def on_each(params, x):
            if of_params:
                params = jax.tree.map(lambda v: v[0], params)
            return jax.lax.psum(loss(params, x), "data")

        specs = tuple(P("data") if spread else P() for spread in (of_params, of_x))
        return jax.shard_map(on_each, mesh=devices(), in_specs=specs, out_specs=P())

    def one_by_one(params, x):
        return jax.lax.map(partial(loss, params), x.reshape(4, -1, *x.shape[1:])).sum()

    def of_each(several, x):
        return jax.lax.map(lambda params: loss(params, x), several).sum()

    for mapped, expected, point in (
        (over_devices(False, True), one_by_one, (params, x)),
        (over_devices(True, False), of_each, (several, x)),
    ):
        actual, wanted = (jax.jit(jax.grad(f, (0, 1)))(*point) for f in (mapped, expected))
        assert_same(actual, wanted)


def test_a_result_that_differs_between_devices_is_not_taken_for_one():
    layer = BatchChannelNorm(num_groups=2, use_running_average=True)
    x = jnp.asarray(batch(), jnp.float32)
    scales = jnp.arange(8.0).reshape(4, 2)

    def on_each(scale, x):
        params = {"batch_norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
        params["channel_norm"] = {"scale": scale[0], "bias": jnp.zeros(2)}
        stats = {"batch_norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
        return layer.apply({"params": params, "batch_stats": stats}, x)

    mapped = jax.shard_map(on_each, mesh=devices(), in_specs=(P("data"), P()), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(mapped, scales, x)


def test_nothing_needs_to_be_compiled_whole(x64):
    layer = BatchChannelNorm(num_groups=2, use_running_average=False, param_dtype=jnp.float64)
    x = jnp.asarray(batch())
    variables = jax.jit(layer.init)(jax.random.key(0), x)

    def loss(x):
        y, _ = layer.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    expected = jax.jit(jax.grad(loss))(x)
    with jax.disable_jit():
        assert_same(jax.grad(loss)(x), expected)


@pytest.mark.parametrize(
    "shape", [(12, 44), (9, 36), (6, 6, 22), (5,), (9,), (4, 4), (100,), (7, 3)]
)
def test_the_origin_is_the_mean_of_one_value_in_64_or_more(shape):
    """So it lies within `sqrt(63)` standard deviations of the mean, for any values."""
    space = range(1, len(shape) + 1)
    seen = affine._coarse_grid(jnp.ones((1, *shape, 1)), space).shape[1:-1]
    assert np.prod(shape) <= 64 * np.prod(seen)
    assert seen[-1] >= min(4, shape[-1])
