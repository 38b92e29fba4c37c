"""Run the checks and tell what came of them: a table, `report.json` and `report.html`."""

import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bcn_flax.parity import Comparison
from bcn_flax.parity.comparison import ORACLE
from bcn_flax.parity.errors import eps
from bcn_flax.parity.rows import Row
from parity_tests import suite
from parity_tests.cases import CASES, Case
from parity_tests.page import page

PACKAGES = ("jax", "flax", "torch", "numpy", "batch-channel-norm")

Record = dict[str, Any]


def gather(console: Console, only: str, steps: int, mutants: bool) -> Record:
    """Run everything, and print a table.

    Args:
        console: to print on.
        only: a part of the names of the checks to run.
        steps: of the networks trained side by side; 0 for none.
        mutants: whether to break the code on purpose.

    Returns:
        The report, as plain data.
    """
    start = time.perf_counter()
    cases = [case for case in CASES if only in str(case)]
    of_cases = {str(case) for case in CASES}
    laws = {n: f for n, f in suite.checks().items() if only in n and n not in of_cases}
    report: Record = {
        "command": "python -m parity_tests",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "cases": [_case(case) for case in track(cases, "cases", console=console)],
        "laws": [_law(*law) for law in track(laws.items(), "laws", console=console)],
        "trajectory": _trajectory(steps) if steps else None,
        "mutants": list(track(_mutants(), "mutants", console=console)) if mutants else None,
        "seconds": time.perf_counter() - start,
    }
    checked = [*report["cases"], *report["laws"]]
    caught = all(mutant["caught_by"] for mutant in report["mutants"] or ())
    report["passed"] = caught and all(check["passed"] for check in checked)
    console.print(*_tables(report))
    for check in checked:
        if not check["passed"]:
            console.print(check["name"], check["message"], sep="\n", style="red", markup=False)
    return report


def write(report: Record, folder: Path, console: Console) -> None:
    """Write the report as data and as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=True))
    (folder / "report.html").write_text(page(report))
    console.print(f"Wrote report.json and report.html to {folder.absolute()}.")


def _case(case: Case) -> Record:
    comparison, record = _timed(str(case), case.check)
    return {
        **record,
        "layer": case.layer,
        "api": case.api,
        "dtype": case.dtype,
        "quantities": list(_quantities(comparison)) if comparison else [],
    }


def _law(name: str, check: Callable[[], object]) -> Record:
    return _timed(name, check)[1]


def _timed(name: str, check: Callable[[], Any]) -> tuple[Any, Record]:
    """What a check returned, and whether it passed, with what message, in what time."""
    start, result, message = time.perf_counter(), None, ""
    try:
        result = check()
    except Exception as problem:  # of any kind: it is what the report is for
        message = str(problem) or type(problem).__name__
    seconds = time.perf_counter() - start
    return result, {"name": name, "passed": not message, "message": message, "seconds": seconds}


def _quantities(comparison: Comparison) -> Iterator[Record]:
    """Of each quantity the row with the largest error, and the largest of each side."""
    for quantity in dict.fromkeys(row.name.quantity for row in comparison.rows):
        rows = [row for row in comparison.rows if row.name.quantity == quantity]
        worst = max(rows, key=_ulps)
        yield {
            "quantity": quantity,
            "absolute": worst.error.absolute.error,
            "relative": worst.error.relative.error,
            "ulps": _ulps(worst),
            "place": f"{worst.phase}, {worst.name.path} at {worst.error.absolute.place}",
            "allowed_ulps": worst.allowed / (eps(worst.dtype) * (worst.error.scale or 1)),
            "used": max(row.worst.error for row in rows),
            "flax_ulps": _from_oracle(rows, "Flax"),
            "torch_ulps": _from_oracle(rows, "PyTorch"),
        }


def _from_oracle(rows: list[Row], side: str) -> float | None:
    judged = [row for row in rows if row.sides[1] == ORACLE and row.sides[0].startswith(side)]
    return max(map(_ulps, judged), default=None)


def _ulps(row: Row) -> float:
    return row.error.ulps_at_scale(row.dtype)


def _trajectory(steps: int) -> Record:
    # PyTorch and what trains are imported only if they are needed.
    from parity_tests.trajectory import trajectory

    return trajectory(steps)


def _mutants() -> Iterator[Record]:
    from parity_tests.mutants import records

    yield from records()


def _tables(report: Record) -> Iterator[Table]:
    """The cases with their largest errors, and how many of what passed."""
    cases = Table("case", "of allowed", "ulps of Flax", "of PyTorch", title="Largest errors")
    for case in report["cases"]:
        used = max((q["used"] for q in case["quantities"]), default=0.0)
        verdict = f"{used:.1%}" if case["passed"] else "[red]FAILED"
        largest = (_largest(case, key) for key in ("flax_ulps", "torch_ulps"))
        cases.add_row(case["name"], verdict, *largest)
    yield cases
    total = Table(
        "", "passed", "of", title="All is well" if report["passed"] else "Not all is well"
    )
    for what in ("cases", "laws"):
        passed = sum(check["passed"] for check in report[what])
        total.add_row(what, str(passed), str(len(report[what])))
    if report["mutants"] is not None:
        caught = sum(bool(mutant["caught_by"]) for mutant in report["mutants"])
        total.add_row("mutants caught", str(caught), str(len(report["mutants"])))
    yield total


def _largest(case: Record, key: str) -> str:
    known = [q[key] for q in case["quantities"] if q[key] is not None]
    return f"{max(known):.3g}" if known else ""
