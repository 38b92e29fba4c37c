"""The layers as Flax NNX modules: those of `bcn_flax.linen`, with the same names and results.

They own the parameters and running averages; `bcn_flax.norms` does the rest. The method `affine` of
a normalization layer gives the affine map for the moments of an input. Layers are composed with it:
see `BatchChannelNorm.affine`.

The docstrings describe what is different in NNX; those of `bcn_flax.linen` have the equations.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jaxtyping import Array, Bool, Float

from bcn_flax import checks, norms
from bcn_flax.affine import Affine, Moments, followed_by
from bcn_flax.norms import RunningVariance
from bcn_flax.passes import promote
from bcn_flax.weight_standardization import (
    Standardization,
    require_fan_in,
    require_standardization,
    standardize_kernel,
)

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class _Norm(nnx.Module):
    """Base of the normalization layers."""

    num_features: int
    axis: int
    epsilon: Any
    dtype: Dtype | None
    param_dtype: Dtype
    use_bias: bool
    use_scale: bool

    def _set(self, **arguments: Any) -> None:
        """Set the attributes of these names, checked."""
        for name, value in norms.require_arguments(arguments).items():
            # A number that is traced is part of the module's state.
            setattr(self, name, nnx.data(value) if isinstance(value, jax.core.Tracer) else value)

    def _parameter(
        self,
        name: str,
        init: Initializer,
        shape: tuple[int, ...],
        metadata: Mapping[str, Any],
        rngs: nnx.Rngs,
    ) -> nnx.Param[Array] | None:
        checks.require_callable(f"{name}_init", init)
        if not getattr(self, f"use_{name}"):
            return nnx.data(None)  # data, so that a parameter can replace it later
        return nnx.Param(init(rngs.params(), shape, self.param_dtype), **metadata)

    @property
    def affine(self) -> Callable[..., Affine]:
        """The method `_affine`, which gives the map for an input from its moments.

        A property: `nnx.tabulate` wraps public methods, and cannot describe moments as arguments.
        """
        return self._affine

    def _affine(self, *args: Any) -> Affine:
        raise NotImplementedError


class _WithRunningAverages(_Norm):
    """Base of the layers with running averages: the call and the view."""

    momentum: Any
    axis_name: str | None
    axis_index_groups: Sequence[Sequence[int]] | None
    running_variance: RunningVariance
    use_running_average: bool | None
    update_stats: bool | None

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
            ValueError: the input cannot be normalized, or `use_running_average` is given neither
                here nor in the layer.
        """
        evaluate = checks.require_running_average_flag(
            type(self).__name__, self.use_running_average, use_running_average
        )
        update = norms.should_update_stats(evaluate, self.update_stats, update_stats)
        return norms.normalize(self, x, mask, lambda m: self.affine(m, evaluate, update))

    def set_view(
        self, use_running_average: bool | None = None, update_stats: bool | None = None
    ) -> None:
        """Set what `nnx.view` sets; `nnx.view_info` needs this indentation.

        Args:
          use_running_average: true in evaluation, false in training.
          update_stats: whether a call updates the running averages.
        """
        if use_running_average is not None:
            self._set(use_running_average=use_running_average)
        if update_stats is not None:
            self._set(update_stats=update_stats)


class BatchNorm(_WithRunningAverages):
    """`bcn_flax.linen.BatchNorm` in NNX: a drop-in replacement for `flax.nnx.BatchNorm`.

    Parameters are `scale` and `bias`, statistics `mean` and `var`, all `(num_features,)`; the
    statistics are of the type `nnx.BatchStat`, in float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.nnx import BatchNorm
        >>> layer = BatchNorm(32, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.ones((4, 8, 8, 32)))  # training: updates the statistics
        >>> y = nnx.view(layer, use_running_average=True)(y)  # evaluation
    """

    estimate: ClassVar[bool] = False

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        running_variance: RunningVariance = "biased",
        update_stats: bool | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
    ) -> None:
        """Start from mean 0 and variance 1.

        Args:
            num_features: number of channels of the input.
            use_running_average: true in evaluation, false in training; `.train()`, `.eval()` and
                `nnx.view` set it, and the call can override it.
            axis: the channel axis; axis 0 is the batch axis.
            momentum: the weight of the old running average; `nnx.BatchNorm` has 0.99.
            epsilon: added to the variance, inside the square root.
            dtype: dtype of the result; by default the promoted dtype of input and parameters.
            param_dtype: dtype of the parameters.
            use_bias: whether to learn a bias.
            use_scale: whether to learn a scale.
            bias_init: initializer of the bias.
            scale_init: initializer of the scale.
            axis_name: axis of `vmap`, `shard_map` or `pmap` over which batch statistics are pooled.
            axis_index_groups: groups of devices on that axis; each pools its own statistics.
            running_variance: the variance in the running averages, see `bcn_flax.linen.BatchNorm`.
            update_stats: whether to update the running averages; by default in training only.
            rngs: random numbers for the initializers.
            bias_metadata: metadata of the bias, for example its sharding.
            scale_metadata: metadata of the scale.

        Raises:
            ValueError: an argument is out of its range.
        """
        self.num_features = checks.require_count("num_features", num_features)
        self._set(
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            running_variance=running_variance,
            update_stats=update_stats,
        )
        shape, stats_dtype = (self.num_features,), promote(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(shape, stats_dtype))
        self.var = nnx.BatchStat(jnp.ones(shape, stats_dtype))
        self.scale = self._parameter("scale", scale_init, shape, scale_metadata, rngs)
        self.bias = self._parameter("bias", bias_init, shape, bias_metadata, rngs)

    def _affine(self, m: Moments, use_running_average: bool, update_stats: bool) -> Affine:
        """The map for an input with moments `m`; `update_stats` updates the running averages."""
        _require_num_features(m.mean.shape[1], self.num_features)
        f, stats = norms.batch_norm(
            m,
            (self.mean[...], self.var[...]),
            _learned(self, self.num_features),
            use_running_average=use_running_average,
            update_stats=update_stats,
            estimate=self.estimate,
            momentum=self.momentum,
            epsilon=self.epsilon,
            running_variance=self.running_variance,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
        )
        if update_stats:
            self.mean[...], self.var[...] = stats
        return f


class EstimatedBatchNorm(BatchNorm):
    """`bcn_flax.linen.EstimatedBatchNorm` in NNX; its arguments are those of `BatchNorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.nnx import EstimatedBatchNorm
        >>> y = EstimatedBatchNorm(32, rngs=nnx.Rngs(0))(jnp.ones((1, 8, 8, 32)))
    """

    estimate: ClassVar[bool] = True


class ChannelNorm(_Norm):
    """`bcn_flax.linen.ChannelNorm` in NNX: one scale and bias per group.

    Parameters are `scale` and `bias`, `(groups,)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.nnx import ChannelNorm
        >>> y = ChannelNorm(32, num_groups=8, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 4, 32)))
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        axis: int = -1,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
    ) -> None:
        """Start from scale 1 and bias 0.

        Args:
            num_features: number of channels of the input.
            num_groups: number of groups of consecutive channels.
            group_size: number of channels per group; requires `num_groups=None`.
            axis: the channel axis; axis 0 is the batch axis.
            epsilon: added to the variance, inside the square root.
            dtype: dtype of the result; by default the promoted dtype of input and parameters.
            param_dtype: dtype of the parameters.
            use_bias: whether to learn a bias.
            use_scale: whether to learn a scale.
            bias_init: initializer of the bias.
            scale_init: initializer of the scale.
            rngs: random numbers for the initializers.
            bias_metadata: metadata of the bias, for example its sharding.
            scale_metadata: metadata of the scale.

        Raises:
            ValueError: epsilon is out of its range, or the groups do not divide the channels.
        """
        self.num_features = checks.require_count("num_features", num_features)
        self.num_groups = checks.require_group_count(self.num_features, num_groups, group_size)
        self._set(
            axis=axis,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
        )
        shape = (self.num_groups,)
        self.scale = self._parameter("scale", scale_init, shape, scale_metadata, rngs)
        self.bias = self._parameter("bias", bias_init, shape, bias_metadata, rngs)

    def __call__(
        self, x: Float[Array, "n *space c"], *, mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "n *space c"]:
        """Normalize `x`; `mask` is true where a value counts in the mean and variance.

        Raises:
            ValueError: the input cannot be normalized.
        """
        return norms.normalize(self, x, mask, self.affine)

    def _affine(self, m: Moments) -> Affine:
        """The map for an input with moments `m`."""
        _require_num_features(m.mean.shape[1], self.num_features)
        return norms.channel_norm(m, _learned(self, self.num_groups), self.epsilon)


class BatchChannelNorm(_WithRunningAverages):
    """`bcn_flax.linen.BatchChannelNorm` in NNX: a drop-in replacement for `flax.nnx.BatchNorm`.

    Its submodules are `batch_norm`, with parameters and statistics `(num_features,)`, and
    `channel_norm`, with parameters `(groups,)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.nnx import BatchChannelNorm
        >>> layer = BatchChannelNorm(32, num_groups=8, rngs=nnx.Rngs(0))
        >>> y = layer(jnp.ones((1, 8, 8, 32)))  # training: updates the statistics
        >>> layer.eval()
        >>> y = layer(y)
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int | None = 32,
        group_size: int | None = None,
        estimate: bool = True,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        batch_epsilon: float | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        axis_name: str | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        running_variance: RunningVariance = "biased",
        update_stats: bool | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
    ) -> None:
        """Make the two norms.

        Args:
            num_features: number of channels of the input.
            num_groups: number of groups of consecutive channels.
            group_size: number of channels per group; requires `num_groups=None`.
            estimate: whether the batch norm uses the running averages in training too
                (`EstimatedBatchNorm`) or the batch statistics (`BatchNorm`), for large batches.
            use_running_average: true in evaluation, false in training; `.train()`, `.eval()` and
                `nnx.view` set it, and the call can override it.
            axis: the channel axis; axis 0 is the batch axis.
            momentum: the weight of the old running average; `nnx.BatchNorm` has 0.99.
            epsilon: added to both variances, inside the square root.
            batch_epsilon: epsilon of the batch norm; by default `epsilon`.
            dtype: dtype of the result; by default the promoted dtype of input and parameters.
            param_dtype: dtype of the parameters.
            use_bias: whether both norms learn a bias.
            use_scale: whether both norms learn a scale.
            bias_init: initializer of the channel norm's bias; the batch norm's starts at 0, with
                the same metadata.
            scale_init: initializer of the channel norm's scale; the batch norm's starts at 1, with
                the same metadata: see `bcn_flax.linen.BatchChannelNorm`.
            axis_name: axis of `vmap`, `shard_map` or `pmap` over which batch statistics are pooled.
            axis_index_groups: groups of devices on that axis; each pools its own statistics.
            running_variance: the variance in the running averages, see `bcn_flax.linen.BatchNorm`.
            update_stats: whether to update the running averages; by default in training only.
            rngs: random numbers for the initializers.
            bias_metadata: metadata of both biases, for example their sharding,
                `{"out_sharding": ("model",)}`.
            scale_metadata: metadata of both scales.

        Raises:
            ValueError: an argument is out of its range, or the groups do not divide the channels.
        """
        self.num_features = checks.require_count("num_features", num_features)
        self._set(
            axis=axis, dtype=dtype, param_dtype=param_dtype, use_bias=use_bias, use_scale=use_scale
        )
        batch_epsilon = checks.or_none(checks.require_epsilon)("batch_epsilon", batch_epsilon)
        estimate = checks.require_flag("estimate", estimate)
        shared: dict[str, Any] = {
            "axis": axis,
            "param_dtype": param_dtype,
            "use_bias": use_bias,
            "use_scale": use_scale,
            "bias_metadata": bias_metadata,
            "scale_metadata": scale_metadata,
            "rngs": rngs,
        }
        self.batch_norm = (EstimatedBatchNorm if estimate else BatchNorm)(
            num_features,
            use_running_average=use_running_average,
            momentum=momentum,
            epsilon=epsilon if batch_epsilon is None else batch_epsilon,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            running_variance=running_variance,
            update_stats=update_stats,
            bias_init=_with_metadata_of("bias_init", bias_init, initializers.zeros),
            scale_init=_with_metadata_of("scale_init", scale_init, initializers.ones),
            **shared,
        )
        self.channel_norm = ChannelNorm(
            num_features,
            num_groups,
            group_size,
            epsilon=epsilon,
            bias_init=bias_init,
            scale_init=scale_init,
            **shared,
        )
        # NNX may record the name of a property at its first assignment. Recorded here, a switch to
        # evaluation and back gives the same graphdef, and nothing is compiled again.
        self._set(use_running_average=use_running_average, update_stats=update_stats)

    @property
    def use_running_average(self) -> bool | None:
        """That of the batch norm: true in evaluation, false in training."""
        return self.batch_norm.use_running_average

    @use_running_average.setter
    def use_running_average(self, value: bool | None) -> None:
        self.batch_norm.use_running_average = value

    @property
    def update_stats(self) -> bool | None:
        """That of the batch norm: whether to update the running averages."""
        return self.batch_norm.update_stats

    @update_stats.setter
    def update_stats(self, value: bool | None) -> None:
        self.batch_norm.update_stats = value

    def _affine(self, m: Moments, use_running_average: bool, update_stats: bool) -> Affine:
        """The map for an input with moments `m`; `update_stats` updates the running averages."""
        f = self.batch_norm.affine(m, use_running_average, update_stats)
        return followed_by(f, m, self.channel_norm.affine)


class _StandardizedKernel(nnx.Module):
    """Standardize the kernel at each use. The raw kernel is stored and trained.

    Flax calls `promote_dtype` on the kernel before each use; here that standardizes it first.
    """

    kernel: nnx.Param[Array]

    def __init__(
        self,
        *args: Any,
        standardization: Standardization = Standardization(),
        **kwargs: Any,
    ) -> None:
        """Take the arguments of the Flax layer, and `standardization`."""
        self.standardization = how = require_standardization(standardization)
        super().__init__(*args, **kwargs)
        raw = self.kernel[...]
        require_fan_in(raw.shape, self._out_axis)
        shape = (raw.shape[self._out_axis],)
        self.gain = nnx.Param(jnp.ones(shape, raw.dtype)) if how.gain else nnx.data(None)

    @property
    def promote_dtype(self) -> PromoteDtypeFn:
        """Standardize the kernel, then promote."""
        return self._standardize_and_promote

    @promote_dtype.setter
    def promote_dtype(self, promote: PromoteDtypeFn) -> None:
        self._promote_dtype = promote

    @property
    def _out_axis(self) -> int:
        # A transposed convolution may have the last two axes of its kernel exchanged.
        return -2 if getattr(self, "transpose_kernel", False) else -1

    def _standardize_and_promote(
        self, values: tuple[Array, Array, Array | None], /, **kwargs: Any
    ) -> Any:
        # Flax has already multiplied this kernel by its mask. Starting from the raw kernel and
        # multiplying at the end gives the gradients of linen to the last bit.
        x, _, bias = values
        mask = getattr(self, "mask", None)
        kernel = standardize_kernel(
            self.kernel[...],
            self.standardization,
            gain=None if self.gain is None else self.gain[...],
            axis=self._out_axis,
            mask=None if mask is None else jnp.asarray(mask) != 0,
        )
        if mask is not None:
            kernel *= mask
        return self._promote_dtype((x, kernel, bias), **kwargs)


class WSConv(_StandardizedKernel, nnx.Conv):
    """`bcn_flax.linen.WSConv` in NNX: `flax.nnx.Conv` with weight standardization.

    It has the arguments and parameters of `nnx.Conv`, and `standardization`, see `Standardization`.
    Each call standardizes the kernel, in float32 or wider, before the cast to `dtype`; the
    parameter stays raw.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.nnx import WSConv
        >>> y = WSConv(3, 64, kernel_size=(3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3)))
    """


class WSConvTranspose(_StandardizedKernel, nnx.ConvTranspose):
    """`flax.nnx.ConvTranspose` with weight standardization, as `WSConv`."""


class WSDense(_StandardizedKernel, nnx.Linear):
    """`flax.nnx.Linear` with weight standardization, as `WSConv`."""


def _with_metadata_of(name: str, init: Initializer, constant: Initializer) -> Initializer:
    """`constant`, with the metadata of `init`, for example of `nnx.with_partitioning`."""
    checks.require_callable(name, init)

    def initialize(*args: Any) -> Any:
        given, value = init(*args), constant(*args)
        if isinstance(given, nnx.VariableMetadata):
            return dataclasses.replace(given, raw_value=value)
        return value

    return initialize


def _learned(norm: BatchNorm | ChannelNorm, size: int) -> Affine:
    """The scale and bias of a norm as a map, `(1, size)`."""
    scale, bias = (None if p is None else p[...] for p in (norm.scale, norm.bias))
    return norms.learned_affine(scale, bias, size, norm.param_dtype)


def _require_num_features(channels: int, expected: int) -> None:
    if channels != expected:
        raise ValueError(
            f"The input must have the {expected} channels that the layer was made for, but it has "
            f"{channels}. Make the layer with num_features={channels}, or set axis to the channel "
            "axis of the input."
        )
