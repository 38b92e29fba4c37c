"""The result of a comparison, which prints as a report."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, isfinite
from typing import Any, Literal

from bcn_flax import interop
from bcn_flax.interop.layouts import path_name
from bcn_flax.parity.errors import Row, Worst, eps
from bcn_flax.parity.protocol import QUANTITIES

_SHOWN = 8  # differences; the others usually follow from the first
_OF_ALLOWED = "of allowed"
_NEAR = 0.5  # of the allowed error; correct modules use a few percent

Verdict = Literal["equal", "different", "inconclusive"]


@dataclass(frozen=True)
class Comparison:
    """All comparisons of two modules; printed, a report.

    Attributes:
        rows: in the order in which the arrays are computed.
        match: which of PyTorch's tensors is which of Flax's variables.
        notes: what a reader should know.
        hints: what may explain the difference; if there is none, which settings differ.
        missing: what the evidence lacks, and how to supply it.
        seconds: that the comparison took, compilation included.
    """

    rows: tuple[Row, ...]
    match: interop.Match
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether the modules compute the same.

        "different" if any array differs by more than is allowed. "equal" if none does, and a
        difference would have been seen: in float64, or against an oracle. Else "inconclusive".
        """
        if not all(row.passed for row in self.rows):
            return "different"
        return "inconclusive" if self.missing else "equal"

    @property
    def passed(self) -> bool:
        """Whether the verdict is "equal"."""
        return self.verdict == "equal"

    def __str__(self) -> str:
        """The verdict, the differences if there are any, and a table of the largest errors."""
        verdict = {"equal": _equal, "different": _differences, "inconclusive": _inconclusive}
        hints = _explained(self)
        parts = [verdict[self.verdict](self), *hints, _table(self.rows), *_factors(self.rows)]
        return "\n\n".join([*parts, *self.notes, f"Compared in {self.seconds:.1f} seconds."])

    def to_json(self) -> str:
        """The comparison as JSON: the verdict, hints, notes, weights and a list of rows.

        Numbers that are not finite are the strings "inf", "-inf" and "nan".
        """
        plain = {
            "verdict": self.verdict,
            "passed": self.passed,
            "missing": self.missing,
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


def _equal(comparison: Comparison) -> str:
    rows = comparison.rows
    return "\n".join(
        [f"Equal: Flax and PyTorch agree in all of {len(rows)} comparisons.", *_evidence(rows)]
    )


def _inconclusive(comparison: Comparison) -> str:
    rows = comparison.rows
    return "\n".join(
        [
            f"Inconclusive: no difference was found in {len(rows)} comparisons, which does not "
            "suffice to call the modules equal.",
            *(f"  - {reason}" for reason in comparison.missing),
            "To accept that in a test, pass allow_inconclusive=True to assert_parity.",
            *_evidence(rows),
        ]
    )


def _evidence(rows: Sequence[Row]) -> Iterator[str]:
    """How much of the allowed error is used, for each pair of implementations."""
    for (actual, expected), group in _by_implementations(rows).items():
        row = max(group, key=lambda row: row.worst.error)
        share = (
            f"at most {_share(row.worst.error)} of the allowed error, in {row.phase}, {row.name}"
        )
        yield f"  {actual}, against {expected}: {share if row.worst.error else 'exact'}."
        near = row.worst.error > _NEAR and row.tolerance is None
        if near:
            yield "    That is unusually much. Look at the places where the error is largest."
    if not any(eps(row.dtype) for row in rows if row.name.quantity == "output"):
        yield (
            "  All outputs are whole numbers or truth values, so that these say only that they are "
            "equal for these inputs."
        )


def _by_implementations(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.implementations, []).append(row)
    return groups


def _differences(comparison: Comparison) -> str:
    """The first differences, which explain the later ones."""
    rows = comparison.rows
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


def _explained(comparison: Comparison) -> list[str]:
    heading = {
        "equal": "They agree, but their settings differ:",
        "different": "What may explain it:",
        "inconclusive": "Their settings differ:",
    }[comparison.verdict]
    hints = comparison.hints
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
