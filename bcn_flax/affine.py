"""The algebra of normalization: moments in, affine maps out.

A normalization layer never needs the activation itself to decide what to do with it. It needs the
mean and the variance of each channel of each sample, `Moments`, and what it decides is one scale
and one offset for each, `Affine`. Both are small, `(n, c)`, and affine maps compose. So any stack
of normalizations reads `x` once to measure it and once to map it:

    m = moments(x)                                             # one pass over x
    f = standardize(pool_batch(m), epsilon, m.origin)          # batch norm
    g = standardize(pool_groups(push(f, m), groups), epsilon)  # a group norm of what f would give
    y = apply(chain(f, spread(g, m.mean)), x, origin=m.origin)      # one pass over x

Three laws carry this. The law of total variance pools moments, `push` knows the moments of `f(x)`
without computing `f(x)`, and `chain` is associative.

Means are measured, and maps applied, from an origin near the data. Far from it, where a mean is
large beside the deviations from it, every sum and product would round the deviations away.

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
from bcn_flax.space import explicit_sharding, placed_like

Number = float | Float[Array, ""]
"""A number, traced or not."""

MOMENTS = "moments"
"""The name under which `jax.checkpoint` knows the moments of a layer's input.

With the policy `jax.checkpoint_policies.save_only_these_names(MOMENTS)` a rematerialized block
keeps them, `(n, c)` numbers, and does not measure its input a second time.
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
        mean: measured from `origin`: small, and precise, where the origin is near.
        var: around the mean.
        size: the number of values that each was taken of: an integer, or a symbolic one in an
            export for any size.
        origin: a constant, without derivative.
        counts: under a mask, how many of those values count, for each; None is all of them.
    """

    mean: Float[Array, "*n c"]
    var: Float[Array, "*n c"]
    size: Any = 1
    origin: Float[Array, "*n c"] | Number = 0.0
    counts: Float[Array, "*n c"] | None = None

    @property
    def mean_from_zero(self) -> Array:
        """The mean as such."""
        return self.origin + self.mean

    @property
    def weight(self) -> Any:
        """How many values count: the weight of each when they are pooled."""
        return self.size if self.counts is None else self.counts


class Affine(NamedTuple):
    """The map `x -> scale * x + offset`, one for each channel of each sample.

    Where `x` was measured from an origin, it is a map of `x - origin`: see `apply`.
    """

    scale: Float[Array, "n c"]
    offset: Float[Array, "n c"]


PerChannel = TypeVar("PerChannel", Array, Affine)


@partial(jax.jit, static_argnames="axis")
def moments(
    x: Float[Array, "n *space c"],
    axis: int = -1,
    mask: Bool[Array, "..."] | None = None,
    wide: Float[Array, "n *space c"] | None = None,
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
        wide: `widen(x)`, to which the derivative goes. Where `apply` reads the same `x`, give both
            the same: the gradients of `x` then add up in full precision and are rounded once.

    Returns:
        Moments in float32, or wider where `x` is. Mean and variance are 0 where nothing counts.
    """
    space = tuple(i for i in range(1, x.ndim) if i != axis % x.ndim)
    size = math.prod(x.shape[i] for i in space)
    if mask is None:
        counts = None
        near = jnp.mean(widen(_coarse_grid(x, space)), space)
    else:
        # A masked value may be anything, NaN included: it is replaced before any arithmetic.
        mask = jnp.broadcast_to(mask, x.shape)
        counts = jnp.sum(mask, space, dtype=widen(x).dtype)
        near = jnp.sum(widen(jnp.where(mask, x, 0)), space) / jnp.maximum(counts, 1)
    origin = checkpoint_name(_constant(near), MOMENTS)
    sums = passes.measure(x, widen(x) if wide is None else wide, origin, mask, axis)
    divisor = size if counts is None else jnp.maximum(counts, 1)
    mean, second = (s / divisor for s in checkpoint_name(sums, MOMENTS))
    # The variance is infinite, and not NaN, where both overflow.
    square = jnp.minimum(jnp.square(mean), jnp.finfo(mean.dtype).max)
    return Moments(mean, _not_negative(second - square), size, origin, counts)


@partial(jax.jit, static_argnames=("axis_name", "axis_index_groups"))
def pool_batch(
    m: Moments,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """The moments of each channel over all samples, and over all devices of `axis_name`.

    Args:
        m: of each channel of each sample.
        axis_name: of an axis of `vmap`, `shard_map` or `pmap`.
        axis_index_groups: groups of devices of that axis which pool among themselves, as tuples.

    Returns:
        Moments of shape `(1, c)`. Samples and devices weigh by the number of values that count, so
        that unequal masks are exact. Mean and variance are 0 where nothing counts.
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
        return jnp.reshape(_groups_whole(values, num_groups), (n, num_groups, -1))

    def total(values: Sequence[Array]) -> list[Array]:
        return [jnp.sum(v, axis=-1, keepdims=True) for v in values]

    pooled = _pool(jax.tree.map(split, m), total, channels // num_groups)
    return jax.tree.map(lambda values: jnp.squeeze(values, -1), pooled)


def standardize(m: Moments, epsilon: Number, origin: Array | float = 0.0) -> Affine:
    """The map that gives mean 0 and variance `var / (var + epsilon)`, nearly 1.

    Args:
        m: by which to standardize.
        epsilon: added to the variance.
        origin: from which the values to be mapped are measured.
    """
    scale = _inverse_root(m.var + epsilon)
    return Affine(scale, ((origin - m.origin) - m.mean) * scale)


def push(f: Affine, m: Moments) -> Moments:
    """The moments of `f(x)`, from the moments of `x`, from whose origin `f` maps."""
    mean, var = f.scale * m.mean + f.offset, jnp.square(f.scale) * m.var
    return Moments(mean, var, m.size, counts=m.counts)


def chain(f: Affine, g: Affine) -> Affine:
    """First `f`, then `g`, as one map."""
    return Affine(g.scale * f.scale, g.scale * f.offset + g.offset)


def spread(of_groups: PerChannel, of_channels: Float[Array, "n c"]) -> PerChannel:
    """One for each group, `(n, groups)`, as one for each channel, like `of_channels`."""
    channels = of_channels.shape[1]

    def repeat(values: Array) -> Array:
        n, groups = values.shape
        each = lax.broadcast_in_dim(values, (n, groups, channels // groups), (0, 1))
        sharding = explicit_sharding(values)
        return placed_like(lax.reshape(each, (n, channels), out_sharding=sharding), of_channels)

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
        f: one map for each channel of each sample, `(n, c)`, or of all samples, `(1, c)`.
        x: any number of space axes, none included; the first axis counts samples.
        axis: the channel axis.
        dtype: of the result; None is that of `x`.
        origin: from which `f` maps, a constant; None is 0.
        wide: `widen(x)`, as in `moments`.
    """
    if origin is None:
        origin = jnp.zeros((x.shape[0], x.shape[axis]), widen(x).dtype)
    # One number for each sample, also where it is the same for all, and laid out as the origin.
    scale, offset = (v + 0 * origin for v in f)
    wide = widen(x) if wide is None else wide
    return passes.write(scale, offset, x, wide, origin, axis, dtype or x.dtype)


def _pool(m: Moments, total: Callable[[Sequence[Array]], list[Array]], number: Any) -> Moments:
    """The law of total variance, `Var = E[var] + Var[mean]`: a sum of positive terms only.

    Args:
        m: the moments.
        total: adds up, in each of a list of arrays, whatever is to be pooled.
        number: how many moments are pooled into one.
    """
    size, counts, divisor = number * m.size, None, number
    if m.counts is not None:
        (counts,) = total([m.counts])
        divisor = jnp.maximum(counts, 1)

    def average(*values: Array) -> list[Array]:
        weighted = values if m.counts is None else [m.counts * v for v in values]
        return [v / divisor for v in total(weighted)]

    # The pooled mean, up to its rounding, so that the deviations from it are small.
    origin = _constant(*average(m.mean_from_zero))
    deviation = (m.origin - origin) + m.mean
    mean, second = average(deviation, m.var + jnp.square(deviation))
    return Moments(mean, _not_negative(second - jnp.square(mean)), size, origin, counts)


def _groups_whole(values: Float[Array, "n c"], num_groups: int) -> Float[Array, "n c"]:
    """The same, laid out so that no group lies on several devices."""
    explicit = explicit_sharding(values)
    if explicit is None:
        return values
    devices = values.shape[1] // explicit.shard_shape(values.shape)[1]
    if num_groups % devices == 0:
        return values
    return jax.sharding.reshard(values, P(explicit.spec[0], None))


def _constant(near: Array) -> Array:
    """An origin near `near`: finite, and without derivative."""
    # One value that is not finite must not take those around it along. The choice also keeps the
    # origin's own rounding out of any fused multiply-add, so that it has one value wherever a
    # compiler computes it again.
    return lax.stop_gradient(jnp.where(jnp.isfinite(near), near, 0))


def _coarse_grid(x: Array, space: Sequence[int]) -> Array:
    """Of each channel 1 value in 64 or more, evenly spread; 4 or more in a row that has them."""
    spacing = math.floor(64 ** (1 / max(len(space), 1)) + 1e-6)
    starts, strides = [0] * x.ndim, [1] * x.ndim
    for i in space:
        length = x.shape[i]
        # Not a symbolic size, as in an export for any, nor one that lies on several devices.
        if isinstance(length, int) and jax.typeof(x).sharding.spec[i] is None:
            strides[i] = max(1, min(spacing, length // 4 if i == space[-1] else length))
            # In the middle of the first cell, for the very edge of an image is often unlike the
            # rest; but not so far in that the last cell is left out.
            starts[i] = min(strides[i] // 2, (length - 1) % strides[i])
    return lax.slice(x, starts, x.shape, strides)


@jax.custom_jvp
def _inverse_root(values: Array) -> Array:
    """`1 / sqrt(values)`.

    Its derivative is computed from itself, in an order in which nothing underflows. That of `rsqrt`
    goes with `values ** -1.5`, which is 0 in float32 from the squares of 1e13 on.
    """
    return 1 / jnp.sqrt(values)


@_inverse_root.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    root = _inverse_root(*primals)
    return root, -0.5 * root * (root * (root * tangents[0]))


def _not_negative(var: Array) -> Array:
    """Clamp at 0 what rounding made negative, leaving every derivative as it is."""
    return var + lax.stop_gradient(jnp.maximum(-var, 0))
