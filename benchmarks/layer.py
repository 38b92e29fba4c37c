"""One normalization layer against what one would use instead, and against the traffic limit.

    python benchmarks/layer.py
    python benchmarks/layer.py --tables training --shapes 2x200x304x256 --dtypes bfloat16
    python benchmarks/layer.py --only "limit|BatchChannelNorm|GroupNorm"

A layer that needs the moments of its input reads it twice and writes once, forward; backward it
reads input and gradient twice and writes once. The limit is that traffic at the speed of a copy,
which reads once and writes once: 1.5 copies forward and 2.5 backward. A layer of which the moments
are known, or constant, has 1 and 1.5. Caches may do better, and small arrays cost what it takes to
start a program.

The first table is training, forward and backward. The second has the parts, evaluation, and the
forward pass alone. Flax's arrays are channels last; PyTorch's are channels first, contiguous, where
nothing else is said. Without PyTorch the rest is measured.

Quick calls are repeated until a measurement takes 5 ms. On a GPU only the last of them is waited
for, so that what is measured is the longer of the host's work and the device's.
"""

from timing import (  # isort: skip  # sets up the environment, so it comes first
    HAS_TORCH,
    here,
    interleaved,
    keep_freed_memory,
    report,
    store,
)

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

from contenders import (
    Make,
    Setting,
    copy,
    data,
    flax_batch_norm,
    flax_group_norm,
    flax_pair,
    group_count,
    in_nnx,
    linen,
    of_few_pixels,
    ours,
)

if HAS_TORCH:
    import torch
    from torch_contenders import can_compile, channels_last, formulas, pair, program

LIMIT, OURS, COPY = "limit", "BatchChannelNorm", "copy"
FEW_PIXELS = f"{OURS} of few pixels"
SMALL = 2**20  # bytes, below which it is told what a program of few pixels costs


class Contender(NamedTuple):
    """What makes its program, and whose traffic is its limit."""

    make: Make
    like: str = OURS


class Table(NamedTuple):
    """What a table has, where the command line does not say."""

    title: str
    shapes: Mapping[str, Sequence[tuple[int, ...]]]  # for each kind of device
    dtypes: Mapping[str, Sequence[str]]
    modes: Sequence[tuple[bool, bool]]  # training, backward


TABLES = {
    "training": Table(
        "One normalization layer in training, forward and backward",
        {
            "cpu": [
                (1, 8, 8, 512),
                (64, 4, 4, 512),
                (32, 32, 32, 64),
                (4, 64, 64, 128),
                (1, 32, 64, 64, 32),
                (2, 200, 304, 256),
            ],
            # Larger, to be busy with them, and the most telling first.
            "gpu": [(2, 200, 304, 256), (64, 32, 32, 128), (1, 8, 8, 512), (1, 64, 128, 128, 32)],
        },
        {"cpu": ["float32"], "gpu": ["float32", "bfloat16"]},
        [(True, True)],
    ),
    "parts": Table(
        "The parts of the layer, forward and backward, or forward alone",
        {"cpu": [(4, 64, 64, 128)], "gpu": [(2, 200, 304, 256)]},
        {"cpu": ["float32", "bfloat16"], "gpu": ["float32", "bfloat16"]},
        [(True, True), (True, False), (False, True), (False, False)],
    ),
}


def contenders(table: str) -> dict[str, Contender]:
    """Of the first table every form of the whole layer, of the second its parts as well."""
    flax = {
        "Flax BatchNorm + GroupNorm": Contender(linen(flax_pair)),
        "Flax GroupNorm": Contender(linen(flax_group_norm), "ChannelNorm"),
    }
    if table == "training":
        by_batch = Contender(linen(partial(ours, estimate=False)))
        nnx, few_pixels = Contender(in_nnx), Contender(of_few_pixels(linen(ours)))
        found = {f"{OURS}, NNX": nnx, f"{OURS}(estimate=False)": by_batch, FEW_PIXELS: few_pixels}
    else:
        names = ("BatchNorm", "EstimatedBatchNorm", "ChannelNorm")
        found = {name: Contender(linen(partial(ours, layer=name)), name) for name in names}
        flax["Flax BatchNorm"] = Contender(linen(flax_batch_norm), "BatchNorm")
    return {OURS: Contender(linen(ours)), **found, **flax, **in_torch(table)}


def in_torch(table: str) -> dict[str, Contender]:
    """The published formulas and PyTorch's own layers; not all of them compiled in each table."""
    if not HAS_TORCH:
        print("there is no PyTorch here: only what JAX has is measured")
        return {}
    forms = {
        "formulas in PyTorch": partial(program, formulas),
        "PyTorch BatchNorm + GroupNorm": partial(program, pair),
        "PyTorch BatchNorm + GroupNorm, channels last": partial(
            program, pair, memory_format=channels_last
        ),
    }
    compiled = list(forms) if table == "training" else ["formulas in PyTorch"]
    if not can_compile():
        compiled = []
    return {name: Contender(form()) for name, form in forms.items()} | {
        f"{name}, compiled": Contender(forms[name](compile_it=True)) for name in compiled
    }


def copies(setting: Setting, like: str) -> float:
    """The least traffic of a layer, in copies of its input."""
    measures = setting.train or like not in ("BatchNorm", "EstimatedBatchNorm")
    differentiates = measures and like != "EstimatedBatchNorm"
    forward, backward = (1.5 if measures else 1.0), (2.5 if differentiates else 1.5)
    return forward + backward * setting.backward


def mode(setting: Setting) -> str:
    return f"{'training' if setting.train else 'evaluation'}{', forward' * (not setting.backward)}"


def measured(
    setting: Setting, chosen: Mapping[str, Contender], arguments: argparse.Namespace
) -> list[list[str | float]]:
    """The rows of one setting."""
    x, dy = data(setting)
    if HAS_TORCH:
        torch.compiler.reset()
    runs = {COPY: copy(setting, x, dy)} | {
        name: contender.make(setting, x, dy)
        for name, contender in chosen.items()
        if name != FEW_PIXELS or x.nbytes < SMALL
    }
    seconds = interleaved(runs, arguments.rounds, at_least=0.005, at_most=arguments.seconds)
    unit = seconds.pop(COPY)
    what = [str(setting.shape), setting.dtype, mode(setting)]
    limit = copies(setting, OURS) * unit
    rows: list[list[str | float]] = [[*what, LIMIT, 1e3 * limit, 1.0, limit / seconds[OURS]]]
    for name, time_ in seconds.items():
        ratio = time_ / (unit * copies(setting, chosen[name].like))
        rows.append([*what, name, 1e3 * time_, ratio, time_ / seconds[OURS]])
    return rows


def tabulate(name: str, arguments: argparse.Namespace) -> None:
    """Measure a table, and report it."""
    table = TABLES[name]
    found = contenders(name)
    chosen = {key: found[key] for key in found if key == OURS or re.search(arguments.only, key)}
    title = f"{table.title}: medians of up to {arguments.rounds} interleaved rounds"
    header = ["shape", "dtype", "mode", "layer", "ms", "times its limit", f"times {OURS}"]
    rows: list[list[str | float]] = []
    for shape, dtype, (train, backward) in product(
        arguments.shapes or here(table.shapes),
        arguments.dtypes or here(table.dtypes),
        table.modes,
    ):
        start = time.perf_counter()
        setting = Setting(shape, group_count(shape[-1]), dtype, train, backward)
        rows += measured(setting, chosen, arguments)
        print(f"{setting}: {time.perf_counter() - start:.0f} s", flush=True)
        store(f"layer-{name}", title, header, rows)
    report(f"layer-{name}", title, header, rows)


def parse() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=list(TABLES), help="which tables to measure"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        help="of the input, channels last, as 4x64x64x128; a default for each kind of device",
    )
    parser.add_argument("--dtypes", nargs="+", help="of the input: float32, bfloat16, float16")
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="in each of which every contender is measured once (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=6,
        help="for the rounds of one shape, of which there are 5 in any case (default: %(default)s)",
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help=f"the contenders to measure, beside {OURS}"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    for name in arguments.tables:
        tabulate(name, arguments)


if __name__ == "__main__":
    keep_freed_memory()
    main()
