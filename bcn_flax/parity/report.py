"""What a comparison says to a reader."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf

from bcn_flax import interop
from bcn_flax.parity.errors import Worst
from bcn_flax.parity.observations import QUANTITIES
from bcn_flax.parity.rows import Row

Sides = tuple[str, str]

_SHOWN = 8  # differences; the rest usually follow from the first
_OF_ALLOWED = "of allowed"


@dataclass(frozen=True)
class Comparison:
    """All comparisons of two modules; printed, a report.

    Attributes:
        rows: in the order in which the numbers come about.
        match: which of PyTorch's tensors is which of Flax's variables.
        notes: what a reader should know.
        hints: what may explain that the modules differ; if they do not, in what their settings do.
    """

    rows: tuple[Row, ...]
    match: interop.Match
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the modules agree in everything."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        """What differs, if anything does, and a table of the largest errors."""
        verdict = _agreement(self.rows) if self.passed else _differences(self.rows)
        hints = _explained(self.hints, self.passed)
        parts = [verdict, *hints, _table(self.rows), *_widened(self.rows)]
        return "\n\n".join([*parts, *self.notes])


def _largest(rows: Iterable[Row]) -> dict[tuple[Sides, str], dict[str, tuple[Row, Worst]]]:
    """Of each pair of sides and each quantity, by measure, the largest error and its row."""
    largest: dict[tuple[Sides, str], dict[str, tuple[Row, Worst]]] = {}
    for row in rows:
        errors = largest.setdefault((row.sides, row.name.quantity), {})
        for measure, worst in _measures(row).items():
            if measure not in errors or worst.error > errors[measure][1].error:
                errors[measure] = row, worst
    return largest


def _measures(row: Row) -> dict[str, Worst]:
    error = row.error
    return {
        "absolute": error.absolute,
        "relative": error.relative,
        "ulps": error.ulps,
        _OF_ALLOWED: row.worst,
    }


def _agreement(rows: Sequence[Row]) -> str:
    return f"Flax and PyTorch agree in all of {len(rows)} comparisons."


def _differences(rows: Sequence[Row]) -> str:
    """The first differences, which explain the later ones."""
    failed = [row for row in rows if not row.passed]
    phase = failed[0].phase
    first = [row for row in failed if row.phase == phase]
    lines = [
        f"Flax and PyTorch differ, in {len(failed)} of {len(rows)} comparisons.",
        f"First in the phase: {phase}.",
    ]
    for sides, group in groupby(first, key=lambda row: row.sides):
        members = list(group)
        lines.append(f"  {sides[0]}, against {sides[1]}:")
        lines += [f"    {_difference(row)}" for row in members[:_SHOWN]]
        if len(members) > _SHOWN:
            lines.append(f"    and {len(members) - _SHOWN} more")
    later = dict.fromkeys(row.phase for row in failed if row.phase != phase)
    if later:
        lines.append(f"Later also in: {', '.join(later)}.")
    return "\n".join(lines)


def _difference(row: Row) -> str:
    if row.error.mismatch:
        return f"{row.name}: {row.error.mismatch}{_judged(row)}"
    apart = abs(row.values[0] - row.values[1])
    return (
        f"{row.name}: {apart:.2g} apart at {row.worst.place}, {row.allowed:.2g} allowed: "
        f"{row.values[0]:.9g} against {row.values[1]:.9g}{_judged(row)}"
    )


def _judged(row: Row) -> str:
    if row.from_truth is None:
        return ""
    farther = row.from_truth.farther
    return f"; {farther} is {'clearly ' * (farther == 'neither')}farther from the truth"


def _explained(hints: Sequence[str], passed: bool) -> list[str]:
    heading = "They agree, but their settings differ:" if passed else "What may explain it:"
    return ["\n".join([heading, *(f"  - {hint}" for hint in hints)])] if hints else []


def _widened(rows: Iterable[Row]) -> list[str]:
    """The tolerances of the caller, with their reasons."""
    used = dict.fromkeys(row.tolerance for row in rows if row.tolerance is not None)
    return [
        f"Tolerance of {t.names}: {t.factor:g} times the usual"
        + (f", as {t.reason}" * bool(t.reason))
        for t in used
    ]


def _table(rows: Iterable[Row]) -> str:
    """The largest errors, by pair of sides, quantity and measure."""
    largest = _largest(rows)
    lines = []
    for sides in dict.fromkeys(sides for sides, _ in largest):
        table: list[tuple[str, ...]] = [("", "", "largest", "farther from the truth", "where")]
        for quantity in QUANTITIES:
            table += _lines(quantity, largest.get((sides, quantity), {}))
        lines += [f"{sides[0]}, against {sides[1]}:", *_aligned(table)]
    return "\n".join(lines)


def _lines(quantity: str, errors: Mapping[str, tuple[Row, Worst]]) -> Iterator[tuple[str, ...]]:
    """A line of the table for each measure, or one if there is no error."""
    found = {measure: largest for measure, largest in errors.items() if largest[1].error}
    if errors and not found:
        yield quantity, "exact", "", "", ""
    for measure, (row, worst) in found.items():
        yield (
            quantity,
            measure,
            _share(worst.error) if measure == _OF_ALLOWED else f"{worst.error:.3g}",
            row.from_truth.farther if row.from_truth else "",
            f"{row.phase}, {row.name} {worst.place}",
        )
        quantity = ""


def _share(used: float) -> str:
    if used <= 1:
        return f"{used:.1%}"
    return f"{used:.2g} times" if used < inf else "unequal"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
