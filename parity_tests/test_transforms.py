"""What transforms of JAX and of linen must keep, besides the laws in `parity_tests.laws`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bcn_flax import BatchChannelNorm
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
    """So that they can be carried: float64 input does not turn float32 statistics into float64."""
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)

    def train(x):
        variables = layer.init(jax.random.key(0), x)

        def step(stats, _):
            _, updates = layer.apply({**variables, "batch_stats": stats}, x, mutable="batch_stats")
            return updates["batch_stats"], None

        return jax.lax.scan(step, variables["batch_stats"], length=3)[0]

    stats = jax.eval_shape(train, batch())
    assert {s.dtype for s in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
