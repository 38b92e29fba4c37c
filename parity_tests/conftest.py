"""How every test runs: with strict ranks, a float64 fixture, and eight devices."""

import gc
import os
import re
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from parity_tests.environment import QUICK_TO_COMPILE, prepare
from parity_tests.small_runs import compiled_once, small

# The shapes in the annotations are checked at every call.
install_import_hook(["bcn_flax.affine", "bcn_flax.norms"], "beartype.beartype")

prepare()

__all__ = ["compiled_once", "small"]  # fixtures

# Compilation makes the first example slow, so hypothesis must not count the time. The examples are
# the same in every run; `--hypothesis-profile explore` draws new ones, and prints what fails.
settings.register_profile("default", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=200, print_blob=True)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    """Compile quickly rather than well, for many programs run once, and keep none of them.

    What XLA does to a program stays the same. The slow tests compile as programs usually do.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # that of the user
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if re.search("not slow|(?<!not )mutants", config.option.markexpr):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files before they import what may be missing.

    These are files that need PyTorch with `-m "not torch"`, and files that need compilers for
    accelerators without `-m accelerators`.
    """
    if collection_path.suffix != ".py":
        return None
    needs = re.findall(
        r"^pytestmark = \[?\s*pytest\.mark\.(\w+)", collection_path.read_text(), re.M
    )
    expression = config.option.markexpr
    without_torch = "torch" in needs and "not torch" in expression
    return without_torch or ("accelerators" in needs and expression != "accelerators") or None


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection():
    """Do not look again at what earlier files left, whenever folding in PyTorch collects garbage.

    In a process that has compiled thousands of programs, each collection takes a second.
    """
    gc.freeze()


@pytest.fixture
def x64():
    """Run the test in double precision."""
    with jax.enable_x64(True):
        yield
