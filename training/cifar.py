"""CIFAR-10 and CIFAR-100 in their binary version: where they come from, and what is in the files.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"; the format is described
at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from training import data_checks
from training.download import download

_SHAPE = (3, 32, 32)  # of an image on disk: one plane after another


class Source(NamedTuple):
    """Where a data set in this format comes from, and how it is laid out."""

    title: str
    url: str
    """Of the archive, whose name it ends in."""
    size: int
    """Of the archive, in bytes."""
    sha256: str
    """Of the archive."""
    folder: str
    """That the archive holds."""
    train: tuple[str, ...]
    """The files in it to train on, in order."""
    test: tuple[str, ...]
    """The files in it that are held out."""
    class_names: str
    """The file in it with the names of the classes, one a line."""
    label_bytes: int
    """Before each image; the last of them is the number of its class."""
    classes: int
    """How many there are."""
    other_versions: Mapping[str, str]
    """Archives and folders of the same images in formats that are not read, and their kind."""

    @property
    def archive(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]


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


class Files(NamedTuple):
    """The contents of the files of a data set, by name, and the folder that they were found in."""

    folder: Path
    contents: Mapping[str, bytes]


def read(source: Source, data_dir: Path) -> Files:
    """Read the files of a data set, from its folder or straight from its archive.

    Args:
        source: which data set.
        data_dir: the archive, the unpacked folder, or a folder that holds one of them; a folder
            that holds neither, or does not exist, is where the archive is downloaded to.

    Raises:
        TrainingError: files are missing, unreadable, cut off or damaged, of another version, or
            cannot be downloaded.
    """
    with data_checks.reading(data_dir):
        folder = _unpacked_folder(source, data_dir)
        archive = data_dir if data_dir.is_file() else data_dir / source.archive
        if not folder:
            data_checks.named_archive_exists(data_dir)
            data_checks.binary_version(
                source.title, (source.archive, source.folder), _other_versions(source, data_dir)
            )
        absent = not folder and not archive.exists()
    if absent:
        download(source.url, archive, source.size, source.sha256)
    files = _read_folder(source, folder) if folder else _read_archive(source, archive)
    missing = [name for name in source.train + source.test if name not in files.contents]
    data_checks.members(source.title, files.folder, missing)
    return files


def _unpacked_folder(source: Source, data_dir: Path) -> Path | None:
    inside = data_dir / source.folder
    if inside.is_dir():
        return inside
    is_one = any((data_dir / name).exists() for name in source.train + source.test)
    return data_dir if is_one else None


def _other_versions(source: Source, data_dir: Path) -> list[tuple[Path, str]]:
    """Those that stand in the place of the version that is needed."""
    if (data_dir / source.archive).exists():
        return []
    paths = [data_dir, *(data_dir / name for name in source.other_versions)]
    return [
        (path, source.other_versions[path.name])
        for path in paths
        if path.name in source.other_versions and path.exists()
    ]


def _read_folder(source: Source, folder: Path) -> Files:
    contents = {}
    for name in _names(source):
        with data_checks.reading(folder / name):
            if (folder / name).exists():
                contents[name] = (folder / name).read_bytes()
    return Files(folder, contents)


def _read_archive(source: Source, path: Path) -> Files:
    # Not a path decides what is read, but the one file that has been opened and checked.
    with data_checks.reading(path), path.open("rb") as file:
        data_checks.whole_archive(path, os.fstat(file.fileno()).st_size, source.size)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        data_checks.archive_sha256(path, sha256, source.sha256)
        file.seek(0)
        wanted = {f"{source.folder}/{name}": name for name in _names(source)}
        contents = {}
        with tarfile.open(fileobj=file, mode="r|gz") as archive:
            for member in archive:
                # Links are not followed, wherever they lead.
                content = archive.extractfile(member) if member.isreg() else None
                if content and member.name in wanted:
                    contents[wanted[member.name]] = content.read()
    return Files(path / source.folder, contents)


def _names(source: Source) -> tuple[str, ...]:
    return (*source.train, *source.test, source.class_names)


def images_and_labels(
    source: Source, files: Files, names: Sequence[str]
) -> tuple[UInt8[np.ndarray, "n 32 32 3"], Int32[np.ndarray, " n"]]:
    """The images in some of the files, as bytes, and the number of the class of each.

    Raises:
        TrainingError: a file is cut off, or a label is the number of no class.
    """
    table = np.concatenate([_records(source, files, name) for name in names])
    images = table[:, source.label_bytes :].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), table[:, source.label_bytes - 1].astype(np.int32)


def _records(source: Source, files: Files, name: str) -> UInt8[np.ndarray, "n bytes"]:
    path = files.folder / name
    values = np.frombuffer(files.contents[name], np.uint8)
    record = source.label_bytes + int(np.prod(_SHAPE))
    data_checks.whole_records(path, values.size, record)
    table = values.reshape(-1, record)
    data_checks.labels(path, table[:, source.label_bytes - 1].tolist(), source.classes)
    return table


def class_names(source: Source, files: Files) -> tuple[str, ...]:
    """The names of the classes; their numbers, where the file of the names is missing.

    Raises:
        TrainingError: there are not as many names as classes.
    """
    if source.class_names not in files.contents:
        return tuple(map(str, range(source.classes)))
    # The published file ends in an empty line.
    names = files.contents[source.class_names].decode(errors="replace").split()
    data_checks.class_names(files.folder / source.class_names, names, source.classes)
    return tuple(names)
