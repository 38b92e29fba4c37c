"""CIFAR-10 and CIFAR-100 in their binary version: found, downloaded and read.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"; the format is described
at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import logging
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from filelock import FileLock, Timeout
from jaxtyping import Int32, UInt8
from requests.exceptions import RequestException
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from training import TrainingError

_SHAPE = (3, 32, 32)  # of an image on disk: one plane after another
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**17  # bytes

Labelled = tuple[UInt8[np.ndarray, "n 32 32 3"], Int32[np.ndarray, " n"]]


class Source(NamedTuple):
    """Where a data set in this format comes from, and how its files are laid out."""

    title: str
    url: str  # of the archive; ends in its name
    size: int  # of the archive, in bytes
    sha256: str  # of the archive
    folder: str  # in the archive
    train: tuple[str, ...]  # files with training images, in order
    test: tuple[str, ...]  # files with held-out images
    class_names: str  # file with the names of the classes, one per line
    label_bytes: int  # before each image; the last of them is the class
    classes: int  # how many there are
    other_versions: Mapping[str, str]  # archives and folders in other formats, and their names

    @property
    def archive(self) -> str:
        """The file name of the archive."""
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that are read."""
        return (*self.train, *self.test, self.class_names)


CIFAR10 = Source(
    title="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    class_names="batches.meta.txt",
    label_bytes=1,
    classes=10,
    other_versions={
        "cifar-10-python.tar.gz": "Python",
        "cifar-10-batches-py": "Python",
        "cifar-10-matlab.tar.gz": "MATLAB",
        "cifar-10-batches-mat": "MATLAB",
    },
)

CIFAR100 = Source(
    title="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168_513_733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    class_names="fine_label_names.txt",
    label_bytes=2,  # coarse, fine
    classes=100,
    other_versions={
        "cifar-100-python.tar.gz": "Python",
        "cifar-100-python": "Python",
        "cifar-100-matlab.tar.gz": "MATLAB",
        "cifar-100-matlab": "MATLAB",
    },
)


def load(source: Source, data_dir: Path) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Training images, held-out images, both with labels, and the names of the classes.

    Args:
        source: `CIFAR10`, or `CIFAR100` with its fine labels.
        data_dir: the archive, the unpacked folder, or a folder that contains one of them. A folder
            that contains neither, or does not exist, is where the archive is downloaded to.

    Raises:
        TrainingError: files are missing, unreadable, truncated, damaged or of another version, or
            cannot be downloaded.
    """
    folder, contents = _read_files(source, data_dir)
    missing = [name for name in source.train + source.test if name not in contents]
    if missing:
        raise TrainingError(
            f"The files of {source.title} must be in {folder}, but these are missing or not "
            f"regular files: {', '.join(missing)}. {_unpack_again(folder)}"
        )

    def images_and_labels(names: Sequence[str]) -> Labelled:
        table = np.concatenate([_records(source, folder / name, contents[name]) for name in names])
        images = table[:, source.label_bytes :].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), table[:, source.label_bytes - 1].astype(np.int32)

    names = contents.get(source.class_names)
    classes = tuple(map(str, range(source.classes)))
    if names is not None:
        classes = _class_names(source, folder / source.class_names, names)
    return images_and_labels(source.train), images_and_labels(source.test), classes


def _records(source: Source, path: Path, content: bytes) -> UInt8[np.ndarray, "n bytes"]:
    """The labels and pixels in a file, one image per row."""
    record = source.label_bytes + int(np.prod(_SHAPE))
    size = len(content)
    if size == 0 or size % record:
        raise TrainingError(
            f"{path} must hold whole records of {record} bytes, but its size is {size} bytes, "
            f"{size // record} records and {size % record} bytes: it is truncated or in another "
            f"format. {_unpack_again(path.parent)}"
        )
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    labels = table[:, source.label_bytes - 1]
    for row in np.flatnonzero(labels >= source.classes):
        raise TrainingError(
            f"The labels in {path} must be from 0 to {source.classes - 1}, but that of record "
            f"{row} is {labels[row]}: it is damaged or in another format. "
            f"{_unpack_again(path.parent)}"
        )
    return table


def _class_names(source: Source, path: Path, content: bytes) -> tuple[str, ...]:
    names = content.decode(errors="replace").split()  # the published file ends in an empty line
    if len(names) != source.classes:
        raise TrainingError(
            f"{path} must hold the names of {source.classes} classes, one per line, but holds "
            f"{len(names)}: it is damaged or in another format. {_unpack_again(path.parent)}"
        )
    return tuple(names)


def _unpack_again(folder: Path) -> str:
    return (
        f"Unpack the archive of the binary version again, or remove {folder}: then the archive is "
        "used as it is, and downloaded if necessary."
    )


# Files


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot read {path}: {error.strerror or error}. Choose another --data-dir."
        ) from error


def _read_files(source: Source, data_dir: Path) -> tuple[Path, Mapping[str, bytes]]:
    """The folder that the files are in, unpacked or in the archive, and their contents by name."""
    with _reading(data_dir):
        folder = data_dir / source.folder
        if folder.is_dir():
            return folder, _read_folder(source, folder)
        if any((data_dir / name).exists() for name in source.train + source.test):
            return data_dir, _read_folder(source, data_dir)
        archive = data_dir if data_dir.is_file() else data_dir / source.archive
        if archive == data_dir or not archive.exists():
            _require_binary_version(source, data_dir)
        if not archive.exists():
            _download(source, archive)
        return archive / source.folder, _read_archive(source, archive)


def _require_binary_version(source: Source, data_dir: Path) -> None:
    for path in data_dir, *(data_dir / name for name in source.other_versions):
        if path.name in source.other_versions and path.exists():
            raise TrainingError(
                f"{source.title} must be in its binary version, {source.archive} or "
                f"{source.folder}, but {path} is its {source.other_versions[path.name]} version. "
                "Choose a folder without it, --data-dir FOLDER: the binary version is downloaded "
                "to it, if it is not there yet."
            )


def _read_folder(source: Source, folder: Path) -> Mapping[str, bytes]:
    contents = {}
    for name in source.files:
        with _reading(folder / name):
            if (folder / name).exists():
                contents[name] = (folder / name).read_bytes()
    return contents


def _read_archive(source: Source, path: Path) -> Mapping[str, bytes]:
    # What is read is the one file that has been opened and checked, whatever happens to its path.
    with _reading(path), path.open("rb") as file:
        _require_published_archive(source, path, file)
        wanted = {f"{source.folder}/{name}": name for name in source.files}
        contents = {}
        with tarfile.open(fileobj=file, mode="r|gz") as archive:
            for member in archive:
                # Links are not followed.
                content = archive.extractfile(member) if member.isreg() else None
                if content and member.name in wanted:
                    contents[wanted[member.name]] = content.read()
    return contents


def _require_published_archive(source: Source, path: Path, file: BufferedReader) -> None:
    again = f"Remove it and pass its folder, --data-dir {path.parent}: then it is downloaded again."
    size = os.fstat(file.fileno()).st_size
    if size < source.size:
        raise TrainingError(
            f"{path} must have {source.size:,} bytes, but has {size:,}: it is truncated. {again}"
        )
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != source.sha256:
        raise TrainingError(
            f"The SHA-256 of {path} must be {source.sha256}, but is {sha256}: it is damaged, or "
            f"another file. {again}"
        )
    file.seek(0)


# The download


def _download(source: Source, path: Path) -> None:
    """Download the archive, unless another process has just done so.

    It appears under its own name only when complete. The rest of a failed download is removed, that
    of a killed one by the next.
    """
    if path.parent.suffix in (".gz", ".tgz", ".tar") and not path.parent.exists():
        raise TrainingError(
            f"An archive passed as --data-dir must exist, but {path.parent} does not. Pass a "
            "folder, and the archive is downloaded to it."
        )
    partial = path.with_name(f".{path.name}.part")
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path), ExitStack() as stack:
            if path.exists():
                return
            print(f"downloading {source.url} ({source.size:,} bytes) to {path}", flush=True)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
            fetch = pooch.HTTPDownloader(
                progressbar=stack.enter_context(closing(_Bar(source.size))),
                chunk_size=_CHUNK,
                timeout=_TIMEOUT,
                headers={"Accept-Encoding": "identity"},  # else requests may unpack the archive
                # pooch does not close the connection of a download that fails.
                hooks={"response": lambda response, **_: stack.enter_context(response)},
            )
            sha256 = f"sha256:{source.sha256}"
            pooch.retrieve(source.url, sha256, path.name, partial, downloader=fetch)
            (partial / path.name).replace(path)
    except (RequestException, ValueError) as error:  # ValueError: the SHA-256 or a header is wrong
        raise TrainingError(
            f"{path} does not exist, and downloading {source.url} failed: {_root_cause(error)}. "
            "Either\n"
            "  1. try again later\n"
            f"  2. get {path.name} ({source.size:,} bytes,\n"
            f"     sha256 {source.sha256}) in another way and put it into {path.parent}\n"
            "  3. pass the archive, or a folder that contains it or its files: --data-dir PATH\n"
            "  4. train on a data set that needs no download: --dataset digits"
        ) from error
    except OSError as error:
        raise TrainingError(
            f"Cannot write to {path.parent}: {error.strerror or error}. It needs space for "
            f"{path.name}, {source.size:,} bytes. Free some, or choose another --data-dir."
        ) from error


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait while another process downloads the file, and make others wait."""
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


def _root_cause(error: BaseException) -> str:
    """The words of the operating system or the server, below the layers of the libraries."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(getattr(error, "strerror", None) or error).rstrip(".")


class _Bar:
    """Shows how far a download has come, with the methods of tqdm that pooch calls."""

    def __init__(self, size: int) -> None:
        """Show the bar of a download of `size` bytes until it is closed."""
        self.total = size  # pooch overwrites it with what the server says, possibly 0
        self._bar = Progress(
            TextColumn("downloading"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task("", total=size)
        self._bar.start()

    def update(self, size: int) -> None:
        """Add `size` bytes."""
        self._bar.advance(self._task, size)

    def reset(self) -> None:
        """Go back to 0 bytes."""
        self._bar.update(self._task, completed=0)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.stop()
