"""What a user waits for besides the steps: import, and compilation; and what `WSConv` costs.

    python benchmarks/costs.py
    python benchmarks/costs.py --only import

Import: a new process each time, in which JAX and Flax are imported first, so that only what comes
with this package is left. Compilation: the step of the published VGG, batch 32, loss and gradients,
from nothing each time. The step itself is timed with `Conv` and with `WSConv`.
"""

from timing import interleaved, report  # isort: skip  # sets up the environment, so it comes first

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bcn_flax import BatchChannelNorm, BatchNorm
from bcn_flax.models import VGG
from bcn_flax.models.architecture import BLOCKS

ROOT = Path(__file__).parent.parent
MODULES = ("bcn_flax", "bcn_flax.nnx", "bcn_flax.models")
IMPORT = """
import time
start = time.perf_counter()
import jax, flax, flax.linen, flax.nnx
middle = time.perf_counter()
import {module}
print(middle - start, time.perf_counter() - middle)
"""


class PlainVGG(nn.Module):
    """The published VGG of Flax's own layers, but for the norm."""

    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for block in BLOCKS:
            for features in block:
                x = nn.Conv(features, (3, 3))(x)
                x = nn.relu(self.norm(use_running_average=not train)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


NETWORKS = {
    "Conv and BatchNorm of Flax": PlainVGG(nn.BatchNorm),
    "Conv of Flax, BatchChannelNorm": PlainVGG(BatchChannelNorm),
    "models.VGG(conv=nn.Conv, norm=BatchNorm)": VGG(conv=nn.Conv, norm=BatchNorm),
    "models.VGG(conv=nn.Conv)": VGG(conv=nn.Conv),
    "models.VGG()": VGG(),
}
PLAIN, STANDARDIZED = "models.VGG(conv=nn.Conv)", "models.VGG()"


def import_seconds(module: str) -> tuple[float, float]:
    """Of JAX and Flax, and of a module after them."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    before, after = map(float, run.stdout.split())
    return before, after


def imports(rounds: int) -> None:
    """The first table."""
    import_seconds(MODULES[0])  # reads the files, and writes bytecode
    seconds: dict[str, list[float]] = {"jax, flax": [], **{module: [] for module in MODULES}}
    for _ in range(rounds):
        for module in MODULES:
            before, after = import_seconds(module)
            seconds["jax, flax"].append(before)
            seconds[module].append(after)
    report(
        "import",
        f"Seconds of an import after that of jax and flax: medians of {rounds} processes",
        ["module", "seconds"],
        [[module, median(times)] for module, times in seconds.items()],
    )


def arguments_of(model: nn.Module, batch: int) -> tuple[Any, Any, jax.Array]:
    """The parameters, the statistics and a batch of images."""
    images = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), images[:1])
    return variables["params"], variables["batch_stats"], images


def step(model: nn.Module, params: Any, batch_stats: Any, images: jax.Array) -> Any:
    """Loss, gradients and new statistics."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].mean(), updates

    return jax.value_and_grad(loss, has_aux=True)(params)


def stages(model: nn.Module, arguments: Any) -> tuple[list[float], Callable[..., Any]]:
    """Seconds of tracing, lowering and compiling the step, and what comes out."""
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(partial(step, model)).trace(*arguments)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)], compiled


def compilation(batch: int, rounds: int) -> dict[str, Callable[[], object]]:
    """The second table; returns the steps that it compiled."""
    arguments = {name: arguments_of(model, batch) for name, model in NETWORKS.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in NETWORKS}
    steps: dict[str, Callable[[], object]] = {}
    for _ in range(rounds):
        for name, model in NETWORKS.items():
            times, compiled = stages(model, arguments[name])
            seconds[name].append([*times, sum(times)])
            steps[name] = partial(compiled, *arguments[name])
    medians = {name: np.median(times, axis=0).tolist() for name, times in seconds.items()}
    base = next(iter(medians.values()))[-1]
    report(
        "compilation",
        f"Seconds to the first step of the published VGG, batch {batch}: medians of {rounds} "
        "interleaved rounds",
        ["network", "trace", "lower", "compile", "in all", "times Flax's layers"],
        [[name, *times, times[-1] / base] for name, times in medians.items()],
    )
    return steps


def standardization(steps: Mapping[str, Callable[[], object]], batch: int, rounds: int) -> None:
    """The third table."""
    seconds = interleaved({name: steps[name] for name in (PLAIN, STANDARDIZED)}, rounds)
    report(
        "ws",
        f"A step of the published VGG, batch {batch}, without and with weight standardization: "
        f"medians of {rounds} interleaved rounds",
        ["network", "ms", f"times {PLAIN}"],
        [[name, 1e3 * time_, time_ / seconds[PLAIN]] for name, time_ in seconds.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("import", "compilation"), help="one part of it")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.only != "compilation":
        imports(4 * arguments.rounds)
    if arguments.only != "import":
        steps = compilation(arguments.batch, arguments.rounds)
        standardization(steps, arguments.batch, 2 * arguments.rounds)


if __name__ == "__main__":
    main()
