"""One run a folder, and one mind of all its processes."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from jax.experimental import multihost_utils

from training.checks import TrainingError

T = TypeVar("T")


def all_agree(yes: bool) -> bool:
    """Whether all processes say yes. Each waits for the others."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes))))


def on_first(action: Callable[[], T]) -> T | None:
    """What the first process gets by an action; the others wait for it, and get None.

    Raises:
        TrainingError: the action raised it, or another process hears that the action failed.
        OSError: the action raised it.
    """
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except (TrainingError, OSError) as error:
            failure = error
    # Where it fails, all must, or they would wait for the first process forever.
    if not all_agree(failure is None):
        raise failure or TrainingError("The first process of this run failed: see what it says.")
    return result


def lock(folder: Path) -> BaseFileLock | None:
    """Make a folder, and keep other runs out of it until the lock is released.

    The first process holds the lock for all; in the others it is None. As the operating system
    keeps it, it goes with the process, however that dies.

    Raises:
        TrainingError: another run holds it.
        OSError: the folder cannot be made or written to.
    """
    return on_first(lambda: _acquired(folder))


def _acquired(folder: Path) -> BaseFileLock:
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(blocking=False)
    except Timeout as error:
        raise TrainingError(
            f"Only one run at a time may use {folder}, but another one is using it. Wait until it "
            "ends, stop it, or name another folder."
        ) from error
    return held
