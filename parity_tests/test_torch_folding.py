"""Folding of PyTorch models: whole networks, and what only PyTorch has. See test_folding.py."""

import contextlib
import copy
import io
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from bcn_torch import (
    VGG,
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLinear,
    convert_batch_norm,
    fold,
    recalibrate,
)
from bcn_torch.variants import WS
from parity_tests.test_torch_conversion import ResNet, assert_equal, state_and_modes, trained

pytestmark = pytest.mark.torch

OURS = (WSConv1d, WSConv2d, WSConv3d, WSLinear, BatchNorm, BatchChannelNorm)


def kinds(model):
    return [type(m) for m in model.modules()]


def assert_close(actual, expected, *, roundings):
    """They differ by so many roundings of the largest value."""
    atol = roundings * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


BCN = partial(BatchChannelNorm, groups=4)
small_vgg = partial(VGG, ((8,), (16, 16)), norm=BCN)
NETWORKS = {
    "vgg-bcn": small_vgg,
    "vgg-bcn-batch": partial(small_vgg, norm=partial(BCN, estimate=False)),
    "vgg-bn": partial(small_vgg, norm=BatchNorm),
    "vgg-bcn-no-ws": partial(small_vgg, conv=nn.Conv2d),
    "vgg-nfnet": partial(small_vgg, conv=partial(WSConv2d, standardization=WS["nfnet"])),
    "resnet": lambda: convert_batch_norm(ResNet(width=8), groups=4),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_network
def test_a_whole_network_folds_and_computes_the_same_to_rounding(make, dtype):
    torch.manual_seed(0)
    model = trained(make(), 4, 3, 8, 8).to(dtype)
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    recalibrate(model, [x])
    before, *others = state_and_modes(model)
    folded = fold(model, x[:2])
    after, *new_others = state_and_modes(model)
    assert_equal(after, before)
    assert new_others == others
    assert not any(isinstance(m, OURS) for m in folded.modules())
    assert not any(m.training for m in folded.modules())
    assert {p.dtype for p in folded.parameters()} == {dtype}
    # Up to 20 layers, each with some 50 roundings of its own.
    with torch.no_grad():
        assert_close(folded(x), model.eval()(x), roundings=20 * 50)


def test_a_folded_vgg_has_no_scales_shifts_or_estimates_of_channels():
    model = small_vgg()
    folded = fold(model, torch.randn(1, 3, 8, 8))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, folded))
    assert before - after == 2 * (8 + 16 + 16)
    assert not [*folded.buffers()]
    assert kinds(folded.layers)[1:] == [
        nn.Conv2d, ChannelNorm, nn.ReLU, nn.MaxPool2d,
        nn.Conv2d, ChannelNorm, nn.ReLU, nn.Conv2d, ChannelNorm, nn.ReLU, nn.MaxPool2d,
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", WS)
def test_a_layer_without_a_norm_keeps_its_standardized_weight_and_nothing_else(name, bias):
    model = WSConv2d(4, 6, 3, bias=bias, standardization=WS[name]).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    folded = fold(model, x)
    assert type(folded) is nn.Conv2d
    assert [*folded.state_dict()] == ["weight", "bias"][: 1 + bias]
    assert torch.equal(folded(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_folded_weights_are_rounded_once(dtype):
    torch.manual_seed(0)
    model = trained(nn.Sequential(WSConv2d(4, 6, 3), BatchChannelNorm(6, 3)), 4, 4, 8, 8).to(dtype)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    folded, exact = fold(model, x), fold(copy.deepcopy(model).double(), x.double())
    assert_equal(folded.state_dict(), exact.to(dtype).state_dict())
    # The convolution's output is rounded to the type on its way to the norm, a spread of 1.
    assert_close(folded(x), model.eval()(x), roundings=4)


def test_a_network_in_bfloat16_folds():
    torch.manual_seed(0)
    model = trained(small_vgg(), 4, 3, 8, 8).bfloat16()
    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    folded = fold(model, x)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert not any(isinstance(m, OURS) for m in folded.modules())


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


def test_what_a_subclass_does_is_not_folded_away():
    class Doubling(WSConv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(4, 4, 3, padding=1), bcn(), conv())
    assert kinds(fold(model, torch.randn(2, 4, 4, 4)))[1:3] == [Doubling, BatchChannelNorm]


def test_a_shared_layer_that_runs_once_is_replaced_in_all_its_places():
    layers = nn.Sequential(conv(), bcn())
    model = Graph(lambda m, x: m.layers(x), layers=layers, again=layers[0], norm=layers[1])
    folded = fold(model, torch.randn(2, 4, 4, 4))
    assert folded.again is folded.layers[0]
    assert type(folded.norm) is ChannelNorm
    assert folded.norm is folded.layers[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fork_stays_in_half_precision(dtype):
    model = Graph(lambda m, x: (lambda y: m.norm(y) + 1e-3 * y)(m.conv(x)), conv=conv(), norm=bcn())
    folded = fold(model.to(dtype), torch.zeros(2, 4, 4, 4, dtype=dtype))
    assert type(folded.norm) is BatchChannelNorm


def test_neither_a_state_of_the_model_nor_the_example_changes():
    def call(m, x):
        m.count += 1
        x += 1
        return m.norm(m.conv(x)) * m.count

    model = Graph(call, conv=conv(), norm=bcn())
    model.register_buffer("count", torch.zeros(()))
    model.norm.update_stats = True
    before = copy.deepcopy(model.state_dict())
    x = torch.zeros(2, 4, 4, 4)
    folded = fold(model, x)
    assert type(folded.norm) is ChannelNorm
    assert_equal(model.state_dict(), before)
    assert_equal([folded.count, x], [torch.zeros(()), torch.zeros_like(x)])


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["vgg-bcn", "vgg-bn", "resnet"])
def test_in_mixed_precision_a_network_folds(name, inside):
    torch.manual_seed(0)
    model = trained(NETWORKS[name](), 4, 3, 8, 8)
    model = Graph(lambda m, x: autocast(inside)(m.net)(x), net=model)
    x = torch.randn(4, 3, 8, 8)
    folded = autocast(not inside)(fold)(model, x)
    assert not any(isinstance(m, OURS) for m in folded.modules())
    assert_equal(folded.state_dict(), fold(model.net, x).state_dict(prefix="net."))


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


COMPUTED = nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm


@pytest.mark.parametrize("computed", COMPUTED, ids=["parametrization", "hook"])
def test_a_weight_that_is_computed_stays_computed(computed):
    layers = [computed(nn.Conv2d(4, 4, 3, padding=1)), bcn(), computed(conv()), bcn(), conv()]
    folded = fold(nn.Sequential(*layers), torch.randn(2, 4, 4, 4))
    assert [type(m) for m in folded] == [*map(type, layers[:4]), nn.Conv2d]
    assert_equal(folded[:4].state_dict(), nn.Sequential(*layers[:4]).state_dict())


def test_statistics_stay_while_folding_even_where_evaluation_updates_them():
    model = nn.Sequential(conv(), nn.ReLU(), BatchChannelNorm(4, 2, update_stats=True))
    x = torch.randn(2, 4, 4, 4)
    folded = fold(model, x)
    assert_equal(folded[2].state_dict(), model[2].state_dict())
    assert folded[2].update_stats is True


def test_it_folds_in_inference_mode_and_the_result_can_be_trained():
    with torch.inference_mode():
        folded = fold(nn.Sequential(conv(), bcn()), torch.randn(2, 4, 4, 4))
    folded(torch.randn(2, 4, 4, 4)).pow(3).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())


# Which norms are batch norms.


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


def with_forward(norm, last):
    """A norm of a class of its own, which does one thing more."""

    class Norm(type(norm)):
        def forward(self, x):
            return last(super().forward(x))

    norm.__class__ = Norm
    return norm


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
    "instance": pair(2, nn.InstanceNorm2d(4, track_running_stats=True)),
    "its own forward": pair(2, with_forward(nn.BatchNorm2d(4), lambda y: y + 0)),
}


@pytest.mark.parametrize(("model", "x"), OTHER_NORMS.values(), ids=OTHER_NORMS.keys())
def test_batch_norms_of_other_libraries_fold(model, x):
    model = model.double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    folded = fold(model, torch.zeros_like(x).double())
    assert type(folded[1]) is nn.Identity
    assert_close(folded(x.double()), model.eval()(x.double()), roundings=20)


UNFOLDED_NORMS = {
    "a relu": with_forward(nn.BatchNorm2d(4), torch.relu),
    "a bound": with_forward(nn.BatchNorm2d(4), lambda y: y.clamp(max=100)),
    "a smaller output": with_forward(nn.BatchNorm2d(4), lambda y: y[:, :, 1:]),
    "several outputs": with_forward(nn.BatchNorm2d(4), lambda y: (y, y)),
    "an error": with_forward(nn.BatchNorm2d(4), lambda y: y.view(1, 4, 4, 4)),
    "frozen, and a relu": with_forward(FrozenBatchNorm2d(4), torch.relu),
    "batch statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "always training": AlwaysTraining(4),
    "another epsilon": with_forward(FrozenBatchNorm2d(4), lambda y: y * (1 + 1e-4)),
    "scripted": script(nn.BatchNorm2d(4).eval()),
}


@pytest.mark.parametrize("norm", UNFOLDED_NORMS.values(), ids=UNFOLDED_NORMS.keys())
def test_what_computes_more_than_a_batch_norm_stays(norm):
    model = Graph(lambda m, x: (m.norm(m.conv(x)), m.other(x)), norm=norm)
    model.conv = nn.Conv2d(4, 4, 1)
    model.other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    folded = fold(model, torch.ones(1, 4, 4, 4))
    assert type(folded.norm) is type(norm)
    assert type(folded.other[1]) is nn.Identity
    assert_equal(folded.conv.state_dict(), model.conv.state_dict())


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
    "compiled": torch.compile(lambda y: y + 1, backend="eager"),
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


# Imports of PyTorch's compiler use what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("order", ["before the norm", "after the norm"])
@pytest.mark.parametrize(
    ("read", "folds"),
    [(read, False) for read in READS.values()] + [(read, True) for read in NO_READS.values()],
    ids=[*READS, *NO_READS],
)
def test_all_reads_of_an_output_are_seen(read, folds, order):
    def call(m, x):
        y = m.conv(x)
        if order == "before the norm":
            return read(y), m.norm(y)
        return m.norm(y), read(y)

    model = Graph(call, conv=conv(), norm=bcn(), other=conv())
    folded = fold(model, torch.zeros(2, 4, 4, 4))
    assert type(folded.norm) is (ChannelNorm if folds else BatchChannelNorm)
    STORED.clear()


def test_the_model_runs_once():
    runs = []
    model = Graph(lambda m, x: runs.append(0) or m.net(x), net=ResNet(width=8))
    fold(model, torch.zeros(1, 3, 8, 8))
    assert len(runs) == 1


HOOKS = {
    "of the layer": lambda m: m.conv.register_forward_hook(lambda *_: None),
    "before the layer": lambda m: m.conv.register_forward_pre_hook(lambda *_: None),
    "of the norm": lambda m: m.norm.register_forward_hook(lambda *_: None),
    "before the norm": lambda m: m.norm.register_forward_pre_hook(lambda *_: None),
    "a forward of the layer": lambda m: setattr(m.conv, "forward", nn.Identity().forward),
    "a forward of the norm": lambda m: setattr(m.norm, "forward", torch.relu),
}


@pytest.mark.parametrize("change", HOOKS.values(), ids=HOOKS.keys())
def test_a_layer_or_norm_whose_call_is_changed_stays(change):
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


@pytest.mark.parametrize("other", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_layer_or_norm_whose_weights_are_read_by_others_stays(other):
    def call(m, x):
        return m.norm(m.conv(x)), other(m), m.conv.weight.shape, m.other.weight.dtype

    model = Graph(call, conv=conv(), norm=bcn(), other=conv())
    folded = fold(model, torch.zeros(2, 4, 4, 4))
    assert type(folded.norm) is BatchChannelNorm
    assert type(folded.other) is nn.Conv2d


def test_a_tied_weight_is_folded_in_one_layer_alone():
    model = Graph(lambda m, x: m.norm(m.conv(x)) + m.other(x), conv=conv(), norm=bcn())
    model.other = conv()
    model.other.weight = model.conv.weight
    x = torch.randn(2, 4, 4, 4)
    folded = fold(model, torch.zeros_like(x))
    assert type(folded.norm) is ChannelNorm
    assert_close(folded(x), model.eval()(x), roundings=50)


def test_layers_that_are_shared_with_their_norm_fold():
    """As the heads of a detector are, which run at every scale."""
    model = Graph(lambda m, x: [m.norm(m.conv(x)), m.norm(m.conv(x[..., :2]))], conv=conv())
    model.norm = nn.BatchNorm2d(4)
    model = trained(model, 2, 4, 4, 4).double()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    folded = fold(model, torch.zeros_like(x))
    assert type(folded.norm) is nn.Identity
    for actual, expected in zip(folded(x), model.eval()(x), strict=True):
        assert_close(actual, expected, roundings=50)


def test_a_linear_layer_that_also_runs_on_more_axes_stays():
    model = Graph(lambda m, x: (m.norm(m.fc(x[:, :, 0, 0])), m.fc(x)), fc=WSLinear(4, 4))
    model.norm = BatchNorm(4)
    assert type(fold(model, torch.zeros(2, 4, 4, 4)).norm) is BatchNorm


# Export.


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize("name", ["vgg-bcn", "resnet"])
def test_folded_or_not_it_exports_and_the_export_computes_the_same(name, folding):
    torch.manual_seed(0)
    model = trained(NETWORKS[name](), 4, 3, 8, 8).eval()
    x = torch.randn(4, 3, 8, 8)
    if folding:
        model = fold(model, x)
    exported = torch.export.export(model, (x,)).module()
    y = torch.randn(4, 3, 8, 8)
    assert_close(exported(y), model(y), roundings=10)


@pytest.mark.parametrize("through", [torch.fx.symbolic_trace, script], ids=["fx", "jit"])
def test_a_folded_network_of_torch_can_be_traced_and_scripted(through):
    torch.manual_seed(0)
    model = trained(ResNet(width=8), 4, 3, 8, 8)
    x = torch.randn(4, 3, 8, 8)
    folded = fold(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_close(folded(x), model.eval()(x), roundings=20 * 50)
    assert_close(through(folded)(x), folded(x), roundings=10)


@pytest.mark.parametrize("name", ["vgg-bcn", "resnet"])
def test_a_folded_network_can_be_stored_and_copied(name):
    torch.manual_seed(0)
    model = trained(NETWORKS[name](), 4, 3, 8, 8)
    x = torch.randn(4, 3, 8, 8)
    folded, other = fold(model, x), fold(trained(NETWORKS[name](), 4, 3, 8, 8, seed=1), x)
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    for again in (other, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert_equal(again(x), folded(x))
