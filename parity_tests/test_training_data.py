"""The data sets arrive as they were published, and augmentation keeps its laws."""

import errno
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcn_flax.training import data
from bcn_flax.training.checks import TrainingError
from bcn_flax.training.data import Split

KEY = jax.random.key(0)
NAMES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def write_cifar10(folder, records=2, seed=0):
    """Small files of CIFAR-10's format; all labels and images in the order of NAMES."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    labels, images = [], []
    for name in NAMES:
        with (folder / name).open("wb") as file:
            for _ in range(records):
                labels.append(int(rng.integers(10)))
                images.append(rng.integers(0, 256, (32, 32, 3), np.uint8))
                red, green, blue = (images[-1][:, :, plane].tobytes() for plane in range(3))
                file.write(bytes([labels[-1]]) + red + green + blue)
    return np.array(images), np.array(labels)


def message(call, *args):
    with pytest.raises(TrainingError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_is_read_image_by_image(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-bin"
    images, labels = write_cifar10(folder)
    train, test = data.cifar10(folder if inside else tmp_path)
    np.testing.assert_array_equal(train.images, images[:10])
    np.testing.assert_array_equal(train.labels, labels[:10])
    np.testing.assert_array_equal(test.images, images[10:])
    np.testing.assert_array_equal(test.labels, labels[10:])
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32


def test_absent_files_are_told_how_to_come_by(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder)
    (folder / "data_batch_2.bin").unlink()
    (folder / "test_batch.bin").unlink()
    assert message(data.cifar10, tmp_path) == (
        f"The files of CIFAR-10 must lie in {tmp_path}, but these are missing: "
        f"{folder}/data_batch_2.bin, {folder}/test_batch.bin. Either\n"
        "  1. download the binary version, "
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz\n"
        "     (170,052,171 bytes, sha256 "
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd),\n"
        f"     and unpack it there: mkdir -p {tmp_path} && "
        f"tar -xzf cifar-10-binary.tar.gz -C {tmp_path}\n"
        "  2. name the folder that holds it: --data-dir FOLDER\n"
        "  3. train on a data set that needs no download: --dataset digits"
    )


def test_an_absent_folder_misses_all_files(tmp_path):
    text = message(data.cifar10, tmp_path / "nowhere")
    assert all(name in text for name in NAMES)


def test_a_file_is_no_folder_of_data(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"")
    assert message(data.cifar10, path) == (
        f"The data must lie in a folder, but {path} is a file. Name the folder that holds "
        "cifar-10-batches-bin: --data-dir FOLDER. If that file is the archive, unpack it first: "
        f"mkdir -p data && tar -xzf {path} -C data"
    )


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path, dtype):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write_cifar10(tmp_path / "cifar")
    monkeypatch.setattr(np, "fromfile", refuse)  # the superuser may read everything
    assert message(data.cifar10, tmp_path / "cifar") == (
        f"Cannot read {tmp_path}/cifar/data_batch_1.bin: Permission denied. "
        "Name another --data-dir."
    )


@pytest.mark.parametrize(("size", "records", "rest"), [(6145, 1, 3072), (0, 0, 0)])
def test_a_file_cut_off(tmp_path, size, records, rest):
    write_cifar10(tmp_path / "cifar")
    path = tmp_path / "cifar" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:size])
    assert message(data.cifar10, tmp_path / "cifar") == (
        f"{path} must hold whole records of 3073 bytes, but its size is {size} bytes, "
        f"{records} records and {rest} bytes. The file is cut off or of another format: unpack the "
        "binary version of the archive again."
    )


def test_a_label_that_is_no_class(tmp_path):
    write_cifar10(tmp_path / "cifar")
    path = tmp_path / "cifar" / "test_batch.bin"
    values = bytearray(path.read_bytes())
    values[3073] = 10
    path.write_bytes(values)
    assert message(data.cifar10, tmp_path / "cifar") == (
        f"The labels in {path} must be from 0 to 9, but that of record 1 is 10. The file is "
        "damaged or of another format: unpack the binary version of the archive again."
    )


def test_digits_are_split_once_and_for_all():
    train, test = data.digits()
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert (train.images.dtype, train.labels.dtype) == (np.uint8, np.int32)
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert set(np.bincount(test.labels)) <= {35, 36, 37}
    # The accuracies in train_cifar.py are those of this split.
    digest = hashlib.sha256(test.images.tobytes() + test.labels.tobytes()).hexdigest()
    assert digest[:16] == "eb33daa4a6fa9662"
    again = data.digits()
    np.testing.assert_array_equal(train.images, again.train.images)


def test_digits_are_all_there():
    import sklearn.datasets

    train, test = data.digits()
    images = np.concatenate([train.images, test.images]).reshape(1797, 64)
    labels = np.concatenate([train.labels, test.labels])
    source = sklearn.datasets.load_digits()

    def rows(images, labels):
        return sorted(map(tuple, np.column_stack([images, labels]).astype(int)))

    assert rows(np.round(images * (16 / 255)), labels) == rows(source.data, source.target)


def test_padding_is_of_no_class():
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
