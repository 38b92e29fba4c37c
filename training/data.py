"""Data sets of labelled images, as they are stored on the device, and their augmentation.

Images are bytes, `(n, height, width, channels)`, 0 for black and 255 for white: a quarter of the
memory of floats. `to_float` turns a batch of them into the input of the network.
"""

import warnings
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
from PIL import Image, ImageOps

from training import TrainingError, cifar

Images = UInt8[Array | np.ndarray, "n h w c"]
Labels = Int[Array | np.ndarray, " n"]

DatasetName = Literal["digits", "cifar10", "cifar100"]
CIFAR = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
# The shape of an image, and the number of classes.
FORMATS: dict[DatasetName, tuple[tuple[int, int, int], int]] = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
}


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


def read_picture(
    path: Path, shape: Sequence[int], *, light_on_dark: bool = False
) -> UInt8[np.ndarray, "h w c"]:
    """Read a picture in any format that Pillow knows, scaled to `(height, width, channels)`.

    It is turned as its EXIF data says. Transparent pixels become black if the visible ones are
    light, and white if they are dark. Values of 16 and 32 bits and floats are scaled to bytes. With
    `light_on_dark`, a picture with a light border is inverted, and a line says so.

    Raises:
        TrainingError: the file is absent, unreadable, too large or not a picture, or the scale of
            its values is unknown.
    """
    height, width, channels = shape
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                opaque = _compose(_scale_to_bytes(ImageOps.exif_transpose(image), image.format))
            converted = opaque.convert({1: "L", 3: "RGB"}[channels])
            scaled = converted.resize((width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow documents none, and raises many types
        lines = str(getattr(error, "strerror", None) or error).splitlines()
        raise TrainingError(
            f"Cannot read {path} as a picture: {lines[0].rstrip('.') if lines else repr(error)}. "
            "Pass a file that Pillow can read, such as a PNG."
        ) from error
    pixels = np.asarray(scaled, np.uint8).reshape(height, width, channels)
    if light_on_dark and has_light_border(pixels):
        print(f"{path} is dark on light, and the images of the data set are not: it is inverted")
        return 255 - pixels
    return pixels


def _scale_to_bytes(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scale integers of more than 8 bits and floats; Pillow would clip them at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError("its values must be finite and not negative")
    largest = values.max()
    if image.mode.startswith("I;16") or file_format in ("PNG", "PPM"):
        white = 2**16 - 1
    elif image.mode == "F" and 1 < largest < 2:
        raise ValueError(f"its values must be from 0 to 1, 255 or 65535, but end at {largest:g}")
    else:  # nothing in the file says what white is
        scales = (1, 2**8 - 1, 2**16 - 1, 2**32 - 1)
        white = next((x for x in scales[image.mode == "I" :] if largest <= x), largest)
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _compose(image: Image.Image) -> Image.Image:
    """Put a transparent picture on a background that its visible pixels contrast with."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    opacity = np.asarray(image.getchannel("A"), np.float64)
    if not opacity.any():
        raise ValueError("it is transparent everywhere")
    visible = np.average(np.asarray(image.convert("RGB").convert("L")), weights=opacity)
    background = Image.new("RGBA", image.size, "black" if visible > 127 else "white")
    return Image.alpha_composite(background, image)


def has_light_border(image: UInt8[np.ndarray, "h w c"]) -> bool:
    """Whether the outermost pixels are closer to white than to black."""
    border = np.ones(image.shape, bool)
    border[1:-1, 1:-1] = False
    return bool(image[border].mean() > 127)


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
