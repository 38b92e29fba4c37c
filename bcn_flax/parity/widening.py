"""Compute in float64 whatever a module computes in a narrower type.

Modules narrow what they are given: by their `dtype`, a cast, a softmax in float32. For a comparison
in float64 they are widened. In Flax, `wide_dtypes` and `set_wide_dtypes` replace the `dtype`s of
modules, so that constants have the digits of float64, too. What still narrows in the traced
program, `evaluate` runs in float64: every value that is declared as a narrower float is one of
float64, and casts between them do nothing. In PyTorch, `torch_side.widening` replaces the dtypes in
calls of functions. Both libraries and the caller's modules are left unchanged.

A constant in the program has been rounded already. Any number that is rounded to it may be meant: a
decimal number of few digits, such as 1e-5, a fraction, a root, or a logarithm is taken.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.lax import DotAlgorithm, DotAlgorithmPreset

# Calls of a program, which needs no call here.
_CALLS = {
    "checkpoint",
    "closed_call",
    "composite",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "jit",
    "pjit",
    "remat",
    "remat2",
}
# Operations that depend on the bits of a number, or on code that was written for one type.
_OF_ONE_TYPE = {
    "bitcast_convert_type",
    "ffi_call",
    "io_callback",
    "nextafter",
    "pallas_call",
    "pure_callback",
    "shard_map",
}


class WideningError(Exception):
    """An operation cannot be computed in float64."""


def wide_dtypes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in which linen's modules have float64 in the place of a narrower dtype."""

    def widen(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        # A bound module is a copy, which lives as long as the call.
        _widen_dtype(context.module)
        return method(*args, **kwargs)

    def wide(*args: Any) -> Any:
        with nn.intercept_methods(widen):
            return forward(*args)

    return wide


def set_wide_dtypes(module: nnx.Module) -> None:
    """Replace each narrower dtype of an NNX module and of its parts by float64."""
    for _, part in nnx.iter_modules(module):
        _widen_dtype(part)


def _widen_dtype(module: Any) -> None:
    if is_narrow(getattr(module, "dtype", None)):
        object.__setattr__(module, "dtype", jnp.float64)


def is_narrow(dtype: Any) -> bool:
    """Whether it is a floating dtype narrower than float64."""
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype) != np.float64
    except TypeError:
        return False


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, computed in float64; needs JAX's float64."""

    def wide(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        return _unflattened(program, shapes, args)

    return wide


def widened_program(traced: Any) -> Callable[..., Any]:
    """The function that was traced by JAX, computed in float64."""
    return lambda *args: _unflattened(traced.jaxpr, traced.out_info, args)


def _unflattened(program: ClosedJaxpr, shapes: Any, args: Any) -> Any:
    outputs = evaluate(program, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def evaluate(program: ClosedJaxpr | Jaxpr, *arguments: Any) -> list[Any]:
    """The outputs of a program, computed in float64.

    Raises:
        WideningError: an operation cannot be.
    """
    constants = getattr(program, "consts", ())
    program = getattr(program, "jaxpr", program)
    values: dict[Any, Any] = {}

    def read(x: Any) -> Any:
        return _wide_literal(x) if isinstance(x, Literal) else values[x]

    def write(variables: Sequence[Any], new: Sequence[Any]) -> None:
        values.update((v, _wide(x)) for v, x in zip(variables, new, strict=True))

    write(program.constvars, constants)
    write(program.invars, arguments)
    for equation in program.eqns:
        write(equation.outvars, _outputs(equation, list(map(read, equation.invars))))
    return list(map(read, program.outvars))


def _outputs(equation: Any, values: list[Any]) -> list[Any]:
    """The outputs of an operation."""
    primitive, params = equation.primitive, equation.params
    if primitive.name in _CALLS:
        return evaluate(params.get("call_jaxpr", params.get("jaxpr")), *values)
    if primitive.name == "reduce_precision":
        return values
    if primitive.name in _OF_ONE_TYPE:
        values = [_as_declared(x, v.aval) for x, v in zip(values, equation.invars, strict=True)]
    else:
        params = jax.tree.map(_wide_parameter, params)
    try:
        outputs = primitive.bind(*values, **primitive.get_bind_params(params))
    except Exception as error:
        raise WideningError(f"{primitive.name} cannot be computed in float64: {error}") from error
    return list(outputs) if primitive.multiple_results else [outputs]


def _wide_parameter(x: Any) -> Any:
    """A parameter of an operation: a dtype, a program, or something that does not change."""
    if isinstance(x, ClosedJaxpr | Jaxpr):
        made = jax.make_jaxpr(partial(evaluate, x))(*_wide_inputs(x))
        return made if isinstance(x, ClosedJaxpr) else made.jaxpr
    if isinstance(x, DotAlgorithm | DotAlgorithmPreset):
        return None
    return np.dtype(np.float64) if isinstance(x, np.dtype | type) and is_narrow(x) else x


def _wide_inputs(program: ClosedJaxpr | Jaxpr) -> list[Any]:
    declared: list[Any] = [v.aval for v in getattr(program, "jaxpr", program).invars]
    return [
        jax.ShapeDtypeStruct(x.shape, np.float64 if is_narrow(x.dtype) else x.dtype)
        for x in declared
    ]


def _wide(x: Any) -> Any:
    return jnp.asarray(x, np.float64) if is_narrow(jnp.result_type(x)) else x


def _as_declared(x: Any, aval: Any) -> Any:
    return jnp.asarray(x, aval.dtype) if is_narrow(aval.dtype) else x


def _wide_literal(x: Any) -> Any:
    dtype = x.aval.dtype
    return np.float64(_meant(float(x.val), dtype)) if is_narrow(dtype) else x.val


def _meant(value: float, dtype: Any) -> float:
    """The number that a constant of a narrower type stands for.

    Raises:
        WideningError: too many numbers are rounded to it, as its type has few digits.
    """
    digits = int(ml_dtypes.finfo(dtype).precision)
    decimal = float(f"{value:.{digits}g}")
    simple = float(np.copysign(_SIMPLE[np.abs(_SIMPLE - abs(value)).argmin()], value))
    if float(dtype.type(decimal)) == value:
        return decimal
    if value == simple or value.is_integer() or not np.isfinite(value):
        return value
    if np.dtype(dtype) != np.float32:
        raise WideningError(
            f"constant {value:g} has been rounded to {dtype}, and what it was before is not known"
        )
    return simple if float(dtype.type(simple)) == value else value


_FRACTIONS = np.divide.outer(np.arange(1.0, 17), np.arange(1.0, 17)).ravel()
# The positive numbers of which formulas are made, such as those of a GELU and its derivative.
_SIMPLE = np.concatenate(
    [
        _FRACTIONS,
        np.pi * _FRACTIONS,
        np.sqrt(_FRACTIONS),
        np.sqrt(np.pi * _FRACTIONS),
        np.sqrt(_FRACTIONS / np.pi),
        np.abs(np.log(_FRACTIONS)),
    ]
)
