"""The networks in NNX."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax.checks import require_count
from bcn_flax.models import architecture
from bcn_flax.models.architecture import BLOCKS, WIDTHS, identity, max_pool, relu, shortcut
from bcn_flax.models.convolution import conv_general_dilated
from bcn_flax.nnx import BatchChannelNorm, WSConv

Make = Callable[..., Any]
"""A class of layers, or a `partial` of one."""

_CONV_3X3: dict[str, Any] = {
    "kernel_size": (3, 3),
    "padding": 1,
    "conv_general_dilated": conv_general_dilated,
}
_EIGHT_GROUPS = partial(BatchChannelNorm, num_groups=8)


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
        found = architecture.require_blocks(blocks)
        num_classes = architecture.require_layers(num_classes, conv, norm)
        self.halvings = len(found)
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        layers: list[Callable[..., Array]] = []
        last = require_count("in_channels", in_channels)
        for block in found:
            for features in block:
                layers.append(conv(last, features, **_CONV_3X3, **shared))
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
        x = architecture.require_image_size(x, self.halvings)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))


class ResNet(nnx.Module):
    """`bcn_flax.models.ResNet` in NNX: its `blocks_0/convs_1` is `blocks[0].convs[1]` here.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.models.nnx import ResNet
        >>> model = ResNet(depth=8, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> logits = model(jnp.ones((1, 32, 32, 3)))
    """

    def __init__(
        self,
        depth: int = 20,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        conv: Make = WSConv,
        norm: Make | None = _EIGHT_GROUPS,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the layers.

        Args:
            depth: number of layers with weights, `6n + 2`: 20, 32, 44, 56 and 110 are published.
            in_channels: channels of the images.
            num_classes: number of logits.
            conv: as in `VGG`.
            norm: as in `VGG`, by default `BatchChannelNorm` with 8 groups.
            dtype: as in `VGG`.
            param_dtype: of the parameters.
            rngs: random numbers for the initializers.

        Raises:
            ValueError: the depth is not `6n + 2`, or groups do not divide the channels.
        """
        num_classes = architecture.require_layers(num_classes, conv, norm)
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = partial(
            conv,
            use_bias=norm is None,
            kernel_init=nnx.initializers.he_normal(),
            **_CONV_3X3,
            **shared,
        )
        norm = (lambda _: identity) if norm is None else partial(norm, **shared)
        last = WIDTHS[0]
        self.first_conv = conv(require_count("in_channels", in_channels), last)
        self.first_norm = norm(last)
        blocks = []
        for features, stride in architecture.residual_blocks(depth):
            blocks.append(ResidualBlock(last, features, stride, conv, norm))
            last = features
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(last, num_classes, **shared)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """The logits of each image, of any size.

        Raises:
            ValueError: the images are not `(n, h, w, c)`.
        """
        x = architecture.require_images(x)
        x = relu(self.first_norm(self.first_conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


class ResidualBlock(nnx.Module):
    """`bcn_flax.models.linen.ResidualBlock` in NNX."""

    def __init__(
        self, in_features: int, features: int, stride: int, conv: Make, norm: Make
    ) -> None:
        """Make the layers.

        Args:
            in_features: number of channels of the input.
            features: number of channels of the output, at least that of the input.
            stride: of the first convolution and of the shortcut.
            conv: makes a convolution, given the numbers of its channels and its strides.
            norm: makes a norm, given the number of its channels.
        """
        self.features = features
        self.stride = stride
        first = conv(in_features, features, strides=stride)
        self.convs = nnx.List([first, conv(features, features)])
        self.norms = nnx.List([norm(features) for _ in self.convs])

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        """The output, its height and width divided by `stride`, rounded up."""
        y = relu(self.norms[0](self.convs[0](x)))
        y = self.norms[1](self.convs[1](y))
        return relu(shortcut(x, self.features, self.stride) + y)
