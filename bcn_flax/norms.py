"""The layers as pure functions: `Moments -> Affine`.

Batch norm, estimated batch norm and evaluation differ only in *which* moments they standardize by:
the batch's, the running estimates after their update, the running estimates as they are.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bcn_flax.affine import (
    Affine,
    Moments,
    apply,
    centered,
    chain,
    moments,
    pool_batch,
    pool_groups,
    spread,
    standardize,
    widen,
)

RunningVariance = Literal["biased", "unbiased", "around_running_mean"]


def normalize(
    x: Float[Array, "n *space c"],
    to_affine: Callable[[Moments], Affine],
    axis: int,
    mask: Bool[Array, "..."] | None,
    dtype: DTypeLike,
) -> Float[Array, "n *space c"]:
    """Measure `x`, and apply what `to_affine` makes of its moments."""
    x = widen(x)
    if mask is not None:
        # What hides behind a mask may be anything. Multiplied by a gradient of 0, NaN is still NaN.
        x = jnp.where(mask | jnp.isfinite(x), x, 0)
    m = moments(x, axis, mask)

    # Checkpointed, it keeps `x` for the backward pass and not `x - origin` beside it.
    @jax.checkpoint
    def write(f: Affine, x: Array, origin: Array) -> Array:
        return apply(f, centered(x, origin, axis), axis, dtype)

    return write(to_affine(m), x, m.origin)


def moving_average(
    running: Moments,
    batch: Moments,
    momentum: float | Float[Array, ""],
    variance: RunningVariance = "biased",
) -> Moments:
    """Update the running estimates: `momentum * running + (1 - momentum) * batch`.

    Estimates keep their dtype and carry no gradient. A channel keeps its estimates as they are
    where the batch counts nothing, and where the batch's moments are not finite: one bad batch
    would otherwise poison them for ever.

    Args:
        running: the estimates before this batch, `(1, c)`.
        batch: the moments of this batch, `(1, c)`.
        momentum: the weight of the old estimates.
        variance: which variance of the batch enters: "biased", around the batch's own mean;
            "unbiased", the same times `size / (size - 1)`; "around_running_mean",
            `E[(x - running.mean)^2]`, with the mean before its update.
    """
    match variance:
        case "biased":
            var = batch.var
        case "unbiased":
            var = unbiased(batch)
        case "around_running_mean":
            var = batch.var + jnp.square((batch.origin - running.mean) + batch.mean)
    mean = batch.mean_from_zero

    def average(old: Array, new: Array) -> Array:
        mixed = momentum * widen(old) + (1 - momentum) * lax.stop_gradient(new)
        return mixed.astype(old.dtype)

    averaged = Moments(average(running.mean, mean), average(running.var, var))
    # Judged as they would be stored: that type may overflow where the batch's moments did not.
    finite = jnp.isfinite(averaged.mean) & jnp.isfinite(averaged.var)
    usable = finite & (jnp.asarray(batch.size) > 0)
    return Moments(
        jnp.where(usable, averaged.mean, running.mean), jnp.where(usable, averaged.var, running.var)
    )


def unbiased(m: Moments) -> Array:
    """The variance with Bessel's correction, `size / (size - 1)`; 0 of a single value."""
    return m.var * (m.size / jnp.maximum(m.size - 1, 1))


def batch_norm_moments(
    m: Moments,
    running: Moments,
    *,
    use_running_average: bool,
    update_stats: bool,
    estimate: bool,
    momentum: float | Float[Array, ""],
    running_variance: RunningVariance = "biased",
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Moments, Moments]:
    """What a batch norm standardizes by, and the running estimates after this batch.

    With `use_running_average` it standardizes by the estimates as they were. Otherwise, with
    `estimate`, by the estimates as they are after this batch, through which no gradient flows;
    without, by the batch's own moments, gradient and all. `update_stats` decides by itself whether
    the estimates move.
    """
    if use_running_average and not update_stats:
        return running, running
    batch = pool_batch(m, axis_name, axis_index_groups)
    after = moving_average(running, batch, momentum, running_variance) if update_stats else running
    if use_running_average:
        return running, after
    return (after if estimate else batch), after


def batch_norm(
    pooled: Moments, learned: Affine, epsilon: float, origin: Array | float = 0.0
) -> Affine:
    """`scale * (x - mean) / sqrt(var + epsilon) + bias`, one scale and bias for each channel.

    Args:
        pooled: of the batch or running, `(1, c)`.
        learned: scale and bias, `(1, c)`.
        epsilon: keeps the square root away from 0.
        origin: from which the values to be mapped are measured.
    """
    return chain(standardize(pooled, epsilon, origin), learned)


def channel_norm(m: Moments, learned: Affine, epsilon: float) -> Affine:
    """Standardize each group of channels of each sample; one scale and bias for each *group*.

    Args:
        m: of each channel of each sample, `(n, c)`.
        learned: scale and bias, `(1, groups)`.
        epsilon: keeps the square root away from 0.
    """
    groups, channels = learned.scale.shape[1], m.mean.shape[1]
    pooled = spread(pool_groups(m, groups), channels)
    return chain(standardize(pooled, epsilon, m.origin), spread(learned, channels))
