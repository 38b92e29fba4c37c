"""The rules for arguments that linen, NNX and the models share.

Each message states the rule, the values seen and the way out. NumPy scalars and arrays without axes
are taken as Python numbers, and so are those of PyTorch.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Rule = Callable[[str, Any], Any]
"""Takes the name and the value of an argument, and returns the value that is used."""

_SMALLEST, _LARGEST = (float(x) for x in (np.finfo("f4").tiny, np.finfo("f4").max))


def require_running_average_flag(layer: str, attribute: Any, argument: Any) -> bool:
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
    return require_flag("use_running_average", flag)


def or_none(rule: Rule) -> Rule:
    """The rule, for an argument that may be None."""
    return lambda name, value: None if value is None else rule(name, value)


def require_flag(name: str, value: Any) -> bool:
    """A flag must be true or false, or 1 or 0.

    Returns:
        A Python bool.
    """
    flag = _as_python(value)
    if not isinstance(flag, int) or flag not in (0, 1):
        raise ValueError(f"{name} must be True or False, but {_seen(name, value)}.")
    return bool(flag)


def require_integer(name: str, value: Any) -> int:
    """An integer must be one of Python or NumPy, or an array without axes; not a bool.

    Returns:
        A Python integer.
    """
    integer = _as_python(value)
    if not isinstance(integer, Integral) or isinstance(integer, bool):
        raise ValueError(f"{name} must be an integer, but {_seen(name, value)}.")
    return int(integer)


def require_count(name: str, value: Any) -> int:
    """A number of channels must be an integer, and at least 1."""
    count = require_integer(name, value)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, but {name}={count}.")
    return count


def require_axis(name: str, value: Any) -> int:
    """The channel axis must be one integer."""
    try:
        return require_integer(name, value)
    except ValueError:
        raise ValueError(
            f"The channel axis must be one integer, but {name}={value!r}. Merge several channel "
            "axes into one with a reshape."
        ) from None


def require_axis_name(name: str, value: Any) -> Any:
    """An axis of devices has a name, and several have a tuple of names."""
    if not all(isinstance(axis, str) for axis in (value if isinstance(value, tuple) else [value])):
        raise ValueError(
            f"{name} must be the name of an axis of vmap, shard_map or pmap, or a tuple of names, "
            f"but {_seen(name, value)}."
        )
    return value


def require_device_groups(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    """Groups of devices must be sequences of their numbers.

    Returns:
        The same as tuples of Python integers, which are hashable.
    """
    try:
        is_sequence = isinstance(value, list | tuple | np.ndarray)
        groups = [[require_integer(name, i) for i in group] for group in value]
    except (TypeError, ValueError):
        is_sequence = False
    if not is_sequence or not groups:
        raise ValueError(
            f"{name} must be groups of numbers of devices, for example ((0, 1), (2, 3)), but "
            f"{_seen(name, value)}."
        )
    return tuple(map(tuple, groups))


def require_group_count(channels: int, num_groups: Any, group_size: Any) -> int:
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
    value = require_integer(name, value)
    if value < 1 or channels % value:
        low = [d for d in range(1, math.isqrt(channels) + 1) if channels % d == 0]
        divisors = sorted({*low, *(channels // d for d in low)})
        raise ValueError(
            f"{name} must divide the number of channels, but {name}={value} and there are "
            f"{channels} channels. Any of {', '.join(map(str, divisors))} would do."
        )
    return int(value if num_groups is not None else channels // value)


def require_momentum(name: str, value: Any) -> Any:
    """The weight of the old running average must be from 0 to 1.

    Returns:
        A Python float; a traced number, for example of a schedule inside `jit`, unchecked.
    """
    momentum = _require_real(name, value)
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum <= 1:
        raise ValueError(
            f"{name} is the weight of the old running average and must be from 0 to 1, but "
            f"{name}={value}. A PyTorch momentum m is 1 - m here: 0.1 there is 0.9 here."
        )
    return momentum


def require_epsilon(name: str, value: Any) -> Any:
    """Epsilon must be positive, finite and normal in float32, the precision of the arithmetic.

    A subnormal number may be flushed to 0, and a constant channel is then 0 / 0.

    Returns:
        A Python float; a traced number, unchecked.
    """
    epsilon = _require_real(name, value)
    if not isinstance(epsilon, jax.core.Tracer) and not _SMALLEST <= epsilon <= _LARGEST:
        raise ValueError(
            f"{name} must be positive and finite, and a normal number of float32, from "
            f"{_SMALLEST:.3g} to {_LARGEST:.3g}, but {name}={value}. The usual one is 1e-5."
        )
    return epsilon


def require_factor(name: str, value: Any) -> float:
    """A factor must be finite and not 0, as a normal number of float32.

    Returns:
        A Python float.
    """
    factor = _require_real(name, value)
    if not _SMALLEST <= abs(factor) <= _LARGEST:
        raise ValueError(
            f"{name} must be finite and not 0, as a normal number of float32, but {name}={value}. "
            "Without a factor it is 1.0."
        )
    return factor


def require_float_dtype(name: str, value: Any) -> Any:
    """A dtype must be of real floating-point numbers."""
    # NumPy takes None and arrays for dtypes, too.
    no_dtype = value is None or isinstance(value, np.ndarray | np.generic | jax.Array)
    try:
        floating = not no_dtype and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except (TypeError, ValueError):
        floating = False
    if not floating:
        raise ValueError(
            f"{name} must be a real floating-point type, such as jnp.float32 or jnp.bfloat16, but "
            f"{_seen(name, value)}."
        )
    return value


def require_callable(name: str, value: Any) -> Any:
    """A function, or a class, must be callable."""
    if not callable(value):
        raise ValueError(f"{name} must be callable, but {_seen(name, value)}.")
    return value


def require_one_of(argument: str, value: Any, names: Sequence[str]) -> Any:
    """The value must be one of these names."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, but {argument}={value!r}.")
    return value


def as_array(what: str, value: Any) -> jax.Array:
    """The value as an array of JAX."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError, DeprecationWarning):
        raise ValueError(
            f"The {what} must be an array of numbers, but it is {value!r}, of type "
            f"{type(value).__name__}."
        ) from None


def require_type(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """The value must be an instance of a class, described as `what`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {what}, but {_seen(name, value)}.")


def _require_real(name: str, value: Any) -> Any:
    """A Python float, also of a number that is too large; a traced number as it is."""
    traced = isinstance(value, jax.core.Tracer)
    if traced and value.ndim == 0 and jnp.isrealobj(value):
        return value
    number = value if traced else _as_python(value)
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
