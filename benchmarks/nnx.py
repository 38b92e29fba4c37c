"""The same step of training in NNX and in linen: what the module system costs.

    python benchmarks/nnx.py

Both compile to the same program, so what differs is how a call gets to it: `nnx.jit` takes the
model apart and puts it together again at every call, `jax.jit` with linen's variables does not.
That costs the same whatever the size of the arrays, so it is measured alone too, with arrays of
next to nothing. `nnx.cached_partial` avoids most of it, splitting the model once avoids it all.
"""

from timing import interleaved, report  # isort: skip  # sets up the environment, so it comes first

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import bcn_flax.linen
import bcn_flax.models
import bcn_flax.models.nnx
import bcn_flax.nnx

LINEN = "linen, jax.jit"


def sum_of(y: jax.Array) -> jax.Array:
    """A loss whose gradient reaches every value of the output, and costs nothing."""
    return jnp.sum(jnp.sin(y))


def in_linen(model: nn.Module, x: jax.Array, **call: bool) -> Callable[[], object]:
    """Loss, gradients of the parameters, and new statistics."""
    variables = model.init(jax.random.key(0), x, **call)

    @jax.jit
    def step(variables, x):
        def loss(params):
            y, updates = model.apply(
                {**variables, "params": params}, x, **call, mutable=["batch_stats"]
            )
            return sum_of(y), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return lambda: jax.block_until_ready(step(variables, x))


def step(model: nnx.Module, x: jax.Array) -> object:
    """The same; the statistics are in the model."""
    return nnx.value_and_grad(lambda model: sum_of(model(x)))(model)


def graph_mode(model: nnx.Module, x: jax.Array) -> Callable[[], object]:
    call = nnx.jit(step)
    return lambda: jax.block_until_ready(call(model, x))


def tree_mode(model: nnx.Module, x: jax.Array) -> Callable[[], object]:
    def in_tree_mode(model, x):
        with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
            loss, gradients = step(model, x)
            return loss, nnx.state(gradients, nnx.Param)

    call = nnx.jit(in_tree_mode, graph=False, graph_updates=False)
    return lambda: jax.block_until_ready(call(model, x))


def cached_partial(model: nnx.Module, x: jax.Array) -> Callable[[], object]:
    call = nnx.cached_partial(nnx.jit(step), model)
    return lambda: jax.block_until_ready(call(x))


def split_once(model: nnx.Module, x: jax.Array) -> Callable[[], object]:
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, x):
        model = nnx.merge(graphdef, state)
        result = step(model, x)
        return result, nnx.state(model, nnx.BatchStat)

    return lambda: jax.block_until_ready(call(state, x))


WAYS = {
    "NNX, nnx.jit, graph mode": graph_mode,
    "NNX, nnx.jit, tree mode": tree_mode,
    "NNX, nnx.cached_partial": cached_partial,
    "NNX, split once, jax.jit": split_once,
}
SMALL = ((32, 32), (64, 64)), 32  # blocks, and groups of channels
TINY = ((2, 2), (2, 2), (2, 2)), 2


def layer(shape: tuple[int, ...], **options: int) -> dict[str, Callable[[], object]]:
    x = jax.random.normal(jax.random.key(0), shape)
    linen = bcn_flax.linen.BatchChannelNorm(use_running_average=False, **options)
    make = partial(bcn_flax.nnx.BatchChannelNorm, shape[-1], **options)
    return contenders(in_linen(linen, x), make, x)


def network(
    shape: tuple[int, ...], blocks: tuple[tuple[int, ...], ...], groups: int
) -> dict[str, Callable[[], object]]:
    x = jax.random.normal(jax.random.key(0), shape)
    linen_norm, nnx_norm = (
        partial(library.BatchChannelNorm, num_groups=groups)
        for library in (bcn_flax.linen, bcn_flax.nnx)
    )
    linen = in_linen(bcn_flax.models.VGG(blocks, norm=linen_norm), x, train=True)
    return contenders(linen, partial(bcn_flax.models.nnx.VGG, blocks, norm=nnx_norm), x)


def contenders(
    linen: Callable[[], object], make: Callable[..., nnx.Module], x: jax.Array
) -> dict[str, Callable[[], object]]:
    ways = {name: way(make(rngs=nnx.Rngs(0)), x) for name, way in WAYS.items()}
    return {LINEN: linen, **ways}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="(default: %(default)s)")
    rounds = parser.parse_args().rounds
    programs = {
        "BatchChannelNorm, (32, 32, 32, 64)": layer((32, 32, 32, 64)),
        "VGG of 4 convolutions, (32, 32, 32, 3)": network((32, 32, 32, 3), *SMALL),
        "BatchChannelNorm, (1, 1, 2, 2)": layer((1, 1, 2, 2), num_groups=2),
        "VGG of 6 convolutions, (1, 8, 8, 3)": network((1, 8, 8, 3), *TINY),
    }
    rows = []
    for program, runs in programs.items():
        seconds = interleaved(runs, rounds)
        rows += [
            [
                program,
                name,
                f"{1e3 * time:.3f}",
                f"{time / seconds[LINEN]:.3f}",
                f"{1e6 * (time - seconds[LINEN]):.0f}",
            ]
            for name, time in seconds.items()
        ]
    report(
        "nnx",
        f"Forward and backward in training, float32: medians of {rounds} interleaved rounds",
        ["what", "how", "ms", "times linen", "microseconds more"],
        rows,
    )


if __name__ == "__main__":
    main()
