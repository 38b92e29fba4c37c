"""Progress on a terminal or in a log, and the signals that stop a run."""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import TrainingError


@contextmanager
def plain_errors(program: str) -> Iterator[None]:
    """End with a line and no traceback after a signal and an error that the user can put right."""
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with _standard_output(program):
            yield
    except TrainingError as error:
        sys.exit(f"{program}: {error}")
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)  # as shells count it
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextmanager
def _standard_output(program: str) -> Iterator[None]:
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    buffer, encoding, lines = sys.stdout.buffer, sys.stdout.encoding, sys.stdout.isatty()
    output = _Output(buffer, encoding, "backslashreplace", line_buffering=lines)
    output.program = program
    try:
        with redirect_stdout(output):
            yield
    finally:
        output.flush()
        output.detach()


class _Output(io.TextIOWrapper):
    """Prints whatever a name holds, and ends the program if nobody reads it or a disk is full."""

    program: str

    def write(self, text: str) -> int:
        with self._ending():
            return super().write(text)

    def flush(self) -> None:
        with self._ending():
            super().flush()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What could not be written is tried again at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EPIPE:
                sys.exit(128 + signal.SIGPIPE)
            sys.exit(f"{self.program}: Cannot print: {error.strerror}. Print to another file.")


@contextmanager
def printing_in_first_process() -> Iterator[None]:
    """Within the context, the other processes of a run print nothing."""
    if jax.process_index() == 0:
        yield
    else:
        with open(os.devnull, "w") as silence, redirect_stdout(silence):
            yield


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a line within the context; without a terminal, it stays."""
    console = Console(file=sys.stdout)
    if console.is_interactive:
        with console.status(text):
            yield
    else:
        print(f"{text} ...", flush=True)
        yield


class ProgressBar:
    """Shows how far training has come, with the loss, the accuracy and the speed.

    The bar disappears at the end. Without a terminal, a line is printed now and then instead, only
    within epochs: the caller prints a line at their end.
    """

    def __init__(
        self,
        steps: int,
        epochs: int,
        batch_size: int,
        *,
        done: int = 0,
        interval: float = 0.5,
        line_interval: float = 60,
    ) -> None:
        """Prepare the bar.

        Args:
            steps: number of steps in an epoch.
            epochs: number of epochs.
            batch_size: images in a step.
            done: number of steps already taken, in a resumed run.
            interval: seconds between two updates. Each waits for the device, and a device that is
                waited for at every step idles in between.
            line_interval: seconds between two lines, without a terminal.
        """
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn(
                "loss {task.fields[loss]:.4g}  accuracy {task.fields[accuracy]:.2%}  "
                "{task.fields[speed]:,.0f} images/s"
            ),
            transient=True,
            disable=not Console().is_interactive,
        )
        fields: dict[str, Any] = {"epoch": 1, "loss": 0.0, "accuracy": 0.0, "speed": 0.0}
        self._task = self._bar.add_task("", total=steps * epochs, completed=done, **fields)
        self._steps = steps
        self._batch_size = batch_size
        self._done = done
        self._interval = interval
        self._line_interval = line_interval
        self._last = self._last_line = time.perf_counter()

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self._bar.stop()

    def is_due(self) -> bool:
        """Whether it is time for the next update."""
        return time.perf_counter() - self._last > self._interval

    def show(self, step: int, loss: float, accuracy: float) -> None:
        """Show the loss and the accuracy so far in this epoch, after so many steps in all."""
        now = time.perf_counter()
        speed = (step - self._done) * self._batch_size / max(now - self._last, 1e-9)
        self._last, self._done = now, step
        epoch = -(-step // self._steps)
        fields: dict[str, Any] = {
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "speed": speed,
        }
        self._bar.update(self._task, completed=step, **fields)
        done = step - (epoch - 1) * self._steps
        if done == self._steps:
            self._last_line = self._last
        elif self._bar.disable and self._last - self._last_line > self._line_interval:
            self._last_line = self._last
            print(
                f"epoch {epoch}: {done:,} of {self._steps:,} steps, "
                f"loss {loss:.4g}, accuracy {accuracy:.2%}, {speed:,.0f} images/s",
                flush=True,
            )


NOTED = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):  # not an error, like KeyboardInterrupt
    """The run has saved its state and ended because of a signal."""

    def __init__(self, number: signal.Signals, epoch: int, folder: Path) -> None:
        """Say which signal, in which epoch, and how to resume."""
        super().__init__(
            f"stopped by {number.name} in epoch {epoch}. Nothing is lost: resume with the same "
            f"arguments and --resume --output {folder}"
        )
        self.number = number


class Signals:
    """Within its context, the first Ctrl-C or SIGTERM is only noted; a second one takes effect.

    With several processes none is noted, since all would have to save together.
    """

    def __init__(self) -> None:
        """Nothing noted yet."""
        self.noted: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Replace the handlers."""
        if jax.process_count() == 1:
            self._handlers = {number: signal.signal(number, self._note) for number in NOTED}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
