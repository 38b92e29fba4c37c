"""How the time of a layer grows with batch, channels, groups and space: a table.

    python benchmarks/scaling.py
    python docs/figures.py  # draws it

Training, forward and backward, float32. One number of the shape is doubled again and again, the
others stay. Beside `BatchChannelNorm` there are Flax's `BatchNorm` and `GroupNorm` one after the
other, and the limit: 4 copies of the input, see `layer.py`.
"""

from timing import (  # isort: skip  # sets up the environment, so it comes first
    here,
    interleaved,
    keep_freed_memory,
    report,
)

import argparse
import math
from collections.abc import Mapping, Sequence

import numpy as np
from contenders import Setting, copy, data, flax_pair, linen, ours

OURS, PAIR, LIMIT = "BatchChannelNorm", "Flax BatchNorm + GroupNorm", "limit: 4 copies"
MAKE = {OURS: linen(ours), PAIR: linen(flax_pair), LIMIT: copy}
COPIES = 4

BASE = {
    "cpu": {"batch": 8, "pixels": 32**2, "channels": 64, "groups": 16},
    "gpu": {"batch": 32, "pixels": 64**2, "channels": 128, "groups": 32},
}
FACTORS = {
    "batch": (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8),
    "pixels": (1 / 64, 1 / 16, 1 / 4, 1, 4, 16),
    "channels": (1 / 2, 1, 2, 4, 8),
    "groups": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2),
}
LINEAR = 2**20  # bytes, from which on the slope is taken: before, starting a program weighs

Point = tuple[int, int, dict[str, float]]  # what was varied, bytes of the input, milliseconds


def measured(sizes: Mapping[str, int], rounds: int) -> tuple[int, dict[str, float]]:
    """Bytes of the input, and milliseconds of each contender."""
    side = math.isqrt(sizes["pixels"])
    shape = (sizes["batch"], side, side, sizes["channels"])
    setting = Setting(shape, sizes["groups"])
    x, dy = data(setting)
    runs = {name: make(setting, x, dy) for name, make in MAKE.items()}
    seconds = interleaved(runs, rounds, at_least=0.005, at_most=3)
    seconds[LIMIT] *= COPIES
    return x.nbytes, {name: 1e3 * time for name, time in seconds.items()}


def slope(points: Sequence[Point], name: str) -> float:
    """The power of what was varied with which the time grows, where the arrays are not small."""
    large = [(value, times[name]) for value, size, times in points if size >= LINEAR]
    values, milliseconds = np.log(large).T
    return float(np.polyfit(values, milliseconds, deg=1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    arguments = parser.parse_args()
    base = here(BASE)
    points: dict[str, list[Point]] = {}
    for varied, factors in FACTORS.items():
        points[varied] = []
        for factor in factors:
            value = int(factor * base[varied])
            size, times = measured({**base, varied: value}, arguments.rounds)
            points[varied].append((value, size, times))
    start = ", ".join(f"{value} {name}" for name, value in base.items())
    report(
        "scaling",
        f"Milliseconds in training, forward and backward, float32, from {start}: medians of "
        f"{arguments.rounds} interleaved rounds",
        ["varied", "value", *MAKE, f"{OURS}, times the limit", f"{PAIR}, times {OURS}"],
        [
            [varied, value, *times.values(), times[OURS] / times[LIMIT], times[PAIR] / times[OURS]]
            for varied, line in points.items()
            for value, _, times in line
        ],
    )
    report(
        "scaling-slopes",
        "With which power of it the time grows, the input having a megabyte or more: 1 is linear",
        ["varied", *MAKE],
        [[varied, *(slope(line, name) for name in MAKE)] for varied, line in points.items()],
    )


if __name__ == "__main__":
    keep_freed_memory()
    main()
