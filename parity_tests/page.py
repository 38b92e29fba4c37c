"""The parity report as a page: one file, readable without a network, in any browser and on paper.

`page.html` has what is the same in every report. The rest is put together here of `tag`s, which
escape every string that is not markup already.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median
from string import Template
from textwrap import dedent
from typing import NamedTuple

TEMPLATE = Path(__file__).with_name("page.html")

QUANTITIES = ("output", "input gradient", "gradient", "statistic", "parameter")
SIDES = ("Flax", "PyTorch")
COLOR = {"Flax": "flax", "PyTorch": "torch"}  # classes in page.html
OWN_ERROR = {"Flax": "flax_ulps", "PyTorch": "torch_ulps"}  # keys of a quantity


# Markup


class Html(str):
    """Markup; any other string is text."""


def join(*contents: str) -> Html:
    """All of these as markup, the text among them escaped."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in contents))


def tag(name: str, /, *contents: str, **attributes: object) -> Html:
    """An element. `class_` stands for `class`; an attribute that is `None` is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{join(*contents)}</{name}>")


def section(name: str, heading: str, *contents: str) -> Html:
    return tag("section", tag("h2", heading, id=name), *contents, aria_labelledby=name)


def row(header: str, *cells: str, **attributes: object) -> Html:
    return tag("tr", tag("th", header), *(tag("td", cell) for cell in cells), **attributes)


def table(columns: Iterable[str], rows: Iterable[Html], **attributes: object) -> Html:
    head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
    return tag("table", head, tag("tbody", *rows), **attributes)


def mark(good: bool) -> Html:
    return tag("b", "✓ passed" if good else "✗ failed", class_="passed" if good else "failed")


def not_run() -> Html:
    return tag("p", "Not part of this run.")


# Numbers


def special(x: float | None) -> str | None:
    """A number without digits."""
    if x is None:
        return "\N{EN DASH}"
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "∞"
    return None if x else "0"


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def scientific(x: float | None) -> str:
    """Two digits and a power of ten."""
    if (word := special(x)) is not None:
        return word
    digits, exponent = f"{x:.1e}".split("e")
    return f"{digits}\N{MULTIPLICATION SIGN}{power_of_ten(int(exponent))}"


def ulps(x: float | None) -> str:
    """Two digits where there is a fraction."""
    if (word := special(x)) is not None:
        return word
    if x < 0.005:
        return "<0.01"
    if x >= 99_999.5:
        return scientific(x)
    return f"{x:,.{2 if x < 0.095 else 1 if x < 9.95 else 0}f}"


def duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s"


# Plots


class Linear(NamedTuple):
    """A scale from 0, from values to pixels."""

    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + value / self.high * (self.end - self.start)

    def ticks(self, most: int) -> Iterator[tuple[float, str]]:
        """Round values: where they are, and their labels."""
        power = 10 ** math.floor(math.log10(self.high / most))
        step = next(k * power for k in (1, 2, 5, 10) if self.high <= k * power * most)
        for n in range(int(self.high / step) + 1):
            yield self(n * step), f"{n * step:g}"


class Logarithmic(NamedTuple):
    """A scale between two powers of ten."""

    low: int
    high: int
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int) -> Iterator[tuple[float, str]]:
        """Powers of ten: where they are, and their labels."""
        plain = self.low >= -3 and self.high <= 3
        for n in range(self.low, self.high + 1, math.ceil((self.high - self.low) / most)):
            yield self(10.0**n), f"{10.0**n:g}" if plain else power_of_ten(n)


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten between which the values lie, of those that have a logarithm."""
    logs = [math.log10(x) for x in values if drawable(x)] or [0.0]
    low = math.floor(min(logs))
    return low, max(math.ceil(max(logs)), low + 1)


def drawable(x: float | None) -> bool:
    return x is not None and 0 < x < math.inf


def path(points: Iterable[tuple[float, float]], **attributes: object) -> Html:
    d = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("path", d=d, **attributes)


def text(x: float, y: float, content: str, **attributes: object) -> Html:
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def drawing(width: int, height: int, description: str, *contents: str) -> Html:
    box = f"0 0 {width} {height}"
    return tag("svg", *contents, viewBox=box, role="img", aria_label=description)


class Line(NamedTuple):
    """A value for each step."""

    label: str
    values: Sequence[float]
    color: str
    style: str = ""


def line_plot(heading: str, description: str, lines: Sequence[Line]) -> Html:
    """Lines over the steps on a logarithmic scale, each with its label at its end."""
    left, right, top, bottom = 40, 322, 8, 252
    x = Linear(max(len(line.values) for line in lines), left, right)
    y = Logarithmic(*decades(v for line in lines for v in line.values), bottom, top)
    ends = [y(next(filter(drawable, reversed(line.values)), 10.0**y.low)) for line in lines]
    drawn = []
    for line, end, beside in zip(lines, ends, apart(ends, 14, top + 4, bottom), strict=True):
        runs = [path(run, class_=f"line {line.style}") for run in unbroken(line.values, x, y)]
        leader = path([(right + 2, end), (right + 12, beside)], class_="leader")
        label = text(right + 15, beside + 4, line.label, class_="label")
        drawn.append(tag("g", *runs, leader, label, class_=line.color))
    picture = drawing(440, 290, description, *axes(x, y), *drawn)
    return tag("div", tag("h3", heading), picture)


def axes(x: Linear, y: Logarithmic) -> Iterator[Html]:
    for at, label in y.ticks(6):
        yield path([(x.start, at), (x.end, at)], class_="grid")
        yield text(x.start - 6, at + 4, label, text_anchor="end")
    for at, label in x.ticks(6):
        yield path([(at, y.start), (at, y.start + 4)], class_="axis")
        yield text(at, y.start + 17, label, text_anchor="middle")
    yield text((x.start + x.end) / 2, y.start + 34, "step", text_anchor="middle")


def unbroken(
    values: Sequence[float], x: Linear, y: Logarithmic
) -> Iterator[list[tuple[float, float]]]:
    """The points of a line, from one value that cannot be drawn to the next."""
    for visible, run in groupby(enumerate(values, 1), key=lambda point: drawable(point[1])):
        if visible:
            yield [(x(step), y(value)) for step, value in run]


def apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The positions, moved as little as it takes to keep a gap between them."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = [positions[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    shift = sum(moved) / len(moved) - sum(positions) / len(positions)
    moved = [position - shift for position in moved]
    back = min(0, high - moved[-1]) + max(0, low - moved[0])
    return [moved[order.index(i)] + back for i in range(len(positions))]


BINS = 5  # to a decade


def histogram(
    quantity: str, errors: dict[str, list[float]], limits: tuple[int, int], most: int
) -> Html:
    """Flax's errors upwards and PyTorch's downwards; errors of 0 stand apart at the left.

    Args:
        quantity: whose errors these are.
        errors: of each side, in ulps.
        limits: of the scale, as powers of ten.
        most: errors in the tallest bar of all plots that are to be compared.
    """
    left, right, bottom = 26, 192, 172
    x = Logarithmic(*limits, left, right)
    drawn = [
        bars(side, errors[side], x, middle=80, tallest=direction * 60, most=most)
        for side, direction in (("Flax", -1), ("PyTorch", 1))
    ]
    drawn.append(path([(left, 80), (right, 80)], class_="axis"))
    drawn += [text(at, bottom, label, text_anchor="middle") for at, label in x.ticks(4)]
    if any(0 in values for values in errors.values()):
        drawn.append(text(4, bottom, "0", text_anchor="middle"))
    medians = " and ".join(f"{ulps(median(errors[side]))} of {side}" for side in SIDES)
    description = f"Histogram of the errors of the {quantity} in ulps; medians: {medians}"
    return tag("div", tag("h3", quantity), drawing(200, bottom + 2, description, *drawn))


def bars(
    side: str, values: list[float], x: Logarithmic, middle: int, tallest: int, most: int
) -> Html:
    """The half of a histogram: `most` values fill a bar from `middle` to `middle + tallest`."""
    outline = ""
    for bin_, count in binned(values).items():
        start, end = (0, 8)
        if bin_ is not None:
            start, end = (x(10 ** (edge / BINS)) for edge in (bin_, bin_ + 1))
        outline += f"M{start:.1f},{middle}v{tallest * count / most:.1f}H{end - 0.6:.1f}V{middle}z"
    center = median(values)
    at = x(center) if center else 4
    beyond = 13 if tallest > 0 else -5
    return tag(
        "g",
        tag("path", d=outline, class_="area"),
        path([(at, middle), (at, middle + tallest)], class_="median"),
        text(x.start, middle + tallest + beyond, f"{side}, median {ulps(center)}", class_="label"),
        class_=COLOR[side],
    )


def binned(values: Iterable[float]) -> Counter[int | None]:
    """How many values there are in each bin; zeros are counted under `None`."""
    return Counter(math.floor(BINS * math.log10(x)) if x else None for x in values)


# The head of the page


def header(report: dict) -> Html:
    name = "batch-channel-norm"
    kicker = join(f"Parity report, {name} {report['versions'][name]} ", mark(report["passed"]))
    facts = [item for item in report["versions"].items() if item[0] != name]
    facts += [("device", report["device"]), ("took", duration(report["seconds"]))]
    links = [("reading", "How to read this"), ("errors", "Errors"), ("cases", "Cases")]
    links += [("laws", "Laws"), ("training", "Training"), ("mutants", "Planted defects")]
    if not report["passed"]:
        links.insert(0, ("failures", "What failed"))
    return tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", verdict(report)),
        tag("p", counts(report), class_="lede"),
        tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts), class_="facts"),
        tag("nav", tag("ul", *(tag("li", tag("a", word, href=f"#{to}")) for to, word in links))),
    )


def verdict(report: dict) -> str:
    if report["passed"]:
        return "Flax and PyTorch agree."
    if all(case["passed"] for case in report["cases"]):
        return "Flax and PyTorch agree in every case, but not all is well."
    return "Flax and PyTorch do not agree."


def counts(report: dict) -> Html:
    """How many cases passed, and so on, in a sentence."""
    kinds = [
        (report["cases"], "passed", "cases", "passed", "failed"),
        (report["laws"], "passed", "laws", "kept", "broken"),
        (report["mutants"] or [], "caught_by", "planted defects", "caught", "missed"),
    ]
    clauses = []
    for items, key, noun, good, bad in kinds:
        wrong = sum(not item[key] for item in items)
        if wrong:
            clauses.append(tag("b", f"{wrong} of {len(items)} {noun} {bad}", class_="failed"))
        elif items:
            clauses.append(Html(f"{len(items)} of {len(items)} {noun} {good}"))
    return Html(f"{', '.join(clauses) or 'Nothing was compared'}.")


def failures(report: dict) -> Html:
    """What failed, with all that is known of it; nothing if nothing did."""
    articles = [
        *(failed_case(i, case) for i, case in enumerate(report["cases"]) if not case["passed"]),
        *(failed_law(law) for law in report["laws"] if not law["passed"]),
        *(missed(mutant) for mutant in report["mutants"] or [] if not mutant["caught_by"]),
    ]
    return section("failures", "What failed", *articles) if articles else Html()


def failure(heading: str, *contents: str, **attributes: object) -> Html:
    return tag("article", tag("h3", f"✗ {heading}"), *contents, class_="failure", **attributes)


def failed_case(number: int, case: dict) -> Html:
    message = tag("pre", case["message"])
    return failure(case["name"], message, details(case), id=f"failed-{number}")


def failed_law(law: dict) -> Html:
    return failure(f"Law: {law['name']}", tag("pre", law["message"]))


def missed(mutant: dict) -> Html:
    no_check = tag("p", "No check noticed this defect, planted in ", tag("code", mutant["file"]))
    defect = tag("p", mutant["defect"])
    change = diff(mutant["old"], mutant["new"])
    return failure(f"Missed: {mutant['name']}", no_check, defect, change)


# Errors against the oracle


def own_errors(quantity: dict) -> dict[str, float] | None:
    """Each side's own error, where both are known and finite."""
    errors = {side: quantity[key] for side, key in OWN_ERROR.items()}
    return None if any(x is None or not math.isfinite(x) for x in errors.values()) else errors


def farther(case: dict) -> tuple[str, float] | None:
    """The side whose worst error is the larger, and how many times; `None` if neither's is."""
    errors = [own for q in case["quantities"] if (own := own_errors(q))]
    worst = {side: max((own[side] for own in errors), default=0) for side in SIDES}
    near, far = sorted(SIDES, key=worst.__getitem__)
    if worst[far] < 1.05 * worst[near] or not worst[far]:
        return None
    return far, worst[far] / worst[near] if worst[near] else math.inf


def float32_errors(cases: Sequence[dict]) -> dict[str, dict[str, list[float]]]:
    """Each side's own errors, of each quantity that the oracle measured in float32."""
    errors = {name: {side: [] for side in SIDES} for name in QUANTITIES}
    for case in cases:
        for quantity in case["quantities"] if case["dtype"] == "float32" else ():
            for side, error in (own_errors(quantity) or {}).items():
                errors[quantity["quantity"]][side].append(error)
    return {name: of_sides for name, of_sides in errors.items() if of_sides["Flax"]}


def errors_section(cases: Sequence[dict]) -> Html:
    """Histograms of both sides' errors, their medians and the largest."""
    heading = "How far each side is from the truth"
    errors = float32_errors(cases)
    if not errors:
        return section("errors", heading, tag("p", "The oracle measured no float32 case."))
    lists = [values for of_sides in errors.values() for values in of_sides.values()]
    limits = decades(x for values in lists for x in values)
    most = max(max(binned(values).values()) for values in lists)
    panels = [histogram(name, of_sides, limits, most) for name, of_sides in errors.items()]
    caption = (
        "Errors against the oracle in the float32 cases, in ulps. Upwards: how many of Flax's are "
        "of this size; downwards: of PyTorch's."
    )
    columns = ("", "Flax, median", "PyTorch, median", "Flax, largest", "PyTorch, largest")
    rows = [
        row(name, *(ulps(of(of_sides[side])) for of in (median, max) for side in SIDES))
        for name, of_sides in errors.items()
    ]
    return section(
        "errors",
        heading,
        tag("p", *comparison(cases, errors)),
        tag("figure", tag("figcaption", caption), tag("div", *panels, class_="panels five")),
        tag("div", table(columns, rows, class_="medians"), class_="scroll"),
    )


def comparison(cases: Sequence[dict], errors: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """The medians and who is farther off, in words."""
    flax, torch = (
        ulps(median(x for of_sides in errors.values() for x in of_sides[side])) for side in SIDES
    )
    yield f"In float32, half of Flax's errors are below {flax} ulps, half of PyTorch's below "
    yield f"{torch}. "
    times = Counter(answer[0] for case in cases if (answer := farther(case)))
    yield f"Over all dtypes Flax is the farther one from the oracle in {times['Flax']} cases, "
    yield f"PyTorch in {times['PyTorch']}, by their worst error in any quantity."


# The cases


def cases_section(cases: Sequence[dict]) -> Html:
    """Those that failed come first."""
    if not cases:
        return section("cases", "Cases", not_run())
    numbered = sorted(enumerate(cases), key=lambda pair: pair[1]["passed"])
    head = [tag("th", word, scope="col") for word in ("layer", "API", "options", "dtype")]
    head += [tag("th", name, scope="col", class_="used") for name in QUANTITIES]
    head.append(tag("th", "farther off", scope="col"))
    caption = (
        "Errors against the oracle in ulps, of Flax or PyTorch, whichever is larger, each the "
        "worst of its quantity over all steps; the bar below is its share of what is allowed. "
        "Farther off is the side with the larger error. Each row opens to show the details."
    )
    return section(
        "cases",
        "Cases",
        filters(cases),
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *head)),
            *(case_rows(number, case) for number, case in numbered),
            class_="cases",
        ),
    )


def filters(cases: Sequence[dict]) -> Html:
    """Choices that the script of the page puts into effect, by the columns they are about."""
    choices = []
    for column, key, word in ((0, "layer", "layer"), (1, "api", "API"), (3, "dtype", "dtype")):
        options = [tag("option", value) for value in sorted({case[key] for case in cases})]
        every = tag("option", "all", value="")
        choices.append(tag("label", word, tag("select", every, *options, data_column=column)))
    return tag("form", *choices, tag("output", aria_live="polite"), hidden="")


def case_rows(number: int, case: dict) -> Html:
    """A row with the errors and one with the details, which is closed at first."""
    shown = {key: case[key] for key in ("layer", "api", "dtype")}
    options = " ".join(word for word in case["name"].split() if word not in shown.values())
    if not case["passed"]:
        options = join(tag("a", mark(False), href=f"#failed-{number}"), " ", options)
    cells = [
        tag("th", case["layer"], scope="row"),
        tag("td", case["api"]),
        tag("td", options, class_="options"),
        tag("td", case["dtype"]),
        *(error_cell(worst(case, name)) for name in QUANTITIES),
        tag("td", who_is_farther(case), class_="farther"),
    ]
    summary = tag("summary", aria_label=f"Details of {case['name']}")
    closed = tag("details", summary, details(case))
    return tag(
        "tbody",
        tag("tr", *cells, class_="case"),
        tag("tr", tag("td", closed, colspan=len(cells)), class_="more"),
        class_=None if case["passed"] else "bad",
    )


def worst(case: dict, name: str) -> dict | None:
    """The error of this quantity that used the most of its allowance."""
    quantities = [q for q in case["quantities"] if q["quantity"] == name]
    return max(quantities, key=lambda q: share(q["used"]), default=None)


def share(used: float | None) -> float:
    """How much was used of what is allowed, as far as it is known; NaN is more than any."""
    if used is None:
        return 0.0
    return math.inf if math.isnan(used) else used


def error_cell(quantity: dict | None) -> Html:
    if quantity is None:
        return tag("td", ulps(None), class_="used")
    used = share(quantity["used"])
    return tag(
        "td",
        ulps(quantity["ulps"]),
        class_="used" if used <= 1 else "used over",
        style=f"--used:{min(used, 1):.2f}",
    )


def who_is_farther(case: dict) -> str:
    if (answer := farther(case)) is None:
        return "\N{EN DASH}"
    side, factor = answer
    times = ulps(factor) if factor < 999 else ">999"
    return join(tag("b", side, class_=COLOR[side]), f" {times}\N{MULTIPLICATION SIGN}")


def details(case: dict) -> Html:
    """All numbers of a case."""
    columns = ("", "ulps", "allowed", "Flax", "PyTorch")
    columns += ("absolute", "relative", "worst at")
    rows = [
        row(
            q["quantity"],
            *(ulps(q[key]) for key in ("ulps", "allowed_ulps", *OWN_ERROR.values())),
            *(scientific(q[key]) for key in ("absolute", "relative")),
            q["place"],
            class_="over" if share(q["used"]) > 1 else None,
        )
        for q in case["quantities"]
    ]
    took = tag("p", f"took {duration(case['seconds'])}")
    return tag("div", *([table(columns, rows)] if rows else []), took, class_="details")


# Laws, training, planted defects


def laws_section(laws: Sequence[dict]) -> Html:
    items = [
        tag(
            "li",
            tag("span", "✓", class_="passed") if law["passed"] else mark(False),
            tag("span", law["name"]),
            tag("small", duration(law["seconds"])),
        )
        for law in sorted(laws, key=lambda law: law["passed"])
    ]
    what = "What a layer must satisfy for any input, with no other side to compare it with."
    listed = tag("ul", *items, class_="laws") if items else not_run()
    return section("laws", "Laws", tag("p", what), listed)


WHY_FLOAT32_PARTS = (
    "Any two correct programs part in float32. Where the input of a ReLU is all but 0, or two "
    "pixels all but tie in a max pool, a rounding decides which way the gradient flows; the next "
    "step differs visibly, and tips further decisions. In float64 roundings are half a billion "
    "times as small and decide nothing: only different formulas could drive the two apart."
)

# Label, color and style of each line.
DISTANCES = {
    "float32": ("the two in float32", "ink", "wide"),
    "float64": ("the two in float64", "ink", "dashed"),
    "Flax": ("Flax to float64", "flax", ""),
    "PyTorch": ("PyTorch to float64", "torch", ""),
}


def training_section(trajectory: dict | None) -> Html:
    """A network trained on both sides."""
    heading = "Training side by side"
    if trajectory is None:
        return section("training", heading, not_run())
    losses, distances = trajectory["losses"], trajectory["distances"]
    plots = [distance_plot(distances), loss_plot(losses)]
    steps = len(distances["float32"])
    chosen = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if n < steps] + [steps]
    caption = (
        "Distances are Euclidean, over all parameters: of Flax's from PyTorch's in either dtype, "
        "and of each side's float32 from PyTorch's float64. Losses are those of each batch."
    )
    columns = ("step", *(DISTANCES[name][0] for name in distances))
    rows = [row(str(n), *(scientific(d[n - 1]) for d in distances.values())) for n in chosen]
    numbers = tag("div", table(columns, rows, class_="medians"), class_="scroll")
    return section(
        "training",
        heading,
        tag("p", *training_in_words(trajectory["setting"], distances, steps)),
        tag("p", WHY_FLOAT32_PARTS),
        tag("figure", tag("figcaption", caption), tag("div", *plots, class_="panels two")),
        tag("details", tag("summary", "The distances as a table"), numbers),
    )


def training_in_words(setting: dict, distances: dict, steps: int) -> Iterator[str]:
    blocks = " and ".join(" + ".join(map(str, block)) for block in setting["blocks"])
    yield f"A VGG with blocks of {blocks} channels, weight standardization and BCN learns digits "
    yield f"four times, on the same batches of {setting['batch_size']} and from the same weights, "
    yield f"by {setting['optimizer']} with a learning rate of {setting['learning_rate']:g}. After "
    yield f"{steps} steps, relative to their norm, the parameters of Flax and PyTorch are "
    yield tag("b", f"{scientific(distances['float64'][-1])} apart in float64")
    yield f" and {scientific(distances['float32'][-1])} in float32."


def distance_plot(distances: dict) -> Html:
    lines = [Line(DISTANCES[name][0], v, *DISTANCES[name][1:]) for name, v in distances.items()]
    ends = ", ".join(f"{line.label}: {scientific(line.values[-1])}" for line in lines)
    description = f"Distances of the parameters at each step; at the end, {ends}"
    return line_plot("Distance of the parameters, relative", description, lines)


def loss_plot(losses: dict) -> Html:
    """Those in float64 are wide, so that those in float32 can be seen upon them."""
    lines = [
        Line(f"{side}, {dtype}", losses[dtype][side], COLOR[side], style)
        for dtype, style in (("float64", "wide"), ("float32", ""))
        for side in SIDES
    ]
    ends = ", ".join(f"{line.label}: {line.values[-1]:.3g}" for line in lines)
    return line_plot("Loss", f"The loss at each step; at the end, {ends}", lines)


def mutants_section(mutants: Sequence[dict] | None) -> Html:
    """Those that were missed come first."""
    heading = "Planted defects"
    if mutants is None:
        return section("mutants", heading, not_run())
    why = (
        "A test that cannot fail proves nothing. So defects are planted in the sources, one at a "
        "time, and each time some check must fail."
    )
    head = [tag("th", word, scope="col") for word in ("defect", "change", "caught by")]
    rows = [mutant_row(m) for m in sorted(mutants, key=lambda m: m["caught_by"] is not None)]
    body = tag("tbody", *rows)
    listed = tag("table", tag("thead", tag("tr", *head)), body, class_="mutants")
    return section("mutants", heading, tag("p", why), listed)


def mutant_row(mutant: dict) -> Html:
    caught = mutant["caught_by"]
    by = tag("code", caught) if caught else tag("b", "✗ missed", class_="failed")
    said = tag("p", tag("code", mutant["message"])) if mutant["message"] else ""
    return tag(
        "tr",
        tag(
            "th",
            tag("p", tag("b", mutant["name"])),
            tag("p", mutant["defect"]),
            tag("small", f"{mutant['side']}, ", tag("code", mutant["file"])),
            scope="row",
        ),
        tag("td", diff(mutant["old"], mutant["new"])),
        tag("td", tag("p", by), said, tag("small", duration(mutant["seconds"]))),
        class_=None if caught else "bad",
    )


def diff(old: str, new: str) -> Html:
    """Both texts, with the words that differ emphasized."""
    before, after = (re.findall(r"\w+|\s+|.", dedent(text).strip("\n")) for text in (old, new))
    removed, added = [], []
    for how, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for side, words in ((removed, before[i:j]), (added, after[k:m])):
            if words:
                piece = "".join(words)
                side.append(piece if how == "equal" else tag("b", piece))
    sides = [tag(name, *side) for name, side in (("del", removed), ("ins", added)) if side]
    return tag("div", *sides, class_="diff")


# The page


def footer(report: dict) -> Html:
    command = tag("code", report["command"])
    return tag("footer", "Written by ", command, ", with the same numbers as in report.json.")


def page(report: dict) -> str:
    """The report as one HTML document that refers to nothing outside itself."""
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        title=escape(verdict(report)),
        header=header(report),
        failures=failures(report),
        errors=errors_section(report["cases"]),
        cases=cases_section(report["cases"]),
        laws=laws_section(report["laws"]),
        training=training_section(report["trajectory"]),
        mutants=mutants_section(report["mutants"]),
        footer=footer(report),
    )
