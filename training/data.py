"""Data sets of labelled images, as they lie on the device, and their augmentation.

Images are bytes, `(n, height, width, channels)`, 0 for black and 255 for white: a quarter of the
memory of floats. `to_float` makes the network's input of a batch of them.
"""

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
import sklearn.model_selection
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from training import checks, cifar
from training.cifar import Source

Images = UInt8[Array | np.ndarray, "n h w c"]
Labels = Int[Array | np.ndarray, " n"]

DatasetName = Literal["digits", "cifar10", "cifar100"]


class Split(NamedTuple):
    """Images and the number of the class of each."""

    images: Images
    labels: Labels


class Dataset(NamedTuple):
    """What is trained on, what is held out, and the names of the classes, by number."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def load(name: DatasetName, data_dir: Path) -> Dataset:
    """The data set of that name.

    Args:
        name: which one.
        data_dir: where CIFAR is, or is downloaded to; see `from_cifar`. The digits need none.

    Raises:
        TrainingError: there is no data set of that name, or it is damaged or not to be had.
    """
    checks.known("dataset", name, get_args(DatasetName))
    if name == "digits":
        return digits()
    return from_cifar(cifar.CIFAR10 if name == "cifar10" else cifar.CIFAR100, data_dir)


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
    return Dataset(
        Split(train_images, train_labels),
        Split(test_images, test_labels),
        classes=tuple(map(str, source.target_names)),
    )


def from_cifar(source: Source, data_dir: Path) -> Dataset:
    """50,000 photographs of 32x32 pixels in 10 or 100 classes, and 10,000 held out.

    Args:
        source: `cifar.CIFAR10`, or `cifar.CIFAR100` with its fine labels.
        data_dir: the archive, the unpacked folder, or a folder that holds one of them; a folder
            that holds neither, or does not exist, is where the archive is downloaded to.

    Raises:
        TrainingError: files are missing, unreadable, cut off or damaged, of another version, or
            cannot be downloaded.
    """
    files = cifar.read(source, data_dir)
    return Dataset(
        Split(*cifar.images_and_labels(source, files, source.train)),
        Split(*cifar.images_and_labels(source, files, source.test)),
        cifar.class_names(source, files),
    )


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
