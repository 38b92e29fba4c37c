"""The layers as pure functions, `Moments -> Affine`, and the call that linen and NNX share.

Batch norm, estimated batch norm and evaluation differ only in *which* moments they standardize
with: those of the batch, the updated running averages, or the stored running averages.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from bcn_flax import checks
from bcn_flax.affine import (
    Affine,
    Moments,
    Number,
    apply,
    moments,
    per_channel,
    pool_batch,
    pool_groups,
    standardize,
)
from bcn_flax.passes import promote, widen
from bcn_flax.space import compute_once, reshard_like

RunningVariance = Literal["biased", "unbiased", "around_running_mean"]


@runtime_checkable
class Layer(Protocol):
    """The attributes of a layer that its call uses."""

    axis: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    use_scale: bool
    use_bias: bool


_RULES: Mapping[str, checks.Rule] = {
    "use_running_average": checks.or_none(checks.require_flag),
    "axis": checks.require_axis,
    "momentum": checks.require_momentum,
    "epsilon": checks.require_epsilon,
    "batch_epsilon": checks.or_none(checks.require_epsilon),
    "dtype": checks.or_none(checks.require_float_dtype),
    "param_dtype": checks.require_float_dtype,
    "use_bias": checks.require_flag,
    "use_scale": checks.require_flag,
    "bias_init": checks.require_callable,
    "scale_init": checks.require_callable,
    "axis_name": checks.or_none(checks.require_axis_name),
    "axis_index_groups": checks.or_none(checks.require_device_groups),
    "running_variance": partial(checks.require_one_of, names=get_args(RunningVariance)),
    "update_stats": checks.or_none(checks.require_flag),
    "num_groups": checks.or_none(checks.require_integer),
    "group_size": checks.or_none(checks.require_integer),
    "estimate": checks.require_flag,
}


def require_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer that have a rule, as Python numbers if they are numbers.

    Raises:
        ValueError: an argument is of another type, or out of its range.
    """
    return {name: rule(name, arguments[name]) for name, rule in _RULES.items() if name in arguments}


def normalize(layer: Layer, x: Any, mask: Any, to_affine: Callable[[Moments], Affine]) -> Array:
    """Call a layer: check the input, measure it, and apply the map that its moments give.

    Raises:
        ValueError: the input or its mask cannot be normalized.
    """
    x = checks.as_array("input", x)
    axis = layer.axis
    _require_input(x, axis)
    if mask is not None:
        mask = checks.as_array("mask", mask)
        whole = (x.shape[0],) + (1,) * (x.ndim - 1)
        require_mask(mask, x.shape, "input", f"To mask whole samples, give it the shape {whole}.")
        # A masked value may be NaN, and NaN times a gradient of 0 is still NaN.
        x = jnp.where(mask | jnp.isfinite(x), x, 0)
    wide = widen(x)
    m = moments(x, axis, mask, wide)
    return apply(to_affine(m), x, axis, result_dtype(layer, x.dtype), m.origin, wide)


def result_dtype(layer: Layer, dtype: DTypeLike) -> DTypeLike:
    """The dtype of the result for an input of type `dtype`."""
    if layer.dtype is not None:
        return layer.dtype
    has_parameters = layer.use_scale or layer.use_bias
    return promote(dtype, layer.param_dtype) if has_parameters else dtype


def should_update_stats(evaluate: bool, attribute: bool | None, argument: Any) -> bool:
    """Whether to update the running averages; by default in training only."""
    flag = attribute if argument is None else argument
    return not evaluate if flag is None else checks.require_flag("update_stats", flag)


def learned_affine(scale: Array | None, bias: Array | None, size: int, dtype: DTypeLike) -> Affine:
    """The learned scale and bias, `(size,)`, as a map `(1, size)`; 1 and 0 in place of None.

    Raises:
        ValueError: they have another shape, with which they would be broadcast.
    """
    for name, values in (("scale", scale), ("bias", bias)):
        if values is not None:
            _require_vector(name, values, size)
    return Affine(
        widen(jnp.ones((1, size), dtype) if scale is None else scale[None]),
        widen(jnp.zeros((1, size), dtype) if bias is None else bias[None]),
    )


def batch_norm(
    m: Moments,
    stats: tuple[Array, Array],
    learned: Affine,
    *,
    use_running_average: bool,
    update_stats: bool,
    estimate: bool,
    momentum: ArrayLike,
    epsilon: ArrayLike,
    running_variance: RunningVariance,
    axis_name: str | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    initializing: bool = False,
) -> tuple[Affine, tuple[Array, Array]]:
    """`scale * (x - mean) / sqrt(var + epsilon) + bias`, one scale and bias for each channel.

    With `use_running_average`, `mean` and `var` are the stored running averages. In training they
    are, with `estimate`, the updated running averages, without gradient; otherwise the moments of
    the batch, with their gradient. `update_stats` only decides whether the running averages are
    updated.

    Args:
        m: the moments of the input, `(n, c)`.
        stats: the running mean and variance, `(c,)`.
        learned: scale and bias, `(1, c)`.
        use_running_average: true in evaluation, false in training.
        update_stats: whether to update the running averages.
        estimate: whether to standardize with the running averages in training too.
        momentum: the weight of the old running averages.
        epsilon: added to the variance.
        running_variance: see `moving_average`.
        axis_name: the axis of devices over which the batch is pooled.
        axis_index_groups: groups of devices that pool among themselves, as tuples.
        initializing: ignore `axis_name`, and do not warn of a batch of one value.

    Returns:
        The map to apply, and the running mean and variance after this batch.

    Raises:
        ValueError: an argument is out of its range, or the running averages do not have one number
            for each channel.
    """
    # Attributes of an NNX layer may have changed since it was made.
    old_weight: Number = checks.require_momentum("momentum", momentum)
    epsilon = checks.require_epsilon("epsilon", epsilon)
    if not (use_running_average or initializing or axis_name) and m.counts is None:
        _warn_of_single_values(m.mean.shape[0], m.size)
    mean, var = stats
    _require_vector("running mean", mean, m.mean.shape[1])
    _require_vector("running variance", var, m.mean.shape[1])
    running = updated = Moments(mean[None], var[None])
    chosen = running
    if update_stats or not use_running_average:
        batch = pool_batch(m, None if initializing else axis_name, axis_index_groups)
        if update_stats:
            updated = moving_average(running, batch, old_weight, running_variance)
        if not use_running_average:
            chosen = updated if estimate else batch
    f = _standardize(chosen, learned, epsilon, m.origin)
    return f, (updated.mean[0], updated.var[0])


@jax.jit
def _standardize(m: Moments, learned: Affine, epsilon: Number, origin: Array | float) -> Affine:
    m = Moments(widen(m.mean), widen(m.var), origin=m.origin)
    epsilon = jnp.asarray(epsilon, m.var.dtype)
    return standardize(m, epsilon, origin, learned)


def channel_norm(m: Moments, learned: Affine, epsilon: ArrayLike) -> Affine:
    """Standardize each group of channels of each sample; one scale and bias for each *group*.

    Args:
        m: the moments of the input, `(n, c)`.
        learned: scale and bias, `(1, groups)`.
        epsilon: added to the variance.

    Raises:
        ValueError: epsilon is out of its range.
    """
    epsilon = checks.require_epsilon("epsilon", epsilon)
    if m.counts is None:
        _warn_of_single_values_in_groups(m.mean.shape[1] // learned.scale.shape[1], m.size)
    return _channel_norm(m, learned, epsilon)


@jax.jit
def _channel_norm(m: Moments, learned: Affine, epsilon: Number) -> Affine:
    pooled = pool_groups(m, learned.scale.shape[1])
    epsilon = jnp.asarray(epsilon, pooled.var.dtype)
    # Compute one map for each group, then repeat it for each channel.
    if jnp.ndim(m.origin) == 0:
        return per_channel(standardize(pooled, epsilon, m.origin, learned), m.mean)
    f = per_channel(standardize(pooled, epsilon, pooled.origin, learned), m.mean)
    return Affine(f.scale, f.scale * (m.origin - per_channel(pooled.origin, m.mean)) + f.offset)


def moving_average(
    running: Moments,
    batch: Moments,
    momentum: Number,
    variance: RunningVariance = "biased",
) -> Moments:
    """Update the running averages: `momentum * running + (1 - momentum) * batch`.

    They keep their dtype and have no gradient. If a channel has no value that counts in the batch,
    or its moments are not finite, its running averages stay unchanged: otherwise they would never
    be finite again.

    Args:
        running: the running averages before this batch, `(1, c)`.
        batch: the moments of this batch, `(1, c)`.
        momentum: the weight of the old running averages.
        variance: the variance of the batch to average: "biased", around the batch's own mean;
            "unbiased", the same times `size / (size - 1)`; "around_running_mean",
            `E[(x - running.mean)^2]`, with the running mean before its update.
    """
    # `1 - momentum` in Python's float is not rounded to the dtype of the running averages.
    return _moving_average(running, batch, momentum, 1 - momentum, variance)


@partial(jax.jit, static_argnames="variance")
def _moving_average(
    running: Moments,
    batch: Moments,
    momentum: Number,
    rate: Number,
    variance: RunningVariance,
) -> Moments:
    match variance:
        case "biased":
            var = batch.var
        case "unbiased":
            var = unbiased(batch)
        case "around_running_mean":
            var = batch.var + jnp.square((batch.origin - running.mean) + batch.mean)

    def average(old: Array, new: Array) -> Array:
        old_weight = jnp.asarray(momentum, widen(old).dtype)
        new_weight = jnp.asarray(rate, new.dtype)
        mixed = old_weight * widen(old) + new_weight * new
        return mixed.astype(old.dtype)

    mean, var = average(running.mean, batch.mean_from_zero), average(running.var, var)
    # Check the values to be stored: their dtype may overflow although the moments did not.
    usable = jnp.isfinite(mean) & jnp.isfinite(var)
    if batch.counts is not None:
        usable &= batch.counts > 0
    mean, var = compute_once(
        jnp.where(usable, mean, reshard_like(running.mean, mean)),
        jnp.where(usable, var, reshard_like(running.var, var)),
    )
    return Moments(mean, var)


def unbiased(m: Moments) -> Array:
    """The variance with Bessel's correction, `size / (size - 1)`; 0 for a single value."""
    return m.var * (m.weight / jnp.maximum(m.weight - 1, 1))


def _require_input(x: Array, axis: int) -> None:
    """The rules for an input and its channel axis."""
    rank, shape = x.ndim, tuple(x.shape)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"The input must be of a real floating-point type, but it is {x.dtype}. "
            "Convert it first, for example with x.astype(jnp.float32)."
        )
    if rank < 2:
        raise ValueError(
            "The input must have a batch axis and a channel axis, (n, *space, c), but its shape is "
            f"{shape}. For a single sample, add the batch axis with x[None]."
        )
    if not -rank <= axis < rank or axis % rank == 0:
        raise ValueError(
            f"The channel axis must be from 1 to {rank - 1}, or from -{rank - 1} to -1, for an "
            f"input of shape {shape}, because axis 0 is the batch axis, but axis={axis}."
        )
    if math.prod(shape) == 0:
        raise ValueError(
            f"The input must not be empty, but its shape is {shape}. "
            "Skip the empty batch, or pad it and pass a mask."
        )


def require_mask(mask: Array, shape: tuple[int, ...], of: str, way_out: str) -> None:
    """A mask must be boolean, and broadcast to the input or the kernel."""
    fits = mask.ndim == len(shape) and all(
        m in (1, d) for m, d in zip(mask.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"The mask must have as many axes as the {of}, each of the same length or 1, but the "
            f"mask's shape is {mask.shape} and the {of}'s is {shape}. {way_out}"
        )
    if not jnp.issubdtype(mask.dtype, jnp.bool_):
        raise ValueError(
            f"The mask must be boolean, true where a value counts, but it is {mask.dtype}. "
            "Convert it first, for example with mask != 0."
        )


def _require_vector(name: str, values: Array, size: int) -> None:
    """One real number for each channel, or group; any other shape might be broadcast."""
    if values.shape != (size,) or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"The {name} must have one real floating-point number for each channel or group, and "
            f"so the shape {(size,)}, but it is {values.dtype} of shape {values.shape}. Restore it "
            "from a layer of the same size."
        )


def _warn_of_single_values(samples: object, values: object) -> None:
    """Warn if each channel has a single value; symbolic numbers pass."""
    if isinstance(samples, int) and isinstance(values, int) and samples * values == 1:
        warnings.warn(
            "The batch has a single value per channel (1 sample without space axes, or of size 1), "
            "so its variance is always 0. Train with a larger batch, or evaluate with "
            "use_running_average=True.",
            stacklevel=2,
        )


def _warn_of_single_values_in_groups(channels: int, values: object) -> None:
    """Warn if each group has a single value; symbolic numbers pass."""
    if isinstance(values, int) and channels * values == 1:
        warnings.warn(
            "Each group of the channel norm has a single value (1 channel, without space axes or "
            "of size 1), so its output is the bias, whatever the input. Use fewer groups.",
            stacklevel=2,
        )
