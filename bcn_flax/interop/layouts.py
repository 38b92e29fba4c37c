"""How the values of one tensor lie in PyTorch and in Flax: every rearrangement, and its way back.

A `Layout` moves values, a rule proposes layouts. PyTorch's shapes are written `(O, I, *)`: output
features, input features (of one group), and any number of window axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]
Values = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """One rearrangement of values between PyTorch and Flax.

    Attributes:
        how: what it does, for the report.
        to_flax: from PyTorch's tensor to Flax's array.
        to_torch: from Flax's array to PyTorch's tensor.
        torch_shape: the shape of PyTorch's tensor for a shape of Flax's array.
        features: the axis of PyTorch's tensor along which the layer's outputs lie.
    """

    how: str
    to_flax: Callable[[Values], Values]
    to_torch: Callable[[Values], Values]
    torch_shape: Callable[[Shape], Shape]
    features: int = 0


class Known(NamedTuple):
    """What is known of a layer beyond its names and shapes; `None` where nobody said.

    Attributes:
        transposed: whether it is a transposed convolution.
        transpose_kernel: the argument of that name of Flax's transposed convolutions.
        channels: of the images that were flattened into the inputs of a dense layer.
    """

    transposed: bool | None = None
    transpose_kernel: bool | None = None
    channels: int | None = None


COPIED = Layout("copied", lambda x: x, lambda x: x, lambda shape: shape)

EMBEDDED = COPIED._replace(features=1)

TRANSPOSED = Layout(
    "transposed (O, I, *) -> (*, I, O)",
    lambda weight: np.moveaxis(weight, (0, 1), (-1, -2)),
    lambda kernel: np.moveaxis(kernel, (-1, -2), (0, 1)),
    lambda shape: (shape[-1], shape[-2], *shape[:-2]),
)

# Flax's transpose_kernel=True: lax.conv_transpose flips and exchanges by itself, as PyTorch does.
UNFLIPPED = TRANSPOSED._replace(how="transposed (I, O, *) -> (*, O, I)", features=1)

# Flax's transpose_kernel=False: a convolution of the dilated input, where PyTorch correlates.
FLIPPED = Layout(
    "transposed (I, O, *) -> (*, I, O) and flipped in space",
    lambda weight: np.moveaxis(_flip(weight, first=2), (0, 1), (-2, -1)),
    lambda kernel: _flip(np.moveaxis(kernel, (-2, -1), (0, 1)), first=2),
    lambda shape: (shape[-2], shape[-1], *shape[:-2]),
    features=1,
)


def reshaped(torch_shape: Shape, flax_shape: Shape) -> Layout:
    """The same values in the same order, between two given shapes."""
    return Layout(
        "reshaped",
        lambda x: x.reshape(flax_shape),
        lambda x: x.reshape(torch_shape),
        lambda _: torch_shape,
    )


def unflattened(channels: int) -> Layout:
    """A dense layer's weights, whose inputs are flattened images.

    PyTorch flattens `(channels, pixels)`, Flax `(pixels, channels)`.
    """
    return TRANSPOSED._replace(
        how=f"transposed (O, I) -> (I, O), inputs reordered from {channels} channels first to last",
        to_flax=lambda weight: (
            weight.reshape(len(weight), channels, -1).transpose(2, 1, 0).reshape(-1, len(weight))
        ),
        to_torch=lambda kernel: (
            kernel.reshape(-1, channels, kernel.shape[1])
            .transpose(2, 1, 0)
            .reshape(kernel.shape[1], -1)
        ),
    )


def anything(torch_shape: Shape, flax_shape: Shape, known: Known) -> list[Layout]:
    """Values in the same order; axes of length 1 may come and go."""
    if torch_shape != flax_shape and _squeezed(torch_shape) == _squeezed(flax_shape):
        return [reshaped(torch_shape, flax_shape)]
    return [COPIED]


def embedding(torch_shape: Shape, flax_shape: Shape, known: Known) -> list[Layout]:
    """A row of features for each token, on both sides."""
    return [EMBEDDED]


def vector(torch_shape: Shape, flax_shape: Shape, known: Known) -> list[Layout]:
    """One number for each feature or group; PyTorch may have it as `(1, G, 1)`."""
    # Of several axes of features, the channels are the first in PyTorch and the last in Flax.
    return anything(torch_shape, flax_shape, known) if len(flax_shape) < 2 else []


def kernel(torch_shape: Shape, flax_shape: Shape, known: Known) -> list[Layout]:
    """Of a dense layer, a convolution, or a transposed convolution."""
    if len(flax_shape) < 2:
        return []
    if known.transposed:
        by_flag = {False: FLIPPED, True: UNFLIPPED}
        return [by_flag[flag] for flag in by_flag if known.transpose_kernel in (flag, None)]
    if len(flax_shape) == 2 and known.channels not in (None, flax_shape[0]):
        return [unflattened(known.channels)]
    return [TRANSPOSED]


def _squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _flip(x: Values, first: int) -> Values:
    return np.flip(x, tuple(range(first, x.ndim)))
