"""What a comparison says to a reader."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from bcn_flax import interop
from bcn_flax.parity.observations import QUANTITIES
from bcn_flax.parity.rows import Row

_SHOWN = 8  # differences; the rest usually follow from the first


@dataclass(frozen=True)
class Comparison:
    """All comparisons of two modules; printed, a report.

    Attributes:
        rows: in the order in which the numbers come about.
        match: which of PyTorch's tensors is which of Flax's variables.
        notes: what a reader should know.
        hints: if the modules differ, what may explain it.
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
        parts = [verdict, *_explained(self.hints), _table(self.rows), *_widened(self.rows)]
        return "\n\n".join([*parts, *self.notes])


def worst_rows(rows: Iterable[Row]) -> dict[tuple[tuple[str, str], str], Row]:
    """Of each pair of sides and each quantity, the row that comes nearest to its tolerance."""
    worst: dict[tuple[tuple[str, str], str], Row] = {}
    for row in rows:
        key = row.sides, row.name.quantity
        if key not in worst or _badness(row) > _badness(worst[key]):
            worst[key] = row
    return worst


def _badness(row: Row) -> tuple[bool, float]:
    return bool(row.error.mismatch), row.worst.error


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
    later = sorted({row.phase for row in failed if row.phase != phase})
    if later:
        lines.append(f"Later also in: {', '.join(later)}.")
    return "\n".join(lines)


def _difference(row: Row) -> str:
    if row.error.mismatch:
        return f"{row.name}: {row.error.mismatch}"
    apart = abs(row.values[0] - row.values[1])
    text = (
        f"{row.name}: {apart:.2g} apart at {row.worst.place}, {row.allowed:.2g} allowed: "
        f"{row.values[0]:.9g} against {row.values[1]:.9g}"
    )
    if row.from_truth is None:
        return text
    farther = row.from_truth.farther
    return (
        f"{text}; {farther} is {'clearly ' if farther == 'neither' else ''}farther from the truth"
    )


def _explained(hints: Sequence[str]) -> list[str]:
    return (
        ["\n".join(["What may explain it:", *(f"  - {hint}" for hint in hints)])] if hints else []
    )


def _widened(rows: Iterable[Row]) -> list[str]:
    """The tolerances of the caller, with their reasons."""
    used = dict.fromkeys(row.tolerance for row in rows if row.tolerance is not None)
    return [
        f"Tolerance of {t.names}: {t.factor:g} times the usual"
        + (f", as {t.reason}" * bool(t.reason))
        for t in used
    ]


def _table(rows: Iterable[Row]) -> str:
    """The largest errors, by pair of sides and quantity."""
    worst = worst_rows(rows)
    lines = []
    header = ("", "absolute", "relative", "ulps", "of allowed", "farther from truth", "worst at")
    for sides in dict.fromkeys(sides for sides, _ in worst):
        cells = [
            (quantity, *_cells(worst[sides, quantity]))
            for quantity in QUANTITIES
            if (sides, quantity) in worst
        ]
        lines.append(f"{sides[0]}, against {sides[1]}: largest errors")
        lines += _aligned([header, *cells])
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.error.absolute.error:.2g}",
        f"{row.error.relative.error:.2g}",
        f"{row.error.ulps.error:.3g}",
        "not finite" if row.error.mismatch else _share(row.worst.error),
        row.from_truth.farther if row.from_truth else "",
        f"{row.phase}, {row.name} {row.worst.place}",
    )


def _share(used: float) -> str:
    return f"{used:.1%}" if used < 10 else f"{used:.2g} times"


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
