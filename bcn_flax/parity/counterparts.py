"""Which of PyTorch's modules is which of Flax's, by the weights that they hold."""

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from bcn_flax.interop import Match
from bcn_flax.interop.layouts import Path
from bcn_flax.interop.naming import canonical


class Counterparts(NamedTuple):
    """Modules that correspond.

    Attributes:
        settings: pairs of modules that have the same weights of their own, or in all, so that their
            arguments should have the same meaning.
        values: by PyTorch's name, the path of the module in Flax that has the same weights in all,
            so that it should get and return the same. The weights do not show what a module
            computes besides: one of the two may include an activation.
    """

    settings: list[tuple[Path, str]]
    values: dict[str, Path]


def counterparts(matched: Match, torch: Any) -> Counterparts:
    """The modules that correspond because the same weights are in them."""
    first: dict[int, str] = {}
    # A module that is shared has several names, of which the first one counts.
    names = {
        name: first.setdefault(id(part), name)
        for name, part in torch.named_modules(remove_duplicate=False)
    }
    keys = defaultdict(list)
    for pair in matched.pairs:
        keys[pair.key].append(pair.path)
    for key, other in matched.tied.items():
        keys[key] += keys[other]
    own_torch: dict[str, set[Path]] = defaultdict(set)
    all_torch: dict[str, set[Path]] = defaultdict(set)
    own_flax: dict[Path, set[Path]] = defaultdict(set)
    all_flax: dict[Path, set[Path]] = defaultdict(set)
    for key, leaves in keys.items():
        modules = [names[m] for m in _around(key) if m in names]
        own_torch[modules[0]].update(leaves)
        for module in modules:
            all_torch[module].update(leaves)
        for leaf in leaves:
            place = leaf[1:-1]
            own_flax[place].add(leaf)
            for n in range(len(place) + 1):
                all_flax[place[:n]].add(leaf)
    owners = [
        (flax[0], torch[0])
        for flax, torch in _same_weights(own_flax, own_torch)
        if len(flax) == len(torch) == 1
    ]
    values = {}
    for paths, modules in _same_weights(all_flax, all_torch):
        values.update(_pair_nested(paths, modules, [*owners]))
    settings = dict.fromkeys([*owners, *((path, name) for name, path in values.items())])
    return Counterparts([*settings], {**values, "": ()})


def _around(key: str) -> Iterator[str]:
    """The modules around a tensor, from the inside to the outside."""
    while key:
        key = key.rpartition(".")[0]
        yield key


def _same_weights(
    flax: Mapping[Path, set[Path]], torch: Mapping[str, set[Path]]
) -> Iterator[tuple[list[Path], list[str]]]:
    """The modules of Flax and of PyTorch that have the same weights."""
    by_weights: dict[frozenset[Path], tuple[list[Path], list[str]]] = {}
    for path, leaves in flax.items():
        by_weights.setdefault(frozenset(leaves), ([], []))[0].append(path)
    for name, leaves in torch.items():
        by_weights.setdefault(frozenset(leaves), ([], []))[1].append(name)
    yield from by_weights.values()


def _pair_nested(
    paths: Sequence[Path], names: Sequence[str], owners: Collection[tuple[Path, str]]
) -> dict[str, Path]:
    """Pair modules that have the same weights since they are inside of each other."""
    paths = sorted(paths, key=len)
    names = sorted(names, key=len)
    nested = all(f"{inner}.".startswith(f"{outer}.") for outer, inner in pairwise(names) if outer)
    if not nested or any(inner[: len(outer)] != outer for outer, inner in pairwise(paths)):
        return {}
    found = {}
    if paths and names and (paths[-1], names[-1]) in owners:
        found[names.pop()] = paths.pop()
    # The whole modules correspond whatever their weights.
    paths, names = [path for path in paths if path], [name for name in names if name]
    if len(paths) == len(names):
        return {**found, **dict(zip(names, paths, strict=True))}
    ends = Counter(_end(name.split(".")) for name in names)
    for path in paths:
        same = [name for name in names if _end(name.split(".")) == _end(path)]
        if len(same) == 1 and ends[_end(path)] == 1:
            found[same[0]] = path
    return found


def _end(components: Sequence[str]) -> Hashable:
    """The last name of a path, as both libraries write it."""
    return canonical(components)[-1:]


def pair_by_position(
    flax: Sequence[tuple[Path, int]],
    torch: Sequence[tuple[str, int]],
    known: Mapping[tuple[str, int], tuple[Path, int]],
) -> dict[tuple[str, int], tuple[Path, int]]:
    """Pair calls of modules without weights by their position between known ones.

    Args:
        flax: the calls of Flax's modules, in order.
        torch: the calls of PyTorch's modules, in order.
        known: the calls that are known to correspond.

    Returns:
        Those between the same two known ones, if they are as many on both sides.
    """
    theirs = _between(torch, known)
    ours = _between(flax, {call: call for call in known.values()})
    return {
        name: path
        for place, names in theirs.items()
        if len(names) == len(ours.get(place, ()))
        for name, path in zip(names, ours.get(place, ()), strict=True)
    }


def _between(calls: Sequence[Any], known: Mapping[Any, Any]) -> dict[Hashable, list[Any]]:
    """The unknown calls by the known ones before and after them."""
    found: dict[Hashable, list[Any]] = {}
    before: Any = None
    unknown: list[Any] = []
    for call in [*calls, None]:
        after = known.get(call)
        if call is not None and after is None:
            unknown.append(call)
            continue
        found[before, after] = unknown
        before, unknown = after, []
    return found
