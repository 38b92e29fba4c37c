"""Run the checks and report the results: tables, `report.json` and `report.html`."""

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

from bcn_flax.parity import ORACLE, Comparison, Row
from bcn_flax.parity.errors import eps
from parity_tests import suite
from parity_tests.cases import CASES, Case
from parity_tests.page import page

PACKAGES = ("jax", "flax", "torch", "numpy", "batch-channel-norm")

Record = dict[str, Any]


def gather(console: Console, only: str, steps: int, mutants: bool) -> Record:
    """Run the checks, and print tables of the results.

    Args:
        console: to print on.
        only: run the checks whose names contain this.
        steps: number of training steps of the networks; 0 leaves them out.
        mutants: whether to break the code on purpose.

    Returns:
        The report, as plain data.
    """
    start = time.perf_counter()
    names = {str(case) for case in CASES}
    cases = [case for case in CASES if only in str(case)]
    laws = [(n, f) for n, f in suite.checks().items() if only in n and n not in names]
    report: Record = {
        "command": "python -m parity_tests",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "cases": [_case(case) for case in track(cases, "cases", console=console)],
        "laws": [_run(*law)[1] for law in track(laws, "laws", console=console)],
        "trajectory": _trajectory(steps) if steps else None,
        "mutants": list(track(_mutants(), "mutants", console=console)) if mutants else None,
        "seconds": time.perf_counter() - start,
    }
    checks = [*report["cases"], *report["laws"]]
    caught = all(mutant["caught_by"] for mutant in report["mutants"] or ())
    report["passed"] = caught and all(check["passed"] for check in checks)
    console.print(_cases_table(report["cases"]), _totals_table(report))
    for check in checks:
        if not check["passed"]:
            console.print(check["name"], check["message"], sep="\n", style="red", markup=False)
    return report


def write(report: Record, folder: Path, console: Console) -> None:
    """Write the report as data and as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=True))
    (folder / "report.html").write_text(page(report), encoding="utf-8")
    console.print(f"Wrote report.json and report.html to {folder.absolute()}.")


def _case(case: Case) -> Record:
    comparison, record = _run(str(case), case.check)
    fields = {"layer": case.layer, "api": case.api, "dtype": case.dtype}
    return {**record, **fields, "quantities": list(_quantities(comparison)) if comparison else []}


def _run(name: str, check: Callable[[], Any]) -> tuple[Any, Record]:
    """What a check returned, and whether it passed, with what message, in what time."""
    start, result, message = time.perf_counter(), None, ""
    try:
        result = check()
    except Exception as problem:  # of any kind: failures are what the report is for
        message = str(problem) or type(problem).__name__
    seconds = time.perf_counter() - start
    return result, {"name": name, "passed": not message, "message": message, "seconds": seconds}


def _quantities(comparison: Comparison) -> Iterator[Record]:
    """For each quantity, the row with the largest error, and the largest error of each side."""
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
    compared = [row for row in rows if row.implementations[1] == ORACLE]
    of_side = [_ulps(row) for row in compared if row.implementations[0].startswith(side)]
    return max(of_side, default=None)


def _ulps(row: Row) -> float:
    return row.error.ulps_at_scale(row.dtype)


def _trajectory(steps: int) -> Record:
    from parity_tests.trajectory import trajectory  # needs PyTorch

    return trajectory(steps)


def _mutants() -> Iterator[Record]:
    from parity_tests.mutants import records

    yield from records()


def _cases_table(cases: list[Record]) -> Table:
    table = Table("case", "of allowed", "ulps of Flax", "of PyTorch", title="Largest errors")
    for case in cases:
        used, flax, torch = (
            max((q[key] for q in case["quantities"] if q[key] is not None), default=None)
            for key in ("used", "flax_ulps", "torch_ulps")
        )
        passed = f"{used or 0:.1%}" if case["passed"] else "[red]FAILED"
        table.add_row(
            case["name"], passed, *("" if x is None else f"{x:.3g}" for x in (flax, torch))
        )
    return table


def _totals_table(report: Record) -> Table:
    """How many checks there are of each kind, and how many passed."""
    title = "All checks passed" if report["passed"] else "Not all checks passed"
    table = Table("", "passed", "of", title=title)
    for what, key in (("cases", "passed"), ("laws", "passed"), ("mutants", "caught_by")):
        if (checks := report[what]) is not None:
            table.add_row(what, str(sum(bool(check[key]) for check in checks)), str(len(checks)))
    return table
