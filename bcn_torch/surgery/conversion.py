"""Convert a model with batch norms of any class into one with BCN and WS."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bcn_torch import checks
from bcn_torch.norms import BatchChannelNorm
from bcn_torch.surgery.flow import observe
from bcn_torch.surgery.recognition import (
    BatchNormParts,
    batch_norm_parts,
    may_be_batch_norm,
    refuse_parametrized,
    standardized_kind,
)
from bcn_torch.surgery.replacement import copy_with, rebuild
from bcn_torch.weight_standardization import WSLayer

Norms = dict[nn.Module, BatchNormParts]
Lines = dict[nn.Module, str]


def convert_batch_norm(
    model: nn.Module,
    groups: int | None = None,
    ws: bool = True,
    *,
    example_inputs: Sequence[Any] | None = None,
    estimate: bool = True,
    momentum: float | None = None,
    leave: Callable[[str, nn.Module], bool] | None = None,
    report: Callable[[str], object] = print,
) -> nn.Module:
    """Copy a model, with a `BatchChannelNorm` for each batch norm, and WS before it.

    A batch norm is recognized by what it has and does, whatever its class: those of `torch.nn`,
    `SyncBatchNorm` included; subclasses and others that compute the same, which a run on random
    numbers shows; frozen ones, which use `running_mean` and `running_var` in training too; and
    those that call their own submodules on the result, such as a dropout and an activation. These
    submodules are kept: the batch norm becomes a `torch.nn.Sequential` of a `BatchChannelNorm`,
    called `norm`, and of them, under their names.

    A `BatchChannelNorm` takes over scale, shift, running mean and variance, eps, momentum, mode,
    dtype, device and `requires_grad`. Its channel norm starts at scale 1 and shift 0, trainable if
    the scale it took over is. Missing scales and shifts (`affine=False`) are added as trainable
    parameters (1 and 0), and missing statistics (`track_running_stats=False`) as mean 0 and
    variance 1. A frozen norm stays frozen: it normalizes by its estimates in training too
    (`update_stats=False`), and scales and shifts that were buffers become parameters without
    `requires_grad`.

    With `ws`, the convolution before each norm becomes a `WSConv` with the same parameters. With
    `example_inputs`, that convolution is found by running the model, in evaluation: its output is
    read by converted norms and by nothing else. Without them, and for norms that do not run on the
    example, it is the last layer defined before the norm in the same parent module, among those
    with as many outputs as the norm has channels. Standardized weights change the output of the
    convolution, so the old statistics no longer fit: `recalibrate` the model, and fine-tune it.

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
        report: called with a line for each module that is left as it is without being named by
            `leave`, or that is converted in a way to know of, and why. A list's `append` collects
            the lines.

    Raises:
        ValueError: there is no batch norm to convert; or some of the modules cannot be converted
            (the message lists all of them): groups do not divide the channels of a norm, or leave
            one channel in a group; a norm is lazy, has a forward that computes something else, or
            averages cumulatively (`momentum=None`) and no momentum is given; a convolution stands
            before two norms in the order of definition; a weight is parametrized.

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
    checks.require_module("model", model)
    ws, estimate = checks.require_flag("ws", ws), checks.require_flag("estimate", estimate)
    groups = None if groups is None else checks.require_integer("groups", groups)
    momentum = None if momentum is None else checks.require_momentum(momentum)
    is_sequence = isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str)
    if not (example_inputs is None or is_sequence):
        raise ValueError(
            "example_inputs must be a tuple of the positional arguments of the model, but they are "
            f"of type {type(example_inputs).__name__}. For a single input x, pass (x,)."
        )
    checks.require_callable("report", report)
    if leave is not None:
        checks.require_callable("leave", leave)
    left = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if leave
        and (isinstance(module, _ConvNd) or may_be_batch_norm(module))
        and leave(name, module)
    }
    names = {module: name or "the model itself" for name, module in model.named_modules()}
    norms: Norms = {}
    kinds: dict[_ConvNd, type[_ConvNd]] = {}
    problems: Lines = {}
    lines: Lines = {}
    for module in [m for m in names if m not in left]:
        try:
            if may_be_batch_norm(module):
                norms[module] = batch_norm_parts(module)
            elif ws and isinstance(module, _ConvNd) and not isinstance(module, WSLayer):
                kinds[module] = standardized_kind(module)
        except ValueError as error:
            # Only a batch norm of torch.nn must be converted: others may be no batch norms at all.
            (problems if isinstance(module, _BatchNorm) else lines)[module] = str(error)
    if not norms and not problems:
        raise ValueError(
            "The model must have a batch norm of torch.nn to convert, or one that computes the "
            "same, but it has none that is not to be left as it is."
        )
    before: list[_ConvNd] = []
    # With a problem, such as a lazy norm, the example may not run.
    if ws and not (problems and example_inputs is not None):
        before, why = _before(norms, kinds, model, example_inputs)
        lines |= why

    def convert(module: Any) -> nn.Module:
        if module in before:
            refuse_parametrized(module)
            return rebuild(module, kinds[module], module.weight, module.bias)
        like = _first_floating_point(module, model)
        new = _batch_channel_norm(norms[module], groups, estimate, momentum, like)
        return _followed_by(norms[module].after, new.train(module.training))

    replacements: dict[nn.Module, nn.Module] = {}
    for module in (*before, *norms):
        try:
            replacements[module] = convert(module)
        except ValueError as error:
            problems[module] = str(error)
    if problems:
        raise ValueError(
            f"Nothing was converted, because of {len(problems)} of the modules, which can also "
            "be left as they are with leave=lambda name, module: name in {...}:\n"
            + "\n".join(f"{name}: {problems[m]}" for m, name in names.items() if m in problems)
        )
    lines |= {
        norm: "It has one channel, so that its channel norm undoes what it has learned."
        for norm, parts in norms.items()
        if parts.channels == 1
    }
    for module, name in names.items():
        if module in lines:
            report(f"{name}: {lines[module]}")
    return copy_with(replacements, model)


def _before(
    norms: Norms, kinds: Collection[_ConvNd], model: nn.Module, example_inputs: Sequence[Any] | None
) -> tuple[list[_ConvNd], Lines]:
    """The convolutions before these norms, and what to say about the others and the guesses."""
    names = {module: name for name, module in model.named_modules()}
    last_defined = _last_defined_before(norms, model)
    if example_inputs is None:
        several = [names[conv] for conv in kinds if len(last_defined[conv]) > 1]
        if several:
            raise ValueError(
                "The convolution before each norm must be clear from the order in which the "
                f"modules are defined, but by that order {', '.join(several)} would be before "
                "several norms. Give example_inputs, which show where the outputs of the "
                "convolutions go."
            )
        before = [conv for conv in kinds if last_defined[conv]]
        why = (
            "by the order of definition it is not the layer before a norm that is converted. "
            "With example_inputs, this is seen instead."
        )
        return before, {c: _not_standardized(c, why) for c in kinds if not last_defined[c]}

    flow = observe(model, example_inputs, lambda m: isinstance(m, _ConvNd), may_be_batch_norm)
    before = []
    lines: Lines = {}
    for conv in kinds:
        readers = flow.readers.get(conv)
        if readers is None:
            # A head for training, for instance
            after = [norm for norm in last_defined[conv] if norm not in flow.sources]
            if len(after) == 1:
                before.append(conv)
                lines[conv] = (
                    f"This {type(conv).__name__} did not run on the example. It is standardized, "
                    f"because it is the last layer defined before {names[after[0]]}."
                )
            else:
                lines[conv] = _not_standardized(conv, "it did not run on the example.")
        elif readers and readers <= norms.keys():
            before.append(conv)
        elif readers & norms.keys():
            why = "something other than the norm that is converted reads its output too."
            lines[conv] = _not_standardized(conv, why)
        else:
            lines[conv] = _not_standardized(conv, "no norm that is converted reads its output.")
    return before, lines


def _not_standardized(conv: _ConvNd, why: str) -> str:
    return f"This {type(conv).__name__} is not standardized, because {why}"


def _last_defined_before(norms: Norms, model: nn.Module) -> defaultdict[nn.Module, list[nn.Module]]:
    """The norms after each layer, by the order of definition.

    For each norm that is the last of its siblings before it with as many outputs.
    """
    after: defaultdict[nn.Module, list[nn.Module]] = defaultdict(list)
    siblings: defaultdict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        earlier = siblings[name.rpartition(".")[0]]
        earlier.append(module)
        if module in norms:
            fitting = [m for m in earlier if _outputs(m) == norms[module].channels]
            if fitting and module not in after[fitting[-1]]:
                after[fitting[-1]].append(module)
    return after


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
    norm: BatchNormParts, groups: int | None, estimate: bool, momentum: float | None, like: Tensor
) -> BatchChannelNorm:
    """A batch-channel norm that takes over what `norm` has, of the dtype and device of `like`."""
    momentum = norm.momentum if momentum is None else momentum
    if momentum is None:
        raise ValueError(
            "momentum=None, a cumulative average, has no counterpart here. Give a momentum, for "
            "example momentum=0.1."
        )
    groups = _group_count(norm.channels, groups)
    # Batch norm without estimates in training cannot be frozen.
    new = BatchChannelNorm(norm.channels, groups, norm.eps, momentum, estimate or norm.frozen)
    new.to(like.device, like.dtype)
    if norm.frozen:
        new.update_stats = False
    if norm.weight is not None:
        new.batch_norm.scale = _parameter(norm.weight)
        new.channel_norm.requires_grad_(norm.weight.requires_grad)
    if norm.bias is not None:
        new.batch_norm.shift = _parameter(norm.bias)
    if norm.mean is not None and norm.var is not None:
        new.batch_norm.exp_mean.copy_(norm.mean)
        new.batch_norm.exp_var.copy_(norm.var)
    return new


def _parameter(values: Tensor) -> nn.Parameter:
    """The parameter itself; of a buffer, one that is not trained."""
    return values if isinstance(values, nn.Parameter) else nn.Parameter(values, requires_grad=False)


def _group_count(channels: int, groups: int | None) -> int:
    """The number of groups, by default as many as possible of two channels or more, up to 32."""
    possible = [d for d in range(1, channels + 1) if channels % d == 0 and channels >= 2 * d] or [1]
    if groups is None:
        return max(d for d in possible if d <= 32)
    if groups not in possible:
        raise ValueError(
            "groups must divide the number of channels into groups of two or more, because a "
            "channel norm of single channels undoes what the batch norm has learned, but "
            f"groups={groups} and there are {channels} channels. Any of "
            f"{', '.join(map(str, possible))} would do, and groups=None chooses for each norm."
        )
    return groups


def _followed_by(modules: dict[str, nn.Module], norm: BatchChannelNorm) -> nn.Module:
    """The norm, then these modules under their names."""
    if not modules:
        return norm
    name = "norm" if "norm" not in modules else "batch_channel_norm"
    sequence = nn.Sequential(OrderedDict({name: norm, **modules}))
    sequence.training = norm.training
    return sequence
