"""A step of training the published VGG, in Flax and in the PyTorch reference.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --batches 32 --rounds 9

Images of 32x32x3, float32, Adam, as `train_cifar.py` trains it, without augmentation: the images
are on the device, the state is donated. Nothing is asked of the loss until all rounds are done.
Without PyTorch only Flax is measured. To compile for PyTorch takes one to two minutes a network.
"""

from timing import HAS_TORCH, interleaved, report, torch_device  # isort: skip  # comes first

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bcn_flax.models import VGG

if HAS_TORCH:
    import torch

    import bcn_torch

Run = Callable[[], object]
NETWORKS = {
    "WS + BCN": VGG(),
    "GroupNorm": VGG(conv=nn.Conv, norm=partial(nn.GroupNorm, epsilon=1e-5)),
}
if HAS_TORCH:
    TORCH_NETWORKS = {
        "WS + BCN": bcn_torch.VGG,
        "GroupNorm": partial(
            bcn_torch.VGG, conv=torch.nn.Conv2d, norm=partial(torch.nn.GroupNorm, 32)
        ),
    }
LEARNING_RATE = 2.5e-4


def data(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    images = np.random.default_rng(0).standard_normal((batch, 32, 32, 3), np.float32)
    return images, np.arange(batch) % 10


def in_flax(batch: int, network: str) -> Run:
    """A step that is compiled, with the state it goes on from."""
    images, labels = map(jnp.asarray, data(batch))
    model, optimizer = NETWORKS[network], optax.adam(LEARNING_RATE)
    variables = model.init(jax.random.key(0), images[:1], train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def step(state: Any) -> Any:
        params, batch_stats, opt_state = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates.get("batch_stats", {})

        gradient, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    compiled = jax.jit(step, donate_argnums=0)
    state = params, batch_stats, optimizer.init(params)

    def run() -> object:
        nonlocal state
        state = compiled(state)
        return state

    return run


def in_torch(
    batch: int, network: str, *, channels_last: bool = False, compiled: bool = False
) -> Run:
    """The same with the reference network."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, labels = map(torch.from_numpy, data(batch))
    images = images.movedim(-1, 1).to(torch_device()).contiguous(memory_format=layout)
    labels = labels.to(torch_device())
    model = TORCH_NETWORKS[network]().to(torch_device(), memory_format=layout)
    forward = torch.compile(model) if compiled else model
    # By default it takes seven times as long on a CPU.
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return run


def contenders(batch: int, network: str, *, compiled: bool) -> dict[str, Run]:
    """Of which the first is ours."""
    found = {"Flax": in_flax(batch, network)}
    if HAS_TORCH:
        found["PyTorch"] = in_torch(batch, network)
        found["PyTorch, channels last"] = in_torch(batch, network, channels_last=True)
        if compiled:
            torch._dynamo.reset()
            found["PyTorch, compiled"] = in_torch(batch, network, compiled=True)
    return found


def first_calls(runs: dict[str, Run]) -> dict[str, float]:
    """Seconds that each takes the first time, which is to compile, if it does."""
    seconds = {}
    for name, run in runs.items():
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds[name] = time.perf_counter() - start
    return seconds


def main(batches: Sequence[int], rounds: int, *, compiled: bool) -> None:
    """Print the table."""
    rows: list[list[str | float]] = []
    for name in NETWORKS:
        for batch in batches:
            runs = contenders(batch, name, compiled=compiled)
            first = first_calls(runs)
            seconds = interleaved(runs, rounds)
            peers = [s for who, s in seconds.items() if who != "Flax"] or [seconds["Flax"]]
            rows += [
                [name, str(batch), who, 1e3 * s, s / min(peers), first[who]]
                for who, s in seconds.items()
            ]
    report(
        "train_step",
        f"A step of training the published VGG, float32: medians of {rounds} interleaved rounds",
        ["network", "batch size", "in", "ms", "times PyTorch's fastest", "first call, s"],
        rows,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="in each every contender runs once")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    main(arguments.batches, arguments.rounds, compiled=not arguments.no_compile)
