"""Batch-channel normalization and the norms that it is made of.

The equations in the comments use `mu` and `sigma2` for a mean and a variance of the values at hand,
`mu_hat` and `sigma2_hat` for the running estimates, and `r` for the momentum.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from bcn_torch import checks
from bcn_torch.precision import widen


class _Norm(nn.Module):
    """What all norms share: `scale * (x - mean) / sqrt(var + eps) + shift`."""

    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, channels: int, size: int, eps: float, affine: bool) -> None:
        super().__init__()
        checks.channel_count(channels)
        checks.eps(eps)
        self.channels = channels
        self.eps = eps
        self.affine = affine
        self.register_parameter("scale", nn.Parameter(torch.ones(size)) if affine else None)
        self.register_parameter("shift", nn.Parameter(torch.zeros(size)) if affine else None)

    def _normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        # x_hat = (x - mu) / sqrt(sigma2 + eps)
        x_hat = (x - mean) / torch.sqrt(var + self.eps)
        if self.scale is None or self.shift is None:
            return x_hat
        # y = scale * x_hat + shift
        return _along_axis_1(self.scale, x) * x_hat + _along_axis_1(self.shift, x)


class BatchNorm(_Norm):
    """Normalize each channel by its mean and variance over the batch.

        y = scale * (x - mean) / sqrt(var + eps) + shift

    In training, `mean` and `var` (biased) are those of the batch, with their gradient, and the
    running estimates move towards them:

        exp_mean = (1 - momentum) * exp_mean + momentum * mean
        exp_var = (1 - momentum) * exp_var + momentum * var

    In evaluation, `mean` and `var` are the running estimates.

    Unlike in `torch.nn.BatchNorm2d`, the running variance is biased as well. Under data parallelism
    each process takes the moments of its own share of the batch.

    Parameters are `scale` and `shift`, `(channels,)`; buffers are `exp_mean` and `exp_var`,
    `(channels,)`, which stay in float32 or wider whatever the module is converted to.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchNorm
        >>> BatchNorm(32)(torch.randn(4, 32, 8, 8)).shape
        torch.Size([4, 32, 8, 8])

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167; names and initial values as
    in the annotated implementation (`labml_nn/normalization/batch_norm`).
    """

    exp_mean: Tensor
    exp_var: Tensor

    def __init__(
        self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        """Start from mean 0 and variance 1.

        Args:
            channels: number of channels of the input.
            eps: added to the variance, inside the root.
            momentum: the weight of the *new* value in the running estimates.
            affine: whether to learn `scale` and `shift`.

        Raises:
            ValueError: an argument is out of its range.
        """
        super().__init__(channels, channels, eps, affine)
        checks.momentum(momentum)
        self.momentum = momentum
        self.frozen = False
        self.register_buffer("exp_mean", widen(torch.zeros(channels)))
        self.register_buffer("exp_var", widen(torch.ones(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, `[batch, channels, *]`; the result is of its shape and dtype.

        Raises:
            ValueError: `x` is not of floating point, is empty, or has no `channels` at axis 1.
        """
        checks.activation(x, self.channels)
        wide = widen(x)
        mean, var = self._training_moments(wide) if self.training else self._estimates(wide)
        return self._normalize(wide, mean, var).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{self.channels}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"

    def _training_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to normalize by in training: the batch's own moments."""
        mean, var = _batch_moments(x)
        if not self.frozen:
            checks.several_values(x.shape)
            self._update(mean, var)
        return mean, var

    def _estimates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _along_axis_1(self.exp_mean, x), _along_axis_1(self.exp_var, x)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor) -> None:
        r = self.momentum
        # mu_hat <- (1 - r) mu_hat + r mu
        self.exp_mean.copy_((1 - r) * self.exp_mean + r * mean.flatten())
        # sigma2_hat <- (1 - r) sigma2_hat + r sigma2
        self.exp_var.copy_((1 - r) * self.exp_var + r * var.flatten())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every conversion of a module ends here: .to(), .half(), .cuda(). One that would round the
        # running estimates may only move them.
        originals = {"exp_mean": self.exp_mean, "exp_var": self.exp_var}
        super()._apply(fn, recurse)
        for name, original in originals.items():
            converted = getattr(self, name)
            if widen(converted).dtype != converted.dtype:
                setattr(self, name, original.to(converted.device))
        return self


class EstimatedBatchNorm(BatchNorm):
    """Batch normalization by the running estimates, in training too, where batches are tiny.

    In training it *first* moves the running estimates towards the batch's mean and biased variance
    and *then* normalizes by them:

        exp_mean = (1 - momentum) * exp_mean + momentum * mean
        exp_var = (1 - momentum) * exp_var + momentum * var
        y = scale * (x - exp_mean) / sqrt(exp_var + eps) + shift

    No gradient flows through the estimates. Evaluation, parameters and buffers are those of
    `BatchNorm`.

    On its own it trains unstably: nothing bounds the scale of its output while the estimates lag
    behind. The channel norm that follows it in `BatchChannelNorm` does.

    Example:
        >>> import torch
        >>> from bcn_torch import EstimatedBatchNorm
        >>> EstimatedBatchNorm(32)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 32, 8, 8])

    Source: Qiao et al., arXiv 1903.10520; the variance is around the batch's own mean, as in the
    code of the annotated implementation (`labml_nn/normalization/batch_channel_norm`).
    """

    def __init__(
        self, channels: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        """Take the arguments of `BatchNorm`, by position too."""
        super().__init__(channels, eps=eps, momentum=momentum, affine=affine)

    def _training_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to normalize by in training: the running estimates, after their update."""
        if not self.frozen:
            checks.several_values(x.shape)
            self._update(*_batch_moments(x.detach()))
        return self._estimates(x)


class ChannelNorm(_Norm):
    """Normalize each group of channels of each sample; one scale and shift for each *group*.

        y = scale * (x - mean) / sqrt(var + eps) + shift

    where `mean` and `var` (biased) are over the channels of the group and over space.
    `torch.nn.GroupNorm` does the same with one scale and shift for each channel.

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
            eps: added to the variance, inside the root.
            affine: whether to learn `scale` and `shift`.

        Raises:
            ValueError: eps is out of its range, or groups do not divide the channels.
        """
        checks.group_count(channels, groups)
        super().__init__(channels, groups, eps, affine)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, `[batch, channels, *]`; the result is of its shape and dtype.

        Raises:
            ValueError: `x` is not of floating point, is empty, or has no `channels` at axis 1.
        """
        checks.activation(x, self.channels)
        # [batch, channels, *] -> [batch, groups, channels / groups, *]
        grouped = widen(x).unflatten(1, (self.groups, -1))
        mean, var = _moments(grouped, axes=range(2, grouped.dim()))
        return self._normalize(grouped, mean, var).flatten(1, 2).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return f"{self.channels}, groups={self.groups}, eps={self.eps}, affine={self.affine}"


class BatchChannelNorm(nn.Module):
    """Batch-channel normalization: a batch norm, then a channel norm.

        y = channel_norm(batch_norm(x))

    The batch norm keeps channels from collapsing, which a channel norm alone cannot; the channel
    norm makes it safe to run the batch norm on estimated statistics, so that a batch of one image
    will do.

    Parameters are `batch_norm.scale` and `batch_norm.shift`, `(channels,)`, and
    `channel_norm.scale` and `channel_norm.shift`, `(groups,)`; buffers are `batch_norm.exp_mean`
    and `batch_norm.exp_var`, `(channels,)`. Checkpoints of the annotated implementation load as
    they are.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchChannelNorm
        >>> BatchChannelNorm(32, groups=8)(torch.randn(1, 32, 8, 8)).shape
        torch.Size([1, 32, 8, 8])

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
    ) -> None:
        """Make the two norms.

        Args:
            channels: number of channels of the input.
            groups: number of groups of consecutive channels.
            eps: added to both variances, inside the root.
            momentum: the weight of the *new* value in the running estimates.
            estimate: whether the batch norm normalizes by the running estimates in training too
                (`EstimatedBatchNorm`), or by the batch (`BatchNorm`), which wants large batches.

        Raises:
            ValueError: an argument is out of its range, or groups do not divide the channels.
        """
        super().__init__()
        batch_norm = EstimatedBatchNorm if estimate else BatchNorm
        self.batch_norm = batch_norm(channels, eps=eps, momentum=momentum)
        self.channel_norm = ChannelNorm(channels, groups, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`, `[batch, channels, *]`; the result is of its shape and dtype.

        Raises:
            ValueError: `x` is not of floating point, is empty, or has no `channels` at axis 1.
        """
        checks.floating_point(x.dtype)
        # Widened here, so that a half-precision result is rounded once and not between the stages.
        y = self.batch_norm(widen(x))
        y = self.channel_norm(y)
        return y.to(x.dtype)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep every batch norm in `module` from updating its running estimates.

    What they normalize by in training stays what it was: the running estimates in
    `EstimatedBatchNorm`, the batch's moments in `BatchNorm`.

    Gradient checkpointing needs this, because it runs the forward pass again during the backward
    pass, which would update the estimates a second time. Frozen, the second run finds the estimates
    as the first one left them, provided that no other forward pass came between:

        def contexts():
            return nullcontext(), frozen_statistics(model)

        y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    The transforms of `torch.func` need it in training as well: they let no module change a buffer.

    Args:
        module: a batch norm, or anything that contains some.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchChannelNorm, frozen_statistics
        >>> layer = BatchChannelNorm(32, groups=8)
        >>> with frozen_statistics(layer):
        ...     y = layer(torch.randn(1, 32, 8, 8))
        >>> int(layer.batch_norm.exp_mean.count_nonzero())
        0
    """
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
    before = [norm.frozen for norm in norms]
    for norm in norms:
        norm.frozen = True
    try:
        yield
    finally:
        for norm, frozen in zip(norms, before, strict=True):
            norm.frozen = frozen


def _moments(x: Tensor, axes: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `axes`, which are kept with length 1."""
    axes = tuple(axes)
    # mu = E[x]
    mean = x.mean(axes, keepdim=True)
    # sigma2 = E[(x - mu)^2]
    var = ((x - mean) ** 2).mean(axes, keepdim=True)
    return mean, var


def _batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over the batch and space."""
    return _moments(x, axes=(0, *range(2, x.dim())))


def _along_axis_1(values: Tensor, x: Tensor) -> Tensor:
    """Lay one value for each channel, or group, out along axis 1 of `x`."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))
