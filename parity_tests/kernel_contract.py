"""The contract of the layers with standardized weights, in linen and in NNX.

Each is the plain layer of its framework, with the kernel that a plain restatement in long double
makes of the raw one: in its output, in its gradients, and at the start. The weights of the output
channels are of very different sizes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import bcn_flax.linen
import bcn_flax.nnx
from bcn_flax import Standardization
from parity_tests.contract import NOTHING, assert_within
from parity_tests.laws import Linen, Nnx

IN, OUT = 4, 6
STD = np.array([1e-2, 0.1, 1, 3, 10, 100])


class Layer(NamedTuple):
    """A layer, and the shape of its kernel.

    Attributes:
        name: of the class.
        plain: of the plain one, in linen and in NNX.
        kernel: its shape.
        options: arguments of both.
        axis: of the output channels.
    """

    name: str
    plain: tuple[Any, Any]
    kernel: tuple[int, ...]
    options: Mapping[str, Any] = NOTHING
    axis: int = -1

    @property
    def input_shape(self):
        return (2, *(5 for _ in self.kernel[:-2]), IN)


CONVS, TRANSPOSED = (nn.Conv, nnx.Conv), (nn.ConvTranspose, nnx.ConvTranspose)
WINDOW = {"kernel_size": (3, 2)}
# Every value but 0 counts, and multiplies the weight.
MASK = np.ones((3, 2, IN, OUT), np.float32)
MASK[1:, 1], MASK[0, 0], MASK[:, :, 1:, 2] = 0, 0.5, 0
LAYERS = {
    "WSDense": Layer("WSDense", (nn.Dense, nnx.Linear), (IN, OUT)),
    "WSConv": Layer("WSConv", CONVS, (3, 2, IN, OUT), {**WINDOW, "strides": 2}),
    "WSConv in groups": Layer(
        "WSConv", CONVS, (3, 2, 2, OUT), {**WINDOW, "feature_group_count": 2, "use_bias": False}
    ),
    "WSConv masked": Layer("WSConv", CONVS, MASK.shape, {**WINDOW, "mask": MASK}),
    "WSConvTranspose": Layer("WSConvTranspose", TRANSPOSED, (3, 2, IN, OUT), WINDOW),
    "WSConvTranspose exchanged": Layer(
        "WSConvTranspose", TRANSPOSED, (3, 2, OUT, IN), {**WINDOW, "transpose_kernel": True}, -2
    ),
}
HOW = {
    "default": Standardization(),
    "biased": Standardization(unbiased=False),
    "epsilon": Standardization(epsilon=0.1),
    "added to deviation": Standardization(epsilon=0.1, epsilon_role="added_to_deviation"),
    "least variance": Standardization(epsilon=0.1, epsilon_role="least_variance"),
    "fan-in": Standardization(epsilon=0.1, fan_in_scaling=True),
    "fan-in, deviation": Standardization(
        epsilon=0.1, epsilon_role="added_to_deviation", fan_in_scaling=True
    ),
    "fan-in, least variance": Standardization(
        epsilon=0.1, epsilon_role="least_variance", fan_in_scaling=True
    ),
    "gain": Standardization(gain=True),
    "gamma": Standardization(gamma=1.7),
}


def restated(kernel, how, gain, axis=-1, mask=None):
    """The standardized kernel, in long double."""
    w = np.moveaxis(kernel, axis, -1).astype(np.longdouble)
    kept = np.ones(w.shape) if mask is None else np.moveaxis(mask, axis, -1) != 0
    axes = tuple(range(w.ndim - 1))
    n = kept.sum(axes)
    mean = (kept * w).sum(axes) / n
    var = (kept * (w - mean) ** 2).sum(axes) / (n - 1 if how.unbiased else n)
    s = n if how.fan_in_scaling else 1
    divisor = {
        "added_to_variance": np.sqrt(s * (var + how.epsilon)),
        "added_to_deviation": np.sqrt(s) * (np.sqrt(var) + how.epsilon),
        "least_variance": np.sqrt(np.maximum(s * var, how.epsilon)),
    }[how.epsilon_role]
    standardized = kept * how.gamma * (w - mean) / divisor * (1 if gain is None else gain)
    return np.moveaxis(standardized, -1, axis)


def make(api, layer, classes, **options):
    """A layer as a function of variables and input, of our class or of Flax's."""
    if api == "linen":
        return Linen(classes, FrozenDict({"features": OUT, **layer.options, **options}))
    sizes = {"in_features": IN, "out_features": OUT}
    return Nnx(classes, FrozenDict({**sizes, **layer.options, **options}))


def pair(api, layer, how, **options):
    """Our layer, and the plain one."""
    module = bcn_flax.linen if api == "linen" else bcn_flax.nnx
    ours = make(api, layer, getattr(module, layer.name), standardization=how, **options)
    return ours, make(api, layer, layer.plain[api == "NNX"], **options)


def draw(layer, how, dtype=np.float64, offset=1.0):
    """Parameters, an input, and the gradient of a loss by the output."""
    rng = np.random.default_rng(0)
    kernel = np.moveaxis(rng.standard_normal(layer.kernel), layer.axis, -1) + offset
    params = {"kernel": np.moveaxis(STD * kernel, -1, layer.axis)}
    params |= {"bias": rng.standard_normal(OUT)} if layer.options.get("use_bias", True) else {}
    params |= {"gain": rng.uniform(0.5, 1.5, OUT)} if how.gain else {}
    params = {name: value.astype(dtype) for name, value in params.items()}
    return params, rng.standard_normal(layer.input_shape).astype(dtype), rng


def plain_params(layer, how, params):
    """Those of the plain layer: the kernel of the restatement."""
    mask = layer.options.get("mask")
    kernel = restated(params["kernel"], how, params.get("gain"), layer.axis, mask)
    bias = {"bias": params["bias"]} if "bias" in params else {}
    return {"kernel": kernel.astype(params["kernel"].dtype), **bias}


def check_call(api, layer, how):
    """Output and gradients in float64, each output channel at its own size."""
    params, x, rng = draw(layer, how)
    with jax.enable_x64(True):
        ours, plain = pair(api, layer, how, param_dtype=np.float64)
        (y, dparams, dx), (expected, dplain, dx_plain) = (
            see(function, p, x)
            for function, p in ((ours, params), (plain, plain_params(layer, how, params)))
        )
    assert_by_channel(y, expected, "output")
    assert_by_channel(dx, dx_plain, "input gradient")
    step = np.longdouble(1e-6)
    for name, value in params.items():
        toward = rng.standard_normal(value.shape)
        if name == "bias":
            assert_by_channel(dparams[name], dplain[name], name)
            continue
        if name == "kernel":
            toward = np.moveaxis(STD * np.moveaxis(toward, layer.axis, -1), -1, layer.axis)
        weights = {"kernel": params["kernel"], "gain": params.get("gain")}
        moved = [
            restated(
                **{**weights, name: value + s * toward},
                how=how,
                axis=layer.axis,
                mask=layer.options.get("mask"),
            )
            for s in (step, -step)
        ]
        slopes = dplain["kernel"] * (moved[0] - moved[1]) / (2 * step)
        along = dparams[name] * toward
        size = 1e-8 * (np.abs(along).sum() + np.abs(slopes).sum())
        assert_within(along.sum(), slopes.sum(), size, f"gradient of {name}")


def see(layer, params, x):
    """The output, and the gradients of `sum(y * dy)`."""
    y, pullback = jax.vjp(lambda p, x: layer({"params": p}, x)[0], params, jnp.asarray(x))
    dy = np.random.default_rng(1).standard_normal(y.shape)
    dparams, dx = pullback(jnp.asarray(dy, y.dtype))
    return np.asarray(y), jax.tree.map(np.asarray, dparams), np.asarray(dx)


def check_half(api, layer, how):
    """In half precision: weights far from 0 are standardized first, and rounded then."""
    params, x, _ = draw(layer, how, np.float32, offset=100.0)
    ours, plain = pair(api, layer, how, dtype=jnp.bfloat16)
    y, expected = (
        layer_({"params": p}, x)[0]
        for layer_, p in ((ours, params), (plain, plain_params(layer, how, params)))
    )
    assert y.dtype == jnp.bfloat16
    assert_by_channel(y, expected, "output", 8 * float(jnp.finfo(jnp.bfloat16).eps))


def check_start(api, layer, how):
    """The plain layer's parameters, and gains of 1, of the type of the parameters."""
    x = np.ones(layer.input_shape, np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        options = {"param_dtype": dtype, "kernel_init": nn.initializers.constant(3.0)}
        ours, plain = (each.start(x)["params"] for each in pair(api, layer, how, **options))
        gain = {"gain": jnp.ones(OUT, dtype)} if how.gain else {}
        expected = {**plain, **gain}
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value)


def assert_by_channel(actual, expected, name, eps=1e-12):
    expected = np.asarray(expected, np.longdouble)
    off = eps * np.abs(expected).max(tuple(range(expected.ndim - 1)))
    assert_within(actual, expected, off, name)


def checks(api):
    """The checks of linen or NNX, by name."""
    few = ("default", "gain")
    calls = dict.fromkeys(LAYERS, few)
    calls |= {"WSDense": (*HOW,), "WSConv masked": (*few, "fan-in")}
    rows = [
        (check_start, "start", dict.fromkeys(LAYERS, few)),
        (check_call, "call", calls),
        (check_half, "bfloat16", dict.fromkeys(LAYERS, few[:1])),
    ]
    return {
        f"contract of {api}, {what}: {name}, {how}": partial(check, api, layer, HOW[how])
        for check, what, hows in rows
        for name, layer in LAYERS.items()
        for how in hows[name]
    }


KERNEL_CONTRACT = {**checks("linen"), **checks("NNX")}
