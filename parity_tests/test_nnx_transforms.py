"""Every NNX transform gives the results of `nnx.jit` on the whole batch.

These are the results of eager execution: `parity_tests.laws` tests that, and JAX's transforms.
"""

from contextlib import contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bcn_flax.nnx import BatchChannelNorm
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("x64")

DEVICES = 4
ULPS = 1000  # of float64: sums of some thousand terms in another order

LAYERS = {
    "bcn": partial(BatchChannelNorm, num_groups=2),
    "bcn_batch": partial(BatchChannelNorm, num_groups=2, estimate=False),
}
MODES = {
    "graph": {"graph": True, "graph_updates": True},
    "tree": {"graph": False, "graph_updates": False},
}


def parametrize(name, table, *quick):
    """A parameter with quick values, and others for the slow tests."""
    values = [
        pytest.param(value, id=key, marks=() if key in quick else pytest.mark.slow)
        for key, value in table.items()
    ]
    return pytest.mark.parametrize(name, values)


every_layer = parametrize("make", LAYERS, "bcn_batch")
every_mode = parametrize("mode", MODES, "graph", "tree")


@contextmanager
def nnx_mode(graph, graph_updates):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph_updates):
        yield


def batch():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(3, 2, (8, 3, 5, 4))), jnp.asarray(rng.normal(size=(8, 3, 5, 4)))


def build(make, **kwargs):
    """A layer in training, with variables that are not all ones and zeros."""
    layer = make(4, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **kwargs)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape)), nnx.state(layer))
    nnx.update(layer, state)
    return layer


def forward(layer, x):
    return layer(x)


compiled = nnx.jit(forward)


def statistics(layer):
    return nnx.as_pure(nnx.state(layer, nnx.BatchStat))


def observe(forward, layer, x, dy):
    """Output, gradients of `sum(y * dy)`, and the statistics after."""

    def loss(layer, x):
        y = forward(layer, x)
        return jnp.sum(y * dy), y

    (_, y), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    in_parameters = nnx.as_pure(nnx.state(gradients[0], nnx.Param))
    return y, in_parameters, gradients[1], statistics(layer)


@cache
def observe_whole(make):
    return observe(compiled, build(make), *batch())


def assert_same(actual, expected):
    jax.tree.map(
        lambda a, e: assert_close(a, e, ulps=ULPS, dtype=np.float64, scale=1 + np.abs(e).max()),
        actual,
        expected,
    )


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("data",))


def over_devices(layer, x):
    specs = (P(), P("data"))
    run = nnx.shard_map(forward, mesh=mesh(), in_specs=specs, out_specs=P("data"))
    return nnx.jit(run)(layer, x)


def sharded_jit(layer, x):
    return compiled(layer, jax.device_put(x, NamedSharding(mesh(), P("data"))))


def in_parts(x):
    return x.reshape(DEVICES, -1, *x.shape[1:])


def vmapped(layer, x):
    run = nnx.jit(nnx.vmap(forward, in_axes=(None, 0), axis_name="data"))
    return run(layer, in_parts(x)).reshape(x.shape)


WAYS = {
    "jit": (compiled, {}),
    "remat": (nnx.jit(nnx.remat(forward)), {}),
    "jit of a sharded batch": (sharded_jit, {}),
    "shard_map": (over_devices, {"axis_name": "data"}),
    "vmap": (vmapped, {"axis_name": "data"}),
}


@every_mode
@pytest.mark.parametrize(("way", "options"), WAYS.values(), ids=WAYS)
@every_layer
def test_output_gradients_and_statistics_are_the_same(make, way, options, mode):
    expected = observe_whole(make)
    moved = jax.tree.map(lambda a, b: (a != b).all(), expected[-1], statistics(build(make)))
    assert jax.tree.all(moved), "the test proves nothing"
    with nnx_mode(**mode):
        assert_same(observe(way, build(make, **options), *batch()), expected)


@every_mode
def test_copies_of_a_layer_stay_equal_to_the_last_bit_under_vmap(mode):
    """The state is split over the axis like the batch: one layer for each part."""
    x, _ = batch()
    with nnx_mode(**mode):
        layers = nnx.vmap(
            lambda _: build(LAYERS["bcn_batch"], axis_name="data"), axis_size=DEVICES
        )(None)
        run = nnx.jit(nnx.vmap(forward, axis_name="data"))
        y = run(layers, in_parts(x)).reshape(x.shape)
    expected = build(LAYERS["bcn_batch"])
    assert_same(y, compiled(expected, x))
    for each in jax.tree.leaves(statistics(layers)):
        np.testing.assert_array_equal(each, each[:1].repeat(DEVICES, 0))
    assert_same(jax.tree.map(lambda s: s[0], statistics(layers)), statistics(expected))


def test_state_axes_share_the_parameters_and_keep_the_statistics_apart():
    """Flax allows such axes in graph mode only."""
    x, _ = batch()
    layer = build(LAYERS["bcn_batch"])
    apart = [build(LAYERS["bcn_batch"]) for _ in range(DEVICES)]
    expected = jnp.stack([compiled(*each) for each in zip(apart, in_parts(x), strict=True)])
    stacked = jax.tree.map(lambda s: jnp.stack([s] * DEVICES), statistics(layer))
    nnx.update(layer, stacked)
    axes = nnx.StateAxes({nnx.Param: None, nnx.BatchStat: 0})
    run = nnx.jit(nnx.vmap(forward, in_axes=(axes, 0)))
    assert_same(run(layer, in_parts(x)), expected)
    together = jax.tree.map(lambda *s: jnp.stack(s), *map(statistics, apart))
    assert_same(statistics(layer), together)


@pytest.mark.parametrize(
    ("mode", "axes"),
    [("graph", 0), ("graph", nnx.StateAxes({...: 0})), ("tree", 0)],
    ids=["graph", "graph_state_axes", "tree"],
)
def test_scan_over_layers_keeps_the_statistics_of_each(mode, axes):
    x, _ = batch()

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        scale = nnx.initializers.uniform(2.0)
        return BatchChannelNorm(
            4, num_groups=2, scale_init=scale, param_dtype=jnp.float64, rngs=rngs
        )

    with nnx_mode(**MODES[mode]):
        layers = stack(nnx.Rngs(0))
        each = [
            nnx.merge(nnx.graphdef(layers), jax.tree.map(lambda v, i=i: v[i], nnx.state(layers)))
            for i in range(3)
        ]
        run = nnx.scan(lambda x, layer: layer(x) + 1, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
        y = run(x, layers)
    for layer in each:
        x = compiled(layer, x) + 1
    assert_same(y, x)
    assert_same(statistics(layers), jax.tree.map(lambda *s: jnp.stack(s), *map(statistics, each)))
    scales = layers.channel_norm.scale[...]
    assert (scales[0] != scales[1]).all(), "each layer has its own random numbers"


@every_mode
def test_a_layer_can_be_carried_through_a_scan_over_batches(mode):
    x, _ = batch()
    with nnx_mode(**mode):
        run = nnx.scan(
            lambda layer, x: (layer, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
        )
        after, y = run(build(LAYERS["bcn"]), in_parts(x))
    expected = build(LAYERS["bcn"])
    assert_same(y, jnp.stack([compiled(expected, part) for part in in_parts(x)]))
    assert_same(statistics(after), statistics(expected))
