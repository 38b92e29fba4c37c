"""Fold norms and standardized weights into plain weights."""

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bcn_torch import checks
from bcn_torch.norms import BatchChannelNorm, BatchNorm, EstimatedBatchNorm
from bcn_torch.surgery.flow import observe
from bcn_torch.surgery.recognition import batch_norm_parts, may_be_batch_norm, plain_kind
from bcn_torch.surgery.replacement import PLAIN, STANDARDIZED, copy_with, rebuild
from bcn_torch.weight_standardization import WSLayer, standardize_weight

LAYERS = (*STANDARDIZED, nn.Linear, *PLAIN)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (BatchNorm, EstimatedBatchNorm, BatchChannelNorm)


class AffineMap(NamedTuple):
    """What a batch norm computes in evaluation: `scale * (x - mean) / deviation + shift`.

    Attributes:
        mean, deviation, scale, shift: in float64.
        after: what comes then.
    """

    mean: Tensor
    deviation: Tensor
    scale: Tensor
    shift: Tensor
    after: nn.Module


@torch.inference_mode(False)
@torch.no_grad()
def fold(model: nn.Module, *example_inputs: Any) -> nn.Module:
    """Copy a model for inference, with norms and standardized weights folded into plain weights.

    In evaluation a batch norm is an affine map of each channel, which the convolution or linear
    layer before it can do as well:

        factor = scale / sqrt(exp_var + eps)
        weight = factor * weight
        bias = factor * (bias - exp_mean) + shift

    So a `WSConv` or `WSLinear` becomes PyTorch's own layer, with the standardized weight. A batch
    norm after such a layer, or after PyTorch's own, is folded into it and replaced by
    `torch.nn.Identity`; of a `BatchChannelNorm` the `ChannelNorm` stays. The weights are computed
    in float64 and rounded once, to the weight's dtype.

    Layers and norms are known by what they do: with `torch.nn.BatchNorm2d` (1d, 3d, Sync) also
    torchvision's `FrozenBatchNorm2d`, for example, or timm's `BatchNormAct2d`, whose drop and
    activation stay. A class with a forward of its own is tried on random numbers.

    The model runs on the example once, in evaluation. A norm is folded if all its inputs are the
    very outputs of one layer, and nothing else reads these: no operation, also on a view of them,
    and nobody to whom the model returns them or who finds them stored. Everything else is left
    unchanged.

    So the example must be such that all of the model runs that will run later: the branches that
    depend on an input's shape, or on values that the model turns into Python's. Its values do not
    matter otherwise, not those of a mask or a threshold either. What reads an output unseen is code
    in another thread, and code that is given the address of the memory.

    Left unchanged are also layers and norms that have forward hooks, or weights that something else
    reads, or that are called with keywords, and layers whose weight is computed by a
    parametrization.

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
    checks.require_module("model", model)
    flow = observe(model, example_inputs, _is_layer, _is_norm)
    found = flow.sole_readers()
    affine_maps = {
        layer: affine_map for layer, norm in found.items() if (affine_map := _affine_map(norm))
    }
    replacements: dict[nn.Module, nn.Module] = {
        layer: _folded(layer, affine_maps.get(layer))
        for layer in model.modules()
        if layer in affine_maps
        or (type(layer) in PLAIN and _is_layer(layer) and layer not in flow.exposed)
    }
    if not replacements:
        raise ValueError(
            "The model must have something to fold, a standardized weight, or a batch norm that "
            "alone uses the output of a convolution or linear layer, but on the example there was "
            "neither. Give an example on which every branch of the model runs."
        )
    replacements |= {found[layer]: affine_map.after for layer, affine_map in affine_maps.items()}
    return copy_with(replacements, model).eval()


def _is_layer(module: nn.Module) -> bool:
    if "weight" not in module._parameters or _is_hooked(module):
        return False
    # A subclass may do more than the layer that it would become.
    if isinstance(module, CONVOLUTIONS) and not isinstance(module, WSLayer):
        return plain_kind(module) is not None
    return type(module) in LAYERS


def _is_norm(module: nn.Module) -> bool:
    return (type(module) in NORMS or may_be_batch_norm(module)) and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    hooks = *module._forward_hooks, *module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def _affine_map(norm: Any) -> AffineMap | None:
    """What a norm computes; None if it is something else, or normalizes by the batch."""
    after: nn.Module = nn.Identity()
    if isinstance(norm, BatchChannelNorm):
        norm, after = norm.batch_norm, norm.channel_norm
    if isinstance(norm, BatchNorm):
        mean, var, scale, shift, eps = norm.exp_mean, norm.exp_var, norm.scale, norm.shift, norm.eps
    else:
        try:
            parts = batch_norm_parts(norm)
        except ValueError:
            return None
        if parts.mean is None or parts.var is None:
            return None
        mean, var, scale, shift, eps = parts.mean, parts.var, parts.weight, parts.bias, parts.eps
        if parts.after:
            after = nn.Sequential(OrderedDict(parts.after))
    deviation = (_exact(var) + eps).sqrt()
    return AffineMap(_exact(mean), deviation, _exact(scale, otherwise=1), _exact(shift), after)


def _folded(layer: Any, affine_map: AffineMap | None) -> nn.Module:
    """The plain layer that computes `layer`, and then the affine map, if there is one."""
    weight, bias = _exact(layer.weight), layer.bias
    if isinstance(layer, WSLayer):
        gain = None if layer.gain is None else _exact(layer.gain)
        weight = standardize_weight(weight, layer.standardization, gain)
    if affine_map is not None:
        mean, deviation, scale, shift, _ = affine_map
        # y = scale * (w x + b - mu_hat) / sqrt(sigma2_hat + eps) + shift
        factor = scale / deviation
        weight = factor.view(-1, *(1,) * (weight.dim() - 1)) * weight
        bias = factor * (_exact(bias) - mean) + shift

    def rounded(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(layer.weight), layer.weight.requires_grad)

    bias = None if bias is None else rounded(bias)
    if type(layer) in PLAIN:
        return rebuild(layer, PLAIN[type(layer)], rounded(weight), bias)
    new = copy.copy(layer)
    new._parameters = {**layer._parameters, "weight": rounded(weight), "bias": bias}
    return new


def _exact(values: Tensor | None, otherwise: float = 0) -> Tensor:
    """In float64, on the CPU, because some devices have no float64; `otherwise` if None."""
    if values is None:
        return torch.tensor(otherwise, dtype=torch.float64)
    return values.detach().to("cpu", torch.float64)
