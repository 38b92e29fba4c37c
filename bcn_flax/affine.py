"""The algebra of normalization: moments in, affine maps out.

A normalization layer never needs the activation itself to decide what to do with it. It needs the
mean and the variance of each channel of each sample, `Moments`, and what it decides is one scale
and one offset for each, `Affine`. Both are small, `(n, c)`, and affine maps compose, so that any
stack of normalizations reads `x` once to measure it and once to write the result:

    m = moments(x)                                             # one pass over x
    f = standardize(pool_batch(m), epsilon, m.origin)          # batch norm
    g = standardize(pool_groups(push(f, m), groups), epsilon)  # a group norm of what f would give
    y = apply(chain(f, spread(g, c)), centered(x, m.origin))   # one pass over x

Three laws carry this. The law of total variance pools moments, `push` knows the moments of `f(x)`
without computing `f(x)`, and `chain` is associative.

Means are measured, and maps applied, from an origin near the data. Far from it, where a mean is
large beside the deviations from it, every sum and product would round the deviations away.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

MOMENTS = "moments"
"""The name under which `jax.checkpoint` knows the moments of a layer's input.

With the policy `jax.checkpoint_policies.save_only_these_names(MOMENTS)` a rematerialized block
keeps them, `(n, c)` numbers, and does not measure its input a second time.
"""


class Moments(NamedTuple):
    """Mean and (biased) variance of each channel of each sample.

    Attributes:
        mean: measured from `origin`: small, and precise, where the origin is near.
        var: around the mean.
        size: the number of values they were taken of, and so their weight when they are pooled: a
            plain integer where it is the same for all.
        origin: a constant, without derivative.
    """

    mean: Float[Array, "n c"]
    var: Float[Array, "n c"]
    size: Float[Array, "n c"] | int = 1
    origin: Float[Array, "n c"] | float = 0.0

    @property
    def mean_from_zero(self) -> Array:
        """The mean as such."""
        return self.origin + self.mean


class Affine(NamedTuple):
    """The map `x -> scale * x + offset`, one for each channel of each sample.

    Where `x` was measured from an origin, it is a map of `x - origin`: see `centered`.
    """

    scale: Float[Array, "n c"]
    offset: Float[Array, "n c"]


PerChannel = TypeVar("PerChannel", Moments, Affine)


def widen(x: Array) -> Array:
    """`x` in float32, or as it is where it is already as wide: the precision of all arithmetic.

    Where `moments` and `apply` both read half-precision data, widen it once, before them, so that
    its gradient adds up in full precision and is rounded once.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def moments(
    x: Float[Array, "n *space c"], axis: int = -1, mask: Bool[Array, "..."] | None = None
) -> Moments:
    """Measure each channel of each sample: `E[x]` and `E[(x - E[x])^2]` over its space.

    Both are taken from an origin `o`, `E[x - o]` and `E[(x - o)^2] - E[x - o]^2`: any `o` is exact
    on paper and has the exact derivatives, and one near the data keeps the digits that
    `E[x^2] - E[x]^2` loses when the mean is large. Here `o` is the mean of a coarse grid of each
    channel's values, one in 64 or more. So it lies within `sqrt(64 - 1)` standard deviations of the
    mean of them all, wherever the outliers are, and the difference loses 6 bits at the very worst.

    Args:
        x: any number of space axes, none included; the first axis counts samples.
        axis: the channel axis.
        mask: true where a value counts; one axis for each of `x`'s, of the same length or 1. The
            origin is then the mean itself, at the cost of one more pass over `x`.

    Returns:
        Moments in float32, or wider where `x` is. Mean and variance are 0 where nothing counts.
    """
    space = tuple(i for i in range(1, x.ndim) if i != axis % x.ndim)
    x = widen(x)
    size: Array | int
    if mask is None:
        size = math.prod(x.shape[i] for i in space)
        near = jnp.mean(_coarse_grid(x, space), space, keepdims=True)
    else:
        # A masked value may be anything, NaN included: it is replaced before any arithmetic.
        mask = jnp.broadcast_to(mask, x.shape)
        size = jnp.sum(mask, space, keepdims=True, dtype=x.dtype)
        x = jnp.where(mask, x, 0)
        near = jnp.sum(x, space, keepdims=True) / jnp.maximum(size, 1)
    n, c = x.shape[0], x.shape[axis]
    origin = checkpoint_name(_constant(near).reshape(n, c), MOMENTS)

    def average(values: Array) -> Array:
        counted = values if mask is None else jnp.where(mask, values, 0)
        return jnp.sum(counted, space, keepdims=True) / jnp.maximum(size, 1)

    # Checkpointed, it keeps `x` for the backward pass and not the deviations beside it.
    @jax.checkpoint
    def second_moment(x: Array, origin: Array) -> Array:
        return average(jnp.square(centered(x, origin, axis)))

    # Every pass over `x` has its own copy of the origin, and so its own deviations: those that two
    # sums share, XLA on CPU would write to memory.
    for_second = _once(origin)
    sums = average(centered(x, origin, axis)), second_moment(x, for_second)
    mean, second = map(_once, checkpoint_name(sums, MOMENTS))
    var = _not_negative(second - jnp.square(mean))
    return Moments(
        mean.reshape(n, c),
        var.reshape(n, c),
        size if mask is None else jnp.reshape(size, (n, c)),
        _once(for_second),
    )


def pool_batch(
    m: Moments,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """The moments of each channel over all samples, and over all devices of `axis_name`.

    Returns:
        Moments of shape `(1, c)`. Samples and devices weigh by the size of their moments, so that
        unequal masks are exact. Mean and variance are 0 where nothing counts.
    """

    def total(*values: Array) -> list[Array]:
        sums = [jnp.sum(v, axis=0, keepdims=True) for v in values]
        if axis_name is None:
            return sums
        return lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)

    return _pool(m, total)


def pool_groups(m: Moments, num_groups: int) -> Moments:
    """The moments of each group of consecutive channels, for each sample: `(n, num_groups)`."""

    def split(values: Array) -> Array:
        return values.reshape(values.shape[0], num_groups, -1)

    def total(*values: Array) -> list[Array]:
        return [jnp.sum(v, axis=-1, keepdims=True) for v in values]

    origin = jnp.broadcast_to(m.origin, m.mean.shape)
    pooled = _pool(Moments(*map(split, (m.mean, m.var, _weight(m), origin))), total)
    return jax.tree.map(lambda values: values[..., 0], pooled)


def standardize(m: Moments, epsilon: float, origin: Array | float = 0.0) -> Affine:
    """The map that gives mean 0 and variance `var / (var + epsilon)`, nearly 1.

    Args:
        m: by which to standardize.
        epsilon: added to the variance.
        origin: from which the values to be mapped are measured.
    """
    # Not rsqrt, whose derivative goes with var ** -1.5 and is 0 in float32 from values of 1e13 on.
    scale = 1 / jnp.sqrt(m.var + epsilon)
    return Affine(scale, ((origin - m.origin) - m.mean) * scale)


def push(f: Affine, m: Moments) -> Moments:
    """The moments of `f(x)`, from the moments of `x`, from whose origin `f` maps."""
    return Moments(f.scale * m.mean + f.offset, jnp.square(f.scale) * m.var, m.size)


def chain(f: Affine, g: Affine) -> Affine:
    """First `f`, then `g`, as one map."""
    return Affine(g.scale * f.scale, g.scale * f.offset + g.offset)


def spread(of_groups: PerChannel, channels: int) -> PerChannel:
    """One for each group, `(n, groups)`, as one for each channel, `(n, channels)`."""
    return jax.tree.map(lambda v: jnp.repeat(v, channels // v.shape[1], axis=1), of_groups)


def centered(x: Array, origin: Array | float, axis: int = -1) -> Array:
    """`x - origin`, one origin for each channel of each sample."""
    return x - (_like(origin, x, axis) if isinstance(origin, Array) else origin)


def apply(
    f: Affine, x: Float[Array, "n *space c"], axis: int = -1, dtype: DTypeLike | None = None
) -> Float[Array, "n *space c"]:
    """Write `f.scale * x + f.offset`, computed in `f`'s precision and rounded once, to `dtype`.

    Args:
        f: one map for each channel of each sample, `(n, c)`, or of all samples, `(1, c)`.
        x: any number of space axes, none included; the first axis counts samples.
        axis: the channel axis.
        dtype: of the result; None is that of `x`.
    """
    scale, offset = (_like(_once(values), x, axis) for values in f)
    return (scale * x + offset).astype(dtype or x.dtype)


def _pool(m: Moments, total: Callable[..., list[Array]]) -> Moments:
    """The law of total variance, `Var = E[var] + Var[mean]`: a sum of positive terms only.

    `total` adds up, in each of the arrays that it is given, whatever is to be pooled.
    """
    weight = _weight(m)
    size, weighted = total(weight, weight * m.mean_from_zero)
    # The mean, but for its rounding, from which the means to be pooled do not lie far.
    origin = _constant(weighted / jnp.maximum(size, 1))
    deviation = (m.origin - origin) + m.mean
    first, second = total(weight * deviation, weight * (m.var + jnp.square(deviation)))
    mean, second = (values / jnp.maximum(size, 1) for values in (first, second))
    return Moments(mean, _not_negative(second - jnp.square(mean)), size, origin)


def _constant(near: Array) -> Array:
    """An origin near `near`: finite, and without derivative.

    It is computed once, for a compiler that computes it again may leave out a rounding that it made
    elsewhere, as in a fused multiply-add: what is measured from one origin would be mapped from
    another.
    """
    near = lax.stop_gradient(near)
    # One value that is not finite must not take those around it along.
    return _once(jnp.where(jnp.isfinite(near), near, 0))


def _once(values: Array) -> Array:
    """`values`, computed once, and their gradient too.

    XLA on CPU moves small numbers into the loops over `x` that use them: all of the algebra above
    would be done again for each element. What it takes for expensive, as a division, stays outside.
    This one divides by 1, which the compiler does not see.
    """
    one = (values == values) | (values != values)
    return values / one.astype(values.dtype)


def _weight(m: Moments) -> Array:
    """The size of each of the moments, in their own precision."""
    return jnp.broadcast_to(jnp.asarray(m.size, m.mean.dtype), m.mean.shape)


def _coarse_grid(x: Array, space: Sequence[int]) -> Array:
    """Of each channel at least 64 values, if it has them, and 1 in 64, evenly spread."""
    spacing = round(64 ** (1 / max(len(space), 1)))
    strides = [1] * x.ndim
    for i in space:
        if isinstance(x.shape[i], int):  # and not symbolic, as in an export for any size
            strides[i] = min(spacing, -(-x.shape[i] // spacing))
    # Begin in the middle of the first cell: the very edge of an image is often unlike the rest.
    return lax.slice(x, [stride // 2 for stride in strides], x.shape, strides)


def _not_negative(var: Array) -> Array:
    """Clamp at 0 what rounding made negative, leaving every derivative as it is."""
    return var + lax.stop_gradient(jnp.maximum(-var, 0))


def _like(values: Array, x: Array, axis: int) -> Array:
    """Lay `(n, c)` numbers out along the axes of `x`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = values.shape
    return values.reshape(shape)
