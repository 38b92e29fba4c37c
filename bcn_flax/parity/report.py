"""The result of a comparison, which prints as a report."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, isfinite
from typing import Any

from bcn_flax import interop
from bcn_flax.interop.layouts import path_name
from bcn_flax.parity.errors import Row, Worst
from bcn_flax.parity.protocol import QUANTITIES

_SHOWN = 8  # differences; the others usually follow from the first
_OF_ALLOWED = "of allowed"


@dataclass(frozen=True)
class Comparison:
    """All comparisons of two modules; printed, a report.

    Attributes:
        rows: in the order in which the arrays are computed.
        match: which of PyTorch's tensors is which of Flax's variables.
        notes: what a reader should know.
        hints: what may explain the difference; if there is none, which settings differ.
        seconds: that the comparison took, compilation included.
    """

    rows: tuple[Row, ...]
    match: interop.Match
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the modules agree in everything."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        """The differences, if there are any, and a table of the largest errors."""
        verdict = _agreement(self.rows) if self.passed else _differences(self.rows)
        hints = _explained(self.hints, self.passed)
        parts = [verdict, *hints, _table(self.rows), *_factors(self.rows)]
        return "\n\n".join([*parts, *self.notes, f"Compared in {self.seconds:.1f} seconds."])

    def to_json(self) -> str:
        """The comparison as JSON: whether it passed, hints, notes, weights and a list of rows.

        Numbers that are not finite are the strings "inf", "-inf" and "nan".
        """
        plain = {
            "passed": self.passed,
            "seconds": self.seconds,
            "hints": self.hints,
            "notes": self.notes,
            "weights": {pair.name: path_name(pair.path) for pair in self.match.pairs},
            "rows": [_plain_row(row) for row in self.rows],
        }
        return json.dumps(plain, indent=1, allow_nan=False)


def _plain_row(row: Row) -> dict[str, Any]:
    """A row as plain data."""
    accuracy = row.accuracy
    return {
        "phase": row.phase,
        "implementations": row.implementations,
        "quantity": row.name.quantity,
        "path": row.name.path,
        "passed": row.passed,
        "dtype": str(row.dtype),
        "absolute": _number(row.error.absolute.error),
        "relative": _number(row.error.relative.error),
        "ulps": _number(row.error.ulps.error),
        "scale": _number(row.error.scale),
        "mismatch": row.error.mismatch,
        "of_allowed": _number(row.worst.error),
        "place": row.worst.place,
        "values": [*map(_number, row.values)],
        "allowed": _number(row.allowed),
        "tolerance": row.tolerance._asdict() if row.tolerance else None,
        "accuracy": {k: _number(x) for k, x in accuracy._asdict().items()} if accuracy else None,
    }


def _number(x: float) -> float | str:
    """A number that JSON can hold."""
    return float(x) if isfinite(x) else str(float(x))


def _agreement(rows: Sequence[Row]) -> str:
    return f"Flax and PyTorch agree in all of {len(rows)} comparisons."


def _differences(rows: Sequence[Row]) -> str:
    """The first differences, which explain the later ones."""
    failed = [row for row in rows if not row.passed]
    phase = failed[0].phase
    first = [row for row in failed if row.phase == phase]
    lines = [
        f"Flax and PyTorch differ in {len(failed)} of {len(rows)} comparisons.",
        f"The first phase with a difference is: {phase}.",
    ]
    for (actual, expected), group in groupby(first, key=lambda row: row.implementations):
        members = list(group)
        lines.append(f"  {actual}, against {expected}:")
        lines += [f"    {_difference(row)}" for row in members[:_SHOWN]]
        if len(members) > _SHOWN:
            lines.append(f"    and {len(members) - _SHOWN} more")
    later = dict.fromkeys(row.phase for row in failed if row.phase != phase)
    if later:
        lines.append(f"They also differ later, in: {', '.join(later)}.")
    return "\n".join(lines)


def _difference(row: Row) -> str:
    if row.error.mismatch:
        return f"{row.name}: {row.error.mismatch}{_accuracy(row)}"
    apart = abs(row.values[0] - row.values[1])
    return (
        f"{row.name}: {apart:.2g} apart at {row.worst.place}, {row.allowed:.2g} allowed: "
        f"{row.values[0]:.9g} against {row.values[1]:.9g}{_accuracy(row)}"
    )


def _accuracy(row: Row) -> str:
    if row.accuracy is None:
        return ""
    side = row.accuracy.less_accurate
    return f"; {side} is {'clearly ' * (side == 'neither')}less accurate"


def _explained(hints: Sequence[str], passed: bool) -> list[str]:
    heading = "They agree, but their settings differ:" if passed else "What may explain it:"
    return ["\n".join([heading, *(f"  - {hint}" for hint in hints)])] if hints else []


def _factors(rows: Iterable[Row]) -> list[str]:
    """The tolerances of the caller that were used, with their reasons."""
    used = dict.fromkeys(row.tolerance for row in rows if row.tolerance is not None)
    return [
        f"Tolerance of {t.pattern}: {t.factor:g} times the usual"
        + (f", as {t.reason}" * bool(t.reason))
        for t in used
    ]


def _table(rows: Iterable[Row]) -> str:
    """The largest errors, by pair of implementations, quantity and measure."""
    largest = _largest(rows)
    lines = []
    for actual, expected in dict.fromkeys(implementations for implementations, _ in largest):
        table: list[tuple[str, ...]] = [("", "", "largest", "less accurate", "where")]
        for quantity in QUANTITIES:
            table += _lines(quantity, largest.get(((actual, expected), quantity), {}))
        lines += [f"{actual}, against {expected}:", *_aligned(table)]
    return "\n".join(lines)


def _largest(
    rows: Iterable[Row],
) -> dict[tuple[tuple[str, str], str], dict[str, tuple[Row, Worst]]]:
    """By pair of implementations, quantity and measure, the largest error and its row."""
    largest: dict[tuple[tuple[str, str], str], dict[str, tuple[Row, Worst]]] = {}
    for row in rows:
        errors = largest.setdefault((row.implementations, row.name.quantity), {})
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


def _lines(quantity: str, errors: Mapping[str, tuple[Row, Worst]]) -> Iterator[tuple[str, ...]]:
    """A line of the table for each measure, or a single one if there is no error."""
    found = {measure: largest for measure, largest in errors.items() if largest[1].error}
    if errors and not found:
        yield quantity, "exact", "", "", ""
    for measure, (row, worst) in found.items():
        yield (
            quantity,
            measure,
            _share(worst.error) if measure == _OF_ALLOWED else f"{worst.error:.3g}",
            row.accuracy.less_accurate if row.accuracy else "",
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
