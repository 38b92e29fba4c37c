"""The PyTorch layers work with checkpointing, compilation, copies, `torch.func` and autocast."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bcn_torch import VGG, BatchChannelNorm, WSConv2d, frozen_statistics

pytestmark = pytest.mark.torch

estimate_or_batch = pytest.mark.parametrize("estimate", [True, False], ids=["estimate", "batch"])


def network(estimate: bool) -> nn.Sequential:
    """Two convolutions with norms, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(3, 8, 3, padding=1),
        BatchChannelNorm(8, 4, estimate=estimate),
        nn.ReLU(),
        WSConv2d(8, 6, 3, padding=1),
        BatchChannelNorm(6, 2, estimate=estimate),
    ).double()


def images(batch: int = 2, seed: int = 1) -> torch.Tensor:
    """A batch for the network."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 6, 6, generator=generator, dtype=torch.float64)


def train(model, forward, steps=3):
    """Return the outputs, gradients and state of a few steps of training."""
    record = []
    for step in range(steps):
        x = images(seed=step).requires_grad_()
        y = forward(x)
        gradients = torch.autograd.grad(y.pow(3).sum(), [x, *model.parameters()])
        record.append((y, gradients, copy.deepcopy(model.state_dict())))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients[1:], strict=True):
                parameter -= 1e-3 * gradient
    return record


def assert_same(actual, expected):
    """Compare everything that `train` returns, bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_same_but_for_rounding(actual, expected):
    """Compare sums of 72 values, a channel of two images of 6x6, added in another order.

    Each value, no larger than the largest result, is rounded once before and once in the sum.
    """
    flat_actual, flat_expected = tree_leaves(actual), tree_leaves(expected)
    for value, wanted in zip(flat_actual, flat_expected, strict=True):
        size = 1 + wanted.abs().max().item()
        atol = 2 * 72 * torch.finfo(torch.float64).eps * size
        torch.testing.assert_close(value, wanted, rtol=0, atol=atol)


# Gradient checkpointing.


def checkpointed(model, context_fn):
    """The forward pass of `model` in two checkpointed segments."""

    def forward(x):
        for segment in (model[:3], model[3:]):
            x = checkpoint(segment, x, use_reentrant=False, context_fn=context_fn)
        return x

    return forward


@estimate_or_batch
def test_with_frozen_statistics_gradient_checkpointing_changes_nothing_at_all(estimate):
    plain, model = network(estimate), network(estimate)
    forward = checkpointed(model, lambda: (nullcontext(), frozen_statistics(model)))
    assert_same(train(model, forward), train(plain, plain))


@estimate_or_batch
def test_without_frozen_statistics_gradient_checkpointing_moves_them_twice(estimate):
    once, twice, model = (network(estimate) for _ in range(3))
    train(once, once, steps=1)
    # The gradients run the segments again, without a step of the optimizer in between.
    x = images(seed=0).requires_grad_()
    forward = checkpointed(model, lambda: (nullcontext(), nullcontext()))
    torch.autograd.grad(forward(x).pow(3).sum(), x)
    twice[1](twice[0](x))
    twice[1](twice[0](x))
    assert torch.equal(model[1].batch_norm.exp_mean, twice[1].batch_norm.exp_mean)
    assert not torch.equal(model[1].batch_norm.exp_mean, once[1].batch_norm.exp_mean)


# Compilation.

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


# PyTorch's own inductor uses what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@estimate_or_batch
def test_compiled_into_one_graph_it_trains_and_collects_statistics_as_before(estimate, backend):
    torch._dynamo.reset()
    plain, model = network(estimate)[:3], network(estimate)[:3]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same_but_for_rounding(train(model, compiled, steps=2), train(plain, plain, steps=2))

    before = copy.deepcopy(model.state_dict())
    with frozen_statistics(model), frozen_statistics(plain):
        assert_same_but_for_rounding(compiled(images(5)), plain(images(5)))
    assert_same_but_for_rounding(compiled.eval()(images(5)), plain.eval()(images(5)))
    assert_same(model.state_dict(), before)


@estimate_or_batch
def test_compiled_a_single_value_per_channel_neither_warns_nor_breaks_the_graph(estimate):
    torch._dynamo.reset()
    layer = BatchChannelNorm(8, 4, estimate=estimate)
    assert torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(1, 8)).shape == (
        1,
        8,
    )


def test_vgg_compiles_into_one_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VGG(((8,), (8,)), norm=partial(BatchChannelNorm, groups=4)).double().eval()
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_but_for_rounding(compiled(x), model(x))


# Copies, functional calls, autocast.


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
@estimate_or_batch
def test_a_copy_trains_on_like_the_original_and_shares_nothing_with_it(estimate, duplicate):
    model = network(estimate)
    model(images())
    copied = duplicate(model)
    expected = train(model, model)
    assert_same(train(copied, copied), expected)


@estimate_or_batch
def test_a_functional_call_updates_the_statistics_it_is_given_and_no_others(estimate):
    model, reference = network(estimate), network(estimate)
    state = copy.deepcopy(model.state_dict())
    y = torch.func.functional_call(model, state, images())
    assert_same(y, reference(images()))
    assert_same(state, dict(reference.state_dict()))
    assert_same(model.state_dict(), network(estimate).state_dict())


@estimate_or_batch
def test_function_transforms_differentiate_frozen_and_evaluated_layers(estimate):
    model = network(estimate)
    model(images())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, x[None]).pow(3).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    for training in (True, False):
        model.train(training)
        with frozen_statistics(model):
            transformed = per_sample(parameters, images())
            for i, x in enumerate(images()):
                y = model(x[None]).pow(3).sum()
                expected = torch.autograd.grad(y, list(model.parameters()))
                actual = [gradient[i] for gradient in transformed.values()]
                assert_same_but_for_rounding(actual, list(expected))


@estimate_or_batch
def test_under_autocast_norms_compute_in_float32_from_what_the_convolution_hands_them(estimate):
    model, norm = network(estimate).float(), network(estimate)[1].float()
    with torch.autocast("cpu", torch.bfloat16):
        middle = model[0](images().float())
        y = model[1](middle)
    assert middle.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, norm(middle))
    assert_same(model[1].state_dict(), norm.state_dict())
    assert norm.batch_norm.exp_mean.dtype == torch.float32


@estimate_or_batch
def test_statistics_are_collected_without_gradients_and_in_inference_mode_too(estimate):
    models = [network(estimate) for _ in range(3)]
    for model, mode in zip(models, (nullcontext, torch.no_grad, torch.inference_mode), strict=True):
        with mode():
            model(images())
    for model in models[1:]:
        assert_same(model.state_dict(), models[0].state_dict())
        assert_same(model(images()), copy.deepcopy(models[0])(images()))
