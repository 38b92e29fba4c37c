"""Conversion of PyTorch models."""

import copy
import re

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parametrizations

from bcn_torch import (
    BatchChannelNorm,
    BatchNorm,
    EstimatedBatchNorm,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    convert_batch_norm,
    recalibrate,
)

pytestmark = pytest.mark.torch


class BasicBlock(nn.Module):
    """Two convolutions and a way around them, with torchvision's names."""

    def __init__(self, last, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(last, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or last != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(last, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        around = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + around)


class ResNet(nn.Module):
    """ResNet-18 for small images, with torchvision's names."""

    def __init__(self, in_channels=3, num_classes=10, width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        last = width
        for i in range(4):
            channels = width * 2**i
            blocks = BasicBlock(last, channels, 1 + (i > 0)), BasicBlock(channels, channels, 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            last = channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def trained(model, *shape, steps=2, seed=0):
    """`model` with statistics of its own, and with scales and shifts that are not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        model(0.5 * step + 2 * torch.randn(shape, generator=generator))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.rand(parameter.shape, generator=generator) - 0.5
    return model


def assert_equal(actual, expected, **kwargs):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, **kwargs)


def state_and_modes(model):
    """All there is to change in a model, copied."""
    settings = [
        (name, m.training, *(getattr(m, a, None) for a in ("momentum", "update_stats")))
        for name, m in model.named_modules()
    ]
    return copy.deepcopy(model.state_dict()), settings, repr(model)


def test_resnet_converts_throughout_and_keeps_every_parameter_and_statistic():
    torch.manual_seed(0)
    model = trained(ResNet(width=8), 4, 3, 8, 8)
    before, *others = state_and_modes(model)
    converted = convert_batch_norm(model, groups=4)
    after, *new_others = state_and_modes(model)
    assert_equal(after, before)
    assert new_others == others
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())
    assert sum(isinstance(m, BatchChannelNorm) for m in converted.modules()) == 20
    convolutions = [m for m in converted.modules() if isinstance(m, nn.Conv2d)]
    assert {type(m) for m in convolutions} == {WSConv2d}
    assert len(convolutions) == 20
    theirs, ours = model.state_dict(), converted.state_dict()
    renamed = {
        "weight": "batch_norm.scale",
        "bias": "batch_norm.shift",
        "running_mean": "batch_norm.exp_mean",
        "running_var": "batch_norm.exp_var",
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            for old, new in renamed.items():
                assert_equal(ours.pop(f"{name}.{new}"), theirs.pop(f"{name}.{old}"))
            theirs.pop(f"{name}.num_batches_tracked")
            assert_equal(ours.pop(f"{name}.channel_norm.scale"), torch.ones(4))
            assert_equal(ours.pop(f"{name}.channel_norm.shift"), torch.zeros(4))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_but_for_its_channel_norms_the_converted_model_computes_the_same(training):
    torch.manual_seed(0)
    model = trained(ResNet(width=8), 4, 3, 8, 8).double().train(training)
    converted = convert_batch_norm(model, groups=4, ws=False, estimate=False)
    for name, module in [*converted.named_modules()]:
        if isinstance(module, BatchChannelNorm):
            converted.get_submodule(name).channel_norm = nn.Identity()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    # 20 layers, each with its rounding.
    torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


NORMS = {
    "1d": (nn.BatchNorm1d, (4, 8)),
    "2d": (nn.BatchNorm2d, (4, 8, 3, 3)),
    "3d": (nn.BatchNorm3d, (4, 8, 2, 2, 2)),
    "sync": (nn.SyncBatchNorm, None),
}


@pytest.mark.parametrize(("kind", "shape"), NORMS.values(), ids=NORMS.keys())
def test_a_model_that_is_a_norm_is_converted_with_all_that_it_has(kind, shape):
    norm = kind(8, eps=1e-3, momentum=0.3)
    if shape:
        trained(norm, *shape)
    norm.weight.requires_grad_(False)
    norm = norm.double().eval()
    new = convert_batch_norm(norm, groups=2)
    assert type(new) is BatchChannelNorm
    assert type(new.batch_norm) is EstimatedBatchNorm
    batch_norm = new.batch_norm
    assert (batch_norm.eps, new.channel_norm.eps, batch_norm.momentum) == (1e-3, 1e-3, 0.3)
    assert not any(m.training for m in new.modules())
    assert {t.dtype for t in (*new.parameters(), *new.buffers())} == {torch.float64}
    assert_equal(
        [batch_norm.scale, batch_norm.shift, batch_norm.exp_mean, batch_norm.exp_var],
        [norm.weight, norm.bias, norm.running_mean, norm.running_var],
    )
    assert [p.requires_grad for p in new.parameters()] == [False, True, False, False]
    assert new.batch_norm.scale.data_ptr() != norm.weight.data_ptr()


def test_missing_scales_shifts_and_statistics_start_at_their_initial_values():
    bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), bare).to(torch.bfloat16)
    norm = convert_batch_norm(model, groups=2)[1]
    assert_equal(norm.state_dict(), BatchChannelNorm(8, 2).bfloat16().state_dict())
    assert all(p.requires_grad for p in norm.parameters())
    # Without anything to tell from, the default dtype.
    assert convert_batch_norm(bare, groups=2).batch_norm.scale.dtype == torch.float32
    without_bias = nn.BatchNorm2d(8)
    without_bias.bias = None
    assert_equal(convert_batch_norm(without_bias, groups=2).batch_norm.shift.data, torch.zeros(8))


def test_half_precision_keeps_its_parameters_and_widens_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).half()
    model[1].running_mean.fill_(0.1)
    norm = convert_batch_norm(model, groups=2)[1]
    assert {p.dtype for p in norm.parameters()} == {torch.float16}
    assert_equal(norm.batch_norm.exp_mean, model[1].running_mean.float())


@pytest.mark.parametrize("estimate", [True, False])
def test_the_arguments_reach_every_norm(estimate):
    model = convert_batch_norm(ResNet(width=8), groups=2, estimate=estimate, momentum=0.01)
    for norm in (m for m in model.modules() if isinstance(m, BatchChannelNorm)):
        assert type(norm.batch_norm) is (EstimatedBatchNorm if estimate else BatchNorm)
        assert (norm.batch_norm.momentum, norm.channel_norm.groups) == (0.01, 2)
    cumulative = nn.BatchNorm2d(8, momentum=None)
    assert convert_batch_norm(cumulative, groups=2, momentum=0.2).batch_norm.momentum == 0.2


def test_without_a_number_of_groups_each_norm_has_the_most_up_to_32_of_two_channels_or_more():
    channels = [1, 7, 24, 31, 32, 33, 37, 48, 64, 100]
    model = convert_batch_norm(nn.ModuleList(map(nn.BatchNorm1d, channels)), groups=None)
    assert [m.channel_norm.groups for m in model] == [1, 1, 12, 1, 16, 11, 1, 24, 32, 25]


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 8, 3, stride=2, padding="valid"), nn.BatchNorm1d, WSConv1d, (2, 4, 9)),
    "2d": (
        nn.Conv2d(4, 8, (3, 1), padding=(2, 1), dilation=2, groups=2, padding_mode="circular"),
        nn.BatchNorm2d,
        WSConv2d,
        (2, 4, 9, 9),
    ),
    "3d": (
        nn.Conv3d(4, 8, 3, padding="same", bias=False),
        nn.BatchNorm3d,
        WSConv3d,
        (2, 4, *[3] * 3),
    ),
}


@pytest.mark.parametrize(
    ("conv", "norm", "kind", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys()
)
def test_a_convolution_keeps_all_its_arguments_and_parameters(conv, norm, kind, shape):
    conv.weight.requires_grad_(False)
    new = convert_batch_norm(nn.Sequential(conv, norm(8)).eval(), groups=2)[0]
    assert type(new) is kind
    assert not new.training
    assert_equal(new.state_dict(), conv.state_dict())
    assert [p.requires_grad for p in new.parameters()] == [
        p.requires_grad for p in conv.parameters()
    ]
    assert new.extra_repr() == conv.extra_repr()
    # Where the weights are standardized already but for eps, both compute nearly the same.
    with torch.no_grad():
        flat = new.weight.flatten(1)
        standard = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        for layer in (new, conv):
            layer.weight.copy_(standard.view_as(new.weight))
    x = torch.randn(shape)
    torch.testing.assert_close(new(x), conv(x), rtol=1e-4, atol=1e-4)


def converted_kinds(*layers, **kwargs):
    model = convert_batch_norm(nn.Sequential(*layers), groups=2, **kwargs)
    return [type(m) for m in model]


def test_only_the_convolution_that_feeds_the_norm_is_standardized():
    conv, norm = nn.Conv2d, BatchChannelNorm
    assert converted_kinds(conv(3, 8, 3), conv(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)) == [
        conv, WSConv2d, nn.ReLU, norm,
    ]  # fmt: skip
    # With another number of outputs it is not the one; nor is one that comes after.
    assert converted_kinds(conv(3, 8, 3), conv(3, 4, 3), nn.BatchNorm2d(8)) == [
        WSConv2d, conv, norm,
    ]  # fmt: skip
    assert converted_kinds(nn.BatchNorm2d(8), conv(8, 8, 3)) == [norm, conv]
    # Nor one that a layer of another kind hides.
    assert converted_kinds(conv(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8)) == [
        conv, nn.ConvTranspose2d, norm,
    ]  # fmt: skip
    assert converted_kinds(conv(3, 8, 3), nn.BatchNorm2d(8), ws=False) == [conv, norm]
    assert converted_kinds(WSConv2d(3, 8, 3), nn.BatchNorm2d(8)) == [WSConv2d, norm]
    assert converted_kinds(conv(3, 8, 3), norm(8, 2), nn.BatchNorm2d(4)) == [conv, norm, norm]


class Crossed(nn.Module):
    """The convolution before the norm is not the last one defined before it."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 8, 3)
        self.shortcut = nn.Conv2d(4, 8, 3)
        self.norm2 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm1(x).relu()
        return self.norm2(self.conv1(x)) + self.shortcut(x)


def test_an_example_shows_which_convolution_feeds_the_norm():
    model = Crossed()
    before = copy.deepcopy(model.state_dict())
    guessed = convert_batch_norm(model, groups=2)
    seen = convert_batch_norm(model, groups=2, example_inputs=(torch.randn(2, 4, 5, 5),))
    assert [type(guessed.conv1), type(guessed.shortcut)] == [nn.Conv2d, WSConv2d]
    assert [type(seen.conv1), type(seen.shortcut)] == [WSConv2d, nn.Conv2d]
    assert_equal(model.state_dict(), before)
    assert model.training
    assert seen.training


def test_an_ambiguous_order_of_definition_is_refused_without_an_example():
    convolutions = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    model = nn.Sequential(*convolutions, *norms)
    with pytest.raises(ValueError, match="by that order 1 would be before several norms"):
        convert_batch_norm(model, groups=2)
    assert [type(m) for m in convert_batch_norm(model, groups=2, ws=False)][2:] == [
        BatchChannelNorm,
        BatchChannelNorm,
    ]
    seen = convert_batch_norm(model, groups=2, example_inputs=(torch.randn(2, 8, 5, 5),))
    assert [type(m) for m in seen][:2] == [nn.Conv2d, WSConv2d]


def test_a_model_without_batch_norms_has_nothing_to_convert():
    with pytest.raises(ValueError, match=r"must have a batch norm of torch\.nn"):
        convert_batch_norm(nn.Conv2d(3, 8, 3))


def test_subclasses_with_a_forward_of_their_own_are_left_or_refused():
    class ScaledConv(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class NormWithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class Renamed(nn.BatchNorm2d):
        pass

    assert converted_kinds(ScaledConv(3, 8, 3), nn.BatchNorm2d(8)) == [ScaledConv, BatchChannelNorm]
    assert converted_kinds(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)) == [
        nn.LazyConv2d, BatchChannelNorm,
    ]  # fmt: skip
    assert converted_kinds(Renamed(8)) == [BatchChannelNorm]
    with pytest.raises(ValueError, match="0: NormWithActivation has a forward of its own"):
        converted_kinds(NormWithActivation(8))


def test_shared_modules_stay_shared_and_tied_weights_stay_tied():
    norm, conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict({"a": nn.Sequential(conv, norm), "b": nn.Sequential(norm), "c": conv})
    model["tied"] = nn.Conv2d(8, 8, 3)
    model["tied"].weight = conv.weight
    new = convert_batch_norm(model, groups=2)
    assert new["a"][1] is new["b"][0]
    assert type(new["a"][1]) is BatchChannelNorm
    assert new["a"][0] is new["c"]
    assert type(new["c"]) is WSConv2d
    assert new["tied"].weight is new["c"].weight
    assert new["tied"].weight is not conv.weight


def test_running_an_example_changes_neither_the_random_state_nor_the_example():
    model = nn.Sequential(nn.ReLU(inplace=True), Crossed())
    model[1].register_forward_hook(lambda module, args, y: y + torch.rand(()))
    x, state = -torch.ones(2, 4, 5, 5), torch.get_rng_state()
    convert_batch_norm(model, groups=2, example_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(x, -torch.ones(2, 4, 5, 5))


def test_leave_is_asked_about_the_models_own_norms_and_convolutions_by_name():
    model, asked = ResNet(width=8), {}

    def leave(name, module):
        asked[name] = module
        return name.startswith("layer1.") or module is model.layer2[0].conv1

    new = convert_batch_norm(model, groups=4, leave=leave)
    kinds = nn.Conv2d | nn.BatchNorm2d
    assert asked == {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    left = {name for name, m in new.named_modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d)}
    assert left == {*(n for n in asked if n.startswith("layer1.")), "layer2.0.conv1"}


def test_a_shared_module_is_left_everywhere_if_it_is_left_anywhere():
    norm = nn.BatchNorm2d(8)
    new = convert_batch_norm(
        nn.ModuleDict({"a": norm, "b": norm, "c": nn.BatchNorm2d(8)}),
        groups=2,
        leave=lambda name, _: name == "b",
    )
    assert type(new["a"]) is nn.BatchNorm2d
    assert new["a"] is new["b"]


def test_the_converted_model_is_a_copy_that_consumes_no_random_numbers():
    model = ResNet(width=8)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    new = convert_batch_norm(model, groups=4)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for tensor in (*new.parameters(), *new.buffers()):
            tensor.fill_(7)
    assert_equal(model.state_dict(), before)


REFUSED = """\
Nothing was converted, because of 7 of the modules, which can also be left as they are with \
leave=lambda name, module: name in {...}:
groups: groups must divide the number of channels into groups of two or more, because a channel \
norm of single channels undoes what the batch norm has learned, but groups=4 and there are 6 \
channels. Any of 1, 2, 3 would do, and groups=None chooses for each norm.
parametrized.0: The weight of this ParametrizedConv2d is computed by a parametrization, such as \
weight_norm or spectral_norm, which a conversion would lose. Remove it first, or leave the module \
as it is with leave.
hooked.0: The weight of this Conv2d is computed by a parametrization, such as weight_norm or \
spectral_norm, which a conversion would lose. Remove it first, or leave the module as it is with \
leave.
lazy: A LazyBatchNorm2d does not know its size yet. Run the model on a batch first.
cumulative: momentum=None, a cumulative average, has no counterpart here. Give a momentum, for \
example momentum=0.1.
eps: eps must be positive and finite, and a normal number of float32, from 1.18e-38 to 3.4e+38, \
but eps=0.0. The usual one is 1e-5.
momentum: momentum is the weight of the new value in the running estimates and must be from 0 to \
1, but momentum=1.5. A Flax momentum m, the weight of the old value, is 1 - m here: 0.9 there is \
0.1 here."""


def test_all_that_cannot_be_converted_is_listed_at_once():
    def pair(conv):
        return nn.Sequential(conv, nn.BatchNorm2d(8))

    model = nn.ModuleDict(
        {
            "fine": pair(nn.Conv2d(3, 8, 3)),
            "groups": nn.BatchNorm2d(6),
            "fan_in": pair(nn.Conv2d(8, 8, 1, groups=8)),
            "parametrized": pair(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
            "hooked": pair(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))),
            "lazy": nn.LazyBatchNorm2d(),
            "cumulative": nn.BatchNorm2d(8, momentum=None),
            "eps": nn.BatchNorm2d(8, eps=0.0),
            "momentum": nn.BatchNorm2d(8, momentum=1.5),
        }
    )
    with pytest.raises(ValueError, match=re.escape(REFUSED) + r"\Z"):
        convert_batch_norm(model, groups=4)
    assert type(model["fine"][1]) is nn.BatchNorm2d
    del model["lazy"]  # which nothing can copy
    new = convert_batch_norm(model, groups=4, leave=lambda name, _: not name.startswith("fine"))
    assert [type(m) for m in new["fine"]] == [WSConv2d, BatchChannelNorm]
    assert type(new["fan_in"][0]) is nn.Conv2d


def test_a_bad_momentum_and_a_bad_root_are_refused():
    with pytest.raises(ValueError, match="momentum is the weight of the new value"):
        convert_batch_norm(ResNet(width=8), groups=4, momentum=2.0)
    with pytest.raises(ValueError, match="the model itself: groups must divide"):
        convert_batch_norm(nn.BatchNorm2d(6), groups=4)


def test_a_converted_resnet_18_learns_digits():
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images[:64, None] / 8 - 1, dtype=torch.float32).split(16)
    labels = torch.tensor(digits.target[:64]).split(16)
    model = convert_batch_norm(ResNet(in_channels=1, width=16), groups=None)
    recalibrate(model, x)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for inputs, targets in [*zip(x, labels, strict=True)] * 8:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
