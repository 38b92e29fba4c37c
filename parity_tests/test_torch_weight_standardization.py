"""Weight standardization in PyTorch: what it computes, and its layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bcn_torch import Standardization, WSConv1d, WSConv2d, WSConv3d, WSLinear, standardize_weight

pytestmark = pytest.mark.torch

LAYERS = {
    "linear": (WSLinear, nn.Linear, (4, 6), {}, (2, 4)),
    "linear-no-bias": (WSLinear, nn.Linear, (4, 6), {"bias": False}, (2, 3, 4)),
    "1d": (WSConv1d, nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9)),
    "2d": (WSConv2d, nn.Conv2d, (4, 6, 3), {"padding": "same", "bias": False}, (2, 4, 5, 5)),
    "2d-unbatched": (WSConv2d, nn.Conv2d, (4, 6, 3), {}, (4, 5, 5)),
    "2d-grouped": (WSConv2d, nn.Conv2d, (4, 6, (3, 1)), {"groups": 2}, (2, 4, 5, 5)),
    "2d-depthwise": (WSConv2d, nn.Conv2d, (4, 4, 3), {"groups": 4, "dilation": 2}, (2, 4, 7, 7)),
    "2d-circular": (
        WSConv2d,
        nn.Conv2d,
        (4, 6, 3),
        {"padding": 1, "padding_mode": "circular"},
        (2, 4, 5, 5),
    ),
    "2d-same-reflect": (
        WSConv2d,
        nn.Conv2d,
        (4, 6, 3),
        {"padding": "same", "padding_mode": "reflect", "dilation": 2},
        (2, 4, 7, 7),
    ),
    "3d": (WSConv3d, nn.Conv3d, (4, 6, 2), {"padding": "valid"}, (2, 4, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize(
    ("ours", "theirs", "args", "kwargs", "shape"), LAYERS.values(), ids=LAYERS.keys()
)


def weight(*shape, dtype=torch.float64, seed=0):
    """A weight far from standardized."""
    generator = torch.Generator().manual_seed(seed)
    return (0.3 + 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 2), (6, 50), (6, 4, 3), (6, 1, 3, 3), (6, 4, 3, 3, 2)])
def test_it_follows_its_equation(shape, dtype):
    w, eps = weight(*shape, dtype=dtype), 1e-3
    result = standardize_weight(w, Standardization(eps=eps))
    assert result.dtype == dtype
    for channel, standardized in zip(w.double().numpy(), result.double(), strict=True):
        n = channel.size
        mean = sum(channel.ravel()) / n
        var = sum((channel.ravel() - mean) ** 2) / (n - 1)
        expected = torch.from_numpy((channel - mean) / np.sqrt(var + eps))
        # Rounding errors of the mean, 0.3, grow as the spread, 0.05, is scaled to 1.
        atol = 32 * torch.finfo(dtype).eps * (1 + 0.3 / 0.05)
        torch.testing.assert_close(standardized, expected, rtol=0, atol=atol)


def test_each_output_channel_has_mean_0_and_unbiased_variance_1():
    w = weight(6, 4, 3, 3)
    var, mean = torch.var_mean(standardize_weight(w), (1, 2, 3), correction=1)
    raw_var = w.var((1, 2, 3), correction=1)
    atol = 32 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=atol)
    torch.testing.assert_close(var, raw_var / (raw_var + 1e-5), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    w = weight(6, 4, 3, 3, dtype=dtype)
    assert torch.equal(standardize_weight(w), standardize_weight(w.float()).to(dtype))


def test_a_constant_weight_gives_zeros_and_finite_gradients():
    w = torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True)
    standardize_weight(w).square().sum().backward()
    assert torch.equal(standardize_weight(w), torch.zeros(2, 3, dtype=torch.float64))
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_first_and_second_derivatives_are_those_of_finite_differences(check):
    assert check(standardize_weight, weight(2, 2, 3).requires_grad_())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_weight_keeps_its_memory_format(memory_format):
    w = weight(6, 4, 3, 3).to(memory_format=memory_format)
    assert standardize_weight(w).is_contiguous(memory_format=memory_format)


@every_layer
def test_a_layer_is_pytorchs_layer_with_a_standardized_weight(ours, theirs, args, kwargs, shape):
    layer, plain = ours(*args, **kwargs).double(), theirs(*args, **kwargs).double()
    plain.load_state_dict(layer.state_dict(), strict=True)
    assert isinstance(layer, theirs)
    plain.weight = nn.Parameter(standardize_weight(layer.weight).detach())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))


@every_layer
def test_the_parameter_stays_raw_and_learns_through_the_standardization(
    ours, theirs, args, kwargs, shape
):
    layer = ours(*args, **kwargs).double()
    raw = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer(x).pow(3).sum().backward()
    torch.testing.assert_close(layer.state_dict(), raw, rtol=0, atol=0)
    # The result does not change when a constant is added to the weights of an output channel.
    slope = layer.weight.grad.flatten(1).sum(1)
    size = layer.weight.grad.abs().max().item()
    atol = 32 * torch.finfo(torch.float64).eps * (1 + size) * layer.weight[0].numel()
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=atol)


def test_the_same_seed_draws_the_same_weights_as_pytorchs_layer():
    torch.manual_seed(0)
    ours = WSConv2d(3, 4, 3)
    torch.manual_seed(0)
    torch.testing.assert_close(ours.state_dict(), nn.Conv2d(3, 4, 3).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_weight_is_standardized_before_it_is_rounded(dtype):
    layer = WSConv2d(4, 6, 3)
    with torch.no_grad():
        layer.weight.copy_(weight(6, 4, 3, 3))
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)

    def convolve(w):
        return nn.functional.conv2d(x.bfloat16(), w, layer.bias.bfloat16())

    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, convolve(standardize_weight(layer.weight).bfloat16()))
    assert not torch.equal(y, convolve(standardize_weight(layer.weight.bfloat16())))


@every_layer
def test_half_precision_input_and_types_are_those_of_pytorchs_layer(
    ours, theirs, args, kwargs, shape
):
    """A layer in half precision standardizes wide and rounds once; types are never mixed."""
    layer, plain = ours(*args, **kwargs), theirs(*args, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(weight(*layer.weight.shape, dtype=torch.float32) + 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for made in (layer, plain):
        with pytest.raises(RuntimeError, match="type"):
            made(x)
    layer.bfloat16()
    plain.bfloat16().load_state_dict(layer.state_dict())
    plain.weight = nn.Parameter(standardize_weight(layer.weight.float()).bfloat16())
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, plain(x))


def test_a_gain_starts_at_1_in_the_type_of_the_weight_and_is_reset():
    layer = WSConv2d(4, 6, 3, standardization=Standardization(gain=True), dtype=torch.float64)
    assert layer.gain.dtype == torch.float64
    with torch.no_grad():
        layer.gain.fill_(3)
    layer.reset_parameters()
    assert torch.equal(layer.gain, torch.ones(6, dtype=torch.float64))


def test_a_gain_in_half_precision_is_multiplied_before_the_rounding():
    w, how = weight(6, 40, dtype=torch.bfloat16), Standardization(gain=True)
    gain = torch.linspace(0.3, 1.7, 6).bfloat16()
    once = standardize_weight(w.float(), how, gain.float()).bfloat16()
    assert torch.equal(standardize_weight(w, how, gain), once)
