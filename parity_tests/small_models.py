"""Small models of both libraries, to compare and to make differ."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(6, 5)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
SENTENCES = RNG.normal(size=(2, 4, 8)).astype(np.float32)
TOKENS = np.array([[0, 3, 3], [1, 2, 0]])

# Each phase with other shapes or another mode is another program to compile.
ONE_STEP = {"eager": False, "steps": 1}
EVALUATION = {"eager": False, "steps": 0}


class Flax(nn.Module):
    """A function of itself and its inputs."""

    function: object

    @nn.compact
    def __call__(self, *inputs):
        return self.function(self, *inputs)


class FlaxWithModes(Flax):
    @nn.compact
    def __call__(self, *inputs, train):
        return self.function(self, *inputs, train)


class Torch(torch.nn.Module):
    """The same, with modules and parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def flax_mlp(activation=jnp.tanh):
    return Flax(lambda _, x: nn.Dense(3, name="out")(activation(nn.Dense(7, name="hidden")(x))))


class NnxMlp(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(7, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def torch_mlp(activation=torch.tanh):
    return Torch(
        lambda self, x: self.out(activation(self.hidden(x))),
        hidden=torch.nn.Linear(5, 7),
        out=torch.nn.Linear(7, 3),
    )


def flax_bn(momentum=0.99):
    def forward(_, x, train):
        x = nn.Dense(4, name="dense")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=momentum, name="bn")(x)

    return FlaxWithModes(forward)


class NnxBn(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.bn(self.dense(x))


def torch_bn(reshape=lambda x, _: x):
    return Torch(
        lambda self, x: reshape(self.bn(self.dense(x)), self.training),
        dense=torch.nn.Linear(5, 4),
        bn=torch.nn.BatchNorm1d(4),
    )


def failures(comparison):
    return [row for row in comparison.rows if not row.passed]


def first_failures(comparison):
    """The first phase with a difference, and the names of what differs in it."""
    failed = failures(comparison)
    return failed[0].phase, {str(row.name) for row in failed if row.phase == failed[0].phase}


def in_torch(function):
    return Torch(lambda _, *inputs: function(*inputs))


def in_flax(function):
    return Flax(lambda _, *inputs: function(*inputs))


def twice(by=2.0):
    return in_flax(lambda x: by * x), in_torch(lambda x: 2 * x)


@jax.custom_jvp
def doubled_gradient(x):
    return x


doubled_gradient.defjvp(lambda x, dx: (x[0], 2 * dx[0]))
