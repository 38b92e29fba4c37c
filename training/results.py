"""The output folder of a training run: what decided it, what it found out, and its curves."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from training import checks
from training.plots import save_curves

_CONFIG = "config.json"
_FILES = (_CONFIG, "metrics.jsonl", "curves.png", "checkpoints")
_SECONDS_BETWEEN_DRAWINGS = 30  # each takes a quarter of a second, as long as an epoch of digits

Row = dict[str, float]


def new_folder(output: Path | None, default: Path) -> Path:
    """Make the folder for the results of a run.

    Args:
        output: a folder that holds no results yet, or None for a new one: `default`, or the first
            of `default-2`, `default-3`, ... that does not exist.
        default: where to, if nobody says.

    Raises:
        TrainingError: `output` holds results already, is a file or the current folder, or the
            folder cannot be made.
    """
    with checks.writing(output or default):
        if output is None:
            return _numbered_folder(default)
        checks.output_is_folder(output)
        checks.no_results(output, [name for name in _FILES if (output / name).exists()])
        output.mkdir(parents=True, exist_ok=True)
        return output


def last_folder(output: Path | None, default: Path) -> Path | None:
    """The folder of a run that has begun: `output`, or the newest that `new_folder` made."""
    if output is not None:
        checks.output_is_folder(output)
        return output if (output / _CONFIG).exists() else None
    made = list(takewhile(Path.exists, _numbered(default)))
    return made[-1] if made and (made[-1] / _CONFIG).exists() else None


def read_config(folder: Path) -> dict[str, Any]:
    """What decided the run in a folder.

    Raises:
        TrainingError: there is none, or it cannot be read.
    """
    path = folder / _CONFIG
    with checks.reading_config(path):
        return dict(json.loads(path.read_text()))


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it comes back from its file."""
    return dict(json.loads(json.dumps(dict(config), default=str)))


def _numbered(default: Path) -> Iterator[Path]:
    for number in count(1):
        yield default if number == 1 else default.with_name(f"{default.name}-{number}")


def _numbered_folder(default: Path) -> Path:
    default.parent.mkdir(parents=True, exist_ok=True)
    for folder in _numbered(default):
        try:
            folder.mkdir()
        except FileExistsError:  # also where another run was a moment faster
            continue
        return folder
    raise AssertionError("there is always another number")


class Results:
    """Writes what a run finds out as it goes, so that a run cut short loses nothing.

    Of several processes the first one writes.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], history: Sequence[Row], *, tensorboard: bool
    ) -> None:
        """Write down all that decides the run.

        Args:
            folder: which exists.
            config: goes to `config.json`.
            history: the epochs so far, of a run that goes on; others in `metrics.jsonl` are undone.
            tensorboard: whether to write its files too.

        Raises:
            TrainingError: the folder cannot be written to, or TensorBoard's writer is not there.
        """
        self.folder = folder
        self.history: list[Row] = list(history)
        self._writes = jax.process_index() == 0
        self._drawn = time.monotonic()
        self._open = ExitStack()
        self._board: Any = None
        if not self._writes:
            return
        with checks.writing(folder):
            _replace(folder / _CONFIG, json.dumps(as_json(config), indent=2) + "\n")
            _replace(folder / "metrics.jsonl", "".join(map(_line, self.history)))
        if tensorboard:
            with checks.importing_tensorboard():
                from tensorboardX import SummaryWriter
            writer = SummaryWriter(str(folder), purge_step=len(self.history) + 1)
            self._board = self._open.enter_context(writer)

    def __enter__(self) -> Self:
        """Nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draw the curves of what there is, also if training failed or was interrupted."""
        self._open.close()
        if self.history and self._writes:
            self._draw()

    def add(self, row: Row) -> None:
        """Add a line to the metrics; from time to time, draw the curves anew.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        self.history.append(row)
        if not self._writes:
            return
        with checks.writing(self.folder), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(_line(row))
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["epoch"])
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def _draw(self) -> None:
        with checks.writing(self.folder):
            save_curves(self.folder / "curves.png", self.history, self.folder.name)
        self._drawn = time.monotonic()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)
