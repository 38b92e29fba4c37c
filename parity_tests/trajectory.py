"""A network trained side by side in Flax and in PyTorch: how far do the two drift apart?

In float32 they part, as any two correct programs do. Rounding alone would keep them close: with
SiLU for ReLU and average pooling for max pooling, their parameters are 3e-5 apart after 100 steps.
But where a ReLU's input is all but 0, or two pixels all but tie in a max pool, a rounding decides
which way the gradient flows; the step that follows differs visibly, and tips further decisions.

In float64 roundings are `2**29` times as small, and in a few hundred steps none comes near enough
to decide anything. So the float64 pair tells whether the formulas are the same, and the float32
pair how far training carries roundings.
"""

from collections.abc import Iterator
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import bcn_torch
from bcn_flax.interop import match
from parity_tests import layout
from train_cifar import make_model
from training import data
from training.config import RECIPES, Config

RECIPE = RECIPES["digits"]
# Computes in the dtype of its variables.
MODEL = make_model(Config(), RECIPE, 10).clone(dtype=None)
# Of Adam, which makes a whole step of a gradient that is 0 but for rounding. This network has none:
# as BCN normalizes by running estimates, no batch cancels the biases ahead of it.
RATE = RECIPE.learning_rate

# Whose parameters are compared with whose: dtype and framework.
REFERENCE = ("float64", "PyTorch")
PAIRS = {
    "float32": (("float32", "Flax"), ("float32", "PyTorch")),
    "float64": (("float64", "Flax"), REFERENCE),
    "Flax": (("float32", "Flax"), REFERENCE),
    "PyTorch": (("float32", "PyTorch"), REFERENCE),
}


class FlaxSide:
    """The network in linen, its step jitted, in the dtype of its variables."""

    def __init__(self, variables, dtype):
        self.dtype, self.wide = dtype, dtype == "float64"
        self.model, self.optimizer = MODEL.clone(param_dtype=dtype), optax.adam(RATE)
        with jax.enable_x64(self.wide):
            self.variables = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
            self.state = self.optimizer.init(self.variables["params"])
        self._step = jax.jit(self._compute)

    def _compute(self, variables, state, images, labels):
        def mean_loss(params):
            logits, updates = self.model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        params = variables["params"]
        (loss, updates), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
        changes, state = self.optimizer.update(gradients, state)
        return {"params": optax.apply_updates(params, changes), **updates}, state, loss

    def step(self, images, labels) -> float:
        """The loss, before the update."""
        images = images.astype(self.dtype)
        with jax.enable_x64(self.wide):
            self.variables, self.state, loss = self._step(
                self.variables, self.state, images, labels
            )
        return float(loss)

    def parameters(self) -> np.ndarray:
        return flat(self.variables["params"])


class TorchSide:
    """The same network in PyTorch; `matched` names its parameters in Flax's words."""

    def __init__(self, module, matched, dtype):
        self.module, self.matched, self.dtype = module, matched, dtype
        self.optimizer = torch.optim.Adam(module.parameters(), RATE)

    def step(self, images, labels) -> float:
        """The loss, before the update."""
        logits = self.module(layout.to_torch(images.astype(self.dtype)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def parameters(self) -> np.ndarray:
        with jax.enable_x64(True):
            return flat(self.matched.to_flax(self.module.state_dict())["params"])


def flat(tree) -> np.ndarray:
    """All numbers of a tree in one float64 vector."""
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


def batches(train: data.Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels, without end, in a new order each epoch."""
    images, labels = np.asarray(data.to_float(train.images)), train.labels.astype(np.int64)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - RECIPE.batch_size + 1, RECIPE.batch_size):
            batch = order[start : start + RECIPE.batch_size]
            yield images[batch], labels[batch]


def make_module() -> torch.nn.Module:
    """What `MODEL` is in PyTorch, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return bcn_torch.VGG(
            MODEL.blocks,
            in_channels=1,
            norm=MODEL.norm,
            ws=MODEL.ws,
            groups=MODEL.num_groups,
            eps=MODEL.epsilon,
            momentum=1 - MODEL.momentum,
            estimate=MODEL.estimate,
        )


def make_sides() -> dict[tuple[str, str], FlaxSide | TorchSide]:
    """By dtype and framework; they start from the same weights."""
    first = make_module().state_dict()
    with jax.enable_x64(True):
        model, image = MODEL.clone(param_dtype=jnp.float64), jnp.zeros((1, 8, 8, 1))
        like = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
        matched = match(first, like)
        variables = matched.to_flax(first)
    return {
        ("float32", "Flax"): FlaxSide(variables, "float32"),
        ("float32", "PyTorch"): TorchSide(make_module(), matched, "float32"),
        ("float64", "Flax"): FlaxSide(variables, "float64"),
        ("float64", "PyTorch"): TorchSide(make_module().double(), matched, "float64"),
    }


def trajectory(steps: int = 200) -> dict:
    """Train in both frameworks, in float32 and in float64, on the same batches of digits.

    Returns:
        Plain lists, with a number for each step. `losses`, by dtype and framework, are those before
        its update. `distances`, after it, are in the Euclidean norm over all parameters, relative
        to that of the reference, which is PyTorch's float64: under "float32" and "float64" of
        Flax's parameters from PyTorch's, under "Flax" and "PyTorch" of its float32 ones from the
        reference. `setting` says what was trained.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's idle threads spin, and keep JAX's from the cores
    try:
        losses, distances = follow(make_sides(), steps)
    finally:
        torch.set_num_threads(threads)
    setting = {
        "blocks": [list(block) for block in RECIPE.blocks],
        "groups": RECIPE.groups,
        "batch_size": RECIPE.batch_size,
        "optimizer": "Adam",
        "learning_rate": RATE,
    }
    return {"setting": setting, "losses": losses, "distances": distances}


def follow(sides, steps: int) -> tuple[dict, dict]:
    """The losses and distances of so many steps."""
    losses = {dtype: {} for dtype, _ in sides}
    distances = {name: [] for name in PAIRS}
    for images, labels in islice(batches(data.digits().train), steps):
        for (dtype, framework), side in sides.items():
            losses[dtype].setdefault(framework, []).append(side.step(images, labels))
        parameters = {key: side.parameters() for key, side in sides.items()}
        norm = np.linalg.norm(parameters[REFERENCE])
        for name, (one, other) in PAIRS.items():
            distance = np.linalg.norm(parameters[one] - parameters[other])
            distances[name].append(float(distance / norm))
    return losses, distances
