"""A progress bar where there is a terminal to draw it on, and plain lines where there is none."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows how far training is, with the loss, the accuracy and the speed.

    The bar leaves nothing behind. Without a terminal there is a line now and then instead, within
    epochs only: at their end, others print more.
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
        """Prepare it.

        Args:
            steps: how many there are in an epoch.
            epochs: how many there will be.
            batch_size: images in a step.
            done: how many steps there have been, of a run that goes on.
            interval: between two looks, in seconds. A look waits for the device, and a device that
                is waited for at every step idles in between.
            line_interval: between two lines where there is no terminal, in seconds.
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
            disable=not sys.stdout.isatty(),
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
