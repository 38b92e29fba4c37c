"""What narrows is computed in float64: the result is that of the same function without casts."""

from functools import partial

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.interpreters import mlir

from bcn_flax.parity import widening

X = np.random.default_rng(0).normal(size=(5, 5))
IMAGE = np.random.default_rng(1).normal(size=(1, 4, 4, 2))


def in_image(compute):
    """A function of an image, as one of `X`."""
    return lambda x, dtype: compute((IMAGE + x[0, 0]).astype(dtype))


def scanned(x, dtype):
    carry, rows = lax.scan(lambda c, row: (c * row.astype(dtype), c), x[0].astype(dtype), x)
    return carry, rows


def looped(x, dtype):
    return lax.fori_loop(0, 3, lambda i, y: jnp.sin(y) * 1.1, x.astype(dtype))


def chosen(x, dtype):
    return lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x.astype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def doubled(x, dtype):
    return 2 * x


doubled.defvjp(
    lambda x, dtype: (2 * x, None),
    lambda dtype, _, dy: (2 * dy.astype(dtype).astype(dy.dtype),),
)

# By name, a function of an array of float64 that computes in a dtype.
FUNCTIONS = {
    "a cast": lambda x, dtype: x.astype(dtype) / 3,
    "several casts": lambda x, dtype: (x.astype(dtype) / 3).astype(jnp.float64).astype(dtype),
    "an epsilon": lambda x, dtype: x / jnp.sqrt((x**2).mean(dtype=dtype) + 1e-5),
    "a whole number": lambda x, dtype: x[0].astype(dtype) * jnp.arange(5) / 7,
    "numbers in order": lambda x, dtype: x[0] * jnp.linspace(0, 0.7, 5, dtype=dtype),
    "softmax": lambda x, dtype: jax.nn.softmax(x.astype(dtype)),
    "GELU": lambda x, dtype: jax.nn.gelu(x.astype(dtype), approximate=False),
    "tanh GELU": lambda x, dtype: jax.nn.gelu(x.astype(dtype)),
    "relu": lambda x, dtype: jax.nn.relu(x.astype(dtype) - 0.1) / 3,
    "a gradient of one's own": lambda x, dtype: doubled(x, dtype) / 3,
    "a matrix product": lambda x, dtype: jnp.matmul(x, x, preferred_element_type=dtype),
    "a stated algorithm": lambda x, dtype: lax.dot(
        x.astype(dtype),
        x.astype(dtype),
        precision="F32_F32_F32" if dtype == jnp.float32 else None,
    ),
    "a convolution": in_image(
        lambda x: (
            lax.conv_general_dilated(
                x,
                jnp.ones((2, 2, 2, 3), x.dtype),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            / 3
        )
    ),
    "the largest": in_image(lambda x: nn.max_pool(x, (2, 2), (2, 2)) / 3),
    "sums": in_image(lambda x: nn.avg_pool(x, (2, 2), (1, 1)) / 3),
    "a loop over rows": scanned,
    "a loop": looped,
    "a choice": chosen,
    "recomputation": lambda x, dtype: jax.checkpoint(jnp.sin)(x.astype(dtype)),
    "a compiled part": lambda x, dtype: jax.jit(jnp.sin)(x.astype(dtype)),
    "a system of equations": lambda x, dtype: jnp.linalg.solve(
        (x + 9 * jnp.eye(5)).astype(dtype), x[0].astype(dtype)
    ),
    "values put in": lambda x, dtype: x.astype(dtype).at[0].add(0.1) / 3,
    "values taken out": lambda x, dtype: jnp.take(x.astype(dtype), jnp.array([0, 2]), axis=0) / 3,
    "values in order": lambda x, dtype: jnp.sort(x.astype(dtype)) / 3,
    "fewer digits": lambda x, dtype: (
        (lax.reduce_precision(x.astype(dtype), 8, 10) if dtype != jnp.float64 else x) / 3
    ),
}


def all_of(x, dtype):
    """The values of all functions, and their gradients."""

    def of_one(function):
        value, pullback = jax.vjp(lambda x: function(x, dtype), x)
        return value, pullback(jax.tree.map(jnp.ones_like, value))

    return {name: of_one(function) for name, function in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def results():
    with jax.enable_x64(True):
        wide = jax.jit(lambda x: all_of(x, jnp.float64))(X)
        narrow = jax.jit(lambda x: all_of(x, jnp.float32))(X)
        widened = jax.jit(widening.widened(lambda x: all_of(x, jnp.float32)))(X)
    return wide, narrow, widened


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.float64(x) - np.float64(y)).max()) for x, y in pairs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_narrows_is_computed_in_float64(name, results):
    wide, narrow, widened = (result[name] for result in results)
    assert {x.dtype for x in jax.tree.leaves(widened)} == {np.dtype(np.float64)}
    assert distance(widened, wide) < 1e-13
    assert distance(narrow, wide) > 1e-10  # it does narrow


def test_what_depends_on_the_bits_is_computed_as_it_is_written():
    def sign_bits(x):
        return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) >> 31

    with jax.enable_x64(True):
        np.testing.assert_array_equal(widening.widened(sign_bits)(X), (X < 0).astype(np.uint32))


def constant(value, dtype):
    """A constant of a dtype as the program in float64 has it."""
    with jax.enable_x64(True):
        return float(widening.widened(lambda x: x.astype(dtype) * dtype(value))(np.float64(1)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [1e-5, 0.1, 3.0, 0.044, -0.375, 255.0, 0.0, np.inf])
def test_a_decimal_constant_is_not_rounded(value, dtype):
    assert constant(value, dtype) == value


@pytest.mark.parametrize("value", [2**0.5, (2 / np.pi) ** 0.5, -np.pi / 3, 1 / 7, np.log(2)])
def test_a_constant_of_a_formula_is_not_rounded(value):
    assert constant(value, jnp.float32) == pytest.approx(value, rel=1e-15)


def test_any_other_constant_stays_as_it_is():
    assert constant(0.12345678, jnp.float32) == float(np.float32(0.12345678))


def test_a_constant_of_half_precision_that_may_be_many_numbers_is_refused():
    message = (
        r"^constant 0.796875 has been rounded to bfloat16, and what it was before is not known"
    )
    with pytest.raises(widening.WideningError, match=message):
        constant((2 / np.pi) ** 0.5, jnp.bfloat16)


class Inner(nn.Module):
    """Its layer has a dtype that nobody can pass."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, dtype=jnp.bfloat16, name="dense")(x.astype(self.dtype)) + 1e-3


class Outer(nn.Module):
    inner: nn.Module

    def __call__(self, x):
        return jax.nn.gelu(self.inner(x))


def test_the_dtypes_of_linen_are_replaced_and_the_module_is_left_alone():
    inner = Inner()
    with jax.enable_x64(True):
        variables = {"params": {"inner": {"dense": {"kernel": X[:, :3], "bias": X[0, :3]}}}}
        compute = widening.wide_dtypes(Outer(inner).apply)
        actual = compute(variables, X)
    np.testing.assert_allclose(actual, jax_gelu(X @ X[:, :3] + X[0, :3] + 1e-3), rtol=1e-12)
    assert inner.dtype == jnp.float32


def jax_gelu(x):
    with jax.enable_x64(True):
        return np.asarray(jax.nn.gelu(jnp.asarray(x)))


def test_the_dtypes_of_nnx_are_replaced():
    module = nnx.Sequential(nnx.Linear(2, 2, dtype=jnp.float16, rngs=nnx.Rngs(0)), jnp.tanh)
    widening.set_wide_dtypes(module)
    assert module.layers[0].dtype == jnp.float64
    assert module.layers[0].param_dtype == jnp.float32


only_float32 = jax.extend.core.Primitive("only_float32")


@only_float32.def_abstract_eval
def _(x):
    if x.dtype != np.float32:
        raise TypeError(f"takes float32 only, but got {x.dtype}")
    return x


mlir.register_lowering(only_float32, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))


def test_an_operation_of_one_type_alone_is_named():
    compute = widening.widened(lambda x: only_float32.bind(x.astype(jnp.float32)))
    message = "^only_float32 cannot be computed in float64: takes float32 only, but got float64"
    with jax.enable_x64(True), pytest.raises(widening.WideningError, match=message):
        jax.make_jaxpr(compute)(X)
