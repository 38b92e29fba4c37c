"""Download one file: all of it or none, and once, however many processes want it."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pooch
from filelock import FileLock, Timeout
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from training import data_checks

_SILENCE = 30.0  # seconds without a byte, after which the server is given up
_CHUNK = 2**17  # bytes


def download(url: str, path: Path, size: int, sha256: str) -> None:
    """Download a file, unless it is there by the time that no other process is at it.

    Under its own name it is seen only when it is complete, whenever a process is killed. What is
    left of a failed download is removed; of a killed one, by the next.

    Args:
        url: of the file.
        path: where to; the folder is made.
        size: how many bytes it has.
        sha256: what identifies it, in hexadecimal digits.

    Raises:
        TrainingError: the server is not within reach, falls silent or sends something else, or
            there is no room for the file.
    """
    with data_checks.keeping(path, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                print(f"downloading {url} ({size:,} bytes) to {path}", flush=True)
                _replace(url, path, size, sha256)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process, which is downloading {path}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _replace(url: str, path: Path, size: int, sha256: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        _fetch(url, part, path, size, sha256)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        data_checks.downloaded_sha256(url, path, size, sha256, found)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, part: Path, path: Path, size: int, sha256: str) -> None:
    with ExitStack() as responses, _progress() as progress, part.open("wb") as file:
        fetch = pooch.HTTPDownloader(
            progressbar=_Bar(progress, size),
            chunk_size=_CHUNK,
            timeout=_SILENCE,
            headers={"Accept-Encoding": "identity"},  # else requests may unpack what is packed
            # pooch leaves the connection of a download that fails open.
            hooks={"response": lambda response, **_: responses.enter_context(response)},
        )
        with data_checks.downloading(url, path, size, sha256):
            fetch(url, file, None)


def _progress() -> Progress:
    return Progress(
        TextColumn("downloading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not sys.stdout.isatty(),
    )


class _Bar:
    """A bar of rich's with the methods that pooch calls, which are those of tqdm."""

    def __init__(self, progress: Progress, size: int) -> None:
        self.total = size  # pooch sets it to what the server says, which may be nothing
        self._progress = progress
        self._task = progress.add_task("", total=size)

    def update(self, bytes_more: int) -> None:
        self._progress.advance(self._task, bytes_more)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Nothing: the bar is taken away with its context."""
