"""What can be converted: PyTorch's `state_dict` or module, linen's variables or an NNX module.

PyTorch's side becomes a mapping from keys to tensors, Flax's side a mapping from paths to leaves,
in which the variables of an NNX module have linen's paths.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax.interop.layouts import SKIPPED, LayerFacts, Path, Shape, is_array, path_name, shape

Tensors = Mapping[str, Any]
Leaves = dict[Path, Any]
Variables = Mapping[str, Any]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
_FROM_FLAX = "state_dict_from_variables makes a state_dict of Flax's variables or NNX modules."


def torch_tensors(source: Any) -> Tensors:
    """The `state_dict` that `source` is, or that a PyTorch module has.

    Raises:
        ValueError: it is neither; the message says what was found.
    """
    found = source.state_dict() if _is_torch_module(source) else source
    if not isinstance(found, Mapping):
        raise ValueError(
            "PyTorch's side must be a state_dict, a mapping from names to tensors, or a module, "
            f"but it is of type {type(found).__name__}. {_FROM_FLAX}"
        )
    refuse(
        "A state_dict must map names to tensors, but:",
        [
            f"{key!r} holds {_description(x)}"
            for key, x in found.items()
            if not (is_array(x) and isinstance(key, str))
        ],
        f"Of a checkpoint, give the part that holds the tensors. {_FROM_FLAX}",
    )
    return found


def torch_convolutions(source: Any) -> dict[str, LayerFacts]:
    """Which convolutions of a PyTorch module are transposed, by path; none for a `state_dict`."""
    if not _is_torch_module(source):
        return {}
    flags = {path: getattr(m, "transposed", None) for path, m in source.named_modules()}
    return {path: LayerFacts(flag) for path, flag in flags.items() if isinstance(flag, bool)}


def tied_tensors(tensors: Tensors, matched: Collection[str]) -> dict[str, str]:
    """The tensors that share memory with a matched one, and the key of that one."""
    first: dict[Hashable, str] = {}
    for key in tensors:
        if key in matched and _memory(tensors[key]) is not None:
            first.setdefault(_memory(tensors[key]), key)
    others = {key: first.get(_memory(tensor)) for key, tensor in tensors.items()}
    return {key: other for key, other in others.items() if other not in (None, key)}


def skipped_tensors(tensors: Tensors, matched: Collection[str]) -> dict[str, str]:
    """The other tensors without which Flax does, and why nothing is lost."""
    leaves = {key: key.rpartition(".")[2] for key in tensors if key not in matched}
    return {k: SKIPPED[leaf](tensors[k]) for k, leaf in leaves.items() if leaf in SKIPPED}


def is_state_dict(x: Any) -> bool:
    """Whether `x` maps names to tensors."""
    return isinstance(x, Mapping) and len(x) > 0 and all(map(is_array, x.values()))


def flax_leaves(variables: Variables | nnx.Module) -> Leaves:
    """The arrays or shapes of linen variables, boxed or not, or of an NNX module, by path.

    Raises:
        ValueError: something is not an array.
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
        "Flax's variables must be arrays or shapes, in nested mappings from names, but:",
        [
            f"{path_name(tuple(map(str, path)))} is of type {type(x).__name__}"
            + (f" of {x.dtype}" if hasattr(x, "dtype") else "")
            for path, x in leaves.items()
            if not (is_array(x) and all(isinstance(name, str) for name in path))
        ],
    )
    return leaves


def flax_convolutions(like: Variables | nnx.Module) -> dict[Path, LayerFacts]:
    """Which convolutions of an NNX module are transposed, and how; none for linen's variables."""
    if not isinstance(like, nnx.Module):
        return {}
    facts = {}
    for place, module in nnx.iter_modules(like):
        if isinstance(module, nnx.ConvTranspose):
            facts[linen_path(place)] = LayerFacts(True, bool(module.transpose_kernel))
        elif isinstance(module, nnx.Conv):
            facts[linen_path(place)] = LayerFacts(False)
    return facts


def module_order(like: Variables | nnx.Module) -> list[str]:
    """The modules in an NNX module, by path, in the order of their definition; none for others."""
    found: list[str] = []

    def visit(node: Any, place: tuple[Any, ...], around: tuple[int, ...]) -> None:
        if id(node) in around:
            return
        if isinstance(node, nnx.Module):
            found.append(path_name(linen_path(place)))
        children: Iterable[tuple[Any, Any]] = ()
        if isinstance(node, list | tuple | nnx.List):
            children = enumerate(node)
        elif isinstance(node, Mapping):
            children = node.items()
        elif isinstance(node, nnx.Module):
            children = vars(node).items()
        for name, child in children:
            visit(child, (*place, name), (*around, id(node)))

    if isinstance(like, nnx.Module):
        visit(like, (), ())
    return found


def variables_of(module: nnx.Module) -> dict[str, Any]:
    """The parameters and statistics of an NNX module, as linen variables.

    An index joins the name of its list, as in linen: `layers`, 0 is `layers_0`. A module that
    occurs twice is included once. Other variables, such as random number generators, are left out.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> module = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jax.nn.relu)
        >>> jax.tree.map(lambda x: x.shape, variables_of(module))
        {'params': {'layers_0': {'bias': (2,), 'kernel': (3, 2)}}}

    Args:
        module: may be abstract, from `nnx.eval_shape`.

    Raises:
        ValueError: it is no NNX module, or two variables would have the same name.
    """
    require_nnx_module("module", module, "Linen's variables are what variables_of returns.")
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
    require_nnx_module("module", module, "For linen's variables there is nothing to do.")
    copy = nnx.clone(module)
    places, leaves = _nnx_leaves(copy), flax_leaves(variables)
    refuse(
        "The variables must be those of the module, but:",
        differences(
            {path_name(path): shape(leaf) for path, leaf in leaves.items()},
            {path_name(path): shape(v) for path, (_, v) in places.items()},
        ),
    )
    return replace_leaves(
        copy, {path: jnp.asarray(leaves[path], v.dtype) for path, (_, v) in places.items()}
    )


def replace_leaves(module: ModuleT, leaves: Leaves) -> ModuleT:
    """Replace an NNX module's parameters and statistics, dtypes included; returns the module."""
    places = _nnx_leaves(module)
    state = [(place, v.replace(leaves[path])) for path, (place, v) in places.items()]
    nnx.update(module, nnx.from_flat_state(state))
    return module


def require_nnx_module(name: str, value: Any, way_out: str) -> None:
    """The value must be an NNX module."""
    if not isinstance(value, nnx.Module):
        raise ValueError(
            f"`{name}` must be an NNX module, but it is of type {type(value).__name__}. {way_out}"
        )


def linen_path(place: Iterable[Any]) -> Path:
    """The path in linen for a place in an NNX module: an index joins the name of its list.

    Example:
        >>> linen_path(("layers", 0, "conv"))
        ('layers_0', 'conv')
    """
    path: list[str] = []
    for part in place:
        if isinstance(part, int) and path:
            path[-1] += f"_{part}"
        else:
            path.append(str(part))
    return tuple(path)


def refuse(rule: str, problems: Iterable[str], way_out: str = "") -> None:
    """Raise a `ValueError` that lists all problems, if there are any."""
    lines = [f"  {problem}" for problem in problems]
    if lines:
        raise ValueError("\n".join(filter(None, [rule, *lines, way_out])))


def differences(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    optional: Collection[str] = (),
    partial: bool = False,
) -> list[str]:
    """What is missing (unless `partial`), unexpected (unless `optional`), or misshapen."""
    missing = () if partial else [key for key in expected if key not in found]
    return [
        *(f"missing: {key} {expected[key]}" for key in missing),
        *(
            f"unexpected: {key} {shape}"
            for key, shape in found.items()
            if key not in expected and key not in optional
        ),
        *(
            f"misshapen: {key} is {found[key]} and must be {shape}"
            for key, shape in expected.items()
            if key in found and found[key] != shape
        ),
    ]


def _nnx_leaves(module: nnx.Module) -> dict[Path, tuple[tuple[Any, ...], nnx.Variable[Any]]]:
    """Each parameter and statistic by linen's path: its place in the module, and its variable."""
    found = [
        ((collection, *linen_path(place)), (place, variable))
        for collection, kind in _COLLECTIONS.items()
        for place, variable in nnx.to_flat_state(nnx.state(module, kind))
    ]
    counts = Counter(path for path, _ in found)
    refuse(
        "An index joins the name of its list, which must give every variable its own name, but:",
        [f"{path_name(path)} is the name of {n} variables" for path, n in counts.items() if n > 1],
        "Rename the attribute that looks like a list's item.",
    )
    return dict(found)


def _is_torch_module(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "named_modules")


def _description(x: Any) -> str:
    kind = f"a {type(x).__name__}" + (f" of {x.dtype}" if hasattr(x, "dtype") else "")
    return f"{kind} of {len(x)} tensors" if is_state_dict(x) else kind


def _memory(x: Any) -> Hashable | None:
    """A key that PyTorch's tensors share if they are the same memory; `None` for all others."""
    if not hasattr(x, "data_ptr") or not x.data_ptr():
        return None
    return x.data_ptr(), shape(x), x.stride()
