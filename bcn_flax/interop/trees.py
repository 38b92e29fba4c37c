"""Flax's two APIs as one tree: the variables of an NNX module, as linen would have them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax.interop import arrays
from bcn_flax.interop.complaints import differences, refuse
from bcn_flax.interop.layouts import Known
from bcn_flax.interop.naming import Path

Leaves = dict[Path, Any]
Variables = Mapping[str, Any]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def variables_of(module: nnx.Module) -> dict[str, Any]:
    """The parameters and statistics of an NNX module, as linen variables.

    An index joins the name of its list, as in linen: `layers`, 0 is `layers_0`. Of a module that
    occurs twice there is one copy. Other variables, such as random number generators, are left out.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> module = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jax.nn.relu)
        >>> jax.tree.map(lambda x: x.shape, variables_of(module))
        {'params': {'layers_0': {'bias': (2,), 'kernel': (3, 2)}}}

    Args:
        module: may be abstract, from `nnx.eval_shape`.

    Raises:
        ValueError: two variables would have the same name.
    """
    return unflatten_dict({path: v.get_value() for path, (_, v) in _nnx_leaves(module).items()})


def module_with(module: ModuleT, variables: Variables) -> ModuleT:
    """A copy of an NNX module with other parameters and statistics: the inverse of `variables_of`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> halved = module_with(module, jax.tree.map(lambda x: x / 2, variables_of(module)))

    Args:
        module: is not changed; may be abstract, from `nnx.eval_shape`.
        variables: all parameters and statistics, of linen or of `variables_of`; the copy holds them
            in the dtypes of `module`. Its other variables are copies of the module's.

    Raises:
        ValueError: a variable is missing, unexpected or misshapen; the message lists all of them.
    """
    copy = nnx.clone(module)
    places, leaves = _nnx_leaves(copy), flax_leaves(variables)
    refuse(
        "The variables must be those of the module, but:",
        differences(
            {name(path): arrays.shape(leaf) for path, leaf in leaves.items()},
            {name(path): arrays.shape(v) for path, (_, v) in places.items()},
        ),
    )
    return filled(
        copy, {path: jnp.asarray(leaves[path], v.dtype) for path, (_, v) in places.items()}
    )


def filled(module: ModuleT, leaves: Leaves) -> ModuleT:
    """The same NNX module, its parameters and statistics replaced, dtypes included."""
    places = _nnx_leaves(module)
    state = [(place, v.replace(leaves[path])) for path, (place, v) in places.items()]
    nnx.update(module, nnx.from_flat_state(state))
    return module


def flax_leaves(variables: Variables | nnx.Module) -> Leaves:
    """The arrays or shapes of linen variables, boxed or not, or of an NNX module, by path.

    Raises:
        ValueError: something is no array.
    """
    if isinstance(variables, nnx.Module):
        variables = variables_of(variables)
    if not isinstance(variables, Mapping):
        raise ValueError(
            "Flax's side must be linen variables, a mapping of collections, or an NNX module, but "
            f"it is of type {type(variables).__name__}."
        )
    leaves: Leaves = flatten_dict(meta.unbox(variables))
    refuse(
        "Flax's variables must be arrays or shapes, in nested mappings, but:",
        [
            f"{name(p)} is of type {type(x).__name__}"
            for p, x in leaves.items()
            if not arrays.is_array(x)
        ],
    )
    return leaves


def convolutions(like: Variables | nnx.Module) -> dict[Path, Known]:
    """Of each convolution in an NNX module, by its path, whether it is transposed and how."""
    if not isinstance(like, nnx.Module):
        return {}
    known = {}
    for place, module in nnx.iter_modules(like):
        if isinstance(module, nnx.ConvTranspose):
            known[joined(place)] = Known(True, bool(module.transpose_kernel))
        elif isinstance(module, nnx.Conv):
            known[joined(place)] = Known(False)
    return known


def name(path: Path) -> str:
    """A path as it is printed."""
    return "/".join(path)


def _nnx_leaves(module: nnx.Module) -> dict[Path, tuple[tuple[Any, ...], nnx.Variable[Any]]]:
    """By linen's path: where a parameter or a statistic is in the module, and its variable."""
    found = [
        ((collection, *joined(place)), (place, variable))
        for collection, kind in _COLLECTIONS.items()
        for place, variable in nnx.to_flat_state(nnx.state(module, kind))
    ]
    counts = Counter(path for path, _ in found)
    refuse(
        "An index joins the name of its list, which must give every variable its own name, but:",
        [f"{name(path)} is the name of {n} variables" for path, n in counts.items() if n > 1],
        "Rename the attribute that looks like a list's item.",
    )
    return dict(found)


def joined(place: Iterable[Any]) -> Path:
    """A place in an NNX module as linen's path: an index joins the name of its list."""
    path: list[str] = []
    for part in place:
        if isinstance(part, int) and path:
            path[-1] += f"_{part}"
        else:
            path.append(str(part))
    return tuple(path)
