"""The layers as Flax linen modules.

They own the parameters and running averages; `bcn_flax.norms` does the rest. The method `affine` of
a normalization layer gives the affine map for the moments of an input. Layers are composed with it:
see `BatchChannelNorm.affine`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from bcn_flax import checks, norms
from bcn_flax.affine import Affine, Moments, followed_by
from bcn_flax.norms import RunningVariance
from bcn_flax.passes import promote
from bcn_flax.weight_standardization import (
    Standardization,
    require_standardization,
    standardize_kernel,
)


class _Norm(nn.Module):
    """Base of the normalization layers: checks the arguments."""

    def __post_init__(self) -> None:
        for name, value in norms.require_arguments(vars(self)).items():
            setattr(self, name, value)
        super().__post_init__()


class _WithRunningAverages(_Norm):
    """Base of the layers with running averages: the arguments of `nn.BatchNorm` and the call."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    running_variance: RunningVariance = "biased"
    update_stats: bool | None = None

    def __call__(
        self,
        x: Float[Array, "n *space c"],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        update_stats: bool | None = None,
    ) -> Float[Array, "n *space c"]:
        """Normalize `x`; `mask` is true where a value counts in the mean and variance.

        Raises:
            ValueError: the input cannot be normalized, an argument is out of its range, or
                `use_running_average` is given neither here nor in the constructor.
        """
        evaluate = checks.require_running_average_flag(
            type(self).__name__, self.use_running_average, use_running_average
        )
        update = norms.should_update_stats(evaluate, self.update_stats, update_stats)
        return norms.normalize(self, x, mask, lambda m: self.affine(m, evaluate, update))

    def affine(self, m: Moments, use_running_average: bool, update_stats: bool) -> Affine:
        """The map for an input with moments `m`; `update_stats` updates the running averages."""
        raise NotImplementedError


class BatchNorm(_WithRunningAverages):
    """Batch normalization: `flax.linen.BatchNorm`, but accurate at large means and with masks.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    In training `mean` and `var` (biased) are those of each channel of the batch, and the running
    averages are updated; in evaluation they are the running averages.

    Parameters are `scale` and `bias`, `(c,)`; statistics are `mean` and `var`, `(c,)`, in the
    collection `batch_stats`, in float32 or wider. Initialization does not update them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.linen import BatchNorm
        >>> layer = BatchNorm(use_running_average=False)
        >>> x = jnp.ones((4, 8, 8, 32))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])

    Attributes:
        use_running_average: true in evaluation, false in training; the call can override it.
        axis: the channel axis; axis 0 is the batch axis.
        momentum: the weight of the old running average; `nn.BatchNorm` has 0.99.
        epsilon: added to the variance, inside the square root.
        dtype: dtype of the result; by default the promoted dtype of input and parameters.
        param_dtype: dtype of the parameters.
        use_bias: whether to learn a bias.
        use_scale: whether to learn a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of `vmap`, `shard_map` or `pmap` over which batch statistics are pooled. The
            input on each device still has a batch axis, at least of length 1. Under `jit` with a
            sharded batch none is needed: the statistics are those of the whole batch.
        axis_index_groups: groups of devices on that axis; each pools its own statistics.
        running_variance: the variance in the running averages: "biased", of the batch around its
            own mean; "unbiased", with Bessel's correction, as in PyTorch; or
            "around_running_mean", of the batch around the old running mean.
        update_stats: whether to update the running averages; by default in training only. True in
            evaluation normalizes with the averages before the update. The call can override it.

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167.
    """

    estimate: ClassVar[bool] = False

    @nn.compact
    def affine(self, m: Moments, use_running_average: bool, update_stats: bool) -> Affine:
        """The map for an input with moments `m`; `update_stats` updates the running averages."""
        channels = m.mean.shape[1]
        dtype = promote(self.param_dtype, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), dtype)
        initializing = self.is_initializing()
        f, stats = norms.batch_norm(
            m,
            (mean.value, var.value),
            _learned(self, channels),
            use_running_average=use_running_average,
            update_stats=update_stats,
            estimate=self.estimate,
            momentum=self.momentum,
            epsilon=self.epsilon,
            running_variance=self.running_variance,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            initializing=initializing,
        )
        if update_stats and not initializing:
            mean.value, var.value = stats
        return f


class EstimatedBatchNorm(BatchNorm):
    """Batch normalization with the running averages in training too, for tiny batches.

    In training it first updates the running averages and then normalizes with them; no gradient
    flows through them. Evaluation, parameters, statistics and attributes are those of `BatchNorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.linen import EstimatedBatchNorm
        >>> layer = EstimatedBatchNorm(use_running_average=False)
        >>> x = jnp.ones((1, 8, 8, 32))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])

    On its own it trains unstably: nothing bounds the scale of its output while the running averages
    lag behind. In `BatchChannelNorm` the channel norm bounds it.

    Source: Qiao et al., arXiv 1903.10520, for the statistics of micro-batches.
    """

    estimate: ClassVar[bool] = True


class ChannelNorm(_Norm):
    """Normalize each group of channels of each sample, with one scale and bias per group.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    `flax.linen.GroupNorm` is the same with one scale and bias per channel.

    Parameters are `scale` and `bias`, `(groups,)`. There are no running averages: training and
    evaluation are the same.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.linen import ChannelNorm
        >>> layer = ChannelNorm(num_groups=8)
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 32)))

    Attributes:
        num_groups: number of groups of consecutive channels.
        group_size: number of channels per group, instead of `num_groups`, which must then be None.
        axis: the channel axis; axis 0 is the batch axis.
        epsilon: added to the variance, inside the square root.
        dtype: dtype of the result; by default the promoted dtype of input and parameters.
        param_dtype: dtype of the parameters.
        use_bias: whether to learn a bias.
        use_scale: whether to learn a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.

    Source: Qiao et al., arXiv 1903.10520; an affine map for each group as in the authors' code.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    axis: int = -1
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones

    def __call__(
        self, x: Float[Array, "n *space c"], *, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "n *space c"]:
        """Normalize `x`; `mask` is true where a value counts in the mean and variance.

        Raises:
            ValueError: the input cannot be normalized, an argument is out of its range, or the
                groups do not divide the channels.
        """
        return norms.normalize(self, x, mask, self.affine)

    @nn.compact
    def affine(self, m: Moments) -> Affine:
        """The map for an input with moments `m`."""
        groups = checks.require_group_count(m.mean.shape[1], self.num_groups, self.group_size)
        return norms.channel_norm(m, _learned(self, groups), self.epsilon)


class BatchChannelNorm(_WithRunningAverages):
    """Batch-channel normalization: a batch norm, then a channel norm, as one affine map.

    A drop-in replacement for `flax.linen.BatchNorm`. The batch norm keeps channels from collapsing,
    which a channel norm alone cannot; the channel norm keeps training with running averages stable,
    so that a batch of one image is enough. Use several channels per group: with one, the channel
    norm undoes the batch norm.

    Parameters are `batch_norm/{scale,bias}`, `(c,)`, and `channel_norm/{scale,bias}`, `(groups,)`;
    statistics are `batch_norm/{mean,var}`, `(c,)`, in the collection `batch_stats`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.linen import BatchChannelNorm
        >>> layer = BatchChannelNorm(num_groups=8, use_running_average=False)
        >>> x = jnp.ones((1, 8, 8, 32))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])

    Attributes:
        use_running_average: true in evaluation, false in training; the call can override it.
        axis: the channel axis; axis 0 is the batch axis.
        momentum: the weight of the old running average; `nn.BatchNorm` has 0.99.
        epsilon: added to both variances, inside the square root.
        dtype: dtype of the result; by default the promoted dtype of input and parameters.
        param_dtype: dtype of the parameters.
        use_bias: whether both norms learn a bias.
        use_scale: whether both norms learn a scale.
        bias_init: initializer of the channel norm's bias; the batch norm's starts at 0.
        scale_init: initializer of the channel norm's scale; the batch norm's starts at 1. With
            zeros a residual block starts as the identity. Metadata of the two initializers, as of
            `nn.with_partitioning(ones, ("model",))`, is given to both norms.
        axis_name: axis of `vmap`, `shard_map` or `pmap` over which batch statistics are pooled. The
            input on each device still has a batch axis, at least of length 1. Under `jit` with a
            sharded batch none is needed: the statistics are those of the whole batch.
        axis_index_groups: groups of devices on that axis; each pools its own statistics.
        running_variance: the variance in the running averages: "biased", of the batch around its
            own mean; "unbiased", with Bessel's correction, as in PyTorch; or
            "around_running_mean", of the batch around the old running mean.
        update_stats: whether to update the running averages; by default in training only. True in
            evaluation normalizes with the averages before the update. The call can override it.
        num_groups: number of groups of consecutive channels.
        group_size: number of channels per group, instead of `num_groups`, which must then be None.
        estimate: whether the batch norm uses the running averages in training too
            (`EstimatedBatchNorm`) or the batch statistics (`BatchNorm`), for large batches.
        batch_epsilon: epsilon of the batch norm; by default `epsilon`.

    `bcn_flax.variants.BCN` has the arguments of each published implementation.

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", arXiv 1903.10520.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    estimate: bool = True
    batch_epsilon: float | None = None

    @nn.compact
    def affine(self, m: Moments, use_running_average: bool, update_stats: bool) -> Affine:
        """The map for an input with moments `m`; `update_stats` updates the running averages."""
        shared: dict[str, Any] = {
            "param_dtype": self.param_dtype,
            "use_bias": self.use_bias,
            "use_scale": self.use_scale,
        }
        batch_norm = (EstimatedBatchNorm if self.estimate else BatchNorm)(
            momentum=self.momentum,
            epsilon=self.epsilon if self.batch_epsilon is None else self.batch_epsilon,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            running_variance=self.running_variance,
            bias_init=_with_metadata_of(self.bias_init, initializers.zeros),
            scale_init=_with_metadata_of(self.scale_init, initializers.ones),
            name="batch_norm",
            **shared,
        )
        channel_norm = ChannelNorm(
            num_groups=self.num_groups,
            group_size=self.group_size,
            epsilon=self.epsilon,
            bias_init=self.bias_init,
            scale_init=self.scale_init,
            name="channel_norm",
            **shared,
        )
        f = batch_norm.affine(m, use_running_average, update_stats)
        return followed_by(f, m, channel_norm.affine)


class _StandardizedKernel(nn.Module):
    """Standardize the parameter `kernel` at each use. The raw kernel is stored and trained."""

    standardization: Standardization = Standardization()

    def __post_init__(self) -> None:
        self.standardization = require_standardization(self.standardization)
        super().__post_init__()

    @nn.nowrap
    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        # A transposed convolution may have the last two axes of its kernel exchanged, and any
        # convolution a mask of zeros and ones.
        axis = -2 if getattr(self, "transpose_kernel", False) else -1
        mask = getattr(self, "mask", None)
        gain = None
        if self.standardization.gain:
            gain = super().param("gain", initializers.ones, (value.shape[axis],), value.dtype)
        return standardize_kernel(
            value,
            self.standardization,
            gain=gain,
            axis=axis,
            mask=None if mask is None else jnp.asarray(mask) != 0,
        )


class WSConv(_StandardizedKernel, nn.Conv):
    """`flax.linen.Conv` with weight standardization: see `standardize_kernel`.

    It has the arguments and parameters of `nn.Conv`, and `standardization`, see `Standardization`.
    Each call standardizes the kernel, in float32 or wider, before the cast to `dtype`; the
    parameter stays raw.

    Follow it with a normalization layer: standardized kernels cannot learn a scale.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.linen import WSConv
        >>> layer = WSConv(features=64, kernel_size=(3, 3))
        >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    """


class WSConvTranspose(_StandardizedKernel, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with weight standardization, as `WSConv`."""


class WSDense(_StandardizedKernel, nn.Dense):
    """`flax.linen.Dense` with weight standardization, as `WSConv`."""


def _with_metadata_of(init: Initializer, constant: Initializer) -> Initializer:
    """`constant`, with the metadata of `init`, for example of `nn.with_partitioning`."""

    def initialize(*args: Any) -> Any:
        return meta.replace_boxed(init(*args), constant(*args))

    return initialize


def _learned(norm: BatchNorm | ChannelNorm, size: int) -> Affine:
    """The scale and bias of a norm as a map, `(1, size)`."""
    shape, dtype = (size,), norm.param_dtype
    scale = norm.param("scale", norm.scale_init, shape, dtype) if norm.use_scale else None
    bias = norm.param("bias", norm.bias_init, shape, dtype) if norm.use_bias else None
    return norms.learned_affine(scale, bias, size, dtype)
