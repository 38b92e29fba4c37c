"""PyTorch's side: a module, with what it shows translated to Flax's names and layouts."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from bcn_flax.interop import Match, arrays
from bcn_flax.parity.axes import Axes, axis_order
from bcn_flax.parity.observations import Observation, Values, numbered, observation
from bcn_flax.parity.tolerances import SHAKE


def in_float64(module: Any) -> Any:
    """A copy of the module, in float64."""
    return copy.deepcopy(module).double()


def refuse_dropout(module: Any) -> None:
    """Refuse a module that draws random numbers in training.

    Raises:
        ValueError: it does; the message says where.
    """
    noisy = [
        name or type(part).__name__
        for name, part in module.named_modules()
        if "Dropout" in type(part).__name__ and part.p > 0
    ]
    if noisy:
        raise ValueError(
            "The two sides cannot draw the same random numbers, so there must be no dropout, but "
            f"there is in PyTorch's {', '.join(noisy)}. Set its p to 0 there, and its rate in Flax."
        )


class TorchSide:
    """A copy of a module in training."""

    def __init__(
        self,
        module: Any,
        matched: Match,
        axes: Axes,
        make_optimizer: Callable[[Any], Any],
        *,
        precision: Callable[[], AbstractContextManager[Any]],
        shake: np.random.Generator | None = None,
    ) -> None:
        """Start from the variables.

        Args:
            module: is not changed.
            matched: which of its tensors is which of Flax's variables.
            axes: how those of inputs and outputs lie.
            make_optimizer: of its parameters.
            precision: the context in which JAX has the dtypes of Flax's variables.
            shake: a generator of random numbers that multiply inputs, parameters and every module's
                outputs, and so their gradients: they are changed by up to one rounding of float32.
        """
        self._precision = precision
        self._module, self._matched, self._axes = copy.deepcopy(module), matched, axes
        self._shake = shake
        if shake is not None:
            for parameter in self._module.parameters():
                parameter.data = self._shaken(parameter.data)
            for part in self._module.modules():
                part.register_forward_hook(lambda _module, _inputs, y: self._shaken(y))
        parameters = list(self._module.parameters())
        self._optimizer = make_optimizer(parameters) if parameters else None

    def __call__(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        """Go forward and back, and in training take a step of the optimizer."""
        with self._precision():
            return self._step(inputs, output_gradients, train)

    def _step(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        import torch

        self._module.train(train)
        given = {
            name: self._shaken(self._to_torch(f"input {name}", x)).requires_grad_(
                arrays.kind(x) == "floating"
            )
            for name, x in numbered(inputs).items()
        }
        self._module.zero_grad()
        outputs = numbered(tensors_of(self._module(*given.values())))
        gradients = {
            name: self._to_torch(f"output {name}", dy).to(outputs[name].dtype)
            for name, dy in numbered(output_gradients).items()
            if outputs[name].requires_grad
        }
        torch.autograd.backward([outputs[name] for name in gradients], [*gradients.values()])
        # A tied parameter has several names, of which the match may have chosen any.
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        gradient = {name: _gradient(p).clone() for name, p in parameters.items()}
        if train and self._optimizer is not None:
            self._optimizer.step()
        return observation(
            {name: self._to_flax(f"output {name}", y) for name, y in outputs.items()},
            {
                name: self._to_flax(f"input {name}", _gradient(x))
                for name, x in given.items()
                if x.requires_grad
            },
            self._matched.to_flax(gradient, partial=True).get("params", {}),
            self._matched.to_flax(self._module.state_dict()),
        )

    def _to_torch(self, name: str, x: Values) -> Any:
        import torch

        moved = axis_order(self._axes, name.strip(), x.ndim).to_torch(x)
        return arrays.as_kind_of(torch.empty(0, dtype=_torch_dtype(x)), np.asarray(moved))

    def _to_flax(self, name: str, x: Any) -> Values:
        values = arrays.cast(arrays.values(x), arrays.dtype(x))
        return axis_order(self._axes, name.strip(), x.dim()).to_flax(values)

    def _shaken(self, x: Any) -> Any:
        """Tensors, each of their values changed by up to one rounding of float32."""
        if self._shake is None:
            return x
        if isinstance(x, tuple | list):
            return type(x)(map(self._shaken, x))
        if not (hasattr(x, "is_floating_point") and x.is_floating_point()):
            return x
        noise = 1 + SHAKE * self._shake.uniform(-1, 1, tuple(x.shape))
        return x * x.new_tensor(noise)


def tensors_of(outputs: Any) -> list[Any]:
    """The tensors of a module's outputs, in the order of Flax's leaves."""
    return [y for y in jax.tree.leaves(outputs) if hasattr(y, "detach")]


def _gradient(x: Any) -> Any:
    """The gradient of a tensor, 0 if nothing depends on it."""
    return x.new_zeros(x.shape) if x.grad is None else x.grad


def _torch_dtype(x: Values) -> Any:
    import torch

    return getattr(torch, arrays.dtype(x).name)
