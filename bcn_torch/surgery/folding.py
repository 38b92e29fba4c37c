"""Fold norms and standardized weights into plain weights."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bcn_torch.norms import BatchChannelNorm, BatchNorm, EstimatedBatchNorm
from bcn_torch.surgery.flow import observe, sole_readers
from bcn_torch.surgery.replacement import PLAIN, STANDARDIZED, Layer, copy_with, rebuild
from bcn_torch.weight_standardization import WSLayer, standardize_weight

Norm = BatchNorm | BatchChannelNorm

LAYERS = (*STANDARDIZED, nn.Linear, *PLAIN)
NORMS = (BatchNorm, EstimatedBatchNorm, BatchChannelNorm)


@torch.inference_mode(False)
@torch.no_grad()
def fold(model: nn.Module, *example_inputs: Any) -> nn.Module:
    """Copy a model for inference, with norms and standardized weights folded into plain weights.

    In evaluation a batch norm is an affine map of each channel, which the convolution or linear
    layer before it can do as well:

        factor = scale / sqrt(exp_var + eps)
        weight = factor * weight
        bias = factor * (bias - exp_mean) + shift

    So a `WSConv` or `WSLinear` becomes PyTorch's own layer, with the standardized weight. A
    `BatchNorm` or `EstimatedBatchNorm` after such a layer, or after PyTorch's own, is folded into
    it and replaced by `torch.nn.Identity`; of a `BatchChannelNorm` the `ChannelNorm` stays. The
    weights are computed in float64 and rounded once, to the weight's dtype.

    The layer before each norm is found by running the model on the example, in evaluation. The norm
    is folded if its input is the output of the layer itself, both run once, and nothing else reads
    that output: the model returns the same, bit for bit, if every other reader is given NaN or
    large random numbers instead. Everything else is left unchanged. So of the example only the path
    that it takes through the model matters, not its values. Layers whose weight is computed by a
    parametrization or a hook are left unchanged too.

    The model must call its layers and norms: a forward that reads their weights itself would find
    other ones. Hooks of replaced modules are not carried over.

    Args:
        model: any module. It is not changed; the copy is in evaluation.
        *example_inputs: positional arguments of the model, which are not changed either.

    Raises:
        ValueError: there is nothing to fold.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from bcn_torch import BatchChannelNorm, WSConv2d, fold
        >>> model = nn.Sequential(WSConv2d(3, 64, 3), BatchChannelNorm(64, 32))
        >>> fold(model, torch.randn(1, 3, 8, 8))
        Sequential(
          (0): Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1))
          (1): ChannelNorm(64, groups=32, eps=1e-05, affine=True)
        )
    """
    layers = [m for m in model.modules() if isinstance(m, Layer) and "weight" in m._parameters]
    run = partial(observe, model, example_inputs, LAYERS, lambda m: type(m) in NORMS)
    norm_after = sole_readers(run, layers)
    replacements: dict[nn.Module, nn.Module] = {
        layer: _folded(layer, norm_after.get(layer))
        for layer in layers
        if layer in norm_after or type(layer) in PLAIN
    }
    if not replacements:
        raise ValueError(
            "The model must have something to fold, a standardized weight, or a batch norm of "
            "bcn_torch that alone uses the output of a convolution or linear layer, but on the "
            "example there was neither. Convert the norms of torch.nn with convert_batch_norm."
        )
    for norm in norm_after.values():
        is_bcn = isinstance(norm, BatchChannelNorm)
        replacements[norm] = norm.channel_norm if is_bcn else nn.Identity()
    return copy_with(replacements, model).eval()


def _folded(layer: Layer, norm: Norm | None) -> nn.Module:
    """The plain layer that computes `layer`, and then the batch norm in `norm`, if there is one."""
    weight, bias = _exact(layer.weight), layer.bias
    if isinstance(layer, WSLayer):
        gain = None if layer.gain is None else _exact(layer.gain)
        weight = standardize_weight(weight, layer.standardization, gain)
    if norm is not None:
        batch_norm = norm.batch_norm if isinstance(norm, BatchChannelNorm) else norm
        mean, var = _exact(batch_norm.exp_mean), _exact(batch_norm.exp_var)
        scale, shift = _exact(batch_norm.scale, otherwise=1), _exact(batch_norm.shift)
        # y = scale * (w x + b - mu_hat) / sqrt(sigma2_hat + eps) + shift
        factor = scale / (var + batch_norm.eps).sqrt()
        weight = factor.view(-1, *(1,) * (weight.dim() - 1)) * weight
        bias = factor * (_exact(bias) - mean) + shift

    def rounded(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(layer.weight), layer.weight.requires_grad)

    bias = None if bias is None else rounded(bias)
    return rebuild(layer, PLAIN.get(type(layer), type(layer)), rounded(weight), bias)


def _exact(values: Tensor | None, otherwise: float = 0) -> Tensor:
    """In float64, on the CPU, because some devices have no float64; `otherwise` if None."""
    if values is None:
        return torch.tensor(otherwise, dtype=torch.float64)
    return values.detach().to("cpu", torch.float64)
