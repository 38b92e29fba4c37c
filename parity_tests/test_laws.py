"""The laws of the algebra hold for any shape, axis and data."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcn_flax import affine
from bcn_flax.affine import Affine
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("x64")

# In float64 the data stay within 100 standard deviations of 0 and a variance is a difference of
# squares: 1e4 ulps of its terms, with room for the number of terms.
ULPS = 1e5

# Few shapes, of any rank and with sizes of 1 and odd ones: every new one is compiled.
SHAPES = [(1, 1), (5, 2), (2, 5, 1), (1, 2, 5), (5, 1, 2, 2), (2, 5, 2, 5), (2, 2, 1, 5, 2)]
seeds = st.integers(0, 2**32 - 1)


@st.composite
def activations(draw, min_space=0):
    """`x` of any rank, in float64, with a mean and a size of its own in every channel."""
    shape = draw(st.sampled_from([s for s in SHAPES if len(s) >= 2 + min_space]))
    rng = np.random.default_rng(draw(seeds))
    mean, std = rng.uniform(-10, 10, shape[-1:]), rng.uniform(0.1, 3, shape[-1:])
    return mean + std * rng.standard_normal(shape)


moments, apply = affine.moments, affine.apply
pool_batch, pool_groups = affine.pool_batch, affine.pool_groups


def maps(rng, n, c):
    return Affine(jnp.asarray(rng.uniform(-2, 2, (n, c))), jnp.asarray(rng.normal(size=(n, c))))


def space_of(x):
    return tuple(range(1, x.ndim - 1))


class Expected(NamedTuple):
    """Moments computed by NumPy."""

    mean_from_zero: np.ndarray
    var: np.ndarray
    weight: int | np.ndarray


def assert_same_moments(actual, expected):
    actual, expected = ((m.mean_from_zero, m.var, m.weight) for m in (actual, expected))
    scale = 1 + np.square(expected[0]).max() + np.max(expected[1])
    for a, e, name in zip(actual, expected, ("mean", "var", "weight"), strict=True):
        a, e = np.broadcast_arrays(a, e)
        assert_close(a, e, ulps=ULPS, dtype=np.float64, scale=scale, name=name)


def mapped(f, x, m, axis=-1):
    """`f`, a map of deviations from the origin of `m`, applied to `x`."""
    return apply(f, jnp.asarray(x), axis, origin=m.origin)


@given(activations())
def test_moments_are_numpys(x):
    expected = Expected(x.mean(space_of(x)), x.var(space_of(x)), np.prod(x.shape[1:-1]))
    assert_same_moments(moments(x), expected)


@given(activations(), st.data())
def test_moments_and_apply_take_any_channel_axis(x, data):
    axis = data.draw(st.sampled_from([a for a in range(-x.ndim, x.ndim) if a % x.ndim]))
    f = maps(np.random.default_rng(0), x.shape[0], x.shape[-1])
    moved = np.moveaxis(x, -1, axis)
    assert_same_moments(moments(moved, axis), moments(x))
    # The compiler may fuse the product and the sum of one, and not of the other.
    x = jnp.asarray(x)
    scale = np.abs(x).max() + np.abs(f.offset).max()
    expected = np.moveaxis(apply(f, x), -1, axis)
    assert_close(apply(f, moved, axis), expected, ulps=2, dtype=np.float64, scale=scale)


@given(activations(), seeds)
def test_push_gives_the_moments_of_the_applied_map(x, seed):
    f = maps(np.random.default_rng(seed), x.shape[0], x.shape[-1])
    m = moments(x)
    pushed = affine.push(f, m)
    assert_same_moments(moments(mapped(f, x, m)), pushed)


@given(st.sampled_from([(1, 1), (5, 2), (2, 5)]), seeds)
def test_chain_is_associative_and_reads_in_order(shape, seed):
    (n, c), rng = shape, np.random.default_rng(seed)
    f, g, h = (maps(rng, n, c) for _ in range(3))
    x = jnp.asarray(rng.normal(size=(n, c)))
    left = affine.chain(affine.chain(f, g), h)
    right = affine.chain(f, affine.chain(g, h))
    in_order = apply(h, apply(g, apply(f, x)))
    for a, b in [*zip(left, right, strict=True), (apply(left, x), in_order)]:
        assert_close(a, b, ulps=100, dtype=np.float64, scale=1 + np.abs(np.asarray(b)).max())


@given(activations())
def test_pooled_batch_is_the_moments_of_the_pooled_values(x):
    all_axes = tuple(range(x.ndim - 1))
    expected = Expected(x.mean(all_axes)[None], x.var(all_axes)[None], np.prod(x.shape[:-1]))
    assert_same_moments(pool_batch(moments(x)), expected)


@given(activations(), st.integers(1, 4))
def test_pooled_groups_are_the_moments_of_the_pooled_values(x, groups):
    x = np.concatenate([x * (i + 1) for i in range(groups)], axis=-1)
    n, size = x.shape[0], x.shape[-1] // groups
    grouped = np.moveaxis(x.reshape(n, -1, groups, size), 2, 1).reshape(n, groups, -1)
    expected = Expected(grouped.mean(-1), grouped.var(-1), grouped.shape[-1])
    assert_same_moments(pool_groups(moments(x), groups), expected)


@given(activations(min_space=1), st.sampled_from([0, 1, -1]), seeds)
def test_masked_moments_are_those_of_the_values_that_count(x, masked_axis, seed):
    """Masked values may be anything, and the mask may vary along any axis."""
    rng = np.random.default_rng(seed)
    shape = [1] * x.ndim
    shape[masked_axis] = x.shape[masked_axis]
    mask = np.broadcast_to(rng.random(shape) < 0.6, x.shape)
    masked = np.ma.array(x, mask=~mask)
    expected = Expected(
        masked.mean(space_of(x)).filled(0),
        masked.var(space_of(x)).filled(0),
        mask.sum(space_of(x)),
    )
    hidden = np.where(mask, x, np.nan)
    m = moments(jnp.asarray(hidden), mask=jnp.asarray(mask))
    assert_same_moments(m, expected)
    pooled = pool_batch(m)
    over = tuple(range(x.ndim - 1))
    assert_same_moments(
        pooled,
        Expected(
            masked.mean(over).filled(0)[None],
            masked.var(over).filled(0)[None],
            mask.sum(over)[None],
        ),
    )


@given(activations())
def test_standardize_gives_mean_0_and_variance_1(x):
    m = moments(x)
    standardized = affine.push(affine.standardize(m, 1e-5, m.origin), m)
    scale = 1 + np.abs(np.asarray(m.mean)).max() / np.sqrt(1e-5)
    assert_close(standardized.mean, np.zeros_like(m.mean), ulps=10, dtype=np.float64, scale=scale)
    assert_close(standardized.var, m.var / (m.var + 1e-5), ulps=10, dtype=np.float64)


def variance(v):
    return moments(v).var


def definition_of_variance(v):
    return jnp.var(v, axis=space_of(v))


@partial(jax.jit, static_argnums=0)
def derivatives(variance, x, direction):
    """The first and second ones of a function of the variance."""
    gradient = jax.grad(lambda v: jnp.sum(jnp.sin(variance(v))))
    return jax.jvp(gradient, (x,), (direction,))


@given(activations(min_space=1))
def test_the_origin_has_no_derivative_of_its_own(x):
    """First and second derivatives of the variance are those of its definition."""
    direction = np.random.default_rng(1).normal(size=x.shape)
    scale = 1 + np.square(x).max()
    actual, expected = (derivatives(f, x, direction) for f in (variance, definition_of_variance))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, ulps=ULPS, dtype=np.float64, scale=scale)


def test_the_clamp_leaves_the_derivatives_of_a_constant_channel():
    """At variance 0, the second derivative is that of the variance, not of the clamp."""
    x = jnp.full((1, 5, 1), 7.0)
    hessian = jax.jit(jax.hessian(lambda v: moments(v).var.sum()))(x).reshape(5, 5)
    expected = 2 / 5 * (np.eye(5) - 1 / 5)
    assert_close(hessian, expected, ulps=100, dtype=np.float64)


@pytest.mark.parametrize(
    ("var", "clamped"), [(-1e-9, 0.0), (0.0, 0.0), (2.0, 2.0), (jnp.inf, jnp.inf)]
)
def test_a_variance_that_rounding_made_negative_is_0(var, clamped):
    """The clamp is for sums of very many terms, whose rounding errors may exceed the bound."""
    value, slope = jax.value_and_grad(affine._clamp_at_zero)(var)
    assert value == clamped
    assert slope == 1
