"""Folding of PyTorch models: whole networks, and what only PyTorch has. See test_folding.py."""

import copy
import io
import pickle
from functools import partial

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
from bcn_torch.surgery.replacement import WSConv2dSame
from bcn_torch.variants import WS
from parity_tests.test_torch_conversion import ResNet, assert_equal, state_and_modes, trained
from parity_tests.torch_surgery import SURGERY, Graph, bcn, conv, script

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


# Imports of PyTorch's compiler use what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("check", SURGERY.values(), ids=SURGERY.keys())
def test_what_folds_and_what_stays(check):
    check()


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


FOLDABLE = {
    "resnet of torch": partial(ResNet, width=8),
    "resnet of bcn": NETWORKS["resnet"],
    "same": lambda: nn.Sequential(WSConv2dSame(3, 4, 3, 2), bcn()),
}


@pytest.mark.parametrize("through", [torch.fx.symbolic_trace, script], ids=["fx", "jit"])
@pytest.mark.parametrize("make", FOLDABLE.values(), ids=FOLDABLE.keys())
def test_a_folded_network_can_be_traced_and_scripted(make, through):
    torch.manual_seed(0)
    model = trained(make(), 4, 3, 8, 8)
    x = torch.randn(4, 3, 8, 8)
    folded = fold(model, x)
    assert not any(isinstance(m, (nn.BatchNorm2d, *OURS)) for m in folded.modules())
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
