"""Weight standardization, and the layers that use it."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.modules.conv import _ConvNd

from bcn_torch import checks
from bcn_torch.precision import widen
from bcn_torch.tracing import one_node

EpsRole = Literal["added_to_variance", "added_to_deviation", "least_variance"]


class Standardization(NamedTuple):
    """How to standardize a weight; `bcn_torch.variants.WS` has the published choices.

        w_hat = gamma * (w - mean) / divisor * gain

    with the divisor, where `s` is the fan-in `n` if `fan_in_scaling`, otherwise 1:

        "added_to_variance"   sqrt(s * (var + eps))
        "added_to_deviation"  sqrt(s) * (sqrt(var) + eps)
        "least_variance"      sqrt(max(s * var, eps))

    Attributes:
        unbiased: whether the variance divides the sum of squares by `n - 1` instead of `n`.
        eps: keeps the divisor away from 0.
        eps_role: where eps enters the divisor, see above.
        fan_in_scaling: whether the result has variance `1 / n` instead of 1, so that the layer
            keeps the variance of its input.
        gain: whether the layer learns a gain for each output channel, `(out,)`, which starts at 1.
        gamma: a constant factor, for example to compensate for the activation function.
    """

    unbiased: bool = True
    eps: float = 1e-5
    eps_role: str = "added_to_variance"
    fan_in_scaling: bool = False
    gain: bool = False
    gamma: float = 1.0


def standardize_weight(
    weight: Tensor, standardization: Standardization = Standardization(), gain: Tensor | None = None
) -> Tensor:
    """Give the weights of each output channel mean 0 and variance `var / (var + eps)`, nearly 1.

        w_hat = (w - mean) / sqrt(var + eps)

    with the mean and the *unbiased* variance over all axes but the first, by default. Computed in
    float32 or wider, returned in the weight's dtype.

    A constant weight becomes 0, with a finite gradient: the derivative of `sqrt(var)` at 0 is taken
    as 0.

    Args:
        weight: of a linear layer, `[out, in]`, or of a convolution, `[out, in / groups, *window]`.
        standardization: the variance, the role of eps and the scale of the result.
        gain: the learned gain, `(out,)`, if the standardization has one.

    Raises:
        ValueError: an output channel has a single weight, which would always become 0, or an
            argument is out of its range.

    Example:
        >>> import torch
        >>> from bcn_torch import standardize_weight
        >>> standardize_weight(torch.tensor([[1.0, 2.0, 3.0]])).round(decimals=3)
        tensor([[-1.,  0.,  1.]])

    Source: Qiao et al., arXiv 1903.10520; by default unbiased variance and eps inside the root as
    in the annotated implementation (`labml_nn/normalization/weight_standardization`).
    """
    if not is_scripting():
        checks.require_floating_point(weight, "weight")
        _require_fan_in(weight.shape)
        standardization = _require_standardization(standardization)
        _require_gain(weight.shape, standardization.gain, gain)
    w = widen(weight)
    axes = list(range(1, w.dim()))
    # N, the fan-in: how many weights an output channel has
    n = w[0].numel()
    # mu = 1/N sum w
    mean = w.mean(axes, keepdim=True)
    # sigma2 = 1/(N - 1) sum (w - mu)^2, or 1/N
    var = ((w - mean) ** 2).sum(axes, keepdim=True) / (n - int(standardization.unbiased))
    # w_hat = gamma (w - mu) / divisor
    w_hat = standardization.gamma * (w - mean) / _divisor(var, n, standardization)
    if gain is not None:
        w_hat = w_hat * widen(gain).view([-1] + [1] * len(axes))
    return w_hat.to(weight.dtype)


def _divisor(var: Tensor, n: int, standardization: Standardization) -> Tensor:
    eps, s = standardization.eps, n if standardization.fan_in_scaling else 1
    if standardization.eps_role == "added_to_deviation":
        # sqrt(s) (sigma + eps)
        return s**0.5 * (_root(var) + eps)
    if standardization.eps_role == "least_variance":
        # sqrt(max(s sigma2, eps))
        return (s * var).clamp(min=eps).sqrt()
    # sqrt(s (sigma2 + eps))
    return (s * (var + eps)).sqrt()


def _root(var: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0."""
    positive = var > 0
    # The inner `where` keeps the infinite derivative out of the backward pass: 0 * inf is NaN.
    return torch.where(positive, torch.where(positive, var, 1.0).sqrt(), 0.0)


class WSLayer(nn.Module):
    """Base of all layers: the standardization and its learned gain, if any."""

    weight: Tensor
    gain: Tensor | None
    standardization: Standardization

    def __init__(
        self, *args: Any, standardization: Standardization = Standardization(), **kwargs: Any
    ) -> None:
        """Take the arguments of PyTorch's layer.

        Args:
            *args: arguments of PyTorch's layer.
            standardization: how to standardize the weight.
            **kwargs: arguments of PyTorch's layer.

        Raises:
            ValueError: an output channel would have a single weight (fan-in 1), or an attribute of
                the standardization is out of its range.
        """
        how = _require_standardization(standardization)
        super().__init__(*args, **kwargs)
        self.standardization = how
        gain = nn.Parameter(self.weight.new_ones(len(self.weight)))
        self.register_parameter("gain", gain if how.gain else None)

    def reset_parameters(self) -> None:
        """Initialize the weights; called by PyTorch's constructor, so a fan-in of 1 fails early."""
        _require_fan_in(self.weight.shape)
        super().reset_parameters()  # type: ignore[misc]  # defined by PyTorch's layer
        # PyTorch's constructor calls this before there is a gain.
        gain = self._parameters.get("gain")
        if gain is not None:
            nn.init.ones_(gain)

    def _standardized_weight(self) -> Tensor:
        return standardize_weight(self.weight, self.standardization, self.gain)


class _WSConv(WSLayer, _ConvNd):
    """Base of the convolutions; PyTorch's layers have the constructors."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` with the standardized weight."""
        if not is_scripting():  # noqa: SIM102  # TorchScript would compile what follows an `and`.
            if isinstance(x, Proxy):
                return one_node(self, x)
        return self._conv_forward(x, self._standardized_weight(), self.bias)


class WSConv1d(_WSConv, nn.Conv1d):
    """`torch.nn.Conv1d` with weight standardization, as `WSConv2d`."""


class WSConv2d(_WSConv, nn.Conv2d):
    """`torch.nn.Conv2d` with weight standardization: see `standardize_weight`.

    It has the arguments and parameters of `torch.nn.Conv2d`, a `standardization` and, if that has a
    gain, the parameter `gain`, `(out,)`. Each call standardizes the weight, in float32 or wider,
    also under autocast; the parameter stays raw.

    Follow it with a normalization layer: standardized weights cannot learn a scale.

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


class WSLinear(WSLayer, nn.Linear):
    """`torch.nn.Linear` with weight standardization, as `WSConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `x` by the standardized weight."""
        if not is_scripting():  # noqa: SIM102  # TorchScript would compile what follows an `and`.
            if isinstance(x, Proxy):
                return one_node(self, x)
        return nn.functional.linear(x, self._standardized_weight(), self.bias)


def _require_fan_in(shape: Sequence[int]) -> None:
    weights = math.prod(shape[1:])
    if weights < 2:
        raise ValueError(
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            f"weight of shape {tuple(shape)} has {weights}. Use the layer without weight "
            "standardization here."
        )


def _require_standardization(how: Any) -> Standardization:
    """The attributes must be flags, numbers and a role in their ranges.

    Returns:
        The same in Python's numbers.
    """
    if not isinstance(how, Standardization):
        raise ValueError(
            f"standardization must be a Standardization of bcn_torch, but it is {how!r}, of type "
            f"{type(how).__name__}."
        )
    checks.require_one_of("eps_role", how.eps_role, get_args(EpsRole))
    return Standardization(
        checks.require_flag("unbiased", how.unbiased),
        checks.require_eps(how.eps),
        how.eps_role,
        checks.require_flag("fan_in_scaling", how.fan_in_scaling),
        checks.require_flag("gain", how.gain),
        checks.require_factor("gamma", how.gamma),
    )


def _require_gain(weight_shape: Sequence[int], wanted: bool, value: Tensor | None) -> None:
    if value is not None:
        checks.require_floating_point(value, "gain")
    expected = (weight_shape[0],) if wanted else None
    given = None if value is None else tuple(value.shape)
    if given != expected:
        raise ValueError(
            "The gain must be None without Standardization(gain=True), and with it have one value "
            f"for each output channel: for a weight of shape {tuple(weight_shape)} and "
            f"gain={wanted} its shape must be {expected}, but it is {given}."
        )
