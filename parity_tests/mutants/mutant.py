"""A mutant, and what catches it.

`catch` imports the sources again with one edit, in memory, and runs the checks of
`parity_tests.suite`, or files of tests, until one of them fails.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from textwrap import shorten
from types import CodeType
from typing import Any, NamedTuple

import torch

from parity_tests.mutants import pytest_checks

ROOT = Path(__file__).parents[2]
PACKAGES = {"bcn_flax", "bcn_torch", "parity_tests", "train_cifar", "training"}

Checks = Mapping[str, Callable[[], object]]


class Mutant(NamedTuple):
    """An edit of one source file.

    Attributes:
        name: of the defect, in a few words.
        file: the source, from the root of the repository.
        old: the text that goes; occurs exactly once, so that no edit can silently do nothing.
        new: the text that comes.
        why: what is wrong with it and who does it; of an equivalent one, why nothing is.
        hint: part of the names of the checks to try first. It saves time and decides nothing: all
            the others follow until one fails.
        tests: files of tests, `test_training_step.py` for example, if they are to catch it and not
            the checks of `parity_tests.suite`. The hint is then part of the name of a test.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    hint: str = ""
    tests: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The module's name."""
        return self.file.removesuffix(".py").replace("/", ".")

    @property
    def side(self) -> str:
        """Which of "Flax", "PyTorch", "interop", "parity" and "training" it breaks."""
        if self.file.startswith("train"):
            return "training"
        for part in ("interop", "parity"):
            if f"/{part}/" in self.file:
                return part
        return "PyTorch" if self.file.startswith("bcn_torch/") else "Flax"

    def apply(self, source: str) -> str:
        """The source with the edit.

        Raises:
            ValueError: the old text is not there, or not only once.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"Mutant {self.name!r}: the text to replace must occur once in {self.file}, it "
                f"occurs {count} times: bring the mutant up to date with the source.\n{self.old}"
            )
        return source.replace(self.old, self.new)


class Caught(NamedTuple):
    """The check that failed first, or None, and its message."""

    check: str | None
    message: str
    seconds: float


def catch(mutant: Mutant | None, checks_of: Callable[[], Checks] | None = None) -> Caught:
    """Run the checks against a mutant until one of them fails.

    Args:
        mutant: None is the control, which nothing should catch.
        checks_of: returns the checks, called while imports find the mutant; by default the tests
            that the mutant names, or those of `parity_tests.suite`.
    """
    start = time.perf_counter()
    check, message = None, ""
    with imported_afresh(mutant):
        checks = checks_of() if checks_of else _checks(mutant)
        for name in sorted(checks, key=lambda name: mutant is None or mutant.hint not in name):
            try:
                checks[name]()
            except Exception as error:
                check, message = name, _shortened(error)
                break
        if mutant and mutant.module not in sys.modules:
            raise ValueError(f"Mutant {mutant.name!r}: the checks never import {mutant.module}.")
    return Caught(check, message, time.perf_counter() - start)


@contextmanager
def imported_afresh(mutant: Mutant | None) -> Iterator[None]:
    """Import sources and tests again, with the mutant; restore the old ones at the end.

    Nothing of the mutant is written, neither source nor bytecode. JAX and Flax cache by functions
    and classes, and these are new as well. Other import hooks are bypassed: jaxtyping's checks of
    annotations must not catch what the suite misses.
    """
    originals = _forget()
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    default = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(default)  # A mutant may have left another one.
        sys.meta_path.remove(finder)
        _forget()
        sys.modules.update(originals)


class _Loader(SourceFileLoader):
    """Loads one module with its mutant."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        """Compile the source as edited: bytecode is neither read nor written."""
        source = self.mutant.apply(Path(self.path).read_text())
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds the packages' modules, and loads one of them with its mutant."""

    def __init__(self, mutant: Mutant | None) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.origin and self.mutant and fullname == self.mutant.module:
            spec.loader = _Loader(fullname, spec.origin, self.mutant)
        return spec


def _forget() -> dict[str, Any]:
    """Take the packages out of memory."""
    ours = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in ours}


def _checks(mutant: Mutant | None) -> Checks:
    if mutant and mutant.tests:
        return pytest_checks.checks(mutant.tests, mutant.hint)
    return import_module("parity_tests.suite").checks()


def _shortened(error: Exception) -> str:
    """The beginning of an error's message, with its type unless it is a failed comparison."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return shorten(f"{kind}{error}", width=200, placeholder=" ...")
