"""Every JAX and Flax transform gives what plain eager execution of the whole batch gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bcn_flax import BatchChannelNorm, BatchNorm, EstimatedBatchNorm
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("x64")

DEVICES = 4
ULPS = 1000  # of float64: sums of some thousand terms in another order

LAYERS = {
    "batch_norm": BatchNorm,
    "estimated": EstimatedBatchNorm,
    "bcn": partial(BatchChannelNorm, num_groups=2),
    "bcn_batch": partial(BatchChannelNorm, num_groups=2, estimate=False),
}


def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(3, 2, (8, 3, 5, 4))), jnp.asarray(rng.normal(size=(8, 3, 5, 4)))


def build(make, **kwargs):
    """A layer in training, with variables that are not all ones and zeros."""
    layer = make(use_running_average=False, param_dtype=jnp.float64, **kwargs)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 5, 4)))
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    return layer, tree.unflatten([jnp.asarray(rng.uniform(0.5, 2, v.shape)) for v in leaves])


def train(layer, variables, x):
    return layer.apply(variables, x, mutable=["batch_stats"])


def loss_and_gradients(forward, variables, x, dy):
    """Output, new statistics, and the gradients of `sum(y * dy)`."""

    def loss(params, x):
        y, updates = forward({**variables, "params": params}, x)
        return jnp.sum(y * dy), (y, updates)

    gradients, (y, updates) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return y, updates, gradients


def assert_same(actual, expected):
    jax.tree.map(
        lambda a, e: assert_close(a, e, ulps=ULPS, dtype=np.float64, scale=1 + np.abs(e).max()),
        actual,
        expected,
    )


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


def eager(make):
    layer, variables = build(make)
    return partial(train, layer), variables


def jitted(make):
    forward, variables = eager(make)
    return jax.jit(forward), variables


def checkpointed(make):
    forward, variables = eager(make)
    return jax.jit(jax.checkpoint(forward)), variables


def rematerialized(make):
    return eager(nn.remat(make) if isinstance(make, type) else partial_remat(make))


def partial_remat(make):
    return partial(nn.remat(make.func), **make.keywords)


def sharded_jit(make):
    forward, variables = eager(make)
    over_data = NamedSharding(mesh(), P("data"))
    replicated = NamedSharding(mesh(), P())
    return jax.jit(forward, in_shardings=(replicated, over_data)), variables


def shard_mapped(make):
    layer, variables = build(make, axis_name="data")
    forward = jax.shard_map(
        partial(train, layer),
        mesh=mesh(),
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P()),
    )
    return jax.jit(forward), variables


def vmapped(make):
    """The batch split over an axis of `vmap`; statistics come out once for each part, all equal."""
    layer, variables = build(make, axis_name="parts")

    def forward(variables, x):
        parts = x.reshape(DEVICES, -1, *x.shape[1:])
        step = jax.vmap(partial(train, layer), in_axes=(None, 0), axis_name="parts")
        y, updates = step(variables, parts)
        jax.tree.map(lambda s: np.testing.assert_array_equal(s, s[:1].repeat(DEVICES, 0)), updates)
        return y.reshape(x.shape), jax.tree.map(lambda s: s[0], updates)

    return forward, variables


WAYS = [jitted, checkpointed, rematerialized, sharded_jit, shard_mapped]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("make", ["bcn", "bcn_batch"])  # the batch norms alone are inside of these
def test_output_statistics_and_gradients_are_the_same(make, way):
    make = LAYERS[make]
    x, dy = batch()
    expected = loss_and_gradients(*eager(make), x, dy)
    assert_same(loss_and_gradients(*way(make), x, dy), expected)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_vmap_with_an_axis_name_pools_the_whole_batch(make):
    x, _ = batch()
    forward, variables = vmapped(make)
    assert_same(forward(variables, x), eager(make)[0](variables, x))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_unequal_masks_over_devices_are_exact(make):
    """The pooled moments weigh each device by what counts there, not each device the same."""
    x, _ = batch()
    mask = jnp.asarray(np.arange(8) < 5).reshape(8, 1, 1, 1)  # 2, 2, 1 and 0 samples count
    layer, variables = build(make)
    distributed, _ = build(make, axis_name="data")

    def forward(layer, x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    step = jax.shard_map(
        partial(forward, distributed),
        mesh=mesh(),
        in_specs=(P("data"), P("data")),
        out_specs=(P("data"), P()),
    )
    y, updates = jax.jit(step)(x, mask)
    kept, kept_updates = forward(layer, x[:5], jnp.ones((5, 1, 1, 1), bool))
    assert_same((y[:5], updates), (kept, kept_updates))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_axis_index_groups_pool_among_themselves(make):
    x, _ = batch()
    groups = [[0, 1], [2, 3]]
    layer, variables = build(make)
    distributed, _ = build(make, axis_name="data", axis_index_groups=groups)
    step = jax.shard_map(
        lambda x: train(distributed, variables, x)[0],
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,  # groups give results that are neither one for all nor one for each
    )
    halves = [train(layer, variables, half)[0] for half in (x[:4], x[4:])]
    assert_same(jax.jit(step)(x), jnp.concatenate(halves))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_forward_mode_agrees_with_reverse_mode(make):
    x, dy = batch()
    layer, variables = build(make)

    def forward(x):
        return train(layer, variables, x)[0]

    direction = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    _, forward_mode = jax.jvp(forward, (x,), (direction,))
    _, pullback = jax.vjp(forward, x)
    inner = jnp.sum(pullback(dy)[0] * direction)
    assert_same(jnp.sum(forward_mode * dy), inner)


@pytest.mark.parametrize(
    ("make", "evaluate"),
    [(LAYERS["bcn_batch"], False), (LAYERS["batch_norm"], False), (LAYERS["bcn"], True)],
    ids=["bcn_batch", "batch_norm", "bcn_evaluation"],
)
def test_second_derivatives_are_those_of_finite_differences(make, evaluate):
    """Where all that depends on `x` has a gradient; updated estimates are declared to have none."""
    x, dy = batch()
    layer, variables = build(make)

    def forward(x):
        return layer.apply(variables, x, evaluate, mutable=["batch_stats"])[0]

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.tanh(forward(x)) * dy))(x)

    direction = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    _, exact = jax.jvp(gradient, (x,), (direction,))
    step = 1e-5
    difference = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    # The central difference is off by step^2 times the fourth derivative, and eps / step.
    np.testing.assert_allclose(exact, difference, rtol=0, atol=1e-8 * np.abs(difference).max())


def test_scan_over_layers_keeps_the_statistics_of_each():
    x, _ = batch()

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return BatchChannelNorm(num_groups=2, use_running_average=False)(x) + 1, None

    scanned = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
    )()
    variables = scanned.init(jax.random.key(0), x, None)
    (y, _), updates = scanned.apply(variables, x, None, mutable=["batch_stats"])

    expected, stats = x, []
    for i in range(3):
        layer = jax.tree.map(lambda v, i=i: v[i], variables)
        (expected, _), update = Block().apply(layer, expected, None, mutable=["batch_stats"])
        stats.append(update)
    assert_same((y, updates), (expected, jax.tree.map(lambda *s: jnp.stack(s), *stats)))


def test_statistics_keep_their_type_through_a_loop():
    """So that they can be carried: float64 input does not turn float32 statistics into float64."""
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)
    x, _ = batch()
    variables = layer.init(jax.random.key(0), x)

    def step(stats, _):
        variables_now = {**variables, "batch_stats": stats}
        return layer.apply(variables_now, x, mutable=["batch_stats"])[1]["batch_stats"], None

    stats, _ = jax.lax.scan(step, variables["batch_stats"], length=3)
    assert {s.dtype for s in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32)}
