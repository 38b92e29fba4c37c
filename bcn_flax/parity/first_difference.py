"""Find the place in a model where a Flax and a PyTorch module begin to differ."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bcn_flax.interop.layouts import Array, Path
from bcn_flax.parity.counterparts import pair_by_position
from bcn_flax.parity.pair import ModulePair, Probe
from bcn_flax.parity.protocol import Snapshot, module_name
from bcn_flax.parity.torch_side import Change, Perturbation

_PERTURBATION = 1e-9  # relative: large beside the roundings of float64, and linear in its effect
_JUMP = 30  # the factor by which a difference must exceed all before it to be a new one
_ROUNDING = 0.1  # in units of the perturbation: smaller differences are roundings of float64
_SMALL = 1e3  # in these units: differences as of roundings of float32 and small constants
_HUGE = 1e200  # the difference to a number that is not finite
_SHOWN = 3  # modules
_TRIED = 8  # snapshots

Call = tuple[Any, int]


def first_differences(pair: ModulePair, probe: Probe) -> Iterator[str]:
    """Where the values differ first, in evaluation and in training; `pair` is in float64."""
    classes = {name: type(part) for name, part in pair.torch.named_modules()}
    found: dict[str, list[str]] = {}
    for mode, calls in probe.calls.items():

        def run(change: Change, train: bool = mode == "training") -> list[Snapshot]:
            return pair.run_torch(probe.inputs, train, change=change).snapshots

        flax, torch = calls.flax.run(), calls.torch.snapshots
        timeline = _timeline(flax, torch, probe.same_values, classes, run)
        if timeline is not None and (sentence := timeline.sentence()):
            found.setdefault(sentence, []).append(mode)
    for sentence, modes in found.items():
        yield f"In {' and '.join(modes)}, {sentence}"


class _Timeline(NamedTuple):
    """What the modules get and return, in PyTorch's order.

    Attributes:
        snapshots: PyTorch's.
        places: for PyTorch's calls, Flax's.
        apart: for each snapshot, how far it is from Flax's, in units of how far a perturbation of
            everything before it moves it; infinite if the sizes differ; None if there is nothing
            to compare it with.
        classes: of PyTorch's modules, by name.
        run: calls PyTorch's module again, with changed values.
    """

    snapshots: list[Snapshot]
    places: Mapping[Call, Call]
    apart: list[float | None]
    classes: Mapping[str, type]
    run: Callable[[Change], list[Snapshot]]

    def sentence(self) -> str:
        """Where the values begin to differ; nothing if they do not."""
        sources = [*self._sources()]
        large = [i for i in sources if (self.apart[i] or 0) > _SMALL]
        if not sources:
            return ""
        source = (large or sources)[0]
        before = self._agreeing_before(source)
        snapshot = self.snapshots[source]
        if before is None:
            return f"the first difference is in {self._described(source)}."
        if snapshot.returned and self.snapshots[before].key == (*snapshot[:2], False):
            where = self._described(source).removeprefix("the output of ")
            return f"the first module whose output differs is {where}; its input agrees."
        return (
            f"the first difference arises between {self._described(before)}, which agrees, and "
            f"{self._described(source)}, which does not{self._between(before, source)}."
        )

    def _sources(self) -> Iterator[int]:
        """The snapshots whose difference does not follow from one before."""
        largest = _ROUNDING / _JUMP
        unlike: set[Any] = set()  # classes that do more or less than their counterparts
        for i, apart in enumerate(self.apart):
            name, _, returned, _ = self.snapshots[i]
            if apart is None or apart <= largest or (self.classes[name], returned) in unlike:
                continue
            if apart > _JUMP * largest:
                if self._is_made_up_for(i):
                    unlike.add((self.classes[name], returned))
                    continue
                yield i
            largest = apart

    def _is_made_up_for(self, i: int) -> bool:
        """Whether what depends on a snapshot agrees again.

        If so, one of two modules does more than its counterpart, such as its own activation or
        padding. Of values, what follows next must agree: something later may agree though there is
        a difference, as a batch norm removes a bias. Of sizes, anything later shows it.
        """
        apart = [(j, self.apart[j]) for j in self._moved_by(i)]
        comparable = [j for j, x in apart if x is not None and x < np.inf]
        following = comparable if self.apart[i] == np.inf else comparable[:1]
        return any(self._agrees(j, i) for j in following)

    def _agreeing_before(self, i: int) -> int | None:
        """The last snapshot that agrees and on which another depends."""
        agreeing = [j for j in range(i) if self._agrees(j, i)]
        last = agreeing[: -_TRIED - 1 : -1]
        return next((j for j in last if i in self._moved_by(j)), last[0] if last else None)

    def _agrees(self, i: int, source: int) -> bool:
        """Whether a snapshot agrees, compared with one that does not."""
        a, b = self.apart[i], self.apart[source]
        return a is not None and b is not None and (a < b / _JUMP or a < _ROUNDING)

    def _moved_by(self, i: int) -> list[int]:
        """The later snapshots that depend on a snapshot."""
        key, perturb = self.snapshots[i].key, Perturbation(1e-3)
        moved = self.run(lambda snapshot, x: perturb(x) if snapshot.key == key else x)
        if [s.key for s in moved] != [s.key for s in self.snapshots]:
            return []
        pairs = enumerate(zip(self.snapshots, moved, strict=True))
        return [j for j, (a, b) in pairs if j > i and not _equal(a.arrays, b.arrays)]

    def _between(self, before: int, after: int) -> str:
        """PyTorch's modules without a counterpart that are called between two snapshots."""
        calls = [s[:2] for s in self.snapshots[before + 1 : after]]
        unknown = dict.fromkeys(name for name, call in calls if (name, call) not in self.places)
        if not unknown:
            return ""
        more = f" and {len(unknown) - _SHOWN} more" * (len(unknown) > _SHOWN)
        return f"; in between, PyTorch calls {', '.join([*unknown][:_SHOWN])}{more}"

    def _described(self, i: int) -> str:
        name, call, returned, _ = self.snapshots[i]
        path = self.places[name, call][0]
        text = f"the {'output' if returned else 'input'} of {module_name(path)}"
        if name.replace(".", "/") != "/".join(path):
            text += f" ({name or 'the whole module'} in PyTorch)"
        several = (name, 1) in self.places
        return text + f" in call {call + 1}" * several


def _timeline(
    flax: Sequence[Snapshot],
    torch: list[Snapshot],
    known: Mapping[str, Path],
    classes: Mapping[str, type],
    run: Callable[[Change], list[Snapshot]],
) -> _Timeline | None:
    """Compare the snapshots of both sides; None if PyTorch calls other modules in another run."""
    perturb = Perturbation(_PERTURBATION)
    moved = run(lambda _, x: perturb(x))
    if [s.key for s in moved] != [s.key for s in torch]:
        return None
    places = _paired_calls(flax, torch, known)
    by_key = {snapshot.key: snapshot.arrays for snapshot in flax}
    apart = []
    for snapshot, perturbed in zip(torch, moved, strict=True):
        place = places.get(snapshot[:2])
        ours = by_key.get((*place, snapshot.returned)) if place else None
        apart.append(_apart(ours, snapshot.arrays, perturbed.arrays) if ours else None)
    return _Timeline(torch, places, apart, classes, run)


def _paired_calls(
    flax: Sequence[Snapshot], torch: Sequence[Snapshot], known: Mapping[str, Path]
) -> dict[Call, Call]:
    """For calls of PyTorch's modules the corresponding calls of Flax's."""
    theirs, ours = ([s[:2] for s in own if not s.returned] for own in (torch, flax))
    count = {
        side: {module: sum(m == module for m, _ in calls) for module, _ in calls}
        for side, calls in (("torch", theirs), ("flax", ours))
    }
    places: dict[Call, Call] = {
        (name, call): (known[name], call)
        for name, call in theirs
        if name in known
        if count["torch"][name] == count["flax"].get(known[name])
    }
    return {**pair_by_position(ours, theirs, places), **places}


def _apart(flax: Sequence[Array], torch: Sequence[Array], moved: Sequence[Array]) -> float | None:
    """How far two lists of arrays are apart; see `_Timeline.apart`."""
    # One side may take or return more, such as a mask or the weights of attention.
    count = min(len(flax), len(torch)) if len(flax) == len(torch) else 1
    known = [*map(_array_apart, flax[:count], torch[:count], moved[:count])]
    return max((x for x in known if x is not None), default=None)


def _array_apart(a: Array, b: Array, moved: Array) -> float | None:
    if a.size != b.size or not a.size:
        return np.inf if a.size != b.size else None
    a, b, moved = (np.asarray(x, np.float64) for x in (a, b, moved))
    orders = [b, np.moveaxis(b, 1, -1)] if b.ndim > 2 else [b]
    fitting = [x for x in orders if x.shape == a.shape] or [b.reshape(a.shape)]
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    unit = _distance(moved, b) if moved.shape == b.shape else 0.0
    unit = (unit if unit < _HUGE else 0.0) + _PERTURBATION * (scale or 1.0)
    apart = min(_distance(a, x) for x in fitting) / unit
    # The same values in an order that is not known here show nothing.
    sorted_apart = _distance(np.sort(a, axis=None), np.sort(b, axis=None)) / unit
    return None if sorted_apart < apart / _JUMP and apart > _ROUNDING else float(apart)


def _distance(a: Array, b: Array) -> float:
    """The largest difference; huge if other values are not finite."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    return float(np.where(np.isfinite(difference), difference, _HUGE).max(initial=0.0))


def _equal(a: Sequence[Array], b: Sequence[Array]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating))
