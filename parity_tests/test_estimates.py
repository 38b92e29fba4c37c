"""Updating and freezing running estimates, which values that are not finite never change."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bcn_flax.nnx
from bcn_flax import BatchChannelNorm, BatchNorm, EstimatedBatchNorm
from bcn_flax.affine import Moments
from bcn_flax.norms import moving_average
from parity_tests.draws import random_variables
from parity_tests.tolerances import assert_close

LAYERS = {
    "BatchNorm": BatchNorm,
    "EstimatedBatchNorm": EstimatedBatchNorm,
    "BatchChannelNorm": partial(BatchChannelNorm, num_groups=2),
    "of the batch": partial(BatchChannelNorm, num_groups=2, estimate=False),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)

X = jnp.asarray(np.random.default_rng(0).normal(5, 2, (4, 5, 3, 4)), jnp.float32)


def start(make, **kwargs):
    layer = make(**kwargs)
    x = np.asarray(X)
    return layer, random_variables(layer, x, np.random.default_rng(1), use_running_average=True)


def run(layer, variables, x=X, **kwargs):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **kwargs)
    return y, {**variables, **updates}


def same(actual, expected):
    return all(jax.tree.leaves(jax.tree.map(lambda a, e: bool((a == e).all()), actual, expected)))


@every_layer
class TestUpdating:
    """Tests besides the laws in `parity_tests.laws`."""

    def test_frozen_it_needs_nothing_mutable(self, make):
        layer, variables = start(make, update_stats=False, use_running_average=False)
        np.testing.assert_array_equal(layer.apply(variables, X), run(layer, variables)[0])

    def test_the_call_wins_over_the_constructor(self, make):
        layer, variables = start(make, update_stats=False, use_running_average=False)
        assert same(run(layer, variables)[1], variables)
        assert not same(run(layer, variables, update_stats=True)[1], variables)

    def test_a_channel_that_overflows_keeps_its_estimates(self, make):
        """All others move: 3e38 is finite, but its square overflows."""
        layer, variables = start(make, use_running_average=False)
        after, clean = (
            run(layer, variables, x)[1]["batch_stats"] for x in (X.at[1, 2, 0, 3].set(3e38), X)
        )
        leaves = map(jax.tree.leaves, (after, clean, variables["batch_stats"]))
        for actual, moved, before in zip(*leaves, strict=True):
            np.testing.assert_array_equal(actual, moved.at[3].set(before[3]))

    def test_the_stored_type_does_not_overflow(self, make):
        """Moments fit into float32 but not into float16; or a schedule returns NaN."""
        layer, variables = start(make, use_running_average=False)
        narrow = jax.tree.map(lambda s: s.astype(jnp.float16), variables)
        for x in (1000 * X, 1e7 + X):  # whose variance is too large, or whose mean
            assert same(run(layer, narrow, x)[1]["batch_stats"], narrow["batch_stats"])
        wrong = jax.jit(
            lambda momentum: run(layer.clone(momentum=momentum), variables)[1]["batch_stats"]
        )
        assert same(wrong(jnp.nan), variables["batch_stats"])


def test_the_rate_of_micro_batches_keeps_the_weight_of_the_past():
    """For equal batches, k updates with `momentum ** (1 / k)` equal one with `momentum`."""
    k, momentum = 4, 0.7
    running, batch = (Moments(jnp.full((1, 1), v), jnp.full((1, 1), 2 * v)) for v in (1.0, 5.0))
    expected = moving_average(running, batch, momentum)
    for _ in range(k):
        running = moving_average(running, batch, momentum ** (1 / k))
    for name in "mean", "var":
        actual, once = (getattr(m, name) for m in (running, expected))
        assert_close(actual, once, ulps=16, dtype=np.float32)


def test_gradients_accumulate_while_the_estimates_move():
    """`optax.MultiSteps`: parameters move every k micro-batches, by the mean of the gradients."""
    k = 3
    layer, variables = start(LAYERS["BatchChannelNorm"], use_running_average=False)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=k)
    state = optimizer.init(variables["params"])
    params, gradients, stats = variables["params"], [], [variables["batch_stats"]]

    def loss_of(params, stats, x):
        y, updates = layer.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(y**3), updates["batch_stats"]

    @jax.jit
    def step(params, stats, state, x):
        gradient, stats = jax.grad(loss_of, has_aux=True)(params, stats, x)
        changes, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, changes), stats, state, gradient

    for i in range(k):
        assert same(params, variables["params"])
        params, new, state, gradient = step(params, stats[-1], state, X[i][None])
        gradients.append(gradient)
        stats.append(new)
    mean = jax.tree.map(lambda *g: sum(g) / k, *gradients)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], mean)
    close = partial(assert_close, ulps=8, dtype=np.float32)
    jax.tree.map(close, params, expected)
    assert not any(same(a, b) for a, b in itertools.pairwise(stats))


@pytest.mark.parametrize("by", ["view", "attribute", "call"])
def test_nnx_freezes_too(by):
    layer = bcn_flax.nnx.BatchChannelNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    before = nnx.clone(nnx.state(layer, nnx.BatchStat))
    kwargs = {}
    if by == "view":
        layer = nnx.view(layer, update_stats=False)
    elif by == "attribute":
        layer.update_stats = False
    else:
        kwargs = {"update_stats": False}
    layer(X, **kwargs)
    assert same(nnx.state(layer, nnx.BatchStat), before)
    layer(X, update_stats=True)
    assert not same(nnx.state(layer, nnx.BatchStat), before)
