"""Recalibration of PyTorch models."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bcn_torch import (
    VGG,
    BatchChannelNorm,
    BatchNorm,
    EstimatedBatchNorm,
    convert_batch_norm,
    recalibrate,
)
from parity_tests.test_torch_conversion import ResNet, assert_equal, state_and_modes, trained

pytestmark = pytest.mark.torch


def shallow(norm):
    """A norm behind a convolution and a dropout."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), norm, nn.ReLU(), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers).double()


def batches(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [2 + torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) for n in sizes]


BATCH_NORMS = {
    "batch": lambda **kw: BatchNorm(4, **kw),
    "estimated": lambda **kw: EstimatedBatchNorm(4, **kw),
    "bcn": lambda **kw: BatchChannelNorm(4, 2, **kw),
}
every_norm = pytest.mark.parametrize("make", BATCH_NORMS.values(), ids=BATCH_NORMS.keys())


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("exp_mean", "exp_var"))}


@pytest.mark.parametrize("running_variance", ["biased", "unbiased", "around_running_mean"])
@every_norm
def test_the_estimates_become_the_average_over_the_batches(make, running_variance):
    model, data = shallow(make(running_variance=running_variance)), batches(5, 2, 1)
    recalibrate(model, data)
    seen = [model.eval()[:2](x) for x in data]
    correction = int(running_variance == "unbiased")
    moments = [torch.var_mean(x, (0, 2, 3), correction=correction) for x in seen]
    var, mean = (
        sum(n * m / 8 for n, m in zip((5, 2, 1), ms, strict=True))
        for ms in zip(*moments, strict=True)
    )
    if running_variance == "around_running_mean":
        var = torch.cat(seen).var((0, 2, 3), correction=0)
    torch.testing.assert_close([*statistics(model).values()], [mean, var], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        partial(VGG, ((8,), (8, 8)), norm=partial(BatchChannelNorm, groups=2)),
        partial(VGG, ((8,), (8, 8)), norm=BatchNorm),
        partial(
            VGG,
            ((8,), (8, 8)),
            norm=partial(
                BatchChannelNorm,
                groups=2,
                estimate=False,
                running_variance="around_running_mean",
            ),
        ),
        lambda: convert_batch_norm(ResNet(width=8), groups=4),
    ],
    ids=["bcn", "bn", "bcn-batch", "resnet"],
)
def test_after_one_batch_the_input_of_every_norm_has_the_stored_mean_and_variance(make):
    torch.manual_seed(0)
    model = trained(make(), 2, 3, 8, 8).double()
    (x,) = batches(5)
    x = x.repeat(1, 1, 2, 2)[..., :8, :8]
    recalibrate(model, [x])
    norms, seen = [m for m in model.modules() if isinstance(m, BatchNorm)], {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, args: seen.update({norm: args[0]}))
    model.eval()(x)
    assert len(norms) == len(seen) >= 3
    for norm, values in seen.items():
        var, mean = torch.var_mean(values, (0, *range(2, values.dim())), correction=0)
        torch.testing.assert_close([norm.exp_mean, norm.exp_var], [mean, var], rtol=1e-9, atol=1e-9)


@every_norm
def test_old_estimates_are_discarded_even_nan(make):
    fresh, with_nan = shallow(make()), shallow(make())
    for buffer in with_nan.buffers():
        buffer.fill_(torch.nan)
    for model in (fresh, with_nan):
        recalibrate(model, batches(3, 2))
    assert_equal(with_nan.state_dict(), fresh.state_dict())


@every_norm
@pytest.mark.parametrize("update_stats", [None, False, True])
def test_nothing_but_the_estimates_changes(make, update_stats):
    model = shallow(make(momentum=0.3, update_stats=update_stats))
    model[3].eval()
    state, *others = state_and_modes(model)
    rng = torch.get_rng_state()
    recalibrate(model, iter(batches(3, 2)))
    new_state, *new_others = state_and_modes(model)
    assert new_others == others
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert {n for n in state if not torch.equal(state[n], new_state[n])} == {*statistics(model)}
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)  # no dropout was drawn


def test_a_module_that_overrides_train_keeps_its_mode():
    class Stubborn(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(Stubborn(nn.Dropout(), nn.Dropout()), BatchNorm(2))
    model[0][1].training = True
    modes = [m.training for m in model.modules()]
    recalibrate(model, [torch.randn(3, 2)])
    assert [m.training for m in model.modules()] == modes


def test_a_norm_that_runs_twice_averages_over_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(2)

        def forward(self, x, y):
            return self.norm(x) + self.norm(x=y)

    model = Twice()
    recalibrate(model, [(torch.tensor([[1.0, 2.0]] * 2), torch.tensor([[3.0, 6.0]] * 2))])
    assert_equal(model.norm.exp_mean, torch.tensor([2.0, 4.0]))


@pytest.mark.parametrize("value", [7.0, torch.nan])
def test_a_norm_that_no_batch_reaches_keeps_its_estimates(value):
    model = nn.ModuleDict({"used": BatchNorm(2), "unused": BatchNorm(2)})
    model.forward = lambda x: model["used"](x)
    for estimate in model["unused"].buffers():
        estimate.fill_(value)
    recalibrate(model, [torch.randn(3, 2)])
    for estimate in model["unused"].buffers():
        assert_equal(estimate, torch.full((2,), value), equal_nan=True)


def with_nan():
    good, bad = batches(3, 3)
    bad[1, 0, 2, 2] = torch.nan
    return [good, bad]


def failing():
    yield from batches(3)
    raise ZeroDivisionError


REACHED = (
    "The batches must reach a batch norm at least once, but none did. Give at least one batch (an "
    "iterator can be used once only), and the model as it was before torch.compile."
)
FINITE = (
    "The mean and variance of every channel must be finite, but at '2' those of the channels "
    "0, 1, 2, 3 are not. The statistics are as they were before; leave the batch out."
)
FAILURES = {
    "no batches": (list, ValueError, REACHED),
    "nan": (with_nan, ValueError, FINITE),
    "of the iterator": (failing, ZeroDivisionError, ""),
    "of the model": (lambda: [torch.ones(1, 7, 6, 6, dtype=torch.float64)], RuntimeError, None),
}


@pytest.mark.parametrize(("data", "error", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_after_an_error_all_is_as_it_was(data, error, text):
    model = shallow(BatchNorm(4, momentum=0.3, update_stats=False))
    model(batches(2)[0])
    model[2].exp_mean.fill_(3)
    model[3].eval()
    before, *others = state_and_modes(model)
    with pytest.raises(error, match=None if text is None else re.escape(text) + r"\Z"):
        recalibrate(model, data())
    after, *new_others = state_and_modes(model)
    assert_equal(after, before)
    assert new_others == others
    assert not any(m._forward_pre_hooks for m in model.modules())


def averaged(norm):
    """The average of two networks' weights, with the statistics of the second."""
    models = [trained(nn.Sequential(nn.Conv2d(3, 4, 3), norm), 2, 3, 6, 6, seed=i) for i in (0, 1)]
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)
    return average.double()


def test_an_averaged_model_is_recalibrated_as_update_bn_does_it_for_norms_of_torch():
    torch.manual_seed(0)
    ours = averaged(BatchNorm(4, running_variance="unbiased"))
    torch.manual_seed(0)
    theirs = averaged(nn.BatchNorm2d(4))
    loader = [[images, torch.zeros(5)] for images in batches(5, 5)]
    update_bn(loader, theirs)
    recalibrate(ours, ((images,) for images, labels in loader))
    expected = [b for name, b in theirs.named_buffers() if "running" in name]
    torch.testing.assert_close([*statistics(ours).values()], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("running_variance", ["biased", "unbiased", "around_running_mean"])
@every_norm
def test_update_bn_of_torch_makes_averages_of_the_batches(make, running_variance):
    model, data = shallow(make(running_variance=running_variance)), batches(5, 2, 1)
    model[1] = nn.Identity()  # Dropout would be on.
    momentum = norm_of(model).momentum
    update_bn(batches(4), model)  # is forgotten
    update_bn(data, model)
    assert norm_of(model).momentum == momentum
    seen = [model[0](x) for x in data]
    correction = int(running_variance == "unbiased")
    moments = [torch.var_mean(x, (0, 2, 3), correction=correction) for x in seen]
    var, mean = (sum(ms) / 3 for ms in zip(*moments, strict=True))
    if running_variance == "around_running_mean":
        var = var + sum((m - mean) ** 2 for _, m in moments) / 3
    torch.testing.assert_close([*statistics(model).values()], [mean, var], rtol=1e-12, atol=1e-12)


def norm_of(model):
    (norm,) = (m for m in model.modules() if isinstance(m, BatchNorm))
    return norm


def test_update_bn_gives_the_same_as_with_norms_of_torch():
    """Of several layers, whose inputs change while the norms before them are measured."""
    models = [
        nn.Sequential(nn.Conv2d(3, 4, 3), one(), nn.ReLU(), nn.Conv2d(4, 4, 3), two()).double()
        for one, two in (
            [partial(BatchNorm, 4, running_variance="unbiased")] * 2,
            [partial(nn.BatchNorm2d, 4)] * 2,
        )
    ]
    for ours, theirs in zip(models[0][::3], models[1][::3], strict=True):
        ours.load_state_dict(theirs.state_dict())
    for model in models:
        update_bn([[images, torch.zeros(1)] for images in batches(5, 2, 3)], model.eval())
        assert not model.training
    expected = [b for name, b in models[1].named_buffers() if "running" in name]
    torch.testing.assert_close([*statistics(models[0]).values()], expected, rtol=1e-12, atol=1e-12)


def test_update_bn_does_not_hide_a_batch_that_is_not_finite():
    model = shallow(BatchNorm(4))
    update_bn([batches(2)[0], batches(2)[0] * torch.nan], model)
    assert all(values.isnan().all() for values in statistics(model).values())


@every_norm
def test_update_bn_leaves_frozen_estimates(make):
    model = shallow(make())
    recalibrate(model, batches(3))
    norm_of(model).update_stats = False
    before, *others = state_and_modes(model)
    update_bn(batches(5), model)
    after, *new_others = state_and_modes(model)
    assert_equal(after, before)
    assert new_others == others


@every_norm
def test_what_makes_other_norms_of_batch_norms_of_torch_is_refused(make):
    """It would take the estimates away without a word."""
    model = shallow(make())
    with pytest.raises(AttributeError, match=r"has no num_features: it has .* exp_var\. .*\.fold"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    names = ("num_features", "weight", "bias", "running_mean", "running_var")
    assert not any(hasattr(norm_of(model), name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        norm_of(model).other  # noqa: B018


def test_one_tensor_is_no_iterable_of_batches():
    with pytest.raises(ValueError, match=r"one tensor of shape \(3, 2\)"):
        recalibrate(BatchNorm(2), torch.randn(3, 2))


def test_a_model_without_batch_norms_has_nothing_to_recalibrate():
    text = (
        "The model must have a BatchNorm, EstimatedBatchNorm or BatchChannelNorm of bcn_torch, but "
        "it has none. Convert those of torch.nn with convert_batch_norm."
    )
    with pytest.raises(ValueError, match=re.escape(text) + r"\Z"):
        recalibrate(nn.BatchNorm2d(4), batches(2))
