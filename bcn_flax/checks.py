"""The rules for arguments that linen, NNX and the models share.

Each message states the rule, the values seen and the way out.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike


def require_running_average_flag(layer: str, attribute: bool | None, argument: bool | None) -> bool:
    """`use_running_average` must be given, in the call or the constructor.

    Returns:
        The argument of the call, or the attribute if there is none.
    """
    flag = attribute if argument is None else argument
    if flag is None:
        raise ValueError(
            f"{layer} needs use_running_average, true to normalize with the running averages "
            "(evaluation) or false to update them (training), but it is None. Either\n"
            f"  1. set it in the constructor: {layer}(use_running_average=not train),\n"
            "  2. pass it in the call: layer(x, use_running_average=not train), or\n"
            f"  3. set it for all layers at once: norm = partial({layer}, "
            "use_running_average=not train)."
        )
    return flag


def require_group_count(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """Exactly one of `num_groups` and `group_size` must be given, and divide the channels.

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
    return int(value if num_groups is not None else channels // value)


def require_momentum(value: ArrayLike) -> Any:
    """The weight of the old running average must be from 0 to 1.

    Returns:
        A Python float; a traced number, for example of a schedule inside `jit`, unchecked.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    # As a float, since inside `jit` a comparison of JAX's arrays is traced even if they are not.
    momentum = float(np.asarray(value))
    if not 0 <= momentum <= 1:
        raise ValueError(
            "momentum is the weight of the old running average and must be from 0 to 1, but "
            f"momentum={value}. A PyTorch momentum m is 1 - m here: 0.1 there is 0.9 here."
        )
    return momentum


def require_epsilon(value: ArrayLike) -> Any:
    """Epsilon must be positive and finite.

    Returns:
        A Python float; a traced number, unchecked.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    epsilon = float(np.asarray(value))
    if not 0 < epsilon < math.inf:
        raise ValueError(
            f"epsilon must be positive and finite, but epsilon={value}. The usual one is 1e-5."
        )
    return epsilon


def require_one_of(argument: str, value: str, names: Sequence[str]) -> None:
    """The value must be one of these names."""
    if value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, but {argument}={value!r}.")
