"""The third implementation: a layer of `parity_tests.oracle` in training, in float64 NumPy."""

from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax import parity
from bcn_flax.parity import observation


class Sgd(NamedTuple):
    """Stochastic gradient descent with momentum."""

    rate: float = 0.1
    momentum: float = 0.9

    def pair(self):
        """The same optimizer of Optax and PyTorch."""
        return parity.sgd(self.rate, self.momentum)

    def update(self, gradient, state):
        """What to add to a parameter, and the optimizer's next state for it."""
        velocity = self.momentum * state.get("velocity", 0.0) + gradient
        return -self.rate * velocity, {"velocity": velocity}


class Adam(NamedTuple):
    """Adam with its usual constants."""

    rate: float = 0.01

    def pair(self):
        """The same optimizer of Optax and PyTorch."""
        return parity.adam(self.rate)

    def update(self, gradient, state):
        """What to add to a parameter, and the optimizer's next state for it."""
        step = state.get("step", 0) + 1
        first = 0.9 * state.get("first", 0.0) + 0.1 * gradient
        second = 0.999 * state.get("second", 0.0) + 0.001 * gradient**2
        unbiased = first / (1 - 0.9**step), second / (1 - 0.999**step)
        change = -self.rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        return change, {"step": step, "first": first, "second": second}


class OracleSide:
    """A `bcn_flax.parity.Implementation` that computes without JAX and PyTorch.

    Args:
        layer: of `parity_tests.oracle`.
        variables: the initial ones, as Flax has them.
        optimizer: of the parameters.
        kept: number of unmasked samples, which come first; the others have no output, and a
            gradient of 0.
    """

    def __init__(self, layer, variables, optimizer, kept=None):
        self.layer, self.optimizer, self.kept, self.state = layer, optimizer, kept, {}
        for path, value in _flat(variables).items():
            setattr(self._part(path), path[-1], np.asarray(value, np.float64))
        self.paths = {kind: list(_flat({kind: variables.get(kind, {})})) for kind in KINDS}

    def __call__(self, inputs, output_gradients, train):
        (x,), (dy,) = inputs, output_gradients
        kept = x[: self.kept]
        dx = np.zeros(x.shape)
        # Adversarial inputs may overflow or be NaN: the results are compared all the same.
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
            change, self.state[path] = self.optimizer.update(gradient, self.state.get(path, {}))
            setattr(self._part(path), path[-1], self._read(path) + change)

    def _read(self, path, prefix=""):
        return np.asarray(getattr(self._part(path), prefix + path[-1]))

    def _part(self, path):
        """The layer, or the part of it that has this parameter or statistic."""
        return getattr(self.layer, path[-2], self.layer) if len(path) > 1 else self.layer


KINDS = ("params", "batch_stats")


def _flat(variables):
    return {path: leaf for kind in variables.values() for path, leaf in flatten_dict(kind).items()}
