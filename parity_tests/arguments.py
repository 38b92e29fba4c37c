"""Arguments of every type for every public constructor and function, and what becomes of each.

`VALUES` has numbers, flags, names, arrays, containers and dtypes. A `Target` is a constructor or
function; `parity_tests.argument_targets` has them all. `outcome` puts one value in the place of one
argument, and says how that ends: in the right result, in an error of this project that contains the
value, or in an error of Flax's, PyTorch's, JAX's or Python's that is clear. Anything else is
unclear.
"""

import math
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.errors import FlaxError

import bcn_flax
import bcn_flax.linen
import bcn_flax.nnx
import bcn_flax.surgery.linen
import bcn_flax.surgery.nnx
import bcn_torch

ROOT = Path(__file__).parents[1]
OURS = (ROOT / "bcn_flax", ROOT / "bcn_torch")


class Value(NamedTuple):
    """A value to try.

    Attributes:
        value: the value.
        plain: what it should be taken for: the Python number of an array, for example.
    """

    value: Any
    plain: Any

    def __str__(self) -> str:
        shown = re.sub(r"0x\w+", "0x", " ".join(repr(self.value).split()))
        return f"{type(self.value).__name__} {shown}"[:60]


X = np.linspace(-1, 1, 2 * 4 * 4).astype(np.float32).reshape(2, 4, 4)
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
NAN, INF = math.nan, math.inf
PLAIN = (
    *(None, True, False, 0, 1, 2, 3, 4, 8, -1, -2, -5, 10**30),
    *(0.0, 0.5, 1.0, 4.0, -0.5, 1.5, 1e-5, 1e-40, 1e39, NAN, INF, -INF, 1j, Fraction(1, 2)),
    *("", "0.5", "4", "False", "biased", "unbiased", "added_to_variance", "SAME", b"x"),
    *([], [2], (2,), (0.5,), ((4,),), ["a"], {}, {"a": 1}, {"params": {}}, set(), range(2)),
    *(object(), Ellipsis, Decimal("0.5"), int, len, np.linspace),
    *(jnp.bfloat16, np.dtype("float16"), jnp.int32, jnp.bool_, jnp.complex64, "int32"),
    *(torch.float32, torch.bfloat16, torch.int32, torch.complex64),
    *(bcn_flax.Standardization(), bcn_torch.Standardization()),
    *(bcn_flax.Standardization(gain=True), bcn_torch.Standardization(gain=True)),
    *(np.array([0.5]), np.array([2]), np.array([2, 1]), np.array([[0.5]]), jnp.array([0.5])),
    *(torch.tensor([0.5]), torch.tensor([2])),
    *(X, X > 0, X.astype(int), X + 1j, X[:0], X[0, 0], X.astype(object), X.astype(str)),
    *(torch.tensor(X), torch.tensor(X) > 0, torch.tensor(X).int(), torch.tensor(X) * 1j),
    *(np.array("x"), np.array(None, object), np.str_("x"), np.complex64(1)),
)
VALUES = (
    *(Value(value, value) for value in PLAIN),
    *(
        Value(value, plain)
        for plain, values in {
            0.5: (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5)),
            0.25: (jnp.float32(0.25), jnp.bfloat16(0.25), torch.tensor(0.25)),
            1.5: (np.float32(1.5), jnp.float32(1.5), torch.tensor(1.5)),
            NAN: (np.float32(NAN), jnp.float32(NAN)),
            2: (np.int64(2), np.uint8(2), np.array(2), jnp.int32(2), torch.tensor(2)),
            0: (np.int32(0), np.array(0), jnp.int32(0)),
            3: (np.int64(3), jnp.int32(3), torch.tensor(3)),
            True: (),
        }.items()
        for value in values
    ),
    *(Value(value, True) for value in (np.True_, np.array(True), jnp.array(True))),
    *(Value(value, False) for value in (np.False_, np.array(False), torch.tensor(False))),
    *(Value(value, jnp.float32) for value in (float, "float32", np.dtype("float32"))),
)

# --- Which values an argument takes ---------------------------------------------------------------

Takes = Callable[[Any], bool]


def real(value: Any) -> bool:
    return isinstance(value, int | float | Fraction) and not isinstance(value, bool)


def integer(value: Any) -> bool:
    return type(value) is int


def flag(value: Any) -> bool:
    return type(value) in (bool, int) and value in (0, 1)


def floats(value: Any) -> bool:
    return (
        value is None
        or any(value is x for x in (jnp.float32, jnp.bfloat16))
        or (isinstance(value, np.dtype) and value == np.float16)
    )


def like(array: np.ndarray) -> Takes:
    """An array of that shape and kind of numbers."""

    def takes(value: Any) -> bool:
        is_array = isinstance(value, np.ndarray | jax.Array | torch.Tensor)
        return (
            is_array
            and value.shape == array.shape
            and np.asarray(value).dtype.kind == array.dtype.kind
        )

    return takes


def tensor(array: np.ndarray) -> Takes:
    return lambda value: isinstance(value, torch.Tensor) and like(array)(value)


def or_none(takes: Takes) -> Takes:
    return lambda value: value is None or takes(value)


def one_of(*values: Any) -> Takes:
    return lambda value: any(type(value) is type(x) and value == x for x in values)


def nothing(value: Any) -> bool:
    return False


EPSILON = lambda value: real(value) and TINY <= value <= LARGEST  # noqa: E731
UNIT = lambda value: real(value) and 0 <= value <= 1  # noqa: E731
DIVISOR = lambda value: integer(value) and value in (1, 2, 4)  # noqa: E731

TAKES: dict[str, Takes] = {
    "use_running_average": flag,
    "axis": lambda value: integer(value) and value in (1, 2, -1, -2),
    "momentum": UNIT,
    "epsilon": EPSILON,
    "eps": EPSILON,
    "batch_epsilon": or_none(EPSILON),
    "batch_eps": or_none(EPSILON),
    "dtype": floats,
    "param_dtype": lambda value: value is not None and floats(value),
    "use_bias": flag,
    "use_scale": flag,
    "affine": flag,
    "estimate": flag,
    "bias_init": nothing,
    "scale_init": nothing,
    "axis_name": or_none(nothing),
    "axis_index_groups": or_none(one_of(((4,),))),
    "running_variance": one_of("biased", "unbiased"),
    "update_stats": or_none(flag),
    "num_features": one_of(4),
    "channels": one_of(4),
    "num_groups": DIVISOR,
    "groups": DIVISOR,
    "group_size": or_none(nothing),
    "mask": or_none(like(X > 0)),
    "x": like(X),
    "rngs": nothing,
    "bias_metadata": lambda value: isinstance(value, dict),
    "scale_metadata": lambda value: isinstance(value, dict),
}


class Target(NamedTuple):
    """A constructor or function.

    Attributes:
        name: as users write it.
        run: calls it with arguments by name, and what it made with those of the form `call.x`.
        base: arguments that work.
        parameters: the names of all arguments.
        takes: which values they take; by default as in `TAKES`.
        reference: the same by Flax or PyTorch.
        shared: the arguments that go to Flax or PyTorch as they are, which decide what is right.
    """

    name: str
    run: Callable[[Mapping[str, Any]], Any]
    base: Mapping[str, Any]
    parameters: tuple[str, ...]
    takes: Mapping[str, Takes] = {}
    reference: Callable[[Mapping[str, Any]], Any] | None = None
    shared: frozenset[str] = frozenset()


# --- How it ends ----------------------------------------------------------------------------------

CALLED = ("bias_init", "scale_init", "conv", "norm", "leave", "report", "names")
CLEAR: tuple[tuple[type[Exception], str], ...] = (
    (TypeError, "Overflow when unpacking long"),
    (ValueError, "an example input is needed"),
    # They show the shape that the value has led to.
    (ValueError, r"at least 2 weights per output channel .* of shape"),
    (UserWarning, "has a single value"),
)


def outcome(target: Target, parameter: str, value: Value) -> str:
    """One word, and if that is "unclear" what happened."""
    try:
        result = target.run({**target.base, parameter: value.value})
    except Exception as error:
        return error_outcome(target, parameter, value, error)
    plain = {**target.base, parameter: value.plain}
    try:
        if parameter in target.shared:
            expected = target.reference({**target.base, parameter: value.value})
        elif takes_of(target, parameter)(value.plain):
            expected = target.run(plain)
        else:
            return "unclear: accepted"
    except Exception as error:
        return f"unclear: accepted, but not as {value.plain!r}: {error}"
    wrong = difference(result, expected)
    return f"unclear: {wrong}" if wrong else "right"


def takes_of(target: Target, parameter: str) -> Takes:
    name = parameter.removeprefix("call.")
    return {**TAKES, name: TAKES.get(name, nothing), **target.takes}.get(parameter) or TAKES[name]


def error_outcome(target: Target, parameter: str, value: Value, error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(place).is_relative_to(OURS[0]) or Path(place).is_relative_to(OURS[1])
    if (
        ours
        and isinstance(error, ValueError | UserWarning)
        and any(form in str(error) for form in (*seen(value.value), *seen(value.plain)))
    ):
        if parameter not in target.shared and takes_of(target, parameter)(value.plain):
            return f"unclear: refused: {error}"
        return "ours"
    if target.reference is not None:
        try:
            target.reference({**target.base, parameter: value.value})
        except Exception as theirs:
            if type(theirs) is type(error) and alike(theirs) == alike(error):
                return "theirs"
    if callable(value.value) and parameter.rpartition(".")[2] in CALLED:
        return "theirs"  # an error of the function that was given
    if isinstance(error, FlaxError):
        return "theirs"
    for kind, pattern in CLEAR:
        if type(error) is kind and re.search(pattern, str(error)):
            return "ours" if ours else "theirs"
    return f"unclear: {type(error).__name__}: {str(error)[:150]!r} at {Path(place).name}"


def alike(error: Exception) -> str:
    """The beginning of an error's message, without what is the name of a layer."""
    names = r"<class '[^']*'>|WS|Parameter|Tensor|0x\w+"
    return " ".join(re.sub(names, "", str(error)).split())[:100]


def seen(value: Any) -> Iterator[str]:
    """Forms of a value of which an error shall have one."""
    yield from (repr(value), str(value) or "''", f"{value}")
    yield f"type {type(value).__name__}"
    if isinstance(value, Mapping):
        yield from (form for key in value for form in (repr(key), f"  {key} is"))
    if isinstance(value, list | tuple | dict | set) and value in (
        [],
        (),
        {},
        set(),
        {"params": {}},
    ):
        yield from ("missing", "unexpected", "at least one", "[]")  # what there should be
    if isinstance(value, list | tuple) and value:
        yield from seen(value[0])
    if isinstance(value, bool):
        yield f" {int(value)},"
    if isinstance(value, bcn_flax.Standardization | bcn_torch.Standardization):
        yield f"gain={value.gain}"
    for as_array in (np.asarray, jnp.asarray):
        with suppress(Exception):
            array = as_array(value)
            yield from (f"is {array.dtype}", f"is torch.{array.dtype}")
            yield from (f"is {array.shape}", f"shape {array.shape}")
            yield from (f"has {n}" for n in array.shape[-1:])


def leaves(tree: Any) -> list[Any]:
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, torch.Tensor))
    return [np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x) for x in found]


def difference(result: Any, expected: Any) -> str:
    """What is different, or not finite; "" if nothing is."""
    a, b = leaves(result), leaves(expected)
    if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
        return f"other shapes: {[(x.shape, x.dtype) for x in a]} {[(x.shape, x.dtype) for x in b]}"[
            :300
        ]
    if not all(
        np.array_equal(x, y, equal_nan=x.dtype.kind in "fc") for x, y in zip(a, b, strict=True)
    ):
        return "other numbers"
    return ""
