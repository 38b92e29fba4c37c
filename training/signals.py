"""Ctrl-C and SIGTERM, noted, so that a run can save what it has and end."""

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax

_NOTED = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):  # as KeyboardInterrupt, it is no error
    """The run has saved its state and ended, as a signal asked it to."""

    def __init__(self, number: signal.Signals, epoch: int, folder: Path) -> None:
        """Say by which signal, in which epoch, and where what there is lies."""
        super().__init__(
            f"stopped by {number.name} in epoch {epoch}. Nothing is lost: go on with the same "
            f"arguments and --resume --output {folder}"
        )
        self.number = number


class Signals:
    """Within its context, the first signal is noted; a second one acts as signals do.

    Of several processes none notes any, since all would have to save together.
    """

    def __init__(self) -> None:
        """None so far."""
        self.noted: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Begin to note them."""
        if jax.process_count() == 1:
            self._handlers = {number: signal.signal(number, self._note) for number in _NOTED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let them act again."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
