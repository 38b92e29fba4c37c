"""Find which tensor of PyTorch is which leaf of Flax's variables, or say why that cannot be."""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from itertools import chain
from typing import Any

from flax import nnx

from bcn_flax.interop import arrays, naming, torch_side, trees
from bcn_flax.interop.complaints import refuse
from bcn_flax.interop.flattening import undeclared
from bcn_flax.interop.layouts import FLIPPED, Known, Shape
from bcn_flax.interop.moving import Match, Pair
from bcn_flax.interop.naming import RULES, Name, Names, Path, Rules
from bcn_flax.interop.torch_side import Tensors
from bcn_flax.interop.trees import Leaves, Variables

Transposed = Collection[str] | Mapping[str, bool]


def match(
    source: Any,
    like: Variables | nnx.Module,
    names: Names | None = None,
    transposed: Transposed = (),
    flattened: Mapping[str, int] | None = None,
    rules: Rules = RULES,
) -> Match:
    """Find which tensor of PyTorch is which leaf of Flax's variables.

    Example:
        >>> import numpy as np
        >>> from bcn_flax.interop import match
        >>> state_dict = {"fc.weight": np.ones((10, 8)), "fc.bias": np.zeros(10)}
        >>> like = {"params": {"head": {"kernel": np.ones((8, 10)), "bias": np.zeros(10)}}}
        >>> print(match(state_dict, like, names={"fc": "head"}))
        fc.weight  (10, 8)  ->  params/head/kernel  (8, 10)  transposed (O, I, *) -> (*, I, O)
        fc.bias    (10,)    ->  params/head/bias    (10,)    copied

    Args:
        source: a `state_dict`, of PyTorch's tensors or NumPy's or JAX's arrays, or a PyTorch
            module, which tells in addition which convolutions are transposed.
        like: linen variables, arrays or shapes, or an NNX module, which tells the same.
        names: where in Flax a PyTorch module is, if not under its own name: from path to path, as
            in `{"layer1.0.downsample.0": "block_0/conv_proj"}`. A path stands for all modules in it
            that have no entry of their own; `{"module": ""}` takes a wrapper's name off. Or a
            function of the path of the module that holds a tensor, `None` for its own name.
        transposed: the paths of PyTorch's transposed convolutions, where neither side is a module;
            or a mapping from these to Flax's `transpose_kernel`, where the shape does not tell it.
        flattened: for each dense layer that follows a flatten, by its path in PyTorch, the number
            of channels that were flattened; its number of inputs, if there were no images.
        rules: which leaf has which names and layouts.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen, of another kind of number, or
            ambiguous, or an argument names no module; the message lists all of them.
    """
    tensors, leaves = torch_side.tensors(source), trees.flax_leaves(like)
    _check_collections(leaves, rules)
    names, flattened, told = names or {}, flattened or {}, _told(transposed)
    paths, problems = _join(leaves, tensors, names, rules)
    problems += _vain(names, told, flattened, paths, tensors)

    said = {
        "PyTorch's module": torch_side.convolutions(source),
        "Flax's module": _by_torch_module(trees.convolutions(like), paths),
        "`transposed`": told,
    }
    pairs = []
    for key in filter(paths.__contains__, tensors):  # the order of the layers
        module, path = _module(key), paths[key]
        sayings = {who: s[module] for who, s in said.items() if module in s}
        known, contradictions = _agreed(key, sayings if path[-1] == "kernel" else {})
        known = known._replace(channels=flattened.get(module))
        pair, misfits = _pair(key, tensors[key], path, leaves[path], known, rules)
        problems += contradictions + misfits
        pairs += pair
    tied = _tied(tensors, paths)
    left, unexpected = _rest(tensors, paths.keys() | tied, names)
    problems += unexpected + undeclared(pairs, flattened)
    refuse(
        "The state_dict and the Flax variables must match, tensor by tensor, but:",
        problems,
        "Build both models with the same configuration, or say with `names` where in Flax a module "
        "of PyTorch is." + _hints(tensors),
    )
    return Match(tuple(pairs), tied, left, tensors)


def _check_collections(leaves: Leaves, rules: Rules) -> None:
    known = {collection for collection, _ in rules}
    strange = sorted({path[0] for path in leaves} - known)
    if strange:
        raise ValueError(
            f"Of Flax's variables, only the collections {sorted(known)} have counterparts in "
            f"PyTorch, but there are also {strange}. Leave those out, or, if these are parameters, "
            'put them into {"params": ...}.'
        )


def _told(transposed: Transposed) -> dict[str, Known]:
    if isinstance(transposed, Mapping):
        return {module: Known(True, flag) for module, flag in transposed.items()}
    return {module: Known(True) for module in transposed}


def _join(
    leaves: Leaves, tensors: Tensors, names: Names, rules: Rules
) -> tuple[dict[str, Path], list[str]]:
    """By key, the leaf that is its tensor; and complaints about leaves that have not just one."""
    modules = {naming.canonical(path[1:-1]) for path in leaves}
    norms = naming.batch_channel_norms(modules)
    places: dict[Name, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in tensors:
        module, leaf = naming.module_and_leaf(key)
        name = naming.canonical(naming.renamed(module, names))
        places[naming.authors_part(name, norms)][leaf].append(key)

    paths: dict[str, Path] = {}
    problems = []
    for path, leaf in leaves.items():
        wanted = naming.rule_for(rules, path).names
        there = places[naming.canonical(path[1:-1])]
        found = [key for name in wanted for key in there[name]]
        flax = f"Flax's {trees.name(path)} {arrays.shape(leaf)}"
        if not found:
            neighbour = next(chain.from_iterable(there.values()), None)
            expected = naming.likely_keys(path[1:-1], neighbour, wanted)
            problems.append(f"missing: {' or '.join(expected)}, for {flax}")
        elif len(found) > 1:
            problems.append(f"ambiguous: {flax} may be {' or '.join(found)}")
        elif found[0] in paths:
            problems.append(f"ambiguous: {found[0]} may be {trees.name(paths[found[0]])} or {flax}")
        else:
            paths[found[0]] = path
    return paths, problems


def _by_torch_module(known: Mapping[Path, Known], paths: Mapping[str, Path]) -> dict[str, Known]:
    """What is known of Flax's modules, by the paths of PyTorch's."""
    return {_module(key): known[path[1:-1]] for key, path in paths.items() if path[1:-1] in known}


def _vain(
    names: Names,
    told: Mapping[str, Known],
    flattened: Mapping[str, int],
    paths: Mapping[str, Path],
    tensors: Tensors,
) -> list[str]:
    """Complaints about arguments that name nothing, or what they cannot be about."""
    kernels = {
        _module(key): arrays.shape(tensors[key])
        for key, path in paths.items()
        if path[-1] == "kernel"
    }
    dense = {module: shape[1] for module, shape in kernels.items() if len(shape) == 2}
    return [
        *(
            f"names: {module!r} is no module of the state_dict"
            for module in naming.without_effect(names, {_module(key) for key in tensors})
        ),
        *(
            f"transposed: {module!r} is no convolution of the state_dict"
            for module in told
            if len(kernels.get(module, ())) < 3
        ),
        *(
            f"flattened: {module!r} is no dense layer of the state_dict"
            for module in flattened
            if module not in dense
        ),
        *(
            f"flattened: {module!r} has {dense[module]} inputs, which {channels} does not divide"
            for module, channels in flattened.items()
            if module in dense and (channels < 1 or dense[module] % channels)
        ),
    ]


def _agreed(key: str, sayings: Mapping[str, Known]) -> tuple[Known, list[str]]:
    """What all who know something of a convolution say of it, and where they differ."""
    problems, agreed = [], Known()
    for what in ("transposed", "transpose_kernel"):
        said = {who: getattr(known, what) for who, known in sayings.items()}
        said = {who: flag for who, flag in said.items() if flag is not None}
        if len({*said.values()}) > 1:
            words = ", ".join(f"{who} says {what}={flag}" for who, flag in said.items())
            problems.append(f"contradictory: of {key}, {words}")
        for flag in said.values():
            agreed = agreed._replace(**{what: flag})
    return agreed, problems


def _pair(
    key: str, tensor: Any, path: Path, leaf: Any, known: Known, rules: Rules
) -> tuple[list[Pair], list[str]]:
    """The pair, or a complaint."""
    torch_shape, flax_shape = arrays.shape(tensor), arrays.shape(leaf)
    flax = f"Flax's {trees.name(path)} of shape {flax_shape}"
    layouts = naming.rule_for(rules, path).layouts(torch_shape, flax_shape, known)
    fitting = [layout for layout in layouts if layout.torch_shape(flax_shape) == torch_shape]
    if not fitting:
        needed = " or ".join(str(layout.torch_shape(flax_shape)) for layout in layouts)
        problem = f"misshapen: {key} is {torch_shape}, but {flax} "
        problem += f"needs {needed}" if needed else "has no counterpart: no rule knows such a shape"
        if (
            path[-1] == "kernel"
            and not known.transposed
            and _fits_transposed(torch_shape, flax_shape)
        ):
            problem += f"; if it is a transposed convolution, say transposed=[{_module(key)!r}]"
        return [], [problem]
    if len(fitting) > 1:
        return [], [
            f"ambiguous: {key}, of a transposed convolution, is {torch_shape}, which does not tell "
            f"Flax's transpose_kernel: say transposed={{{_module(key)!r}: False}}, or True"
        ]
    if arrays.kind(tensor) != arrays.kind(leaf):
        return [], [
            f"of another kind: {key} is {arrays.dtype(tensor)}, but {flax} is {arrays.dtype(leaf)}"
        ]
    return [Pair(key, torch_shape, path, flax_shape, arrays.dtype(leaf), fitting[0])], []


def _fits_transposed(torch_shape: Shape, flax_shape: Shape) -> bool:
    return len(flax_shape) > 2 and FLIPPED.torch_shape(flax_shape) == torch_shape


def _tied(tensors: Tensors, matched: Collection[str]) -> dict[str, str]:
    """The tensors that are one in memory with a matched one, and that one."""
    first: dict[Hashable, str] = {}
    for key in tensors:
        if key in matched and arrays.memory(tensors[key]) is not None:
            first.setdefault(arrays.memory(tensors[key]), key)
    others = {key: first.get(arrays.memory(tensor)) for key, tensor in tensors.items()}
    return {key: other for key, other in others.items() if other not in (None, key)}


def _rest(
    tensors: Tensors, accounted: Collection[str], names: Names
) -> tuple[dict[str, str], list[str]]:
    """Why the other tensors stay behind, or complaints that they do."""
    left, problems = {}, []
    for key in tensors:
        module, leaf = naming.module_and_leaf(key)
        if key in accounted:
            continue
        if leaf in naming.LEFT:
            left[key] = naming.LEFT[leaf](tensors[key])
            continue
        there = "/".join(naming.renamed(module, names))
        where = f" at {there}, where `names` puts it" if there != module.replace(".", "/") else ""
        shape = arrays.shape(tensors[key])
        problems.append(f"unexpected: {key} {shape}, which has no counterpart in Flax{where}")
    return left, problems


def _hints(keys: Iterable[str]) -> str:
    """Of the usual reasons why names do not match, those that the keys show."""
    hints = [
        f' All names begin with "{wrapper}.", which names={{"{wrapper}": ""}} takes off.'
        for wrapper in naming.WRAPPERS
        if keys and all(key.startswith(f"{wrapper}.") for key in keys)
    ]
    if any("/" in key for key in keys):
        hints.append(" A state_dict joins its names with dots, not slashes.")
    return "".join(hints)


def _module(key: str) -> str:
    return naming.module_and_leaf(key)[0]
