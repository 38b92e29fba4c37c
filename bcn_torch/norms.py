"""Batch-channel normalization and the two norms that it consists of.

The equations in the comments use `mu` and `sigma2` for the mean and variance of a batch or group,
`mu_hat` and `sigma2_hat` for the running estimates, and `r` for the momentum.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm

from bcn_torch import checks
from bcn_torch.precision import widen
from bcn_torch.tracing import one_node

RunningVariance = Literal["biased", "unbiased", "around_running_mean"]
# What a batch norm of PyTorch has and one of this library has not.
_OF_PYTORCH = ("num_features", "weight", "bias", "running_mean", "running_var")


class _Norm(nn.Module):
    """Base of the norms: `scale * (x - mean) / sqrt(var + eps) + shift`."""

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, channels: int, size: int, eps: float, affine: bool) -> None:
        nn.Module.__init__(self)
        self.channels = channels
        self.eps = checks.require_eps(eps)
        self.affine = checks.require_flag("affine", affine)
        self.register_parameter("scale", nn.Parameter(torch.ones(size)) if self.affine else None)
        self.register_parameter("shift", nn.Parameter(torch.zeros(size)) if self.affine else None)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        # x_hat = (x - mu) / sqrt(sigma2 + eps)
        x_hat = (x - mean) / torch.sqrt(var + self.eps)
        scale, shift = self.scale, self.shift
        if scale is None or shift is None:
            return x_hat
        # y = scale * x_hat + shift
        return _along_axis_1(scale, x) * x_hat + _along_axis_1(shift, x)


class BatchNorm(_Norm, _BatchNorm):
    """Normalize each channel by its mean and variance over the batch.

        y = scale * (x - mean) / sqrt(var + eps) + shift

    In training, `mean` and `var` (biased) are those of the batch, with their gradient, and they
    update the running estimates:

        exp_mean = (1 - momentum) * exp_mean + momentum * mean
        exp_var = (1 - momentum) * exp_var + momentum * var

    In evaluation, `mean` and `var` are the running estimates.

    `running_variance` selects the variance of the `n` values of a channel that updates `exp_var`:

        "biased"               var
        "unbiased"             var * n / (n - 1), as in `torch.nn.BatchNorm2d`; var if n is 1
        "around_running_mean"  mean((x - old_exp_mean)^2) = var + (mean - old_exp_mean)^2

    The attribute `update_stats`, which may be set at any time, controls their updates:

        None   in training
        False  never; training still normalizes with the batch statistics
        True   in evaluation too, which still normalizes with the estimates before the update

    If the mean or variance of a channel is NaN or infinite, its two estimates stay unchanged. The
    output still contains the NaN.

    `torch.optim.swa_utils.update_bn` works as with PyTorch's batch norms, except that it leaves
    estimates as they are if `update_stats` is False. While it sets `momentum` to None, an estimate
    is the average of all batches since `reset_running_stats`; the variance "around_running_mean"
    is then around the average of their means.

    Under data parallelism each process uses the statistics of its own share of the batch.
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` fails with an error, because what it makes has
    no such estimates.

    Parameters are `scale` and `shift`, `(channels,)`; buffers are `exp_mean` and `exp_var`,
    `(channels,)`, which stay in float32 or wider when the module is converted.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchNorm
        >>> BatchNorm(32)(torch.randn(4, 32, 8, 8)).shape
        torch.Size([4, 32, 8, 8])

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167; names and initial values as
    in the annotated implementation (`labml_nn/normalization/batch_norm`).
    """

    # A `_BatchNorm`, because tools find batch norms by that class. All that is in common with it is
    # `momentum` and `reset_running_stats`, so TorchScript and checkpoints must not expect more.
    __constants__: list[str] = []  # noqa: RUF012
    _load_from_state_dict = nn.Module._load_from_state_dict

    exp_mean: Tensor
    exp_var: Tensor
    momentum: float | None
    update_stats: bool | None

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        running_variance: RunningVariance = "biased",
        update_stats: bool | None = None,
    ) -> None:
        """Start from mean 0 and variance 1.

        Args:
            channels: number of channels of the input.
            eps: added to the variance, inside the square root.
            momentum: the weight of the *new* value in the running estimates.
            affine: whether to learn `scale` and `shift`.
            running_variance: the variance in the running estimate.
            update_stats: when to update the running estimates.

        Raises:
            ValueError: an argument is out of its range.
        """
        channels = checks.require_channel_count(channels)
        super().__init__(channels, channels, eps, affine)
        checks.require_one_of("running_variance", running_variance, get_args(RunningVariance))
        self.momentum = checks.require_momentum(momentum)
        self.running_variance = running_variance
        self.update_stats = update_stats
        self._averaged = 0  # batches since `reset_running_stats`, counted if momentum is None
        self.register_buffer("exp_mean", widen(torch.zeros(channels)))
        self.register_buffer("exp_var", widen(torch.ones(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, `[batch, channels, *]`; the result has its shape and dtype.

        Raises:
            ValueError: `x` is not floating-point, is empty, or axis 1 is not of length `channels`.
        """
        if not is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            checks.require_input(x, self.channels)
        wide = widen(x)
        if self.training:
            mean, var = self._training_moments(wide)
        else:
            mean, var = self._evaluation_moments(wide)
        return self._normalize(wide, mean, var).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.channels}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"running_variance={self.running_variance!r}, update_stats={self.update_stats}"
        )

    def _training_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The moments used in training: those of the batch."""
        mean, var = batch_moments(x)
        if self._updates():
            self._update(x, mean, var)
        return mean, var

    def _evaluation_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The moments used in evaluation: the running estimates before any update."""
        mean, var = self._estimates(x)
        if self._updates():
            mean, var = mean.clone(), var.clone()
            mu, sigma2 = batch_moments(x.detach())
            self._update(x, mu, sigma2)
        return mean, var

    def _estimates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _along_axis_1(self.exp_mean, x), _along_axis_1(self.exp_var, x)

    def _updates(self) -> bool:
        """Whether this call updates the running estimates."""
        update_stats = self.update_stats
        return self.training if update_stats is None else update_stats

    def _update(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """Update the running estimates with the moments of `x` that are finite."""
        if not is_scripting():
            _warn_of_single_values(x.shape)
        with torch.no_grad():
            r = self._rate()
            mu, sigma2 = mean.flatten(), self._variance_for_update(x, mean, var, r).flatten()
            finite = mu.isfinite() & sigma2.isfinite()
            if self.momentum is None:
                # An average of all batches must not leave one out in silence.
                finite = torch.ones_like(finite)
            # mu_hat <- (1 - r) mu_hat + r mu
            mu_hat = (1 - r) * self.exp_mean + r * mu
            # sigma2_hat <- (1 - r) sigma2_hat + r sigma2
            sigma2_hat = (1 - r) * self.exp_var + r * sigma2
            self.exp_mean.copy_(torch.where(finite, mu_hat, self.exp_mean))
            self.exp_var.copy_(torch.where(finite, sigma2_hat, self.exp_var))

    def _rate(self) -> float:
        """The weight of the batch in the estimates, where 1 / k makes the average of k batches."""
        momentum = self.momentum
        if momentum is None:
            self._averaged += 1
            return 1 / self._averaged
        return momentum

    def _variance_for_update(self, x: Tensor, mean: Tensor, var: Tensor, r: float) -> Tensor:
        """The variance of `x` that updates the running estimate; `var` is the biased one."""
        if self.running_variance == "unbiased":
            # n, the number of values of a channel
            n = x.numel() // self.channels
            return var * (n / max(n - 1, 1))
        if self.running_variance == "around_running_mean":
            mu_hat = _along_axis_1(self.exp_mean, x)
            if self.momentum is None:
                # Var = E[var] + Var[mean], of all batches
                return var + (1 - r) * (mean - mu_hat) ** 2
            # sigma2 = E[(x - mu_hat)^2]
            return ((x - mu_hat) ** 2).mean(_all_axes_but_1(x))
        return var

    def reset_running_stats(self) -> None:
        """Start again from mean 0 and variance 1, unless `update_stats` is False."""
        if self.update_stats is not False:
            self.exp_mean.zero_()
            self.exp_var.fill_(1)
            self._averaged = 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Take flags of NumPy, and 0 and 1, for `update_stats` as Python's."""
        if name == "update_stats":
            value = checks.require_flag_or_none(name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Refuse what only batch norms of PyTorch have."""
        if name in _OF_PYTORCH:
            raise AttributeError(
                f"{type(self).__name__} has no {name}: it has channels, scale, shift, exp_mean and "
                "exp_var. So what exchanges, folds or synchronizes batch norms of torch.nn, such "
                "as SyncBatchNorm.convert_sync_batchnorm, cannot take it; call that on the parts "
                "of the model without it. bcn_torch.fold folds it."
            )
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .half() and .cuda() all call this. If they would round the running estimates, only
        # the device changes.
        originals = {"exp_mean": self.exp_mean, "exp_var": self.exp_var}
        super()._apply(fn, recurse)
        for name, original in originals.items():
            converted = getattr(self, name)
            if widen(converted).dtype != converted.dtype:
                setattr(self, name, original.to(converted.device))
        return self


class EstimatedBatchNorm(BatchNorm):
    """Batch normalization with the running estimates in training too, for tiny batches.

    In training it *first* updates the running estimates with the batch's mean and biased variance
    and *then* normalizes with them:

        exp_mean = (1 - momentum) * exp_mean + momentum * mean
        exp_var = (1 - momentum) * exp_var + momentum * var
        y = scale * (x - exp_mean) / sqrt(exp_var + eps) + shift

    No gradient flows through the estimates. Evaluation, parameters and buffers are those of
    `BatchNorm`.

    With `update_stats=False` training uses the estimates without an update.

    If gradients are accumulated over k micro-batches, the estimates are updated k times per
    optimizer step. A momentum of `1 - (1 - momentum) ** (1 / k)` then gives the old values the same
    weight as one update per step does.

    On its own it trains unstably: nothing bounds the scale of its output while the estimates lag
    behind. In `BatchChannelNorm` the channel norm bounds it.

    Example:
        >>> import torch
        >>> from bcn_torch import EstimatedBatchNorm
        >>> EstimatedBatchNorm(32)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 32, 8, 8])

    Source: Qiao et al., arXiv 1903.10520; by default the variance is around the batch's own mean,
    as in the code of the annotated implementation (`labml_nn/normalization/batch_channel_norm`).
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        running_variance: RunningVariance = "biased",
        update_stats: bool | None = None,
    ) -> None:
        """Take the arguments of `BatchNorm`; the first four may be positional."""
        super().__init__(
            channels,
            eps=eps,
            momentum=momentum,
            affine=affine,
            running_variance=running_variance,
            update_stats=update_stats,
        )

    def _training_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The moments used in training: the running estimates after their update."""
        if self._updates():
            mu, sigma2 = batch_moments(x.detach())
            self._update(x, mu, sigma2)
        return self._estimates(x)


class ChannelNorm(_Norm):
    """Normalize each group of channels of each sample, with one scale and shift per *group*.

        y = scale * (x - mean) / sqrt(var + eps) + shift

    where `mean` and `var` (biased) are over the channels of the group and over space.
    `torch.nn.GroupNorm` is the same with one scale and shift per channel.

    Parameters are `scale` and `shift`, `(groups,)`. There are no buffers: training and evaluation
    are the same.

    Example:
        >>> import torch
        >>> from bcn_torch import ChannelNorm
        >>> ChannelNorm(32, groups=8)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 32, 8, 8])

    Source: Qiao et al., arXiv 1903.10520; an affine map for each group as in the annotated
    implementation (`labml_nn/normalization/batch_channel_norm`).
    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-5, affine: bool = True) -> None:
        """Start from scale 1 and shift 0.

        Args:
            channels: number of channels of the input.
            groups: number of groups of consecutive channels.
            eps: added to the variance, inside the square root.
            affine: whether to learn `scale` and `shift`.

        Raises:
            ValueError: eps is out of its range, or the groups do not divide the channels.
        """
        channels = checks.require_channel_count(channels)
        groups = checks.require_group_count(channels, groups)
        super().__init__(channels, groups, eps, affine)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, `[batch, channels, *]`; the result has its shape and dtype.

        Raises:
            ValueError: `x` is not floating-point, is empty, or axis 1 is not of length `channels`.
        """
        if not is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            checks.require_input(x, self.channels)
            _warn_of_single_values_in_groups(x.shape, self.groups)
        # [batch, channels, *] -> [batch, groups, channels / groups, *]
        grouped = widen(x).unflatten(1, [self.groups, -1])
        mean, var = _moments(grouped, axes=list(range(2, grouped.dim())))
        return self._normalize(grouped, mean, var).flatten(1, 2).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{self.channels}, groups={self.groups}, eps={self.eps}, affine={self.affine}"


class BatchChannelNorm(nn.Module):
    """Batch-channel normalization: a batch norm, then a channel norm.

        y = channel_norm(batch_norm(x))

    The batch norm keeps channels from collapsing, which a channel norm alone cannot; the channel
    norm keeps training with running estimates stable, so that a batch of one image is enough.

    Parameters are `batch_norm.scale` and `batch_norm.shift`, `(channels,)`, and
    `channel_norm.scale` and `channel_norm.shift`, `(groups,)`; buffers are `batch_norm.exp_mean`
    and `batch_norm.exp_var`, `(channels,)`. Checkpoints of the annotated implementation load
    unchanged.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchChannelNorm
        >>> BatchChannelNorm(32, groups=8)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 32, 8, 8])

    `bcn_torch.variants.BCN` has the arguments of each published implementation.

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", arXiv 1903.10520; names as in the annotated implementation
    (`labml_nn/normalization/batch_channel_norm`).
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        estimate: bool = True,
        *,
        batch_eps: float | None = None,
        running_variance: RunningVariance = "biased",
        update_stats: bool | None = None,
    ) -> None:
        """Make the two norms.

        Args:
            channels: number of channels of the input.
            groups: number of groups of consecutive channels.
            eps: added to both variances, inside the square root.
            momentum: the weight of the *new* value in the running estimates.
            estimate: whether the batch norm uses the running estimates in training too
                (`EstimatedBatchNorm`) or the batch statistics (`BatchNorm`), for large batches.
            batch_eps: eps of the batch norm; by default `eps`.
            running_variance: the variance in the running estimate, see `BatchNorm`.
            update_stats: when to update the running estimates, see `BatchNorm`.

        Raises:
            ValueError: an argument is out of its range, or the groups do not divide the channels.
        """
        super().__init__()
        if batch_eps is not None:
            batch_eps = checks.require_eps(batch_eps, "batch_eps")
        estimate = checks.require_flag("estimate", estimate)
        batch_norm = EstimatedBatchNorm if estimate else BatchNorm
        self.batch_norm = batch_norm(
            channels,
            eps=eps if batch_eps is None else batch_eps,
            momentum=momentum,
            running_variance=running_variance,
            update_stats=update_stats,
        )
        self.channel_norm = ChannelNorm(channels, groups, eps)

    __jit_unused_properties__: ClassVar = ["update_stats"]

    @property
    def update_stats(self) -> bool | None:
        """When to update the running estimates, as in the batch norm."""
        return self.batch_norm.update_stats

    @update_stats.setter
    def update_stats(self, value: bool | None) -> None:
        self.batch_norm.update_stats = value

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, `[batch, channels, *]`; the result has its shape and dtype.

        Raises:
            ValueError: `x` is not floating-point, is empty, or axis 1 is not of length `channels`.
        """
        if not is_scripting():
            if isinstance(x, Proxy):
                return one_node(self, x)
            checks.require_floating_point(x)
        # Widened here, so that a half-precision result is not rounded between the two norms.
        y = self.batch_norm(widen(x))
        y = self.channel_norm(y)
        return y.to(x.dtype)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep every batch norm in `module` from updating its running estimates.

    Sets their `update_stats` to False and restores it afterwards. Training still normalizes with
    the running estimates in `EstimatedBatchNorm` and with the batch statistics in `BatchNorm`.

    Gradient checkpointing needs this, because it runs the forward pass again during the backward
    pass, which would update the estimates a second time. Frozen, the second run uses the estimates
    of the first, provided that there is no other forward pass in between:

        def contexts():
            return nullcontext(), frozen_statistics(model)

        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    In training, the transforms of `torch.func` need it as well: they do not allow a module to
    change a buffer.

    Args:
        module: a batch norm, or a module that contains some.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchChannelNorm, frozen_statistics
        >>> layer = BatchChannelNorm(32, groups=8)
        >>> with frozen_statistics(layer):
        ...     y = layer(torch.randn(1, 32, 8, 8))
        >>> int(layer.batch_norm.exp_mean.count_nonzero())
        0
    """
    checks.require_module("module", module)
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    before = [norm.update_stats for norm in norms]
    for norm in norms:
        norm.update_stats = False
    try:
        yield
    finally:
        for norm, update_stats in zip(norms, before, strict=True):
            norm.update_stats = update_stats


def _moments(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `axes`, which stay with length 1."""
    # mu = E[x]
    mean = x.mean(axes, keepdim=True)
    # sigma2 = E[(x - mu)^2]
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return mean, var


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over batch and space, `(1, channels, 1, ...)`."""
    return _moments(x, _all_axes_but_1(x))


def _all_axes_but_1(x: Tensor) -> list[int]:
    axes = list(range(x.dim()))
    axes.pop(1)
    return axes


def _along_axis_1(values: Tensor, x: Tensor) -> Tensor:
    """Reshape one value per channel, or group, to broadcast along axis 1 of `x`."""
    shape = [1] * x.dim()
    shape[1] = -1
    return values.view(shape)


def _warn_of_single_values(shape: Sequence[int]) -> None:
    """Warn if each channel has a single value; not in a compiled graph, which cannot warn."""
    if not torch.compiler.is_compiling() and math.prod(shape) == shape[1]:
        warnings.warn(
            f"The batch has a single value per channel (its shape is {tuple(shape)}), so its "
            "variance is always 0. Train with a larger batch, or evaluate with .eval().",
            stacklevel=2,
        )


def _warn_of_single_values_in_groups(shape: Sequence[int], groups: int) -> None:
    """Warn if each group has a single value; not in a compiled graph, which cannot warn."""
    if not torch.compiler.is_compiling() and math.prod(shape[1:]) == groups:
        warnings.warn(
            f"Each of the {groups} groups has a single value (the shape is {tuple(shape)}), so the "
            "output is the shift, whatever the input. Use fewer groups.",
            stacklevel=2,
        )
