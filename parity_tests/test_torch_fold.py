"""Folded for inference a PyTorch model computes the same, in plain layers."""

import copy

import pytest
import torch
from torch import nn

from bcn_torch import (
    VGG,
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLinear,
    convert_batch_norm,
    fold,
    recalibrate,
)
from bcn_torch.variants import WS
from parity_tests.test_torch_surgery import ResNet, assert_equal, state_and_modes, trained

pytestmark = pytest.mark.torch

OURS = (WSConv1d, WSConv2d, WSConv3d, WSLinear, BatchNorm, BatchChannelNorm)


def kinds(model):
    return [type(m) for m in model.modules()]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def assert_close(actual, expected, *, roundings):
    """They differ by so many roundings of the largest value."""
    atol = roundings * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


NETWORKS = {
    "vgg-bcn": lambda: VGG(((8,), (16, 16)), groups=4),
    "vgg-bcn-batch": lambda: VGG(((8,), (16, 16)), groups=4, estimate=False),
    "vgg-bn": lambda: VGG(((8,), (16, 16)), norm="bn"),
    "vgg-bcn-no-ws": lambda: VGG(((8,), (16, 16)), groups=4, ws=False),
    "vgg-nfnet": lambda: VGG(((8,), (16, 16)), groups=4, standardization=WS["nfnet"]),
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


def test_folding_vgg_does_away_with_every_scale_shift_and_estimate_of_a_channel():
    model = VGG(((8,), (16, 16)), groups=4)
    folded = fold(model, torch.randn(1, 3, 8, 8))
    assert parameters(model) - parameters(folded) == 2 * (8 + 16 + 16)
    assert not [*folded.buffers()]
    assert kinds(folded.layers)[1:] == [
        nn.Conv2d, ChannelNorm, nn.ReLU, nn.MaxPool2d,
        nn.Conv2d, ChannelNorm, nn.ReLU, nn.Conv2d, ChannelNorm, nn.ReLU, nn.MaxPool2d,
    ]  # fmt: skip


LAYERS = {
    "1d": (WSConv1d, nn.Conv1d, (4, 6, 3), {"stride": 2}, (2, 4, 9)),
    "2d": (
        WSConv2d,
        nn.Conv2d,
        (4, 6, (3, 1)),
        {"groups": 2, "padding": (2, 1), "padding_mode": "circular", "dilation": (2, 1)},
        (2, 4, 9, 9),
    ),
    "2d-no-bias": (
        WSConv2d,
        nn.Conv2d,
        (4, 6, 3),
        {"bias": False, "padding": "same"},
        (2, 4, 5, 5),
    ),
    "3d": (WSConv3d, nn.Conv3d, (4, 6, 2), {"groups": 2}, (2, 4, 3, 3, 3)),
    "linear": (WSLinear, nn.Linear, (4, 6), {}, (5, 4)),
    "linear-no-bias": (WSLinear, nn.Linear, (4, 6), {"bias": False}, (5, 4)),
}
BATCH_NORMS = {
    "batch": (lambda: BatchNorm(6), nn.Identity),
    "estimated": (lambda: EstimatedBatchNorm(6), nn.Identity),
    "no-affine": (lambda: BatchNorm(6, affine=False), nn.Identity),
    "bcn": (lambda: BatchChannelNorm(6, 3, eps=1e-2, batch_eps=1e-3), ChannelNorm),
}


@pytest.mark.parametrize(("norm", "rest"), BATCH_NORMS.values(), ids=BATCH_NORMS.keys())
@pytest.mark.parametrize("ws", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs", "args", "kwargs", "shape"), LAYERS.values(), ids=LAYERS.keys()
)
def test_each_norm_goes_into_each_layer(ours, theirs, args, kwargs, shape, ws, norm, rest):
    torch.manual_seed(0)
    layer = (ours if ws else theirs)(*args, **kwargs)
    model = trained(nn.Sequential(layer, norm()), *shape).double()
    x = torch.randn(shape, dtype=torch.float64)
    folded = fold(model, x)
    assert kinds(folded)[1:] == [theirs, rest]
    assert folded[0].extra_repr() == theirs(*args, **{**kwargs, "bias": True}).extra_repr()
    assert_close(folded(x), model.eval()(x), roundings=200)
    if rest is ChannelNorm:
        assert (folded[1].eps, folded[1].groups) == (1e-2, 3)
        assert_equal(folded[1].state_dict(), model[1].channel_norm.state_dict())


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
    model = trained(VGG(((8,), (16, 16)), groups=4), 4, 3, 8, 8).bfloat16()
    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    folded = fold(model, x)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert not any(isinstance(m, OURS) for m in folded.modules())


# What follows what is seen, not read.


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


def forgetting(m, x):
    m.conv(x)  # whose output is gone when the next tensor may take over its id
    return m.norm(x + 1)


UNFOLDED = {
    "a new tensor by an old id": (
        Graph(forgetting, conv=conv(), norm=bcn()),
        [nn.Conv2d, BatchChannelNorm],
    ),
    "something between": (
        Graph(lambda m, x: m.norm(m.conv(x) * 2), conv=conv(), norm=bcn()),
        [nn.Conv2d, BatchChannelNorm],
    ),
    "changed in place between": (
        Graph(lambda m, x: m.norm(m.conv(x).relu_()), conv=conv(), norm=bcn()),
        [nn.Conv2d, BatchChannelNorm],
    ),
    "a convolution used twice": (
        Graph(lambda m, x: m.conv(m.norm(m.conv(x))), conv=conv(), norm=bcn()),
        [nn.Conv2d, BatchChannelNorm],
    ),
    "a norm used twice": (
        Graph(lambda m, x: m.norm(m.b(m.norm(m.a(x)))), a=conv(), b=conv(), norm=bcn()),
        [nn.Conv2d, nn.Conv2d, BatchChannelNorm],
    ),
    "two norms on one convolution": (
        Graph(lambda m, x: (lambda y: m.a(y) + m.b(y))(m.conv(x)), conv=conv(), a=bcn(), b=bcn()),
        [nn.Conv2d, BatchChannelNorm, BatchChannelNorm],
    ),
    "channels of another axis": (
        Graph(lambda m, x: m.norm(m.fc(x.flatten(2))), fc=WSLinear(16, 4), norm=bcn()),
        [nn.Linear, BatchChannelNorm],
    ),
    "no batch": (
        Graph(lambda m, x: m.norm(m.conv(x[0])), conv=conv(), norm=bcn()),
        [nn.Conv2d, BatchChannelNorm],
    ),
}


@pytest.mark.parametrize(("model", "left"), UNFOLDED.values(), ids=UNFOLDED.keys())
def test_where_a_norm_is_not_alone_behind_a_layer_it_stays(model, left):
    x = torch.randn(2, 4, 4, 4)
    model(x)
    folded = fold(model, x)
    assert [type(m) for m in folded.children()] == left
    assert_close(folded(x), model.eval()(x), roundings=50)


def test_order_of_definition_and_names_do_not_matter_and_keywords_work():
    model = Graph(lambda m, x: m.norm(x=m.conv(x)), norm=bcn(), conv=conv())
    folded = fold(model, torch.randn(2, 4, 4, 4))
    assert [type(m) for m in folded.children()] == [ChannelNorm, nn.Conv2d]


def test_what_a_subclass_does_is_not_folded_away():
    class Doubling(WSConv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(4, 4, 3, padding=1), bcn(), conv())
    assert kinds(fold(model, torch.randn(2, 4, 4, 4)))[1:3] == [Doubling, BatchChannelNorm]


@pytest.mark.parametrize("model", [bcn(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])
def test_a_model_with_nothing_to_fold_is_refused(model):
    with pytest.raises(ValueError, match="must have something to fold"):
        fold(model, torch.randn(2, 4, 4, 4))


def test_a_shared_layer_that_runs_once_is_replaced_in_all_its_places():
    layers = nn.Sequential(conv(), bcn())
    model = Graph(lambda m, x: m.layers(x), layers=layers, again=layers[0], norm=layers[1])
    folded = fold(model, torch.randn(2, 4, 4, 4))
    assert folded.again is folded.layers[0]
    assert type(folded.norm) is ChannelNorm
    assert folded.norm is folded.layers[1]


NUMBER = r"\d[\d.e-]*"
DIFFERS = (
    "The folded model must compute what the model does, but on the example its output is off by "
    rf"{NUMBER}, and rounding explains {NUMBER}\. Is the output of a convolution or linear layer "
    r"used elsewhere too, besides by the norm that follows it\? Fold those parts of the model "
    r"where it is not\.\Z"
)


@pytest.mark.parametrize("norm", [bcn, lambda: BatchNorm(4)], ids=["bcn", "bn"])
def test_where_the_convolution_is_used_elsewhere_too_folding_is_refused(norm):
    torch.manual_seed(0)
    model = Graph(lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), conv=conv(), norm=norm())
    x = 1 + torch.randn(4, 4, 4, 4)
    model(x)
    before, *others = state_and_modes(model)
    with pytest.raises(ValueError, match=DIFFERS):
        fold(model, x)
    after, *new_others = state_and_modes(model)
    assert_equal(after, before)
    assert new_others == others


def test_an_output_of_several_parts_is_compared_in_each():
    def call(m, x):
        y = m.conv(x)
        return {"a": (m.norm(y), None), "b": [y]}

    model = Graph(call, conv=conv(), norm=bcn())
    x = 1 + torch.randn(4, 4, 4, 4)
    model(x)
    with pytest.raises(ValueError, match="used elsewhere too"):
        fold(model, x)
    model.call = lambda m, x: {"a": (m.norm(m.conv(x)), None), "b": [x]}
    assert type(fold(model, x).norm) is ChannelNorm


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
