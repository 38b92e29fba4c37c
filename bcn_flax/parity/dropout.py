"""Dropout with the same masks on both sides, so that a model with dropout can be compared.

The masks of `nn.Dropout`, `nnx.Dropout` and `torch.nn.Dropout` come from one seed, by the number of
the call: the first dropout that Flax calls has the mask of the first one that PyTorch calls. Other
random numbers, such as those of dropout inside of attention, cannot be exchanged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core.tracers import current_trace

from bcn_flax.interop import layouts
from bcn_flax.interop.layouts import Array, Shape


class Drawn(NamedTuple):
    """A mask.

    Attributes:
        shape: without the axes that share it, which have the length 1.
        rate: the part of the values that becomes 0.
    """

    shape: Shape
    rate: float


class Masks:
    """The masks of dropout in the calls of a Flax and a PyTorch module.

    Attributes:
        flax: those of the last call of Flax's module, in order.
        torch: those of the last call of PyTorch's module.
    """

    def __init__(self) -> None:
        """Before any call."""
        self.flax: list[Drawn] = []
        self.torch: list[Drawn] = []
        # By the number of the mask, whether PyTorch's has the channels first; None if unknown.
        self._channels_first: list[bool | None] = []
        self._trace: Any = None
        self._transformed = False

    @property
    def problem(self) -> str:
        """Why the masks of the last calls are not the same; empty if they are."""
        flax, torch = ([drawn.shape for drawn in masks] for masks in (self.flax, self.torch))
        if self._transformed:
            return "Flax's module calls dropout inside of a transformation such as nn.scan"
        if None in self._channels_first[: len(torch)] and flax == torch:
            return (
                f"the shapes of the masks, {flax}, do not show whether PyTorch's has channels first"
            )
        if len(flax) != len(torch) or None in self._channels_first[: len(torch)]:
            return f"the masks have the shapes {flax} in Flax and {torch} in PyTorch"
        return ""

    def start_flax(self) -> None:
        """Begin a call of Flax's module."""
        self.flax, self._trace = [], current_trace()

    def start_torch(self) -> None:
        """Begin a call of PyTorch's module."""
        self.torch = []

    def flax_dropout(self, x: Any, rate: float, broadcast: Sequence[int]) -> Any:
        """What dropout returns in Flax, in training; the axes of `broadcast` share a mask."""
        if rate == 0:
            return x
        self._transformed |= current_trace() != self._trace
        shared = [dim % x.ndim for dim in broadcast]
        shape = tuple(1 if i in shared else n for i, n in enumerate(x.shape))
        kept = _kept(len(self.flax), shape, rate)
        self.flax.append(Drawn(shape, rate))
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x)) if rate < 1 else jnp.zeros_like(x)

    def torch_dropout(self, x: Any, rate: float, shared: int) -> Any:
        """What dropout returns in PyTorch, in training; the last `shared` axes share a mask."""
        if rate == 0:
            return x
        shape = (*x.shape[: x.dim() - shared], *[1] * shared)
        number = len(self.torch)
        self.torch.append(Drawn(shape, rate))
        if number == len(self._channels_first):
            self._channels_first.append(self._order(number, shape))
        if self._channels_first[number]:
            kept = np.moveaxis(_kept(number, _channels_last(shape), rate), -1, 1)
        else:
            kept = _kept(number, shape, rate)
        kept = layouts.array_like(x, kept.astype(np.float32)) != 0
        return (x / (1 - rate)).where(kept, 0.0) if rate < 1 else x.new_zeros(x.shape)

    def _order(self, number: int, shape: Shape) -> bool | None:
        """Whether a mask has the channels first in PyTorch, if only one order fits Flax's."""
        flax = self.flax[number].shape if number < len(self.flax) else None
        fitting = [
            first
            for first, own in ((False, shape), (True, _channels_last(shape)))
            if own == flax and not (first and len(shape) < 3)
        ]
        return fitting[0] if len(fitting) == 1 else None


def _channels_last(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1]) if len(shape) > 2 else shape


def _kept(number: int, shape: Shape, rate: float) -> Array:
    """The values that a mask keeps, by its number."""
    return np.random.default_rng([17, number]).random(shape) >= rate


def with_masks(forward: Callable[..., Any], masks: Masks) -> Callable[..., Any]:
    """The same function, in which linen's dropout has these masks."""

    def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if type(module).__call__ is not nn.Dropout.__call__ or context.method_name != "__call__":
            return method(*args, **kwargs)
        return partial(_linen_dropout, module, masks)(*args, **kwargs)

    def masked(*args: Any) -> Any:
        masks.start_flax()
        with nn.intercept_methods(intercept):
            return forward(*args)

    return masked


def _linen_dropout(
    module: Any, masks: Masks, x: Any, deterministic: bool | None = None, rng: Any = None
) -> Any:
    if nn.merge_param("deterministic", module.deterministic, deterministic):
        return x
    return masks.flax_dropout(x, module.rate, module.broadcast_dims)


def mask_nnx(module: nnx.Module, masks: Masks) -> None:
    """Give the dropout in an NNX module these masks: each gets a class of its own."""

    def dropout(self: Any, x: Any, *, deterministic: bool | None = None, rngs: Any = None) -> Any:
        if self.deterministic if deterministic is None else deterministic:
            return x
        return masks.flax_dropout(x, self.rate, self.broadcast_dims)

    for _, part in nnx.iter_modules(module):
        kind: Any = type(part)
        if kind.__call__ is nnx.Dropout.__call__:
            masked = type(kind)(kind.__name__, (kind,), {"__call__": dropout})
            object.__setattr__(part, "__class__", masked)


def mask_torch(module: Any, masks: Masks) -> None:
    """Give the dropout in a PyTorch module these masks."""
    import torch

    # The axes that share a mask are the last ones.
    shared = {
        torch.nn.Dropout.forward: 0,
        torch.nn.Dropout1d.forward: 1,
        torch.nn.Dropout2d.forward: 2,
        torch.nn.Dropout3d.forward: 3,
    }

    def forward(part: Any, axes: int, x: Any) -> Any:
        return masks.torch_dropout(x, part.p, axes) if part.training else x

    module.register_forward_pre_hook(lambda *_: masks.start_torch())
    for part in module.modules():
        axes = shared.get(type(part).forward)
        if axes is not None:
            part.forward = partial(forward, part, axes)
