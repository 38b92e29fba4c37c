"""The step of `train_cifar.py`, compiled for an accelerator: memory, traffic, and collectives.

A v5e has 128 MiB of on-chip memory, and most activations of these networks fit into it. Temporary
memory counts only what the compiler moves out of it, which differs widely between two programs that
keep the same arrays. The peak of the memory in use is the better measure there.
"""

import targets  # isort: skip  # sets up the environment, so it comes first

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import lax
from jax.sharding import Sharding

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_cifar
from training.config import Config, resolve
from training.data import Split

BATCH, CLASSES = 128, 10
IMAGES = BATCH  # in the data set, which then takes hardly any memory
LARGE = 2**20  # an array with at least as many values is an activation
NETWORKS = {"VGG": "vgg", "ResNet-20": "resnet"}
OURS, FLAX = "BatchChannelNorm, WSConv", "Flax BatchNorm"
MEASURES: dict[str, Callable[[jax.stages.Compiled], float]] = {
    "temporary": targets.temporary_memory,
    "in use": targets.peak_memory,
    "moved": targets.bytes_moved,
}


class Step:
    """A training step of `train_cifar.py`, and the shapes of what it takes."""

    def __init__(self, network: Any, norm: str, split: Callable[[Any], Any]) -> None:
        """Make it as `train_cifar.Trainer` does."""
        ours = norm == OURS
        config = Config(
            dataset="cifar10",
            network=network,
            norm="bcn" if ours else "bn",
            ws=ours,
            dtype="bfloat16",
            batch_size=BATCH,
        )
        recipe = resolve(config)
        model: Any = train_cifar.make_model(config, recipe, CLASSES)
        if not ours:
            model = model.clone(norm=partial(nn.BatchNorm, momentum=recipe.norm_momentum))
        batches = recipe.epochs * recipe.steps(IMAGES)
        optimizer = train_cifar.make_optimizer(config, recipe, batches)
        shape = (IMAGES, 32, 32, 3)
        self.function = train_cifar.make_step(model, optimizer, config, recipe, split)
        self.state: train_cifar.State = jax.eval_shape(
            partial(train_cifar.first_state, model, optimizer, shape, config.seed)
        )
        data = Split(np.empty(shape, np.uint8), np.empty(shape[:1], np.int32))
        self.data: Split = jax.eval_shape(lambda: data)

    def compiled(self, sharding: Sharding) -> jax.stages.Compiled:
        """The compiled program; the new state reuses the memory of the old one."""
        return targets.compiled(sharding, self.function, self.state, self.data, donate=[0])


def steps(split: Callable[[Any], Any], sharding: Sharding) -> Iterator[tuple[str, str, Step, Any]]:
    """Yield network, norm, step and program of each row."""
    for name, network in NETWORKS.items():
        for norm in (FLAX, OURS):
            step = Step(network, norm, split)
            yield name, norm, step, step.compiled(sharding)


def networks(target: str, arguments: argparse.Namespace) -> None:
    """The third table."""
    rows: list[list[str | float]] = []
    base: tuple[float, ...] = ()
    for name, norm, step, program in steps(lambda x: x, targets.one_device(target)):
        found = tuple(measure(program) for measure in MEASURES.values())
        base = found if norm == FLAX else base
        cells = [cell for n, of in zip(found, base, strict=True) for cell in (n / 1e6, n / of)]
        rows.append([name, norm, *cells])
        print(*rows[-1], flush=True)
        if arguments.kernels:
            show_wide(program, {leaf.size for leaf in jax.tree.leaves(step.state.params)})
    targets.tabulate(
        "networks",
        target,
        f"A training step of train_cifar.py, {BATCH} images of 32x32x3, bfloat16: the memory that "
        "the program sets apart for temporary arrays, the most that is in use at once beside the "
        "arguments, and what moves through memory, in MB and as times of the same network with "
        "Flax's BatchNorm and plain convolutions",
        ["network", "norm", *(head for name in MEASURES for head in (name, f"{name}, times"))],
        rows,
    )


def show_wide(program: jax.stages.Compiled, parameters: Collection[int]) -> None:
    """Print the instructions that write float32 arrays as large as an activation."""
    for line in targets.instructions(program):
        if line.operation in targets.FREE or line.operation.endswith("-done"):
            continue
        wide = {count for count, bytes_ in targets.lengths(line.type) if bytes_ == 4}
        if max(wide.difference(parameters), default=0) >= LARGE:
            origin = line.rest.partition('op_name="')[2].partition('"')[0]
            print(f"  {line.operation} {line.name}: {line.type}  {origin}")


def sharded(target: str, arguments: argparse.Namespace) -> None:
    """The fourth table: what the devices exchange if they share a batch."""
    count = len(targets.devices(target))
    if count == 1:
        print(f"sharded, {target}: there is one device")
        return
    everywhere, split = targets.all_devices(target), targets.all_devices(target, "batch")
    rows: list[list[str | float]] = []
    for name, norm, step, program in steps(
        lambda x: lax.with_sharding_constraint(x, split), everywhere
    ):
        found = targets.collectives(program)
        parameters = [leaf.size for leaf in jax.tree.leaves(step.state.params)]
        arrays = Counter(length for _, lengths in found for length, _ in lengths)
        exchanged = sum(length * times for length, times in arrays.items())
        others = arrays - Counter(parameters)
        channels = statistics_of(step.state.batch_stats)
        rest = exchanged - sum(parameters)
        cells = [len(found), exchanged, sum(parameters), rest, rest / channels]
        rows.append([name, norm, *cells, max(others, default=0)])
        print(*rows[-1], flush=True)
        if arguments.kernels:
            for operation, lengths in found:
                print(f"  {operation}: {' '.join(str(length) for length, _ in lengths)}")
    targets.tabulate(
        "sharded",
        target,
        f"What {count} devices that share a batch exchange in a training step of train_cifar.py, "
        f"{BATCH} images of 32x32x3, bfloat16. Each gradient is exchanged once; the numbers beyond "
        "those are the norms' sums over the batch, a few for each channel, and the loss",
        [
            *("network", "norm", "collectives", "numbers", "parameters", "beyond those"),
            *("beyond, for each channel of the norms", "longest array beyond"),
        ],
        rows,
    )


def statistics_of(stats: Any) -> int:
    """The number of channels with a running mean and variance."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stats)) // 2
