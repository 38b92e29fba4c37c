"""Checks of the conversion of PyTorch models with norms and convolutions of other libraries.

The classes are small copies of those of timm, torchvision and others, with their names.
`CONVERSIONS` has all checks by name.
"""

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from bcn_torch import BatchChannelNorm, EstimatedBatchNorm, WSConv2d, WSConv3d, convert_batch_norm
from bcn_torch.surgery.replacement import Conv2dSame, WSConv2dSame


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm, then dropout and activation."""

    def __init__(self, num_features, drop_layer=nn.Identity, act_layer=nn.ReLU, **kwargs):
        super().__init__(num_features, **kwargs)
        self.drop, self.act = drop_layer(), act_layer()

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        by_batch = self.training or self.running_mean is None
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            by_batch, self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """timm's: without processes a batch norm, then dropout and activation."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.Hardswish()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's: all that it has are buffers."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(num_features))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(num_features))

    def forward(self, x):
        w, b, v, m = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = w * (v + self.eps).rsqrt()
        return x * scale + (b - m * scale)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's: with an activation after it."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class NeverTraining(nn.BatchNorm2d):
    """Stays in evaluation, as many detectors keep their norms."""

    def train(self, mode=True):
        return super().train(False)


def drawn(model, seed=0):
    """`model` with statistics and parameters that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                positive = name.endswith(("var", "weight"))
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - (not positive) / 2)
    return model


def without_channel_norms(model):
    """What the batch norms of a converted model compute."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, BatchChannelNorm):
            module.channel_norm = nn.Identity()
    return model


def assert_same_but_for_channel_norms(converted, model, x):
    """But for rounding, in evaluation."""
    actual = without_channel_norms(converted).double().eval()(x.double())
    torch.testing.assert_close(actual, copy.deepcopy(model).double().eval()(x.double()))


def refusal(*args, **kwargs):
    """The message of the error."""
    try:
        convert_batch_norm(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError("converted, though it must be refused")


def silent(line):
    raise AssertionError(line)


NORMS = {
    "timm": (lambda: BatchNormAct2d(8), ["norm", "drop", "act"]),
    "timm, dropout": (lambda: BatchNormAct2d(8, nn.Dropout, nn.PReLU), ["norm", "drop", "act"]),
    "timm, without statistics": (
        lambda: BatchNormAct2d(8, track_running_stats=False, affine=False),
        ["norm", "drop", "act"],
    ),
    "timm, sync": (lambda: SyncBatchNormAct(8), ["norm", "drop", "act"]),
    "timm, frozen": (lambda: FrozenBatchNormAct2d(8), ["norm", "drop", "act"]),
    "torchvision, frozen": (lambda: FrozenBatchNorm2d(8), None),
    "frozen by its mode": (lambda: NeverTraining(8), None),
}


def check_norm(make, names, training):
    """It keeps its numbers, and its submodules in a sequence."""
    norm = drawn(make()).train(training)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    converted = convert_batch_norm(model, groups=2, ws=False, report=silent)
    bcn = converted[1]
    if names:
        assert type(bcn) is nn.Sequential
        assert [name for name, _ in bcn.named_children()] == names
        kinds = [type(m) for m in norm.children()]
        assert [type(m) for m in bcn.children()] == [BatchChannelNorm, *kinds]
        bcn = bcn.norm
    assert type(bcn) is BatchChannelNorm
    assert {m.training for m in converted[1].modules()} == {norm.training}
    batch_norm = bcn.batch_norm
    for ours, theirs in {
        "scale": "weight", "shift": "bias", "exp_mean": "running_mean", "exp_var": "running_var",
    }.items():  # fmt: skip
        if getattr(norm, theirs) is not None:
            assert torch.equal(getattr(batch_norm, ours), getattr(norm, theirs))
    if norm_has_statistics := norm.running_mean is not None:
        assert_same_but_for_channel_norms(converted, model, torch.randn(2, 3, 6, 6))
    assert norm_has_statistics or type(norm) is BatchNormAct2d


def check_modes():
    """The submodules keep modes of their own."""
    norm = BatchNormAct2d(8, nn.Dropout).train()
    norm.drop.eval()
    new = convert_batch_norm(norm, groups=2)
    assert [m.training for m in (new, new.norm, new.drop, new.act)] == [True, True, False, True]


def check_frozen(kind, estimate):
    """A frozen norm normalizes by its statistics in training too, and keeps them."""
    norm = drawn(kind(8)).train()
    new = convert_batch_norm(norm, groups=2, estimate=estimate)
    bcn = new.norm if isinstance(new, nn.Sequential) else new
    assert type(bcn.batch_norm) is EstimatedBatchNorm
    assert not any(p.requires_grad for p in new.parameters())
    before = copy.deepcopy(new.state_dict())
    x = torch.randn(4, 8, 5, 5)
    torch.testing.assert_close(without_channel_norms(new)(x), norm(x))
    new(x)
    assert all(torch.equal(before[name], t) for name, t in new.state_dict().items())


def check_never_training():
    """So does a norm that is frozen by its mode."""
    norm = drawn(NeverTraining(8)).train()
    model = convert_batch_norm(nn.Sequential(norm), groups=2)
    model.train()
    x = torch.randn(4, 8, 5, 5)
    torch.testing.assert_close(without_channel_norms(model)(x), norm(x))
    assert torch.equal(model[0].batch_norm.exp_mean, norm.running_mean)
    assert all(p.requires_grad for p in model.parameters())


class WrongEps(FrozenBatchNorm2d):
    """Without eps, as in maskrcnn-benchmark, whatever its attribute says."""

    def forward(self, x):
        w, b, v, m = (
            t.reshape(1, -1, 1, 1)
            for t in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        return (x - m) * w * v.rsqrt() + b


class WithActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class HiddenDropout(nn.BatchNorm2d):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5, self.training)


class OtherMomentum(nn.BatchNorm2d):
    def forward(self, x):
        self.momentum = 1 - self.momentum
        y = super().forward(x)
        self.momentum = 1 - self.momentum
        return y


class OtherOrder(nn.BatchNorm2d):
    """Its submodule comes before it."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(x))


class TwoInputs(nn.BatchNorm2d):
    def forward(self, x, condition):
        return super().forward(x) * condition


def check_refused_norm(kind):
    """A norm that computes something else is refused, and can be left."""
    message = refusal(nn.Sequential(nn.BatchNorm2d(8), kind(8)), groups=2)
    assert f"1: {kind.__name__} has a forward of its own" in message
    left = convert_batch_norm(
        nn.Sequential(nn.BatchNorm2d(8), kind(8)), groups=2, leave=lambda name, _: name == "1"
    )
    assert [type(m) for m in left] == [BatchChannelNorm, kind]


def check_other_statistics():
    """Other modules with running statistics are left, with a line."""
    others = nn.InstanceNorm2d(8, track_running_stats=True), WrongEps(8)
    lines = []
    new = convert_batch_norm(nn.Sequential(nn.BatchNorm2d(8), *others), report=lines.append)
    assert [type(m) for m in new] == [BatchChannelNorm, nn.InstanceNorm2d, WrongEps]
    assert [line.partition(" has ")[0] for line in lines] == ["1: InstanceNorm2d", "2: WrongEps"]
    assert "to convert, or one that computes the same" in refusal(others[0])


def check_trial():
    """Trying a norm calls no hooks, and changes nothing."""
    norm, calls = drawn(BatchNormAct2d(8, nn.Dropout)), []
    for module in norm.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    before, state = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    convert_batch_norm(norm, groups=2)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in norm.state_dict().items())


def check_lazy():
    """A lazy norm is refused until the model has run."""
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    x = torch.randn(2, 3, 6, 6)
    for example_inputs in (None, (x,)):
        message = refusal(model, groups=2, example_inputs=example_inputs)
        assert "1: A LazyBatchNorm2d does not know its size yet" in message
    model(x)
    converted = convert_batch_norm(model, groups=2, example_inputs=(x,), report=silent)
    assert [type(m) for m in converted] == [WSConv2d, BatchChannelNorm, nn.ReLU]


# Convolutions.


class TimmConv2dSame(nn.Conv2d):
    """timm's: pads as TensorFlow does, and then convolves."""

    def forward(self, x):
        pads = []
        for axis in (1, 0):
            size, k = x.shape[2 + axis], self.kernel_size[axis]
            s, d = self.stride[axis], self.dilation[axis]
            total = max((-(size // -s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        x = functional.pad(x, pads)
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Conv3DSimple(nn.Conv3d):
    """torchvision's: another constructor."""

    def __init__(self, in_planes, out_planes, midplanes=None, stride=1, padding=1):
        super().__init__(in_planes, out_planes, 3, stride, padding, bias=False)


class PlainForward(nn.Conv2d):
    """Written out, but the same."""

    def forward(self, x):
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


CONVOLUTIONS = {
    "same": (lambda: TimmConv2dSame(4, 8, 3, stride=2), WSConv2dSame, (7, 8)),
    "same, other arguments": (
        lambda: TimmConv2dSame(4, 8, (3, 5), stride=(2, 3), dilation=(2, 1), groups=2, bias=False),
        WSConv2dSame,
        (11, 12),
    ),
    "same, of this library": (lambda: Conv2dSame(4, 8, 4, stride=2), WSConv2dSame, (7, 8)),
    "another constructor": (lambda: Conv3DSimple(4, 8), WSConv3d, (4, 5, 6)),
    "a plain forward": (lambda: PlainForward(4, 8, 3, stride=2, padding=1), WSConv2d, (7, 8)),
}


def check_convolution(make, kind, space, example):
    """It is standardized, and computes the same otherwise."""
    conv = make()
    norm = nn.BatchNorm3d(8) if len(space) == 3 else nn.BatchNorm2d(8)
    x = torch.randn(2, 4, *space)
    model = nn.Sequential(conv, norm)
    inputs = (x,) if example else None
    new = convert_batch_norm(model, groups=2, example_inputs=inputs, report=silent)[0]
    assert type(new) is kind
    assert all(torch.equal(t, conv.state_dict()[name]) for name, t in new.state_dict().items())
    # With weights that are standardized already but for eps, both compute nearly the same.
    with torch.no_grad():
        flat = new.weight.flatten(1)
        standard = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        for layer in (new, conv):
            layer.weight.copy_(standard.view_as(new.weight))
    torch.testing.assert_close(new(x), conv(x), rtol=1e-4, atol=1e-4)


def check_lines(example):
    """Every convolution that is left has a line that says why."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled, self.bn1 = Scaled(3, 8, 3), nn.BatchNorm2d(8)
            self.depthwise, self.bn2 = nn.Conv2d(8, 8, 1, groups=8), nn.BatchNorm2d(8)
            self.transposed, self.bn3 = nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8)
            self.good, self.bn4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 2, 1)
            self.unused = nn.Sequential(nn.Conv2d(8, 8, 1))

        def forward(self, x):
            x = self.bn2(self.depthwise(self.bn1(self.scaled(x))))
            return self.head(self.bn4(self.good(self.bn3(self.transposed(x)))))

    lines, x = [], torch.randn(2, 3, 6, 6)
    new = convert_batch_norm(Net(), example_inputs=(x,) if example else None, report=lines.append)
    assert [name for name, m in new.named_modules() if isinstance(m, WSConv2d)] == ["good"]
    because = {
        "scaled": "Scaled is not standardized, because it has a forward of its own",
        "depthwise": "Conv2d is not standardized, because each of its output channels has a single",
        "transposed": "ConvTranspose2d is not standardized, because no transposed convolution",
        "head": "Conv2d is not standardized, because "
        + ("no norm that is converted reads its output." if example else "by the order"),
        "unused.0": "Conv2d is not standardized, because "
        + ("it did not run on the example." if example else "by the order"),
    }
    assert len(lines) == len(because)
    for line, (name, why) in zip(lines, because.items(), strict=True):
        assert line.startswith(f"{name}: This {why}")


class Forked(nn.Module):
    """Something else reads the convolution's output too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        c = self.conv1(x)
        return self.bn2(self.conv2(self.bn1(c).relu() + c))


def check_fork():
    """A convolution is left if something else reads its output too."""
    lines = []
    inputs = (torch.randn(2, 3, 5, 5),)
    new = convert_batch_norm(Forked(), groups=2, example_inputs=inputs, report=lines.append)
    assert [type(new.conv1), type(new.conv2)] == [nn.Conv2d, WSConv2d]
    assert lines == [
        "conv1: This Conv2d is not standardized, because something other than the norm that is "
        "converted reads its output too."
    ]


class OtherOrderOfUse(nn.Module):
    """Its modules are defined in another order than they are used."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv(x)).relu()))


def check_order_of_definition():
    """With an example, the order of definition does not matter."""
    inputs = (torch.randn(2, 3, 8, 8),)
    new = convert_batch_norm(OtherOrderOfUse(), groups=2, example_inputs=inputs, report=silent)
    assert [type(new.conv), type(new.conv2)] == [WSConv2d, WSConv2d]
    assert "conv would be before several norms. Give example_inputs" in refusal(OtherOrderOfUse())


class WithTrainingHead(nn.Module):
    """A head that runs in training only, as Inception's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        y = self.body(x)
        return (y, self.head(y)) if self.training else y


def check_training_head():
    """A head that the example does not run is standardized by its definition, with a line."""
    lines = []
    inputs = (torch.randn(2, 3, 8, 8),)
    new = convert_batch_norm(WithTrainingHead(), example_inputs=inputs, report=lines.append)
    assert [type(new.body[0]), type(new.head[0])] == [WSConv2d, WSConv2d]
    assert lines == [
        "head.0: This Conv2d did not run on the example. It is standardized, because it is the "
        "last layer defined before head.1."
    ]


# Groups.


def check_default_groups():
    """By default no group has a single channel."""
    model = convert_batch_norm(nn.ModuleList([nn.BatchNorm2d(c) for c in (32, 64, 24)]))
    assert [m.channel_norm.groups for m in model] == [16, 32, 12]
    lines = []
    assert convert_batch_norm(nn.BatchNorm2d(1), report=lines.append).channel_norm.groups == 1
    assert lines == [
        "the model itself: It has one channel, so that its channel norm undoes what it has learned."
    ]


def check_wrong_groups(channels, groups):
    """A number of groups that does not fit is refused, with the way out."""
    message = refusal(nn.BatchNorm2d(channels), groups=groups)
    assert f"groups={groups} and there are {channels} channels" in message
    assert "groups=None chooses" in message


CONVERSIONS = {
    **{
        f"conversion, norm: {name}, {training=}": partial(check_norm, *row, training)
        for name, row in NORMS.items()
        for training in (True, False)
    },
    "conversion, norm: modes": check_modes,
    **{
        f"conversion, norm: {kind.__name__}, {estimate=}": partial(check_frozen, kind, estimate)
        for kind in (FrozenBatchNorm2d, FrozenBatchNormAct2d)
        for estimate in (True, False)
    },
    "conversion, norm: never training": check_never_training,
    **{
        f"conversion, norm: {kind.__name__} is refused": partial(check_refused_norm, kind)
        for kind in (WithActivation, HiddenDropout, OtherMomentum, OtherOrder, TwoInputs)
    },
    "conversion, norm: other statistics": check_other_statistics,
    "conversion, norm: hooks and random numbers": check_trial,
    "conversion, norm: lazy": check_lazy,
    **{
        f"conversion, convolution: {name}, {example=}": partial(check_convolution, *row, example)
        for name, row in CONVOLUTIONS.items()
        for example in (True, False)
    },
    "conversion, lines: by definition": partial(check_lines, False),
    "conversion, lines: by an example": partial(check_lines, True),
    "conversion, lines: a fork": check_fork,
    "conversion, lines: a head for training": check_training_head,
    "conversion: order of definition": check_order_of_definition,
    "conversion, groups: by default": check_default_groups,
    **{
        f"conversion, groups: {groups} of {channels}": partial(check_wrong_groups, channels, groups)
        for channels, groups in ((32, 32), (24, 32), (24, 5), (8, 0))
    },
}
