"""What a chain of convolution, norm and ReLU keeps for the backward pass, and how large it may get.

    python benchmarks/memory.py
    python benchmarks/memory.py --gib 1   # the second table on a CPU, as if it had so much memory

The first table counts in activations of one block: what JAX's differentiation asks to be kept; the
temporary memory of the compiled program, in which XLA computes again what is cheap; and on a GPU
the most that was in use. On a CPU rematerialization shows in the first of these alone: XLA there
finds that the second computation equals the first, and leaves it out.

The second table, on a GPU, is the largest batch and the largest image of which a step fits, by the
memory that the compiled program says it needs; that step is run once.

To rematerialize, a norm, the ReLU after it and the convolution after that are one unit: `Unit`.
What enters a unit is the output of a convolution, which is kept, and with it its moments, a few
numbers for each channel of each sample. What leaves the ReLU is computed again.
"""

import os

# One piece of memory, so that what has been freed can be used for something larger.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.9"

from timing import here, interleaved, report  # isort: skip  # sets up the environment, so it comes first

import argparse
import math
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from contenders import FlaxPair
from flax import linen as nn
from jax.extend.core import Var

from bcn_flax import MOMENTS, BatchChannelNorm

Norm = Callable[[], nn.Module]
CHANNELS = 64
KEPT = jax.checkpoint_policies.save_only_these_names(MOMENTS)
PRECISION = 0.02  # to which the largest size is found
SHAPES = {"cpu": (8, 32, 32, CHANNELS), "gpu": (32, 128, 128, CHANNELS)}


class Growing(NamedTuple):
    """What grows until it no longer fits."""

    title: str
    shape: Callable[[int], tuple[int, ...]]
    start: int
    power: int  # of the count, with which the memory grows
    multiple: int


GROWING = (
    Growing("largest batch of 128x128", lambda n: (n, 128, 128, CHANNELS), 8, 1, 1),
    Growing("largest side of one image", lambda n: (1, n, n, CHANNELS), 256, 2, 8),
)
PAIR = "Flax BatchNorm + GroupNorm"


class Block(nn.Module):
    """Convolution, norm, ReLU."""

    norm: Norm

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(self.norm()(convolution()(x)))


class Unit(nn.Module):
    """Norm, ReLU, and the convolution of the next block, if there is one."""

    norm: Norm
    is_last: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.norm()(x))
        return x if self.is_last else convolution()(x)


class Chain(nn.Module):
    """Blocks one after the other."""

    norm: Norm
    blocks: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.blocks):
            x = Block(self.norm)(x)
        return x


class RematerializedChain(Chain):
    """The same function, which keeps of each block the output of the convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = convolution()(x)
        for i in range(self.blocks):
            x = nn.remat(Unit, policy=KEPT)(self.norm, i == self.blocks - 1)(x)
        return x


def convolution() -> nn.Module:
    return nn.Conv(CHANNELS, (3, 3), use_bias=False)


def networks(blocks: int) -> dict[str, nn.Module]:
    """The chains that are compared."""
    batch_norm = partial(nn.BatchNorm, use_running_average=False)
    group_norm = partial(nn.GroupNorm, num_groups=32)
    pair = partial(FlaxPair, 32, use_running_average=False, dtype=None)
    ours = partial(BatchChannelNorm, use_running_average=False)
    return {
        "Flax BatchNorm": Chain(batch_norm, blocks),
        "Flax GroupNorm": Chain(group_norm, blocks),
        PAIR: Chain(pair, blocks),
        "BatchChannelNorm": Chain(ours, blocks),
        "BatchChannelNorm, rematerialized": RematerializedChain(ours, blocks),
    }


def forward(model: nn.Module, rest: Any, x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """A loss whose gradient reaches every value of the output, and the new statistics."""
    y, stats = model.apply({**rest, "params": params}, x, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(y)), stats


def step(model: nn.Module, params: Any, rest: Any, x: jax.Array) -> Any:
    """The gradients of the parameters, and the new statistics."""
    return jax.grad(partial(forward, model, rest, x), has_aux=True)(params)


def arguments_of(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Shapes and types of the parameters, the other variables, and the input."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), x))
    return variables.pop("params"), variables, x


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that differentiation keeps between the passes, besides the parameters."""

    def pullback(params: Any, rest: Any, x: jax.Array) -> Any:
        return jax.vjp(partial(forward, model, rest, x), params, has_aux=True)[1]

    arguments = arguments_of(model, shape)
    jaxpr = jax.make_jaxpr(pullback)(*arguments).jaxpr
    parameters = jaxpr.invars[: len(jax.tree.leaves(arguments[0]))]
    # In a set, because what is kept for two uses takes memory once.
    variables = {var for var in jaxpr.outvars if isinstance(var, Var)}
    return size([var.aval for var in variables.difference(parameters)])


@cache
def compiled(model: nn.Module, shape: tuple[int, ...]) -> jax.stages.Compiled:
    """The step's program."""
    return jax.jit(partial(step, model)).lower(*arguments_of(model, shape)).compile()


def needs(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Bytes of device memory that the program takes; infinite if it cannot even be compiled."""
    try:
        memory: Any = compiled(model, shape).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def zeros(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """What to call the program with."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), arguments_of(model, shape))


def runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether a step really fits."""
    try:
        jax.block_until_ready(compiled(model, shape)(*zeros(model, shape)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return False
        raise
    return True


def largest(
    bytes_of: Callable[[int], float], limit: float, start: int, power: int, multiple: int
) -> int:
    """The largest count of which the bytes stay within a limit, to `PRECISION`.

    The bytes are taken to grow with a power of the count; each guess is that from the last one,
    between those that are known to fit and not to fit.
    """
    low, high, guess = 0, sys.maxsize, start
    while True:
        total = bytes_of(guess)
        low, high = (guess, high) if total <= limit else (low, guess)
        close = max(multiple, multiple * int(PRECISION * low / multiple))
        if high - low <= close:
            return low
        likely = multiple * int(guess * (limit / total) ** (1 / power) / multiple)
        guess = min(max(likely, low + close), high - multiple)


def keeping(arguments: argparse.Namespace) -> None:
    """The first table."""
    shape = arguments.shape or here(SHAPES)
    unit = arguments.blocks * 4 * math.prod(shape)
    rows: dict[str, list[float]] = {}
    calls = {}
    for name, model in networks(arguments.blocks).items():
        program = compiled(model, shape)
        analysis: Any = program.memory_analysis()
        rows[name] = [kept(model, shape) / unit, analysis.temp_size_in_bytes / unit]
        calls[name] = partial(program, *zeros(model, shape))
    header = ["network", "kept by differentiation", "temporary memory"]
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        header.append("peak memory in use")
        # The device tells the highest peak ever, so that they must come in this order.
        for name in sorted(rows, key=lambda name: rows[name][1]):
            jax.block_until_ready(calls[name]())
            rows[name].append(jax.devices()[0].memory_stats()["peak_bytes_in_use"] / unit)
    seconds = interleaved(calls, arguments.rounds, at_most=10)
    report(
        "memory",
        f"Activations for each of {arguments.blocks} blocks of convolution, norm and ReLU, "
        f"{shape}, float32, and a step's time: medians of {arguments.rounds} interleaved rounds",
        [*header, "ms"],
        [[name, *row, 1e3 * seconds[name]] for name, row in rows.items()],
    )


def fitting(arguments: argparse.Namespace, limit: float) -> None:
    """The second table."""
    found: dict[str, list[int]] = {}
    for name, model in networks(arguments.blocks).items():
        found[name] = []
        for growing in GROWING:
            shape, multiple = growing.shape, growing.multiple
            needed = partial(lambda model, shape, n: needs(model, shape(n)), model, shape)
            count = largest(needed, limit, growing.start, growing.power, multiple)
            if count == 0:
                sys.exit(f"{name}: no size fits into {limit / 2**30:.3g} GiB")
            while not runs(model, shape(count)):
                print(f"{name}: {shape(count)} does not run, though it should")
                count -= max(multiple, multiple * int(PRECISION * count / multiple))
            found[name].append(count)
        print(f"{name}: {found[name]}", flush=True)
    base = found[PAIR]
    header = ["network"]
    for growing in GROWING:
        header += [growing.title, f"times {PAIR}"]
    rows = [
        [name, *(cell for n, of in zip(counts, base, strict=True) for cell in (n, n / of))]
        for name, counts in found.items()
    ]
    report(
        "memory-limit",
        f"What fits into {limit / 2**30:.1f} GiB of a step of {arguments.blocks} blocks of "
        f"convolution, norm and ReLU, {CHANNELS} channels, float32",
        header,
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument(
        "--shape",
        type=lambda text: tuple(map(int, text.split("x"))),
        help="of the input of the first table, as 8x32x32x64",
    )
    parser.add_argument(
        "--gib", type=float, help="the memory to fill in the second table; that of the GPU"
    )
    arguments = parser.parse_args()
    keeping(arguments)
    stats = jax.devices()[0].memory_stats()
    if arguments.gib is not None:
        fitting(arguments, arguments.gib * 2**30)
    elif stats is not None:
        fitting(arguments, stats["bytes_limit"])


if __name__ == "__main__":
    main()
