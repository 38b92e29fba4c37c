"""One normalization layer in training, forward and backward, against what one would use instead.

    python benchmarks/layer.py

A "copy" reads an array of the input's size and writes another. A layer like this must read twice
and write once, forward, and read four times and write once, backward: by memory traffic, 4 copies.
Caches may do better, and single figures vary by a third from run to run on a shared machine.
"""

from timing import interleaved, report  # isort: skip  # sets up the environment, so it comes first

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from flax import linen as nn

import bcn_torch
from bcn_flax import BatchChannelNorm

SHAPES = [(32, 32, 32, 64), (4, 64, 64, 128), (64, 4, 4, 512)]
GROUPS = 32
OURS = "BatchChannelNorm"


@dataclass(frozen=True)
class Config:
    """How long to measure."""

    rounds: int = 25
    """Rounds, in each of which every contender runs once."""


class FlaxPair(nn.Module):
    """What Flax offers: `BatchNorm`, then `GroupNorm`."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.GroupNorm(GROUPS)(x)


def flax_step(layer: nn.Module, x: np.ndarray, dy: np.ndarray) -> Callable[[], object]:
    """Output, gradients of input and parameters, and new statistics."""
    x, dy = jnp.asarray(x), jnp.asarray(dy)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def step(variables, x, dy):
        def forward(params, x):
            return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, pullback, stats = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, pullback(dy), stats

    return lambda: jax.block_until_ready(step(variables, x, dy))


def flax_copy(x: np.ndarray) -> Callable[[], object]:
    x = jnp.asarray(x)
    copy = jax.jit(lambda x: x + 1)
    return lambda: jax.block_until_ready(copy(x))


def torch_step(module: torch.nn.Module, x: np.ndarray, dy: np.ndarray) -> Callable[[], object]:
    """The same; channels first, contiguous, as PyTorch code usually has them."""
    x, dy = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1))) for a in (x, dy))
    x.requires_grad_()

    def step():
        module.zero_grad()
        x.grad = None
        module(x).backward(dy)

    return step


def contenders(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    channels = shape[-1]
    torch_pair = torch.nn.Sequential(
        torch.nn.BatchNorm2d(channels), torch.nn.GroupNorm(GROUPS, channels)
    )
    reference = bcn_torch.BatchChannelNorm(channels, GROUPS)
    torch._dynamo.reset()  # a new shape is a new program, not a more general one
    return {
        "copy": flax_copy(x),
        OURS: flax_step(BatchChannelNorm(use_running_average=False), x, dy),
        "Flax BatchNorm + GroupNorm": flax_step(FlaxPair(), x, dy),
        "PyTorch reference": torch_step(reference, x, dy),
        "PyTorch reference, compiled": torch_step(torch.compile(reference), x, dy),
        "PyTorch BatchNorm2d + GroupNorm": torch_step(torch_pair, x, dy),
    }


def main(config: Config) -> None:
    rows = []
    for shape in SHAPES:
        seconds = interleaved(contenders(shape), config.rounds)
        rows += [
            [
                str(shape),
                name,
                f"{1e3 * time:.2f}",
                f"{time / seconds['copy']:.1f}",
                f"{time / seconds[OURS]:.2f}",
            ]
            for name, time in seconds.items()
        ]
    report(
        "layer",
        f"Forward and backward in training, float32, {GROUPS} groups: medians of "
        f"{config.rounds} interleaved rounds",
        ["shape (n, h, w, c)", "layer", "ms", "copies", f"times {OURS}"],
        rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
