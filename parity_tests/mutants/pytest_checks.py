"""Tests of pytest as checks: they run in this process, with the modules that are imported now."""

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The configuration of the tests imports and hooks what a mutant must not have; its fixtures come
# from the module itself.
OPTIONS = ("-x", "-m", "not slow and not mutants", "-o", "addopts=", "--noconftest")
WITHOUT = ("cacheprovider", "faulthandler", "xdist", "hypothesispytest")


def checks(files: Sequence[str], first: str = "") -> Mapping[str, Callable[[], None]]:
    """A check for each file of tests, after one for the tests that have `first` in their names."""
    chosen = {f"{file} -k {first}": partial(run, file, "-k", first) for file in files if first}
    return {**chosen, **{file: partial(run, file) for file in files}}


def run(file: str, *options: str) -> None:
    """Run the tests of a file, and raise an error with the message of the first that fails."""
    failed = _Failed()
    without = [word for name in WITHOUT for word in ("-p", f"no:{name}")]
    words = [f"{ROOT}/parity_tests/{file}", "-c", f"{ROOT}/pyproject.toml", *OPTIONS, *without]
    fixtures = import_module("parity_tests.small_runs")
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main([*words, *options], plugins=[failed, fixtures])
    if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"Nothing of {file} was run with {options}.")  # caught nothing
    if status:
        raise AssertionError(failed.message or f"pytest ended with {status!r}")


class _Failed:
    """A plugin that keeps the message of the first failure."""

    def __init__(self) -> None:
        self.message = ""

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure, too."""
        self._note(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test, or a fixture that it needs."""
        self._note(report)

    def _note(self, report: Any) -> None:
        if report.failed and not self.message:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            self.message = f"{report.nodeid.rpartition('::')[2]}: {message}"
