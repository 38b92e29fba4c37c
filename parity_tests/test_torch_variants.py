"""Each named variant computes what the published code of that name does."""

import doctest
import itertools
from functools import partial

import numpy as np
import pytest
import torch

import bcn_flax.variants
from bcn_torch import (
    VGG,
    BatchChannelNorm,
    Standardization,
    WSConv2d,
    WSLinear,
    standardize_weight,
    variants,
)
from bcn_torch.variants import BCN, WS
from parity_tests.published import (
    BATCH_CHANNEL_NORM,
    SPREADS,
    WEIGHT_STANDARDIZATION,
    AuthorsReadmeWithARate,
    C,
    G,
    weights,
)

pytestmark = pytest.mark.torch

EPS = np.finfo(np.float64).eps


every_ws = pytest.mark.parametrize("name", WEIGHT_STANDARDIZATION)


def ours(name, w, gain):
    """The library's result as a function of tensors."""
    return standardize_weight(w, WS[name], gain if WS[name].gain else None)


def test_every_row_of_the_published_codes_has_a_name():
    assert [*WS] == [*WEIGHT_STANDARDIZATION]


@every_ws
@pytest.mark.parametrize("fan_in", [2, 12, 300])
def test_weights_are_standardized_as_in_the_published_code(name, fan_in):
    w, gain = weights(fan_in)
    result = ours(name, *map(torch.from_numpy, (w, gain)))
    expected = WEIGHT_STANDARDIZATION[name](w, gain)
    # A row of the spread s around a mean of 0.1 loses the ratio to the subtraction of the mean.
    for row, judge, spread in zip(result.numpy(), expected, SPREADS, strict=True):
        rounding = 32 * EPS * (1 + 0.1 / spread) * max(1, abs(judge).max())
        np.testing.assert_allclose(row, judge, rtol=0, atol=rounding)


@every_ws
def test_gradients_are_the_finite_differences_of_the_published_code(name):
    w, gain = weights()
    cotangent = np.random.default_rng(1).normal(size=w.shape)
    leaves = [torch.from_numpy(a).requires_grad_() for a in (w, gain)]
    (ours(name, *leaves) * torch.from_numpy(cotangent)).sum().backward()

    def loss(w, gain):
        return (WEIGHT_STANDARDIZATION[name](w, gain) * cotangent).sum()

    for i, j in itertools.product(range(w.shape[0]), range(w.shape[1])):
        # A step that is small beside the row's spread, for what curves on that scale.
        step = np.zeros_like(w)
        step[i, j] = 1e-4 * SPREADS[i]
        difference = (loss(w + step, gain) - loss(w - step, gain)) / (2 * step[i, j])
        size = leaves[0].grad[i].abs().max().item()
        # The step cuts off a part of 1e-8; what it leaves of the loss is rounded.
        atol = 1e-6 * size + 64 * EPS * (1 + 0.1 / SPREADS[i]) * w.size / step[i, j]
        assert leaves[0].grad[i, j].item() == pytest.approx(difference, rel=0, abs=atol)
    if WS[name].gain:
        for i in range(len(gain)):
            step = np.zeros_like(gain)
            step[i] = 0.1  # in the gain it is linear
            difference = (loss(w, gain + step) - loss(w, gain - step)) / 0.2
            assert leaves[1].grad[i].item() == pytest.approx(difference, rel=1e-9, abs=1e-9)


def test_no_two_names_mean_the_same():
    w, gain = weights()
    results = {name: published(w, gain) for name, published in WEIGHT_STANDARDIZATION.items()}
    for a, b in itertools.combinations(results, 2):
        assert abs(results[a] - results[b]).max() > 1e-3, (a, b)


@every_ws
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_kernel_becomes_0_with_a_finite_gradient(name, dtype):
    # 0.3 is no binary number, so the mean of several may be off by a rounding.
    for value, fan_in in [(0.5, 4), (0.0, 3), (0.3, 7), (0.1, 27)]:
        w = torch.full((2, fan_in), value, dtype=dtype, requires_grad=True)
        result = ours(name, w, torch.ones(2, dtype=dtype))
        (result * torch.arange(fan_in)).sum().backward()
        # A rounding, over the smallest divisor of all: sqrt(1e-10), or sqrt(1e-6) / sqrt(27).
        assert result.abs().max() <= torch.finfo(dtype).eps / 1e-5
        assert w.grad.isfinite().all()


def test_beside_a_constant_kernel_the_derivative_of_the_root_counts_as_0():
    w = torch.full((1, 4), 0.5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    (standardize_weight(w, WS["authors_pytorch"]) * cotangent).sum().backward()
    # (w - mean) / eps, whose gradient is the cotangent less its mean, over eps
    expected = (cotangent - cotangent.mean()) / 1e-5
    torch.testing.assert_close(w.grad, expected, rtol=8 * EPS, atol=0)


@every_ws
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_first_and_second_derivatives_are_consistent(name, check):
    w = torch.from_numpy(weights(4)[0][:2]).requires_grad_()
    gain = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=WS[name].gain)
    assert check(lambda w, gain: ours(name, w, gain), (w, gain))


@pytest.mark.parametrize("eps_role", ["added_to_variance", "added_to_deviation", "least_variance"])
@pytest.mark.parametrize("fan_in_scaling", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_every_combination_follows_its_equation(eps_role, fan_in_scaling, unbiased):
    w, gain = weights()
    how = Standardization(unbiased, 1e-3, eps_role, fan_in_scaling, gain=True, gamma=1.7)
    result = standardize_weight(torch.from_numpy(w), how, torch.from_numpy(gain)).numpy()
    s = w.shape[1] if fan_in_scaling else 1
    for row, out, factor, spread in zip(w, result, gain, SPREADS, strict=True):
        var = row.var(ddof=int(unbiased))
        divisor = {
            "added_to_variance": np.sqrt(s * (var + 1e-3)),
            "added_to_deviation": np.sqrt(s) * (np.sqrt(var) + 1e-3),
            "least_variance": np.sqrt(max(s * var, 1e-3)),
        }[eps_role]
        expected = 1.7 * factor * (row - row.mean()) / divisor
        np.testing.assert_allclose(out, expected, rtol=0, atol=64 * EPS * (1 + 0.1 / spread))


def test_a_layer_learns_its_gain_and_starts_from_1():
    torch.manual_seed(0)
    layer = WSConv2d(2, 3, 3, standardization=WS["nfnet"]).double()
    assert torch.equal(layer.gain, torch.ones(3, dtype=torch.float64))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    ones = layer(x)
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([2.0, 3.0, -1.0]))
        layer.bias.zero_()
    y, factors = layer(x), layer.gain.detach().view(1, 3, 1, 1)
    plain = torch.nn.functional.conv2d(x, standardize_weight(layer.weight, WS["nfnet"], layer.gain))
    assert torch.equal(y, plain)
    assert not torch.equal(y, ones)
    y.pow(3).sum().backward()
    # y is proportional to each gain.
    expected = (3 * y.detach() ** 3 / factors).sum((0, 2, 3))
    torch.testing.assert_close(layer.gain.grad, expected, rtol=1e-12, atol=0)
    layer.reset_parameters()
    assert torch.equal(layer.gain, torch.ones(3, dtype=torch.float64))


def test_a_layer_without_gain_has_the_parameters_of_pytorchs():
    assert [*WSLinear(3, 4, standardization=WS["bit"]).state_dict()] == ["weight", "bias"]
    assert [*WSLinear(3, 4, standardization=WS["nfnet"]).state_dict()] == ["weight", "bias", "gain"]
    assert WSLinear(3, 4).gain is None


@every_ws
def test_half_precision_is_the_float32_result_rounded_once(name):
    w, gain = (torch.from_numpy(a).bfloat16() for a in weights())
    expected = ours(name, w.float(), gain.float()).bfloat16()
    assert torch.equal(ours(name, w, gain), expected)


CODES = {name: (BCN[name], code) for name, code in BATCH_CHANNEL_NORM.items()}
CODES["authors_readme, momentum 0.2"] = (
    {**BCN["authors_readme"], "momentum": 0.2},
    AuthorsReadmeWithARate,
)


@pytest.mark.parametrize(("arguments", "published"), CODES.values(), ids=CODES.keys())
def test_batch_channel_norm_computes_what_the_published_code_does(arguments, published):
    rng = np.random.default_rng(0)
    layer = BatchChannelNorm(C, G, **arguments).double()
    values = [rng.uniform(0.5, 1.5, len(p)) for p in layer.parameters()]
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(torch.from_numpy(value))
    code = published(*values)
    for training in [True, True, True, False, True, False]:
        x = rng.normal(2, 3, (3, C, 4, 2))
        layer.train(training)
        y = layer(torch.from_numpy(x)).detach().numpy()
        # Sums of 24 values up to 12, whose squares the annotated code subtracts from each other.
        np.testing.assert_allclose(y, code(x, training), rtol=0, atol=1e3 * EPS * 12**2)
        for stored, judge in [
            (layer.batch_norm.exp_mean, code.exp_mean),
            (layer.batch_norm.exp_var, code.exp_var),
        ]:
            np.testing.assert_allclose(stored, judge, rtol=0, atol=1e3 * EPS * 12**2)


def test_the_authors_readme_as_published_never_moves_its_estimates():
    layer = BatchChannelNorm(C, G, **BCN["authors_readme"])
    for _ in range(3):
        layer(torch.randn(4, C, 3) + 5)
    assert torch.equal(layer.batch_norm.exp_mean, torch.zeros(C))
    assert torch.equal(layer.batch_norm.exp_var, torch.ones(C))


def test_the_annotated_names_are_the_defaults():
    plain = BatchChannelNorm(C, G)
    named = BatchChannelNorm(C, G, **BCN["annotated"])
    assert repr(named) == repr(plain)
    assert WS["annotated"] == Standardization() == WSConv2d(3, 4, 3).standardization


@pytest.mark.parametrize("name", BCN)
def test_a_network_takes_the_names_too(name):
    model = VGG(
        ((8,), (8,)),
        norm=partial(BatchChannelNorm, groups=2, **BCN[name]),
        conv=partial(WSConv2d, standardization=WS["timm_scaled"]),
    )
    norms = [m for m in model.modules() if isinstance(m, BatchChannelNorm)]
    assert [repr(norm) for norm in norms] == [repr(BatchChannelNorm(8, 2, **BCN[name]))] * 2
    convolutions = [m for m in model.modules() if isinstance(m, WSConv2d)]
    assert [conv.standardization for conv in convolutions] == [WS["timm_scaled"]] * 2


def test_the_names_mean_the_same_in_flax():
    assert [(name, tuple(how)) for name, how in WS.items()] == [
        (name, tuple(how)) for name, how in bcn_flax.variants.WS.items()
    ]
    flax_words = {"eps": "epsilon", "batch_eps": "batch_epsilon"}
    for name, arguments in BCN.items():
        renamed = {flax_words.get(word, word): value for word, value in arguments.items()}
        renamed["momentum"] = 1 - renamed["momentum"]
        assert renamed == bcn_flax.variants.BCN[name]


def test_nobody_can_change_what_a_name_means():
    for mapping in (BCN, WS, BCN["annotated"]):
        with pytest.raises(TypeError):
            mapping["annotated"] = None
    with pytest.raises(AttributeError):
        WS["annotated"].eps = 1.0


def test_the_examples_run():
    results = doctest.testmod(variants)
    assert results.attempted > 0
    assert results.failed == 0
