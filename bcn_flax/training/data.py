"""Two data sets of labelled images, as they lie on the device, and their augmentation.

Images are bytes, `(n, height, width, channels)`, 0 for black and 255 for white: a quarter of the
memory of floats. `to_float` makes the network's input of a batch of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
import sklearn.model_selection
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from bcn_flax.training import checks

Images = UInt8[Array | np.ndarray, "n h w c"]
Labels = Int[Array | np.ndarray, " n"]

_SHAPE = (3, 32, 32)  # of a CIFAR image on disk: one plane after another
_RECORD = 1 + 3 * 32 * 32  # its label, then its bytes


class Split(NamedTuple):
    """Images and the number of the class of each."""

    images: Images
    labels: Labels


class Dataset(NamedTuple):
    """What is trained on, and what is held out."""

    train: Split
    test: Split


def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels in 10 classes, 360 of them held out.

    They come with scikit-learn. The split is fixed, and holds out the same share of every class.

    Source: `sklearn.datasets.load_digits`, the test set of the UCI "Optical Recognition of
    Handwritten Digits".
    """
    source = sklearn.datasets.load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.int32)
    # random_state takes NumPy's legacy generator, whose numbers stay the same for ever.
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    return Dataset(Split(train_images, train_labels), Split(test_images, test_labels))


def cifar10(data_dir: Path) -> Dataset:
    """50,000 photographs of 32x32 pixels in 10 classes, and 10,000 held out.

    Args:
        data_dir: the folder that holds `cifar-10-batches-bin`, or that folder itself.

    Raises:
        TrainingError: files are absent, unreadable, cut off or damaged.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"; the format is that
    of the binary version, https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    with checks.reading(data_dir):
        checks.data_is_folder(data_dir)
        folder = data_dir / "cifar-10-batches-bin"
        if not folder.is_dir() and any(data_dir.glob("*_batch*.bin")):
            folder = data_dir
        train = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
        test = [folder / "test_batch.bin"]
        checks.cifar10_files([path for path in train + test if not path.is_file()], data_dir)
    return Dataset(_read_cifar(train), _read_cifar(test))


def _read_cifar(paths: Sequence[Path]) -> Split:
    records = []
    for path in paths:
        with checks.reading(path):
            values = np.fromfile(path, np.uint8)
        checks.whole_records(path, values.size, _RECORD)
        records.append(values.reshape(-1, _RECORD))
        checks.labels(path, records[-1][:, 0].tolist(), 10)
    table = np.concatenate(records)
    images = table[:, 1:].reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), table[:, 0].astype(np.int32))


def pad(split: Split, multiple: int) -> Split:
    """Fill up to a multiple with black images of class -1, which nothing counts."""
    missing = -len(split.labels) % multiple
    return Split(
        np.pad(split.images, [(0, missing), (0, 0), (0, 0), (0, 0)]),
        np.pad(split.labels, (0, missing), constant_values=-1),
    )


def to_float(images: Images) -> Float[Array, "n h w c"]:
    """Bytes as numbers from -1 to 1: a mean of 0.5 and a deviation of 0.5 taken off [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def random_shift(key: Key[Array, ""], images: Images, pixels: int) -> UInt8[Array, "n h w c"]:
    """Move each image up to `pixels` along either axis: a random crop of the padded image."""
    n, *shape = images.shape
    margin = (pixels, pixels)
    padded = jnp.pad(images, [(0, 0), margin, margin, (0, 0)])
    corners = jax.random.randint(key, (n, 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), shape))(
        padded, corners
    )


def random_flip(key: Key[Array, ""], images: Images) -> UInt8[Array, "n h w c"]:
    """Exchange left and right in each image with probability 1/2."""
    heads = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(heads, images[:, :, ::-1], images)
