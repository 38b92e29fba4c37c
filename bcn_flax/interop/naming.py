"""Which names of PyTorch and Flax correspond, and so which tensor is which leaf."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, pairwise, takewhile
from typing import NamedTuple, TypeVar

from bcn_flax.interop.layouts import SKIPPED, LayerFacts, Path, Rules, Shape, path_name, rule_for

Names = Mapping[str, str] | Callable[[str], str | None]
Canonical = tuple[str, ...]
T = TypeVar("T")

# The names of the batch norm inside the authors' batch-channel norm. The parameters of its channel
# norm are its own.
AUTHORS_BATCH_NORM = ("bn", "pbn")

# The names that PyTorch's wrappers put before all others.
WRAPPERS = ("module", "_orig_mod", "model")


class Renames(NamedTuple):
    """Where in Flax the modules of PyTorch are.

    Attributes:
        paths: from PyTorch's paths to Flax's. A path stands for all modules in it that have no
            entry of their own; `{"module": ""}` removes a wrapper's name.
        modules: PyTorch's modules that hold tensors, by path.
    """

    paths: Mapping[str, str]
    modules: Collection[str]

    @classmethod
    def of(cls, names: Names | None, modules: Collection[str]) -> "Renames":
        """From the argument `names`, whose paths may leave a wrapper's name out.

        Example:
            >>> Renames.of({"fc": "head", "module": ""}, ["module.fc"]).paths
            {'module': '', 'module.fc': 'head'}
        """
        if callable(names):
            places = {module: names(module) for module in modules}
            names = {m: m.replace(".", "/") if p is None else p for m, p in places.items()}
        renames = cls(names or {}, modules)
        wrapper = renames.wrapper
        if not wrapper:
            return renames
        others = {renames.in_full(p): o for p, o in renames.paths.items() if p != wrapper}
        return cls({wrapper: "", **others}, modules)

    @property
    def wrapper(self) -> str:
        """The name before those of all modules that is removed, if any."""
        removed = [path for path, place in self.paths.items() if not place]
        return max(
            (p for p in removed if all(_in(m, p) for m in self.modules)), key=len, default=""
        )

    def in_full(self, path: str) -> str:
        """A path of PyTorch, with the wrapper's name if it leaves that out.

        Example:
            >>> renames = Renames({"module": ""}, ["module.fc"])
            >>> renames.in_full("fc"), renames.in_full("module.fc")
            ('module.fc', 'module.fc')
        """
        spellings = path, f"{self.wrapper}.{path}".strip(".")
        return next((s for s in spellings if self.has(s)), path)

    def has(self, path: str) -> bool:
        """Whether a path of PyTorch holds any module."""
        return any(_in(module, path) for module in self.modules)

    def flax_path(self, module: str) -> list[str]:
        """The components of a PyTorch module's path in Flax.

        The longest prefix that has an entry is replaced.

        Example:
            >>> renames = Renames({"module": "", "module.layer1.0": "block_0"}, [])
            >>> renames.flax_path("module.layer1.0.conv1")
            ['block_0', 'conv1']
        """
        parts = module.split(".") if module else []
        for n in range(len(parts), -1, -1):
            place = self.paths.get(".".join(parts[:n]))
            if place is not None:
                return [*filter(None, place.split("/")), *parts[n:]]
        return parts

    def errors(self, leaves: Iterable[Path]) -> list[str]:
        """One line for each entry that names no module, or puts dots into Flax's path."""
        dots = any("." in component for path in leaves for component in path)
        return [
            *(
                f"names: {path!r} is no module of the state_dict"
                for path in self.paths
                if path and not self.has(path)
            ),
            *(
                f'names: {place!r}, for {path!r}, has dots; paths of Flax take "/", as in '
                f"{place.replace('.', '/')!r}"
                for path, place in self.paths.items()
                if "." in place and not dots
            ),
        ]


class NameMatch(NamedTuple):
    """Which tensor is which leaf, by names alone.

    Attributes:
        tensors: PyTorch's shapes, by key.
        leaves: Flax's shapes, by path.
        renames: where in Flax the modules of PyTorch are.
        rules: which leaf has which names.
        paths: the leaf of each tensor that has one, in PyTorch's order.
        missing: the leaves that have no tensor, with the keys that one might have.
        ambiguous: one line for each leaf or tensor that has several counterparts.
    """

    tensors: Mapping[str, Shape]
    leaves: Mapping[Path, Shape]
    renames: Renames
    rules: Rules
    paths: Mapping[str, Path]
    missing: Mapping[Path, list[str]]
    ambiguous: list[str]


def match_names(
    tensors: Mapping[str, Shape], leaves: Mapping[Path, Shape], renames: Renames, rules: Rules
) -> NameMatch:
    """Find the leaf of each tensor by its name."""
    modules = {canonical(path[1:-1]) for path in leaves}
    norms = {
        m[:-1] for m in modules if {(*m[:-1], "batch_norm"), (*m[:-1], "channel_norm")} <= modules
    }
    found: dict[Canonical, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        found[_authors_part(canonical(renames.flax_path(module)), norms)][leaf].append(key)

    paths: dict[str, Path] = {}
    missing, ambiguous = {}, []
    for path, shape in leaves.items():
        names, in_module = rule_for(rules, path).names, found[canonical(path[1:-1])]
        keys = [key for name in names for key in in_module[name]]
        flax = f"Flax's {path_name(path)} {shape}"
        if not keys:
            neighbor = next(chain.from_iterable(in_module.values()), None)
            missing[path] = _likely_keys(path[1:-1], neighbor, names)
        elif len(keys) > 1:
            ambiguous.append(f"ambiguous: {flax} may be {' or '.join(keys)}")
        elif keys[0] in paths:
            ambiguous.append(f"ambiguous: {keys[0]} may be {path_name(paths[keys[0]])} or {flax}")
        else:
            paths[keys[0]] = path
    in_order = {key: paths[key] for key in tensors if key in paths}
    return NameMatch(tensors, leaves, renames, rules, in_order, missing, ambiguous)


def with_better_names(found: NameMatch) -> NameMatch:
    """The match under more names, if these match more: no wrapper, and names by shape and order."""
    if not found.missing:
        return found
    wrapper = _likely_wrapper(found)
    return _with_proposed_names(_with_names(found, {wrapper: ""}) if wrapper else found)


def name_errors(found: NameMatch, better: NameMatch, accounted: Collection[str]) -> list[str]:
    """One line for each group of tensors or leaves that have no counterpart, or several.

    Args:
        found: by the names that the caller gave.
        better: the same, or by better names: what these match is summed up in one line.
        accounted: the tensors that need no leaf.
    """
    left = [key for key in found.tensors if key not in better.paths and key not in accounted]
    gained = len(better.paths) - len(found.paths)
    return [
        *found.ambiguous,
        *found.renames.errors(found.leaves),
        *_missing(better),
        *_unexpected(found, left),
        *([f"under other names: {gained} tensors that fit leaves of Flax"] if gained else []),
    ]


def name_hints(found: NameMatch, better: NameMatch) -> str:
    """The usual reasons why names do not match, of those that the keys show."""
    hint, wrapper = "", better.renames.wrapper
    if wrapper != found.renames.wrapper:
        hint += f'All names begin with "{wrapper}.", which names={{"{wrapper}": ""}} removes.\n'
    if any("/" in key for key in found.tensors):
        hint += "A state_dict joins its names with dots, not slashes.\n"
    return hint


def name_proposal(found: NameMatch, better: NameMatch) -> str:
    """The better names, to copy, if more tensors match by them."""
    if len(better.paths) == len(found.paths):
        return ""
    entries = [f'    "{path}": "{place}",' for path, place in better.renames.paths.items()]
    lines = ["By shapes and order, to be checked and edited:", "names={", *entries, "}"]
    return "\n".join(["", *lines])


def module_of(key: str) -> str:
    """The module in a key of a `state_dict`.

    Example:
        >>> module_of("layers.0.weight"), module_of("weight")
        ('layers.0', '')
    """
    return key.rpartition(".")[0]


def canonical(components: Iterable[str]) -> Canonical:
    """A module's name without what PyTorch and Flax write differently.

    A number may be joined to its list's name, and the list of a Sequential may have a name.

    Example:
        >>> canonical(["layers_0", "conv"]), canonical(["layers", "0", "conv"])
        (('0', 'conv'), ('0', 'conv'))
        >>> canonical(["stages_0_1"]) == canonical(["stages", "0", "1"])
        True
    """
    tokens = [token for component in components for token in _split_numbers(component)]
    return tuple(
        token
        for token, following in pairwise([*tokens, ""])
        if token != "layers" or not following.isdecimal()
    )


def _split_numbers(component: str) -> list[str]:
    """`layers_0` as `layers` and `0`."""
    numbers = re.search(r"(?<=.)(_\d+)*$", component)
    assert numbers is not None
    return [component[: numbers.start()], *numbers.group().split("_")[1:]]


def _authors_part(name: Canonical, batch_channel_norms: Collection[Canonical]) -> Canonical:
    """Where Flax's batch-channel norms have what the authors' have under another name.

    Example:
        >>> _authors_part(("norm", "bn"), {("norm",)}), _authors_part(("norm",), {("norm",)})
        (('norm', 'batch_norm'), ('norm', 'channel_norm'))
    """
    if name in batch_channel_norms:
        return (*name, "channel_norm")
    if name and name[:-1] in batch_channel_norms and name[-1] in AUTHORS_BATCH_NORM:
        return (*name[:-1], "batch_norm")
    return name


def _likely_keys(path: Path, neighbor: str | None, leaves: Iterable[str]) -> list[str]:
    """The likely keys of a missing tensor: beside its neighbor, or under the name in Flax."""
    parts = [part for component in path for part in _split_numbers(component)]
    module = ".".join(parts) if neighbor is None else module_of(neighbor)
    return [f"{module}.{leaf}".removeprefix(".") for leaf in leaves]


def _missing(found: NameMatch) -> list[str]:
    """One line for each module of Flax that has leaves without a tensor."""
    return [
        "missing: "
        + "; ".join(
            f"{' or '.join(found.missing[path])}, for Flax's {path_name(path)} {found.leaves[path]}"
            for path in paths
        )
        for paths in _by_flax_module(found.missing).values()
    ]


def _unexpected(found: NameMatch, keys: Iterable[str]) -> list[str]:
    """One line for each module of PyTorch that has tensors, of these keys, without a leaf."""
    lines = []
    for module, group in _by_torch_module(keys).items():
        tensors = ", ".join(f"{key} {found.tensors[key]}" for key in group)
        place = "/".join(found.renames.flax_path(module))
        line = f"unexpected: {tensors}, without a counterpart in Flax"
        moved = place != module.replace(".", "/")
        lines.append(f"{line} at {place}, where `names` puts it" if moved else line)
    return lines


def _likely_wrapper(found: NameMatch) -> str:
    """A name before all names without which more tensors find their leaf.

    If nothing matches either way, because other names differ too, a wrapper's usual name.
    """
    if found.renames.wrapper:
        return ""
    columns = zip(*(module.split(".") for module in found.renames.modules), strict=False)
    common = [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
    prefixes = [".".join(common[:n]) for n in range(1, len(common) + 1) if common[0]]
    matched = {prefix: len(_with_names(found, {prefix: ""}).paths) for prefix in prefixes}
    best = max(matched, key=matched.__getitem__, default="")
    if best and matched[best] > len(found.paths):
        return best
    usual = [prefix for prefix in matched if {*prefix.split(".")} <= {*WRAPPERS}]
    return max(usual, key=len) if usual and not found.paths else ""


def _with_names(found: NameMatch, more: Mapping[str, str]) -> NameMatch:
    renames = Renames.of({**found.renames.paths, **more}, found.renames.modules)
    return match_names(found.tensors, found.leaves, renames, found.rules)


def _with_proposed_names(found: NameMatch) -> NameMatch:
    """The match with names for modules of which nothing matches.

    A module of PyTorch gets the first one of Flax with leaves of its shapes. Modules at the top
    come first on both sides; then the order is that of the definition, or of the names if the
    order of definition is lost.
    """
    named = found.paths.keys() | found.renames.paths.keys()
    unmatched = _unmatched(_by_torch_module(found.tensors), named)
    places = _unmatched(_by_flax_module(found.leaves), found.leaves.keys() - found.missing.keys())
    free = _in_order(
        {place: place for place in places}, [p for p in found.leaves if p[0] == "params"]
    )
    own_places = {module: "/".join(found.renames.flax_path(module)) for module in unmatched}
    chosen = {}
    for module in _in_order(own_places, [*found.tensors]):
        leaves = {key.rpartition(".")[2]: found.tensors[key] for key in unmatched[module]}
        needed = {leaf: shape for leaf, shape in leaves.items() if leaf not in SKIPPED}
        for place in free:
            if needed and _fits(needed, {p: found.leaves[p] for p in places[place]}, found.rules):
                chosen[module] = place
                free.remove(place)
                break
    better = _with_names(
        found, {module: chosen[module] for module in unmatched if module in chosen}
    )
    return better if better.paths.items() >= found.paths.items() else found


def _by_torch_module(keys: Iterable[str]) -> dict[str, list[str]]:
    return _grouped(keys, module_of)


def _by_flax_module(paths: Iterable[Path]) -> dict[str, list[Path]]:
    return _grouped(paths, lambda path: path_name(path[1:-1]))


def _grouped(items: Iterable[T], group_of: Callable[[T], str]) -> dict[str, list[T]]:
    groups = defaultdict(list)
    for item in items:
        groups[group_of(item)].append(item)
    return groups


def _unmatched(modules: Mapping[str, list[T]], matched: Collection[object]) -> dict[str, list[T]]:
    """The modules that are not matched themselves, and of which nothing is."""
    return {
        module: group
        for module, group in modules.items()
        if module not in matched and not any(x in matched for x in group)
    }


def _fits(tensors: Mapping[str, Shape], leaves: Mapping[Path, Shape], rules: Rules) -> bool:
    """Whether every tensor has the name and the shape of just one leaf, and every leaf has one."""
    taken = []
    for path, shape in leaves.items():
        rule = rule_for(rules, path)
        possible = (LayerFacts(), LayerFacts(True)) if len(shape) > 2 else (LayerFacts(),)
        taken += [
            name
            for name in rule.names
            if name in tensors
            and any(
                layout.torch_shape(shape) == tensors[name]
                for facts in possible
                for layout in rule.layouts(tensors[name], shape, facts)
            )
        ]
    return len(taken) == len(leaves) and {*taken} == tensors.keys()


def _in_order(places: Mapping[str, str], everything: list[str] | list[Path]) -> list[str]:
    """Modules by their places; by name if `everything` is sorted, so that its order is lost."""
    lost = everything == sorted(everything)

    def key(module: str) -> tuple[bool, list[str | int]]:
        nested = len(canonical(filter(None, places[module].split("/")))) > 1
        parts = re.split(r"(\d+)", module) if lost else []
        return nested, [int(part) if part.isdecimal() else part for part in parts]

    return sorted(places, key=key)


def _in(module: str, path: str) -> bool:
    return f"{module}.".startswith(f"{path}.")
