"""The output folder of a training run: `config.json`, `metrics.jsonl` and `curves.png`."""

import json
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bcn_flax.training import checks
from bcn_flax.training.plots import save_curves

_FILES = ("config.json", "metrics.jsonl", "curves.png")
_SECONDS_BETWEEN_DRAWINGS = 30  # each takes a quarter of a second, as long as an epoch of digits


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


def _numbered_folder(default: Path) -> Path:
    default.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = default if number == 1 else default.with_name(f"{default.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:  # also where another run was a moment faster
            continue
        break
    return folder


class Results:
    """Writes what a run finds out as it goes, so that a run cut short loses nothing."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write down all that decides the run.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        self.folder = folder
        self.history: list[dict[str, float]] = []
        self._drawn = time.monotonic()
        text = json.dumps(dict(config), indent=2, default=str)
        with checks.writing(folder):
            (folder / "config.json").write_text(text + "\n")

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
        if self.history:
            self._draw()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            epochs = len(self.history)
            print(
                f"interrupted after {epochs} {'epoch' if epochs == 1 else 'epochs'}; "
                f"what there is lies in {self.folder}",
                file=sys.stderr,
            )

    def add(self, row: dict[str, float]) -> None:
        """Add a line to the metrics; from time to time, draw the curves anew.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        self.history.append(row)
        with checks.writing(self.folder), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def _draw(self) -> None:
        with checks.writing(self.folder):
            save_curves(self.folder / "curves.png", self.history, self.folder.name)
        self._drawn = time.monotonic()
