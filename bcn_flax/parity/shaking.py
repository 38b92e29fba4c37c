"""What a model makes of roundings: found by shaking it as they do, in float64."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np


class Shaking:
    """Shakes tensors by a relative error, always in the same way.

    Each value goes up or down by itself, as if it had been rounded, and all of a tensor go together
    by as much of their root mean square, as if a mean that is in all of them had been. A value of 0
    stays: it is one that a ReLU or a mask has made.
    """

    def __init__(self, error: float) -> None:
        """Shake by this error."""
        self._error = error
        self._rng = np.random.default_rng(0)

    def __call__(self, x: Any, times: float = 1.0) -> Any:
        """The tensor, shaken `times` as far; anything but a tensor of floating point as it is."""
        if not is_floating(x):
            return x
        error, values = times * self._error, x.detach()
        finite = values[values.isfinite()]
        mean_square = float(finite.square().mean()) if finite.numel() else 0.0
        together = error * float(self._signs()) * mean_square**0.5
        return x * (1 + error * x.new_tensor(self._signs(*x.shape))) + together * (values != 0)

    def attach(self, module: Any) -> None:
        """Shake the parameters of a module, and whenever it is called, what its parts return."""
        for parameter in module.parameters():
            parameter.data = self(parameter.data)
        for part in module.modules():
            part.register_forward_hook(lambda _part, _inputs, outputs: self._shaken(outputs))

    def step(self, optimizer: Any, parameters: Sequence[Any], times: float) -> None:
        """Take a step of the optimizer, and shake the changes that it makes."""
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data = old + self(parameter.data - old, times)

    def _shaken(self, outputs: Any) -> Any:
        """The outputs, shaken, as their gradients will be."""
        outputs = jax.tree.map(self, outputs)
        for y in jax.tree.leaves(outputs):
            if is_floating(y) and y.requires_grad:
                y.register_hook(self)
        return outputs

    def _signs(self, *shape: int) -> Any:
        return self._rng.choice((-1.0, 1.0), shape)


def is_floating(x: Any) -> bool:
    """Whether it is a tensor of floating point."""
    return hasattr(x, "detach") and x.is_floating_point()
