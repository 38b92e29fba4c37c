"""Every derivative is that of the definition: forward, backward, and one of the other.

The definition is written with JAX's own means and variances, which share nothing with the passes
of the layers and their derivative rules.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcn_flax import BatchChannelNorm, BatchNorm, ChannelNorm, standardize_kernel
from bcn_flax.affine import Affine, apply, moments
from bcn_flax.parity.errors import eps
from parity_tests.draws import random_variables
from parity_tests.tolerances import assert_close

SHAPE = (3, 4, 5, 8)
GROUPS, EPSILON = 4, 1e-5
LAYERS = {
    "BatchNorm": BatchNorm(use_running_average=False),
    "ChannelNorm": ChannelNorm(GROUPS),
    "BCN": BatchChannelNorm(num_groups=GROUPS, use_running_average=False),
    "BCN of the batch": BatchChannelNorm(
        num_groups=GROUPS, use_running_average=False, estimate=False
    ),
}
# Of sums of some 500 terms, and of second derivatives, in float64.
ULPS = 1e5


def mean_of(x, axes, mask):
    if mask is None:
        return jnp.mean(x, axes, keepdims=True)
    count = jnp.maximum(jnp.sum(mask, axes, keepdims=True), 1)
    return jnp.sum(jnp.where(mask, x, 0), axes, keepdims=True) / count


def standardized(x, axes, mask):
    mean = mean_of(x, axes, mask)
    var = mean_of((x - mean) ** 2, axes, mask)
    return (x - mean) / jnp.sqrt(var + EPSILON), jnp.squeeze(mean), jnp.squeeze(var)


def batch_norm(params, stats, x, mask, estimate):
    y, mean, var = standardized(x, (0, 1, 2), mask)
    if estimate:
        mean, var = (
            0.9 * stats[name] + 0.1 * jax.lax.stop_gradient(new)
            for name, new in (("mean", mean), ("var", var))
        )
        y = (x - mean[None, None, None]) / jnp.sqrt(var + EPSILON)[None, None, None]
    return y * params["scale"][None, None, None] + params["bias"][None, None, None]


def channel_norm(params, x, mask):
    grouped = x.reshape(*x.shape[:-1], GROUPS, -1)
    if mask is not None:
        mask = jnp.broadcast_to(mask, x.shape).reshape(grouped.shape)
    y, *_ = standardized(grouped, (1, 2, 4), mask)
    scale, bias = (params[name][None, None, None, :, None] for name in ("scale", "bias"))
    return (y * scale + bias).reshape(x.shape)


def definition(name, params, stats, x, mask):
    if name == "BatchNorm":
        return batch_norm(params, stats, x, mask, estimate=False)
    if name == "ChannelNorm":
        return channel_norm(params, x, mask)
    y = batch_norm(
        params["batch_norm"], stats["batch_norm"], x, mask, estimate=name != "BCN of the batch"
    )
    return channel_norm(params["channel_norm"], y, mask)


def both(name, masked):
    """The layer and its definition, as functions of parameters and input; and where to take them.

    Besides the point there are a direction and a cotangent.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, SHAPE)
    layer = LAYERS[name].clone(param_dtype=jnp.float64)
    variables = random_variables(layer, x, rng)
    stats = variables.get("batch_stats", {})
    mask = rng.random(SHAPE) < 0.7 if masked else None

    def ours(params, x):
        every = {"params": params, "batch_stats": stats}
        y, _ = layer.apply(every, x, mask=mask, mutable=["batch_stats"])
        return y

    def theirs(params, x):
        return definition(name, params, stats, x, mask)

    point = (variables["params"], jnp.asarray(x))
    direction = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape)), point)
    return ours, theirs, point, direction, jnp.asarray(rng.normal(size=SHAPE))


def assert_same(actual, expected):
    jax.tree.map(partial(assert_close, ulps=ULPS, dtype=np.float64), actual, expected)


every_layer = pytest.mark.parametrize("name", LAYERS)
with_and_without_mask = pytest.mark.parametrize("masked", [False, True])


@every_layer
@with_and_without_mask
def test_forward_and_backward(name, masked, x64):
    ours, theirs, point, direction, cotangent = both(name, masked)

    @partial(jax.jit, static_argnums=0)
    def derivatives(f):
        y, dy = jax.jvp(f, point, direction)
        return y, dy, jax.vjp(f, *point)[1](cotangent)

    assert_same(derivatives(ours), derivatives(theirs))


@every_layer
@with_and_without_mask
def test_hessian_times_vector_in_either_order(name, masked, x64):
    ours, theirs, point, direction, cotangent = both(name, masked)

    @partial(jax.jit, static_argnums=0)
    def products(f):
        def loss(*point):
            return jnp.sum(jnp.sin(f(*point)) * cotangent)

        def slope(*point):
            return jax.jvp(loss, point, direction)[1]

        forward_over_reverse = jax.jvp(jax.grad(loss, (0, 1)), point, direction)[1]
        return forward_over_reverse, jax.grad(slope, (0, 1))(*point)

    assert_same(products(ours), products(theirs))


@every_layer
def test_jacobians(name, x64):
    """`jacfwd` and `jacrev` map the rules over a batch of directions."""
    ours, theirs, (params, x), _, _ = both(name, False)
    few = x[:2, :2, :1]

    @partial(jax.jit, static_argnums=0)
    def jacobians(f):
        f = partial(f, params)
        return jax.jacfwd(f)(few), jax.jacrev(f)(few)

    assert_same(jacobians(ours), jacobians(theirs))


def test_derivatives_of_a_standardized_kernel(x64):
    rng = np.random.default_rng(0)
    kernel, direction = (jnp.asarray(rng.normal(size=(3, 3, 4, 5))) for _ in range(2))

    def by_definition(w):
        fan_in = w.shape[0] * w.shape[1] * w.shape[2]
        mean = w.mean((0, 1, 2), keepdims=True)
        var = ((w - mean) ** 2).sum((0, 1, 2), keepdims=True) / (fan_in - 1)
        return (w - mean) / jnp.sqrt(var + EPSILON)

    def derivatives(f):
        def loss(w):
            return jnp.sum(jnp.sin(f(w)))

        return jax.jvp(f, (kernel,), (direction,)), jax.jvp(jax.grad(loss), (kernel,), (direction,))

    assert_same(derivatives(standardize_kernel), derivatives(by_definition))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_layer
def test_the_gradient_of_a_narrow_input_is_rounded_once(name, dtype):
    """Each value lies within half a rounding of the exact gradient of the very same input."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(m, s, (2, 16, 16, 32)), dtype) for m, s in ((3, 2), (0, 1)))
    layer = LAYERS[name].clone(dtype=dtype)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def gradient(x, dy):
        def call(x):
            return layer.apply(variables, x, mutable=["batch_stats"])[0]

        return jax.vjp(call, x)[1](dy)[0]

    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(v, jnp.float64) for v in (x, dy))
        params = jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), variables["params"])
        stats = variables.get("batch_stats", {})
        call = partial(definition, name, params, stats, mask=None)
        exact = np.asarray(jax.vjp(lambda x: call(x=x), wide[0])[1](wide[1])[0])
    error = np.abs(np.asarray(gradient(x, dy), np.float64) - exact)
    # The sums are in float32: 32 of its roundings of the largest value are beyond any of them.
    allowed = eps(dtype) / 2 * np.abs(exact) + 32 * eps(np.float32) * np.abs(exact).max()
    assert (error <= np.maximum(allowed, np.finfo(np.float16).tiny)).all()


def test_only_wide_carries_the_derivative(x64):
    """So the gradients of several uses of `x` add up before they are rounded."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)))

    def loss(x, wide):
        m = moments(x, wide=wide)
        y = apply(Affine(m.var, m.mean), x, origin=m.origin, wide=wide)
        return jnp.sum(jnp.sin(y))

    of_x, of_wide = jax.grad(loss, (0, 1))(x, x)
    assert (of_x == 0).all()
    assert_same(of_wide, jax.grad(lambda x: loss(x, x))(x))


@every_layer
def test_what_is_kept_for_the_backward_pass_has_the_inputs_type(name):
    x = jnp.ones((2, 16, 16, 32), jnp.bfloat16)
    layer = LAYERS[name].clone(dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)

    def residuals(params, x):
        def call(params, x):
            return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        return jax.tree.leaves(jax.vjp(call, params, x, has_aux=True)[1])

    jaxpr = jax.make_jaxpr(residuals)(variables["params"], x).jaxpr
    large = {id(v): v.aval.dtype for v in jaxpr.outvars if v.aval.size >= x.size}
    assert list(large.values()) == [jnp.bfloat16]


def test_of_a_standardized_kernel_only_the_kernel_is_kept():
    """In its own type: nothing in float32 beside a narrow one."""
    kernel = jnp.ones((3, 3, 8, 16), jnp.bfloat16)

    def residuals(kernel):
        return jax.tree.leaves(jax.vjp(standardize_kernel, kernel)[1])

    jaxpr = jax.make_jaxpr(residuals)(kernel).jaxpr
    large = {id(v): v.aval.dtype for v in jaxpr.outvars if v.aval.size >= kernel.size}
    assert list(large.values()) == [jnp.bfloat16]
