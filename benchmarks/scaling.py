"""How the time of a layer grows with batch, channels, groups and space: a table and a figure.

    python benchmarks/scaling.py

Training, forward and backward, float32. One number of the shape is doubled again and again, the
others stay. Beside `BatchChannelNorm` there are Flax's `BatchNorm` and `GroupNorm` one after the
other, and the limit: 4 copies of the input, see `layer.py`.
"""

from timing import (  # isort: skip  # sets up the environment, so it comes first
    RESULTS,
    here,
    interleaved,
    keep_freed_memory,
    report,
)

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from contenders import Setting, copy, data, flax_pair, linen, ours
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

# Readable on white and on black.
TEXT = "#747c87"
LOOKS: Mapping[str, Mapping[str, Any]] = {
    OURS: {"color": "#2f81f7", "marker": "o", "linestyle": "-"},
    PAIR: {"color": "#d1495b", "marker": "s", "linestyle": "-"},
    LIMIT: {"color": TEXT, "marker": None, "linestyle": "--"},
}

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


def draw(path: Path, points: Mapping[str, Sequence[Point]]) -> None:
    """A panel for each number of the shape."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # letters as letters: a small file
        "svg.hashsalt": path.stem,  # and the same one each time
        "font.size": 10,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT
        ),
    }
    with rc_context(settings):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        panels = figure.subplots(1, len(points), sharey=True)
        for axes, (varied, line) in zip(panels, points.items(), strict=True):
            draw_panel(axes, varied, line)
        panels[0].set_ylabel("milliseconds")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def draw_panel(axes: Axes, varied: str, points: Sequence[Point]) -> None:
    """Time over one of the numbers, both logarithmic: what is linear is as steep as the limit."""
    values = [value for value, _, _ in points]
    for name, looks in LOOKS.items():
        axes.plot(values, [times[name] for _, _, times in points], label=name, **looks)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(values, [f"{n // 1024}k" if n >= 1024 else str(n) for n in values])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(varied)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=TEXT, alpha=0.25)


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
    path = RESULTS / f"scaling-{jax.default_backend()}.svg"
    draw(path, points)
    print(f"the figure is in {path}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
