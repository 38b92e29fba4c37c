"""When the estimates move is said apart from what normalizes, and nothing bad ever moves them."""

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
    @pytest.mark.parametrize("evaluate", [True, False])
    @pytest.mark.parametrize("update", [True, False])
    def test_it_moves_the_estimates_when_told_so_and_not_otherwise(self, make, evaluate, update):
        layer, variables = start(make)
        trained = run(layer, variables, use_running_average=False)[1]
        y, after = run(layer, variables, use_running_average=evaluate, update_stats=update)
        assert same(after, trained if update else variables)
        if evaluate:
            # By the estimates as they were, whether they move or not.
            assert (y == layer.apply(variables, X, use_running_average=True)).all()

    def test_unless_told_it_moves_them_in_training_only(self, make):
        layer, variables = start(make)
        for evaluate in (True, False):
            told = run(layer, variables, use_running_average=evaluate, update_stats=not evaluate)
            assert same(told, run(layer, variables, use_running_average=evaluate))

    def test_frozen_it_trains_by_what_it_has(self, make):
        """By the estimates as they are where it trains by estimates, and else by the batch."""
        layer, variables = start(make, update_stats=False, use_running_average=False)
        y = layer.apply(variables, X)  # nothing needs to be mutable
        by_batch = isinstance(layer, BatchNorm) and not isinstance(layer, EstimatedBatchNorm)
        by_batch = by_batch or not getattr(layer, "estimate", True)
        expected = layer.apply(variables, X, use_running_average=True)
        assert (y == expected).all() != by_batch
        assert (y == run(layer, variables, update_stats=True)[0]).all() == by_batch

    def test_the_call_wins_over_the_constructor(self, make):
        layer, variables = start(make, update_stats=False, use_running_average=False)
        assert same(run(layer, variables)[1], variables)
        assert not same(run(layer, variables, update_stats=True)[1], variables)

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 3e38])
    def test_a_channel_that_is_not_finite_keeps_its_estimates(self, make, bad):
        """Alone: the others move. The output is not hidden. 3e38 overflows in its variance."""
        layer, variables = start(make, use_running_average=False)
        y, after = run(layer, variables, X.at[1, 2, 0, 3].set(bad))
        clean = run(layer, variables)[1]["batch_stats"]
        after, before, clean = (
            v.get("batch_norm", v) for v in (after["batch_stats"], variables["batch_stats"], clean)
        )
        for name in ("mean", "var"):
            assert after[name][3] == before[name][3]
            np.testing.assert_array_equal(after[name][:3], clean[name][:3])
        if not np.isfinite(bad):
            assert not np.isfinite(y[1]).all()

    def test_neither_does_the_type_they_are_stored_in_overflow(self, make):
        """Moments that float32 holds and float16 does not; and a schedule gone wrong."""
        layer, variables = start(make, use_running_average=False)
        narrow = jax.tree.map(lambda s: s.astype(jnp.float16), variables)
        assert same(run(layer, narrow, 1000 * X)[1]["batch_stats"], narrow["batch_stats"])
        wrong = jax.jit(
            lambda momentum: run(layer.clone(momentum=momentum), variables)[1]["batch_stats"]
        )
        assert same(wrong(jnp.nan), variables["batch_stats"])

    def test_after_a_bad_batch_all_goes_on_as_if_it_had_not_been(self, make):
        layer, variables = start(make, use_running_average=False)
        bad = run(layer, variables, jnp.full_like(X, jnp.nan))[1]
        assert same(run(layer, bad), run(layer, variables))
        assert same(jax.jit(partial(run, layer))(bad), jax.jit(partial(run, layer))(variables))

    def test_the_rate_of_micro_batches_keeps_the_weight_of_the_past(self, make):
        """Equal batches: k updates at `momentum ** (1 / k)` are one at `momentum`."""
        k = 4
        layer, variables = start(make, use_running_average=False, momentum=0.7)
        fast, _ = start(make, use_running_average=False, momentum=0.7 ** (1 / k))
        expected = run(layer, variables)[1]
        actual = variables
        for _ in range(k):
            actual = run(fast, actual)[1]
        close = partial(assert_close, ulps=16, dtype=np.float32)
        jax.tree.map(close, actual["batch_stats"], expected["batch_stats"])


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

    for i in range(k):
        assert same(params, variables["params"])
        gradient, new = jax.grad(loss_of, has_aux=True)(params, stats[-1], X[i][None])
        changes, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
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
