"""Every complaint about bad arguments or input: one function a rule.

Each message states the rule, the values seen and the way out.
"""

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def activation(x: Tensor, channels: int) -> None:
    """The input is one that a layer for so many channels can normalize: all four rules below."""
    floating_point(x.dtype)
    batch_and_channels(x.shape)
    same_channels(x.shape, channels)
    not_empty(x.shape)


def floating_point(dtype: torch.dtype, what: str = "input") -> None:
    """Only real floating-point numbers can be normalized."""
    if not dtype.is_floating_point:
        raise ValueError(
            f"The {what} must be of a real floating-point type, but it is {dtype}. "
            "Convert it first, for example with x.float()."
        )


def batch_and_channels(shape: Sequence[int]) -> None:
    """The input has a batch axis, which comes first, and a channel axis, which comes second."""
    if len(shape) < 2:
        raise ValueError(
            "The input must have a batch axis and a channel axis, [batch, channels, *], but its "
            f"shape is {tuple(shape)}. For a single sample, add the batch axis with x[None]."
        )


def same_channels(shape: Sequence[int], channels: int) -> None:
    """The input has as many channels as the layer was made for."""
    if shape[1] != channels:
        raise ValueError(
            f"The number of channels, axis 1 of [batch, channels, *], must be {channels} here, but "
            f"it is {shape[1]}: the input's shape is {tuple(shape)}. If its channels come last, "
            "move them with x.movedim(-1, 1); otherwise make the module for that many channels."
        )


def not_empty(shape: Sequence[int]) -> None:
    """There is no mean of nothing."""
    if math.prod(shape) == 0:
        raise ValueError(
            f"The input must not be empty, but its shape is {tuple(shape)}. Skip the empty batch."
        )


def channel_count(channels: int) -> None:
    """There is something to normalize."""
    if channels < 1:
        raise ValueError(f"There must be at least 1 channel, but channels={channels}.")


def group_count(channels: int, groups: int) -> None:
    """Groups are of the same size."""
    channel_count(channels)
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    if groups not in divisors:
        raise ValueError(
            f"groups must divide the number of channels, but groups={groups} and there are "
            f"{channels} channels. Any of {', '.join(map(str, divisors))} would do."
        )


def momentum(value: float) -> None:
    """A moving average weighs the new value by a number from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(
            "momentum is the weight of the new value in the running estimates and must be from 0 "
            f"to 1, but momentum={value}. A Flax momentum m, the weight of the old value, is 1 - m "
            "here: 0.9 there is 0.1 here."
        )


def eps(value: float) -> None:
    """A positive number keeps the square root away from 0."""
    if not 0 < value < math.inf:
        raise ValueError(
            f"eps must be positive and finite, but eps={value}. The usual one is 1e-5."
        )


def several_values(shape: Sequence[int]) -> None:
    """The variance of a single value is 0, and says nothing.

    Silent in a compiled graph, which has no place for a warning.
    """
    if torch.compiler.is_compiling():
        return
    if math.prod(shape) == shape[1]:
        warnings.warn(
            f"The batch has a single value per channel (its shape is {tuple(shape)}), so its "
            "variance is 0 and a batch norm in training learns nothing from it. Use a larger "
            "batch, or evaluate with .eval().",
            stacklevel=2,
        )


def fan_in(shape: Sequence[int]) -> None:
    """Weight standardization needs two weights or more for each output channel."""
    weights = math.prod(shape[1:])
    if weights < 2:
        raise ValueError(
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            f"weight of shape {tuple(shape)} has {weights}. Use the layer without weight "
            "standardization here."
        )


def norm_name(norm: str, names: Iterable[str]) -> None:
    """The norm is one that the network knows."""
    if norm not in names:
        raise ValueError(f"norm must be one of {', '.join(map(repr, names))}, but norm={norm!r}.")


def blocks(value: Sequence[Sequence[int]]) -> None:
    """The network has a block, and each block a convolution."""
    if not value or not all(value):
        raise ValueError(
            "blocks must have at least one block, and each block at least one convolution, but "
            f"blocks={value!r}. Give each block the output channels of its convolutions, for "
            "example ((64, 64), (128, 128))."
        )


def image_batch(x: Tensor, channels: int, halvings: int) -> None:
    """The input is a batch of images, large enough to be halved so many times."""
    if x.dim() != 4:
        raise ValueError(
            "The input must be a batch of images, [batch, channels, height, width], but its shape "
            f"is {tuple(x.shape)}. For a single image, add the batch axis with x[None]."
        )
    activation(x, channels)
    height, width = x.shape[2:]
    smallest = 2**halvings
    if min(height, width) < smallest:
        raise ValueError(
            f"The images are {height}x{width}, too small for {halvings} blocks, each of which "
            f"halves them: the smallest size is {smallest}x{smallest}. Use larger images, or fewer "
            "blocks."
        )
