"""Every complaint about bad arguments or input: one function a rule.

Each message states the rule, the values seen and the way out.
"""

import math
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

_RUNNING_VARIANCES = ("biased", "unbiased", "around_running_mean")
_EPSILON_ROLES = ("added_to_variance", "added_to_deviation", "least_variance")


def activation(x: Array, axis: int, values: Array | None) -> None:
    """The input, and its mask where there is one, can be normalized: the rules below."""
    float_input(x.dtype)
    feature_axis(x.shape, axis)
    not_empty(x.shape)
    if values is not None:
        mask(values.shape, values.dtype, x.shape)


def float_input(dtype: DTypeLike) -> None:
    """Only real floating-point input can be normalized."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"The input must be of a real floating-point type, but it is {jnp.dtype(dtype)}. "
            "Convert it first, for example with x.astype(jnp.float32)."
        )


def feature_axis(shape: Sequence[int], axis: int) -> None:
    """The input has a batch axis, which comes first, and another one that counts channels."""
    rank = len(shape)
    if not isinstance(axis, int):
        raise ValueError(
            f"The channel axis must be one integer, but axis={axis!r}. Merge several channel axes "
            "into one with a reshape."
        )
    if rank < 2:
        raise ValueError(
            "The input must have a batch axis and a channel axis, (n, *space, c), but its shape is "
            f"{tuple(shape)}. For a single sample, add the batch axis with x[None]."
        )
    if not -rank <= axis < rank or axis % rank == 0:
        raise ValueError(
            f"The channel axis must be one of 1 to {rank - 1}, or -{rank - 1} to -1, for an input "
            f"of shape {tuple(shape)}, whose axis 0 is the batch, but axis={axis}."
        )


def not_empty(shape: Sequence[int]) -> None:
    """There is no mean of nothing."""
    if math.prod(shape) == 0:
        raise ValueError(
            f"The input must not be empty, but its shape is {tuple(shape)}. "
            "Skip the empty batch, or pad it and pass a mask."
        )


def mask(mask_shape: Sequence[int], mask_dtype: DTypeLike, shape: Sequence[int]) -> None:
    """A mask is boolean and lines up with the input, axis by axis."""
    fits = len(mask_shape) == len(shape) and all(
        m in (1, d) for m, d in zip(mask_shape, shape, strict=True)
    )
    if not fits:
        one_a_sample = (shape[0],) + (1,) * (len(shape) - 1)
        raise ValueError(
            "The mask must have as many axes as the input, each of the same length or 1, but the "
            f"mask's shape is {tuple(mask_shape)} and the input's is {tuple(shape)}. To mask whole "
            f"samples, give it the shape {one_a_sample}."
        )
    if not jnp.issubdtype(mask_dtype, jnp.bool_):
        raise ValueError(
            f"The mask must be boolean, true where a value counts, but it is "
            f"{jnp.dtype(mask_dtype)}. Convert it first, for example with mask != 0."
        )


def group_count(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """One of `num_groups` and `group_size` is given, and divides the channels.

    Returns:
        The number of groups.
    """
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "Exactly one of num_groups and group_size must be given, but num_groups="
            f"{num_groups} and group_size={group_size}. Set the other one to None."
        )
    name, value = (
        ("num_groups", num_groups) if num_groups is not None else ("group_size", group_size)
    )
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    if value not in divisors:
        raise ValueError(
            f"{name} must divide the number of channels, but {name}={value} and there are "
            f"{channels} channels. Any of {', '.join(map(str, divisors))} would do."
        )
    return value if num_groups is not None else channels // value


def running_average_flag(layer: str, attribute: bool | None, argument: bool | None) -> bool:
    """Whether to use the running averages is said in the call or in the constructor.

    Returns:
        What the call says, or else what the constructor said.
    """
    flag = attribute if argument is None else argument
    if flag is None:
        raise ValueError(
            f"{layer} must be told whether to normalize by the running averages "
            "(evaluation) or to update them (training), but use_running_average is None. Either\n"
            f"  1. set it in the constructor: {layer}(use_running_average=not train),\n"
            "  2. pass it in the call: layer(x, use_running_average=not train), or\n"
            f"  3. set it for all layers at once: norm = partial({layer}, "
            "use_running_average=not train)."
        )
    return flag


def momentum(value: float | Array) -> None:
    """A moving average weighs the old value by a number from 0 to 1.

    A traced number, as of a schedule inside `jit`, is not known yet, and passes.
    """
    if not isinstance(value, jax.core.Tracer) and not 0 <= value <= 1:
        raise ValueError(
            "momentum is the weight of the old running average and must be from 0 to 1, but "
            f"momentum={value}. A PyTorch momentum m is 1 - m here: 0.1 there is 0.9 here."
        )


def epsilon(value: float | Array) -> None:
    """A positive number keeps the square root away from 0; a traced one is not known yet."""
    if not isinstance(value, jax.core.Tracer) and not 0 < value < math.inf:
        raise ValueError(
            f"epsilon must be positive and finite, but epsilon={value}. The usual one is 1e-5."
        )


def running_variance(value: str) -> None:
    """What enters the running variance is chosen by its name."""
    if value not in _RUNNING_VARIANCES:
        raise ValueError(
            f"running_variance must be one of {', '.join(_RUNNING_VARIANCES)}, but it is {value!r}."
        )


def num_features(channels: int, expected: int) -> None:
    """The input has as many channels as the layer was made for."""
    if channels != expected:
        raise ValueError(
            f"The input must have the {expected} channels that the layer was made for, but it has "
            f"{channels}. Make the layer with num_features={channels}, or with the axis along "
            "which the channels lie."
        )


def several_values(samples: object, values: object) -> None:
    """The variance of a single value is 0, and says nothing.

    Only where both numbers are known: a mask may depend on the data, and a shape may be symbolic.
    """
    if isinstance(samples, int) and isinstance(values, int) and samples * values == 1:
        warnings.warn(
            "The batch has a single value per channel (1 sample without space axes, or of size 1), "
            "so its variance is 0, which estimates nothing. Train with a larger batch, or evaluate "
            "with use_running_average=True.",
            stacklevel=2,
        )


def several_values_in_a_group(channels: int, values: object) -> None:
    """A single value standardized is 0, whatever it was."""
    if isinstance(values, int) and channels * values == 1:
        warnings.warn(
            "Each group of the channel norm has a single value (1 channel, without space axes or "
            "of size 1), so its output is the bias, whatever the input. Use fewer groups.",
            stacklevel=2,
        )


def fan_in(shape: Sequence[int], axis: int) -> None:
    """Weight standardization needs two weights or more for each output channel."""
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


def standardization(epsilon_role: str, eps: float, gamma: float) -> None:
    """The divisor of weight standardization is one of three, and nothing in it is 0 or infinite."""
    if epsilon_role not in _EPSILON_ROLES:
        raise ValueError(
            f"epsilon_role must be one of {', '.join(_EPSILON_ROLES)}, but it is {epsilon_role!r}."
        )
    epsilon(eps)
    if gamma == 0 or not math.isfinite(gamma):
        raise ValueError(
            f"gamma must be finite and not 0, but gamma={gamma}. Without a factor it is 1.0."
        )


def image_axes(shape: Sequence[int]) -> None:
    """Images come in a batch, with their channels last."""
    if len(shape) != 4:
        raise ValueError(
            f"The images must be (n, height, width, channels), but their shape is {tuple(shape)}. "
            "For a single image, add the batch axis with x[None]."
        )


def image_size(shape: Sequence[int], num_blocks: int) -> None:
    """Each block halves the image, and at least one pixel must remain."""
    image_axes(shape)
    smallest = 2**num_blocks
    if min(shape[1:3]) < smallest:
        raise ValueError(
            f"{num_blocks} blocks, each halving the image, need images of at least {smallest}x"
            f"{smallest}, but these are {shape[1]}x{shape[2]}. Use fewer blocks or larger images."
        )


def norm_name(name: str, known: Sequence[str]) -> None:
    """A norm is chosen by its name."""
    if name not in known:
        raise ValueError(f"norm must be one of {', '.join(known)}, but norm={name!r}.")


def blocks(value: Sequence[Sequence[int]]) -> None:
    """A network has at least one block, and a block at least one convolution."""
    if not value or not all(value):
        raise ValueError(
            "blocks must list the features of at least one convolution in each of at least one "
            f"block, but blocks={value}. An example: ((64, 64), (128, 128))."
        )


def resnet_depth(value: int) -> int:
    """The layers of a ResNet are 3 stages of n blocks of 2, the first one and the last one.

    Returns:
        The number n of blocks in a stage.
    """
    blocks, rest = divmod(value - 2, 6)
    if not isinstance(value, int) or rest or blocks < 1:
        below = 6 * int(blocks) + 2
        nearest = f"{below} and {below + 6}" if blocks >= 1 else "8 and 14"
        raise ValueError(
            "depth must be a whole number 6n + 2, which is 3 stages of n blocks of 2 convolutions, "
            "a first convolution and a dense layer, with n at least 1, but "
            f"depth={value}. The nearest that fit are {nearest}."
        )
    return blocks
