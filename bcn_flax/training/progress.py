"""A progress bar where there is a terminal to draw it on."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows how far training is, with the loss and the accuracy. Leaves nothing behind."""

    def __init__(self, steps: int, interval: float = 0.5) -> None:
        """Prepare it.

        Args:
            steps: how many there will be.
            interval: between two looks, in seconds. A look waits for the device, and a device that
                is waited for at every step idles in between.
        """
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.2%}"),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=steps, epoch=1, loss=0.0, accuracy=0.0)
        self._interval = interval
        self._last = time.perf_counter()

    def __enter__(self) -> Self:
        """Show it."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take it away."""
        self._bar.stop()

    def is_due(self) -> bool:
        """Whether the last look is long enough ago."""
        return time.perf_counter() - self._last > self._interval

    def show(self, epoch: int, step: int, loss: float, accuracy: float) -> None:
        """Show the state of things."""
        self._last = time.perf_counter()
        self._bar.update(self._task, completed=step, epoch=epoch, loss=loss, accuracy=accuracy)
