"""Rebuild layers as another kind, and copy a model with some of its modules replaced."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.functional import conv2d, pad
from torch.nn.modules.conv import _ConvNd

from bcn_torch.tracing import one_node
from bcn_torch.weight_standardization import WSConv1d, WSConv2d, WSConv3d, WSLinear

Layer = _ConvNd | nn.Linear


class Conv2dSame(nn.Conv2d):
    """`torch.nn.Conv2d` with the padding "SAME" of TensorFlow: `ceil(size / stride)` outputs.

    The argument `padding` has no effect.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve `x`."""
        if not is_scripting():  # noqa: SIM102  # TorchScript would compile what follows an `and`.
            if isinstance(x, Proxy):
                return one_node(self, x)
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, dilation = self.stride, self.dilation
        top, bottom = _same_padding(x.shape[2], self.kernel_size[0], stride[0], dilation[0])
        left, right = _same_padding(x.shape[3], self.kernel_size[1], stride[1], dilation[1])
        padded = pad(x, [left, right, top, bottom])
        return conv2d(padded, weight, bias, stride, 0, dilation, self.groups)


class WSConv2dSame(WSConv2d):
    """`WSConv2d` with the padding "SAME" of TensorFlow, as `Conv2dSame`."""

    _conv_forward = Conv2dSame._conv_forward  # type: ignore[assignment]  # other argument names


def _same_padding(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """How many zeros come before and after `size` values: the odd one after."""
    outputs = (size + stride - 1) // stride
    zeros = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return zeros // 2, zeros - zeros // 2


STANDARDIZED: dict[type[_ConvNd], type[_ConvNd]] = {
    Conv2dSame: WSConv2dSame,
    nn.Conv1d: WSConv1d,
    nn.Conv2d: WSConv2d,
    nn.Conv3d: WSConv3d,
}
PLAIN: dict[type[nn.Module], type[_ConvNd] | type[nn.Linear]] = {
    WSLinear: nn.Linear,
    **{ours: theirs for theirs, ours in STANDARDIZED.items()},
}
CONVOLUTION_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
LINEAR_ARGUMENTS = ("in_features", "out_features")


def rebuild(
    layer: Layer, kind: type[_ConvNd] | type[nn.Linear], weight: Tensor, bias: Tensor | None
) -> nn.Module:
    """A layer of this kind with the arguments of `layer` and these parameters."""
    names = CONVOLUTION_ARGUMENTS if isinstance(layer, _ConvNd) else LINEAR_ARGUMENTS
    arguments = {name: getattr(layer, name) for name in names}
    # On the meta device, so that no random numbers are drawn for weights that are not used.
    new: Any = kind(**arguments, bias=bias is not None, device="meta")
    new.weight, new.bias = weight, bias
    return new.train(layer.training)


def copy_with(replacements: Mapping[nn.Module, nn.Module], model: nn.Module) -> nn.Module:
    """Copy the model with the old modules replaced by new ones; what it shares stays shared."""
    memo: dict[int, Any] = {}
    for old, new in replacements.items():
        # `deepcopy` takes what the memo holds for an object as its copy.
        memo[id(old)] = copy.deepcopy(new, memo)
    return copy.deepcopy(model, memo)
