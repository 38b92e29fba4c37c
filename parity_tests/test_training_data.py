"""The data sets arrive as they were published, and augmentation keeps its laws."""

import errno
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from training import TrainingError, cifar, data
from training.cifar import CIFAR10, CIFAR100
from training.data import Split

KEY = jax.random.key(0)


def write_cifar(source, folder, records=2, seed=0):
    """Small files of CIFAR's format; all images and labels in the order of the files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels, images = [], []
    for name in source.train + source.test:
        with (folder / name).open("wb") as file:
            for _ in range(records):
                labels.append(int(rng.integers(source.classes)))
                images.append(rng.integers(0, 256, (32, 32, 3), np.uint8))
                red, green, blue = (images[-1][:, :, plane].tobytes() for plane in range(3))
                coarse = bytes([rng.integers(20)] * (source.label_bytes - 1))
                file.write(coarse + bytes([labels[-1]]) + red + green + blue)
    names = [f"class_{i}" for i in range(source.classes)]
    (folder / source.class_names).write_text("\n".join([*names, "", ""]))
    return np.array(images), np.array(labels)


def write_cifar10(folder, records=2):
    return write_cifar(CIFAR10, folder, records)


def message(call, *args):
    with pytest.raises(TrainingError) as caught:
        call(*args)
    return str(caught.value)


def unpack_again(folder):
    return (
        f"Unpack the archive of the binary version again, or remove {folder}: then the archive is "
        "used as it is, and downloaded if necessary."
    )


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("name", "source"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_is_read_image_by_image(tmp_path, name, source, inside):
    folder = tmp_path / source.folder
    images, labels = write_cifar(source, folder)
    n = 2 * len(source.train)
    train, test, classes = data.load(name, folder if inside else tmp_path)
    np.testing.assert_array_equal(train.images, images[:n])
    np.testing.assert_array_equal(train.labels, labels[:n])
    np.testing.assert_array_equal(test.images, images[n:])
    np.testing.assert_array_equal(test.labels, labels[n:])
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert classes == tuple(f"class_{i}" for i in range(source.classes))


def test_classes_without_names_are_numbered(tmp_path):
    write_cifar10(tmp_path / "cifar")
    (tmp_path / "cifar" / "batches.meta.txt").unlink()
    assert data.load("cifar10", tmp_path / "cifar").classes == tuple("0123456789")


def replace_byte(path, place, value):
    content = bytearray(path.read_bytes())
    content[place] = value
    path.write_bytes(content)


def truncate(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = [
    (
        CIFAR10,
        "batches.meta.txt",
        lambda path: path.write_bytes(b"cat\ndog\n\xff\n"),
        "{path} must hold the names of 10 classes, one per line, but holds 3: it is damaged or in "
        "another format. {unpack}",
    ),
    (
        CIFAR10,
        "data_batch_2.bin",
        lambda path: path.unlink(),
        "The files of CIFAR-10 must be in {folder}, but these are missing or not regular files: "
        "data_batch_2.bin. {unpack}",
    ),
    (
        CIFAR10,
        "data_batch_4.bin",
        replace_by_folder,
        "Cannot read {path}: Is a directory. Choose another --data-dir.",
    ),
    (
        CIFAR10,
        "data_batch_3.bin",
        truncate(6145),
        "{path} must hold whole records of 3073 bytes, but its size is 6145 bytes, 1 records and "
        "3072 bytes: it is truncated or in another format. {unpack}",
    ),
    (
        CIFAR10,
        "data_batch_3.bin",
        truncate(0),
        "{path} must hold whole records of 3073 bytes, but its size is 0 bytes, 0 records and 0 "
        "bytes: it is truncated or in another format. {unpack}",
    ),
    (
        CIFAR10,
        "test_batch.bin",
        lambda path: replace_byte(path, 3073, 10),
        "The labels in {path} must be from 0 to 9, but that of record 1 is 10: it is damaged or in "
        "another format. {unpack}",
    ),
    (
        CIFAR100,
        "test.bin",
        lambda path: replace_byte(path, 3075, 100),
        "The labels in {path} must be from 0 to 99, but that of record 1 is 100: it is damaged or "
        "in another format. {unpack}",
    ),
]


@pytest.mark.parametrize(("source", "name", "damage", "text"), DAMAGE)
def test_damaged_files_are_refused(tmp_path, source, name, damage, text):
    folder = tmp_path / source.folder
    write_cifar(source, folder)
    damage(folder / name)
    assert message(cifar.load, source, tmp_path) == text.format(
        path=folder / name, folder=folder, unpack=unpack_again(folder)
    )


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write_cifar10(tmp_path / "cifar")
    monkeypatch.setattr(type(tmp_path), "read_bytes", refuse)  # the superuser may read everything
    assert message(data.load, "cifar10", tmp_path / "cifar") == (
        f"Cannot read {tmp_path}/cifar/data_batch_1.bin: Permission denied. "
        "Choose another --data-dir."
    )


def test_the_split_of_the_digits_is_fixed(tmp_path):
    train, test, classes = data.load("digits", tmp_path)
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert classes == tuple("0123456789")
    assert set(np.bincount(test.labels)) <= {35, 36, 37}
    # The accuracies in train_cifar.py are those of this split.
    digest = hashlib.sha256(test.images.tobytes() + test.labels.tobytes()).hexdigest()
    assert digest[:16] == "eb33daa4a6fa9662"
    again = data.digits()
    np.testing.assert_array_equal(train.images, again.train.images)


def test_digits_are_all_there():
    import sklearn.datasets

    train, test, _ = data.digits()
    images = np.concatenate([train.images, test.images]).reshape(1797, 64)
    labels = np.concatenate([train.labels, test.labels])
    source = sklearn.datasets.load_digits()

    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images, labels]).astype(int)))

    assert rows(np.round(images * (16 / 255)), labels) == rows(source.data, source.target)


def test_a_picture_that_is_not_square(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "picture.png")
    np.testing.assert_array_equal(data.read_picture(tmp_path / "picture.png", (4, 6, 3)), pixels)


def test_padding_has_class_minus_1():
    split = Split(np.ones((5, 2, 2, 1), np.uint8), np.arange(5, dtype=np.int32))
    padded = data.pad(split, 4)
    np.testing.assert_array_equal(padded.labels, [0, 1, 2, 3, 4, -1, -1, -1])
    assert padded.images.shape == (8, 2, 2, 1)
    assert data.pad(split, 5).labels.tolist() == [0, 1, 2, 3, 4]


def test_the_networks_input_is_normalized_as_published():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(data.to_float(values), (values / 255 - 0.5) / 0.5, atol=1e-7)
    assert data.to_float(values).dtype == jnp.float32


def copies_of_one_image(n, size=4, channels=2):
    """No value occurs twice in it, so that no two of its windows are alike."""
    image = np.arange(1, 1 + size * size * channels, dtype=np.uint8).reshape(size, size, channels)
    return image, jnp.asarray(np.stack([image] * n))


@pytest.mark.parametrize("pixels", [1, 2])
def test_a_shifted_image_is_a_window_of_the_padded_one(pixels):
    image, images = copies_of_one_image(400)
    shifted = np.asarray(jax.jit(data.random_shift, static_argnums=2)(KEY, images, pixels))
    padded = np.pad(image, [(pixels, pixels), (pixels, pixels), (0, 0)])
    places = range(2 * pixels + 1)
    windows = {padded[i : i + 4, j : j + 4].tobytes() for i in places for j in places}
    # Every window occurs, so each image is moved on its own, along both axes, its channels as one.
    assert {one.tobytes() for one in shifted} == windows
    assert shifted.dtype == np.uint8


def test_no_shift_is_no_change():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 5, 5, 1), np.uint8))
    np.testing.assert_array_equal(data.random_shift(KEY, images, 0), images)


def test_half_of_the_images_are_mirrored():
    image, images = copies_of_one_image(400)
    flipped = np.asarray(data.random_flip(KEY, images))
    mirrored = np.array([(one == image[:, ::-1]).all() for one in flipped])
    kept = np.array([(one == image).all() for one in flipped])
    assert (mirrored ^ kept).all()
    assert 140 < mirrored.sum() < 260  # 6 standard deviations
    assert flipped.dtype == np.uint8
