"""Running estimates in PyTorch: which variance, when they are updated, and not by NaN."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bcn_torch import BatchChannelNorm, BatchNorm, EstimatedBatchNorm, frozen_statistics
from parity_tests.torch_layers import rand

pytestmark = pytest.mark.torch

C = 4
NORMS = {
    "batch": lambda **kw: BatchNorm(C, **kw),
    "estimated": lambda **kw: EstimatedBatchNorm(C, **kw),
    "bcn": lambda **kw: BatchChannelNorm(C, 2, **kw),
    "bcn-batch": lambda **kw: BatchChannelNorm(C, 2, estimate=False, **kw),
}
every_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
batch_norms = pytest.mark.parametrize("make", [BatchNorm, EstimatedBatchNorm])
every_variance = pytest.mark.parametrize(
    "running_variance", ["biased", "unbiased", "around_running_mean"]
)


def estimates(layer):
    """Copies of the running mean and variance."""
    return [buffer.clone() for buffer in layer.buffers()]


def assert_rounding_apart(actual, expected):
    """Compare sums of a few dozen values up to 20, after a few operations."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e3 * torch.finfo(torch.float64).eps)


# --- Which variance ---


def entering(values, old_mean, running_variance):
    """The variance of a channel's values, as in the published codes."""
    n, mean = values.size, values.mean()
    if running_variance == "around_running_mean":
        return sum((values - old_mean) ** 2) / n
    return sum((values - mean) ** 2) / (n if running_variance == "biased" else n - 1)


@every_variance
@every_norm
@pytest.mark.parametrize("shape", [(2, C), (3, C, 5), (2, C, 3, 2)], ids=str)
def test_the_estimates_average_the_variance_that_was_asked_for(make, shape, running_variance):
    layer = make(momentum=0.3, running_variance=running_variance).double()
    mean, var = np.zeros(C), np.ones(C)
    for step in range(4):
        x = rand(*shape, seed=step)
        layer(x)
        for c in range(C):
            values = x[:, c].numpy().ravel()
            var[c] = 0.7 * var[c] + 0.3 * entering(values, mean[c], running_variance)
            mean[c] = 0.7 * mean[c] + 0.3 * values.mean()
        assert_rounding_apart(estimates(layer), [torch.from_numpy(mean), torch.from_numpy(var)])


def test_around_the_running_mean_a_shift_of_the_data_enters_the_variance():
    # From (0, 1), x of mean 5 and variance 1: one step at rate 0.1 adds 0.1 * 5^2.
    x = torch.tensor([[4.0], [6.0]])
    variances = {
        name: BatchNorm(1, running_variance=name) for name in ("biased", "around_running_mean")
    }
    for layer in variances.values():
        layer(x)
    assert variances["biased"].exp_var.item() == pytest.approx(1.0)
    assert variances["around_running_mean"].exp_var.item() == pytest.approx(3.5)


def test_unbiased_the_estimates_are_those_of_pytorchs_batch_norm():
    ours, theirs = BatchNorm(C, running_variance="unbiased").double(), nn.BatchNorm1d(C).double()
    for step in range(3):
        x = rand(3, C, 5, seed=step)
        assert_rounding_apart(ours(x), theirs(x))
        assert_rounding_apart(estimates(ours), [theirs.running_mean, theirs.running_var])
    assert_rounding_apart(ours.eval()(x), theirs.eval()(x))


@every_variance
def test_in_training_the_batch_is_normalized_by_its_biased_moments_whatever_enters(
    running_variance,
):
    x = rand(3, C, 5)
    assert torch.equal(
        BatchNorm(C, running_variance=running_variance).double()(x), BatchNorm(C).double()(x)
    )


def test_the_unbiased_variance_of_a_single_value_is_0():
    layer = BatchNorm(C, running_variance="unbiased", momentum=1.0)
    with pytest.warns(UserWarning, match="single value"):
        layer(torch.ones(1, C))
    assert torch.equal(layer.exp_var, torch.zeros(C))


def test_the_batch_norm_inside_can_have_an_eps_of_its_own():
    layer = BatchChannelNorm(C, 2, eps=1e-2, batch_eps=1e-3)
    assert (layer.batch_norm.eps, layer.channel_norm.eps) == (1e-3, 1e-2)
    layer = BatchChannelNorm(C, 2, eps=1e-2)
    assert (layer.batch_norm.eps, layer.channel_norm.eps) == (1e-2, 1e-2)


# --- When they are updated ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("update_stats", [None, False, True])
@every_norm
def test_update_stats_says_when_the_estimates_move(make, update_stats, training):
    layer = make(update_stats=update_stats).double().train(training)
    before = estimates(layer)
    layer(rand(3, C, 5))
    moves = training if update_stats is None else update_stats
    assert torch.equal(estimates(layer)[0], before[0]) != moves
    if moves:
        reference = make().double()
        reference(rand(3, C, 5))
        assert_rounding_apart(estimates(layer), estimates(reference))


@every_norm
def test_evaluation_with_updates_normalizes_by_the_estimates_from_before(make):
    layer = make().double()
    layer(rand(3, C, 5))
    plain = copy.deepcopy(layer).eval()
    layer.eval().update_stats = True
    x = rand(3, C, 5, seed=1).requires_grad_()
    y, expected = layer(x), plain(x)
    assert torch.equal(y, expected)
    assert not torch.equal(estimates(layer)[0], estimates(plain)[0])
    # The update comes between forward and backward, and must not reach into the latter.
    cotangent = rand(3, C, 5, seed=2)
    assert torch.equal(*(torch.autograd.grad(z, x, cotangent)[0] for z in (y, expected)))


@batch_norms
def test_training_without_updates_normalizes_as_each_norm_does(make):
    layer = make(C).double()
    layer(rand(3, C, 5))
    layer.update_stats = False
    x = rand(3, C, 5, seed=1)
    fresh = copy.deepcopy(layer).eval() if make is EstimatedBatchNorm else BatchNorm(C).double()
    assert torch.equal(layer(x), fresh(x))


def test_batch_channel_norm_shares_update_stats_with_its_batch_norm():
    layer = BatchChannelNorm(C, 2, update_stats=True)
    assert layer.batch_norm.update_stats is layer.update_stats is True
    layer.update_stats = False
    assert layer.batch_norm.update_stats is False
    layer.batch_norm.update_stats = None
    assert layer.update_stats is None


@pytest.mark.parametrize("update_stats", [None, False, True])
def test_frozen_statistics_restores_update_stats(update_stats):
    layer = BatchChannelNorm(C, 2, update_stats=update_stats).eval()
    before = estimates(layer)
    with frozen_statistics(layer):
        layer(rand(3, C, 5, dtype=torch.float32))
    assert layer.update_stats is update_stats
    assert torch.equal(estimates(layer)[0], before[0])


@pytest.mark.parametrize("k", [2, 4, 7])
@batch_norms
def test_k_equal_micro_batches_at_the_adjusted_momentum_move_the_estimates_as_one_batch(make, k):
    momentum, x = 0.1, rand(3, C, 5)
    once = make(C, momentum=momentum).double()
    often = make(C, momentum=1 - (1 - momentum) ** (1 / k)).double()
    once(x)
    for _ in range(k):
        often(x)
    assert_rounding_apart(estimates(often), estimates(once))


# --- Values that are not finite ---

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "overflow": 1e200}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@every_variance
@every_norm
def test_only_the_channel_that_is_not_finite_keeps_its_old_estimates(make, running_variance, bad):
    layers = [make(running_variance=running_variance).double() for _ in range(2)]
    layer, reference = layers
    x = rand(3, C, 5)
    for each in layers:
        each(x)
    before = estimates(layer)
    later = rand(3, C, 5, seed=1)
    reference(later)
    later[1, 2, 3] = bad
    layer(later)
    others = torch.tensor([0, 1, 3])
    for now, old, clean in zip(estimates(layer), before, estimates(reference), strict=True):
        assert now[2] == old[2]
        assert torch.equal(now[others], clean[others])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@every_norm
def test_the_output_shows_what_the_estimates_do_not_take_in(make, bad):
    x = rand(3, C, 5)
    x[1, 2, 3] = bad
    assert not make().double()(x)[1, 2, 3].isfinite()


@every_norm
def test_after_a_batch_of_nan_all_is_exactly_as_if_it_had_never_been(make):
    layers = [make().double() for _ in range(2)]
    layers[1](torch.full((3, C, 5), torch.nan))
    for step in range(2):
        x = rand(3, C, 5, seed=step).requires_grad_()
        y, expected = (layer(x) for layer in layers)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(z.pow(3).sum(), x)[0] for z in (y, expected)))
    assert all(map(torch.equal, *map(estimates, layers)))


@pytest.mark.parametrize("estimate", [True, False])
def test_compiled_a_nan_stays_out_and_update_stats_is_obeyed(estimate):
    """Batch-channel norms contain the other norms."""
    torch._dynamo.reset()
    layers = [BatchChannelNorm(C, 2, estimate=estimate).double() for _ in range(2)]
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    x = rand(3, C, 5)
    x[1, 2, 3] = torch.nan
    for update_stats, training in [(None, True), (False, True), (True, False), (None, False)]:
        for layer in layers:
            layer.train(training).update_stats = update_stats
        compiled(x), layers[1](x)
        assert_rounding_apart(estimates(layers[0]), estimates(layers[1]))
        assert all(estimate.isfinite().all() for estimate in layers[0].buffers())
        x = x + 1


@pytest.mark.parametrize("norm", [BatchNorm(4), BatchChannelNorm(4, 2)], ids=["batch", "bcn"])
def test_one_image_is_no_single_value_and_integers_are_no_input(norm):
    norm(torch.ones(1, 4, 2, 2))  # without a warning
    with pytest.raises(ValueError, match=r"must be of a real floating-point type.*int64"):
        norm(torch.ones(2, 4, dtype=torch.int64))
