"""The VGG in evaluation, as it was trained and folded, in linen, NNX and PyTorch.

python benchmarks/fold.py
"""

from timing import (  # isort: skip  # sets up the environment, so it comes first
    HAS_TORCH,
    interleaved,
    report,
    torch_device,
)

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bcn_flax import models
from bcn_flax.models import nnx as nnx_models
from bcn_flax.surgery import linen as linen_surgery
from bcn_flax.surgery import nnx as nnx_surgery

if HAS_TORCH:
    import torch

    import bcn_torch

BATCHES = (1, 32)
SIZE = 32


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


def torch_contenders(batch: int) -> dict[str, Callable[[], object]]:
    images = torch.randn(batch, 3, SIZE, SIZE)
    model = bcn_torch.VGG().eval()
    folded = bcn_torch.fold(model, images)

    def run(module: Any) -> Callable[[], object]:
        module, given = (thing.to(torch_device()) for thing in (module, images))
        return torch.inference_mode()(lambda: module(given))

    return {"PyTorch, eager": run(model), "PyTorch, eager, folded": run(folded)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    rows: list[list[str | float]] = []
    for batch in BATCHES:
        images = jax.random.normal(jax.random.key(1), (batch, SIZE, SIZE, 3), jnp.float32)
        contenders = linen_contenders(images) | nnx_contenders(images)
        contenders |= torch_contenders(batch) if HAS_TORCH else {}
        seconds = interleaved(contenders, rounds)
        rows += [
            [batch, name, 1e3 * time, time / seconds[name.removesuffix(", folded")]]
            for name, time in seconds.items()
        ]
    report(
        "fold",
        f"The published VGG in evaluation, {SIZE}x{SIZE} images, float32: medians of "
        f"{rounds} interleaved rounds",
        ["batch size", "network", "ms", "times unfolded"],
        rows,
    )


if __name__ == "__main__":
    main()
