"""What the layers of linen and of NNX share: all that does not own parameters or statistics."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from bcn_flax import checks, norms
from bcn_flax.affine import Affine, Moments, widen
from bcn_flax.norms import RunningVariance


class Layer(Protocol):
    """What `call` needs to know of a layer: some of the arguments of its constructor."""

    axis: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    use_scale: bool
    use_bias: bool


def call(
    layer: Layer, x: ArrayLike, mask: ArrayLike | None, to_affine: Callable[[Moments], Affine]
) -> Array:
    """Call a layer: check the input, measure it, and apply what `to_affine` makes of its moments.

    Raises:
        ValueError: bad input.
    """
    x = jnp.asarray(x)
    mask = None if mask is None else jnp.asarray(mask)
    checks.activation(x, layer.axis, mask)
    return norms.normalize(x, to_affine, layer.axis, mask, result_dtype(layer, x.dtype))


def result_dtype(layer: Layer, dtype: DTypeLike) -> DTypeLike:
    """The type of the result for an input of type `dtype`."""
    if layer.dtype is not None:
        return layer.dtype
    learns = layer.use_scale or layer.use_bias
    return jnp.promote_types(dtype, layer.param_dtype) if learns else dtype


class BatchNormLayer(Layer, Protocol):
    """What `batch_norm_moments` needs to know of a batch norm."""

    momentum: float
    epsilon: float
    estimates: ClassVar[bool]
    running_variance: RunningVariance
    axis_index_groups: Sequence[Sequence[int]] | None


def batch_norm_moments(
    norm: BatchNormLayer,
    m: Moments,
    stats: tuple[Array, Array],
    *,
    use_running_average: bool,
    update_stats: bool,
    axis_name: str | None,
) -> tuple[Moments, tuple[Array, Array]]:
    """What a batch norm standardizes by, and its statistics after this batch.

    Args:
        norm: the layer.
        m: the moments of its input.
        stats: its running mean and variance, `(c,)`.
        use_running_average: whether it is evaluating.
        update_stats: whether its statistics move.
        axis_name: of the axis over which the batch is pooled.

    Raises:
        ValueError: an argument of the layer is out of its range.
    """
    checks.momentum(norm.momentum)
    checks.epsilon(norm.epsilon)
    checks.running_variance(norm.running_variance)
    mean, var = stats
    pooled, running = norms.batch_norm_moments(
        m,
        Moments(mean[None], var[None]),
        use_running_average=use_running_average,
        update_stats=update_stats,
        estimate=norm.estimates,
        momentum=norm.momentum,
        running_variance=norm.running_variance,
        axis_name=axis_name,
        axis_index_groups=norm.axis_index_groups,
    )
    pooled = pooled._replace(mean=widen(pooled.mean), var=widen(pooled.var))
    return pooled, (running.mean[0], running.var[0])


def update_flag(evaluate: bool, attribute: bool | None, argument: bool | None) -> bool:
    """Whether to move the running averages: as the call says, or the constructor, or the mode."""
    flag = attribute if argument is None else argument
    return not evaluate if flag is None else flag


def learned(scale: Array | None, bias: Array | None, size: int, dtype: DTypeLike) -> Affine:
    """The learned scale and bias, `(size,)`, as a map `(1, size)`; 1 and 0 where there is none."""
    return Affine(
        jnp.ones((1, size), dtype) if scale is None else scale[None],
        jnp.zeros((1, size), dtype) if bias is None else bias[None],
    )
