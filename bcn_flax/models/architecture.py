"""What the networks of linen and NNX share: sizes, layers without parameters, and rules."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

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


def require_blocks(blocks: Sequence[Sequence[int]]) -> None:
    """A VGG has at least one block, and a block at least one convolution."""
    if not blocks or not all(blocks):
        raise ValueError(
            "blocks must list the features of at least one convolution in each of at least one "
            f"block, but blocks={blocks}. An example: ((64, 64), (128, 128))."
        )


def require_images(shape: Sequence[int]) -> None:
    """Images come in a batch, with their channels last."""
    if len(shape) != 4:
        raise ValueError(
            "The images must be (n, height, width, channels), but their shape is "
            f"{tuple(shape)}. For a single image, add the batch axis with x[None]."
        )


def require_image_size(shape: Sequence[int], num_blocks: int) -> None:
    """Each block halves the image, and at least one pixel must remain."""
    require_images(shape)
    smallest = 2**num_blocks
    if min(shape[1:3]) < smallest:
        raise ValueError(
            f"{num_blocks} blocks, each halving the image, need images of at least {smallest}x"
            f"{smallest}, but these are {shape[1]}x{shape[2]}. Use fewer blocks or larger images."
        )


def require_resnet_depth(depth: int) -> int:
    """A ResNet has 3 stages of n blocks of 2 layers, a first layer and a last one.

    Returns:
        The number n of blocks in a stage.
    """
    blocks, rest = divmod(depth - 2, 6)
    if not isinstance(depth, int) or rest or blocks < 1:
        below = 6 * int(blocks) + 2
        nearest = f"{below} and {below + 6}" if blocks >= 1 else "8 and 14"
        raise ValueError(
            "depth must be a whole number 6n + 2, which is 3 stages of n blocks of 2 convolutions, "
            "a first convolution and a dense layer, with n at least 1, but "
            f"depth={depth}. The nearest that fit are {nearest}."
        )
    return blocks
