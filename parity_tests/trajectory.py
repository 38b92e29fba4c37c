"""Train one network in Flax and in PyTorch, in float32 and float64, and measure how they diverge.

In float32 they do, as any two correct programs would. Rounding alone would keep them close: with
SiLU for ReLU and average pooling for max pooling, their parameters are 3e-5 apart after 100 steps.
But if a ReLU's input is almost 0, or two pixels almost tie in a max pool, a rounding decides which
way the gradient flows; the step that follows differs visibly, and tips further decisions.

In float64 roundings are `2**29` times as small, and in a few hundred steps none comes near enough
to decide anything. So the float64 pair shows whether the formulas are the same, and the float32
pair how far training carries roundings.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
import optax
import torch
from flax import linen as nn
from sklearn.datasets import load_digits

import bcn_torch
from bcn_flax import BatchChannelNorm
from bcn_flax.models import VGG
from bcn_flax.parity import Name, Observation, adam
from bcn_flax.parity.pair import module_pair

# The network that `train_cifar.py` trains on the digits.
BLOCKS, GROUPS, MOMENTUM, BATCH_SIZE = ((32, 32), (64, 64)), 16, 0.95, 32
# Of Adam, which makes a whole step of a gradient that is 0 but for rounding. This network has none:
# as BCN normalizes by running estimates, no batch cancels the biases ahead of it.
RATE = 2e-3


class Loss(nn.Module):
    """The network with its loss on top, so that the output gradient is 1."""

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
        norm = partial(BatchChannelNorm, num_groups=GROUPS, momentum=MOMENTUM)
        network = VGG(BLOCKS, norm=norm, name="network")
        losses = optax.softmax_cross_entropy_with_integer_labels(network(images, train), labels)
        return losses.mean()


class TorchLoss(torch.nn.Module):
    """The same in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        norm = partial(bcn_torch.BatchChannelNorm, groups=GROUPS, momentum=1 - MOMENTUM)
        self.network = bcn_torch.VGG(BLOCKS, in_channels=1, norm=norm)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.network(images), labels)


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images in float32 and labels, without end, in a new order each epoch."""
    digits = load_digits()
    images, labels = np.float32(digits.images / 8 - 1)[..., None], np.int64(digits.target)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            yield images[batch], labels[batch]


def trajectory(steps: int = 200) -> dict[str, Any]:
    """Train in both frameworks, in float32 and in float64, on the same batches of digits.

    Returns:
        Plain lists, with a number for each step. `losses`, by dtype and framework, are those before
        its update. `distances`, after it, are in the Euclidean norm over all parameters, relative
        to that of PyTorch's float64 parameters: under "float32" and "float64" Flax from PyTorch,
        under "Flax" and "PyTorch" its float32 parameters from PyTorch's float64 ones. `setting`
        describes the network and the training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        narrow = module_pair(Loss(), TorchLoss(), next(batches()))
    implementations = {
        (dtype, framework): implementation
        for dtype, pair in (("float32", narrow), ("float64", narrow.in_float64()))
        for framework, implementation in (
            ("Flax", pair.new_flax_side(adam(RATE))),
            ("PyTorch", pair.new_torch_side(adam(RATE))),
        )
    }
    losses = {dtype: {"Flax": [], "PyTorch": []} for dtype in ("float32", "float64")}
    distances = {name: [] for name in ("float32", "float64", "Flax", "PyTorch")}
    for images, labels in islice(batches(), steps):
        parameters = {}
        for (dtype, framework), step in implementations.items():
            seen = step([images.astype(dtype), labels], [np.ones((), dtype)], True)
            losses[dtype][framework].append(float(seen[Name("output", "")]))
            parameters[dtype, framework] = _parameters(seen)
        reference = parameters["float64", "PyTorch"]
        for name, difference in {
            "float32": parameters["float32", "Flax"] - parameters["float32", "PyTorch"],
            "float64": parameters["float64", "Flax"] - reference,
            "Flax": parameters["float32", "Flax"] - reference,
            "PyTorch": parameters["float32", "PyTorch"] - reference,
        }.items():
            distance = np.linalg.norm(difference) / np.linalg.norm(reference)
            distances[name].append(float(distance))
    setting = {
        "blocks": [list(block) for block in BLOCKS],
        "groups": GROUPS,
        "batch_size": BATCH_SIZE,
        "optimizer": "Adam",
        "learning_rate": RATE,
    }
    return {"setting": setting, "losses": losses, "distances": distances}


def _parameters(seen: Observation) -> np.ndarray:
    """All parameters in one float64 vector, in an order that all implementations share."""
    names = sorted(name for name in seen if name.quantity == "parameter")
    return np.concatenate([np.ravel(seen[name]).astype(np.float64) for name in names])
