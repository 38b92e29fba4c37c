"""The named variants, in linen and NNX: each computes what the published code of its name does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bcn_flax
import bcn_flax.nnx
from bcn_flax import Standardization, models, standardize_kernel
from bcn_flax.models import nnx as nnx_models
from bcn_flax.variants import BCN, WS
from parity_tests import published
from parity_tests.published import C, G, weights
from parity_tests.tolerances import assert_close

EPS = np.finfo(np.float64).eps

every_ws = pytest.mark.parametrize("name", WS)


@partial(jax.jit, static_argnums=0)
def ours(name, w, gain):
    """The library's result for weights `(out, fan_in)`, as of a dense layer."""
    return standardize_kernel(w.T, WS[name], gain=gain if WS[name].gain else None).T


def test_every_published_code_has_a_name():
    assert [*WS] == [*published.WEIGHT_STANDARDIZATION]
    assert [*BCN] == [*published.BATCH_CHANNEL_NORM]


@every_ws
@pytest.mark.parametrize("fan_in", [2, 300])
def test_weights_are_standardized_as_in_the_published_code(x64, name, fan_in):
    w, gain = weights(fan_in)
    result = np.asarray(ours(name, *map(jnp.asarray, (w, gain))))
    expected = published.WEIGHT_STANDARDIZATION[name](w, gain)
    # A row of the spread s around a mean of 0.1 loses the ratio to the subtraction of the mean.
    for row, judge, spread in zip(result, expected, published.SPREADS, strict=True):
        rounding = 32 * EPS * (1 + 0.1 / spread) * max(1, abs(judge).max())
        np.testing.assert_allclose(row, judge, rtol=0, atol=rounding)


@every_ws
def test_gradients_are_the_finite_differences_of_the_published_code(x64, name):
    """Along random directions; each spread by itself, for what curves on its scale."""
    w, gain = weights()
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=w.shape)

    def loss(w, gain):
        return (published.WEIGHT_STANDARDIZATION[name](w, gain) * cotangent).sum()

    gradients = jax.grad(lambda w, gain: jnp.sum(ours(name, w, gain) * cotangent), (0, 1))
    in_w, in_gain = jax.device_get(jax.jit(gradients)(w, gain))
    for i, spread in enumerate(published.SPREADS):
        direction = np.zeros_like(w)
        direction[i] = rng.normal(size=w.shape[1])
        step = 1e-4 * spread
        difference = (loss(w + step * direction, gain) - loss(w - step * direction, gain)) / 2
        size = np.abs(in_w[i]).max()
        atol = 1e-6 * size + 64 * EPS * (1 + 0.1 / spread) * w.size / step
        np.testing.assert_allclose((in_w * direction).sum(), difference / step, rtol=0, atol=atol)
    if WS[name].gain:
        direction = rng.normal(size=gain.shape)
        difference = loss(w, gain + direction) - loss(w, gain - direction)  # linear in the gain
        np.testing.assert_allclose((in_gain * direction).sum(), difference / 2, rtol=1e-9)


@every_ws
@pytest.mark.parametrize("fan_in", [4, 27])
def test_a_constant_kernel_has_a_finite_gradient(name, fan_in):
    gain = jnp.ones(2)

    @jax.jit
    def result_and_gradient(w, cotangent):
        result, pullback = jax.vjp(lambda w: ours(name, w, gain), w)
        return result, *pullback(cotangent)

    w, cotangent = np.full((2, fan_in), 0.3), np.arange(2.0 * fan_in).reshape(2, fan_in)
    result, gradient = result_and_gradient(w, cotangent)
    # A rounding, over the smallest divisor of all: sqrt(1e-10), or sqrt(1e-6) / sqrt(27).
    assert np.abs(result).max() <= np.finfo(np.float32).eps / 1e-5
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("role", ["added_to_variance", "added_to_deviation", "least_variance"])
@pytest.mark.parametrize("fan_in_scaling", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_every_combination_follows_its_equation(x64, role, fan_in_scaling, unbiased):
    w, gain = weights()
    how = Standardization(unbiased, 1e-3, role, fan_in_scaling, gain=True, gamma=1.7)
    result = standardize_kernel(jnp.asarray(w.T), how, gain=jnp.asarray(gain)).T
    s = w.shape[1] if fan_in_scaling else 1
    for row, out, factor, spread in zip(w, result, gain, published.SPREADS, strict=True):
        var = row.var(ddof=int(unbiased))
        divisor = {
            "added_to_variance": np.sqrt(s * (var + 1e-3)),
            "added_to_deviation": np.sqrt(s) * (np.sqrt(var) + 1e-3),
            "least_variance": np.sqrt(max(s * var, 1e-3)),
        }[role]
        expected = 1.7 * factor * (row - row.mean()) / divisor
        np.testing.assert_allclose(out, expected, rtol=0, atol=64 * EPS * (1 + 0.1 / spread))


def test_fan_in_scaling_counts_what_a_mask_leaves(x64):
    w, gain = weights()
    mask = np.arange(12) < np.arange(3, 9)[:, None]
    how = WS["nfnet"]
    standardize = jax.jit(lambda w, gain, mask: standardize_kernel(w, how, gain=gain, mask=mask))
    result = np.asarray(standardize(w.T, gain, mask.T)).T
    for row, out, kept, factor in zip(w, result, mask, gain, strict=True):
        judge = published.nfnet(row[None, kept], np.asarray([factor]))[0]
        np.testing.assert_allclose(out[kept], judge, rtol=1e-9)
        assert (out[~kept] == 0).all()


class Linen:
    """A linen layer, trained and evaluated step by step."""

    def __init__(self, x, **arguments):
        self.layer = bcn_flax.BatchChannelNorm(num_groups=G, param_dtype=jnp.float64, **arguments)
        init = jax.jit(partial(self.layer.init, use_running_average=True))
        self.variables = init(jax.random.key(0), x)

    def set(self, params):
        names = ("batch_norm", "scale"), ("batch_norm", "bias")
        names += ("channel_norm", "scale"), ("channel_norm", "bias")
        for (module, name), value in zip(names, params, strict=True):
            self.variables["params"][module][name] = jnp.asarray(value)

    def __call__(self, x, training):
        y, updates = self.layer.apply(
            self.variables, x, use_running_average=not training, mutable=["batch_stats"]
        )
        self.variables = {**self.variables, **updates}
        return y

    @property
    def statistics(self):
        stats = self.variables["batch_stats"]["batch_norm"]
        return stats["mean"], stats["var"]


class Nnx:
    """An NNX layer."""

    def __init__(self, x, **arguments):
        self.layer = bcn_flax.nnx.BatchChannelNorm(
            x.shape[-1], num_groups=G, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **arguments
        )

    def set(self, params):
        batch_norm, channel_norm = self.layer.batch_norm, self.layer.channel_norm
        variables = batch_norm.scale, batch_norm.bias, channel_norm.scale, channel_norm.bias
        for variable, value in zip(variables, params, strict=True):
            variable[...] = jnp.asarray(value)

    def __call__(self, x, training):
        return self.layer(x, use_running_average=not training)

    @property
    def statistics(self):
        return self.layer.batch_norm.mean[...], self.layer.batch_norm.var[...]


CODES = {name: (BCN[name], code) for name, code in published.BATCH_CHANNEL_NORM.items()}
CODES["authors_readme, momentum 0.8"] = (
    {**BCN["authors_readme"], "momentum": 0.8},
    published.AuthorsReadmeWithARate,
)


@pytest.mark.parametrize("api", [Linen, Nnx])
@pytest.mark.parametrize(("arguments", "code"), CODES.values(), ids=CODES)
def test_batch_channel_norm_computes_what_the_published_code_does(x64, arguments, code, api):
    rng = np.random.default_rng(0)
    params = [rng.uniform(0.5, 1.5, size) for size in (C, C, G, G)]
    layer, judge = api(jnp.ones((1, 4, 2, C)), **arguments), code(*params)
    layer.set(params)
    for training in [True, True, True, False, True, False]:
        x = rng.normal(2, 3, (3, C, 4, 2))
        y = layer(jnp.asarray(np.moveaxis(x, 1, -1)), training)
        # Sums of 24 values up to 12, whose squares the annotated code subtracts from each other.
        atol = 1e3 * EPS * 12**2
        np.testing.assert_allclose(np.moveaxis(y, -1, 1), judge(x, training), rtol=0, atol=atol)
        for ours, theirs in zip(layer.statistics, (judge.exp_mean, judge.exp_var), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


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


def test_nobody_can_change_what_a_name_means():
    for mapping in (BCN, WS, BCN["annotated"]):
        with pytest.raises(TypeError):
            mapping["annotated"] = None
    with pytest.raises(AttributeError):
        WS["annotated"].epsilon = 1.0
