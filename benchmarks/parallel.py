"""What devices tell each other in a step of which the batch is spread over them.

    python benchmarks/parallel.py

Nothing is timed: the collectives are read from the program that XLA compiles for 8 virtual devices
of the CPU, from a step under `jax.jit` with the batch sharded. In the forward pass a norm of the
batch needs two numbers for each channel, and as many in the backward pass; the gradients of the
parameters are as many numbers as there are parameters.
"""

from timing import report  # isort: skip  # sets up the environment, so it comes first

import argparse
import math
import re
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from contenders import FlaxPair
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bcn_flax import BatchChannelNorm, BatchNorm
from bcn_flax.models import VGG

DEVICES = 8
CHANNELS = 64
LAYER_INPUT, IMAGES = (32, 16, 16, CHANNELS), (32, 32, 32, 3)
LAYERS = {
    "BatchChannelNorm": BatchChannelNorm(use_running_average=False),
    "BatchChannelNorm(estimate=False)": BatchChannelNorm(use_running_average=False, estimate=False),
    "Flax BatchNorm + GroupNorm": FlaxPair(32, use_running_average=False, dtype=None),
    "Flax BatchNorm": nn.BatchNorm(use_running_average=False),
    "Flax GroupNorm": nn.GroupNorm(32),
}
BLOCKS = ((CHANNELS, CHANNELS), (CHANNELS, CHANNELS))
NETWORKS = {
    "bcn": VGG(BLOCKS),
    "bn": VGG(BLOCKS, norm=BatchNorm),
    "gn": VGG(BLOCKS, norm=partial(nn.GroupNorm, epsilon=1e-5)),
}

COLLECTIVE = re.compile(
    r"= (?P<arrays>.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast)(-start)?\("
)
ARRAY = re.compile(r"(?P<type>[a-z]+)(?P<bits>\d+)\[(?P<shape>[\d,]*)\]")


def collectives(program: str) -> list[list[tuple[int, int]]]:
    """Of each collective in the text of a program, the length and the bytes of its arrays."""
    found = []
    for match in COLLECTIVE.finditer(program):
        arrays = []
        for array in ARRAY.finditer(match["arrays"]):
            length = math.prod(int(n) for n in array["shape"].split(",") if n)
            arrays.append((length, length * int(array["bits"]) // 8))
        found.append(arrays)
    return found


def step(model: nn.Module, variables: Any, x: jax.Array, call: Mapping[str, Any]) -> Any:
    """Output, gradients of the parameters and the input, and new statistics."""

    def forward(params: Any, x: jax.Array) -> Any:
        return model.apply({**variables, "params": params}, x, **call, mutable=["batch_stats"])

    y, pullback, stats = jax.vjp(forward, variables["params"], x, has_aux=True)
    return y, pullback(y), stats


def row(mesh: Mesh, model: nn.Module, shape: tuple[int, ...], **call: Any) -> list[int]:
    """Of the step's program, how many collectives there are, and what they carry."""
    batch, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch)
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(partial(model.init, **call), jax.random.key(0), x),
    )
    lowered = jax.jit(partial(step, model, call=call)).lower(variables, x)
    found = collectives(lowered.compile().as_text() or "")
    arrays = list(chain(*found))
    return [
        len(found),
        max(length for length, _ in arrays),
        sum(size for _, size in arrays),
        4 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        4 * math.prod(shape),
    ]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh = jax.make_mesh(
        (DEVICES,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")
    )
    rows: list[list[str | float]] = [
        [f"{name}, {LAYER_INPUT}", *row(mesh, layer, LAYER_INPUT)] for name, layer in LAYERS.items()
    ]
    rows += [
        [f"VGG of 4 convolutions, {norm}, {IMAGES}", *row(mesh, model, IMAGES, train=True)]
        for norm, model in NETWORKS.items()
    ]
    report(
        "parallel",
        f"Collectives of a training step, the batch over {DEVICES} devices, float32",
        ["what", "collectives", "longest array", "bytes", "parameters' bytes", "input's bytes"],
        rows,
    )


if __name__ == "__main__":
    main()
