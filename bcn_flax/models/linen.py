"""The networks in linen."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax.checks import require_flag
from bcn_flax.linen import BatchChannelNorm, WSConv
from bcn_flax.models import architecture, convolution
from bcn_flax.models.architecture import BLOCKS, WIDTHS, identity, max_pool, relu, shortcut

Make = Callable[..., Any]
"""A class of layers, or a `partial` of one."""

_CONV_3X3: dict[str, Any] = {
    "kernel_size": (3, 3),
    "padding": 1,
    "conv_general_dilated_cls": convolution.conv_general_dilated_cls,
}


class VGG(nn.Module):
    """A VGG: blocks of 3x3 convolution, norm and ReLU, each halving the image, then a dense layer.

    By default the network of the annotated implementation's CIFAR-10 experiment, with weight
    standardization and batch-channel normalization. The parameters have the names of its PyTorch
    modules, `layers.0` written as `layers_0`: see `bcn_flax.interop`.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from bcn_flax import BatchChannelNorm
        >>> from bcn_flax.models import VGG
        >>> norm = partial(BatchChannelNorm, num_groups=16)
        >>> model = VGG(blocks=((32, 32), (64, 64)), conv=nn.Conv, norm=norm)
        >>> images = jnp.ones((1, 8, 8, 1))
        >>> logits, variables = model.init_with_output(jax.random.key(0), images, train=False)

    Attributes:
        blocks: the features of each convolution, block by block.
        num_classes: number of logits.
        conv: the class of the convolutions, `WSConv` or `nn.Conv`, or a `partial` of one. On a CPU
            they compute small images as in `bcn_flax.models.convolution`.
        norm: the class of the norms, for example `BatchChannelNorm`, `nn.BatchNorm` or
            `nn.GroupNorm`, or a `partial` of one; None for no norms. Norms whose call takes
            `use_running_average` are given `not train`.
        dtype: of the computation, in all layers; by default what the input and the parameters
            promote to.
        param_dtype: of the parameters.

    Source: Simonyan and Zisserman, arXiv 1409.1556; configuration from the annotated
    implementation, `labml_nn/normalization/weight_standardization/experiment.py`.
    """

    blocks: Sequence[Sequence[int]] = BLOCKS
    num_classes: int = 10
    conv: Make = WSConv
    norm: Make | None = BatchChannelNorm
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Make the layers."""
        num_classes = architecture.require_layers(self.num_classes, self.conv, self.norm)
        blocks = architecture.require_blocks(self.blocks)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(self.conv, **_CONV_3X3, **dtypes)
        layers: list[Callable[..., Array]] = []
        for block in blocks:
            for features in block:
                layers.append(conv(features))
                if self.norm is not None:
                    layers.append(self.norm(**dtypes))
                layers.append(relu)
            layers.append(max_pool)
        self.layers = layers
        self.fc = nn.Dense(num_classes, **dtypes)

    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n {self.num_classes}"]:
        """The logits of each image.

        Raises:
            ValueError: `blocks` has an empty block or none, the blocks would pool the image away,
                or it is not `(n, h, w, c)`.
        """
        x, train = (
            architecture.require_image_size(x, len(self.blocks)),
            require_flag("train", train),
        )
        for layer in self.layers:
            x = _call(layer, x, train)
        return self.fc(x.mean((1, 2)))


class ResNet(nn.Module):
    """The ResNet for CIFAR: three stages of residual blocks, of 16, 32 and 64 channels.

    A 3x3 convolution of 16 channels, `n = (depth - 2) / 6` blocks in each stage, then the average
    of all pixels and a dense layer. The second and the third stage begin by halving the image.
    Every convolution is followed by the norm, and has a bias only if there is no norm.

    The shortcuts have no parameters, as in the published networks for CIFAR (option A there):
    between stages they take every other pixel and add channels of zeros. A projection would need a
    norm of its own, and a comparison of two norms would then compare more than the branches.

    The last scale of each branch starts at 1. To start it at 0, each block as the identity, is a
    later finding about large batches (Goyal et al., arXiv 1706.02677), not part of this network.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.models import ResNet
        >>> model = ResNet(depth=8)
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> logits, variables = model.init_with_output(jax.random.key(0), images, train=False)

    Attributes:
        depth: number of layers with weights, `6n + 2`: 20, 32, 44, 56 and 110 are published.
        num_classes: number of logits.
        conv: as in `VGG`.
        norm: as in `VGG`. The first stage has 16 channels, so that 8 groups have 2 each; in groups
            of 1, the channel norm would undo the batch norm.
        dtype: as in `VGG`.
        param_dtype: of the parameters.

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section
    4.2; weights are initialized as there, after He et al., arXiv 1502.01852.
    """

    depth: int = 20
    num_classes: int = 10
    conv: Make = WSConv
    norm: Make | None = partial(BatchChannelNorm, num_groups=8)
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Make the layers."""
        num_classes = architecture.require_layers(self.num_classes, self.conv, self.norm)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = partial(
            self.conv,
            use_bias=self.norm is None,
            kernel_init=nn.initializers.he_normal(),
            **_CONV_3X3,
            **dtypes,
        )
        norm = (lambda: identity) if self.norm is None else partial(self.norm, **dtypes)
        self.first_conv = conv(WIDTHS[0])
        self.first_norm = norm()
        self.blocks = [
            ResidualBlock(features, stride, conv, norm)
            for features, stride in architecture.residual_blocks(self.depth)
        ]
        self.fc = nn.Dense(num_classes, **dtypes)

    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n {self.num_classes}"]:
        """The logits of each image, of any size.

        Raises:
            ValueError: the depth is not `6n + 2`, or the images are not `(n, h, w, c)`.
        """
        x, train = architecture.require_images(x), require_flag("train", train)
        x = relu(_call(self.first_norm, self.first_conv(x), train))
        for block in self.blocks:
            x = block(x, train)
        return self.fc(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions with their norms, and a shortcut past them.

        y = relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))

    Attributes:
        features: number of channels of the output, at least that of the input.
        stride: of the first convolution and of the shortcut.
        conv: makes a convolution, given the number of its features and its strides.
        norm: makes a norm.
    """

    features: int
    stride: int
    conv: Make
    norm: Make

    def setup(self) -> None:
        """Make the layers."""
        self.convs = [self.conv(self.features, strides=s) for s in (self.stride, 1)]
        self.norms = [self.norm() for _ in self.convs]

    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n h2 w2 {self.features}"]:
        """The output, its height and width divided by `stride`, rounded up."""
        y = relu(_call(self.norms[0], self.convs[0](x), train))
        y = _call(self.norms[1], self.convs[1](y), train)
        return relu(shortcut(x, self.features, self.stride) + y)


def _call(layer: Callable[..., Array], x: Array, train: bool) -> Array:
    """The output of a layer, which is told whether it trains if it takes `use_running_average`."""
    if "use_running_average" in inspect.signature(layer).parameters:
        return layer(x, use_running_average=not train)
    return layer(x)
