"""What training moves through the memory of a GPU and a TPU, by compiled programs: nothing runs.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --only layer chain --target v5e
    python benchmarks/compiled.py --only layer --target h100 --kernels   # each kernel's traffic

`targets.py` says which packages it takes; no device is needed. The tables hold bytes, kernels and
temporary memory, and no times: those want a device. They are

- layer: one normalization layer, forward, and forward and backward in one program. No such layer
  can do with less than 7 passes over arrays of the size of x: it reads x for the moments, x and dy
  for the output y and the sums of the backward pass, x and dy for dx, and writes y and dx. Where
  the passes are two programs it is 8, because x is read once more for y;
- chain: convolution, norm and ReLU, three times, where the compiler joins a norm's passes with what
  is before and after it;
- networks: the step of `train_cifar.py`;
- sharded: the same step on four chips of a TPU that share a batch: what they exchange;
- fits: the largest batch of a ResNet-50.

All of it takes half an hour on 2 cores, most of it the TPU's compiler.

On a TPU a channel axis is filled up to 128, so that 64 channels take twice their bytes, and a layer
alone is copied into the layout that the compiler wants and back: see the chain.
"""

import targets  # isort: skip  # sets up the environment, so it comes first

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from contenders import (
    Setting,
    flax_batch_norm,
    flax_group_norm,
    flax_pair,
    group_count,
    ours,
)
from flax import linen as nn
from networks import networks, sharded
from resnet50 import fits

from bcn_flax import WSConv

Make = Callable[[Setting], nn.Module]

PAIR = "Flax BatchNorm + GroupNorm"
NORMS: dict[str, Make] = {
    "BatchChannelNorm": ours,
    PAIR: flax_pair,
    "Flax GroupNorm": flax_group_norm,
    "Flax BatchNorm": flax_batch_norm,
}
SHAPES = ((2, 200, 304, 256), (32, 32, 32, 64), (16, 56, 56, 256), (64, 4, 4, 512))
DTYPES = ("float32", "bfloat16")
CHAIN = Setting((16, 56, 56, 256), 32, "bfloat16")
BLOCKS = 3
LAYOUTS = {
    "v5e": ". Here copies of x, dy, y and dx into and out of the layout that the compiler wants "
    "are counted as well, and 64 channels are filled up to 128"
}


def variables_of(model: nn.Module, setting: Setting) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Parameters, the other variables, and the input, all without values."""
    x = jax.ShapeDtypeStruct(setting.shape, jnp.dtype(setting.dtype))
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), x))
    return variables.pop("params"), variables, x


def call(model: nn.Module, params: Any, rest: Any, x: Any) -> Any:
    """The output, and the new statistics."""
    return model.apply({**rest, "params": params}, x, mutable=["batch_stats"])


def both_passes(model: nn.Module, params: Any, rest: Any, x: Any, dy: Any) -> Any:
    """The output, the gradients of parameters and input, and the new statistics."""
    y, pullback, stats = jax.vjp(
        lambda params, x: call(model, params, rest, x), params, x, has_aux=True
    )
    return y, pullback(dy), stats


def gradients(model: nn.Module, params: Any, rest: Any, x: Any) -> Any:
    """Of the sum of squares of the output, as to the parameters; and the new statistics."""

    def loss(params: Any) -> Any:
        y, stats = call(model, params, rest, x)
        return jnp.sum(y.astype(jnp.float32) ** 2), stats

    return jax.grad(loss, has_aux=True)(params)


def bytes_of(setting: Setting) -> int:
    """What x takes."""
    return math.prod(setting.shape) * jnp.dtype(setting.dtype).itemsize


def show_kernels(name: str, program: jax.stages.Compiled, setting: Setting) -> None:
    """Print what each kernel writes and reads, but for what is small beside x."""
    unit = bytes_of(setting)
    print(f"\n{name}, {setting.shape}, {setting.dtype}; in sizes of x: writes <- reads")
    for kernel in targets.kernels(program):
        if max(kernel.written, *kernel.read, 0) >= 0.005 * unit:
            read = " ".join(f"{bytes_ / unit:.2f}" for bytes_ in kernel.read)
            print(f"  {kernel.written / unit:6.2f} <- {read:30} {kernel.operation} {kernel.name}")


def layer(target: str, arguments: argparse.Namespace) -> None:
    """The first table."""
    where = targets.one_device(target)
    rows: list[list[str | float]] = []
    for shape, dtype in product(arguments.shapes or SHAPES, DTYPES):
        setting = Setting(shape, group_count(shape[-1]), dtype)
        for name, make in NORMS.items():
            model = make(setting)
            params, rest, x = variables_of(model, setting)
            forward = targets.compiled(where, partial(call, model), params, rest, x)
            both = targets.compiled(where, partial(both_passes, model), params, rest, x, x)
            cells = [
                cell
                for program in (forward, both)
                for cell in (passes(program, setting), len(targets.kernels(program)))
            ]
            rows.append([str(shape), dtype, name, *cells])
            if arguments.kernels:
                show_kernels(name, both, setting)
    targets.tabulate(
        "layer",
        target,
        "What a normalization layer in training moves through memory, in sizes of x in its own "
        "dtype. With forward and backward in one program no layer can do with less than 7 (x; x "
        "and dy for y and the sums; x and dy for dx; y and dx written), in two with 8"
        + LAYOUTS.get(target, ""),
        ["shape", "dtype", "layer", "forward", "kernels", "forward + backward", "its kernels"],
        rows,
    )


def passes(program: jax.stages.Compiled, setting: Setting) -> float:
    """What it moves through memory, in sizes of x."""
    return targets.bytes_moved(program) / bytes_of(setting)


class Chain(nn.Module):
    """Blocks of convolution, norm and ReLU."""

    norm: Callable[[], nn.Module]
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(BLOCKS):
            x = self.conv(x.shape[-1], (3, 3), use_bias=False, dtype=x.dtype)(x)
            x = nn.relu(self.norm()(x))
        return x


def chain(target: str, arguments: argparse.Namespace) -> None:
    """The second table."""
    chains: Mapping[str, nn.Module] = {
        **{name: Chain(partial(make, CHAIN), nn.Conv) for name, make in NORMS.items()},
        "BatchChannelNorm, WSConv": Chain(partial(ours, CHAIN), WSConv),
    }
    rows: list[list[str | float]] = []
    for name, model in chains.items():
        program = targets.compiled(
            targets.one_device(target), partial(gradients, model), *variables_of(model, CHAIN)
        )
        temporary = targets.temporary_memory(program) / bytes_of(CHAIN)
        count = len(targets.kernels(program))
        rows.append(
            [name, passes(program, CHAIN) / BLOCKS, temporary / BLOCKS, round(count / BLOCKS, 1)]
        )
        print(*rows[-1], flush=True)
        if arguments.kernels:
            show_kernels(name, program, CHAIN)
    targets.tabulate(
        "chain",
        target,
        f"A layer's share of what a chain of {BLOCKS} blocks of 3x3 convolution, norm and ReLU "
        f"moves through memory and keeps in it, {CHAIN.shape}, {CHAIN.dtype}, forward and "
        "backward, in sizes of x",
        ["norm", "moved", "temporary memory", "kernels"],
        rows,
    )


PARTS = {
    "layer": layer,
    "chain": chain,
    "networks": networks,
    "sharded": sharded,
    "fits": fits,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--target", nargs="+", choices=targets.TARGETS, default=list(targets.TARGETS)
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        help="of the layer's input, channels last, as 4x64x64x128",
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="print what each kernel of a layer or a chain reads and writes",
    )
    arguments = parser.parse_args()
    for name, target in product(arguments.only, arguments.target):
        start = time.perf_counter()
        PARTS[name](target, arguments)
        print(f"{name}, {target}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
