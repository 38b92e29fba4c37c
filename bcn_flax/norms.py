"""The layers as pure functions: `Moments -> Affine`, and weight standardization.

Batch norm, estimated batch norm and evaluation differ only in *which* moments they standardize by:
the batch's, the running estimates after their update, the running estimates as they are.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bcn_flax import checks
from bcn_flax.affine import (
    Affine,
    Moments,
    apply,
    chain,
    moments,
    pool_batch,
    pool_groups,
    spread,
    standardize,
    widen,
)


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
    return apply(to_affine(moments(x, axis, mask)), x, axis, dtype)


def moving_average(running: Moments, batch: Moments, momentum: float | Float[Array, ""]) -> Moments:
    """Update the running estimates: `momentum * running + (1 - momentum) * batch`.

    The running variance averages the batch's biased variance around the batch's own mean. Estimates
    keep their dtype, carry no gradient, and stay as they are where the batch counts nothing.
    """

    def update(old: Array, new: Array) -> Array:
        average = momentum * old + (1 - momentum) * lax.stop_gradient(new)
        return jnp.where(jnp.asarray(batch.size) > 0, average, old).astype(old.dtype)

    return Moments(update(running.mean, batch.mean), update(running.var, batch.var))


def training_moments(
    m: Moments,
    running: Moments,
    momentum: float | Float[Array, ""],
    estimate: bool,
    axis_name: str | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> tuple[Moments, Moments]:
    """What a batch norm standardizes by in training, and the running estimates after this batch.

    With `estimate`, both are the updated running estimates, through which no gradient flows.
    Without, it standardizes by the batch's own moments, gradient and all.
    """
    batch = pool_batch(m, axis_name, axis_index_groups)
    running = moving_average(running, batch, momentum)
    return (running if estimate else batch), running


def batch_norm(pooled: Moments, learned: Affine, epsilon: float) -> Affine:
    """`scale * (x - mean) / sqrt(var + epsilon) + bias`, one scale and bias for each channel.

    Args:
        pooled: of the batch or running, `(1, c)`.
        learned: scale and bias, `(1, c)`.
        epsilon: keeps the square root away from 0.
    """
    return chain(standardize(pooled, epsilon), learned)


def channel_norm(m: Moments, learned: Affine, epsilon: float) -> Affine:
    """Standardize each group of channels of each sample; one scale and bias for each *group*.

    Args:
        m: of each channel of each sample, `(n, c)`.
        learned: scale and bias, `(1, groups)`.
        epsilon: keeps the square root away from 0.
    """
    groups, channels = learned.scale.shape[1], m.mean.shape[1]
    return spread(chain(standardize(pool_groups(m, groups), epsilon), learned), channels)


def standardize_kernel(
    kernel: Float[Array, "*fan_in c"],
    epsilon: float = 1e-5,
    axis: int = -1,
    mask: Bool[Array, "*fan_in c"] | None = None,
) -> Float[Array, "*fan_in c"]:
    """Weight standardization: give the weights of each output channel mean 0 and variance 1.

    `(w - mean) / sqrt(var + epsilon)` over all axes but the output channel, with the unbiased
    variance: the algebra of the activations, with the kernel as the one sample. Computed in
    float32 or wider, returned in the kernel's dtype.

    Args:
        kernel: of a dense layer, `(in, out)`, or of a convolution, `(*window, in, out)`.
        epsilon: added to the variance, inside the root.
        axis: the output channel's.
        mask: true where a weight counts, shaped as the kernel; the others come out as 0.

    Raises:
        ValueError: an output channel has a single weight, whose variance is not defined.

    Example:
        >>> import jax.numpy as jnp
        >>> from bcn_flax import standardize_kernel
        >>> standardize_kernel(jnp.array([[1.0], [2.0], [3.0]])).round(3).ravel().tolist()
        [-1.0, 0.0, 1.0]

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", arXiv 1903.10520; unbiased variance and epsilon inside the root as in the
    authors' ImageNet code (`imagenet/models/layers.py`).
    """
    checks.fan_in(kernel.shape, axis)
    sample = widen(kernel[None])
    axis = axis % kernel.ndim + 1
    m = moments(sample, axis, None if mask is None else mask[None])
    unbiased = m.var * (m.size / jnp.maximum(m.size - 1, 1))
    standardized = apply(
        standardize(m._replace(var=unbiased), epsilon), sample, axis, kernel.dtype
    )[0]
    return standardized if mask is None else jnp.where(mask, standardized, 0)
