"""Checks of folding in PyTorch: which reads are seen, which norms are batch norms, what stays.

`SURGERY` has all of them by name, with some of recalibration. test_folding.py has more graphs,
which it shares with Flax.
"""

import contextlib
import copy
import io
import warnings
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bcn_torch import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv2d,
    WSLinear,
    fold,
    recalibrate,
)
from bcn_torch.surgery.replacement import Conv2dSame


class Graph(nn.Module):
    """Layers, and how they are called."""

    def __init__(self, call, **layers):
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.call(self, x)


def conv(inputs=4):
    return WSConv2d(inputs, 4, 3, padding=1)


def bcn():
    return BatchChannelNorm(4, 2)


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and detectron2: all is in buffers, and nothing is trained."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        parts = self.weight, self.bias, self.running_mean, self.running_var
        weight, bias, mean, var = (part.reshape(1, -1, 1, 1) for part in parts)
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class Activated(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def with_forward(norm, last):
    """A norm of a class of its own, which does one thing more."""

    class Norm(type(norm)):
        def forward(self, x):
            return last(super().forward(x))

    norm.__class__ = Norm
    return norm


class Named(nn.Conv2d):
    """Computes a convolution, and has another class."""


class Same(nn.Conv2d):
    """As timm's `Conv2dSame`."""

    def forward(self, x):
        return Conv2dSame._conv_forward(self, x, self.weight, self.bias)


class AlwaysTraining(nn.BatchNorm2d):
    """Uses the statistics of the batch, whatever it is told."""

    def train(self, mode=True):
        return super().train(True)


def script(function):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return torch.jit.script(function)


def pair(axes, norm):
    layer = nn.Linear if axes == 0 else getattr(nn, f"Conv{axes}d")
    return nn.Sequential(layer(4, 4, *[1][:axes]), norm), torch.randn(5, 4, *[3] * axes)


OTHER_NORMS = {
    "linear": pair(0, nn.BatchNorm1d(4)),
    "1d": pair(1, nn.BatchNorm1d(4)),
    "2d": pair(2, nn.BatchNorm2d(4, eps=0.3, affine=False)),
    "3d": pair(3, nn.BatchNorm3d(4)),
    "sync": pair(2, nn.SyncBatchNorm(4)),
    "frozen": pair(2, FrozenBatchNorm2d(4, 0.3)),
    "with an activation": pair(2, Activated(4)),
    "a subclass": (nn.Sequential(Named(4, 4, 1), nn.BatchNorm2d(4)), torch.randn(5, 4, 3, 3)),
    "its own padding": (
        nn.Sequential(Same(4, 4, 3, 2), nn.BatchNorm2d(4)),
        torch.randn(5, 4, 6, 5),
    ),
    "its own forward": pair(2, with_forward(nn.BatchNorm2d(4), lambda y: y + 0)),
}


def check_fold(model, x):
    """The second module folds into the first, and the numbers stay."""
    model = copy.deepcopy(model).double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    folded = fold(model, torch.zeros_like(x).double())
    assert not isinstance(folded[1], type(model[1]))
    assert type(folded[0]) is type(model[0])
    actual, expected = folded(x.double()), model.eval()(x.double())
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


UNFOLDED_NORMS = {
    "a relu": with_forward(nn.BatchNorm2d(4), torch.relu),
    "a bound": with_forward(nn.BatchNorm2d(4), lambda y: y.clamp(max=100)),
    "a smaller output": with_forward(nn.BatchNorm2d(4), lambda y: y[:, :, 1:]),
    "several outputs": with_forward(nn.BatchNorm2d(4), lambda y: (y, y)),
    "an error": with_forward(nn.BatchNorm2d(4), lambda y: y.view(1, 4, 4, 4)),
    "frozen, and a relu": with_forward(FrozenBatchNorm2d(4), torch.relu),
    "batch statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "always training": AlwaysTraining(4),
    "another scale": with_forward(FrozenBatchNorm2d(4), lambda y: y * 1.001),
    "instance": nn.InstanceNorm2d(4, track_running_stats=True),
    "scripted": script(nn.BatchNorm2d(4).eval()),
}


def check_stays(norm):
    model = Graph(lambda m, x: (m.norm(m.conv(x)), m.other(x)), norm=norm)
    model.conv = nn.Conv2d(4, 4, 1)
    model.other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    folded = fold(model, torch.ones(1, 4, 4, 4))
    assert type(folded.norm) is type(norm)
    assert type(folded.other[1]) is nn.Identity
    torch.testing.assert_close(folded.conv.weight, model.conv.weight, rtol=0, atol=0)


# Which reads are seen. The model returns what reads the output, besides the output of the norm.


STORED = []


def store(y):
    STORED.append(y)


def in_a_cycle(y):
    """Something that only the garbage collector takes away holds the output."""

    def again(n):
        return y.shape if n == 0 else again(n - 1)

    return again(1)


def suspended(y):
    def generate():
        yield 1
        yield y

    generator = generate()
    next(generator)
    return generator


def caught(y):
    """A norm that raises, and then a read."""
    with contextlib.suppress(ValueError):
        nn.BatchNorm2d(4).eval()(y[0])
    return y


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.square()


class Slots:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


@script
def scripted(y):
    return y.relu()


READS = {
    "a sum": lambda y: y + 0,
    "a product with 0": lambda y: 0 * y,
    "in place": lambda y: y.mul_(1),
    "into it": lambda y: torch.ones(2, 4, 4, 4, out=y) is None,
    "its data": lambda y: setattr(y, "data", torch.ones(2, 4, 4, 4)),
    "a view": lambda y: y[:, :1],
    "an alias": lambda y: nn.Parameter(y, requires_grad=False),
    "detached": lambda y: y.detach(),
    "an item": lambda y: y[0, 0, 0, 0].item(),
    "a decision": lambda y: bool((y > 1e9).any()),
    "a keyword": lambda y: torch.sum(input=y),
    "in a list": lambda y: torch.cat([y, y]),
    "as an index": lambda y: torch.arange(9)[y.long()],
    "as numbers": lambda y: y.tolist(),
    "as an array": lambda y: float(np.asarray(y).max()),
    "as text": str,
    "its address": lambda y: y.data_ptr(),
    "its memory": lambda y: y.untyped_storage(),
    "exchanged": lambda y: np.from_dlpack(y),
    "exchanged as a capsule": torch.utils.dlpack.to_dlpack,
    "saved": lambda y: torch.save(y, io.BytesIO()),
    "compiled": lambda y: torch.compile(lambda y: y + 1, backend="eager")(y),
    "scripted": scripted,
    "its own function": Squared.apply,
    "vectorized": torch.vmap(lambda y: 2 * y),
    "a closure, vectorized": lambda y: torch.vmap(lambda x: x * y)(torch.ones(2)),
    "a closure in a branch": lambda y: torch.cond(
        torch.tensor(True), lambda x: x + y, lambda x: x - y, (torch.ones(()),)
    ),
    "an operation": torch.ops.aten.relu,
    "returned": lambda y: {"deep": [(y,)]},
    "in slots": Slots,
    "in a generator": suspended,
    "in a function": lambda y: lambda: y,
    "stored": store,
    "after an error": caught,
}
NO_READS = {
    "nothing": lambda y: None,
    "itself": lambda y: y is None,
    "its shape": lambda y: (y.shape, y.size(1), len(y), y.dim(), y.ndim, y.numel(), y.stride()),
    "its type": lambda y: (y.dtype, y.device, y.is_floating_point(), y.is_cuda, y.requires_grad),
    "as many zeros": lambda y: (torch.zeros_like(y), y.new_zeros(3), y.new_ones(y.shape)),
    "a cycle": in_a_cycle,
    "nothing dropped": lambda y: nn.functional.dropout(y, training=False) is None,
    "nothing converted": lambda y: (y.contiguous() is y, y.to(y.dtype) is y, y.float() is y),
}


def check_read(read, folds, before):
    """The output of a layer is read before its norm, or after it."""

    def call(m, x):
        y = m.conv(x)
        return (read(y), m.norm(y)) if before else (m.norm(y), read(y))

    folded = fold(Graph(call, conv=conv(), norm=bcn(), other=conv()), torch.zeros(2, 4, 4, 4))
    assert type(folded.norm) is (ChannelNorm if folds else BatchChannelNorm)
    STORED.clear()


class Rectified(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


def of_a_class(m):
    m.conv = Rectified(4, 4, 3)


HOOKS = {
    "a class of its own": of_a_class,
    "of the layer": lambda m: m.conv.register_forward_hook(lambda *_: None),
    "before the layer": lambda m: m.conv.register_forward_pre_hook(lambda *_: None),
    "of the norm": lambda m: m.norm.register_forward_hook(lambda *_: None),
    "before the norm": lambda m: m.norm.register_forward_pre_hook(lambda *_: None),
    "a forward of the layer": lambda m: setattr(m.conv, "forward", nn.Identity().forward),
    "a forward of the norm": lambda m: setattr(m.norm, "forward", torch.relu),
}


def check_hook(change):
    model = Graph(lambda m, x: m.norm(m.conv(x)), conv=conv(), norm=bcn(), other=conv())
    change(model)
    assert type(fold(model, torch.zeros(2, 4, 4, 4)).norm) is BatchChannelNorm


WEIGHTS = {
    "read": lambda m: m.conv.weight.sum(),
    "the bias": lambda m: -m.conv.bias,
    "of the norm": lambda m: m.norm.batch_norm.exp_mean + 1,
    "returned": lambda m: {"weights": [m.conv.weight]},
    "another call": lambda m: nn.functional.conv2d(torch.ones(1, 4, 3, 3), m.conv.weight),
    "a part of the norm": lambda m: m.norm.batch_norm(torch.ones(1, 4, 3, 3)),
    "in a scripted function": lambda m: scripted(m.conv.weight),
}


def check_weights(other):
    """Something reads a weight; shapes and types are no reads."""

    def call(m, x):
        return m.norm(m.conv(x)), other(m), m.conv.weight.shape, m.other.weight.dtype

    folded = fold(Graph(call, conv=conv(), norm=bcn(), other=conv()), torch.zeros(2, 4, 4, 4))
    assert type(folded.norm) is BatchChannelNorm
    assert type(folded.other) is nn.Conv2d


def check_graph(call, folds):
    """Whether the norm folds, and the numbers stay."""
    torch.manual_seed(0)
    model = Graph(call, conv=conv(), norm=BatchNorm(4), fc=WSLinear(4, 4), other=conv()).double()
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    folded = fold(model, torch.zeros_like(x))
    assert type(folded.norm) is (nn.Identity if folds else BatchNorm)
    for actual, expected in zip(folded(x), model.eval()(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


GRAPHS = {
    "one": (lambda m, x: [m.norm(m.conv(x))], True),
    # As the heads of a detector, which run at every scale.
    "both twice": (lambda m, x: [m.norm(m.conv(x)), m.norm(m.conv(x[..., :2]))], True),
    "the norm twice": (lambda m, x: [m.norm(m.norm(m.conv(x)))], False),
    "the layer twice": (lambda m, x: [m.norm(m.conv(x)), m.conv(x + 1)], False),
    "another layer": (lambda m, x: (lambda y: [m.norm(y), m.other(y)])(m.conv(x)), False),
    "a view": (lambda m, x: [m.norm(m.conv(x)[:2])], False),
    "two layers": (lambda m, x: [m.norm(m.conv(x)), m.norm(m.other(x))], False),
    "a keyword of the norm": (lambda m, x: [m.norm(x=m.conv(x)), m.other(x)], False),
    "a keyword of the layer": (lambda m, x: [m.norm(m.conv(x=x))], False),
    "linear": (lambda m, x: [m.norm(m.fc(x[..., 0, 0]))], True),
    "linear on more axes": (lambda m, x: [m.norm(m.fc(x))], False),
    "linear on more axes too": (lambda m, x: [m.norm(m.fc(x[..., 0, 0])), m.fc(x)], False),
    "one sample": (lambda m, x: [m.norm(m.conv(x[0])[None])], False),
    "in training": (lambda m, x: [m.norm.train()(m.conv(x)), m.norm.eval()][:1], False),
}


def check_one_run():
    runs = []
    model = Graph(lambda m, x: runs.append(0) or m.norm(m.conv(x)) + m.conv(x), conv=conv())
    model.norm = bcn()
    fold(model, torch.zeros(1, 4, 4, 4))
    assert len(runs) == 1


def check_tied_weight():
    model = Graph(lambda m, x: m.norm(m.conv(x)) + m.other(x), conv=conv(), norm=bcn())
    model.other = conv()
    model.other.weight = model.conv.weight
    x = torch.randn(2, 4, 4, 4)
    folded = fold(model, torch.zeros_like(x))
    assert type(folded.norm) is ChannelNorm
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def check_recalibration(running_variance, var):
    """The average over two batches, of 1 and 3 values, in a channel each."""
    norm = BatchNorm(1, running_variance=running_variance)
    norm.exp_mean.fill_(float("nan"))
    recalibrate(norm, [torch.tensor([[7.0]]), torch.tensor([[1.0], [2.0], [6.0]])])
    actual = norm.exp_mean, norm.exp_var
    torch.testing.assert_close(actual, (torch.tensor([4.0]), torch.tensor([var])))


def check_update_bn(running_variance, var):
    """The same batches, of the same weight; twice, because the first averages are forgotten."""
    norm = BatchNorm(1, running_variance=running_variance)
    for _ in range(2):
        update_bn([torch.tensor([[7.0], [7.0]]), torch.tensor([[1.0], [2.0], [6.0]])], norm)
    actual = norm.exp_mean, norm.exp_var
    torch.testing.assert_close(actual, (torch.tensor([5.0]), torch.tensor([var])))


# The variance that `recalibrate` finds, and `update_bn`
RUNNING_VARIANCES = {
    "biased": (3.5, 7 / 3),
    "unbiased": (5.25, 3.5),
    "around_running_mean": (6.5, 19 / 3),
}
AVERAGES = {"recalibration": check_recalibration, "update_bn": check_update_bn}

TABLES = {
    "graph": (check_graph, GRAPHS),
    "norm": (check_fold, OTHER_NORMS),
    "no norm": (check_stays, {k: (norm,) for k, norm in UNFOLDED_NORMS.items()}),
    "read before": (check_read, {k: (read, False, True) for k, read in READS.items()}),
    "read after": (check_read, {k: (read, False, False) for k, read in READS.items()}),
    "no read before": (check_read, {k: (read, True, True) for k, read in NO_READS.items()}),
    "no read after": (check_read, {k: (read, True, False) for k, read in NO_READS.items()}),
    "weight": (check_weights, {k: (read,) for k, read in WEIGHTS.items()}),
    "hook": (check_hook, {k: (change,) for k, change in HOOKS.items()}),
}
SURGERY = {
    "folding in PyTorch: the model runs once": check_one_run,
    "folding in PyTorch: a tied weight": check_tied_weight,
    **{
        f"folding in PyTorch, {table}: {name}": partial(check, *row)
        for table, (check, rows) in TABLES.items()
        for name, row in rows.items()
    },
    **{
        f"{name} in PyTorch: {kind}": partial(check, kind, var)
        for kind, variances in RUNNING_VARIANCES.items()
        for (name, check), var in zip(AVERAGES.items(), variances, strict=True)
    },
}
