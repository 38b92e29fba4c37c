"""The layers in float64 NumPy: plain, slow, and independent of Flax and PyTorch.

Channels last. Forward as the paper states it, stage by stage with two-pass variances; backward
derived by hand for a standardized block `h = (x - mean) / sqrt(var + eps)` of N values:

    dx = (dh - sum(dh) / N - h * sum(dh * h) / (N - ddof)) / sqrt(var + eps)    of the block itself
    dx = dh / sqrt(var + eps)                                                   mean and var given

where var is the sum of squares over `N - ddof`. Every layer has `forward(x, train)` and
`backward(dy)`, which returns the gradient of `x`; its `PARAMETERS` are attributes, their gradients
are `d_<name>`, and its `STATISTICS` move in training. A `BatchChannelNorm` has none of its own: its
parts do.
"""

from dataclasses import dataclass

import numpy as np


def standardize(x, axes, eps, ddof=0, largest=np.inf):
    """Each block of values along `axes` to mean 0 and variance 1; also its standard deviation.

    A variance above the `largest` is infinite, as where it overflows.
    """
    deviation = x - x.mean(axes, keepdims=True)
    deviation = deviation - deviation.mean(axes, keepdims=True)  # the first mean is rounded
    size = np.prod([x.shape[axis] for axis in axes])
    var = (deviation**2).sum(axes, keepdims=True) / (size - ddof)
    std = np.sqrt(np.where(var > largest, np.inf, var) + eps)
    return deviation / std, std


def standardize_backward(dh, h, std, axes, ddof=0):
    """The gradient of `standardize`."""
    size = np.prod([h.shape[axis] for axis in axes])
    slope = (dh * h).sum(axes, keepdims=True) / (size - ddof)
    return (dh - dh.mean(axes, keepdims=True) - h * slope) / std


@dataclass
class BatchNorm:
    """Normalizes by the batch, by the updated running estimates, or by the stored ones."""

    PARAMETERS = ("scale", "bias")
    STATISTICS = ("mean", "var")

    estimate: bool
    momentum: float = 0.9
    eps: float = 1e-5
    scale: np.ndarray | float = 1.0
    bias: np.ndarray | float = 0.0
    mean: np.ndarray | float = 0.0
    var: np.ndarray | float = 1.0
    running_variance: str = "biased"
    largest: float = np.inf

    def forward(self, x, train=True):
        self.axes = _all_but_last(x)
        self.own_moments = train and not self.estimate
        if train:
            self._update(x.mean(self.axes), self._variance(x))
        if self.own_moments:
            self.h, self.std = standardize(x, self.axes, self.eps, largest=self.largest)
        else:
            self.std = np.sqrt(self.var + self.eps)
            self.h = (x - self.mean) / self.std
        return self.scale * self.h + self.bias

    def _variance(self, x):
        """The variance of each channel that enters the running estimate."""
        around = self.mean if self.running_variance == "around_running_mean" else x.mean(self.axes)
        size = x.size // x.shape[-1]
        freedom = max(size - 1, 1) if self.running_variance == "unbiased" else size
        return ((x - around) ** 2).sum(self.axes) / freedom

    def _update(self, mean, var):
        """A channel whose moments are not finite keeps its estimates."""
        finite = np.isfinite(mean) & np.isfinite(var) & (var <= self.largest)

        def average(old, new):
            return np.where(finite, self.momentum * old + (1 - self.momentum) * new, old)

        self.mean, self.var = average(self.mean, mean), average(self.var, var)

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

    PARAMETERS = ("scale", "bias")
    STATISTICS = ()

    groups: int
    eps: float = 1e-5
    scale: np.ndarray | float = 1.0
    bias: np.ndarray | float = 0.0
    largest: float = np.inf

    def _split(self, x):
        """`(n, *space, c)` as `(n, values, groups, channels of a group)`."""
        return x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)

    def forward(self, x, train=True):
        del train
        self.h, self.std = standardize(self._split(x), (1, 3), self.eps, largest=self.largest)
        per_group = [np.broadcast_to(p, (self.groups,))[:, None] for p in (self.scale, self.bias)]
        return (per_group[0] * self.h + per_group[1]).reshape(x.shape)

    def backward(self, dy):
        d = self._split(dy)
        self.d_scale = (d * self.h).sum((0, 1, 3))
        self.d_bias = d.sum((0, 1, 3))
        dh = d * np.broadcast_to(self.scale, (self.groups,))[:, None]
        return standardize_backward(dh, self.h, self.std, (1, 3)).reshape(dy.shape)


class BatchChannelNorm:
    """A batch norm, then a channel norm."""

    def __init__(
        self,
        groups,
        estimate,
        momentum=0.9,
        eps=1e-5,
        running_variance="biased",
        batch_epsilon=None,
    ):
        batch_eps = eps if batch_epsilon is None else batch_epsilon
        self.batch_norm = BatchNorm(
            estimate, momentum, batch_eps, running_variance=running_variance
        )
        self.channel_norm = ChannelNorm(groups, eps)

    def forward(self, x, train=True):
        return self.channel_norm.forward(self.batch_norm.forward(x, train))

    def backward(self, dy):
        return self.batch_norm.backward(self.channel_norm.backward(dy))


def standardize_kernel(kernel, eps=1e-5):
    """`(*window, in, out)`; unbiased variance of the weights of each output channel."""
    return standardize(kernel, _all_but_last(kernel), eps, ddof=1)[0]


@dataclass
class _WithStandardizedKernel:
    """`product(x, h) + bias`, where `h` is the standardized kernel, `(*window, in, out)`."""

    PARAMETERS = ("kernel", "bias")
    STATISTICS = ()

    kernel: np.ndarray | None = None
    bias: np.ndarray | float = 0.0
    eps: float = 1e-5

    def forward(self, x, train=True):
        del train
        self.h, self.std = standardize(self.kernel, _all_but_last(self.kernel), self.eps, ddof=1)
        return self._product(x) + self.bias

    def backward(self, dy):
        dx, dh = self._product_backward(dy)
        self.d_kernel = standardize_backward(
            dh, self.h, self.std, _all_but_last(self.kernel), ddof=1
        )
        self.d_bias = dy.sum(_all_but_last(dy))
        return dx


class WSDense(_WithStandardizedKernel):
    """The kernel is `(in, out)`."""

    def _product(self, x):
        self.x = x
        return x @ self.h

    def _product_backward(self, dy):
        return dy @ self.h.T, _sum_of_products(self.x, dy)


@dataclass
class WSConv(_WithStandardizedKernel):
    """`y[i] = sum over the window of x[i * strides + offset] @ h[offset]`.

    `x` is padded, "SAME" or by a pair of numbers for each space axis.
    """

    strides: int | tuple[int, ...] = 1
    padding: str | tuple[tuple[int, int], ...] = "SAME"

    def _product(self, x):
        window = Window(self.h.shape[:-2], self.strides)
        pads = window.same(x.shape[1:-1]) if self.padding == "SAME" else self.padding
        self.padded = np.pad(x, ((0, 0), *pads, (0, 0)))
        self.inside = (slice(None), *(slice(b, -a or None) for b, a in pads))
        self.places = window.places(window.steps(self.padded.shape[1:-1]))
        return sum(self.padded[at] @ self.h[offset] for offset, at in self.places)

    def _product_backward(self, dy):
        dx, dh = np.zeros(self.padded.shape), np.zeros(self.h.shape)
        for offset, at in self.places:
            dx[at] += dy @ self.h[offset].T
            dh[offset] = _sum_of_products(self.padded[at], dy)
        return dx[self.inside], dh


@dataclass
class WSConvTranspose(_WithStandardizedKernel):
    """`y[i * strides + offset] = sum of x[i] @ h[-1 - offset]`: Flax's, padded "VALID".

    Where the strides exceed the window, so that no `x` reaches an output, it is the bias alone.
    """

    strides: int | tuple[int, ...] = 1

    def _product(self, x):
        window, steps = Window(self.h.shape[:-2], self.strides), x.shape[1:-1]
        self.x, self.places = x, window.places(steps)
        self.flip = tuple(slice(None, None, -1) for _ in steps)
        h = self.h[self.flip]
        y = np.zeros((len(x), *window.reach(steps), h.shape[-1]), np.result_type(x, h))
        for offset, at in self.places:
            y[at] += x @ h[offset]
        return y

    def _product_backward(self, dy):
        h, dh = self.h[self.flip], np.zeros(self.h.shape)
        for offset, at in self.places:
            dh[offset] = _sum_of_products(self.x, dy[at])
        return sum(dy[at] @ h[offset].T for offset, at in self.places), dh[self.flip]


class Window:
    """A window that moves over space in strides."""

    def __init__(self, shape, strides):
        self.shape, self.strides = shape, np.broadcast_to(strides, len(shape)).tolist()

    def _axes(self, lengths):
        return zip(lengths, self.shape, self.strides, strict=True)

    def same(self, space):
        """The padding of "SAME": one step per stride; an odd remainder goes last."""
        missing = [max((n - 1) // s * s + k - n, 0) for n, k, s in self._axes(space)]
        return [(m // 2, m - m // 2) for m in missing]

    def steps(self, space):
        """How many steps there are in a space."""
        return [(n - k) // s + 1 for n, k, s in self._axes(space)]

    def reach(self, steps):
        """How much space that many steps cover, with the last one as long as the others."""
        return [(n - 1) * s + max(k, s) for n, k, s in self._axes(steps)]

    def places(self, steps):
        """Each offset in the window, and where in `(n, *space, c)` it lies, step after step."""
        return [(offset, self._at(offset, steps)) for offset in np.ndindex(*self.shape)]

    def _at(self, offset, steps):
        axes = zip(offset, steps, self.strides, strict=True)
        return (slice(None), *(slice(o, o + n * s, s) for o, n, s in axes))


def _all_but_last(x):
    return tuple(range(x.ndim - 1))


def _sum_of_products(x, dy):
    """`sum of x[..., i] * dy[..., j]`."""
    return np.tensordot(x, dy, 2 * [_all_but_last(x)])
