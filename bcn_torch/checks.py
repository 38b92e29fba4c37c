"""The rules for arguments and inputs that several files of the library check.

Each message states the rule, the values seen and the way out. NumPy scalars and arrays without axes
are taken as Python numbers.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

_FLOAT32 = torch.finfo(torch.float32)


def require_input(x: Tensor, channels: int) -> None:
    """The input must be floating-point, `[batch, channels, *]`, and not empty."""
    require_floating_point(x)
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


def require_floating_point(x: Any, what: str = "input") -> None:
    """The input, or the weight, must be a tensor of a real floating-point type."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"The {what} must be a tensor of PyTorch, but it is {x!r}, of type {type(x).__name__}. "
            "Convert it first, for example with torch.as_tensor(x)."
        )
    if not x.dtype.is_floating_point:
        raise ValueError(
            f"The {what} must be of a real floating-point type, but it is {x.dtype}. "
            "Convert it first, for example with x.float()."
        )


def require_integer(name: str, value: Any) -> int:
    """An integer must be one of Python or NumPy, or an array without axes; not a bool.

    Returns:
        A Python integer.
    """
    integer = _as_python(value)
    if not isinstance(integer, Integral) or isinstance(integer, bool):
        raise ValueError(f"{name} must be an integer, but {_seen(name, value)}.")
    return int(integer)


def require_flag(name: str, value: Any) -> bool:
    """A flag must be true or false, or 1 or 0.

    Returns:
        A Python bool.
    """
    flag = _as_python(value)
    if not isinstance(flag, int) or flag not in (0, 1):
        raise ValueError(f"{name} must be True or False, but {_seen(name, value)}.")
    return bool(flag)


def require_flag_or_none(name: str, value: Any) -> bool | None:
    """A flag, or None for the default."""
    return None if value is None else require_flag(name, value)


def require_channel_count(value: Any, name: str = "channels") -> int:
    """A layer must have at least one channel.

    Returns:
        A Python integer.
    """
    channels = require_integer(name, value)
    if channels < 1:
        raise ValueError(f"There must be at least 1 channel, but {name}={channels}.")
    return channels


def require_group_count(channels: int, value: Any) -> int:
    """The number of groups must divide the number of channels.

    Returns:
        A Python integer.
    """
    groups = require_integer("groups", value)
    if groups < 1 or channels % groups:
        low = [d for d in range(1, math.isqrt(channels) + 1) if channels % d == 0]
        divisors = sorted({*low, *(channels // d for d in low)})
        raise ValueError(
            f"groups must divide the number of channels, but groups={groups} and there are "
            f"{channels} channels. Any of {', '.join(map(str, divisors))} would do."
        )
    return groups


def require_momentum(value: Any) -> float:
    """The weight of the new value must be from 0 to 1.

    Returns:
        A Python float.
    """
    momentum = _require_real("momentum", value)
    if not 0 <= momentum <= 1:
        raise ValueError(
            "momentum is the weight of the new value in the running estimates and must be from 0 "
            f"to 1, but momentum={value}. A Flax momentum m, the weight of the old value, is 1 - m "
            "here: 0.9 there is 0.1 here."
        )
    return momentum


def require_eps(value: Any, name: str = "eps") -> float:
    """Eps must be positive, finite and normal in float32, the precision of the arithmetic.

    A subnormal number may be flushed to 0, and a constant channel is then 0 / 0.

    Returns:
        A Python float.
    """
    eps = _require_real(name, value)
    if not _FLOAT32.tiny <= eps <= _FLOAT32.max:
        raise ValueError(
            f"{name} must be positive and finite, and a normal number of float32, from "
            f"{_FLOAT32.tiny:.3g} to {_FLOAT32.max:.3g}, but {name}={value}. The usual one is 1e-5."
        )
    return eps


def require_factor(name: str, value: Any) -> float:
    """A factor must be finite and not 0, as a normal number of float32.

    Returns:
        A Python float.
    """
    factor = _require_real(name, value)
    if not _FLOAT32.tiny <= abs(factor) <= _FLOAT32.max:
        raise ValueError(
            f"{name} must be finite and not 0, as a normal number of float32, but {name}={value}. "
            "Without a factor it is 1.0."
        )
    return factor


def require_one_of(argument: str, value: Any, names: Iterable[str]) -> None:
    """The value must be one of these names."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, names))}, but {argument}={value!r}."
        )


def require_callable(name: str, value: Any) -> None:
    """A function, or a class, must be callable."""
    if not callable(value):
        raise ValueError(f"{name} must be callable, but {_seen(name, value)}.")


def require_module(name: str, value: Any) -> None:
    """A model must be a module of PyTorch."""
    if not isinstance(value, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, but {_seen(name, value)}.")


def _require_real(name: str, value: Any) -> float:
    """A Python float, also of a number that is too large."""
    number = _as_python(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise ValueError(f"{name} must be a real number, but {_seen(name, value)}.")
    try:
        return float(number)
    except OverflowError:
        return math.inf  # out of every range


def _as_python(value: Any) -> Any:
    """The Python scalar of a NumPy scalar, or of an array without axes."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _seen(name: str, value: Any) -> str:
    """The value of an argument and its type, for the end of a message."""
    return f"{name}={value!r} is of type {type(value).__name__}"
