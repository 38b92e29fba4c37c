"""The ResNet for CIFAR in linen."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax import checks, convolution
from bcn_flax.linen import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import vgg
from bcn_flax.models.linen import call
from bcn_flax.norms import RunningVariance
from bcn_flax.weight_standardization import Standardization

WIDTHS = (16, 32, 64)
"""The channels of the three stages."""


class ResNet(nn.Module):
    """The ResNet for CIFAR: three stages of residual blocks, of 16, 32 and 64 channels.

    A 3x3 convolution of 16 channels, `n = (depth - 2) / 6` blocks in each stage, the second and
    third of which begin by halving the image, then the average of all pixels and a dense layer.
    Every convolution is followed by the norm, and has a bias of its own only where there is none.

    The shortcuts have no parameters, as in the published networks for CIFAR (there called option
    A): between stages they take every other pixel and add channels of zeros. A projection would
    need a norm of its own, and then what is compared from norm to norm were not the branches alone.

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
        norm: after each convolution: "bcn" (`BatchChannelNorm`), "bn" (`BatchNorm`), "gn" (Flax's
            `GroupNorm`) or "none".
        ws: whether the convolutions standardize their weights.
        num_groups: number of groups of the channel or group norm. With 8, those of the first stage
            have 2 channels; in groups of 1, the channel norm would undo the batch norm.
        estimate: see `BatchChannelNorm`.
        momentum: the weight of the old running average.
        epsilon: of the norms.
        dtype: of the computation; by default what the input and the parameters promote to.
        param_dtype: of the parameters.
        axis_name: axis of `vmap`, `shard_map` or `pmap` over which the batch is pooled.
        batch_epsilon: see `BatchChannelNorm`.
        running_variance: see `BatchNorm`.
        standardization: of the standardized weights.

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section
    4.2; weights are initialized as there, after He et al., arXiv 1502.01852.
    """

    depth: int = 20
    num_classes: int = 10
    norm: vgg.Norm = "bcn"
    ws: bool = True
    num_groups: int = 8
    estimate: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None
    batch_epsilon: float | None = None
    running_variance: RunningVariance = "biased"
    standardization: Standardization = Standardization()

    def setup(self) -> None:
        """Make the layers."""
        blocks_per_stage = checks.resnet_depth(self.depth)
        norm = vgg.choose_norm(self, BatchChannelNorm, BatchNorm, nn.GroupNorm)
        conv = partial(
            partial(WSConv, standardization=self.standardization) if self.ws else nn.Conv,
            kernel_size=(3, 3),
            padding=1,
            conv_general_dilated_cls=convolution.for_linen,
            use_bias=norm is None,
            kernel_init=nn.initializers.he_normal(),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        make_norm = norm or (lambda: _identity)
        self.first_conv = conv(WIDTHS[0])
        self.first_norm = make_norm()
        self.blocks = [
            ResidualBlock(features, 2 if stage > 0 and i == 0 else 1, conv, make_norm)
            for stage, features in enumerate(WIDTHS)
            for i in range(blocks_per_stage)
        ]
        self.fc = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n {self.num_classes}"]:
        """The logits of each image, of any size.

        Raises:
            ValueError: an argument is out of its range, groups do not divide the channels, or the
                images are not `(n, h, w, c)`.
        """
        checks.image_axes(x.shape)
        x = nn.relu(call(self.first_norm, self.first_conv(x), train))
        for block in self.blocks:
            x = block(x, train)
        return self.fc(x.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two convolutions with their norms, and a shortcut past them.

        y = relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))

    Attributes:
        features: number of channels of the output, at least that of the input.
        stride: of the first convolution and of the shortcut.
        conv: makes a convolution of so many features, with these strides.
        norm: makes a norm.
    """

    features: int
    stride: int
    conv: Callable[..., Callable[..., Array]]
    norm: Callable[[], Callable[..., Array]]

    def setup(self) -> None:
        """Make the layers."""
        self.convs = [self.conv(self.features, strides=s) for s in (self.stride, 1)]
        self.norms = [self.norm() for _ in self.convs]

    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n h2 w2 {self.features}"]:
        """The output, `stride` times as small."""
        y = nn.relu(call(self.norms[0], self.convs[0](x), train))
        y = call(self.norms[1], self.convs[1](y), train)
        return nn.relu(shortcut(x, self.features, self.stride) + y)


def shortcut(
    x: Float[Array, "n h w c"], features: int, stride: int
) -> Float[Array, "n h2 w2 {features}"]:
    """The input, each `stride`-th pixel of it, with channels of zeros after its own."""
    missing = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, missing)))


def _identity(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x
