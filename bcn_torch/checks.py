"""The rules for arguments and inputs that several files of the library check.

Each message states the rule, the values seen and the way out.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def require_input(x: Tensor, channels: int) -> None:
    """The input must be floating-point, `[batch, channels, *]`, and not empty."""
    require_floating_point(x.dtype)
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(
            "The input must have a batch axis and a channel axis, [batch, channels, *], but its "
            f"shape is {shape}. For a single sample, add the batch axis with x[None]."
        )
    if shape[1] != channels:
        raise ValueError(
            f"The number of channels, axis 1 of [batch, channels, *], must be {channels} here, but "
            f"it is {shape[1]}: the input's shape is {shape}. If its channels come last, move them "
            "with x.movedim(-1, 1); otherwise make the module for that many channels."
        )
    if math.prod(shape) == 0:
        raise ValueError(
            f"The input must not be empty, but its shape is {shape}. Skip the empty batch."
        )


def require_floating_point(dtype: torch.dtype, what: str = "input") -> None:
    """The input, or the weight, must be of a real floating-point type."""
    if not dtype.is_floating_point:
        raise ValueError(
            f"The {what} must be of a real floating-point type, but it is {dtype}. "
            "Convert it first, for example with x.float()."
        )


def require_channel_count(channels: int) -> None:
    """A layer must have at least one channel."""
    if channels < 1:
        raise ValueError(f"There must be at least 1 channel, but channels={channels}.")


def require_group_count(channels: int, groups: int) -> None:
    """The number of groups must divide the number of channels."""
    require_channel_count(channels)
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    if groups not in divisors:
        raise ValueError(
            f"groups must divide the number of channels, but groups={groups} and there are "
            f"{channels} channels. Any of {', '.join(map(str, divisors))} would do."
        )


def require_momentum(value: float) -> None:
    """The weight of the new value must be from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(
            "momentum is the weight of the new value in the running estimates and must be from 0 "
            f"to 1, but momentum={value}. A Flax momentum m, the weight of the old value, is 1 - m "
            "here: 0.9 there is 0.1 here."
        )


def require_eps(value: float) -> None:
    """Eps must be positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(
            f"eps must be positive and finite, but eps={value}. The usual one is 1e-5."
        )


def require_one_of(argument: str, value: str, names: Iterable[str]) -> None:
    """The value must be one of these names."""
    if value not in names:
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, names))}, but {argument}={value!r}."
        )
