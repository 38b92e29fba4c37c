"""Join tensors and leaves by their names, and propose names where these do not join."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import chain, takewhile
from typing import NamedTuple, TypeVar

from bcn_flax.interop import arrays, naming, trees
from bcn_flax.interop.layouts import Known, Shape
from bcn_flax.interop.naming import Name, Names, Path, Rules
from bcn_flax.interop.torch_side import Tensors
from bcn_flax.interop.trees import Leaves

T = TypeVar("T")


class Joined(NamedTuple):
    """Which leaf is a tensor's, by name.

    Attributes:
        paths: by key, the leaf that is its tensor.
        missing: the leaves that have no tensor, with the keys that one might have.
        ambiguous: complaints about leaves and tensors that have several.
    """

    paths: dict[str, Path]
    missing: dict[Path, list[str]]
    ambiguous: list[str]


def join(leaves: Leaves, tensors: Tensors, names: Names, rules: Rules) -> Joined:
    """Find the leaf for each tensor, by name."""
    modules = {naming.canonical(path[1:-1]) for path in leaves}
    norms = naming.batch_channel_norms(modules)
    places: dict[Name, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in tensors:
        module, leaf = naming.module_and_leaf(key)
        name = naming.canonical(naming.renamed(module, names))
        places[naming.authors_part(name, norms)][leaf].append(key)

    joined = Joined({}, {}, [])
    for path, leaf in leaves.items():
        wanted = naming.rule_for(rules, path).names
        there = places[naming.canonical(path[1:-1])]
        found = [key for name in wanted for key in there[name]]
        flax = f"Flax's {trees.name(path)} {arrays.shape(leaf)}"
        if not found:
            neighbour = next(chain.from_iterable(there.values()), None)
            joined.missing[path] = naming.likely_keys(path[1:-1], neighbour, wanted)
        elif len(found) > 1:
            joined.ambiguous.append(f"ambiguous: {flax} may be {' or '.join(found)}")
        elif found[0] in joined.paths:
            other = trees.name(joined.paths[found[0]])
            joined.ambiguous.append(f"ambiguous: {found[0]} may be {other} or {flax}")
        else:
            joined.paths[found[0]] = path
    return joined


def missing(joined: Joined, leaves: Leaves) -> list[str]:
    """A complaint about each module of Flax that has leaves without a tensor."""
    return [
        "missing: "
        + "; ".join(
            f"{' or '.join(joined.missing[path])}, for Flax's {trees.name(path)} "
            f"{arrays.shape(leaves[path])}"
            for path in paths
        )
        for paths in _by_flax_module(joined.missing).values()
    ]


def unexpected(keys: Iterable[str], tensors: Tensors, names: Names) -> list[str]:
    """A complaint about each module of PyTorch that has tensors without a leaf."""
    problems = []
    for module, group in _by_torch_module(keys).items():
        there = "/".join(naming.renamed(module, names))
        where = f" at {there}, where `names` puts it" if there != module.replace(".", "/") else ""
        found = ", ".join(f"{key} {arrays.shape(tensors[key])}" for key in group)
        has = "has" if len(group) == 1 else "have"
        problems.append(f"unexpected: {found}, which {has} no counterpart in Flax{where}")
    return problems


def better_names(
    joined: Joined, leaves: Leaves, tensors: Tensors, names: Names, rules: Rules
) -> tuple[str, Names]:
    """A name before all names that is to be taken off, if any, and names that join more."""
    if callable(names) or not joined.missing:
        return "", names
    wrapper = _wrapper(joined, leaves, tensors, names, rules)
    if wrapper:
        names = _unwrapped(names, wrapper, [*_by_torch_module(tensors)])
    return wrapper, _proposal(leaves, tensors, names, rules)


def _wrapper(
    joined: Joined, leaves: Leaves, tensors: Tensors, names: Mapping[str, str], rules: Rules
) -> str:
    """The name before all names that is to be taken off, if so more tensors find their leaves.

    Where nothing does either way, because other names differ too, a wrapper's usual name.
    """
    modules = [*_by_torch_module(tensors)]
    if naming.taken_off(names, modules):
        return ""
    columns = zip(*(module.split(".") for module in modules), strict=False)
    common = [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
    prefixes = [".".join(common[:n]) for n in range(1, len(common) + 1)]
    found = {
        prefix: len(join(leaves, tensors, _unwrapped(names, prefix, modules), rules).paths)
        for prefix in filter(None, prefixes)
    }
    best = max(found, key=found.__getitem__, default="")
    if best and found[best] > len(joined.paths):
        return best
    usual = [prefix for prefix in found if {*prefix.split(".")} <= {*naming.WRAPPERS}]
    return max(usual, key=len) if usual and not joined.paths else ""


def _unwrapped(
    names: Mapping[str, str], prefix: str, modules: Collection[str]
) -> Mapping[str, str]:
    """These names, and a prefix taken off."""
    return naming.names_in_full({prefix: "", **names}, modules)


def _proposal(
    leaves: Leaves, tensors: Tensors, names: Mapping[str, str], rules: Rules
) -> dict[str, str]:
    """These names and more, for modules that have none of their tensors or leaves joined.

    A module of PyTorch gets the first one of Flax with leaves of its shapes. What lies in no other
    module comes first on both sides; then the order is that of the definition, or of the names
    where that one is lost.
    """
    joined = join(leaves, tensors, names, rules)
    strangers = _wholly(_by_torch_module(tensors), joined.paths.keys() | names.keys())
    places = _wholly(_by_flax_module(leaves), leaves.keys() - joined.missing.keys())
    own_names = {module: trees.name(tuple(naming.renamed(module, names))) for module in strangers}
    free = _in_order({place: place for place in places}, _params(leaves))
    chosen = {}
    for module in _in_order(own_names, [*tensors]):
        shapes = {
            leaf: arrays.shape(tensors[key])
            for key in strangers[module]
            if (leaf := naming.module_and_leaf(key)[1]) not in naming.LEFT
        }
        for place in free:
            if shapes and _fits(shapes, {p: arrays.shape(leaves[p]) for p in places[place]}, rules):
                chosen[module] = place
                free.remove(place)
                break
    proposed = {**names, **{module: chosen[module] for module in strangers if module in chosen}}
    kept = join(leaves, tensors, proposed, rules).paths.items() >= joined.paths.items()
    return proposed if kept else dict(names)


def _by_torch_module(keys: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for key in keys:
        groups[naming.module_and_leaf(key)[0]].append(key)
    return groups


def _by_flax_module(paths: Iterable[Path]) -> dict[str, list[Path]]:
    groups = defaultdict(list)
    for path in paths:
        groups[trees.name(path[1:-1])].append(path)
    return groups


def _wholly(groups: Mapping[str, list[T]], known: Collection[object]) -> dict[str, list[T]]:
    """The modules that are not known themselves and have nothing that is."""
    return {
        module: group
        for module, group in groups.items()
        if module not in known and not any(x in known for x in group)
    }


def _fits(tensors: Mapping[str, Shape], leaves: Mapping[Path, Shape], rules: Rules) -> bool:
    """Whether every tensor has the name and the shape of just one leaf, and every leaf has one."""
    taken = []
    for path, shape in leaves.items():
        rule = naming.rule_for(rules, path)
        known = (Known(), Known(True)) if len(shape) > 2 else (Known(),)
        taken += [
            name
            for name in rule.names
            if name in tensors
            and any(
                layout.torch_shape(shape) == tensors[name]
                for k in known
                for layout in rule.layouts(tensors[name], shape, k)
            )
        ]
    return len(taken) == len(leaves) and {*taken} == tensors.keys()


def _params(leaves: Leaves) -> list[Path]:
    return [path for path in leaves if path[0] == "params"]


def _in_order(places: Mapping[str, str], everything: list[str] | list[Path]) -> list[str]:
    """Modules, which have places; by name if `everything` is sorted, so that its order is lost."""
    lost = everything == sorted(everything)

    def key(module: str) -> tuple[bool, list[str | int]]:
        nested = len(naming.canonical(filter(None, places[module].split("/")))) > 1
        return nested, _numbers_by_size(module) if lost else []

    return sorted(places, key=key)


def _numbers_by_size(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
