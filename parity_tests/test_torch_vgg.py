"""The PyTorch VGG is the network of the annotated implementation."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from bcn_torch import VGG, BatchChannelNorm, BatchNorm, WSConv2d, standardize_weight

pytestmark = pytest.mark.torch

PUBLISHED = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
SMALL = ((8,), (16, 16))
NORMS = {
    "bcn": partial(BatchChannelNorm, groups=4),
    "bn": BatchNorm,
    "gn": partial(nn.GroupNorm, 4),
    "none": None,
}


def published_shapes():
    """Names and shapes in a checkpoint of the annotated implementation."""
    shapes, index, last = {}, 0, 3
    for block in PUBLISHED:
        for channels in block:
            shapes[f"layers.{index}.weight"] = (channels, last, 3, 3)
            shapes[f"layers.{index}.bias"] = (channels,)
            for name in ("scale", "shift", "exp_mean", "exp_var"):
                shapes[f"layers.{index + 1}.batch_norm.{name}"] = (channels,)
            for name in ("scale", "shift"):
                shapes[f"layers.{index + 1}.channel_norm.{name}"] = (32,)
            index, last = index + 3, channels  # convolution, norm, ReLU
        index += 1  # pool
    return {**shapes, "fc.weight": (10, 512), "fc.bias": (10,)}


def test_by_default_it_loads_a_checkpoint_of_the_annotated_implementation():
    with torch.device("meta"):
        model = VGG()
        checkpoint = {name: torch.empty(shape) for name, shape in published_shapes().items()}
    assert [*model.state_dict()] == [*checkpoint]
    model.load_state_dict(checkpoint, strict=True, assign=True)
    convolutions = 9 * sum(
        a * b for a, b in zip([3, *sum(PUBLISHED, ())], sum(PUBLISHED, ()), strict=False)
    )
    channels, norms = sum(sum(PUBLISHED, ())), 13
    # A bias, a scale and a shift for each channel; a scale and a shift for each group.
    parameters = convolutions + 3 * channels + 2 * 32 * norms + 512 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == parameters == 14_729_098


@pytest.mark.parametrize("conv", [WSConv2d, nn.Conv2d])
@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_and_kind_of_convolution_is_where_it_should_be(norm, conv):
    model = VGG(SMALL, conv=conv, norm=NORMS[norm])
    norms = [] if NORMS[norm] is None else [type(NORMS[norm](8))]
    unit = [conv, *norms, nn.ReLU]
    assert [type(layer) for layer in model.layers] == [
        *unit, nn.MaxPool2d, *unit, *unit, nn.MaxPool2d,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [4, 5, 8, 11])
def test_the_output_is_the_linear_map_of_the_mean_over_the_remaining_space(size):
    model = VGG(SMALL, in_channels=2, num_classes=7, norm=NORMS["bcn"]).eval()
    x = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(0))
    features = model.layers(x)
    assert features.shape == (3, 16, size // 4, size // 4)
    y = model(x)
    assert y.shape == (3, 7)
    assert torch.equal(y, model.fc(features.mean((2, 3))))
    if size // 4 == 1:
        assert torch.equal(y, model.fc(features.flatten(1)))


def plain(model, x):
    """The network as functions of its parameters; the norms are its own."""
    for layer in model.layers:
        if isinstance(layer, nn.Conv2d):
            standardized = isinstance(layer, WSConv2d)
            weight = standardize_weight(layer.weight) if standardized else layer.weight
            x = functional.conv2d(x, weight, layer.bias, padding=1)
        elif isinstance(layer, nn.MaxPool2d):
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        elif isinstance(layer, nn.ReLU):
            x = x.clamp(min=0)
        else:
            x = layer(x)
    return x.mean((2, 3)) @ model.fc.weight.T + model.fc.bias


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_it_equals_a_plain_implementation(norm, train):
    torch.manual_seed(0)
    conv = nn.Conv2d if norm == "none" else WSConv2d
    model = VGG(SMALL, num_classes=2, conv=conv, norm=NORMS[norm]).double().train(train)
    x, results = torch.randn(2, 3, 9, 8, dtype=torch.float64), []
    start = copy.deepcopy(model.state_dict())
    for run in model, partial(plain, model):
        model.load_state_dict(start)  # training has changed its statistics
        y = run(x)
        gradients = torch.autograd.grad(y[:, 0].sum(), [*model.parameters()])
        results.append((y, *gradients, *(b.clone() for b in model.buffers())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
