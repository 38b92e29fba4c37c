"""Recognize batch norms and convolutions by what they have and do, whatever their class.

Classes of `torch.nn` are known. Of any other a copy is run on small random inputs, and the results
are compared with those of the layer that it should be.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from bcn_torch.norms import BatchNorm
from bcn_torch.surgery.replacement import STANDARDIZED, Conv2dSame, rebuild

PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Of the inputs that are tried: images first, because a norm for images may broadcast others.
STATISTICS = ("running_mean", "running_var")
SPACES = ((2, 3), (), (3,), (2, 3, 2))


class BatchNormParts(NamedTuple):
    """What a batch norm of any class consists of.

    Attributes:
        channels: number of channels.
        weight, bias: learned, `(channels,)`, or None.
        mean, var: the running statistics, `(channels,)`, or None.
        eps: added to the variance.
        momentum: the weight of the new value; None is a cumulative average.
        frozen: whether it normalizes by its statistics in training too, and never updates them.
        after: its submodules, which are called in this order on the normalized values.
    """

    channels: int
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    momentum: float | None
    frozen: bool
    after: dict[str, nn.Module]


def may_be_batch_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm of `torch.nn`, or has running statistics of its own."""
    of_torch = isinstance(module, _BatchNorm) and not isinstance(module, BatchNorm)
    return of_torch or {"running_mean", "running_var"} <= {*module._buffers}


def batch_norm_parts(norm: nn.Module) -> BatchNormParts:
    """The parts of a batch norm.

    Raises:
        ValueError: it is lazy, its weight is parametrized, or it computes something other than a
            batch norm and then its submodules.
    """
    kind = type(norm).__name__
    if isinstance(norm, LazyModuleMixin):
        raise ValueError(f"A {kind} does not know its size yet. Run the model on a batch first.")
    refuse_parametrized(norm)
    mean: Tensor | None = getattr(norm, "running_mean", None)
    parts = BatchNormParts(
        channels=getattr(norm, "num_features", 0 if mean is None else mean.numel()),
        weight=getattr(norm, "weight", None),
        bias=getattr(norm, "bias", None),
        mean=mean,
        var=getattr(norm, "running_var", None),
        eps=getattr(norm, "eps", 1e-5),
        momentum=getattr(norm, "momentum", 0.1),
        frozen=False,
        after=dict(norm.named_children()),
    )
    if type(norm) in PLAIN_NORMS and "forward" not in vars(norm):
        return parts
    for frozen in (False, True):
        if _computes_batch_norm(norm, parts._replace(frozen=frozen)):
            return parts._replace(frozen=frozen)
    raise ValueError(
        f"{kind} has a forward of its own, which computes something other than a batch norm and "
        "then its submodules, so that a conversion would lose it. Convert it by hand, or leave it "
        "as it is with leave."
    )


def standardized_kind(conv: _ConvNd) -> type[_ConvNd]:
    """The class with weight standardization for a convolution.

    Raises:
        ValueError: there is none.
    """
    kind = type(conv)
    unfit = f"This {kind.__name__} is not standardized, because"
    if isinstance(conv, LazyModuleMixin):
        raise ValueError(f"{unfit} it does not know its size yet. Run the model on a batch first.")
    if isinstance(conv, _ConvTransposeNd):
        raise ValueError(f"{unfit} no transposed convolution can be.")
    if conv.in_channels // conv.groups * math.prod(conv.kernel_size) < 2:
        raise ValueError(
            f"{unfit} each of its output channels has a single weight, which would become 0."
        )
    plain = plain_kind(conv)
    if plain is None:
        raise ValueError(
            f"{unfit} it has a forward of its own, which computes something other than its "
            'convolution, with or without the padding "SAME" of TensorFlow.'
        )
    return STANDARDIZED[plain]


def plain_kind(conv: _ConvNd) -> type[_ConvNd] | None:
    """What a convolution computes, whatever its class is; None if it is something else."""
    kind, plain = type(conv), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[conv.weight.dim() - 3]
    inherited = kind.forward is plain.forward and kind._conv_forward is plain._conv_forward
    if inherited and "forward" not in vars(conv):
        return plain
    candidates = (plain, Conv2dSame) if plain is nn.Conv2d else (plain,)
    return next((c for c in candidates if _computes_convolution(conv, c)), None)


def refuse_parametrized(module: nn.Module) -> None:
    """A weight that is computed has no place in the new module."""
    stored = {*module._parameters, *module._buffers}
    computed = [n for n in ("weight", "bias") if n not in stored and hasattr(module, n)]
    if computed:
        raise ValueError(
            f"The {' and '.join(computed)} of this {type(module).__name__} is computed by a "
            "parametrization, such as weight_norm or spectral_norm, which a conversion would lose. "
            "Remove it first, or leave the module as it is with leave."
        )


@torch.no_grad()
def _computes_batch_norm(norm: nn.Module, parts: BatchNormParts) -> bool:
    """Whether it computes what its parts say, in evaluation and in training."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {name: draw(parts.channels) for name in ("weight", "bias", "running_mean")}
    # Small variances, beside which eps can be seen
    values["running_var"] = 1e-4 + 1e-3 * draw(parts.channels) ** 2

    for space in SPACES:
        x = draw(8, parts.channels, *space)
        x[-1] *= 1000  # Something may bound the output.
        shape = (-1, *(1,) * len(space))
        x = x * values["running_var"].sqrt().view(shape) + values["running_mean"].view(shape)
        try:
            runs = [_run(norm, values, x, training) for training in (False, True)]
        except Exception:  # The input may have too many axes or too few for it.
            continue
        expected = [_run_parts(norm, parts, values, x, training) for training in (False, True)]
        return all(map(_close, runs, expected))
    return False


Run = tuple[Tensor, Tensor | None, Tensor | None]


def _run(norm: nn.Module, values: dict[str, Tensor], x: Tensor, training: bool) -> Run:
    """The output of a copy of the norm with these values, and its statistics afterwards."""
    trial = _trial(norm).train(training)
    for name, tensor in values.items():
        if getattr(trial, name, None) is not None:
            getattr(trial, name).copy_(tensor)
    with _seeded():
        y = trial(x.clone())
    return y, *(getattr(trial, name, None) for name in STATISTICS)


def _run_parts(
    norm: nn.Module, parts: BatchNormParts, values: dict[str, Tensor], x: Tensor, training: bool
) -> Run:
    """The same of PyTorch's batch norm and the submodules of the norm."""
    weight, bias, mean, var = (
        None if getattr(parts, part) is None else values[name].clone()
        for part, name in zip(
            ("weight", "bias", "mean", "var"), ("weight", "bias", *STATISTICS), strict=True
        )
    )
    by_batch = mean is None or (training and not parts.frozen)
    momentum = parts.momentum
    if momentum is None:  # the average of all batches
        tracked = getattr(norm, "num_batches_tracked", None)
        momentum = 1 / (1 + (0 if tracked is None else int(tracked)))
    with _seeded():
        y = nn.functional.batch_norm(x, mean, var, weight, bias, by_batch, momentum, parts.eps)
        for module in parts.after.values():
            y = _trial(module).train(training)(y)
    return y, mean, var


def _close(actual: Run, expected: Run) -> bool:
    """Whether two runs are equal but for rounding to float32."""
    for a, b in zip(actual, expected, strict=True):
        if (a is None) != (b is None):
            return False
        if a is None or b is None:
            continue
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return False
        if not torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5):
            return False
    return True


@torch.no_grad()
def _computes_convolution(conv: _ConvNd, kind: type[_ConvNd]) -> bool:
    """Whether it computes the same as a convolution of this kind, on images of several sizes."""
    trial = _trial(conv)
    same = rebuild(trial, kind, trial.weight, trial.bias)
    generator = torch.Generator().manual_seed(0)
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    for extra in range(4, 7):
        sizes = [span + extra + axis for axis, span in enumerate(spans)]
        x = torch.randn(1, conv.in_channels, *sizes, generator=generator, dtype=torch.float64)
        for training in (False, True):
            try:
                with _seeded():
                    actual = trial.train(training)(x.clone())
                expected = same(x)
            except Exception:  # Any code of the convolution may fail.
                return False
            if actual.shape != expected.shape or not torch.allclose(
                actual.double(), expected, rtol=1e-4, atol=1e-4
            ):
                return False
    return True


def _trial(module: nn.Module) -> Any:
    """A copy to try, in float64 and without hooks."""
    trial: nn.Module = copy.deepcopy(module).to("cpu", torch.float64)
    for m in trial.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
    return trial


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time, and none taken from anybody else."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield
