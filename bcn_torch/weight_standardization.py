"""Weight standardization, and the layers that use it."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bcn_torch import checks
from bcn_torch.precision import widen


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Give the weights of each output channel mean 0 and variance `var / (var + eps)`, nearly 1.

        w_hat = (w - mean) / sqrt(var + eps)

    with the mean and the *unbiased* variance over all axes but the first. Computed in float32 or
    wider, returned in the weight's dtype.

    Args:
        weight: of a linear layer, `[out, in]`, or of a convolution, `[out, in / groups, *window]`.
        eps: added to the variance, inside the root.

    Raises:
        ValueError: an output channel has a single weight, whose variance is not defined, or bad
            arguments.

    Example:
        >>> import torch
        >>> from bcn_torch import standardize_weight
        >>> standardize_weight(torch.tensor([[1.0, 2.0, 3.0]])).round(decimals=3)
        tensor([[-1.,  0.,  1.]])

    Source: Qiao et al., arXiv 1903.10520; unbiased variance and eps inside the root as in the
    annotated implementation (`labml_nn/normalization/weight_standardization`).
    """
    checks.floating_point(weight.dtype, "weight")
    checks.fan_in(weight.shape)
    checks.eps(eps)
    w = widen(weight)
    axes = tuple(range(1, w.dim()))
    # N, the fan-in: how many weights an output channel has
    n = w.shape[1:].numel()
    # mu = 1/N sum w
    mean = w.mean(axes, keepdim=True)
    # sigma2 = 1/(N - 1) sum (w - mu)^2
    var = ((w - mean) ** 2).sum(axes, keepdim=True) / (n - 1)
    # w_hat = (w - mu) / sqrt(sigma2 + eps)
    return ((w - mean) / (var + eps).sqrt()).to(weight.dtype)


class _WSConv(_ConvNd):
    """What the convolutions share; the base classes bring their own constructors."""

    def reset_parameters(self) -> None:
        """Draw the weights; refuse here, while the layer is being made, a fan-in of 1."""
        checks.fan_in(self.weight.shape)
        super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` with the standardized weight."""
        return self._conv_forward(x, standardize_weight(self.weight), self.bias)


class WSConv1d(_WSConv, nn.Conv1d):
    """`torch.nn.Conv1d` with weight standardization, as `WSConv2d`."""


class WSConv2d(_WSConv, nn.Conv2d):
    """`torch.nn.Conv2d` with weight standardization: see `standardize_weight`.

    Takes every argument of `torch.nn.Conv2d` and has its parameters. The weight is standardized in
    float32 or wider, also under autocast, and on the fly: the parameter stays raw.

    Follow it with a normalization: standardized weights have no scale of their own to learn.

    Raises:
        ValueError: an output channel would have a single weight (fan-in 1).

    Example:
        >>> import torch
        >>> from bcn_torch import WSConv2d
        >>> WSConv2d(3, 64, kernel_size=3, padding=1)(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 64, 8, 8])

    Source: Qiao et al., arXiv 1903.10520.
    """


class WSConv3d(_WSConv, nn.Conv3d):
    """`torch.nn.Conv3d` with weight standardization, as `WSConv2d`."""


class WSLinear(nn.Linear):
    """`torch.nn.Linear` with weight standardization, as `WSConv2d`."""

    def reset_parameters(self) -> None:
        """Draw the weights; refuse here, while the layer is being made, a fan-in of 1."""
        checks.fan_in(self.weight.shape)
        super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` by the standardized weight."""
        return nn.functional.linear(x, standardize_weight(self.weight), self.bias)
