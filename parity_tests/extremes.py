"""At the extremes of each type, results are finite and as precise as their terms.

The truth is `parity_tests.oracle` in longdouble. A result cannot be more precise than the largest
of the terms that are summed to get it, so errors are measured in roundings of those: see `terms`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import bcn_flax
from bcn_flax import standardize_kernel
from bcn_flax.affine import moments
from parity_tests import oracle
from parity_tests.tolerances import assert_close

ULPS = 16  # of the largest terms: the most that was seen is 9
SHAPE, GROUPS = (3, 4, 5, 8), 4
ONE_SAMPLE, SINGLE_VALUES = (1, 4, 5, 8), (2, 8)
DTYPES = {t.__name__: np.dtype(t) for t in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)}
FLOAT32 = DTYPES["float32"]


def wide(dtype):
    """The type of the arithmetic."""
    return np.promote_types(np.float32, dtype) if dtype != ml_dtypes.bfloat16 else FLOAT32


def largest(dtype):
    return float(ml_dtypes.finfo(dtype).max)


def smallest(dtype):
    """Numbers below it, which XLA takes for 0, have fewer digits."""
    return float(ml_dtypes.finfo(dtype).smallest_normal)


# --- Inputs ---------------------------------------------------------------------------------------


def at_every_pixel(z, value):
    """An outlier in each channel of each sample, at one pixel after the other."""
    x = z.reshape(len(z), -1, z.shape[-1]).copy()
    for i, (n, c) in enumerate(np.ndindex(len(z), z.shape[-1])):
        x[n, i % x.shape[1], c] = value
    return x.reshape(z.shape)


def at_one_value(z, value):
    return np.where(np.arange(z.size).reshape(z.shape) == z.size // 3, value, z)


def in_one_channel(z, value):
    return np.where(np.arange(z.shape[-1]) == 1, value, z)


def in_one_sample(z, value):
    return np.where(np.arange(len(z)).reshape(-1, *(1,) * (z.ndim - 1)) == 0, value, z)


# Functions of standard normal numbers and the type that they are rounded to.
DATA = {
    "mean of 1e4 deviations": lambda z, dtype: z + 1e4,
    "mean of 1e6 deviations": lambda z, dtype: (z + 1e6) / 32,
    "large": lambda z, dtype: z * min(largest(wide(dtype)) ** 0.5, largest(dtype)) / 256,
    "small": lambda z, dtype: z * 1e-5,
    "denormal": lambda z, dtype: z * smallest(dtype) / 100,
    "an outlier": lambda z, dtype: at_one_value(z, 1e4),
    "outliers": lambda z, dtype: at_every_pixel(z, 3e4),
    "a constant channel": lambda z, dtype: in_one_channel(z, 1e4),
    "constant": lambda z, dtype: np.full(z.shape, 7),
}
# Squares overflow.
BEYOND = {
    "too large": lambda z, dtype: z * largest(dtype) ** 0.75,
    "the largest, of both signs": lambda z, dtype: np.copysign(largest(dtype), z),
    "the largest once": lambda z, dtype: at_one_value(abs(z), -largest(dtype)),
    "the largest in one channel": lambda z, dtype: in_one_channel(
        z, np.copysign(largest(dtype), z)
    ),
    "a sample far from the others": lambda z, dtype: in_one_sample(z, 16 * largest(dtype) ** 0.5),
    "a channel far from the others": lambda z, dtype: in_one_channel(z, 16 * largest(dtype) ** 0.5),
}


class Case(NamedTuple):
    """What a layer is called with."""

    variables: dict
    x: np.ndarray
    dy: np.ndarray


def case_of(name, draw, dtype, shape=SHAPE):
    rng = np.random.default_rng(0)
    x = draw(rng.standard_normal(shape), dtype).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        shapes = jax.eval_shape(flax_layer(name, dtype).init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: rng.uniform(0.5, 1.5, v.shape).astype(v.dtype), shapes)
    return Case(variables, x, dy)


# --- Implementations: output, input gradient, gradients and statistics, by name -------------------

TRAINING = {"use_running_average": False}
LAYERS = {
    "BatchNorm": (partial(bcn_flax.BatchNorm, **TRAINING), partial(oracle.BatchNorm, False)),
    "EstimatedBatchNorm": (
        partial(bcn_flax.EstimatedBatchNorm, **TRAINING),
        partial(oracle.BatchNorm, True),
    ),
    "ChannelNorm": (
        partial(bcn_flax.ChannelNorm, num_groups=GROUPS),
        partial(oracle.ChannelNorm, GROUPS),
    ),
    "BCN": (
        partial(bcn_flax.BatchChannelNorm, num_groups=GROUPS, **TRAINING),
        partial(oracle.BatchChannelNorm, GROUPS, True),
    ),
    "BCN of the batch": (
        partial(bcn_flax.BatchChannelNorm, num_groups=GROUPS, estimate=False, **TRAINING),
        partial(oracle.BatchChannelNorm, GROUPS, False),
    ),
}


def flax_layer(name, dtype):
    return LAYERS[name][0](dtype=dtype, param_dtype=wide(dtype))


@partial(jax.jit, static_argnums=(0, 1))
def _flax_results(name, dtype, variables, x, dy, mask):
    layer = flax_layer(name, dtype)

    def call(params, x):
        return layer.apply({**variables, "params": params}, x, mask=mask, mutable=["batch_stats"])

    y, pullback, updates = jax.vjp(call, variables["params"], x, has_aux=True)
    gradients, dx = pullback(dy)
    return {"y": y, "dx": dx, **named(gradients, "d_"), **named(updates.get("batch_stats", {}))}


def flax_results(name, case, mask=None):
    with jax.enable_x64(case.x.dtype == np.float64):
        return jax.tree.map(np.asarray, _flax_results(name, case.x.dtype, *case, mask))


def torch_results(name, case):
    import torch

    from parity_tests import layout, torch_layers

    # Options of linen's layer that PyTorch's has, too.
    options = {k: v for k, v in LAYERS[name][0].keywords.items() if k in ("num_groups", "estimate")}
    layer = torch_layers.layer(LAYERS[name][0].func.__name__, case.x.shape, options)
    layer = layer.to(getattr(torch, wide(case.x.dtype).name))
    paths = {path: path.partition("/")[2] for path in named(case.variables)}
    names = {path: _torch_name(rest) for path, rest in paths.items()}
    tensors = {names[path]: torch.tensor(v) for path, v in named(case.variables).items()}
    layer.load_state_dict(tensors)
    x = layout.to_torch(case.x).requires_grad_()
    y = layer(x)
    y.backward(layout.to_torch(case.dy))
    results = {"y": layout.to_flax(y), "dx": layout.to_flax(x.grad)}
    for path, rest in paths.items():
        if path.startswith("params"):
            results[f"d_{rest}"] = layer.get_parameter(names[path]).grad.numpy()
        else:
            results[rest] = layer.get_buffer(names[path]).numpy()
    return results


def _torch_name(path):
    *parts, last = path.split("/")
    words = {"bias": "shift", "mean": "exp_mean", "var": "exp_var"}
    return ".".join([*parts, words.get(last, last)])


def named(tree, prefix=""):
    """The leaves of a tree by their paths."""
    return {
        prefix + "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def oracle_results(name, case, far):
    """The truth, and the sizes of its `terms`; a variance that overflows is infinite."""
    layer = LAYERS[name][1]()
    for path, value in named(case.variables).items():
        *_, part, key = path.split("/")
        setattr(getattr(layer, part, layer), key, value.astype(np.longdouble))
    for part in (layer, *(getattr(layer, part, layer) for part in PARTS)):
        part.largest = largest(wide(case.x.dtype))
    x, dy = (v.astype(np.longdouble) for v in (case.x, case.dy))
    truth = {"y": layer.forward(x), "dx": layer.backward(dy)}
    composed = isinstance(layer, oracle.BatchChannelNorm)
    parts = {f"{part}/": getattr(layer, part) for part in PARTS} if composed else {"": layer}
    for path, part in parts.items():
        truth |= {f"d_{path}{key}": getattr(part, f"d_{key}") for key in part.PARAMETERS}
        truth |= {f"{path}{key}": getattr(part, key) for key in part.STATISTICS}
    return truth, terms(parts, x, dy, far)


PARTS = "batch_norm", "channel_norm"


def terms(parts, x, dy, far):
    """The sizes of the terms of each result.

    Args:
        parts: norms in their order, after forward and backward.
        x: the input.
        dy: the output gradient.
        far: the part of the distance from 0 by which the deviations from a mean are rounded: all of
            it if the mean is rounded, little if it is measured from an origin nearby.
    """
    sizes, of_parts, size = {}, [], np.abs(x)
    for path, part in parts.items():
        distance = blocks(part, size).max((1, 3), keepdims=True)
        std = part.std.reshape(-1, 1, distance.shape[2], 1)
        highest = np.abs(part.h.reshape(blocks(part, x).shape)).max((1, 3), keepdims=True)
        if part.STATISTICS:
            sizes[f"{path}mean"] = 2 * (distance[0, 0, :, 0] + np.abs(part.mean))
            sizes[f"{path}var"] = 10 * part.var + (far * distance[0, 0, :, 0]) ** 2
        if getattr(part, "own_moments", True):
            h = highest + far * distance / std + 1
        else:
            h = (distance + np.abs(part.mean)[:, None]) / std + 1
        of_parts.append((path, part, std, h, highest))
        size = np.abs(part.scale)[:, None] * h + np.abs(part.bias)[:, None]
        size = np.broadcast_to(size, blocks(part, x).shape).reshape(x.shape)
        far = 1  # what comes next is rounded at its distance from 0
    sizes["y"], size = size, np.abs(dy)
    for path, part, std, h, highest in reversed(of_parts):
        size = blocks(part, size).max((1, 3), keepdims=True)
        count = x.size / np.size(part.scale)
        sizes[f"d_{path}bias"] = count * size.max((0, 1, 3))
        sizes[f"d_{path}scale"] = count * (size * h).max((0, 1, 3))
        through_moments = h * highest if getattr(part, "own_moments", True) else 0
        size = np.abs(part.scale)[:, None] / std * size * (1 + through_moments)
        size = np.broadcast_to(size, blocks(part, x).shape).reshape(x.shape)
    return {**sizes, "dx": size}


def blocks(part, v):
    """`(n, values, groups, channels)`; axes 1 and 3 are standardized together."""
    if isinstance(part, oracle.BatchNorm):
        return v.reshape(1, -1, v.shape[-1], 1)
    return v.reshape(len(v), -1, part.groups, v.shape[-1] // part.groups)


# --- Checks ---------------------------------------------------------------------------------------


def assert_precise(actual, case, truth, sizes, name):
    """Each result whose terms are in its type is within `ULPS` of them."""
    dtype = case.x.dtype
    for key, exact in truth.items():
        stored = dtype if key in ("y", "dx") else wide(dtype)
        found, exact = np.asarray(actual[key], np.longdouble), np.asarray(exact)
        fits = np.maximum(np.abs(exact), sizes[key]) <= largest(stored)
        assert np.isfinite(found[fits]).all(), f"{name}: {key} is not finite"
        rounding = float(ml_dtypes.finfo(stored).eps) / 2 * np.abs(exact) + smallest(stored)
        allowed = ULPS * np.finfo(wide(dtype)).eps * sizes[key] + rounding
        error = np.abs(np.where(fits, found - exact, 0)) / allowed
        assert error.max() <= 1, f"{name}: {key} has {float(error.max()):.3g} times what is allowed"


def near(dtype):
    """The rounding of an origin nearby: a mean is rounded some 8 times."""
    return 8 * np.finfo(wide(dtype)).eps


def results_are_precise(name, dtype, shape=SHAPE):
    for data, draw in DATA.items():
        case = case_of(name, draw, dtype, shape)
        truth = oracle_results(name, case, near(dtype))
        assert_precise(flax_results(name, case), case, *truth, data)


def batches_of_one_are_precise(name, dtype):
    results_are_precise(name, dtype, (1, *SHAPE[1:]))


def single_values_are_precise(name, dtype):
    results_are_precise(name, dtype, SINGLE_VALUES)


def pytorchs_results_are_precise(name, dtype, shape=SHAPE):
    """As precise as deviations that are rounded at their distance from 0."""
    for data, draw in DATA.items():
        case = case_of(name, draw, dtype, shape)
        assert_precise(torch_results(name, case), case, *oracle_results(name, case, 1), data)


def overflowing_squares_give_the_bias(name, dtype):
    """Without gradient, and without effect on the running averages."""
    for data, draw in BEYOND.items():
        case = case_of(name, draw, dtype)
        actual = flax_results(name, case)
        assert_precise(actual, case, *oracle_results(name, case, near(dtype)), data)
        assert_statistics_kept(actual, case, data)


def pytorchs_overflowing_squares_give_the_bias(name, dtype):
    """If the sum of the values overflows too, the output is NaN, but not the running estimates."""
    for data, draw in BEYOND.items():
        case = case_of(name, draw, dtype)
        actual = torch_results(name, case)
        if data == "too large":
            assert_precise(actual, case, *oracle_results(name, case, 1), data)
        assert_statistics_kept(actual, case, data)


def assert_statistics_kept(actual, case, data):
    """Where the variance of a batch overflows."""
    var = case.x.astype(np.longdouble).var((0, 1, 2))
    kept = var > largest(wide(case.x.dtype))
    for path, before in named(case.variables.get("batch_stats", {})).items():
        found = actual[path]
        np.testing.assert_array_equal(found[kept], before[kept], err_msg=f"{data}: {path}")
        assert np.isfinite(found).all(), f"{data}: {path}"


def the_largest_constant_leaves_all_finite(name, dtype):
    """Its mean is farther from 0 than any origin, so its variance overflows, too."""
    for size in (largest(dtype), -largest(dtype)):
        case = case_of(name, lambda z, dtype, size=size: np.full(z.shape, size), dtype)
        for key, value in flax_results(name, case).items():
            # Running averages that were not updated do not bound the output.
            if name != "EstimatedBatchNorm" or key == "dx":
                assert np.isfinite(value.astype(np.longdouble)).all(), key


def masked_values_cost_no_digits(name, dtype):
    """However large they are, beside a mean that is large, too."""
    mask = np.random.default_rng(1).random((1, *SHAPE[1:-1], 1)) < 0.7
    case = case_of(name, DATA["mean of 1e4 deviations"], dtype)
    x = np.where(mask, case.x, np.copysign(largest(dtype) / 4, case.dy)).astype(dtype)
    case = case._replace(x=x, dy=np.where(mask, case.dy, 0).astype(dtype))
    actual, kept = flax_results(name, case, mask), mask[0, ..., 0]
    assert (actual["dx"][:, ~kept] == 0).all()
    shown = {k: v[:, kept] if k in ("y", "dx") else v for k, v in actual.items()}
    case = case._replace(x=x[:, kept], dy=case.dy[:, kept])
    assert_precise(shown, case, *oracle_results(name, case, near(dtype)), "masked")


@jax.jit
def _kernel_results(kernel, dy):
    y, pullback = jax.vjp(standardize_kernel, kernel)
    return {"y": y, "dx": pullback(dy)[0]}


def a_kernel_is_precise(dtype):
    """Beyond the limit it is 0."""
    axes = (0, 1, 2)
    for data, draw in {**DATA, **BEYOND}.items():
        rng = np.random.default_rng(0)
        kernel = draw(rng.standard_normal(SHAPE), dtype).astype(dtype)
        dy = rng.standard_normal(SHAPE).astype(dtype)
        with jax.enable_x64(dtype == np.float64):
            actual = jax.tree.map(np.asarray, _kernel_results(kernel, dy))
        wide_kernel, wide_dy = (v.astype(np.longdouble) for v in (kernel, dy))
        h, std = oracle.standardize(wide_kernel, axes, 1e-5, 1, largest(wide(dtype)))
        truth = {"y": h, "dx": oracle.standardize_backward(wide_dy, h, std, axes, 1)}
        highest, distance = (np.abs(v).max(axes, keepdims=True) for v in (h, wide_kernel))
        size = highest + near(dtype) * distance / std + 1
        slope = np.abs(wide_dy).max(axes, keepdims=True) * (1 + size * highest) / std
        sizes = {"y": size + 0 * h, "dx": slope + 0 * h}
        assert_precise(actual, Case({}, kernel, dy), truth, sizes, data)


def an_outlier_at_any_pixel_costs_few_digits():
    """Among 1024 values, 1000 deviations away: an origin there would cost 10 bits."""
    z = np.random.default_rng(0).standard_normal((4, 32, 32, 256))
    x = at_every_pixel(z, 1000).astype(np.float32)
    error = np.abs(moments(jnp.asarray(x)).var / x.astype(np.float64).var((1, 2)) - 1).max()
    assert error <= 32 * np.finfo(np.float32).eps, f"{error:.2g}"


def gradients_of_single_values_are_as_precise_as_their_terms():
    """Two standardized values are -1 and 1, so their gradient is the difference of equal terms.

    In groups of two channels this happens twice, and the gradient is nearly 0: its size is that of
    `(epsilon / var)^2`. One affine map cancels the terms in one sum, as precisely as `scale * dy`
    is rounded. An implementation stage by stage cancels them one stage after the other. There it
    has more digits, but in groups of more channels fewer: it rounds values which it then divides by
    the root of a variance near 0.
    """
    layer = LAYERS["BCN of the batch"][0]()
    x, dy = np.random.default_rng(0).normal(size=(2, 400, *SINGLE_VALUES)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x[0])

    @jax.jit
    @jax.vmap
    def gradient(x, dy):
        def call(x):
            return layer.apply(variables, x, mutable=["batch_stats"])[0]

        return jax.vjp(call, x)[1](dy)[0]

    for found, one_x, one_dy in zip(gradient(x, dy), x, dy, strict=True):
        exact = oracle.BatchChannelNorm(GROUPS, False)
        exact.forward(one_x.astype(np.longdouble))
        expected = exact.backward(one_dy.astype(np.longdouble))
        scale = 1 / (np.repeat(exact.channel_norm.std[:, 0, :, 0], 2, 1) * exact.batch_norm.std)
        largest_term = np.abs(scale * one_dy).max()
        assert_close(found, expected, ulps=64, dtype=np.float32, scale=largest_term)


# --- The table ------------------------------------------------------------------------------------

FEW, HALF, WIDE = ["float32"], ["float16", "bfloat16"], ["float32", "float64"]
OF_LAYERS = {
    results_are_precise: [*HALF, *WIDE],
    batches_of_one_are_precise: FEW,
    single_values_are_precise: FEW,
    # The largest number of float16 has a square in float32.
    overflowing_squares_give_the_bias: ["bfloat16", *WIDE],
    the_largest_constant_leaves_all_finite: ["bfloat16", *WIDE],
    masked_values_cost_no_digits: FEW,
}
OF_PYTORCH = {
    pytorchs_results_are_precise: [*HALF, *WIDE],
    pytorchs_overflowing_squares_give_the_bias: ["bfloat16", *WIDE],
}


def _by_name(table):
    # Ordered by type and layer, so that consecutive checks share a compiled program.
    return {
        f"{name} {dtype}: {check.__name__.replace('_', ' ')}": partial(check, name, DTYPES[dtype])
        for dtype in DTYPES
        for name in LAYERS
        for check, dtypes in table.items()
        if dtype in dtypes
    }


EXTREMES = {
    **_by_name(OF_LAYERS),
    **{
        f"{name}: a kernel is precise": partial(a_kernel_is_precise, DTYPES[name])
        for name in DTYPES
    },
    **{
        check.__name__.replace("_", " "): check
        for check in (
            an_outlier_at_any_pixel_costs_few_digits,
            gradients_of_single_values_are_as_precise_as_their_terms,
        )
    },
}
PYTORCH_EXTREMES = _by_name(OF_PYTORCH)
