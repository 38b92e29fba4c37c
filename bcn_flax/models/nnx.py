"""The networks in NNX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax.models import architecture
from bcn_flax.models.architecture import BLOCKS, max_pool, relu
from bcn_flax.models.convolution import conv_general_dilated
from bcn_flax.nnx import BatchChannelNorm, WSConv

Make = Callable[..., Any]
"""A class of layers, or a `partial` of one."""


class VGG(nnx.Module):
    """`bcn_flax.models.VGG` in NNX, with the same parameters: `layers_0` there is `layers[0]` here.

    Example:
        >>> from functools import partial
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.models.nnx import VGG
        >>> from bcn_flax.nnx import BatchChannelNorm
        >>> norm = partial(BatchChannelNorm, num_groups=16)
        >>> model = VGG(blocks=((32,), (64,)), in_channels=1, norm=norm, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> logits = model(jnp.ones((1, 8, 8, 1)))
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]] = BLOCKS,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        conv: Make = WSConv,
        norm: Make | None = BatchChannelNorm,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the layers.

        Args:
            blocks: the features of each convolution, block by block.
            in_channels: channels of the images.
            num_classes: number of logits.
            conv: the class of the convolutions, `WSConv` or `nnx.Conv`, or a `partial` of one. On a
                CPU they compute small images as in `bcn_flax.models.convolution`.
            norm: the class of the norms, for example `BatchChannelNorm`, `nnx.BatchNorm` or
                `nnx.GroupNorm`, or a `partial` of one; None for no norms.
            dtype: of the computation, in all layers; by default what the input and the parameters
                promote to.
            param_dtype: of the parameters.
            rngs: random numbers for the initializers.

        Raises:
            ValueError: `blocks` has an empty block or none, or groups do not divide the channels.
        """
        architecture.require_blocks(blocks)
        self.halvings = len(blocks)
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        small: dict[str, Any] = {"conv_general_dilated": conv_general_dilated}
        layers: list[Callable[..., Array]] = []
        last = in_channels
        for block in blocks:
            for features in block:
                layers.append(conv(last, features, (3, 3), padding=1, **small, **shared))
                if norm is not None:
                    layers.append(norm(features, **shared))
                layers.append(relu)
                last = features
            layers.append(max_pool)
        self.layers = nnx.List(layers)
        self.fc = nnx.Linear(last, num_classes, **shared)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """The logits of each image.

        Raises:
            ValueError: the blocks would pool the image away, or it is not `(n, h, w, c)`.
        """
        architecture.require_image_size(x.shape, self.halvings)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))
