"""Folded for inference a PyTorch model computes the same, in plain layers."""

import copy
from functools import partial
from types import SimpleNamespace

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


bcn = partial(BatchChannelNorm, groups=4)
small_vgg = partial(VGG, ((8,), (16, 16)), norm=bcn)
NETWORKS = {
    "vgg-bcn": small_vgg,
    "vgg-bcn-batch": partial(small_vgg, norm=partial(bcn, estimate=False)),
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


def test_folding_vgg_does_away_with_every_scale_shift_and_estimate_of_a_channel():
    model = small_vgg()
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
    model = trained(small_vgg(), 4, 3, 8, 8).bfloat16()
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
    "one norm or another": (
        Graph(
            lambda m, x: (lambda y: (m.a if y.abs().max() < 100 else m.b)(y))(m.conv(x)),
            conv=conv(),
            a=BatchChannelNorm(4, 2, momentum=0),
            b=BatchChannelNorm(4, 2, momentum=0),
        ),
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


def ending(last):
    """A fork at the first of three pairs of convolution and norm, and how it ends."""

    def call(m, x):
        y = m.a(x)
        return last(m, m.na(y), y)

    return call


def rest(m, z):
    return m.nc(m.c(m.nb(m.b(z)).relu()))


def with_the_other_norm_if_large(m, x):
    y = m.a(x)
    z = m.na(y) if y.abs().max() < 100 else m.na(y.clamp(-100, 100))
    return rest(m, z)


def refusing_garbage(m, z, y):
    assert y.abs().max() < 100
    return rest(m, z)


FORKS = {
    "sum": ending(lambda m, z, y: rest(m, z + y)),
    "weight 1e-6": ending(lambda m, z, y: rest(m, z + 1e-6 * y)),
    "weight 1e-12": ending(lambda m, z, y: rest(m, z + 1e-12 * y)),
    "weight 0": ending(lambda m, z, y: rest(m, z + 0 * y)),
    "argmax": ending(lambda m, z, y: rest(m, z + y).argmax(1)),
    "argmax of it alone": ending(lambda m, z, y: (rest(m, z), y.flatten().argmax())),
    "comparison": ending(lambda m, z, y: rest(m, z * (y > 0))),
    "integers": ending(lambda m, z, y: rest(m, z + y).mul(100).int()),
    "parts": ending(lambda m, z, y: {"a": (rest(m, z), None, "text"), "b": [y]}),
    "number": ending(lambda m, z, y: (rest(m, z), y.mean().item())),
    "array": ending(lambda m, z, y: (rest(m, z), y.detach().numpy())),
    "object": ending(lambda m, z, y: SimpleNamespace(a=rest(m, z), b=SimpleNamespace(y=y))),
    "length": ending(lambda m, z, y: [rest(m, z)] * (1 + int(y.abs().max() > 100))),
    "size": ending(lambda m, z, y: rest(m, z)[: 1 + int(y.abs().max() < 100)] * 0),
    "key": ending(lambda m, z, y: {"z": rest(m, z)} | ({"y": 0} if y.abs().max() < 100 else {})),
    "text": ending(lambda m, z, y: (rest(m, z), f"{y.mean():.9f}")),
    "error": ending(refusing_garbage),
    "path": with_the_other_norm_if_large,
}


@pytest.mark.parametrize("example", [torch.zeros, torch.randn], ids=["zeros", "random"])
@pytest.mark.parametrize("norm", [bcn, lambda: BatchNorm(4)], ids=["bcn", "bn"])
@pytest.mark.parametrize("call", FORKS.values(), ids=FORKS.keys())
def test_a_norm_whose_convolution_is_used_elsewhere_too_stays_and_the_others_go(
    call, norm, example
):
    torch.manual_seed(0)
    layers = {name: conv() for name in "abc"} | {name: norm() for name in ("na", "nb", "nc")}
    model = trained(Graph(call, **layers), 2, 4, 4, 4)
    before, *others = state_and_modes(model)
    folded = fold(model, example(2, 4, 4, 4))
    after, *new_others = state_and_modes(model)
    assert_equal(after, before)
    assert new_others == others
    gone = ChannelNorm if norm is bcn else nn.Identity
    assert [type(m) for m in folded.children()] == [nn.Conv2d] * 3 + [type(norm()), gone, gone]
    # The weight is standardized for good, and nothing else.
    alone = fold(model.a, torch.zeros(1, 4, 4, 4))
    assert_equal(folded.a.state_dict(), alone.state_dict())
    model.call = folded.call = ending(lambda m, z, y: rest(m, z + y))
    x = torch.randn(2, 4, 4, 4)
    assert_close(folded(x), model.eval()(x), roundings=200)


def test_exactly_the_forks_stay_wherever_they_are():
    class Block(nn.Module):
        def __init__(self, fork):
            super().__init__()
            self.conv, self.norm, self.fork = conv(), bcn(), fork

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + (y if self.fork else x)

    forks = [False, True, False, True, False]
    folded = fold(nn.Sequential(*map(Block, forks)), torch.randn(2, 4, 4, 4))
    assert [type(block.norm) is BatchChannelNorm for block in folded] == forks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fork_stays_in_half_precision(dtype):
    model = Graph(lambda m, x: (lambda y: m.norm(y) + 1e-3 * y)(m.conv(x)), conv=conv(), norm=bcn())
    folded = fold(model.to(dtype), torch.zeros(2, 4, 4, 4, dtype=dtype))
    assert type(folded.norm) is BatchChannelNorm


HARMLESS = {
    "the shape": lambda z, y: z.view(y.shape).to(y.dtype),
    "argmax": lambda z, y: z.argmax(1),
    "integers": lambda z, y: z.int(),
    "nothing that is a tensor": lambda z, y: (None, "text", 3, z.mean().item(), {1}, y.dtype),
    "an array": lambda z, y: [z.numpy()],
    "an object": lambda z, y: SimpleNamespace(z=z, more=SimpleNamespace(nothing=None)),
    "nan": lambda z, y: (z * torch.nan, (z * torch.nan).sum().item()),
    "infinity": lambda z, y: z * torch.inf,
    "empty": lambda z, y: z[:0],
    "random": lambda z, y: nn.functional.dropout(z) + torch.rand(4),
}


@pytest.mark.parametrize("last", HARMLESS.values(), ids=HARMLESS.keys())
def test_whatever_the_model_gives_and_draws_it_folds(last):
    model = Graph(lambda m, x: (lambda y: last(m.norm(y), y))(m.conv(x)), conv=conv(), norm=bcn())
    state = torch.get_rng_state()
    assert type(fold(model, torch.randn(2, 4, 4, 4, generator=torch.Generator())).norm) is (
        ChannelNorm
    )
    assert torch.equal(torch.get_rng_state(), state)


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
