"""The third side: a layer of `parity_tests.oracle` in training, with optimizers of its own."""

from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax import parity
from bcn_flax.parity.observations import observation


class Sgd(NamedTuple):
    """With momentum."""

    rate: float = 0.1
    momentum: float = 0.9

    def pair(self):
        """Optax's and PyTorch's."""
        return parity.sgd(self.rate, self.momentum)

    def change(self, gradient, memory):
        """Of a parameter, and what to remember of it."""
        velocity = self.momentum * memory.get("velocity", 0.0) + gradient
        return -self.rate * velocity, {"velocity": velocity}


class Adam(NamedTuple):
    """With its usual constants."""

    rate: float = 0.01

    def pair(self):
        """Optax's and PyTorch's."""
        return parity.adam(self.rate)

    def change(self, gradient, memory):
        """Of a parameter, and what to remember of it."""
        step = memory.get("step", 0) + 1
        first = 0.9 * memory.get("first", 0.0) + 0.1 * gradient
        second = 0.999 * memory.get("second", 0.0) + 0.001 * gradient**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
        change = -self.rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        return change, {"step": step, "first": first, "second": second}


class Judge:
    """A `bcn_flax.parity.Side` that owes nothing to JAX or PyTorch.

    Args:
        layer: of `parity_tests.oracle`.
        variables: Flax's, to begin with.
        optimizer: of the parameters.
        kept: how many samples count; the others come out as nothing, with a gradient of 0.
    """

    def __init__(self, layer, variables, optimizer, kept=None):
        self.layer, self.optimizer, self.kept, self.memory = layer, optimizer, kept, {}
        for path, value in _flat(variables).items():
            setattr(self._part(path), path[-1], np.asarray(value, np.float64))
        self.paths = {kind: list(_flat({kind: variables.get(kind, {})})) for kind in KINDS}

    def __call__(self, inputs, output_gradients, train):
        (x,), (dy,) = inputs, output_gradients
        kept = x[: self.kept]
        dx = np.zeros(x.shape)
        # Adversarial inputs may overflow or be NaN: what comes of it is compared.
        with np.errstate(all="ignore"):
            y = self.layer.forward(kept, train)
            dx[: self.kept] = self.layer.backward(dy)
            gradients = {path: self._read(path, "d_") for path in self.paths["params"]}
            if train:
                self._take_step(gradients)
        after = {k: unflatten_dict({p: self._read(p) for p in self.paths[k]}) for k in KINDS}
        return observation({"": y}, {"": dx}, unflatten_dict(gradients), after)

    def _take_step(self, gradients):
        for path, gradient in gradients.items():
            change, self.memory[path] = self.optimizer.change(gradient, self.memory.get(path, {}))
            setattr(self._part(path), path[-1], self._read(path) + change)

    def _read(self, path, prefix=""):
        return np.asarray(getattr(self._part(path), prefix + path[-1]))

    def _part(self, path):
        """The layer, or the part of it that has this parameter or statistic."""
        return getattr(self.layer, path[-2], self.layer) if len(path) > 1 else self.layer


KINDS = ("params", "batch_stats")


def _flat(variables):
    return {path: leaf for kind in variables.values() for path, leaf in flatten_dict(kind).items()}
