"""Find which tensor of PyTorch is which leaf of Flax's variables, or say why that cannot be."""

from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any

from flax import nnx

from bcn_flax.interop import arrays, flattening, naming, torch_side, transposing, trees
from bcn_flax.interop.complaints import refuse
from bcn_flax.interop.joining import Joined, better_names, join, missing, unexpected
from bcn_flax.interop.layouts import Known
from bcn_flax.interop.moving import Match, Pair
from bcn_flax.interop.naming import RULES, Names, Path, Rules
from bcn_flax.interop.torch_side import Tensors
from bcn_flax.interop.trees import Leaves, Variables

Transposed = Collection[str] | Mapping[str, bool | None]


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
            that have no entry of their own. `{"module": ""}` takes a wrapper's name off, which
            all other paths, in any argument, may then leave out or have. Or a function of the full
            path of the module that holds a tensor, `None` for its own name.
        transposed: the paths of PyTorch's transposed convolutions, where neither side is a module;
            or a mapping from these to Flax's `transpose_kernel`, where the shape does not tell it,
            and to `None` from an ordinary convolution that could be a transposed one by its shape.
        flattened: for each dense layer that follows a flatten, by its path in PyTorch, the number
            of channels that were flattened; its number of inputs, if there were no images.
        rules: which leaf has which names and layouts.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen, of another kind of number, or
            ambiguous, or an argument names no module; the message lists all of them.
    """
    _check_arguments(names, transposed, flattened)
    tensors, leaves = torch_side.tensors(source), trees.flax_leaves(like)
    _check_collections(leaves, rules)
    modules = {_module(key) for key in tensors}
    names = names if callable(names) else naming.names_in_full(names or {}, modules)
    wrapper = naming.taken_off(names, modules)
    told = {naming.in_full(m, wrapper, modules): x for m, x in _told(transposed).items()}
    flattened = {naming.in_full(m, wrapper, modules): n for m, n in (flattened or {}).items()}

    joined = join(leaves, tensors, names, rules)
    paths = {key: joined.paths[key] for key in tensors if key in joined.paths}  # as the layers are
    said = {
        "PyTorch's module": torch_side.convolutions(source),
        "Flax's module": _by_torch_module(trees.convolutions(like), paths),
        "`transposed`": told,
    }
    known, problems = _known(paths, said, flattened)
    problems += joined.ambiguous + _vain(names, told, flattened, paths, tensors, leaves)
    pairs = []
    for key, path in paths.items():
        pair, misfits = _pair(key, tensors[key], path, leaves[path], known[key], rules)
        pairs += pair
        problems += misfits
    undeclared, presumed = transposing.undeclared(pairs, known, _by_shape(paths, tensors, leaves))
    suspicions, unflattened = flattening.undeclared(pairs, flattened)
    problems += undeclared + suspicions
    tied = _tied(tensors, paths)
    left = _left(tensors, paths.keys() | tied)

    unjoined, hints, proposal = _unjoined(joined, leaves, tensors, names, rules, left)
    refuse(
        hints + "The state_dict and the Flax variables must match, tensor by tensor, but:",
        problems + unjoined,
        "Build both models with the same configuration, or say with `names` where in Flax a module "
        "of PyTorch is." + proposal,
    )
    notes = [*presumed, *unflattened, *flattening.unlikely(pairs, flattened)]
    return Match(tuple(pairs), tied, left, tensors, tuple(notes))


def _check_arguments(names: Any, transposed: Any, flattened: Any) -> None:
    """Refuse what Python would take for something else, or fail on later."""
    if not (names is None or callable(names) or isinstance(names, Mapping)):
        raise ValueError(
            "names must map paths of PyTorch to paths of Flax, or be a function, but it is "
            f"{names!r}."
        )
    if isinstance(transposed, str):
        raise ValueError(
            "transposed must be a collection of paths, or map them to transpose_kernel, but it is "
            f"the string {transposed!r}: say [{transposed!r}]."
        )
    if not (flattened is None or isinstance(flattened, Mapping)):
        raise ValueError(
            "flattened must map paths of dense layers to numbers of channels, but it is "
            f"{flattened!r}: say {{path: channels}}."
        )


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
        return {module: Known(flag is not None, flag) for module, flag in transposed.items()}
    return {module: Known(True) for module in transposed}


def _by_torch_module(known: Mapping[Path, Known], paths: Mapping[str, Path]) -> dict[str, Known]:
    """What is known of Flax's modules, by the paths of PyTorch's."""
    return {_module(key): known[path[1:-1]] for key, path in paths.items() if path[1:-1] in known}


def _vain(
    names: Names,
    told: Mapping[str, Known],
    flattened: Mapping[str, int],
    paths: Mapping[str, Path],
    tensors: Tensors,
    leaves: Leaves,
) -> list[str]:
    """Complaints about arguments that name nothing, or what they cannot be about."""
    kernels = {
        _module(key): arrays.shape(tensors[key])
        for key, path in paths.items()
        if path[-1] == "kernel"
    }
    modules = {_module(key) for key in tensors}
    dense = {module: shape[1] for module, shape in kernels.items() if len(shape) == 2}
    return [
        *(
            f"names: {module!r} is no module of the state_dict"
            for module in naming.without_effect(names, modules)
        ),
        *(
            f'names: {place!r}, for {module!r}, has dots; paths of Flax take "/", as in '
            f"{place.replace('.', '/')!r}"
            for module, place in naming.dotted(names, modules, leaves).items()
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


def _known(
    paths: Mapping[str, Path],
    said: Mapping[str, Mapping[str, Known]],
    flattened: Mapping[str, int],
) -> tuple[dict[str, Known], list[str]]:
    """By key, what is known of its layer; and complaints about contradictions."""
    known, problems = {}, []
    for key, path in paths.items():
        module = _module(key)
        kernel = path[-1] == "kernel"
        sayings = {who: s[module] for who, s in said.items() if kernel and module in s}
        agreed, contradictions = _agreed(key, sayings)
        known[key] = agreed._replace(channels=flattened.get(module))
        problems += contradictions
    return known, problems


def _by_shape(paths: Mapping[str, Path], tensors: Tensors, leaves: Leaves) -> bool:
    """Whether any kernel is of a transposed convolution, and of no other, by its shape."""
    shapes = [
        (arrays.shape(tensors[key]), arrays.shape(leaves[path]))
        for key, path in paths.items()
        if path[-1] == "kernel"
    ]
    return any(
        transposing.fits(torch_shape, flax_shape) and flax_shape[-1] != flax_shape[-2]
        for torch_shape, flax_shape in shapes
    )


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
        shapes = dict.fromkeys(layout.torch_shape(flax_shape) for layout in layouts)
        needed = " or ".join(map(str, shapes))
        problem = f"misshapen: {key} is {torch_shape}, but {flax} "
        problem += f"needs {needed}" if needed else "has no counterpart: no rule knows such a shape"
        if (
            path[-1] == "kernel"
            and not known.transposed
            and transposing.fits(torch_shape, flax_shape)
        ):
            problem += f"; if it is a transposed convolution, say transposed=[{_module(key)!r}]"
        if known.transposed and transposing.grouped(torch_shape, shapes):
            problem += "; Flax has no grouped transposed convolution"
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


def _tied(tensors: Tensors, matched: Collection[str]) -> dict[str, str]:
    """The tensors that are one in memory with a matched one, and that one."""
    first: dict[Hashable, str] = {}
    for key in tensors:
        if key in matched and arrays.memory(tensors[key]) is not None:
            first.setdefault(arrays.memory(tensors[key]), key)
    others = {key: first.get(arrays.memory(tensor)) for key, tensor in tensors.items()}
    return {key: other for key, other in others.items() if other not in (None, key)}


def _left(tensors: Tensors, accounted: Collection[str]) -> dict[str, str]:
    """Why other tensors stay behind."""
    leaves = {key: naming.module_and_leaf(key)[1] for key in tensors if key not in accounted}
    return {k: naming.LEFT[leaf](tensors[k]) for k, leaf in leaves.items() if leaf in naming.LEFT}


def _unjoined(
    joined: Joined,
    leaves: Leaves,
    tensors: Tensors,
    names: Names,
    rules: Rules,
    left: Collection[str],
) -> tuple[list[str], str, str]:
    """Complaints about what finds no counterpart by its name, hints at why, and names to copy."""
    wrapper, better = better_names(joined, leaves, tensors, names, rules)
    best = join(leaves, tensors, better, rules)
    gained = len(best.paths) - len(joined.paths)
    accounted = {*best.paths, *_tied(tensors, best.paths), *left}
    problems = [
        *missing(best, leaves),
        *unexpected([key for key in tensors if key not in accounted], tensors, names),
        *([f"under other names: {gained} tensors that fit leaves of Flax"] if gained else []),
    ]
    proposal = "" if callable(better) or not gained else _proposal(better)
    return problems, _hints(wrapper, tensors), proposal


def _proposal(names: Mapping[str, str]) -> str:
    """Names to copy."""
    entries = [f'    "{module}": "{place}",' for module, place in names.items()]
    lines = ["By shapes and order, to be checked and edited:", "names={", *entries, "}"]
    return "\n" + "\n".join(lines)


def _hints(wrapper: str, keys: Iterable[str]) -> str:
    """Of the usual reasons why names do not match, those that the keys show."""
    hint = f'All names begin with "{wrapper}.", which names={{"{wrapper}": ""}} takes off.\n'
    slashes = "A state_dict joins its names with dots, not slashes.\n"
    return hint * bool(wrapper) + slashes * any("/" in key for key in keys)


def _module(key: str) -> str:
    return naming.module_and_leaf(key)[0]
