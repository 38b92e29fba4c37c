"""Each named variant computes, in every library, what the published code of its name does."""

import itertools
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bcn_flax
import bcn_flax.nnx
import bcn_flax.variants
from bcn_flax import Standardization, models, standardize_kernel
from bcn_flax.models import nnx as nnx_models
from bcn_flax.variants import BCN, WS
from parity_tests import published
from parity_tests.published import C, G, weights
from parity_tests.tolerances import assert_close

if find_spec("torch"):  # without it, what needs it is not run
    import torch

    import bcn_torch
    import bcn_torch.variants

needs_torch = pytest.mark.torch
EPS = np.finfo(np.float64).eps

# --- The libraries --------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def in_flax(hows, w, gain, cotangent):
    """Of weights `(out, fan_in)`, standardized in each way: result, gradients of w and gain."""

    def standardized(how, w, gain):
        return standardize_kernel(w.T, how, gain=gain if how.gain else None).T

    def seen(how):
        result, pullback = jax.vjp(partial(standardized, how), w, gain)
        return result, *pullback(cotangent)

    return [seen(how) for how in hows]


def in_torch(hows, *arrays):
    """The same in PyTorch."""

    def seen(how):
        w, gain, cotangent = (torch.from_numpy(np.array(a)).requires_grad_() for a in arrays)
        how = bcn_torch.Standardization(*how)
        result = bcn_torch.standardize_weight(w, how, gain if how.gain else None)
        result.backward(cotangent)
        return [a.numpy() for a in (result.detach(), w.grad, gain.grad) if a is not None]

    return [seen(how) for how in hows]


class Linen:
    """A batch-channel norm, trained and evaluated step by step; x is (n, c, h, w)."""

    def __init__(self, params, **arguments):
        self.layer = bcn_flax.BatchChannelNorm(num_groups=G, param_dtype=jnp.float64, **arguments)
        init = jax.jit(partial(self.layer.init, use_running_average=True))
        self.variables = init(jax.random.key(0), jnp.ones((1, 4, 2, C)))
        for (part, name), value in zip(LEARNED, params, strict=True):
            self.variables["params"][part][name] = jnp.asarray(value)

    def __call__(self, x, training):
        y, updates = self.layer.apply(
            self.variables,
            jnp.asarray(np.moveaxis(x, 1, -1)),
            use_running_average=not training,
            mutable=["batch_stats"],
        )
        self.variables = {**self.variables, **updates}
        return np.moveaxis(y, -1, 1)

    @property
    def statistics(self):
        stats = self.variables["batch_stats"]["batch_norm"]
        return stats["mean"], stats["var"]


class Nnx:
    """The same in NNX."""

    def __init__(self, params, **arguments):
        self.layer = bcn_flax.nnx.BatchChannelNorm(
            C, num_groups=G, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **arguments
        )
        for (part, name), value in zip(LEARNED, params, strict=True):
            getattr(getattr(self.layer, part), name)[...] = jnp.asarray(value)

    def __call__(self, x, training):
        y = self.layer(jnp.asarray(np.moveaxis(x, 1, -1)), use_running_average=not training)
        return np.moveaxis(y, -1, 1)

    @property
    def statistics(self):
        return self.layer.batch_norm.mean[...], self.layer.batch_norm.var[...]


class Torch:
    """The same in PyTorch, with its own names of the arguments."""

    def __init__(self, params, **arguments):
        self.layer = bcn_torch.BatchChannelNorm(C, G, **in_torchs_words(arguments)).double()
        with torch.no_grad():
            for parameter, value in zip(self.layer.parameters(), params, strict=True):
                parameter.copy_(torch.from_numpy(value))

    def __call__(self, x, training):
        return self.layer.train(training)(torch.from_numpy(x)).detach().numpy()

    @property
    def statistics(self):
        return self.layer.batch_norm.exp_mean, self.layer.batch_norm.exp_var


def in_torchs_words(arguments):
    words = {"epsilon": "eps", "batch_epsilon": "batch_eps"}
    renamed = {words.get(word, word): value for word, value in arguments.items()}
    return {**renamed, "momentum": 1 - renamed["momentum"]}


LEARNED = tuple(itertools.product(("batch_norm", "channel_norm"), ("scale", "bias")))
every_library = pytest.mark.parametrize(
    "library", [in_flax, pytest.param(in_torch, marks=needs_torch)]
)
every_api = pytest.mark.parametrize("api", [Linen, Nnx, pytest.param(Torch, marks=needs_torch)])

# --- Weight standardization -----------------------------------------------------------------------

ROLES = ("added_to_variance", "added_to_deviation", "least_variance")
COMBINATIONS = [
    Standardization(unbiased, 1e-3, role, fan_in_scaling, gain=True, gamma=1.7)
    for unbiased, role, fan_in_scaling in itertools.product((False, True), ROLES, (False, True))
]


def test_every_published_code_has_a_name():
    assert [*WS] == [*published.WEIGHT_STANDARDIZATION]
    assert [*BCN] == [*published.BATCH_CHANNEL_NORM]


def test_no_two_names_mean_the_same():
    w, gain = weights()
    results = {name: code(w, gain) for name, code in published.WEIGHT_STANDARDIZATION.items()}
    for a, b in itertools.combinations(results, 2):
        assert abs(results[a] - results[b]).max() > 1e-3, (a, b)


@every_library
@pytest.mark.parametrize("fan_in", [2, 12, 300])
def test_weights_are_standardized_as_in_the_published_code(x64, library, fan_in):
    w, gain = weights(fan_in)
    seen = library(tuple(WS.values()), w, gain, w)
    for (name, code), (result, *_) in zip(
        published.WEIGHT_STANDARDIZATION.items(), seen, strict=True
    ):
        # A row of the spread s around a mean of 0.1 loses the ratio to the subtraction of the mean.
        for row, expected, spread in zip(result, code(w, gain), published.SPREADS, strict=True):
            rounding = 32 * EPS * (1 + 0.1 / spread) * max(1, abs(expected).max())
            np.testing.assert_allclose(row, expected, rtol=0, atol=rounding, err_msg=name)


@every_library
def test_gradients_are_the_finite_differences_of_the_published_code(x64, library):
    w, gain = weights()
    cotangent = np.random.default_rng(1).normal(size=w.shape)
    seen = library(tuple(WS.values()), w, gain, cotangent)
    for (name, how), (_, in_w, *in_gain) in zip(WS.items(), jax.device_get(seen), strict=True):

        def loss(w, gain, code=published.WEIGHT_STANDARDIZATION[name]):
            return (code(w, gain) * cotangent).sum()

        for i, j in np.ndindex(w.shape):
            spread = published.SPREADS[i]
            # A step that is small beside the row's spread, for what curves on that scale.
            step = np.zeros_like(w)
            step[i, j] = 1e-4 * spread
            difference = (loss(w + step, gain) - loss(w - step, gain)) / (2 * step[i, j])
            # The step cuts off a part of 1e-8; what it leaves of the loss is rounded.
            rounding = 64 * EPS * (1 + 0.1 / spread) * w.size / step[i, j]
            atol = 1e-6 * np.abs(in_w[i]).max() + rounding
            assert in_w[i, j] == pytest.approx(difference, rel=0, abs=atol), name
        if how.gain:
            for i, step in enumerate(0.1 * np.eye(len(gain))):  # in the gain it is linear
                difference = (loss(w, gain + step) - loss(w, gain - step)) / 0.2
                assert in_gain[0][i] == pytest.approx(difference, rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize(
    ("library", "dtype"),
    [
        (in_flax, "float32"),
        *(pytest.param(in_torch, t, marks=needs_torch) for t in ("float32", "float64")),
    ],
)
def test_constant_weights_become_0_with_a_finite_gradient(x64, library, dtype):
    """0.3 and 0.1 are no binary numbers, so the mean of several may be off by a rounding."""
    for fan_in in (4, 27):
        w = np.repeat([[0.5], [0.0], [0.3], [0.1]], fan_in, axis=1).astype(dtype)
        cotangent = np.arange(w.size, dtype=dtype).reshape(w.shape)
        for result, in_w, *_ in library(tuple(WS.values()), w, np.ones(4, dtype), cotangent):
            # A rounding, over the smallest divisor of all: sqrt(1e-10), or sqrt(1e-6) / sqrt(27).
            assert np.abs(result).max() <= np.finfo(dtype).eps / 1e-5
            assert np.isfinite(in_w).all()


@every_library
def test_every_combination_follows_its_equation(x64, library):
    w, gain = weights()
    for how, (result, *_) in zip(
        COMBINATIONS, library(tuple(COMBINATIONS), w, gain, w), strict=True
    ):
        s = w.shape[1] if how.fan_in_scaling else 1
        for row, out, factor, spread in zip(w, result, gain, published.SPREADS, strict=True):
            var = row.var(ddof=int(how.unbiased))
            divisor = {
                "added_to_variance": np.sqrt(s * (var + 1e-3)),
                "added_to_deviation": np.sqrt(s) * (np.sqrt(var) + 1e-3),
                "least_variance": np.sqrt(max(s * var, 1e-3)),
            }[how.epsilon_role]
            expected = 1.7 * factor * (row - row.mean()) / divisor
            np.testing.assert_allclose(out, expected, rtol=0, atol=64 * EPS * (1 + 0.1 / spread))


def test_fan_in_scaling_counts_what_a_mask_leaves(x64):
    w, gain = weights()
    mask = np.arange(12) < np.arange(3, 9)[:, None]
    how = WS["nfnet"]
    standardize = jax.jit(lambda w, gain, mask: standardize_kernel(w, how, gain=gain, mask=mask))
    result = np.asarray(standardize(w.T, gain, mask.T)).T
    for row, out, kept, factor in zip(w, result, mask, gain, strict=True):
        expected = published.nfnet(row[None, kept], np.asarray([factor]))[0]
        np.testing.assert_allclose(out[kept], expected, rtol=1e-9)
        assert (out[~kept] == 0).all()


@needs_torch
def test_beside_a_constant_kernel_the_derivative_of_the_root_counts_as_0():
    w = torch.full((1, 4), 0.5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    how = bcn_torch.variants.WS["authors_pytorch"]
    (bcn_torch.standardize_weight(w, how) * cotangent).sum().backward()
    # (w - mean) / eps, whose gradient is the cotangent less its mean, over eps
    expected = (cotangent - cotangent.mean()) / 1e-5
    torch.testing.assert_close(w.grad, expected, rtol=8 * EPS, atol=0)


@needs_torch
@pytest.mark.parametrize("name", WS)
@pytest.mark.parametrize("check", ["gradcheck", "gradgradcheck"])
def test_first_and_second_derivatives_are_consistent(name, check):
    how = bcn_torch.variants.WS[name]
    w = torch.from_numpy(weights(4)[0][:2]).requires_grad_()
    gain = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=how.gain)

    def standardized(w, gain):
        return bcn_torch.standardize_weight(w, how, gain if how.gain else None)

    assert getattr(torch.autograd, check)(standardized, (w, gain))


@needs_torch
def test_half_precision_is_the_float32_result_rounded_once():
    w, gain = (torch.from_numpy(a).bfloat16() for a in weights())
    for how in bcn_torch.variants.WS.values():
        full = bcn_torch.standardize_weight(w.float(), how, gain.float() if how.gain else None)
        half = bcn_torch.standardize_weight(w, how, gain if how.gain else None)
        assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("name", ["timm_scaled", "nfnet"])
def test_layers_learn_their_gain_and_start_from_1(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32)
    layer = bcn_flax.WSConv(4, (3, 3), standardization=WS[name])
    apply = jax.jit(layer.apply)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    assert (variables["params"]["gain"] == jnp.ones(4)).all()
    y = apply(variables, x)
    gain = jnp.asarray([2.0, 3.0, -1.0, 0.5])
    scaled = apply({"params": {**variables["params"], "gain": gain}}, x)
    assert_close(scaled, y * gain.reshape(1, 1, 1, 4), ulps=64, dtype=np.float32)
    module = bcn_flax.nnx.WSConv(3, 4, (3, 3), standardization=WS[name], rngs=nnx.Rngs(0))
    assert (module.gain[...] == jnp.ones(4)).all()


@needs_torch
def test_a_layer_of_pytorch_learns_its_gain_and_starts_from_1():
    torch.manual_seed(0)
    how = bcn_torch.variants.WS["nfnet"]
    layer = bcn_torch.WSConv2d(2, 3, 3, standardization=how).double()
    assert torch.equal(layer.gain, torch.ones(3, dtype=torch.float64))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    ones = layer(x)
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([2.0, 3.0, -1.0]))
        layer.bias.zero_()
    y, factors = layer(x), layer.gain.detach().view(1, 3, 1, 1)
    standardized = bcn_torch.standardize_weight(layer.weight, how, layer.gain)
    assert torch.equal(y, torch.nn.functional.conv2d(x, standardized))
    assert not torch.equal(y, ones)
    y.pow(3).sum().backward()
    # y is proportional to each gain.
    expected = (3 * y.detach() ** 3 / factors).sum((0, 2, 3))
    torch.testing.assert_close(layer.gain.grad, expected, rtol=1e-12, atol=0)
    layer.reset_parameters()
    assert torch.equal(layer.gain, torch.ones(3, dtype=torch.float64))


@needs_torch
def test_a_layer_without_gain_has_the_parameters_of_pytorchs():
    linear = partial(bcn_torch.WSLinear, 3, 4)
    for name, learned in (("bit", ["weight", "bias"]), ("nfnet", ["weight", "bias", "gain"])):
        layer = linear(standardization=bcn_torch.variants.WS[name])
        assert [*layer.state_dict()] == learned
    assert linear().gain is None


# --- Batch-channel normalization ------------------------------------------------------------------

CODES = {name: (BCN[name], code) for name, code in published.BATCH_CHANNEL_NORM.items()}
CODES["authors_readme, momentum 0.8"] = (
    {**BCN["authors_readme"], "momentum": 0.8},
    published.AuthorsReadmeWithARate,
)


@every_api
@pytest.mark.parametrize(("arguments", "code"), CODES.values(), ids=CODES)
def test_batch_channel_norm_computes_what_the_published_code_does(x64, arguments, code, api):
    rng = np.random.default_rng(0)
    params = [rng.uniform(0.5, 1.5, size) for size in (C, C, G, G)]
    layer, expected = api(params, **arguments), code(*params)
    # Sums of 24 values up to 12, whose squares the annotated code subtracts from each other.
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e3 * EPS * 12**2)
    for training in [True, True, True, False, True, False]:
        x = rng.normal(2, 3, (3, C, 4, 2))
        close(layer(x, training), expected(x, training))
        close(layer.statistics[0], expected.exp_mean)
        close(layer.statistics[1], expected.exp_var)


@needs_torch
def test_the_authors_readme_as_published_never_moves_its_estimates():
    layer = bcn_torch.BatchChannelNorm(C, G, **bcn_torch.variants.BCN["authors_readme"])
    for _ in range(3):
        layer(torch.randn(4, C, 3) + 5)
    assert torch.equal(layer.batch_norm.exp_mean, torch.zeros(C))
    assert torch.equal(layer.batch_norm.exp_var, torch.ones(C))


def test_one_step_from_the_start_tells_the_estimates_apart():
    """From (0, 1), with a batch of mean 5 and variance 1, at the rate 0.1."""
    x = jnp.asarray([[4.0], [6.0]])
    for variance, expected in (
        ("biased", 1.0),
        ("unbiased", 1.1),
        ("around_running_mean", 0.9 + 0.1 * 26),
    ):
        layer = bcn_flax.BatchNorm(use_running_average=False, running_variance=variance)
        init, step = jax.jit(layer.init), jax.jit(partial(layer.apply, mutable=["batch_stats"]))
        _, updates = step(init(jax.random.key(0), x), x)
        np.testing.assert_allclose(updates["batch_stats"]["var"], [expected], rtol=1e-6)


# --- The names ------------------------------------------------------------------------------------


def test_the_annotated_names_are_the_defaults():
    assert bcn_flax.BatchChannelNorm(**BCN["annotated"]) == bcn_flax.BatchChannelNorm()
    assert WS["annotated"] == Standardization() == bcn_flax.WSConv(4, (3, 3)).standardization


@pytest.mark.parametrize("name", BCN)
def test_networks_take_the_names_too(name):

    def layers(library):
        return {
            "norm": partial(library.BatchChannelNorm, num_groups=4, **BCN[name]),
            "conv": partial(library.WSConv, standardization=WS["bit"]),
        }

    linen = models.VGG(((8,),), **layers(bcn_flax.linen))
    module = nnx.eval_shape(
        lambda: nnx_models.VGG(((8,),), **layers(bcn_flax.nnx), rngs=nnx.Rngs(0))
    )
    bound = linen.bind({})
    for conv, norm in (bound.layers[:2], module.layers[:2]):
        assert conv.standardization == WS["bit"]
        batch_norm = getattr(norm, "batch_norm", norm)
        assert batch_norm.running_variance == BCN[name]["running_variance"]
        assert batch_norm.momentum == BCN[name]["momentum"]
    assert bound.layers[1].batch_epsilon == BCN[name].get("batch_epsilon")


@needs_torch
def test_the_annotated_names_are_pytorchs_defaults_too():
    plain, named = (
        bcn_torch.BatchChannelNorm(C, G, **arguments)
        for arguments in ({}, bcn_torch.variants.BCN["annotated"])
    )
    assert repr(named) == repr(plain)
    annotated = bcn_torch.variants.WS["annotated"]
    assert annotated == bcn_torch.Standardization()
    assert annotated == bcn_torch.WSConv2d(3, 4, 3).standardization


@needs_torch
@pytest.mark.parametrize("name", BCN)
def test_a_network_of_pytorch_takes_the_names_too(name):
    norm, conv = bcn_torch.BatchChannelNorm, bcn_torch.WSConv2d
    how, arguments = bcn_torch.variants.WS["timm_scaled"], bcn_torch.variants.BCN[name]
    model = bcn_torch.VGG(
        ((8,), (8,)),
        norm=partial(norm, groups=2, **arguments),
        conv=partial(conv, standardization=how),
    )
    norms = [m for m in model.modules() if isinstance(m, norm)]
    assert [repr(m) for m in norms] == [repr(norm(8, 2, **arguments))] * 2
    convolutions = [m for m in model.modules() if isinstance(m, conv)]
    assert [m.standardization for m in convolutions] == [how] * 2


@needs_torch
def test_the_names_mean_the_same_in_pytorch():
    in_pytorch = bcn_torch.variants
    assert [*map(tuple, in_pytorch.WS.values())] == [*map(tuple, WS.values())]
    assert [*in_pytorch.WS] == [*WS]
    for name, arguments in in_pytorch.BCN.items():
        renamed = in_torchs_words(BCN[name])
        assert 1 - arguments["momentum"] == BCN[name]["momentum"]
        assert {**arguments, "momentum": None} == {**renamed, "momentum": None}


@pytest.mark.parametrize("library", ["bcn_flax", pytest.param("bcn_torch", marks=needs_torch)])
def test_nobody_can_change_what_a_name_means(library):
    variants = import_module(f"{library}.variants")
    for mapping in (variants.BCN, variants.WS, variants.BCN["annotated"]):
        with pytest.raises(TypeError):
            mapping["annotated"] = None
    with pytest.raises(AttributeError):
        variants.WS["annotated"].gamma = 1.0
