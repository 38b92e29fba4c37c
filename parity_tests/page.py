"""The verification report as one HTML page, which loads nothing and needs no network."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from io import StringIO
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
    templates.filters |= {"number": number, "duration": duration}
    with rc_context(STYLE):
        return templates.get_template("page.html").render(
            report,
            verdict=verdict(report),
            diff=diff,
            less_accurate=less_accurate,
            times_less_accurate=Counter(less_accurate(case)[0] for case in report["cases"]),
            error_figures=[
                error_figure(*errors) for errors in float32_errors(report["cases"]).items()
            ],
            training_figures=training_figures(report["trajectory"]),
        )


def number(x: float | None) -> str:
    """Three significant digits; a dash for an unknown number."""
    return "\N{EN DASH}" if x is None else f"{x:,.0f}" if 999.5 <= x < 1e5 else f"{x:.3g}"


def duration(seconds: float) -> str:
    """In seconds, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if seconds >= 99.5 else f"{seconds:.2g} s"


def verdict(report: Record) -> str:
    """The result in a sentence."""
    if report["passed"]:
        return "Flax and PyTorch agree."
    if all(case["passed"] for case in report["cases"]):
        return "Flax and PyTorch agree in every case, but not all is well."
    return "Flax and PyTorch do not agree."


def own_errors(case: Record) -> dict[str, dict[str, float]]:
    """By quantity and side, errors in ulps against the oracle, if both are known and finite."""
    by_quantity = {
        q["quantity"]: {"Flax": q["flax_ulps"], "PyTorch": q["torch_ulps"]}
        for q in case["quantities"]
    }
    known = {n: s for n, s in by_quantity.items() if None not in s.values()}
    return {name: sides for name, sides in known.items() if all(map(math.isfinite, sides.values()))}


def less_accurate(case: Record) -> tuple[str, float]:
    """The side with the larger worst error, and the ratio of both; no side if they are close."""
    errors = own_errors(case).values()
    flax, torch = (max((e[side] for e in errors), default=0.0) for side in ("Flax", "PyTorch"))
    small, large = sorted((flax, torch))
    if large <= 1.05 * small:
        return "", 1.0
    return "Flax" if flax > torch else "PyTorch", large / small if small else math.inf


def float32_errors(cases: Sequence[Record]) -> dict[str, list[dict[str, float]]]:
    """By quantity, the errors of both sides in each float32 case."""
    errors: dict[str, list[dict[str, float]]] = {}
    for case in cases:
        for quantity, sides in own_errors(case).items() if case["dtype"] == "float32" else ():
            errors.setdefault(quantity, []).append(sides)
    return errors


def diff(old: str, new: str) -> tuple[Markup, Markup]:
    """Both texts, with the words that differ emphasized."""
    before, after = (re.findall(r"\w+|\s+|.", dedent(text).strip("\n")) for text in (old, new))
    removed = added = Markup()
    for how, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        words = Markup("{}" if how == "equal" else "<b>{}</b>")
        removed += words.format("".join(before[i:j]))
        added += words.format("".join(after[k:m]))
    return removed, added


def error_figure(quantity: str, errors: Sequence[Mapping[str, float]]) -> Markup:
    """The distribution of both sides' errors in one quantity."""
    figure, axes = new_figure(2.4, 1.9, quantity)
    medians = []
    for side, color in (("Flax", FLAX), ("PyTorch", TORCH)):
        values = [error[side] for error in errors]
        medians.append(f"{side} {number(median(values))}")
        # A logarithmic axis has no place for 0; the smallest error above it is larger than this.
        axes.ecdf([max(x, 1e-3) for x in values], color=color)
    axes.set(xscale="log", yticks=(0, 0.5, 1), yticklabels=("0", "½", "1"))
    axes.set_xlabel(f"medians: {', '.join(medians)}")
    return svg(figure)


def training_figures(trajectory: Record | None) -> list[Markup]:
    """The distances of the parameters, and the losses, by step; no figures without a training."""
    if trajectory is None:
        return []
    distances, losses = trajectory["distances"], trajectory["losses"]
    lines = {
        "Relative distance of the parameters": [
            ("Flax and PyTorch in float32", distances["float32"], {"color": INK}),
            ("Flax and PyTorch in float64", distances["float64"], {"color": INK, "ls": "--"}),
            ("Flax in float32 and float64", distances["Flax"], {"color": FLAX}),
            ("PyTorch in float32 and float64", distances["PyTorch"], {"color": TORCH}),
        ],
        "Loss": [
            (f"{side}, {dtype}", losses[dtype][side], {"color": color, **style})
            for dtype, style in (("float64", {"lw": 5, "alpha": 0.3}), ("float32", {}))
            for side, color in (("Flax", FLAX), ("PyTorch", TORCH))
        ],
    }
    figures = []
    for title, of_figure in lines.items():
        figure, axes = new_figure(4.6, 3.2, title)
        for label, values, style in of_figure:
            axes.plot(range(1, len(values) + 1), values, label=label, **style)
        axes.set(yscale="log", xlabel="step")
        axes.legend()
        figures.append(svg(figure))
    return figures


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
