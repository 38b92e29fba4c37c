"""The output folder of a run: its settings, its metrics and its curves."""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Self

import jax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training import TrainingError
from training.config import (
    FREE,
    Config,
    as_json,
    default_folder,
    read_config,
    resolve,
    with_settings_of,
)

_CONFIG = "config.json"
_FILES = (_CONFIG, "metrics.jsonl", "curves.png", "checkpoints")
_SECONDS_BETWEEN_DRAWINGS = 30  # each takes a quarter of a second, as long as an epoch of digits

HEADER = "epoch       loss  accuracy    held-out loss  accuracy    images/s"
_ROW = (
    "{epoch:>5}  {train_loss:>9.4g}  {train_accuracy:>8.2%}  "
    "{test_loss:>15.4g}  {test_accuracy:>8.2%}  {images_per_second:>10,.0f}"
)

Row = dict[str, float]


def new_folder(output: Path | None, default: Path) -> Path:
    """Make the folder for the results of a run.

    Args:
        output: a folder without results, or None for a new one: `default`, or the first of
            `default-2`, `default-3`, ... that does not exist.
        default: see `output`.

    Raises:
        TrainingError: `output` holds results already, is a file or the current folder, or the
            folder cannot be made.
    """
    with _writing(output or default):
        if output is None:
            return _numbered_folder(default)
        _require_folder(output)
        if found := [name for name in _FILES if _is_result(output / name)]:
            raise TrainingError(
                f"The output folder must not hold results already, but {output} holds "
                f"{', '.join(found)}. Choose another folder, move that one away, or omit --output: "
                "then a new folder is made."
            )
        output.mkdir(parents=True, exist_ok=True)
        return output


def make_folder(
    output: Path | None, default: Path, settings: Mapping[str, Any], resume: bool
) -> Path:
    """The folder of the run to resume; without `resume` or such a run, a new one.

    Args:
        output: see `new_folder`.
        default: see `new_folder`.
        settings: of the run, as `as_json` returns them.
        resume: whether to resume the run in `output`, by default the last in a default folder.

    Raises:
        TrainingError: other settings have changed, or see `new_folder` and `read_config`.
    """
    folder = find_run(output, default) if resume else None
    if folder is None:
        return new_folder(output, default)
    old = read_config(folder / _CONFIG)
    changed = [
        f"{name} was {old.get(name)} and is {settings.get(name)}"
        for name in sorted((old.keys() | settings.keys()) - FREE.keys())
        if old.get(name) != settings.get(name)
    ]
    if changed:
        raise TrainingError(
            f"A run must be resumed with its own settings, but of the run in {folder} "
            f"{'; '.join(changed)}. Use the same settings, or start a new run with another "
            "--output."
        )
    return folder


def find_run(output: Path | None, default: Path) -> Path | None:
    """The folder of an earlier run, if there is one, by default the last in a default folder.

    Raises:
        TrainingError: `output` is a file or the current folder, or cannot be reached.
    """
    with _writing(output or default):
        if output is not None:
            _require_folder(output)
            return output if (output / _CONFIG).exists() else None
        made = list(takewhile(Path.exists, _numbered(default)))
        return made[-1] if made and (made[-1] / _CONFIG).exists() else None


def read_run(config: Config) -> tuple[Path, Config, dict[str, Any]]:
    """The folder, the configuration and all settings of an earlier run; see `find_run`.

    Raises:
        TrainingError: there is no run, or see `find_run` and `with_settings_of`.
    """
    folder = find_run(config.output, default_folder(config, resolve(config)))
    if folder is None:
        where = "in runs with these settings" if config.output is None else f"in {config.output}"
        raise TrainingError(
            f"There must be a run with a checkpoint, but there is none {where}. Pass its folder as "
            "--output, or train first."
        )
    return folder, *with_settings_of(config, folder / _CONFIG)


class Results:
    """Writes settings and metrics as training goes, so that a run cut short loses nothing.

    With several processes, only the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        history: Sequence[Row],
        *,
        tensorboard: bool,
    ) -> None:
        """Write the settings, and the metrics so far.

        Args:
            folder: an existing one.
            settings: of the run; written to `config.json`.
            history: metrics of the epochs before a resumed run; others in `metrics.jsonl` are
                removed.
            tensorboard: whether to write files for TensorBoard too.

        Raises:
            TrainingError: the folder cannot be written to, or tensorboardX is not installed.
        """
        self.folder = folder
        self._kept: Callable[[], str] = str
        self.history: list[Row] = list(history)
        self._writes = jax.process_index() == 0
        self._drawn = time.monotonic()
        self._open = ExitStack()
        self._board: Any = None
        if not self._writes:
            return
        with _writing(folder):
            _replace(folder / _CONFIG, json.dumps(as_json(settings), indent=2) + "\n")
            _replace(folder / "metrics.jsonl", "".join(map(_line, self.history)))
        if tensorboard:
            self._board = self._open.enter_context(_tensorboard(folder, len(history) + 1))

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Draw the curves, even if training failed or was interrupted.

        If it failed, that is what is reported, and not that they cannot be drawn either.
        """
        with suppress(TrainingError) if error else nullcontext():
            with self._saving():
                self._open.close()
            if self.history and self._writes:
                self._draw()

    def add(self, row: Row, kept: Callable[[], str] = str) -> None:
        """Print and write the metrics of an epoch; from time to time, draw the curves.

        Args:
            row: the metrics.
            kept: returns a sentence on which checkpoint is kept, for an error.

        Raises:
            TrainingError: the folder cannot be written to.
        """
        print(_ROW.format(**row), flush=True)
        self.history.append(row)
        self._kept = kept
        if not self._writes:
            return
        with self._saving(), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(_line(row))
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, row["epoch"])
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_DRAWINGS:
            self._draw()

    def speed(self) -> float:
        """Images per second, on average over the epochs."""
        return statistics.harmonic_mean([row["images_per_second"] for row in self.history])

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"Cannot write to {self.folder}: {error.strerror or error}.{self._kept()} Check "
                "the free space and the permissions of the folder, then start again with --resume "
                f"--output {self.folder}"
            ) from error

    def _draw(self) -> None:
        with self._saving():
            _save_curves(self.folder / "curves.png", self.history, self.folder.name)
        self._drawn = time.monotonic()


def _save_curves(path: Path, history: Sequence[Row], title: str) -> None:
    # The object interface: no window, no global state.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    panels = (("loss", "cross-entropy loss", 1), ("accuracy", "accuracy (%)", 100))
    for axes, (name, label, factor) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, legend in (("train", "training"), ("test", "held out")):
            values = [factor * row[f"{split}_{name}"] for row in history]
            axes.plot(epochs, values, marker=".", label=legend)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    # Any name of a folder will do, whether or not the font has its characters.
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False)
    with warnings.catch_warnings(action="ignore"):
        figure.savefig(path, dpi=120)


def _tensorboard(folder: Path, first_epoch: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "Files for TensorBoard need tensorboardX, which is not installed: pip install -e "
            '".[tensorboard]", or omit --tensorboard.'
        ) from error
    return SummaryWriter(str(folder), purge_step=first_epoch)


def _is_result(path: Path) -> bool:
    """A run that is killed at its start leaves a folder that holds no more than a lock."""
    return any(path.glob("[!.]*")) if path.is_dir() else path.exists()


def _numbered(default: Path) -> Iterator[Path]:
    """`default`, `default-2`, `default-3`, ..."""
    if jax.process_count() > 1:
        raise TrainingError(
            "Several processes must all write to one folder that all can reach, but none was "
            "given. Pass the same --output FOLDER to all."
        )
    yield default
    for number in count(2):
        yield default.with_name(f"{default.name}-{number}")


def _numbered_folder(default: Path) -> Path:
    default.parent.mkdir(parents=True, exist_ok=True)
    for folder in _numbered(default):
        try:
            folder.mkdir()
        except FileExistsError:  # perhaps another run was faster
            continue
        return folder
    raise AssertionError("there is always another number")


def _require_folder(path: Path) -> None:
    if path == Path():
        raise TrainingError(
            "The output must be a folder of its own, but it is the current folder or has an empty "
            "name. Choose another --output, or omit it: then a new folder is made."
        )
    if path.exists() and not path.is_dir():
        raise TrainingError(f"The output must be a folder, but {path} is a file. Choose another.")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot write to {folder}: {error.strerror or error}. Choose another --output."
        ) from error


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)
