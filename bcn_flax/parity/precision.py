"""Whether modules compute in float64 throughout, when they are given float64."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from bcn_flax.parity.shaking import is_floating


def flax_narrows(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether anything of float64 becomes narrower in a function."""
    return _narrows(jax.make_jaxpr(function)(*arguments).jaxpr)


def torch_narrows(module: Any, inputs: Sequence[Any]) -> bool:
    """Whether anything of float64 becomes narrower in a module."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        narrowed = False

        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            returned = function(*args, **(kwargs or {}))
            given, made = (
                {x.dtype for x in jax.tree.leaves(tree) if is_floating(x)}
                for tree in ((args, kwargs), returned)
            )
            self.narrowed |= torch.float64 in given and bool(made - {torch.float64})
            return returned

    with Watch() as watch:
        module(*inputs)
    return watch.narrowed


def _narrows(jaxpr: Any) -> bool:
    return any(map(_equation_narrows, jaxpr.eqns))


def _equation_narrows(equation: Any) -> bool:
    inner = list(jaxprs_in_params(equation.params))
    if inner:
        return any(map(_narrows, inner))
    given, made = map(_floats, (equation.invars, equation.outvars))
    return np.float64 in given and bool(made - {np.float64})


def _floats(variables: Sequence[Any]) -> set[Any]:
    dtypes = {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}
    return {np.dtype(d).type for d in dtypes if jnp.issubdtype(d, jnp.floating)}
