"""Weight standardization: the kernel of a layer, normalized like a batch of one sample."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bcn_flax import checks
from bcn_flax.affine import Affine, Moments, apply, constant_where_infinite, inverse_root, moments
from bcn_flax.norms import require_mask, unbiased
from bcn_flax.passes import widen

EpsilonRole = Literal["added_to_variance", "added_to_deviation", "least_variance"]


class Standardization(NamedTuple):
    """How to standardize a kernel; the published implementations differ in these choices.

        w_hat = gamma * gain * (w - mean) / divisor

    with mean and variance over the `N` weights of an output channel. The default is that of the
    authors' ImageNet code and of the annotated implementation; `bcn_flax.variants.WS` has the
    others.

    Attributes:
        unbiased: whether the variance has Bessel's correction, `N / (N - 1)`.
        epsilon: keeps the divisor away from 0.
        epsilon_role: the divisor, with `s = N` if `fan_in_scaling`, otherwise 1:
            "added_to_variance": `sqrt(s * (var + epsilon))`;
            "added_to_deviation": `sqrt(s) * (sqrt(var) + epsilon)`;
            "least_variance": `sqrt(max(s * var, epsilon))`.
        fan_in_scaling: whether the result has variance `1 / N` instead of 1, so that the layer
            keeps the variance of its input.
        gain: whether the layer learns a gain for each output channel, `(out,)`, which starts at 1.
        gamma: a constant factor. Networks without normalization layers use that of their
            activation function; in timm all but `dm_nfnet` do.
    """

    unbiased: bool = True
    epsilon: float = 1e-5
    epsilon_role: EpsilonRole = "added_to_variance"
    fan_in_scaling: bool = False
    gain: bool = False
    gamma: float = 1.0


def standardize_kernel(
    kernel: Float[Array, "*fan_in c"],
    standardization: Standardization = Standardization(),
    *,
    gain: Float[Array, " c"] | None = None,
    axis: int = -1,
    mask: Bool[Array, "*fan_in c"] | None = None,
) -> Float[Array, "*fan_in c"]:
    """Weight standardization: give the weights of each output channel mean 0 and variance 1.

    By default `(w - mean) / sqrt(var + 1e-5)` over all axes but the output channel, with the
    unbiased variance. Computed in float32 or wider, returned in the kernel's dtype.

    Args:
        kernel: of a dense layer, `(in, out)`, or of a convolution, `(*window, in, out)`.
        standardization: the variance, the role of epsilon and the scale of the result.
        gain: a factor for each output channel, `(out,)`; required with `Standardization(gain=True)`
            and only then.
        axis: the axis of the output channels.
        mask: true where a weight counts, shaped as the kernel; the result is 0 elsewhere.

    Raises:
        ValueError: an output channel has a single weight, whose variance is undefined; an
            attribute of `standardization` is out of its range; there is a gain that it does not
            have, or none that it has; or an array is of another shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from bcn_flax import standardize_kernel
        >>> standardize_kernel(jnp.array([[1.0], [2.0], [3.0]])).round(3).ravel().tolist()
        [-1.0, 0.0, 1.0]

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", arXiv 1903.10520; unbiased variance and epsilon inside the root as in the
    authors' ImageNet code (`imagenet/models/layers.py`).
    """
    kernel, axis = checks.as_array("kernel", kernel), checks.require_integer("axis", axis)
    require_fan_in(kernel.shape, axis)
    how = require_standardization(standardization)
    _require_real_floats("kernel", kernel)
    if mask is not None:
        mask = checks.as_array("mask", mask)
        require_mask(mask, kernel.shape, "kernel", "Give it the shape of the kernel.")
    if gain is not None:
        gain = checks.as_array("gain", gain)
        _require_real_floats("gain", gain)
    _require_gain(kernel.shape, axis, how.gain, gain)
    return _standardized(
        kernel[None], None if mask is None else mask[None], gain, how, axis % kernel.ndim + 1
    )[0]


@partial(jax.jit, static_argnums=(3, 4))
def _standardized(
    sample: Float[Array, "1 *fan_in c"],
    mask: Bool[Array, "1 *fan_in c"] | None,
    gain: Float[Array, " c"] | None,
    how: Standardization,
    axis: int,
) -> Float[Array, "1 *fan_in c"]:
    wide = widen(sample)
    m = moments(sample, axis, mask, wide)
    scale = _inverse_divisor(m, how)
    if gain is not None:
        scale = scale * widen(gain)[None]
    f = Affine(constant_where_infinite(scale, m.var), -m.mean * scale)
    standardized = apply(f, sample, axis, None, m.origin, wide)
    return standardized if mask is None else jnp.where(mask, standardized, 0)


def _inverse_divisor(m: Moments, how: Standardization) -> Array:
    var = unbiased(m) if how.unbiased else m.var
    s = jnp.maximum(m.weight, 1) if how.fan_in_scaling else 1
    match how.epsilon_role:
        case "added_to_variance":
            inverse = inverse_root(s * (var + how.epsilon))
        case "added_to_deviation":
            inverse = 1 / (jnp.sqrt(s) * (_root(var) + how.epsilon))
        case "least_variance":
            inverse = inverse_root(jnp.maximum(s * var, how.epsilon))
    return how.gamma * inverse


def _root(var: Array) -> Array:
    """The square root with derivative 0 at 0, so that a constant kernel has a finite gradient."""
    positive = var > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0)


def require_standardization(how: Any) -> Standardization:
    """The attributes must be flags, numbers and a role in their ranges.

    Returns:
        The same in Python's numbers, which are hashable.
    """
    checks.require_type("standardization", how, Standardization, "a Standardization")
    return Standardization(
        checks.require_flag("unbiased", how.unbiased),
        checks.require_epsilon("epsilon", how.epsilon),
        checks.require_one_of("epsilon_role", how.epsilon_role, get_args(EpsilonRole)),
        checks.require_flag("fan_in_scaling", how.fan_in_scaling),
        checks.require_flag("gain", how.gain),
        checks.require_factor("gamma", how.gamma),
    )


def require_fan_in(shape: Sequence[int], axis: int) -> None:
    """A kernel to standardize must have at least two weights for each output channel."""
    rank = len(shape)
    if rank < 2 or not -rank <= axis < rank:
        raise ValueError(
            "A kernel to standardize must have an output channel axis and another one, but its "
            f"shape is {tuple(shape)} and axis={axis}."
        )
    weights = math.prod(d for i, d in enumerate(shape) if i != axis % rank)
    if weights < 2:
        raise ValueError(
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            f"kernel of shape {tuple(shape)} has {weights}. Use the layer without weight "
            "standardization here."
        )


def _require_real_floats(name: str, values: Array) -> None:
    """The kernel and the gain must be real floating-point arrays."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"The {name} must be of a real floating-point type, but it is {values.dtype}. "
            f"Convert it first, for example with {name}.astype(jnp.float32)."
        )


def _require_gain(shape: Sequence[int], axis: int, wanted: bool, gain: Array | None) -> None:
    """There must be a gain if the standardization has one, and only then."""
    expected = (shape[axis],) if wanted else None
    given = None if gain is None else gain.shape
    if given != expected:
        raise ValueError(
            "The gain must be None without Standardization(gain=True), and with it have one value "
            f"for each output channel: for a kernel of shape {tuple(shape)} and gain={wanted} its "
            f"shape must be {expected}, but it is {given}."
        )
