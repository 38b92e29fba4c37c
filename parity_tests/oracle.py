"""The layers once more, in float64 NumPy: plain, slow, and independent of both sides.

Channels last. Forward as the paper states it, stage by stage with two-pass variances; backward
derived by hand for a standardized block `h = (x - mean) / sqrt(var + eps)` of values:

    dx = (dh - E[dh] - h * E[dh * h]) / sqrt(var + eps)       mean and var of the block itself
    dx = dh / sqrt(var + eps)                                 mean and var given
"""

from dataclasses import dataclass

import numpy as np


def standardize(x, axes, eps):
    """Each block of values along `axes` to mean 0 and variance 1; also its standard deviation."""
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    std = np.sqrt(var + eps)
    return (x - mean) / std, std


def standardize_backward(dh, h, std, axes):
    """The gradient of `standardize`."""
    return (dh - dh.mean(axes, keepdims=True) - h * (dh * h).mean(axes, keepdims=True)) / std


@dataclass
class BatchNorm:
    """By the batch, by the running estimates after their update, or in evaluation as they are."""

    estimate: bool
    momentum: float = 0.9
    eps: float = 1e-5
    scale: np.ndarray | float = 1.0
    bias: np.ndarray | float = 0.0
    mean: np.ndarray | float = 0.0
    var: np.ndarray | float = 1.0

    def forward(self, x, train=True):
        self.axes = tuple(range(x.ndim - 1))
        self.own_moments = train and not self.estimate
        if train:
            mean = x.mean(self.axes)
            var = ((x - mean) ** 2).mean(self.axes)
            self.mean = self.momentum * self.mean + (1 - self.momentum) * mean
            self.var = self.momentum * self.var + (1 - self.momentum) * var
        if self.own_moments:
            self.h, self.std = standardize(x, self.axes, self.eps)
        else:
            self.std = np.sqrt(self.var + self.eps)
            self.h = (x - self.mean) / self.std
        return self.scale * self.h + self.bias

    def backward(self, dy):
        self.d_scale = (dy * self.h).sum(self.axes)
        self.d_bias = dy.sum(self.axes)
        dh = dy * self.scale
        if self.own_moments:
            return standardize_backward(dh, self.h, self.std, self.axes)
        return dh / self.std


@dataclass
class ChannelNorm:
    """Groups of consecutive channels; one scale and bias for each group."""

    groups: int
    eps: float = 1e-5
    scale: np.ndarray | float = 1.0
    bias: np.ndarray | float = 0.0

    def _split(self, x):
        """`(n, *space, c)` as `(n, values, groups, channels of a group)`."""
        return x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)

    def forward(self, x, train=True):
        del train
        self.h, self.std = standardize(self._split(x), (1, 3), self.eps)
        per_group = [np.broadcast_to(p, (self.groups,))[:, None] for p in (self.scale, self.bias)]
        return (per_group[0] * self.h + per_group[1]).reshape(x.shape)

    def backward(self, dy):
        d = self._split(dy)
        self.d_scale = (d * self.h).sum((0, 1, 3))
        self.d_bias = d.sum((0, 1, 3))
        dh = d * np.broadcast_to(self.scale, (self.groups,))[:, None]
        return standardize_backward(dh, self.h, self.std, (1, 3)).reshape(dy.shape)


class BatchChannelNorm:
    """One after the other."""

    def __init__(self, groups, estimate, momentum=0.9, eps=1e-5):
        self.batch_norm = BatchNorm(estimate, momentum, eps)
        self.channel_norm = ChannelNorm(groups, eps)

    def forward(self, x, train=True):
        return self.channel_norm.forward(self.batch_norm.forward(x, train))

    def backward(self, dy):
        return self.batch_norm.backward(self.channel_norm.backward(dy))


def standardize_kernel(kernel, eps=1e-5):
    """`(*window, in, out)`; unbiased variance of the weights of each output channel."""
    flat = kernel.reshape(-1, kernel.shape[-1])
    mean, var = flat.mean(0), flat.var(0, ddof=1)
    return (kernel - mean) / np.sqrt(var + eps)
