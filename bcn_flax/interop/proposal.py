"""Better names, proposed by shapes and order, for modules that are named differently.

The shapes come first: a module gets a place whose leaves have its shapes, and modules that are
together in a block get places that are. Of several places that fit, the names and then the order
decide; these are marked as guesses.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple, TypeVar

from bcn_flax.interop.layouts import SKIPPED, Path, Shape
from bcn_flax.interop.naming import (
    NameMatch,
    Renames,
    by_flax_module,
    by_torch_module,
    canonical,
    match_names,
    natural,
    split_key,
)
from bcn_flax.interop.pairs import fits
from bcn_flax.interop.rules import rules_for

T = TypeVar("T")
Fits = Callable[[str, str], bool]

# The names that PyTorch's wrappers put before all others.
WRAPPERS = ("module", "_orig_mod", "model")

# Words for the same thing.
SYNONYMS = {
    "norm": ("bn", "gn", "ln", "batchnorm", "groupnorm", "layernorm"),
    "shortcut": ("downsample", "proj", "projection", "skip"),
    "dense": ("fc", "linear"),
}
_WORDS = {word: common for common, words in SYNONYMS.items() for word in words}


class Proposal(NamedTuple):
    """Better names.

    Attributes:
        match: by these names.
        guesses: by PyTorch's module, how many other places have leaves of the same shapes.
    """

    match: NameMatch
    guesses: Mapping[str, int]


def better_names(found: NameMatch, order: Sequence[str]) -> Proposal:
    """The match under more names, if these match more: no wrapper, and names by shape and order.

    Args:
        found: by the names that the caller gave.
        order: the modules of Flax in the order of their definition, if it is known.
    """
    if not found.missing:
        return Proposal(found, {})
    wrapper = _likely_wrapper(found)
    return _proposal(_with_names(found, {wrapper: ""}) if wrapper else found, order)


def name_hints(found: NameMatch, better: NameMatch) -> str:
    """The usual reasons why names do not match, of those that the keys show."""
    hint, wrapper = "", better.renames.wrapper
    if wrapper != found.renames.wrapper:
        hint += f'All names begin with "{wrapper}.", which names={{"{wrapper}": ""}} removes.\n'
    if any("/" in key for key in found.tensors):
        hint += "A state_dict joins its names with dots, not slashes.\n"
    return hint


def name_proposal(found: NameMatch, better: Proposal) -> str:
    """The better names, to copy, if more tensors match by them."""
    if len(better.match.links) == len(found.links):
        return ""
    entries = [
        f'    "{path}": "{place}",'
        + (f"  # a guess: {better.guesses[path]} more fit" if path in better.guesses else "")
        for path, place in better.match.renames.paths.items()
    ]
    lines = ["By shapes and order, to be checked and edited:", "names={", *entries, "}"]
    return "\n".join(["", *lines])


def _likely_wrapper(found: NameMatch) -> str:
    """A name before all names without which more tensors find their leaf.

    If nothing matches either way, because other names differ too, a wrapper's usual name.
    """
    if found.renames.wrapper:
        return ""
    columns = zip(*(module.split(".") for module in found.renames.modules), strict=False)
    common = [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
    prefixes = [".".join(common[:n]) for n in range(1, len(common) + 1) if common[0]]
    matched = {prefix: len(_with_names(found, {prefix: ""}).links) for prefix in prefixes}
    best = max(matched, key=matched.__getitem__, default="")
    if best and matched[best] > len(found.links):
        return best
    usual = [prefix for prefix in matched if {*prefix.split(".")} <= {*WRAPPERS}]
    return max(usual, key=len) if usual and not found.links else ""


def _with_names(found: NameMatch, more: Mapping[str, str]) -> NameMatch:
    renames = Renames.of({**found.renames.paths, **more}, found.renames.modules)
    return match_names(found.tensors, found.leaves, renames, found.rules)


def _proposal(found: NameMatch, order: Sequence[str]) -> Proposal:
    """The match with names for modules of which nothing matches."""
    named = found.keys | found.renames.paths.keys()
    modules = _unmatched(by_torch_module(found.tensors), named)
    modules = {
        m: [k for k in keys if split_key(k)[1] not in SKIPPED] for m, keys in modules.items()
    }
    modules = {module: keys for module, keys in modules.items() if keys}
    matched = found.leaves.keys() - found.missing.keys()
    places = _unmatched(by_flax_module(found.leaves), matched) | _unmatched(_fused(found), matched)
    known: dict[tuple[object, object], bool] = {}

    def fit(module: str, place: str) -> bool:
        depth = len([*filter(None, place.split("/"))])
        tensors = {split_key(key)[1]: found.tensors[key] for key in modules[module]}
        leaves = {(p[0], *p[depth + 1 :]): found.leaves[p] for p in places[place]}
        key = (*tensors.items(),), (*leaves.items(),)
        if key not in known:
            inside = match_names(tensors, leaves, Renames({}, [""]), found.rules)
            whole = not (inside.missing or inside.ambiguous) and inside.keys == {*tensors}
            known[key] = whole and fits(inside)
        return known[key]

    own_places = {module: "/".join(found.renames.flax_path(module)) for module in modules}
    chosen = _Alignment(
        fit,
        {m: [found.tensors[key] for key in keys] for m, keys in modules.items()},
        {m: [found.leaves[path] for path in paths] for m, paths in places.items()},
    ).of(
        _in_order(own_places, [*found.tensors]),
        _in_order(
            {place: place for place in places},
            [path for path in found.leaves if path[0] == "params"],
            order,
        ),
    )
    better = _with_names(found, {module: chosen[module] for module in modules if module in chosen})
    if not {*better.links} >= {*found.links}:
        return Proposal(found, {})
    more = {module: sum(fit(module, place) for place in places) - 1 for module in chosen}
    return Proposal(better, {module: n for module, n in more.items() if n})


def _fused(found: NameMatch) -> dict[str, list[Path]]:
    """The leaves that may be parts of tensors of one module, by this module."""
    groups: dict[str, list[Path]] = {}
    for path in found.leaves:
        for rule, module in rules_for(found.rules, path):
            if len(module) < len(path) - 2 and not all("." in name for name in rule.names):
                groups.setdefault("/".join(module), []).append(path)
    return groups


class _Alignment(NamedTuple):
    """Which modules of PyTorch are which of Flax, by shapes, blocks, names and order.

    Attributes:
        fit: whether a module has the shapes of a place.
        modules: the shapes of PyTorch's modules.
        places: the shapes of Flax's modules.
    """

    fit: Fits
    modules: Mapping[str, list[Shape]]
    places: Mapping[str, list[Shape]]

    def of(self, modules: Sequence[str], places: Sequence[str]) -> dict[str, str]:
        """The places of modules, both in order."""
        chosen: dict[str, str] = {}
        blocks = _blocks(places, "/")
        for block in _blocks(modules, "."):
            if chosen.keys() & {*block}:
                continue
            for other in blocks:
                if {*chosen.values()} & {*other} or self._sizes(block, other):
                    continue
                inside = self.of(block, other)
                if inside.keys() == {*block} and {*inside.values()} == {*other}:
                    chosen |= inside
                    break
        self._one_by_one(chosen, modules, places)
        return chosen

    def _sizes(self, block: Sequence[str], other: Sequence[str]) -> bool:
        """Whether the two have different numbers of values."""
        return sum(math.prod(s) for m in block for s in self.modules[m]) != sum(
            math.prod(s) for m in other for s in self.places[m]
        )

    def _one_by_one(
        self, chosen: dict[str, str], modules: Sequence[str], places: Sequence[str]
    ) -> None:
        """Choose for the modules that have no place yet: similar names first, then equal depths."""
        free = [place for place in places if place not in chosen.values()]
        left = [module for module in modules if module not in chosen]
        words = {name: _words(re.split("[./]", name)) for name in [*left, *free]}
        depths = {name: len(canonical(filter(None, re.split("[./]", name)))) for name in words}
        possible = [(m, p) for m in left for p in free if self.fit(m, p)]

        def unlike(pair: tuple[str, str]) -> tuple[float, int]:
            (module, place), both = pair, [words[name] for name in pair]
            alike = len(both[0] & both[1]) / max(len(both[0] | both[1]), 1)
            return -alike, abs(depths[module] - depths[place])

        for module, place in sorted(possible, key=unlike):
            if module not in chosen and place not in chosen.values():
                chosen[module] = place


def _blocks(names: Sequence[str], separator: str) -> list[list[str]]:
    """Modules that have the beginning of their names in common, the outermost blocks first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        parts = name.split(separator)
        for n in range(1, len(parts)):
            groups.setdefault((*parts[:n],), []).append(name)
    inner = {tuple(group): group for group in groups.values() if 1 < len(group) < len(names)}
    return sorted(inner.values(), key=len, reverse=True)


def _words(path: Iterable[str]) -> set[str]:
    """The words in a module's name, the same for the same thing, without numbers."""
    name = next((part for part in reversed([*path]) if not part.isdecimal()), "")
    words = re.findall(r"[a-z]+", name.lower())
    return {_WORDS.get(word, word) for word in words}


def _unmatched(modules: Mapping[str, list[T]], matched: Collection[object]) -> dict[str, list[T]]:
    """The modules that are not matched themselves, and of which nothing is."""
    return {
        module: group
        for module, group in modules.items()
        if module not in matched and not any(x in matched for x in group)
    }


def _in_order(
    places: Mapping[str, str],
    everything: Sequence[str] | Sequence[Path],
    order: Sequence[str] = (),
) -> list[str]:
    """Modules by their places, those at the top first.

    The order is that of the definition, if it is known; or else that of `everything`, unless this
    is sorted, so that its order is lost. In that case it is that of the names, 2 before 10.
    """
    lost = [*everything] == sorted(everything)

    def key(module: str) -> tuple[bool, int, list[str | int]]:
        nested = len(canonical(filter(None, places[module].split("/")))) > 1
        if module in order:
            return nested, order.index(module), []
        return nested, len(order), natural(module) if lost else []

    return sorted(places, key=key)
