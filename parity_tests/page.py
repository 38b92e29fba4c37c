"""The verification report as one HTML page, which loads nothing and needs no network."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from io import StringIO
from math import isfinite
from pathlib import Path
from statistics import median
from textwrap import dedent
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Record = Mapping[str, Any]

# Stand for the colors of the page, which change with the reader's color scheme.
COLORS = {name: f"#00ff0{i}" for i, name in enumerate(("flax", "torch", "ink", "quiet", "rule"))}
FLAX, TORCH, INK, QUIET, RULE = COLORS.values()
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


def page(report: Record) -> str:
    """The report that `parity_tests.report.gather` returns, as an HTML document."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = number
    with rc_context(STYLE):
        return templates.get_template("page.html").render(
            report,
            diff=diff,
            error_figures=[error_figure(*errors) for errors in float32_errors(report["cases"])],
            training_figures=training_figures,
        )


def number(x: float | None) -> str:
    """Three significant digits; a dash for an unknown number."""
    return "\N{EN DASH}" if x is None else f"{x:,.0f}" if 999.5 <= x < 1e5 else f"{x:.3g}"


def diff(old: str, new: str) -> tuple[Markup, Markup]:
    """Both texts, with the words that differ emphasized."""
    before, after = (re.findall(r"\w+|\s+|.", dedent(text).strip("\n")) for text in (old, new))
    removed = added = Markup()
    for how, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        words = Markup("{}" if how == "equal" else "<b>{}</b>")
        removed += words.format("".join(before[i:j]))
        added += words.format("".join(after[k:m]))
    return removed, added


def float32_errors(cases: Sequence[Record]) -> list[tuple[str, Mapping[str, list[float]]]]:
    """By quantity and side, the errors against the oracle in the float32 cases."""
    errors: dict[str, dict[str, list[float]]] = {}
    for quantity in (q for case in cases if case["dtype"] == "float32" for q in case["quantities"]):
        flax, torch = quantity["flax_ulps"], quantity["torch_ulps"]
        if flax is not None and torch is not None and isfinite(flax) and isfinite(torch):
            sides = errors.setdefault(quantity["quantity"], {"Flax": [], "PyTorch": []})
            sides["Flax"].append(flax)
            sides["PyTorch"].append(torch)
    return list(errors.items())


def error_figure(quantity: str, sides: Mapping[str, Sequence[float]]) -> Markup:
    """The distribution of both sides' errors in one quantity."""
    figure, axes = new_figure(2.4, 1.9, quantity)
    for errors, color in zip(sides.values(), (FLAX, TORCH), strict=True):
        axes.ecdf([max(x, 1e-3) for x in errors], color=color)  # 0 has no logarithm
    medians = ", ".join(f"{side} {number(median(errors))}" for side, errors in sides.items())
    axes.set(xscale="log", xlabel=f"medians: {medians}")
    axes.set_xlim(left=0.1)
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.set_yticks((0, 0.5, 1), labels=("0", "½", "1"))
    return svg(figure)


def training_figures(trajectory: Record) -> list[Markup]:
    """The distances of the parameters and the losses, by step."""
    distances, losses = trajectory["distances"], trajectory["losses"]
    return [
        line_figure(
            "Relative distance of the parameters",
            {
                "Flax and PyTorch in float32": (distances["float32"], INK, "-"),
                "Flax and PyTorch in float64": (distances["float64"], INK, ":"),
                "Flax in float32 and float64": (distances["Flax"], FLAX, "-"),
                "PyTorch in float32 and float64": (distances["PyTorch"], TORCH, "-"),
            },
        ),
        line_figure(
            "Loss",
            {
                "Flax in float32": (losses["float32"]["Flax"], FLAX, "-"),
                "PyTorch in float32": (losses["float32"]["PyTorch"], TORCH, "-"),
                "Flax in float64": (losses["float64"]["Flax"], FLAX, ":"),
                "PyTorch in float64": (losses["float64"]["PyTorch"], TORCH, ":"),
            },
        ),
    ]


def line_figure(title: str, lines: Mapping[str, tuple[Sequence[float], str, str]]) -> Markup:
    """By label, the values of each step, with a color and a line style."""
    figure, axes = new_figure(4.6, 3.2, title)
    for label, (values, color, style) in lines.items():
        axes.plot(range(1, len(values) + 1), values, style, color=color, label=label)
    axes.set(yscale="log", xlabel="step")
    axes.legend()
    return svg(figure)


def new_figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A transparent figure of so many inches with one pair of axes."""
    figure = Figure((width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_title(title, loc="left")
    return figure, axes


def svg(figure: Figure) -> Markup:
    """The figure as an element of the page, in the colors of its style sheet."""
    title, file = figure.axes[0].get_title(loc="left"), StringIO()
    with rc_context({"svg.hashsalt": title}):  # so that no two figures share an id
        figure.savefig(file, format="svg")
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", text)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))
