"""Draw the figures of this site from the tables in benchmarks/results, for light and dark pages.

    python docs/figures.py

Each figure notes what it was drawn from, so that a test finds one that is out of date.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
FIGURES = HERE / "figures"

OURS, PAIR = "BatchChannelNorm", "Flax BatchNorm + GroupNorm"
SEEDS = 20  # of each point of the micro-batch figure
MINIMUM = 7  # times that a layer must move its input, forward and backward in one program


class Theme(NamedTuple):
    """Colors of the text, of lines that help the eye, and of the methods."""

    text: str
    grid: str
    ours: str
    pair: str
    group: str
    batch: str


THEMES = {
    "light": Theme("#24292f", "#d0d7de", "#0b61c9", "#6b3fa0", "#9a6700", "#c0293f"),
    "dark": Theme("#d7dde4", "#3d444d", "#6cb0ff", "#c3a0f5", "#e0b23a", "#ff8591"),
}


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a table that a benchmark has written."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def accuracies() -> tuple[list[int], dict[str, list[tuple[float, float]]]]:
    """The batch sizes, and for each norm the mean and the standard deviation at each of them."""
    header, _, *lines = re.findall(r"^\| (.*) \|$", (RESULTS / "micro_batch.md").read_text(), re.M)
    sizes = [int(cell.removeprefix("batch size ")) for cell in header.split(" | ")[1:]]
    found: dict[str, list[tuple[float, float]]] = {}
    for name, *cells in (line.split(" | ") for line in lines):
        if "±" in cells[0]:
            pairs = [cell.split(" ± ") for cell in cells]
            found[name] = [(float(mean), float(spread)) for mean, spread in pairs]
    return sizes, found


def micro_batch(figure: Any, theme: Theme) -> None:
    """Accuracy over the batch size, a line for each norm, dashed without weight standardization."""
    sizes, found = accuracies()
    axes = figure.subplots()
    for i, (name, cells) in enumerate(found.items()):
        norm, _, standardized = name.partition(" + ")
        color = {"BN": theme.batch, "GN": theme.group, "BCN": theme.ours}[norm]
        shift = 1.04 ** (i - (len(found) - 1) / 2)  # so that bars do not hide each other
        axes.errorbar(
            [shift * size for size in sizes],
            [mean for mean, _ in cells],
            [2 * spread / math.sqrt(SEEDS) for _, spread in cells],
            label=name,
            color=color,
            marker={"BN": "s", "GN": "^", "BCN": "o"}[norm],
            markersize=6,
            markerfacecolor=color if standardized else "none",
            linestyle="-" if standardized else "--",
            linewidth=1.8,
            capsize=2.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="batch size", ylabel="held-out accuracy (%)")
    axes.grid(axis="y")
    figure.legend(loc="outside right center", frameon=False)


def traffic(figure: Any, theme: Theme) -> None:
    """How many times the limit each layer takes, on two accelerators and a CPU."""
    panels = figure.subplots(1, 3, sharex=True)
    limits: dict[str, Callable[[dict[str, Any]], float]] = {
        "H100: bytes": lambda row: row["forward + backward"] / MINIMUM,
        "TPU v5e: bytes": lambda row: row["forward + backward"] / MINIMUM,
        "CPU: time": lambda row: row["times its limit"],
    }
    tables = [rows(f"compiled-layer-{chip}") for chip in ("h100", "v5e")]
    looks = {
        OURS: ("o", theme.ours),
        PAIR: ("D", theme.pair),
        "Flax GroupNorm": ("^", theme.group),
        "Flax BatchNorm": ("s", theme.batch),
    }
    for axes, (title, times), table in zip(
        panels, limits.items(), [*tables, rows("layer-training-cpu")], strict=True
    ):
        kept = [row for row in table if row["dtype"] == "bfloat16" and row["layer"] in looks]
        shapes = sorted({row["shape"] for row in kept}, key=_size)
        for i, (name, (marker, color)) in enumerate(looks.items()):
            chosen = [row for row in kept if row["layer"] == name]
            # Below each other, so that none is hidden.
            places = [shapes.index(row["shape"]) + 0.18 * (1.5 - i) for row in chosen]
            axes.plot(
                [times(row) for row in chosen],
                places,
                marker,
                color=color,
                label=name,
                markersize=7,
            )
        axes.axvline(1, color=theme.text, linewidth=1)
        axes.set_yticks(range(len(shapes)), [shape.strip("()") for shape in shapes])
        axes.set(title=title, xlabel="times the limit")
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
        axes.set_ylim(-0.6, len(shapes) - 0.4)
        axes.grid(axis="x")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )


def _size(shape: str) -> int:
    return math.prod(int(length) for length in shape.strip("()").split(","))


def memory(figure: Any, theme: Theme) -> None:
    """What each block of a network keeps, and what the compiled program needs."""
    table = rows("memory-cpu")[::-1]
    axes = figure.subplots()
    height = 0.38
    for offset, column, color in (
        (height / 2, "kept by differentiation", theme.ours),
        (-height / 2, "temporary memory", theme.group),
    ):
        lengths = [row[column] for row in table]
        places = [i + offset for i in range(len(table))]
        bars = axes.barh(places, lengths, height, color=color, label=column)
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(table)), [row["network"] for row in table])
    axes.set_xlabel("arrays of the size of a block's output")
    axes.set_xlim(right=7.2)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def time(figure: Any, theme: Theme) -> None:
    """The time of a layer over each number of its shape."""
    table = rows("scaling-cpu")
    looks: dict[str, dict[str, Any]] = {
        OURS: {"color": theme.ours, "marker": "o"},
        PAIR: {"color": theme.pair, "marker": "D"},
        "limit: 4 copies": {"color": theme.text, "linestyle": "--"},
    }
    varied = list(dict.fromkeys(row["varied"] for row in table))
    panels = figure.subplots(1, len(varied), sharey=True)
    for axes, name in zip(panels, varied, strict=True):
        chosen = [row for row in table if row["varied"] == name]
        values = [row["value"] for row in chosen]
        for label, look in looks.items():
            axes.plot(values, [row[label] for row in chosen], label=label, markersize=5, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        shown = values[::2]
        axes.set_xticks(shown, [f"{n // 1024}k" if n >= 1024 else str(n) for n in shown])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(name)
        axes.grid(axis="both")
    panels[0].set_ylabel("milliseconds")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )


class Drawing(NamedTuple):
    """How a figure is drawn, from which files, and how large in inches."""

    draw: Callable[[Any, Theme], None]
    sources: Sequence[str]
    size: tuple[float, float]


DRAWINGS = {
    "micro-batch": Drawing(micro_batch, ["micro_batch.md"], (7.2, 3.8)),
    "traffic": Drawing(
        traffic,
        ["compiled-layer-h100.json", "compiled-layer-v5e.json", "layer-training-cpu.json"],
        (10, 4),
    ),
    "memory": Drawing(memory, ["memory-cpu.json"], (7.2, 3.4)),
    "time": Drawing(time, ["scaling-cpu.json"], (10, 3.2)),
}


def fingerprint(name: str) -> str:
    """Of all that the figure is drawn from: the tables, and this file."""
    files = [Path(__file__), *(RESULTS / source for source in DRAWINGS[name].sources)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def main() -> None:
    """Draw each figure for each theme."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    FIGURES.mkdir(exist_ok=True)
    for name, drawing in DRAWINGS.items():
        for theme_name, theme in THEMES.items():
            path = FIGURES / f"{name}-{theme_name}.svg"
            settings: dict[Any, Any] = {
                "svg.fonttype": "none",  # letters as letters: a small file
                "svg.hashsalt": path.stem,  # and the same one each time
                "font.size": 11,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.titlesize": 11,
                "grid.color": theme.grid,
                **dict.fromkeys(
                    (
                        "text.color",
                        "axes.labelcolor",
                        "axes.edgecolor",
                        "xtick.color",
                        "ytick.color",
                    ),
                    theme.text,
                ),
            }
            with rc_context(settings):
                figure = Figure(figsize=drawing.size, layout="constrained")
                drawing.draw(figure, theme)
                about = {"Date": None, "Creator": None, "Identifier": fingerprint(name)}
                figure.savefig(path, transparent=True, metadata=about)
            print(path.relative_to(HERE.parent), f"{path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
