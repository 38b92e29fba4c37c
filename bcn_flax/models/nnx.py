"""The networks in NNX."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax import checks
from bcn_flax.convolution import conv_general_dilated
from bcn_flax.models import vgg
from bcn_flax.nnx import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.norms import RunningVariance
from bcn_flax.weight_standardization import Standardization


class VGG(nnx.Module):
    """`bcn_flax.models.VGG` in NNX, with the same parameters: `layers_0` there is `layers[0]` here.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.models.nnx import VGG
        >>> model = VGG(blocks=((32, 32), (64, 64)), in_channels=1, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> logits = model(jnp.ones((1, 8, 8, 1)))
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]] = vgg.BLOCKS,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: vgg.Norm = "bcn",
        ws: bool = True,
        num_groups: int = 32,
        estimate: bool = True,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        axis_name: str | None = None,
        batch_epsilon: float | None = None,
        running_variance: RunningVariance = "biased",
        standardization: Standardization = Standardization(),
        rngs: nnx.Rngs,
    ) -> None:
        """Make the layers.

        Args:
            blocks: the features of each convolution, block by block.
            in_channels: channels of the images.
            num_classes: number of logits.
            norm: after each convolution: "bcn" (`BatchChannelNorm`), "bn" (`BatchNorm`), "gn"
                (Flax's `GroupNorm`) or "none".
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
            rngs: random numbers for the initializers.

        Raises:
            ValueError: an argument is out of its range, or groups do not divide the channels.
        """
        self.halvings = len(blocks)
        self.norm = norm
        self.num_groups = num_groups
        self.estimate = estimate
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name
        self.batch_epsilon = batch_epsilon
        self.running_variance = running_variance
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        convolution = partial(WSConv, standardization=standardization) if ws else nnx.Conv
        widths = iter((in_channels, *chain(*blocks)))

        def conv(features: int) -> Callable[..., Array]:
            return convolution(
                next(widths),
                features,
                kernel_size=(3, 3),
                padding=1,
                conv_general_dilated=conv_general_dilated,
                **shared,
            )

        make_norm = vgg.choose_norm(self, BatchChannelNorm, BatchNorm, nnx.GroupNorm)
        self.layers = nnx.List(
            vgg.layers(blocks, conv, make_norm and partial(make_norm, rngs=rngs))
        )
        self.fc = nnx.Linear(next(widths), num_classes, **shared)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        """The logits of each image.

        Raises:
            ValueError: the blocks would pool the image away, or it is not `(n, h, w, c)`.
        """
        checks.image_size(x.shape, self.halvings)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((1, 2)))
