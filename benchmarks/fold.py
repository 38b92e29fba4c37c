"""The VGG in evaluation, as it was trained and folded, in linen, NNX and PyTorch.

python benchmarks/fold.py
"""

from timing import interleaved, report  # isort: skip  # sets up the environment, so it comes first

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import torch
import tyro
from flax import nnx

import bcn_torch
from bcn_flax import models
from bcn_flax.models import nnx as nnx_models
from bcn_flax.surgery import linen as linen_surgery
from bcn_flax.surgery import nnx as nnx_surgery

BATCHES = (1, 32)
SIZE = 32


@dataclass(frozen=True)
class Config:
    """How long to measure."""

    rounds: int = 10
    """Rounds, in each of which every contender runs once."""


def compiled(
    forward: Callable[..., jax.Array], weights: object, images: jax.Array
) -> Callable[[], object]:
    forward = jax.jit(forward)
    return lambda: jax.block_until_ready(forward(weights, images))


def linen_contenders(images: jax.Array) -> dict[str, Callable[[], object]]:
    model = models.VGG()
    variables = model.init(jax.random.key(0), images, train=False)
    folded = linen_surgery.fold(model, variables, images, train=False)
    return {
        "linen": compiled(partial(model.apply, train=False), variables, images),
        "linen, folded": compiled(partial(folded.apply, train=False), folded.variables, images),
    }


def nnx_contenders(images: jax.Array) -> dict[str, Callable[[], object]]:
    model = nnx_models.VGG(rngs=nnx.Rngs(0))
    model.eval()
    contenders = {}
    for name, form in (("NNX", model), ("NNX, folded", nnx_surgery.fold(model, images))):
        graphdef, state = nnx.split(form)
        forward = partial(lambda graphdef, state, x: nnx.merge(graphdef, state)(x), graphdef)
        contenders[name] = compiled(forward, state, images)
    return contenders


def torch_contenders(images: torch.Tensor) -> dict[str, Callable[[], object]]:
    model = bcn_torch.VGG().eval()
    folded = bcn_torch.fold(model, images)

    def run(module: torch.nn.Module) -> Callable[[], object]:
        return torch.inference_mode()(lambda: module(images))

    return {"PyTorch, eager": run(model), "PyTorch, eager, folded": run(folded)}


def main(config: Config) -> None:
    rows = []
    for batch in BATCHES:
        images = jax.random.normal(jax.random.key(1), (batch, SIZE, SIZE, 3), jnp.float32)
        channels_first = torch.randn(batch, 3, SIZE, SIZE)
        contenders = linen_contenders(images) | nnx_contenders(images)
        contenders |= torch_contenders(channels_first)
        seconds = interleaved(contenders, config.rounds)
        rows += [
            [
                str(batch),
                name,
                f"{1e3 * time:.2f}",
                f"{time / seconds[name.removesuffix(', folded')]:.2f}",
            ]
            for name, time in seconds.items()
        ]
    report(
        "fold",
        f"The published VGG in evaluation, {SIZE}x{SIZE} images, float32: medians of "
        f"{config.rounds} interleaved rounds",
        ["batch size", "network", "ms", "times unfolded"],
        rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
