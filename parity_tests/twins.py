"""The same layer three times: in Flax, in PyTorch, and in float64 NumPy.

Each side takes a step on the same input `x` and output gradient `dy`, and reports every number that
a user could observe, under Flax's names and in Flax's layout. PyTorch's report passes through
`bcn_flax.interop`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax.interop import state_dict_from_variables, variables_from_torch
from parity_tests import layout


class Report(NamedTuple):
    """What one step showed: all arrays, in nested dictionaries under Flax's names."""

    output: Any
    input_gradient: Any
    gradients: Any
    statistics: Any
    parameters: Any


class Sgd(NamedTuple):
    """With momentum."""

    rate: float = 0.1
    momentum: float = 0.9

    def optax(self):
        return optax.sgd(self.rate, momentum=self.momentum)

    def torch(self, parameters):
        return torch.optim.SGD(parameters, self.rate, momentum=self.momentum)

    def numpy(self, gradient, memory):
        """The change of a parameter, and what to remember of it."""
        velocity = self.momentum * memory.get("velocity", 0.0) + gradient
        return -self.rate * velocity, {"velocity": velocity}


class Adam(NamedTuple):
    """With its usual constants, which are optax's and PyTorch's defaults."""

    rate: float = 0.01

    def optax(self):
        return optax.adam(self.rate)

    def torch(self, parameters):
        return torch.optim.Adam(parameters, self.rate)

    def numpy(self, gradient, memory):
        """The change of a parameter, and what to remember of it."""
        step = memory.get("step", 0) + 1
        first = 0.9 * memory.get("first", 0.0) + 0.1 * gradient
        second = 0.999 * memory.get("second", 0.0) + 0.001 * gradient**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
        change = -self.rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        return change, {"step": step, "first": first, "second": second}


class FlaxSide:
    """A linen layer or network, jitted."""

    def __init__(self, layer, variables, optimizer, **call):
        self.variables = variables
        self.transform = optimizer.optax()
        self.state = self.transform.init(variables.get("params", {}))
        self._step = jax.jit(partial(self._compute, layer, **call))

    def _compute(self, layer, variables, state, x, dy, **call):
        params = variables.get("params", {})

        def forward(params, x):
            return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"], **call)

        y, pullback, updates = jax.vjp(forward, params, x, has_aux=True)
        gradients, dx = pullback(dy.astype(y.dtype))
        changes, state = self.transform.update(gradients, state)
        params = optax.apply_updates(params, changes)
        report = Report(y, dx, gradients, updates.get("batch_stats", {}), params)
        return {"params": params, **updates}, state, report

    def step(self, x, dy) -> Report:
        self.variables, self.state, report = self._step(self.variables, self.state, x, dy)
        return report


class TorchSide:
    """A PyTorch module with the same weights."""

    def __init__(self, module, variables, optimizer):
        module.load_state_dict(state_dict_from_variables(variables, module.state_dict()))
        self.module, self.variables = module, variables
        self.optimizer = optimizer.torch(module.parameters())

    def step(self, x, dy) -> Report:
        x = layout.to_torch(x).requires_grad_()
        self.optimizer.zero_grad()
        y = self.module(x)
        y.backward(layout.to_torch(dy).to(y.dtype))
        gradients = {name: p.grad.clone() for name, p in self.module.named_parameters()}
        self.optimizer.step()
        after = self._in_flax(self.module.state_dict())
        return Report(
            layout.to_flax(y),
            layout.to_flax(x.grad),
            self._in_flax({**self.module.state_dict(), **gradients})["params"],
            after.get("batch_stats", {}),
            after["params"],
        )

    def _in_flax(self, state_dict):
        return variables_from_torch(state_dict, self.variables)


class OracleSide:
    """One of the layers of `parity_tests.oracle`.

    Attributes:
        magnification: how much the last step magnified a rounding, dividing by small deviations.
    """

    def __init__(self, layer, variables, optimizer, train=True):
        self.layer, self.optimizer, self.train = layer, optimizer, train
        self.parts = {"": layer} if not hasattr(layer, "batch_norm") else vars(layer)
        self.memory = {}
        for leaves in variables.values():
            for (*module, name), value in flatten_dict(leaves).items():
                setattr(self.parts["".join(module)], name, np.asarray(value, np.float64))

    def step(self, x, dy) -> Report:
        y = self.layer.forward(np.asarray(x, np.float64), self.train)
        dx = self.layer.backward(np.asarray(dy, np.float64))
        stds = [part.std.min() for part in self.parts.values()]
        self.magnification = np.prod([max(1.0, 1 / std) for std in stds])
        gradients, statistics, parameters = {}, {}, {}
        for module, part in self.parts.items():
            for name in ("scale", "bias"):
                path = (module, name) if module else (name,)
                gradients[path] = getattr(part, f"d_{name}")
                change, self.memory[path] = self.optimizer.numpy(
                    gradients[path], self.memory.get(path, {})
                )
                parameters[path] = getattr(part, name) + change
                setattr(part, name, parameters[path])
            for name in ("mean", "var"):
                if hasattr(part, name):
                    statistics[(module, name) if module else (name,)] = getattr(part, name)
        return Report(y, dx, *map(unflatten_dict, (gradients, statistics, parameters)))
