"""What the networks of linen and NNX share: sizes, layers without parameters, and rules."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bcn_flax.checks import (
    as_array,
    or_none,
    require_callable,
    require_count,
    require_integer,
)

BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
"""The VGG that the annotated implementation trains on CIFAR-10: features, block by block."""

WIDTHS = (16, 32, 64)
"""The features of the three stages of a ResNet."""


def residual_blocks(depth: int) -> list[tuple[int, int]]:
    """The features and the stride of each residual block of a ResNet.

    The first block of the second and of the third stage halves the image.

    Raises:
        ValueError: the depth is not `6n + 2` with n at least 1.
    """
    blocks_per_stage = require_resnet_depth(depth)
    return [
        (features, 2 if stage > 0 and i == 0 else 1)
        for stage, features in enumerate(WIDTHS)
        for i in range(blocks_per_stage)
    ]


def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ReLU; unlike `jax.nn.relu` it can be pickled, and so can a network that holds it."""
    return nn.relu(x)


def identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The input, in the place of a norm."""
    return x


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """The largest value of each 2x2 pixels: half the height and width."""
    return nn.max_pool(x, (2, 2), (2, 2))


def shortcut(
    x: Float[Array, "n h w c"], features: int, stride: int
) -> Float[Array, "n h2 w2 {features}"]:
    """The input, every `stride`-th pixel of it, with channels of zeros after its own."""
    missing = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, missing)))


def require_layers(num_classes: Any, conv: Any, norm: Any) -> int:
    """There must be a class or more, and what makes a layer must be callable.

    Returns:
        The number of classes.
    """
    require_callable("conv", conv)
    or_none(require_callable)("norm", norm)
    return require_count("num_classes", num_classes)


def require_blocks(blocks: Any) -> list[list[int]]:
    """A VGG has at least one block, and a block at least one convolution.

    Returns:
        The features of each convolution, block by block.
    """
    try:
        found = [[require_count("blocks", features) for features in block] for block in blocks]
    except (TypeError, ValueError):
        found = []
    if not found or not all(found):
        raise ValueError(
            "blocks must list the features of at least one convolution in each of at least one "
            f"block, but blocks={blocks!r}. An example: ((64, 64), (128, 128))."
        )
    return found


def require_images(x: Any) -> Array:
    """Images come in a batch, with their channels last.

    Returns:
        An array of JAX.
    """
    x = as_array("input", x)
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(
            "The images must be (n, height, width, channels), but their shape is "
            f"{shape}. For a single image, add the batch axis with x[None]."
        )
    return x


def require_image_size(x: Any, num_blocks: int) -> Array:
    """Each block halves the image, and at least one pixel must remain.

    Returns:
        An array of JAX.
    """
    x = require_images(x)
    shape = x.shape
    smallest = 2**num_blocks
    if min(shape[1:3]) < smallest:
        raise ValueError(
            f"{num_blocks} blocks, each halving the image, need images of at least {smallest}x"
            f"{smallest}, but these are {shape[1]}x{shape[2]}. Use fewer blocks or larger images."
        )
    return x


def require_resnet_depth(depth: Any) -> int:
    """A ResNet has 3 stages of n blocks of 2 layers, a first layer and a last one.

    Returns:
        The number n of blocks in a stage.
    """
    depth = require_integer("depth", depth)
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        below = 6 * blocks + 2
        nearest = f"{below} and {below + 6}" if blocks >= 1 else "8 and 14"
        raise ValueError(
            "depth must be a whole number 6n + 2, which is 3 stages of n blocks of 2 convolutions, "
            "a first convolution and a dense layer, with n at least 1, but "
            f"depth={depth}. The nearest that fit are {nearest}."
        )
    return blocks
