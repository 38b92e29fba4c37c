"""The PyTorch norms compute what the equations say, in every dtype, rank and memory layout."""

import copy
import io
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from bcn_torch import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    frozen_statistics,
)
from parity_tests import torch_layers

pytestmark = pytest.mark.torch

C, G = 6, 3
SHAPES = [(5, C), (3, C, 7), (2, C, 4, 3), (2, C, 3, 2, 3)]
NORMS = {
    "batch": lambda: BatchNorm(C),
    "estimated": lambda: EstimatedBatchNorm(C),
    "channel": lambda: ChannelNorm(C, G),
    "bcn": lambda: BatchChannelNorm(C, G),
    "bcn-batch": lambda: BatchChannelNorm(C, G, estimate=False),
}
every_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS.keys())
estimate_or_batch = pytest.mark.parametrize("estimate", [True, False], ids=["estimate", "batch"])


# The default dtype of a layer.
rand = partial(torch_layers.rand, dtype=torch.float32)


def randomize(module: nn.Module, seed: int = 1) -> nn.Module:
    """Give every parameter its own value, so that exchanged parameters are noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return module


def tolerance(dtype: torch.dtype, size: float) -> dict[str, float]:
    """The rounding of a sum of a few dozen values and ten operations on numbers up to `size`."""
    return {"rtol": 0.0, "atol": 32 * torch.finfo(dtype).eps * (1 + size)}


# The equations, value by value, in float64 NumPy.


def batch_norm_oracle(x, scale, shift, running, *, momentum, eps, estimate, training):
    """Return the output and the running estimates after it."""
    y, new_mean, new_var = np.empty_like(x), running[0].copy(), running[1].copy()
    for c in range(x.shape[1]):
        values = x[:, c].ravel()
        mean = sum(values) / len(values)
        var = sum((values - mean) ** 2) / len(values)
        if training:
            new_mean[c] = (1 - momentum) * running[0][c] + momentum * mean
            new_var[c] = (1 - momentum) * running[1][c] + momentum * var
        if estimate or not training:
            mean, var = new_mean[c], new_var[c]
        y[:, c] = scale[c] * (x[:, c] - mean) / np.sqrt(var + eps) + shift[c]
    return y, (new_mean, new_var)


def channel_norm_oracle(x, scale, shift, *, eps):
    """Return the output."""
    y, size = np.empty_like(x), x.shape[1] // len(scale)
    for n in range(x.shape[0]):
        for g in range(len(scale)):
            group = slice(g * size, (g + 1) * size)
            values = x[n, group].ravel()
            mean = sum(values) / len(values)
            var = sum((values - mean) ** 2) / len(values)
            y[n, group] = scale[g] * (x[n, group] - mean) / np.sqrt(var + eps) + shift[g]
    return y


@estimate_or_batch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_channel_norm_follows_its_equations_through_training_and_evaluation(
    shape, dtype, estimate
):
    momentum, eps = 0.3, 1e-3
    layer = randomize(BatchChannelNorm(C, G, eps, momentum, estimate)).to(dtype)
    scale, shift, group_scale, group_shift = (
        p.detach().double().numpy()
        for p in (
            layer.batch_norm.scale,
            layer.batch_norm.shift,
            layer.channel_norm.scale,
            layer.channel_norm.shift,
        )
    )
    running = (np.zeros(C), np.ones(C))
    for step, training in enumerate([True, True, True, False, True, False]):
        x = rand(*shape, seed=step, dtype=dtype)
        layer.train(training)
        y = layer(x)
        middle, running = batch_norm_oracle(
            x.double().numpy(), scale, shift, running,
            momentum=momentum, eps=eps, estimate=estimate, training=training,
        )  # fmt: skip
        expected = torch.from_numpy(channel_norm_oracle(middle, group_scale, group_shift, eps=eps))
        # The channel norm divides the errors of `middle` by the spread of a group, at least 0.3.
        size = abs(middle).max() / 0.3
        torch.testing.assert_close(y.double(), expected, **tolerance(dtype, size))
        for stored, exact in zip(
            (layer.batch_norm.exp_mean, layer.batch_norm.exp_var), running, strict=True
        ):
            torch.testing.assert_close(
                stored.double(), torch.from_numpy(exact), **tolerance(dtype, abs(exact).max())
            )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [BatchNorm, EstimatedBatchNorm])
def test_a_batch_norm_without_affine_has_no_parameters_and_only_standardizes(make, training):
    layer = make(C, affine=False).double().train(training)
    x = rand(4, C, 5, dtype=torch.float64)
    expected, _ = batch_norm_oracle(
        x.numpy(), np.ones(C), np.zeros(C), (np.zeros(C), np.ones(C)),
        momentum=0.1, eps=1e-5, estimate=make is EstimatedBatchNorm, training=training,
    )  # fmt: skip
    assert list(layer.state_dict()) == ["exp_mean", "exp_var"]
    torch.testing.assert_close(
        layer(x), torch.from_numpy(expected), **tolerance(torch.float64, abs(expected).max())
    )


def test_a_channel_norm_without_affine_has_no_parameters_and_is_pytorchs_group_norm():
    layer, x = ChannelNorm(C, G, affine=False), rand(4, C, 5, dtype=torch.float64)
    assert not layer.state_dict()
    torch.testing.assert_close(
        layer(x), nn.functional.group_norm(x, G), **tolerance(torch.float64, 4)
    )


def test_batch_norm_agrees_with_pytorchs_except_for_the_unbiased_running_variance():
    x = rand(4, C, 5, 5, dtype=torch.float64)
    ours, theirs = BatchNorm(C).double(), nn.BatchNorm2d(C).double()
    torch.testing.assert_close(ours(x), theirs(x), **tolerance(torch.float64, 4))
    torch.testing.assert_close(ours.exp_mean, theirs.running_mean, **tolerance(torch.float64, C))
    n = 4 * 5 * 5
    torch.testing.assert_close(
        ours.exp_var - 0.9,
        (theirs.running_var - 0.9) * (n - 1) / n,
        **tolerance(torch.float64, C**2),
    )


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_is_the_weight_of_the_new_value(momentum):
    layer, x = BatchNorm(C, momentum=momentum), rand(4, C, 5)
    layer(x)
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    expected = (mean, var) if momentum else (torch.zeros(C), torch.ones(C))
    torch.testing.assert_close(
        (layer.exp_mean, layer.exp_var), expected, **tolerance(torch.float32, C**2)
    )


def test_a_large_mean_does_not_drown_the_variance():
    # mean/std is 1e4: in float32, E[x^2] - E[x]^2 would be off by more than the variance itself.
    x = (1e4 + rand(8, C, 16, 16, dtype=torch.float64) / 8).float()
    expected, _ = batch_norm_oracle(
        x.double().numpy(), np.ones(C), np.zeros(C), (np.zeros(C), np.ones(C)),
        momentum=0.1, eps=1e-5, estimate=False, training=True,
    )  # fmt: skip
    ratio = (x.mean((0, 2, 3)) / x.std((0, 2, 3))).max().item()
    torch.testing.assert_close(
        BatchNorm(C)(x).double(), torch.from_numpy(expected), **tolerance(torch.float32, ratio)
    )


# State dict.


@estimate_or_batch
def test_the_state_dict_has_the_annotated_implementations_names_and_shapes(estimate):
    state = BatchChannelNorm(C, G, estimate=estimate).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "batch_norm.scale": (C,),
        "batch_norm.shift": (C,),
        "batch_norm.exp_mean": (C,),
        "batch_norm.exp_var": (C,),
        "channel_norm.scale": (G,),
        "channel_norm.shift": (G,),
    }
    for name, value in state.items():
        start = 1.0 if name.endswith(("scale", "var")) else 0.0
        assert torch.equal(value, torch.full_like(value, start)), name


@estimate_or_batch
def test_a_checkpoint_round_trips_through_a_file_and_resumes_exactly(estimate):
    layer = randomize(BatchChannelNorm(C, G, estimate=estimate))
    layer(rand(3, C, 5))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    resumed = BatchChannelNorm(C, G, estimate=estimate)
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for training in (True, False):
        x = rand(3, C, 5, seed=1)
        assert torch.equal(layer.train(training)(x), resumed.train(training)(x))
    torch.testing.assert_close(resumed.state_dict(), layer.state_dict(), rtol=0, atol=0)


# Dtypes and memory layouts.


@every_norm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("half_parameters", [False, True])
def test_half_precision_is_the_float32_result_rounded_once(make, dtype, half_parameters):
    half, full = (randomize(make()) for _ in range(2))
    if half_parameters:
        half, full = half.to(dtype), full.to(dtype).float()
    x = rand(3, C, 5, dtype=dtype)
    y = half(x)
    assert y.dtype == dtype
    assert torch.equal(y, full(x.float()).to(dtype))


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_result_is_of_the_inputs_dtype_whatever_the_parameters(make, dtype):
    assert make().double()(rand(3, C, 5, dtype=dtype)).dtype == dtype


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def strided(x):
    return x.repeat_interleave(2, dim=1)[:, ::2]


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def expanded(x):
    return x[:1].expand(x.shape)


@every_norm
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [transposed, strided, channels_last, expanded])
def test_the_memory_layout_changes_nothing_but_the_order_of_summation(make, shape, layout):
    x = layout(rand(*shape, dtype=torch.float64))
    cotangent = rand(*shape, seed=1, dtype=torch.float64)
    results = []
    for value in (x, x.contiguous()):
        layer, value = randomize(make()).double(), value.detach().requires_grad_()
        y = layer(value)
        results.append([y, *torch.autograd.grad(y, [value, *layer.parameters()], cotangent)])
        results[-1] += layer.buffers()
    torch.testing.assert_close(*results, **tolerance(torch.float64, 100))


@every_norm
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, C, 4, 3), torch.channels_last), ((2, C, 3, 2, 3), torch.channels_last_3d)],
    ids=["2d", "3d"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_goes_in_and_comes_out_forward_and_backward(
    make, shape, memory_format, dtype
):
    x = rand(*shape, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    y = make()(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)


HALVE = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "double-then-half": lambda m: m.double().half(),
    "copied": lambda m: copy.deepcopy(m.half()),
    "there-and-back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("halve", HALVE.values(), ids=HALVE.keys())
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["bare", "nested"])
def test_no_conversion_of_a_module_rounds_its_statistics(halve, wrap):
    layer = wrap(BatchChannelNorm(C, G))
    layer(rand(3, C, 5))
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer = halve(layer)
    for name, value in layer.named_buffers():
        assert torch.finfo(value.dtype).bits >= 32
        assert torch.equal(value, before[name].to(value.dtype)), name
    assert len(before) == 2


def test_a_module_in_half_precision_goes_on_collecting_statistics_in_float32():
    half, full = BatchNorm(C).bfloat16(), BatchNorm(C)
    x = rand(3, C, 5, dtype=torch.bfloat16)
    half(x), full(x.float())
    assert half.scale.dtype == torch.bfloat16
    assert half.exp_mean.dtype == half.exp_var.dtype == torch.float32
    assert torch.equal(half.exp_mean, full.exp_mean)
    assert torch.equal(half.exp_var, full.exp_var)


def test_statistics_widen_with_double_and_move_with_the_device():
    layer = BatchNorm(C).double()
    assert layer.exp_mean.dtype == layer.exp_var.dtype == torch.float64
    layer = layer.to("meta", torch.bfloat16)
    assert layer.exp_mean.is_meta
    assert layer.exp_mean.dtype == torch.float64
    assert layer(torch.empty(3, C, 5, device="meta")).shape == (3, C, 5)
    assert layer.to_empty(device="cpu").exp_var.device.type == "cpu"


def test_statistics_are_float32_where_half_precision_is_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = BatchNorm(C)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.scale.dtype == torch.bfloat16
    assert layer.exp_mean.dtype == layer.exp_var.dtype == torch.float32


# Gradients.


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("training", [True, False])
@every_norm
def test_first_and_second_derivatives_are_those_of_finite_differences(make, training, check):
    layer = randomize(make()).double().train(training)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        # Without freezing, every call would update the estimates and so change the function.
        with frozen_statistics(layer):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = rand(2, C, 2, dtype=torch.float64).requires_grad_()
    assert check(call, (x, *layer.parameters()))


@pytest.mark.parametrize("channel_norm", [False, True])
def test_no_gradient_flows_through_the_estimates(channel_norm):
    layer = randomize(BatchChannelNorm(C, G) if channel_norm else EstimatedBatchNorm(C)).double()
    x = rand(3, C, 5, dtype=torch.float64).requires_grad_()
    cotangent = rand(3, C, 5, seed=1, dtype=torch.float64)
    (training,) = torch.autograd.grad(layer(x), x, cotangent)
    # Evaluation sees the same, updated, estimates as constants.
    (evaluation,) = torch.autograd.grad(layer.eval()(x), x, cotangent)
    assert torch.equal(training, evaluation)


@estimate_or_batch
def test_a_later_forward_pass_leaves_the_backward_pass_of_an_earlier_one_alone(estimate):
    def gradients(backward_at_once):
        layer = BatchChannelNorm(C, G, estimate=estimate)
        xs = [rand(3, C, 5, seed=i).requires_grad_() for i in range(3)]
        losses = []
        for i, x in enumerate(xs):
            losses.append((layer(x) * rand(3, C, 5, seed=i + 7)).sum())
            if backward_at_once:
                losses.pop().backward()
        if losses:
            sum(losses).backward()
        return [x.grad for x in xs]

    for together, apart in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(together, apart)


class Leaky(BatchNorm):
    """Keep the graph through the running mean."""

    def _update(self, x, mean, var):
        self.exp_mean = 0.9 * self.exp_mean + 0.1 * mean.flatten()


@pytest.mark.parametrize(
    ("make", "leaks"),
    [(BatchNorm, False), (EstimatedBatchNorm, False), (Leaky, True)],
)
def test_the_statistics_keep_no_graph_and_no_activation_alive(make, leaks):
    layer = make(C)
    x = rand(3, C, 5).requires_grad_()
    alive = weakref.ref(x)
    layer(x)
    del x
    assert (alive() is not None) == leaks
    assert layer.exp_mean.requires_grad == leaks
    assert (layer.exp_mean.grad_fn is not None) == leaks


# Statistics: where they live, and when they move.


@pytest.mark.parametrize("make", [BatchNorm, EstimatedBatchNorm])
def test_statistics_move_in_place_in_training_only(make):
    layer, x = make(C), rand(3, C, 5)
    buffers = dict(layer.named_buffers())
    layer(x)
    assert all(buffers[name] is value for name, value in layer.named_buffers())
    moved = {name: value.clone() for name, value in buffers.items()}
    assert not torch.equal(moved["exp_mean"], torch.zeros(C))
    layer.eval()(x + 1)
    torch.testing.assert_close(dict(layer.named_buffers()), moved, rtol=0, atol=0)


@every_norm
def test_frozen_statistics_stay_in_training_and_move_again_afterwards(make):
    model = nn.Sequential(make())
    x = rand(3, C, 5)
    model(x)
    before = copy.deepcopy(model.state_dict())
    with frozen_statistics(model):
        with frozen_statistics(model[0]):
            model(x + 1)
        model(x + 1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), frozen_statistics(model):
        raise ZeroDivisionError
    model(x + 1)
    for name, value in model.named_buffers():
        assert not torch.equal(value, before[name])


@pytest.mark.parametrize("make", [BatchNorm, EstimatedBatchNorm])
def test_frozen_in_training_only_the_estimated_norm_normalizes_by_the_estimates(make):
    layer, x = make(C), rand(3, C, 5)
    layer(x)
    with frozen_statistics(layer):
        y = layer(x + 1)
    by_estimates = torch.equal(y, layer.eval()(x + 1))
    assert by_estimates == (make is EstimatedBatchNorm)


def test_the_printed_layer_shows_the_arguments_of_its_constructor():
    assert repr(BatchChannelNorm(C, G)) == (
        "BatchChannelNorm(\n"
        "  (batch_norm): EstimatedBatchNorm(6, eps=1e-05, momentum=0.1, affine=True, "
        "running_variance='biased', update_stats=None)\n"
        "  (channel_norm): ChannelNorm(6, groups=3, eps=1e-05, affine=True)\n"
        ")"
    )
