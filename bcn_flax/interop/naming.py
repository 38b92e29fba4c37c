"""Which names of PyTorch and Flax correspond, and so which tensor is which leaf."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

from bcn_flax.interop.layouts import Path, Shape, path_name
from bcn_flax.interop.rules import Rule, Rules, rules_for

Names = Mapping[str, str] | Callable[[str], str | None]
Canonical = tuple[str, ...]
Keys = dict[Canonical, dict[str, list[str]]]
T = TypeVar("T")
G = TypeVar("G")

# The names of the batch norm inside the authors' batch-channel norm. The parameters of its channel
# norm are its own.
AUTHORS_BATCH_NORM = ("bn", "pbn")

# A tensor of a layer of torch.nn.LSTM, GRU or RNN.
_RECURRENT_NAME = re.compile(r"((?:weight|bias)_(?:ih|hh|hr))_(l\d+(?:_reverse)?)")


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

    def errors(self, leaves: Iterable[Path], strict: bool) -> list[str]:
        """One line for each entry that names no module, or puts dots into Flax's path."""
        dots = any("." in component for path in leaves for component in path)
        return [
            *(
                f"names: {path!r} is no module of the state_dict; strict=False allows that"
                for path in self.paths
                if strict and path and not self.has(path)
            ),
            *(
                f'names: {place!r}, for {path!r}, has dots; paths of Flax take "/", as in '
                f"{place.replace('.', '/')!r}"
                for path, place in self.paths.items()
                if "." in place and not dots
            ),
        ]


class Link(NamedTuple):
    """A tensor, or a part of it, and its leaf, of matching names.

    Attributes:
        key: of the tensor.
        path: of the leaf.
        rule: by which they match.
        added: whether the tensor is the second one of the rule, which is added to the first.
    """

    key: str
    path: Path
    rule: Rule
    added: bool = False


class NameMatch(NamedTuple):
    """Which tensor is which leaf, by names alone.

    Attributes:
        tensors: PyTorch's shapes, by key.
        leaves: Flax's shapes, by path.
        renames: where in Flax the modules of PyTorch are.
        rules: which leaf has which names.
        links: each leaf that has a tensor, with it, in PyTorch's order.
        missing: the leaves that have no tensor, with the keys that one might have.
        ambiguous: one line for each leaf or tensor that has several counterparts.
    """

    tensors: Mapping[str, Shape]
    leaves: Mapping[Path, Shape]
    renames: Renames
    rules: Rules
    links: tuple[Link, ...]
    missing: Mapping[Path, list[str]]
    ambiguous: list[str]

    @property
    def keys(self) -> set[str]:
        """The tensors that have a leaf."""
        return {link.key for link in self.links}


def match_names(
    tensors: Mapping[str, Shape], leaves: Mapping[Path, Shape], renames: Renames, rules: Rules
) -> NameMatch:
    """Find the leaf of each tensor by its name."""
    modules = {canonical(path[1:-1]) for path in leaves}
    keys = _keys_by_module(tensors, renames, modules)
    fused = {name for key, rule in rules.items() if len(key) > 2 for name in rule.names}
    links: dict[str, list[Link]] = {key: [] for key in tensors}
    missing, ambiguous = {}, []
    for path, shape in leaves.items():
        own, flax = canonical(path[1:-1]), f"Flax's {path_name(path)} {shape}"
        others = modules - {own}
        options = [
            (rule, module, _named(rule.names, module, keys, others))
            for rule, module in rules_for(rules, path)
        ]
        rule, module, found = next((option for option in options if option[2]), options[-1])
        found = [key for key in found if key in chain(*keys.get(own, {}).values())] or found
        if not found:
            near = [
                (rule, module)
                for rule, module, _ in options
                if fused & keys.get(canonical(module), {}).keys()
            ]
            missing[path] = _likely_keys(*(near or [(rule, module)])[0], keys)
        elif len(found) > 1:
            ambiguous.append(f"ambiguous: {flax} may be {' or '.join(found)}")
        else:
            for key in [*found, *_named(rule.added, module, keys, others)]:
                link = Link(key, path, rule, added=key not in found)
                clash = [other for other in links[key] if not _share(link, other)]
                if clash:
                    first = path_name(clash[0].path)
                    ambiguous.append(f"ambiguous: {key} may be {first} or {flax}")
                else:
                    links[key].append(link)
    in_order = (sorted(group, key=lambda link: link.rule.part or 0) for group in links.values())
    return NameMatch(tensors, leaves, renames, rules, (*chain(*in_order),), missing, ambiguous)


def name_errors(
    found: NameMatch, better: NameMatch, accounted: Collection[str], strict: bool
) -> list[str]:
    """One line for each group of tensors or leaves that have no counterpart, or several.

    Args:
        found: by the names that the caller gave.
        better: the same, or by better names: what these match is summed up in one line.
        accounted: the tensors that need no leaf.
        strict: whether `names` must hold no entries for modules that are not there.
    """
    left = [key for key in found.tensors if key not in better.keys and key not in accounted]
    gained = len(better.keys) - len(found.keys)
    return [
        *found.ambiguous,
        *found.renames.errors(found.leaves, strict),
        *_missing(better),
        *_unexpected(found, left),
        *([f"under other names: {gained} tensors that fit leaves of Flax"] if gained else []),
    ]


def split_key(key: str) -> tuple[str, str]:
    """The module and the name of a tensor; a layer of a recurrent network is a module too.

    Example:
        >>> split_key("layers.0.weight"), split_key("weight")
        (('layers.0', 'weight'), ('', 'weight'))
        >>> split_key("lstm.weight_ih_l1_reverse")
        ('lstm.l1_reverse', 'weight_ih')
    """
    module, _, name = key.rpartition(".")
    recurrent = _RECURRENT_NAME.fullmatch(name)
    if recurrent:
        return f"{module}.{recurrent[2]}".removeprefix("."), recurrent[1]
    return module, name


def module_of(key: str) -> str:
    """The module in a key of a `state_dict`.

    Example:
        >>> module_of("layers.0.weight"), module_of("weight")
        ('layers.0', '')
    """
    return split_key(key)[0]


def natural(name: str) -> list[str | int]:
    """A key to sort names with their numbers as numbers.

    Example:
        >>> sorted(["layers_10", "layers_2"], key=natural)
        ['layers_2', 'layers_10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


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


def _keys_by_module(
    tensors: Iterable[str], renames: Renames, modules: Collection[Canonical]
) -> Keys:
    """The tensors by the module of Flax in which they belong, and by name."""
    norms = {
        m[:-1]
        for m in modules
        if {(*m[:-1], "batch_norm"), (*m[:-1], "channel_norm")} <= {*modules}
    }
    layers: dict[str, set[str]] = defaultdict(set)
    for key in tensors:
        layers[key.rpartition(".")[0]].add(module_of(key))
    keys: Keys = defaultdict(lambda: defaultdict(list))
    for key in tensors:
        module, name = split_key(key)
        network = key.rpartition(".")[0]
        # The only layer of a recurrent network is the network.
        if len(layers[network]) == 1 and module not in renames.paths:
            module = network
        keys[_authors_part(canonical(renames.flax_path(module)), norms)][name].append(key)
    return keys


def _named(
    names: Iterable[str], module: Path, keys: Keys, others: Collection[Canonical]
) -> list[str]:
    """The tensors of these names in a module, or in modules in it that are none of Flax's."""
    found = []
    for name in names:
        *inside, leaf = name.split(".")
        place = canonical((*module, *inside))
        if not inside or place not in others:
            found += keys.get(place, {}).get(leaf, [])
    return found


def _share(link: Link, other: Link) -> bool:
    """Whether two leaves may have the same tensor: they are different parts of it."""
    return None not in (link.rule.part, other.rule.part) and link.rule.part != other.rule.part


def _likely_keys(rule: Rule, module: Path, keys: Keys) -> list[str]:
    """The likely keys of a missing tensor: beside its neighbor, or under the name in Flax."""
    neighbor = next(chain(*keys.get(canonical(module), {}).values()), None)
    if neighbor is None:
        parts = [part for component in module for part in _split_numbers(component)]
        return [".".join([*parts, name]) for name in rule.names]
    before, _, after = neighbor.rpartition(split_key(neighbor)[1])
    return [f"{before}{name}{after}" for name in rule.names if "." not in name]


def _missing(found: NameMatch) -> list[str]:
    """One line for each module of Flax that has leaves without a tensor."""
    return [
        "missing: "
        + "; ".join(
            f"{' or '.join(found.missing[path])}, for Flax's {path_name(path)} {found.leaves[path]}"
            for path in paths
        )
        for paths in by_flax_module(found.missing).values()
    ]


def _unexpected(found: NameMatch, keys: Iterable[str]) -> list[str]:
    """One line for each module of PyTorch that has tensors, of these keys, without a leaf."""
    lines = []
    for module, group in by_torch_module(keys).items():
        tensors = ", ".join(f"{key} {found.tensors[key]}" for key in group)
        place = "/".join(found.renames.flax_path(module))
        line = f"unexpected: {tensors}, without a counterpart in Flax"
        moved = place != module.replace(".", "/")
        lines.append(f"{line} at {place}, where `names` puts it" if moved else line)
    return lines


def by_torch_module(keys: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of each module."""
    return grouped(keys, module_of)


def by_flax_module(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """The leaves of each module."""
    return grouped(paths, lambda path: path_name(path[1:-1]))


def grouped(items: Iterable[T], group_of: Callable[[T], G]) -> dict[G, list[T]]:
    """The items of each group, in their order."""
    groups = defaultdict(list)
    for item in items:
        groups[group_of(item)].append(item)
    return groups


def _in(module: str, path: str) -> bool:
    return f"{module}.".startswith(f"{path}.")
