"""CIFAR is read from its folder or its archive, if that is the published one."""

import errno
import hashlib
import io
import shutil
import tarfile

import numpy as np
import pytest

from parity_tests.test_training_data import message, unpack_again, write_cifar
from training import cifar
from training.cifar import CIFAR10, CIFAR100

ARCHIVE = CIFAR10.archive


def pack(source, path, members):
    """Put an archive there; the source that describes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return source._replace(size=len(content), sha256=sha256)


def members_of(source, folder):
    """Those of the published archive, whose first one is the folder itself."""
    first = tarfile.TarInfo(source.folder)
    first.type = tarfile.DIRTYPE
    paths = sorted(folder.iterdir())
    files = [(tarfile.TarInfo(f"{source.folder}/{path.name}"), path.read_bytes()) for path in paths]
    return [(first, b""), *files]


def small_archive(source, path, records=2):
    """A small archive of that format; the source that describes it, and all that is in it."""
    folder = path.with_name("scratch")
    images, labels = write_cifar(source, folder, records)
    packed = pack(source, path, members_of(source, folder))
    shutil.rmtree(folder)
    return packed, images, labels


def assert_holds(dataset, images, labels):
    (train_images, train_labels), (test_images, test_labels), _ = dataset
    np.testing.assert_array_equal(np.concatenate([train_images, test_images]), images)
    np.testing.assert_array_equal(np.concatenate([train_labels, test_labels]), labels)


def visible(folder):
    """What lies there but for the lock, which must stay: others may be waiting for it."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# ---- where it is found ---------------------------------------------------------------------------


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("source", [CIFAR10, CIFAR100], ids=lambda source: source.title)
def test_an_archive_is_read_as_it_is(tmp_path, source, itself):
    path = tmp_path / source.archive
    source, images, labels = small_archive(source, path)
    dataset = cifar.load(source, path if itself else tmp_path)
    assert_holds(dataset, images, labels)
    (_, train_labels), _, classes = dataset
    assert len(train_labels) == 2 * len(source.train)
    assert classes == tuple(f"class_{i}" for i in range(source.classes))
    assert visible(tmp_path) == [source.archive]


def test_an_archive_may_have_another_name(tmp_path):
    source, images, labels = small_archive(CIFAR10, tmp_path / "images.tgz")
    assert_holds(cifar.load(source, tmp_path / "images.tgz"), images, labels)


def test_unpacked_files_come_before_the_archive(tmp_path):
    images, labels = write_cifar(CIFAR10, tmp_path / CIFAR10.folder, seed=1)
    source, others, _ = small_archive(CIFAR10, tmp_path / ARCHIVE)
    assert_holds(cifar.load(source, tmp_path), images, labels)
    assert (others != images).any()


def test_the_published_archives():
    """The numbers are those that TensorFlow Datasets has found as well."""
    assert (CIFAR10.url, CIFAR10.size, CIFAR10.sha256[:16]) == (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a",
    )
    assert (CIFAR100.url, CIFAR100.size, CIFAR100.sha256[:16]) == (
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        168_513_733,
        "58a81ae192c23a4b",
    )
    assert [len(source.sha256) for source in (CIFAR10, CIFAR100)] == [64, 64]


# ---- archives that are not what they should be ---------------------------------------------------


def again(path):
    return f"Remove it and pass its folder, --data-dir {path.parent}: then it is downloaded again."


def test_an_archive_cut_off(tmp_path):
    path = tmp_path / ARCHIVE
    source, _, _ = small_archive(CIFAR10, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert message(cifar.load, source, tmp_path) == (
        f"{path} must have {source.size:,} bytes, but has 1,000: it is truncated. {again(path)}"
    )


def test_an_archive_with_one_bit_wrong(tmp_path):
    path = tmp_path / ARCHIVE
    source, _, _ = small_archive(CIFAR10, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert message(cifar.load, source, path) == (
        f"The SHA-256 of {path} must be {source.sha256}, but is "
        f"{hashlib.sha256(content).hexdigest()}: it is damaged, or another file. {again(path)}"
    )


@pytest.mark.parametrize(
    ("source", "name", "version"),
    [
        (CIFAR10, "cifar-10-python.tar.gz", "Python"),
        (CIFAR10, "cifar-10-batches-mat", "MATLAB"),
        (CIFAR100, "cifar-100-python", "Python"),
        (CIFAR100, "cifar-100-matlab.tar.gz", "MATLAB"),
    ],
)
@pytest.mark.parametrize("itself", [True, False])
def test_other_versions_are_told_apart(tmp_path, source, name, version, itself):
    path = tmp_path / name
    path.write_bytes(b"\x80\x03}q\x00") if name.endswith(".gz") else path.mkdir()
    assert message(cifar.load, source, path if itself else tmp_path) == (
        f"{source.title} must be in its binary version, {source.archive} or {source.folder}, but "
        f"{path} is its {version} version. Choose a folder without it, --data-dir FOLDER: the "
        "binary version is downloaded to it, if it is not there yet."
    )


@pytest.mark.parametrize("packed", [True, False])
def test_other_versions_may_lie_beside_the_right_one(tmp_path, packed):
    (tmp_path / "cifar-10-batches-py").mkdir()
    source, images, labels = small_archive(CIFAR10, tmp_path / ARCHIVE)
    if not packed:
        (tmp_path / ARCHIVE).unlink()
        images, labels = write_cifar(CIFAR10, tmp_path / CIFAR10.folder)
    assert_holds(cifar.load(source, tmp_path), images, labels)


def test_an_archive_that_is_not_there_is_not_made_into_a_folder(tmp_path):
    path = tmp_path / "cifar.tar.gz"
    assert message(cifar.load, CIFAR10, path) == (
        f"An archive passed as --data-dir must exist, but {path} does not. Pass a folder, and the "
        "archive is downloaded to it."
    )
    assert not path.exists()


def test_a_folder_in_the_place_of_the_archive(tmp_path):
    path = tmp_path / ARCHIVE
    path.mkdir()
    assert message(cifar.load, CIFAR10, tmp_path) == (
        f"Cannot read {path}: Is a directory. Choose another --data-dir."
    )


def test_an_archive_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    source, _, _ = small_archive(CIFAR10, tmp_path / ARCHIVE)
    monkeypatch.setattr(type(tmp_path), "open", refuse)  # the superuser may read everything
    assert message(cifar.load, source, tmp_path) == (
        f"Cannot read {tmp_path / ARCHIVE}: Permission denied. Choose another --data-dir."
    )


def test_links_in_an_archive_are_not_followed(tmp_path):
    """Neither one that leads out of it, nor one to another member, nor a name that leads out."""
    path = tmp_path / ARCHIVE
    folder = tmp_path / "scratch"
    write_cifar(CIFAR10, folder)
    members = members_of(CIFAR10, folder)
    for member, _ in members:
        name = member.name.rpartition("/")[2]
        if name == "data_batch_1.bin":
            member.type, member.linkname = tarfile.SYMTYPE, str(folder / name)
        elif name == "data_batch_3.bin":
            member.type, member.linkname = tarfile.LNKTYPE, f"{CIFAR10.folder}/data_batch_2.bin"
        elif name == "data_batch_5.bin":
            member.name = f"../{CIFAR10.folder}/{name}"
    source = pack(CIFAR10, path, [(m, b"" if m.islnk() or m.issym() else c) for m, c in members])
    place = path / CIFAR10.folder
    assert message(cifar.load, source, path) == (
        f"The files of CIFAR-10 must be in {place}, but these are missing or not regular files: "
        f"data_batch_1.bin, data_batch_3.bin, data_batch_5.bin. {unpack_again(place)}"
    )
    assert visible(tmp_path) == [ARCHIVE, "scratch"]
