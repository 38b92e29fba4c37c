"""Convert a model with batch norms of `torch.nn` into one with BCN and WS."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from bcn_torch import checks
from bcn_torch.norms import BatchChannelNorm
from bcn_torch.surgery.flow import observe
from bcn_torch.surgery.replacement import STANDARDIZED, copy_with, rebuild


def convert_batch_norm(
    model: nn.Module,
    groups: int | None = 32,
    ws: bool = True,
    *,
    example_inputs: Sequence[Any] | None = None,
    estimate: bool = True,
    momentum: float | None = None,
    leave: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Copy a model, with a `BatchChannelNorm` for each batch norm, and WS before it.

    A `BatchChannelNorm` takes over scale, shift, running mean and variance, eps, momentum, mode,
    dtype, device and `requires_grad` of a `torch.nn.BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d` or
    `SyncBatchNorm`. Its channel norm starts at scale 1 and shift 0, trainable if the scale it took
    over is. Missing scales and shifts (`affine=False`) are added as trainable parameters (1 and 0),
    and missing statistics (`track_running_stats=False`) as mean 0 and variance 1.

    With `ws`, the convolution before each norm becomes a `WSConv` with the same parameters. With
    `example_inputs`, that convolution is found by running the model: its output is the input of the
    norm. Without them, it is the last layer defined before the norm in the same parent module,
    among those with as many outputs as the norm has channels. Standardized weights change the
    output of the convolution, so the old statistics no longer fit: `recalibrate` the model, and
    fine-tune it.

    The model itself is not changed. What it shares stays shared in the copy. Hooks of replaced
    modules are not carried over.

    Args:
        model: any module that has batch norms, or is one.
        groups: of the channel norms; None gives each as many as possible, up to 32, of two channels
            or more.
        ws: whether to standardize the weights of the convolutions.
        example_inputs: positional arguments of the model, to find the convolution before each norm.
        estimate: see `BatchChannelNorm`.
        momentum: the weight of the *new* value, instead of each batch norm's own.
        leave: returns true, given dotted name and module, for each batch norm and convolution to
            leave unchanged; a shared module is left everywhere.

    Raises:
        ValueError: there is no batch norm to convert; or some of the modules cannot be converted
            (the message lists all of them): groups do not divide the channels of a norm; a norm is
            lazy, has a forward of its own, or averages cumulatively (`momentum=None`) and no
            momentum is given; a convolution has a fan-in of 1, or stands before two norms in the
            order of definition; a weight is parametrized.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from bcn_torch import convert_batch_norm, recalibrate
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> model = convert_batch_norm(model)
        >>> [type(layer).__name__ for layer in model]
        ['WSConv2d', 'BatchChannelNorm', 'ReLU']
        >>> recalibrate(model, [torch.randn(8, 3, 8, 8) for _ in range(4)])

    Source: in the manner of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    if momentum is not None:
        checks.require_momentum(momentum)
    left = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if leave and isinstance(module, _BatchNorm | _ConvNd) and leave(name, module)
    }
    norms = {m for m in model.modules() if isinstance(m, _BatchNorm)} - left
    if not norms:
        raise ValueError(
            "The model must have a batch norm of torch.nn to convert, but it has none that is not "
            "to be left as it is."
        )
    convolutions: set[_ConvNd] = set()
    if ws and example_inputs is None:
        convolutions = _last_defined_before(norms, model) - left
    elif ws and example_inputs is not None:
        convolutions = _read_by(norms, model, example_inputs) - left

    def convert(module: _BatchNorm | _ConvNd) -> nn.Module:
        if isinstance(module, _BatchNorm):
            like = _first_floating_point(module, model)
            return _batch_channel_norm(module, groups, estimate, momentum, like)
        _refuse_parametrized(module)
        return rebuild(module, STANDARDIZED[type(module)], module.weight, module.bias)

    converted: dict[nn.Module, nn.Module] = {}
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm | _ConvNd) and module in norms | convolutions:
            try:
                converted[module] = convert(module)
            except ValueError as error:
                problems.append(f"{name or 'the model itself'}: {error}")
    if problems:
        raise ValueError(
            f"Nothing was converted, because of {len(problems)} of the modules, which can also "
            "be left as they are with leave=lambda name, module: name in {...}:\n"
            + "\n".join(problems)
        )
    return copy_with(converted, model)


def _read_by(
    norms: set[_BatchNorm], model: nn.Module, example_inputs: Sequence[Any]
) -> set[_ConvNd]:
    """The convolutions whose outputs these norms read."""
    flow = observe(
        model,
        example_inputs,
        lambda m: type(m) in STANDARDIZED,
        lambda m: isinstance(m, _BatchNorm),
    )
    sources = chain.from_iterable(flow.sources.get(norm, ()) for norm in norms)
    return {layer for layer in sources if isinstance(layer, _ConvNd)}


def _last_defined_before(norms: set[_BatchNorm], model: nn.Module) -> set[_ConvNd]:
    """For each norm, its last sibling before it with as many outputs, if that is a convolution."""
    before: dict[nn.Module, nn.Module] = {}
    siblings: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        earlier = siblings[name.rpartition(".")[0]]
        earlier.append(module)
        if isinstance(module, _BatchNorm) and module in norms:
            fitting = [m for m in earlier if _outputs(m) == module.num_features]
            if fitting:
                before[module] = fitting[-1]
    layers = [
        layer
        for layer in before.values()
        if isinstance(layer, _ConvNd) and type_before_parametrizations(layer) in STANDARDIZED
    ]
    names = {module: name for name, module in model.named_modules()}
    several = [names[layer] for layer, n in Counter(layers).items() if n > 1]
    if several:
        raise ValueError(
            "The convolution before each norm must be clear from the order in which the modules "
            f"are defined, but by that order {', '.join(several)} would be before several norms. "
            "Give example_inputs, which show where the outputs of the convolutions go."
        )
    return set(layers)


def _outputs(module: nn.Module) -> int | None:
    """How many channels or features come out of a convolution or linear layer."""
    if isinstance(module, _ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


def _first_floating_point(*modules: nn.Module) -> Tensor:
    """The first parameter or buffer, which tells dtype and device."""
    tensors = (t for m in modules for t in chain(m.parameters(), m.buffers()))
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _batch_channel_norm(
    norm: _BatchNorm, groups: int | None, estimate: bool, momentum: float | None, like: Tensor
) -> BatchChannelNorm:
    """A batch-channel norm that takes over what `norm` has, of the dtype and device of `like`."""
    _require_convertible(norm)
    momentum = norm.momentum if momentum is None else momentum
    if momentum is None:
        raise ValueError(
            "momentum=None, a cumulative average, has no counterpart here. Give a momentum, for "
            "example momentum=0.1."
        )
    channels = norm.num_features
    if groups is None:
        groups = max(d for d in range(1, 33) if channels % d == 0 and (d == 1 or channels >= 2 * d))
    new = BatchChannelNorm(channels, groups, norm.eps, momentum, estimate)
    new.to(like.device, like.dtype).train(norm.training)
    if norm.weight is not None:
        new.batch_norm.scale = norm.weight
        new.channel_norm.requires_grad_(norm.weight.requires_grad)
    if norm.bias is not None:
        new.batch_norm.shift = norm.bias
    if norm.running_mean is not None and norm.running_var is not None:
        new.batch_norm.exp_mean.copy_(norm.running_mean)
        new.batch_norm.exp_var.copy_(norm.running_var)
    return new


def _require_convertible(norm: _BatchNorm) -> None:
    kind = type(norm)
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"A {kind.__name__} does not know its size yet. Run the model on a batch first."
        )
    if kind.forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise ValueError(
            f"{kind.__name__} has a forward of its own, which a conversion would lose. "
            "Convert it by hand, or leave it as it is with leave."
        )
    _refuse_parametrized(norm)


def _refuse_parametrized(module: nn.Module) -> None:
    computed = [name for name in ("weight", "bias") if name not in module._parameters]
    if computed:
        raise ValueError(
            f"The {' and '.join(computed)} of this {type(module).__name__} is computed by a "
            "parametrization, such as weight_norm or spectral_norm, which a conversion would lose. "
            "Remove it first, or leave the module as it is with leave."
        )
