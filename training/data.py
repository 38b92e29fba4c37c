"""Data sets of labelled images, as they are stored on the device, and their augmentation.

Images are bytes, `(n, height, width, channels)`, 0 for black and 255 for white: a quarter of the
memory of floats. `to_float` turns a batch of them into the input of the network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
import sklearn.model_selection
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8
from PIL import Image

from training import TrainingError, cifar

Images = UInt8[Array | np.ndarray, "n h w c"]
Labels = Int[Array | np.ndarray, " n"]

DatasetName = Literal["digits", "cifar10", "cifar100"]
CIFAR = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}


class Split(NamedTuple):
    """Images and the class of each, as a number."""

    images: Images
    labels: Labels


class Dataset(NamedTuple):
    """Training images, held-out images, and the names of the classes."""

    train: Split
    test: Split
    classes: tuple[str, ...]


def load(name: DatasetName, data_dir: Path) -> Dataset:
    """Load a data set by its name.

    Args:
        name: of the data set.
        data_dir: where CIFAR is, or is downloaded to; see `cifar.load`. The digits need none.

    Raises:
        TrainingError: files are damaged or cannot be downloaded.
    """
    if name == "digits":
        return digits()
    train, test, classes = cifar.load(CIFAR[name], data_dir)
    return Dataset(Split(*train), Split(*test), classes)


def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels in 10 classes, 360 of them held out.

    They come with scikit-learn. The split is fixed and stratified by class.

    Source: `sklearn.datasets.load_digits`, the test set of the UCI "Optical Recognition of
    Handwritten Digits".
    """
    source = sklearn.datasets.load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = source.target.astype(np.int32)
    # random_state selects NumPy's legacy generator, whose numbers never change.
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    return Dataset(
        Split(train_images, train_labels),
        Split(test_images, test_labels),
        classes=tuple(map(str, source.target_names)),
    )


def read_picture(path: Path, shape: Sequence[int]) -> UInt8[np.ndarray, "h w c"]:
    """Read a picture in any format that Pillow knows, scaled to `(height, width, channels)`.

    Raises:
        TrainingError: the file is absent, unreadable, or not a picture.
    """
    height, width, channels = shape
    try:
        with Image.open(path) as image:
            converted = image.convert({1: "L", 3: "RGB"}[channels])
            scaled = converted.resize((width, height), Image.Resampling.LANCZOS)
    except OSError as error:
        raise TrainingError(
            f"Cannot read {path} as a picture: {error.strerror or error}. Pass a file that Pillow "
            "can read, such as a PNG."
        ) from error
    return np.asarray(scaled, np.uint8).reshape(height, width, channels)


def pad(split: Split, multiple: int) -> Split:
    """Pad to a multiple with black images of class -1, which are not counted."""
    missing = -len(split.labels) % multiple
    return Split(
        np.pad(split.images, [(0, missing), (0, 0), (0, 0), (0, 0)]),
        np.pad(split.labels, (0, missing), constant_values=-1),
    )


def to_float(images: Images) -> Float[Array, "n h w c"]:
    """Map bytes to [-1, 1]: values in [0, 1], normalized by mean 0.5 and deviation 0.5."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def random_shift(key: Key[Array, ""], images: Images, pixels: int) -> UInt8[Array, "n h w c"]:
    """Shift each image by up to `pixels` along each axis: a random crop of the padded image."""
    n, *shape = images.shape
    margin = (pixels, pixels)
    padded = jnp.pad(images, [(0, 0), margin, margin, (0, 0)])
    corners = jax.random.randint(key, (n, 2), 0, 2 * pixels + 1)
    return jax.vmap(lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), shape))(
        padded, corners
    )


def random_flip(key: Key[Array, ""], images: Images) -> UInt8[Array, "n h w c"]:
    """Mirror each image left to right with probability 1/2."""
    heads = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(heads, images[:, :, ::-1], images)
