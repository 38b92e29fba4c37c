"""A picture from a file, as the network was trained to see them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from training import checks

_MODES = {1: "L", 3: "RGB"}


def read(path: Path, shape: Sequence[int]) -> UInt8[np.ndarray, "h w c"]:
    """Read a picture in any format that Pillow knows, scaled to `(height, width, channels)`.

    Raises:
        TrainingError: it is absent, unreadable, or no picture.
    """
    height, width, channels = shape
    with checks.picture(path), Image.open(path) as image:
        scaled = image.convert(_MODES[channels]).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(scaled, np.uint8).reshape(height, width, channels)
