"""Fold norms and standardized weights into plain weights."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bcn_torch.norms import BatchChannelNorm, BatchNorm, EstimatedBatchNorm
from bcn_torch.surgery.flow import observe
from bcn_torch.surgery.replacement import PLAIN, STANDARDIZED, copy_with, rebuild
from bcn_torch.weight_standardization import WSLayer, standardize_weight

LAYERS = (*STANDARDIZED, nn.Linear, *PLAIN)
NORMS = (BatchNorm, EstimatedBatchNorm, BatchChannelNorm)
# What a batch norm of another library has, whatever its class is.
BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "eps")


class AffineMap(NamedTuple):
    """A batch norm in evaluation, in float64: `scale * (x - mean) / deviation + shift`."""

    mean: Tensor
    deviation: Tensor
    scale: Tensor
    shift: Tensor


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

    Batch norms are `BatchNorm` and `EstimatedBatchNorm`, and every other module that has `weight`,
    `bias`, `running_mean`, `running_var` and `eps` and in evaluation computes just the map above,
    which is tried on random numbers: `torch.nn.BatchNorm2d` (1d, 3d, Sync), for example, or
    torchvision's `FrozenBatchNorm2d`.

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
    flow = observe(model, example_inputs, _is_layer, _is_norm)
    found = flow.sole_readers()
    affine_maps = {
        layer: affine_map
        for layer, norm in found.items()
        if (affine_map := _affine_map(norm, dim=layer.get_parameter("weight").dim()))
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
    for layer in affine_maps:
        norm = found[layer]
        replacements[norm] = nn.Identity()
        if isinstance(norm, BatchChannelNorm):
            replacements[norm] = norm.channel_norm
    return copy_with(replacements, model).eval()


def _is_layer(module: nn.Module) -> bool:
    # A subclass may do more than the layer that it would become.
    return type(module) in LAYERS and "weight" in module._parameters and not _is_hooked(module)


def _is_norm(module: nn.Module) -> bool:
    ours = type(module) in NORMS
    return (ours or all(hasattr(module, name) for name in BATCH_NORM)) and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    hooks = *module._forward_hooks, *module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def _affine_map(norm: Any, dim: int) -> AffineMap | None:
    """The map that a norm of this library begins with, or that another one is, if it is one.

    Args:
        norm: has `BATCH_NORM`, if it is not of this library.
        dim: of the norm's input.
    """
    if isinstance(norm, BatchChannelNorm):
        norm = norm.batch_norm
    ours = isinstance(norm, BatchNorm)
    names = ("exp_mean", "exp_var", "scale", "shift") if ours else BATCH_NORM[:4]
    mean, var, scale, shift = (getattr(norm, name) for name in names)
    if mean is None or var is None:
        return None
    deviation = (_exact(var) + norm.eps).sqrt()
    affine_map = AffineMap(_exact(mean), deviation, _exact(scale, otherwise=1), _exact(shift))
    return affine_map if ours or _computes(norm, affine_map, dim) else None


def _computes(norm: nn.Module, affine_map: AffineMap, dim: int) -> bool:
    """Whether a module computes this map and no more, tried on random numbers."""
    mean, deviation, scale, shift = (
        values.view(-1, *(1,) * (dim - 2)) if values.dim() else values for values in affine_map
    )
    generator = torch.Generator().manual_seed(0)
    # Small and large deviations from the mean, because something may bound the output.
    sizes = torch.logspace(-3, 3, 16, dtype=torch.float64).view(-1, *(1,) * (dim - 1))
    shape = (len(sizes), len(affine_map.mean), *(2,) * (dim - 2))
    x_hat = sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
    try:
        y = copy.deepcopy(norm).to("cpu", torch.float64).eval()(mean + deviation * x_hat)
    except Exception:  # Any code may fail on such values, or in another precision.
        return False
    expected = scale * x_hat + shift
    return isinstance(y, Tensor) and y.shape == shape and torch.allclose(y, expected, 1e-6, 1e-6)


def _folded(layer: Any, affine_map: AffineMap | None) -> nn.Module:
    """The plain layer that computes `layer`, and then the affine map, if there is one."""
    weight, bias = _exact(layer.weight), layer.bias
    if isinstance(layer, WSLayer):
        gain = None if layer.gain is None else _exact(layer.gain)
        weight = standardize_weight(weight, layer.standardization, gain)
    if affine_map is not None:
        mean, deviation, scale, shift = affine_map
        # y = scale * (w x + b - mu_hat) / sqrt(sigma2_hat + eps) + shift
        factor = scale / deviation
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
