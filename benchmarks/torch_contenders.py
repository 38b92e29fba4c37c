"""What `layer.py` times of PyTorch: the published formulas, and its own layers."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from contenders import Make, Run, Setting
from jax import Array
from timing import torch_device
from torch import Tensor, nn

import bcn_torch


def formulas(setting: Setting, *, estimate: bool = True) -> nn.Module:
    """Batch-channel normalization as it is published, stage after stage."""
    return bcn_torch.BatchChannelNorm(setting.shape[-1], setting.groups, estimate=estimate)


def pair(setting: Setting) -> nn.Module:
    """What PyTorch offers, batch norm and then group norm."""
    channels = setting.shape[-1]
    batch_norm = nn.BatchNorm3d if len(setting.shape) == 5 else nn.BatchNorm2d
    layers = nn.Sequential(batch_norm(channels), nn.GroupNorm(setting.groups, channels))
    return layers.to(getattr(torch, setting.dtype))


def contiguous(_: Setting) -> torch.memory_format:
    """PyTorch's usual memory format, channels first."""
    return torch.contiguous_format


def channels_last(setting: Setting) -> torch.memory_format:
    """The memory format that has the axes in JAX's order."""
    return torch.channels_last_3d if len(setting.shape) == 5 else torch.channels_last


def program(
    make: Callable[[Setting], nn.Module],
    *,
    memory_format: Callable[[Setting], torch.memory_format] = contiguous,
    compile_it: bool = False,
) -> Make:
    """A module: the output; backward also the gradients of the parameters and the input."""

    def make_run(setting: Setting, x: Array, dy: Array) -> Run:
        module = make(setting).to(torch_device()).train(setting.train)
        # A new shape is to be a new program, not a more general one.
        forward = torch.compile(module, dynamic=False) if compile_it else module
        given, gradient = (in_torch(array, memory_format(setting)) for array in (x, dy))
        if not setting.backward:
            return torch.no_grad()(lambda: forward(given))
        given.requires_grad_()

        def step() -> None:
            module.zero_grad()
            given.grad = None
            forward(given).backward(gradient)

        return step

    return make_run


def in_torch(array: Array, memory_format: torch.memory_format) -> Tensor:
    """The same numbers, channels first."""
    wide = torch.from_numpy(np.array(array, np.float32))  # NumPy itself has no bfloat16
    values = wide.to(torch_device(), getattr(torch, array.dtype.name))
    return values.movedim(-1, 1).contiguous(memory_format=memory_format)


@cache
def can_compile() -> bool:
    """Whether `torch.compile` works on this machine: it needs a C++ compiler, or Triton."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=torch_device()))
    except RuntimeError as error:
        print(f"torch.compile does not work here, and is left out: {error}")
        return False
    return True
