"""Every complaint about data sets: where they lie, their download, what is in their files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from requests.exceptions import RequestException

from training.checks import TrainingError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is read can be read."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot read {path}: {error.strerror or error}. Name another --data-dir."
        ) from error


def named_archive_exists(path: Path) -> None:
    """What is named like an archive is one, and is not made into a folder."""
    if path.suffix in (".gz", ".tgz", ".tar") and not path.exists():
        raise TrainingError(
            f"An archive for --data-dir must exist, but there is no {path}. Name a folder, and the "
            "archive is downloaded into it."
        )


def binary_version(title: str, needed: Sequence[str], others: Sequence[tuple[Path, str]]) -> None:
    """A data set is there in the version that holds plain bytes."""
    for path, version in others:
        raise TrainingError(
            f"{title} must be there in its binary version, {' or '.join(needed)}, but {path} is "
            f"its {version} version. Name a folder without it, --data-dir FOLDER: the binary "
            "version is downloaded into it, if it is not there yet."
        )


def whole_archive(path: Path, found: int, size: int) -> None:
    """An archive is as long as it was published."""
    if found < size:
        raise TrainingError(
            f"{path} must have {size:,} bytes, but has {found:,}: it is cut off. {_again(path)}"
        )


def archive_sha256(path: Path, found: str, sha256: str) -> None:
    """An archive is the one that was published, to the last bit."""
    if found != sha256:
        raise TrainingError(
            f"The SHA-256 of {path} must be {sha256}, but is {found}: it is damaged, or another "
            f"file. {_again(path)}"
        )


def members(title: str, place: Path, missing: Sequence[str]) -> None:
    """A data set is complete."""
    if missing:
        raise TrainingError(
            f"The files of {title} must lie in {place}, but these are missing or no regular files: "
            f"{', '.join(missing)}. {_afresh(place)}"
        )


def whole_records(path: Path, size: int, record: int) -> None:
    """A file is cut off unless it ends where a record ends."""
    if size == 0 or size % record:
        raise TrainingError(
            f"{path} must hold whole records of {record} bytes, but its size is {size} bytes, "
            f"{size // record} records and {size % record} bytes: it is cut off or of another "
            f"format. {_afresh(path.parent)}"
        )


def labels(path: Path, values: Sequence[int], classes: int) -> None:
    """A label is the number of a class."""
    for record, label in enumerate(values):
        if label >= classes:
            raise TrainingError(
                f"The labels in {path} must be from 0 to {classes - 1}, but that of record "
                f"{record} is {label}: it is damaged or of another format. {_afresh(path.parent)}"
            )


def class_names(path: Path, names: Sequence[str], classes: int) -> None:
    """Every class has a name."""
    if len(names) != classes:
        raise TrainingError(
            f"{path} must hold the names of {classes} classes, one a line, but holds {len(names)}: "
            f"it is damaged or of another format. {_afresh(path.parent)}"
        )


@contextmanager
def downloading(url: str, path: Path, size: int, sha256: str) -> Iterator[None]:
    """The server is within reach and sends the file."""
    try:
        yield
    except (RequestException, ValueError) as error:  # ValueError: of headers that make no sense
        raise TrainingError(
            f"{path} does not exist and must be downloaded, but {url} cannot be had: "
            f"{_root_cause(error)}. {_instead(path, size, sha256)}"
        ) from error


def downloaded_sha256(url: str, path: Path, size: int, sha256: str, found: str) -> None:
    """What the server sent is the file that was published."""
    if found != sha256:
        raise TrainingError(
            f"{path} must have the SHA-256 {sha256}, but what {url} sent has {found}, and was not "
            f"kept. {_instead(path, size, sha256)}"
        )


@contextmanager
def keeping(path: Path, size: int) -> Iterator[None]:
    """There is room for what is downloaded."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot write to {path.parent}: {error.strerror or error}. It must have room for "
            f"{path.name}, {size:,} bytes. Make room, or name another --data-dir."
        ) from error


def _again(archive: Path) -> str:
    return (
        f"Remove it and name its folder, --data-dir {archive.parent}: then it is downloaded again."
    )


def _afresh(folder: Path) -> str:
    return (
        f"Unpack the archive of the binary version again, or remove {folder}: without it, the "
        "archive is looked for, downloaded if need be, and read as it is."
    )


def _instead(path: Path, size: int, sha256: str) -> str:
    return (
        "Either\n"
        "  1. try again later\n"
        f"  2. get {path.name} ({size:,} bytes,\n"
        f"     sha256 {sha256}) by other means and put it into {path.parent}\n"
        "  3. name the archive, or a folder that holds it, packed or unpacked: --data-dir PATH\n"
        "  4. train on a data set that needs no download: --dataset digits"
    )


def _root_cause(error: BaseException) -> str:
    """What the operating system or the server said, below the layers of the libraries."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(getattr(error, "strerror", None) or error)
