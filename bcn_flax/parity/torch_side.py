"""PyTorch's side: a module, with what it shows translated to Flax's names and layouts."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from bcn_flax.interop import Match, layouts
from bcn_flax.parity.axes import Axes, axis_order
from bcn_flax.parity.observations import Observation, Values, numbered, observation
from bcn_flax.parity.optimizers import Optimizer
from bcn_flax.parity.shaking import Shaking


def in_float64(module: Any) -> Any:
    """A copy of the module, in float64."""
    return copy.deepcopy(module).double()


def frozen(module: Any) -> list[str]:
    """The names of the parameters that are not trained."""
    return [name for name, p in module.named_parameters() if not p.requires_grad]


def trainable(module: Any) -> Any:
    """A copy of the module, all of whose parameters are trained."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


class TorchSide:
    """A copy of a module in training."""

    def __init__(
        self,
        module: Any,
        matched: Match,
        axes: Axes,
        optimizer: Optimizer,
        *,
        precision: Callable[[], AbstractContextManager[Any]],
        shaking: Shaking | None = None,
    ) -> None:
        """Start from the module's parameters and statistics.

        Args:
            module: is not changed.
            matched: which of its tensors is which of Flax's variables.
            axes: how those of inputs and outputs lie.
            optimizer: of its parameters.
            precision: the context in which JAX has the dtypes of Flax's variables.
            shaking: of inputs, parameters, what the parts of the module return, and the steps.
        """
        self._precision = precision
        self._module, self._matched, self._axes = copy.deepcopy(module), matched, axes
        self._shaking = shaking
        if shaking is not None:
            shaking.attach(self._module)
        self._parameters = list(self._module.parameters())
        self._error = optimizer.error
        # PyTorch's optimizers want something to optimize.
        self._optimizer = optimizer.torch(self._parameters) if self._parameters else None

    def __call__(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        """Go forward and back, and in training take a step of the optimizer."""
        import torch

        with self._precision(), torch.enable_grad():
            return self._step(inputs, output_gradients, train)

    def _step(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        import torch

        self._module.train(train)
        self._module.zero_grad()
        given = tensors(self._module, inputs, self._axes)
        if self._shaking is not None:
            given = {name: self._shaking(x) for name, x in given.items()}
        for x in given.values():
            x.requires_grad_(x.is_floating_point())
        # A module may write into its inputs, which PyTorch refuses if these are leaves.
        outputs = outputs_of(self._module, [x.clone() for x in given.values()])
        gradients = {
            name: _tensor(f"output {name}", dy, self._axes, outputs[name])
            for name, dy in numbered(output_gradients).items()
            if outputs[name].requires_grad
        }
        torch.autograd.backward([outputs[name] for name in gradients], [*gradients.values()])
        # A tied parameter has several names, of which the match may have chosen any.
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        gradient = {name: _gradient(p).clone() for name, p in parameters.items()}
        if train:
            self._take_step()
        return observation(
            {name: in_flax(f"output {name}", y, self._axes) for name, y in outputs.items()},
            {
                name: in_flax(f"input {name}", _gradient(x), self._axes)
                for name, x in given.items()
                if x.requires_grad
            },
            self._matched.to_flax(gradient, partial=True).get("params", {}),
            self._matched.to_flax(self._module.state_dict()),
        )

    def _take_step(self) -> None:
        if self._optimizer is None:
            return
        if self._shaking is None:
            self._optimizer.step()
        else:
            self._shaking.step(self._optimizer, self._parameters, self._error)


def tensors(module: Any, inputs: Sequence[Values], axes: Axes) -> dict[str, Any]:
    """The inputs by name, in PyTorch's order of axes and on the module's device."""
    import torch

    at = next(module.parameters(), torch.empty(0))
    return {
        name: _tensor(f"input {name}", x, axes, at.new_empty(0, dtype=_torch_dtype(x)))
        for name, x in numbered(inputs).items()
    }


def outputs_of(module: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """The tensors of a module's outputs by name, in the order of Flax's leaves."""
    leaves = jax.tree.leaves(module(*inputs))
    return numbered([y for y in leaves if hasattr(y, "detach")])


def in_flax(name: str, x: Any, axes: Axes) -> Values:
    """The values of an input or output in Flax's order of axes."""
    values = layouts.to_numpy(x)
    return axis_order(axes, name.strip(), x.dim()).to_flax(values)


def _tensor(name: str, x: Values, axes: Axes, like: Any) -> Any:
    moved = axis_order(axes, name.strip(), x.ndim).to_torch(x)
    return layouts.array_like(like, np.asarray(moved))


def _gradient(x: Any) -> Any:
    """The gradient of a tensor, 0 if nothing depends on it."""
    return x.new_zeros(x.shape) if x.grad is None else x.grad


def _torch_dtype(x: Values) -> Any:
    import torch

    return getattr(torch, layouts.dtype(x).name)
