"""Which names of PyTorch and Flax mean the same."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

from bcn_flax.interop.arrays import values
from bcn_flax.interop.layouts import Known, Layout, Shape, anything, embedding, kernel, vector

Name = tuple[str, ...]
Path = tuple[str, ...]
Names = Mapping[str, str] | Callable[[str], str | None]


class Rule(NamedTuple):
    """What a leaf of Flax's variables is in PyTorch.

    Attributes:
        names: that PyTorch's tensor may have.
        layouts: of the two shapes and what is known of the layer, the layouts that may hold.
    """

    names: tuple[str, ...]
    layouts: Callable[[Shape, Shape, Known], list[Layout]]


Rules = Mapping[tuple[str, str], Rule]

# By collection and name in Flax. A leaf that is not listed has the same name in PyTorch.
RULES: Rules = MappingProxyType(
    {
        ("params", "kernel"): Rule(("weight",), kernel),
        ("params", "embedding"): Rule(("weight",), embedding),
        ("params", "scale"): Rule(("scale", "weight"), vector),
        ("params", "bias"): Rule(("shift", "bias"), vector),
        ("params", "negative_slope"): Rule(("weight",), vector),
        ("batch_stats", "mean"): Rule(("exp_mean", "running_mean"), vector),
        ("batch_stats", "var"): Rule(("exp_var", "running_var"), vector),
    }
)


def rule_for(rules: Rules, path: Path) -> Rule:
    """The rule for a leaf of Flax's variables."""
    return rules.get((path[0], path[-1]), Rule((path[-1],), anything))


# PyTorch's buffers that Flax does without, and what becomes of them.
LEFT: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "num_batches_tracked": lambda _: "Flax counts no batches",
        "estbn_moving_speed": lambda x: _moving_speed(values(x).item()),
    }
)

# The authors' batch-channel norm has its batch norm under these names, and its channel norm's
# parameters as its own.
AUTHORS_BATCH_NORM = ("bn", "pbn")

# PyTorch's wrappers put their own name before all others.
WRAPPERS = ("module", "_orig_mod", "model")


def canonical(components: Iterable[str]) -> Name:
    """A module's name without the choices that Flax and PyTorch make differently.

    A number may be joined to its list's name, and the list of a Sequential may have a name.

    Example:
        >>> canonical(["layers_0", "conv"]), canonical(["layers", "0", "conv"])
        (('0', 'conv'), ('0', 'conv'))
        >>> canonical(["stages_0_1"]) == canonical(["stages", "0", "1"])
        True
    """
    tokens = [token for component in components for token in numbers_apart(component)]
    return tuple(
        token
        for token, following in pairwise([*tokens, ""])
        if token != "layers" or not following.isdecimal()
    )


def module_and_leaf(key: str) -> tuple[str, str]:
    """Split a key of a `state_dict`.

    Example:
        >>> module_and_leaf("layers.0.weight"), module_and_leaf("weight")
        (('layers.0', 'weight'), ('', 'weight'))
    """
    module, _, leaf = key.rpartition(".")
    return module, leaf


def renamed(module: str, names: Names) -> list[str]:
    """The components of the Flax path of a PyTorch module.

    The longest prefix that `names` knows is replaced.

    Example:
        >>> renamed("module.layer1.0.conv1", {"module": "", "module.layer1.0": "block_0"})
        ['block_0', 'conv1']
    """
    parts = module.split(".") if module else []
    if callable(names):
        path = names(module)
        return parts if path is None else _components(path)
    for n in range(len(parts), -1, -1):
        prefix = ".".join(parts[:n])
        if prefix in names:
            return [*_components(names[prefix]), *parts[n:]]
    return parts


def without_effect(names: Names, modules: Collection[str]) -> list[str]:
    """The entries of `names` that are about none of PyTorch's modules."""
    if callable(names):
        return []
    return [name for name in names if name and not _names_some(name, modules)]


def dotted(names: Names, modules: Collection[str], paths: Collection[Path]) -> dict[str, str]:
    """The entries of `names` that have dots in their Flax paths, where Flax has none."""
    places = {m: names(m) for m in modules} if callable(names) else names
    if any("." in component for path in paths for component in path):
        return {}
    return {name: place for name, place in places.items() if place and "." in place}


def taken_off(names: Names, modules: Collection[str]) -> str:
    """The name before those of all modules that `names` takes off, if any."""
    if callable(names):
        return ""
    common = [n for n, place in names.items() if not place and all(_in(m, n) for m in modules)]
    return max(common, key=len, default="")


def in_full(path: str, wrapper: str, modules: Collection[str]) -> str:
    """A path of PyTorch that may leave a wrapper's name out, with it.

    Example:
        >>> in_full("fc", "module", ["module.fc"]), in_full("module.fc", "module", ["module.fc"])
        ('module.fc', 'module.fc')
    """
    spellings = path, ".".join(filter(None, (wrapper, path)))
    return next((s for s in spellings if _names_some(s, modules)), path)


def names_in_full(names: Mapping[str, str], modules: Collection[str]) -> Mapping[str, str]:
    """The same where all paths have the name of the wrapper that `names` takes off.

    Example:
        >>> names_in_full({"fc": "head", "module": ""}, ["module.fc"])
        {'module': '', 'module.fc': 'head'}
    """
    wrapper = taken_off(names, modules)
    if not wrapper:
        return names
    others = {name: place for name, place in names.items() if name != wrapper}
    return {wrapper: ""} | {in_full(n, wrapper, modules): place for n, place in others.items()}


def batch_channel_norms(modules: Collection[Name]) -> set[Name]:
    """The modules of Flax that have a batch norm and a channel norm, by their canonical names."""
    parents = {name[:-1] for name in modules if name}
    return {p for p in parents if {(*p, "batch_norm"), (*p, "channel_norm")} <= {*modules}}


def likely_keys(path: Path, neighbour: str | None, leaves: Iterable[str]) -> list[str]:
    """What a missing tensor of a Flax module is probably called, like its neighbour if any."""
    parts = [part for component in path for part in numbers_apart(component)]
    module = ".".join(parts) if neighbour is None else module_and_leaf(neighbour)[0]
    return [f"{module}.{leaf}" if module else leaf for leaf in leaves]


def authors_part(name: Name, batch_channel_norms: Collection[Name]) -> Name:
    """Where a module of the authors' batch-channel norm is found in Flax's.

    Args:
        name: of a module of PyTorch, canonical.
        batch_channel_norms: those of Flax, canonical.

    Example:
        >>> authors_part(("norm", "bn"), {("norm",)}), authors_part(("norm",), {("norm",)})
        (('norm', 'batch_norm'), ('norm', 'channel_norm'))
    """
    if name in batch_channel_norms:
        return (*name, "channel_norm")
    if name and name[:-1] in batch_channel_norms and name[-1] in AUTHORS_BATCH_NORM:
        return (*name[:-1], "batch_norm")
    return name


def numbers_apart(component: str) -> list[str]:
    """`layers_0` as `layers` and `0`."""
    numbers = re.search(r"(?<=.)(_\d+)*$", component)
    assert numbers is not None
    return [component[: numbers.start()], *numbers.group().split("_")[1:]]


def _moving_speed(rate: float) -> str:
    return f"it is {rate:g}, for which Flax's batch norm takes momentum={1 - rate:g}"


def _names_some(name: str, modules: Collection[str]) -> bool:
    return any(_in(module, name) for module in modules)


def _in(module: str, name: str) -> bool:
    return f"{module}.".startswith(f"{name}.")


def _components(path: str) -> list[str]:
    return path.split("/") if path else []
