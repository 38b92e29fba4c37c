"""A progress bar where there is a terminal to draw it on, and plain lines where there is none."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows how far training is, with the loss and the accuracy.

    The bar leaves nothing behind. Without a terminal there is a line now and then instead, within
    epochs only: at their end, others print more.
    """

    def __init__(
        self, steps: int, epochs: int, interval: float = 0.5, line_interval: float = 60
    ) -> None:
        """Prepare it.

        Args:
            steps: how many there are in an epoch.
            epochs: how many there will be.
            interval: between two looks, in seconds. A look waits for the device, and a device that
                is waited for at every step idles in between.
            line_interval: between two lines where there is no terminal, in seconds.
        """
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4g}  accuracy {task.fields[accuracy]:.2%}"),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=steps * epochs, epoch=1, loss=0.0, accuracy=0.0)
        self._steps = steps
        self._interval = interval
        self._line_interval = line_interval
        self._last = self._last_line = time.perf_counter()

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

    def show(self, step: int, loss: float, accuracy: float) -> None:
        """Show the state of things after so many steps, counted from the first epoch on."""
        self._last = time.perf_counter()
        epoch = -(-step // self._steps)
        self._bar.update(self._task, completed=step, epoch=epoch, loss=loss, accuracy=accuracy)
        done = step - (epoch - 1) * self._steps
        if done == self._steps:
            self._last_line = self._last
        elif self._bar.disable and self._last - self._last_line > self._line_interval:
            self._last_line = self._last
            print(
                f"epoch {epoch}: {done:,} of {self._steps:,} steps, "
                f"loss {loss:.4g}, accuracy {accuracy:.2%}",
                flush=True,
            )
