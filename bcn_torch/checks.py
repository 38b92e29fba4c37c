"""Every complaint about bad arguments or input: one function a rule.

Each message states the rule, the values seen and the way out.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn


def activation(x: Tensor, channels: int) -> None:
    """The input is one that a layer for so many channels can normalize: all four rules below."""
    floating_point(x.dtype)
    batch_and_channels(x.shape)
    same_channels(x.shape, channels)
    not_empty(x.shape)


def floating_point(dtype: torch.dtype, what: str = "input") -> None:
    """Only real floating-point numbers can be normalized."""
    if not dtype.is_floating_point:
        raise ValueError(
            f"The {what} must be of a real floating-point type, but it is {dtype}. "
            "Convert it first, for example with x.float()."
        )


def batch_and_channels(shape: Sequence[int]) -> None:
    """The input has a batch axis, which comes first, and a channel axis, which comes second."""
    if len(shape) < 2:
        raise ValueError(
            "The input must have a batch axis and a channel axis, [batch, channels, *], but its "
            f"shape is {tuple(shape)}. For a single sample, add the batch axis with x[None]."
        )


def same_channels(shape: Sequence[int], channels: int) -> None:
    """The input has as many channels as the layer was made for."""
    if shape[1] != channels:
        raise ValueError(
            f"The number of channels, axis 1 of [batch, channels, *], must be {channels} here, but "
            f"it is {shape[1]}: the input's shape is {tuple(shape)}. If its channels come last, "
            "move them with x.movedim(-1, 1); otherwise make the module for that many channels."
        )


def not_empty(shape: Sequence[int]) -> None:
    """There is no mean of nothing."""
    if math.prod(shape) == 0:
        raise ValueError(
            f"The input must not be empty, but its shape is {tuple(shape)}. Skip the empty batch."
        )


def channel_count(channels: int) -> None:
    """There is something to normalize."""
    if channels < 1:
        raise ValueError(f"There must be at least 1 channel, but channels={channels}.")


def group_count(channels: int, groups: int) -> None:
    """Groups are of the same size."""
    channel_count(channels)
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    if groups not in divisors:
        raise ValueError(
            f"groups must divide the number of channels, but groups={groups} and there are "
            f"{channels} channels. Any of {', '.join(map(str, divisors))} would do."
        )


def momentum(value: float) -> None:
    """A moving average weighs the new value by a number from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(
            "momentum is the weight of the new value in the running estimates and must be from 0 "
            f"to 1, but momentum={value}. A Flax momentum m, the weight of the old value, is 1 - m "
            "here: 0.9 there is 0.1 here."
        )


def eps(value: float) -> None:
    """A positive number keeps the square root away from 0."""
    if not 0 < value < math.inf:
        raise ValueError(
            f"eps must be positive and finite, but eps={value}. The usual one is 1e-5."
        )


def several_values(shape: Sequence[int]) -> None:
    """The variance of a single value is 0, and says nothing.

    Silent in a compiled graph, which has no place for a warning.
    """
    if torch.compiler.is_compiling():
        return
    if math.prod(shape) == shape[1]:
        warnings.warn(
            f"The batch has a single value per channel (its shape is {tuple(shape)}), so its "
            "variance is 0 and a batch norm in training learns nothing from it. Use a larger "
            "batch, or evaluate with .eval().",
            stacklevel=2,
        )


def several_values_in_a_group(shape: Sequence[int], groups: int) -> None:
    """A single value standardized is 0, whatever it was.

    Silent in a compiled graph, which has no place for a warning.
    """
    if not torch.compiler.is_compiling() and math.prod(shape[1:]) == groups:
        warnings.warn(
            f"Each of the {groups} groups has a single value (the shape is {tuple(shape)}), so the "
            "output is the shift, whatever the input. Use fewer groups.",
            stacklevel=2,
        )


def fan_in(shape: Sequence[int]) -> None:
    """Weight standardization needs two weights or more for each output channel."""
    weights = math.prod(shape[1:])
    if weights < 2:
        raise ValueError(
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            f"weight of shape {tuple(shape)} has {weights}. Use the layer without weight "
            "standardization here."
        )


def gamma(value: float) -> None:
    """A factor of 0 would leave nothing."""
    if not 0 < value < math.inf:
        raise ValueError(
            f"gamma must be positive and finite, but gamma={value}. Without a factor it is 1."
        )


def gain(weight_shape: Sequence[int], wanted: bool, value: Tensor | None) -> None:
    """A gain goes with a standardization that has one, and has a value for each output channel."""
    expected = (weight_shape[0],) if wanted else None
    given = None if value is None else tuple(value.shape)
    if given != expected:
        raise ValueError(
            "The gain must be None without Standardization(gain=True), and with it have one value "
            f"for each output channel: for a weight of shape {tuple(weight_shape)} and "
            f"gain={wanted} its shape must be {expected}, but it is {given}."
        )


def one_of(argument: str, value: str, names: Iterable[str]) -> None:
    """The name is a known one."""
    if value not in names:
        raise ValueError(
            f"{argument} must be one of {', '.join(map(repr, names))}, but {argument}={value!r}."
        )


def blocks(value: Sequence[Sequence[int]]) -> None:
    """The network has a block, and each block a convolution."""
    if not value or not all(value):
        raise ValueError(
            "blocks must have at least one block, and each block at least one convolution, but "
            f"blocks={value!r}. Give each block the output channels of its convolutions, for "
            "example ((64, 64), (128, 128))."
        )


def image_batch(x: Tensor, channels: int, halvings: int) -> None:
    """The input is a batch of images, large enough to be halved so many times."""
    if x.dim() != 4:
        raise ValueError(
            "The input must be a batch of images, [batch, channels, height, width], but its shape "
            f"is {tuple(x.shape)}. For a single image, add the batch axis with x[None]."
        )
    activation(x, channels)
    height, width = x.shape[2:]
    smallest = 2**halvings
    if min(height, width) < smallest:
        raise ValueError(
            f"The images are {height}x{width}, too small for {halvings} blocks, each of which "
            f"halves them: the smallest size is {smallest}x{smallest}. Use larger images, or fewer "
            "blocks."
        )


def moving_average(momentum: float | None) -> float:
    """The running estimates are moving averages, which have a momentum: this one."""
    if momentum is None:
        raise ValueError(
            "momentum=None, a cumulative average, has no counterpart here. Give a momentum, for "
            "example momentum=0.1."
        )
    return momentum


def not_lazy(module: nn.Module) -> None:
    """The module knows its size."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"A {type(module).__name__} does not know its size yet. Run the model on a batch first."
        )


def own_forward(module: nn.Module, known: Iterable[type[nn.Module]]) -> None:
    """The module does what PyTorch's does, and nothing else that would be lost."""
    if type(module).forward not in [kind.forward for kind in known]:
        raise ValueError(
            f"{type(module).__name__} has a forward of its own, which a conversion would lose. "
            "Convert it by hand, or leave it as it is with leave."
        )


def not_parametrized(module: nn.Module) -> None:
    """The weight and bias are parameters, and not computed from others."""
    computed = [name for name in ("weight", "bias") if name not in module._parameters]
    if computed:
        raise ValueError(
            f"The {' and '.join(computed)} of this {type(module).__name__} is computed by a "
            "parametrization, such as weight_norm or spectral_norm, which a conversion would lose. "
            "Remove it first, or leave the module as it is with leave."
        )


def all_convertible(complaints: Sequence[str]) -> None:
    """Every module can be converted."""
    if complaints:
        raise ValueError(
            f"Nothing was converted, because of {len(complaints)} of the modules, which can also "
            "be left as they are with leave=lambda name, module: name in {...}:\n"
            + "\n".join(complaints)
        )


def has_torch_batch_norm(norms: Collection[nn.Module]) -> None:
    """There is something to convert."""
    if not norms:
        raise ValueError(
            "The model must have a batch norm of torch.nn to convert, but it has none that is not "
            "to be left as it is."
        )


def before_one_norm(names: Sequence[str]) -> None:
    """By the order of definition no convolution stands before two norms."""
    if names:
        raise ValueError(
            "The convolution before each norm must be clear from the order in which the modules "
            f"are defined, but by that order {', '.join(names)} would be before several norms. "
            "Give example_inputs, which show where the outputs of the convolutions go."
        )


def several_batches(batches: object) -> None:
    """Batches are given one by one, not as one tensor."""
    if isinstance(batches, Tensor):
        raise ValueError(
            "The batches must be an iterable of inputs, but they are one tensor of shape "
            f"{tuple(batches.shape)}. For a single batch, put it in a list."
        )


def foldable(replacements: Collection[nn.Module]) -> None:
    """There is something to fold."""
    if not replacements:
        raise ValueError(
            "The model must have something to fold, a standardized weight, or a batch norm of "
            "bcn_torch that alone uses the output of a convolution or linear layer, but on the "
            "example there was neither. Convert the norms of torch.nn with convert_batch_norm."
        )


def has_batch_norm(norms: Collection[nn.Module]) -> None:
    """There are estimates to recalibrate."""
    if not norms:
        raise ValueError(
            "The model must have a BatchNorm, EstimatedBatchNorm or BatchChannelNorm of bcn_torch, "
            "but it has none. Convert those of torch.nn with convert_batch_norm."
        )


def reached(samples: Iterable[int]) -> None:
    """There is no average of nothing."""
    if not any(samples):
        raise ValueError(
            "The batches must reach a batch norm at least once, but none did. Give at least one "
            "batch (an iterator can be used once only), and the model as it was before "
            "torch.compile."
        )


def finite_moments(mean: Tensor, var: Tensor, name: str) -> None:
    """Estimates are made of finite numbers."""
    bad = (~(mean.isfinite() & var.isfinite())).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The mean and variance of every channel must be finite, but at {name!r} those of the "
            f"channels {', '.join(map(str, bad))} are not. The statistics are as they were before; "
            "leave the batch out."
        )
