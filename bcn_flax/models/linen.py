"""The VGG in linen."""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax import checks, convolution
from bcn_flax.linen import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import vgg
from bcn_flax.norms import RunningVariance
from bcn_flax.weight_standardization import Standardization


class VGG(nn.Module):
    """A VGG: blocks of 3x3 convolution, norm and ReLU, each halving the image, then a dense layer.

    By default the network of the annotated implementation's CIFAR-10 experiment, with weight
    standardization and batch-channel normalization. The parameters have the names of its PyTorch
    modules, `layers.0` written as `layers_0`: see `bcn_flax.interop`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.models import VGG
        >>> model = VGG(blocks=((32, 32), (64, 64)))
        >>> images = jnp.ones((1, 8, 8, 1))
        >>> logits, variables = model.init_with_output(jax.random.key(0), images, train=False)

    Attributes:
        blocks: the features of each convolution, block by block.
        num_classes: number of logits.
        norm: after each convolution: "bcn" (`BatchChannelNorm`), "bn" (`BatchNorm`), "gn" (Flax's
            `GroupNorm`) or "none".
        ws: whether the convolutions standardize their weights.
        num_groups: number of groups of the channel or group norm.
        estimate: see `BatchChannelNorm`.
        momentum: the weight of the old running average.
        epsilon: of the norms.
        dtype: of the computation; by default what the input and the parameters promote to.
        param_dtype: of the parameters.
        axis_name: axis of `vmap`, `shard_map` or `pmap` over which the batch is pooled.
        batch_epsilon: see `BatchChannelNorm`.
        running_variance: see `BatchNorm`.
        standardization: of the standardized weights.

    Source: Simonyan and Zisserman, arXiv 1409.1556; configuration from the annotated
    implementation, `labml_nn/normalization/weight_standardization/experiment.py`.
    """

    blocks: Sequence[Sequence[int]] = vgg.BLOCKS
    num_classes: int = 10
    norm: vgg.Norm = "bcn"
    ws: bool = True
    num_groups: int = 32
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
        norm = vgg.choose_norm(self, BatchChannelNorm, BatchNorm, nn.GroupNorm)
        conv = partial(
            partial(WSConv, standardization=self.standardization) if self.ws else nn.Conv,
            kernel_size=(3, 3),
            padding=1,
            conv_general_dilated_cls=convolution.for_linen,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.layers = list(vgg.layers(self.blocks, conv, norm and (lambda _: norm())))
        self.fc = nn.Dense(self.num_classes, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(
        self, x: Float[Array, "n h w c"], train: bool
    ) -> Float[Array, "n {self.num_classes}"]:
        """The logits of each image.

        Raises:
            ValueError: the blocks would pool the image away, or it is not `(n, h, w, c)`.
        """
        checks.image_size(x.shape, len(self.blocks))
        for layer in self.layers:
            x = call(layer, x, train)
        return self.fc(x.mean((1, 2)))


def call(layer: Callable[..., Array], x: Array, train: bool) -> Array:
    """The output of a layer; those with running averages have to know whether they train."""
    if isinstance(layer, BatchChannelNorm | BatchNorm):
        return layer(x, use_running_average=not train)
    return layer(x)
