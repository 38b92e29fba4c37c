"""The algebra of normalization: moments in, affine maps out.

A normalization layer is a function from the mean and variance of each channel of each sample,
`Moments`, to one scale and one offset for each, `Affine`. Both are small, `(n, c)`, and affine maps
compose. So any stack of normalizations reads `x` once to measure it and once to map it:

    m = moments(x)                                                   # one pass over x
    f = standardize(pool_batch(m), epsilon, m.origin)                # batch norm
    g = standardize(pool_groups(push(f, m), groups), epsilon)        # group norm of f(x)
    y = apply(chain(f, per_channel(g, m.mean)), x, origin=m.origin)  # one pass over x

Three laws make this possible: the law of total variance pools moments, `push` gives the moments of
`f(x)` without computing `f(x)`, and `chain` is associative.

Means and maps are relative to an origin near the data. If a mean is large compared with the
deviations from it, sums and products relative to 0 would round the deviations away.

All arithmetic is in float32 or wider. The two passes over `x` are in `bcn_flax.passes`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bcn_flax import passes
from bcn_flax.passes import widen
from bcn_flax.space import explicit_sharding, reshard_like

Number = float | Float[Array, ""]
"""A number, traced or not."""

MOMENTS = "moments"
"""The `checkpoint_name` of the moments of a layer's input.

With the policy `jax.checkpoint_policies.save_only_these_names(MOMENTS)` a rematerialized block
saves these `(n, c)` numbers and does not measure its input a second time.
"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "var", "origin", "counts"],
    meta_fields=["size"],
)
@dataclass(frozen=True)
class Moments:
    """Mean and (biased) variance of each channel of each sample.

    Attributes:
        mean: relative to `origin`; small, and so precise, if the origin is near.
        var: around the mean.
        size: the number of values per mean: an integer, or a symbolic dimension in `jax.export`.
        origin: a constant, without derivative.
        counts: the number of values per mean that the mask keeps; None without a mask.
    """

    mean: Float[Array, "*n c"]
    var: Float[Array, "*n c"]
    size: Any = 1
    origin: Float[Array, "*n c"] | Number = 0.0
    counts: Float[Array, "*n c"] | None = None

    @property
    def mean_from_zero(self) -> Array:
        """The mean relative to 0."""
        return self.origin + self.mean

    @property
    def weight(self) -> Any:
        """The number of values that count, which weighs each mean and variance in a pool."""
        return self.size if self.counts is None else self.counts


class Affine(NamedTuple):
    """The map `x -> scale * x + offset`, one for each channel of each sample.

    If `x` was measured relative to an origin, it is a map of `x - origin`: see `apply`.
    """

    scale: Float[Array, "n c"]
    offset: Float[Array, "n c"]


PerGroup = TypeVar("PerGroup", Array, Affine)


@partial(jax.jit, static_argnames="axis")
def moments(
    x: Float[Array, "n *space c"],
    axis: int = -1,
    mask: Bool[Array, "..."] | None = None,
    wide: Float[Array, "n *space c"] | None = None,
) -> Moments:
    """Mean and variance of each channel of each sample over its space axes.

    `E[x - o]` and `E[(x - o)^2] - E[x - o]^2`, with an origin `o`. In exact arithmetic any `o`
    gives the same variance and derivatives; an `o` near the data keeps the digits that
    `E[x^2] - E[x]^2` loses if the mean is large. Here `o` is the mean of a coarse grid of each
    channel, at least one value in 64. So it lies within `sqrt(64 - 1)` standard deviations of the
    channel's mean, whatever the outliers, and the subtraction loses 6 bits at worst.

    Args:
        x: any number of space axes, including none; the first axis counts samples.
        axis: the channel axis.
        mask: true where a value counts; as many axes as `x`, each of the same length or 1. The
            origin is then the exact mean, which takes one more pass over `x`.
        wide: `widen(x)`, which receives the gradient. Give the same array to `apply`: both
            gradients of `x` then add up in full precision and are rounded once.

    Returns:
        Moments in float32, or in the dtype of `x` if wider. Without any value that counts, mean and
        variance are 0. If squares overflow, the variance is infinite: of `n` values in float32
        from a standard deviation of 1.8e19 / sqrt(n) on, at the earliest from an 8th of it.
    """
    space = tuple(i for i in range(1, x.ndim) if i != axis % x.ndim)
    size = math.prod(x.shape[i] for i in space)
    if mask is None:
        counts = None
        center = jnp.mean(widen(_coarse_grid(x, space)), space)
    else:
        # A masked value may be NaN, so it is replaced before any arithmetic.
        mask = jnp.broadcast_to(mask, x.shape)
        counts = jnp.sum(mask, space, dtype=widen(x).dtype)
        center = jnp.sum(widen(jnp.where(mask, x, 0)), space) / jnp.maximum(counts, 1)
    origin = checkpoint_name(_constant_origin(center), MOMENTS)
    total, squares = passes.measure(x, widen(x) if wide is None else wide, origin, mask, axis)
    sums = checkpoint_name((_zero_if_huge(total), squares), MOMENTS)
    divisor = size if counts is None else jnp.maximum(counts, 1)
    mean, second = (s / divisor for s in sums)
    return Moments(mean, _variance(mean, second), size, origin, counts)


@partial(jax.jit, static_argnames=("axis_name", "axis_index_groups"))
def pool_batch(
    m: Moments,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """The moments of each channel over all samples, and over all devices of `axis_name`.

    Args:
        m: moments of each channel of each sample, `(n, c)`.
        axis_name: an axis of `vmap`, `shard_map` or `pmap`.
        axis_index_groups: groups of devices of that axis that pool among themselves, as tuples.

    Returns:
        Moments of shape `(1, c)`. Each sample and device is weighted by the number of its values
        that count, so that unequal masks are exact. Without any, mean and variance are 0.
    """

    def total(values: Sequence[Array]) -> list[Array]:
        sums = [jnp.sum(v, axis=0, keepdims=True) for v in values]
        if axis_name is None:
            return sums
        return lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)

    devices = (
        1 if axis_name is None else lax.psum(1, axis_name, axis_index_groups=axis_index_groups)
    )
    return _pool(m, total, m.mean.shape[0] * devices)


@partial(jax.jit, static_argnames="num_groups")
def pool_groups(m: Moments, num_groups: int) -> Moments:
    """The moments of each group of consecutive channels, for each sample: `(n, num_groups)`."""
    n, channels = m.mean.shape

    def split(values: Array | float) -> Array | float:
        if isinstance(values, float) or values.ndim == 0:
            return values
        return jnp.reshape(_unsplit_groups(values, num_groups), (n, num_groups, -1))

    def total(values: Sequence[Array]) -> list[Array]:
        return [jnp.sum(v, axis=-1, keepdims=True) for v in values]

    pooled = _pool(jax.tree.map(split, m), total, channels // num_groups)
    return jax.tree.map(lambda values: jnp.squeeze(values, -1), pooled)


def standardize(
    m: Moments, epsilon: Number, origin: Array | float = 0.0, learned: Affine | None = None
) -> Affine:
    """The map that gives mean 0 and variance `var / (var + epsilon)`, nearly 1.

    Args:
        m: the moments to standardize with.
        epsilon: added to the variance.
        origin: the origin of the values to be mapped.
        learned: a map to follow.
    """
    scale = inverse_root(m.var + epsilon)
    f = Affine(scale, ((origin - m.origin) - m.mean) * scale)
    f = f if learned is None else chain(f, learned)
    return f._replace(scale=constant_where_infinite(f.scale, m.var))


def constant_where_infinite(scale: Array, var: Array) -> Array:
    """`scale`, without derivative where `var` is infinite.

    The derivative there is a sum over values so large that it may overflow. Its product with a
    scale of 0 would be NaN.
    """
    return jnp.where(jnp.isinf(var), lax.stop_gradient(scale), scale)


def push(f: Affine, m: Moments) -> Moments:
    """The moments of `f(x)`, relative to 0, from those of `x`; `f` and `m` share their origin."""
    # An infinite variance stays so, and has no derivative; but 0 times it is 0.
    var = jnp.square(f.scale) * jnp.minimum(m.var, jnp.finfo(m.var.dtype).max)
    infinite = jnp.where(jnp.isinf(m.var) & (f.scale != 0), jnp.inf, 0)
    var = var + lax.stop_gradient(infinite)
    return Moments(f.scale * m.mean + f.offset, var, m.size, counts=m.counts)


def followed_by(f: Affine, m: Moments, norm: Callable[[Moments], Affine]) -> Affine:
    """First `f`, then a norm of `f(x)`, as one map; `m` are the moments of `x`."""
    both = chain(f, norm(push(f, m)))
    return both._replace(scale=constant_where_infinite(both.scale, m.var))


def chain(f: Affine, g: Affine) -> Affine:
    """First `f`, then `g`, as one map."""
    return Affine(g.scale * f.scale, g.scale * f.offset + g.offset)


def per_channel(of_groups: PerGroup, like: Float[Array, "n c"]) -> PerGroup:
    """Repeat the value of each group, `(n, groups)`, for each of its channels, as in `like`."""
    channels = like.shape[1]

    def repeat(values: Array) -> Array:
        n, groups = values.shape
        each = lax.broadcast_in_dim(values, (n, groups, channels // groups), (0, 1))
        sharding = explicit_sharding(values)
        return reshard_like(lax.reshape(each, (n, channels), out_sharding=sharding), like)

    return jax.tree.map(repeat, of_groups)


@partial(jax.jit, static_argnames=("axis", "dtype"))
def apply(
    f: Affine,
    x: Float[Array, "n *space c"],
    axis: int = -1,
    dtype: DTypeLike | None = None,
    origin: Float[Array, "n channels"] | None = None,
    wide: Float[Array, "n *space c"] | None = None,
) -> Float[Array, "n *space c"]:
    """Write `f.scale * (x - origin) + f.offset`, computed in full precision and rounded once.

    Args:
        f: one map for each channel of each sample, `(n, c)`, or for each channel, `(1, c)`.
        x: any number of space axes, including none; the first axis counts samples.
        axis: the channel axis.
        dtype: of the result; by default that of `x`.
        origin: the origin of `f`, a constant; by default 0.
        wide: `widen(x)`, as in `moments`.
    """
    if origin is None:
        origin = jnp.zeros((x.shape[0], x.shape[axis]), widen(x).dtype)
    # Broadcast a map of all samples to each of them, with the sharding of the origin.
    scale, offset = (v + 0 * origin for v in f)
    wide = widen(x) if wide is None else wide
    return passes.write(scale, offset, x, wide, origin, axis, dtype or x.dtype)


def _pool(m: Moments, total: Callable[[Sequence[Array]], list[Array]], number: Any) -> Moments:
    """The law of total variance, `Var = E[var] + Var[mean]`: a sum of positive terms only.

    Args:
        m: the moments.
        total: sums each of a list of arrays over what is pooled.
        number: how many moments are pooled into one.
    """
    size, counts, divisor = number * m.size, None, number
    if m.counts is not None:
        (counts,) = total([m.counts])
        divisor = jnp.maximum(counts, 1)

    def average(*values: Array) -> list[Array]:
        weighted = values if m.counts is None else [m.counts * v for v in values]
        return [v / divisor for v in total(weighted)]

    # The pooled mean, rounded, so that the deviations from it are small.
    origin = _constant_origin(*average(m.mean_from_zero))
    deviation = (m.origin - origin) + m.mean
    mean, second = average(deviation, m.var + jnp.square(deviation))
    return Moments(mean, _variance(mean, second), size, origin, counts)


def _unsplit_groups(values: Float[Array, "n c"], num_groups: int) -> Float[Array, "n c"]:
    """`values`, resharded if a group would be split between devices."""
    explicit = explicit_sharding(values)
    if explicit is None:
        return values
    devices = values.shape[1] // explicit.shard_shape(values.shape)[1]
    if num_groups % devices == 0:
        return values
    return jax.sharding.reshard(values, P(explicit.spec[0], None))


def _constant_origin(center: Array) -> Array:
    """An origin near `center`, without derivative."""
    # One value that is not finite must not spoil the others of its channel. The `where` in this
    # function also keeps the origin out of any fused multiply-add, so that the compiler rounds it
    # in the same way wherever it recomputes it.
    return _zero_if_huge(lax.stop_gradient(center))


@jax.custom_jvp
def _zero_if_huge(values: Array) -> Array:
    """The values, but 0 for NaN and for those whose difference from a finite value may overflow.

    The largest number is half a rounding away from overflow. The derivative is 1 all the same: the
    variance of what has so large a mean is infinite, and its scale 0.
    """
    info = jnp.finfo(values.dtype)
    return jnp.where(jnp.abs(values) < float(info.max) * float(info.eps) / 4, values, 0)


@_zero_if_huge.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _zero_if_huge(*primals), *tangents


def _coarse_grid(x: Array, space: Sequence[int]) -> Array:
    """1 in 64 values of each channel or more, evenly spaced; 4 or more along the last axis."""
    spacing = math.floor(64 ** (1 / max(len(space), 1)) + 1e-6)
    starts, strides = [0] * x.ndim, [1] * x.ndim
    for i in space:
        length = x.shape[i]
        # A symbolic axis, as in `jax.export`, or a sharded one is kept whole.
        if isinstance(length, int) and jax.typeof(x).sharding.spec[i] is None:
            strides[i] = max(1, min(spacing, length // 4 if i == space[-1] else length))
            # Start in the middle of the first cell, because the edge of an image is often unlike
            # the rest, but not so late that the last cell is skipped.
            starts[i] = min(strides[i] // 2, (length - 1) % strides[i])
    return lax.slice(x, starts, x.shape, strides)


@jax.custom_jvp
def inverse_root(values: Array) -> Array:
    """`1 / sqrt(values)`.

    Its derivative is computed from the result, in an order that does not underflow. The derivative
    of `rsqrt` contains `values ** -1.5`, which is 0 in float32 for values above 1e26.
    """
    return 1 / jnp.sqrt(values)


@inverse_root.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = inverse_root(*primals)
    return root, -0.5 * root * (root * (root * tangents[0]))


def _variance(mean: Array, second: Array) -> Array:
    """The second moment minus the squared mean."""
    # If both overflow, the variance is infinite instead of NaN.
    square = jnp.minimum(jnp.square(mean), jnp.finfo(mean.dtype).max)
    return _clamp_at_zero(second - square)


def _clamp_at_zero(var: Array) -> Array:
    """Clamp a variance that rounding made negative at 0, without changing its derivatives."""
    return var + lax.stop_gradient(jnp.maximum(-var, 0))
