"""The page of the report, and the training that it shows."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from parity_tests import page as pages
from parity_tests.page import QUANTITIES, page

TIMES = "\N{MULTIPLICATION SIGN}"
HOSTILE = "</pre></td>'\"&amp;<script>alert(1)</script><img src=http://x onerror=y>$title"


def quantity(name, **changes):
    return {
        "quantity": name,
        "absolute": 1e-7,
        "relative": 2e-6,
        "ulps": 1.7,
        "place": "training step 2, params/batch_norm/scale at (3,)",
        "allowed_ulps": 164.0,
        "used": 0.012,
        "flax_ulps": 1.1,
        "torch_ulps": 1.5,
    } | changes


def case(options, dtype="float32", **changes):
    return {
        "name": f"BatchChannelNorm linen {options} {dtype}",
        "layer": "BatchChannelNorm",
        "api": "linen",
        "dtype": dtype,
        "passed": True,
        "message": "",
        "seconds": 0.8,
        "quantities": [quantity(name) for name in QUANTITIES],
    } | changes


def law(name, **changes):
    return {"name": name, "passed": True, "message": "", "seconds": 0.5} | changes


def mutant(name, **changes):
    return {
        "name": name,
        "side": "Flax",
        "file": "bcn_flax/norms.py",
        "defect": f"What {name} gets wrong.",
        "old": "    return momentum * old + (1 - momentum) * new",
        "new": "    return (1 - momentum) * old + momentum * new",
        "caught_by": f"the check of {name}",
        "message": "statistic: 3.2e+15 ulps apart",
        "seconds": 1.2,
    } | changes


def report(**changes):
    losses = {"Flax": [2.5, 1.5, 0.5], "PyTorch": [2.5, 1.5, 0.6]}
    return {
        "passed": True,
        "versions": {"python": "3.11.9", "torch": "2.13.0", "batch-channel-norm": "0.1.0"},
        "device": "some processor",
        "seconds": 123.4,
        "command": "python -m parity_tests",
        "cases": [case("groups=2"), case("groups=4", "float64"), case("groups=8", "bfloat16")],
        "laws": [law("chains are associative"), law("a mask of ones is no mask")],
        "trajectory": {
            "setting": {
                "blocks": [[8, 8], [16]],
                "groups": 4,
                "batch_size": 32,
                "optimizer": "Adam",
                "learning_rate": 0.002,
            },
            "losses": {"float32": losses, "float64": losses},
            "distances": {
                "float32": [1e-6, 1e-4, 1e-2],
                "float64": [1e-15, 1e-15, 2e-15],
                "Flax": [1e-6, 1e-5, 1e-3],
                "PyTorch": [1e-6, 1e-4, 1e-2],
            },
        },
        "mutants": [mutant("momentum-swapped"), mutant("mean-forgotten", side="PyTorch")],
    } | changes


def failing_report():
    cases = report()["cases"]
    cases[1] |= {"passed": False, "message": "gradient: 8e5 ulps apart\n  Flax     1.0"}
    cases[1]["quantities"][2] |= {"ulps": 8e5, "used": 4878.0}
    cases[2] |= {"passed": False, "message": "ValueError: no such thing", "quantities": []}
    laws = [law("chains are associative"), law("pooling", passed=False, message="0.9 != 1")]
    mutants = [mutant("momentum-swapped"), mutant("mean-forgotten", caught_by=None, message="")]
    return report(passed=False, cases=cases, laws=laws, mutants=mutants)


class Document(HTMLParser):
    """Elements as (name, attributes, text), in the order in which they begin."""

    VOID = ("meta",)

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        element = [name, dict(attributes), ""]
        assert len(element[1]) == len(attributes), f"<{name}> has an attribute twice"
        self.elements.append(element)
        if name not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name

    def handle_data(self, text):
        for element in self.open:
            element[2] += text

    def texts(self, name, class_=None):
        """Of all elements of this name, or of those of this class."""
        return [
            text
            for tag, attributes, text in self.elements
            if tag == name and class_ in (None, attributes.get("class"))
        ]

    def attributes(self, name):
        return [attributes[name] for _, attributes, _ in self.elements if name in attributes]


@pytest.mark.parametrize("made", [report, failing_report])
def test_the_page_is_well_formed(made):
    document = Document(page(made()))
    ids, links = document.attributes("id"), document.attributes("href")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert set(document.attributes("aria-labelledby")) <= set(ids)


@pytest.mark.parametrize("made", [report, failing_report])
def test_everything_in_the_report_is_on_the_page(made):
    document = Document(page(made()))
    text = document.texts("html")[0] + "\n".join(document.attributes("aria-label"))
    shown = ("name", "message", "defect", "caught_by", "file", "device", "place", "command")

    def check(part):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if isinstance(value, dict | list):
                check(value)
            elif key in shown and value:
                assert value in text

    check(made())
    for wanted in ("3.11.9", "2.13.0", "batch-channel-norm 0.1.0", "2 min 3 s"):
        assert wanted in text
    assert document.texts("del")[-1] == "return momentum * old + (1 - momentum) * new"
    assert document.texts("ins")[-1] == "return (1 - momentum) * old + momentum * new"


def hostile(part, key=None):
    """The same with markup in every text."""
    if isinstance(part, dict):
        return {k: v if k == "trajectory" else hostile(v, k) for k, v in part.items()}
    if isinstance(part, list):
        return [hostile(item, key) for item in part]
    is_text = isinstance(part, str) and part and key not in ("quantity", "dtype")
    return part + HOSTILE if is_text else part


@pytest.mark.parametrize("made", [report, failing_report])
def test_no_text_becomes_markup(made):
    attacked = hostile(made())
    attacked["cases"][0]["dtype"] += HOSTILE
    plain = made()
    plain["cases"][0]["dtype"] += " "
    tame, wild = Document(page(plain)), Document(page(attacked))
    assert [(name, [*a]) for name, a, _ in wild.elements] == [
        (name, [*a]) for name, a, _ in tame.elements
    ]
    assert HOSTILE in wild.texts("html")[0]


def test_nothing_is_loaded_from_elsewhere():
    html = page(failing_report())
    assert not re.search(r"\w+://|@import|url\(|\bsrc=|<link|<img", html)
    assert "default-src 'none'" in html  # so says the page to the browser, too


def test_the_verdict_counts():
    document = Document(page(report()))
    assert document.texts("h1") == ["Flax and PyTorch agree."]
    assert document.texts("p", "lede") == [
        "3 of 3 cases passed, 2 of 2 laws kept, 2 of 2 planted defects caught."
    ]
    assert document.texts("h2")[0] == "How to read this"


def test_a_failing_report_says_so_first():
    document = Document(page(failing_report()))
    assert document.texts("h1") == ["Flax and PyTorch do not agree."]
    assert document.texts("p", "lede") == [
        "2 of 3 cases failed, 1 of 2 laws broken, 1 of 2 planted defects missed."
    ]
    assert document.texts("h2")[0] == "What failed"
    assert document.texts("pre") == [
        "gradient: 8e5 ulps apart\n  Flax     1.0",
        "ValueError: no such thing",
        "0.9 != 1",
    ]
    rows = document.texts("tr", "case")
    assert ["failed" in row for row in rows] == [True, True, False]
    assert [row.startswith("gradient") for row in document.texts("tr", "over")] == [True, True]
    assert document.texts("ul", "laws")[0].startswith("✗ failedpooling")
    defects = [row for row in document.texts("tr") if "What" in row]
    assert [row.startswith("mean-forgotten") for row in defects] == [True, False]
    assert ["missed" in row for row in defects] == [True, False]


def test_what_failed_may_be_no_case():
    laws = [law("pooling", passed=False, message="0.9 != 1")]
    document = Document(page(report(passed=False, laws=laws)))
    assert document.texts("h1") == ["Flax and PyTorch agree in every case, but not all is well."]


def test_parts_that_were_not_run():
    document = Document(page(report(trajectory=None, mutants=None, cases=[], laws=[])))
    assert document.texts("p").count("Not part of this run.") == 4
    assert document.texts("p", "lede") == ["Nothing was compared."]


def test_the_page_survives_what_is_no_number():
    broken = report()
    quantities = broken["cases"][0]["quantities"]
    quantities.insert(0, quantity("output", used=0.9))  # which must not hide the NaN
    quantities[1] |= {"ulps": math.nan, "used": math.nan, "absolute": math.inf}
    quantities[2] |= {"flax_ulps": None, "torch_ulps": math.inf, "used": None}
    broken["trajectory"]["distances"]["Flax"] = [0.0, math.nan, math.inf]
    broken["trajectory"]["losses"]["float32"]["Flax"][1] = math.nan
    document = Document(page(broken))
    assert document.texts("td", "used over") == ["NaN"]
    assert not any("nan" in d.lower() or "inf" in d for d in document.attributes("d"))


def test_the_page_stays_light():
    cases = [case(f"groups={n}") for n in range(300)]
    assert len(page(report(cases=cases)).encode()) < 550_000


def test_the_report_is_left_as_it_was():
    before = failing_report()
    after = copy.deepcopy(before)
    page(after)
    assert after == before


@pytest.mark.parametrize(
    ("written", "values"),
    [
        (pages.ulps, {0: "0", 0.001: "<0.01", 0.04: "0.04", 1.74: "1.7", 9.96: "10", 164.0: "164"}),
        (pages.ulps, {12345.6: "12,346", 810_000.0: f"8.1{TIMES}10⁵", math.inf: "∞"}),
        (pages.scientific, {0: "0", 1e-7: f"1.0{TIMES}10⁻⁷", 0.026: f"2.6{TIMES}10⁻²"}),
        (pages.duration, {0.84: "0.8 s", 12.3: "12 s", 99.7: "1 min 40 s", 3599.9: "60 min 0 s"}),
    ],
)
def test_numbers_are_written_alike(written, values):
    assert {value: written(value) for value in values} == values


def test_who_is_farther():
    errors = [quantity("output", flax_ulps=3.0, torch_ulps=1.0)]
    errors.append(quantity("gradient", flax_ulps=1.0, torch_ulps=6.0))
    assert pages.farther(case("", quantities=errors)) == ("PyTorch", 2.0)
    exact = [quantity("output", flax_ulps=1.0, torch_ulps=0.0)]
    assert pages.farther(case("", quantities=exact)) == ("Flax", math.inf)
    draw = [quantity("output", flax_ulps=1.0, torch_ulps=1.01)]
    assert pages.farther(case("", quantities=draw)) is None
    assert pages.farther(case("", quantities=[quantity("output", flax_ulps=None)])) is None


def test_histograms_count_every_error():
    errors = [0.0, 0.0, 0.011, 0.9, 0.95, 1.0, 150.0]
    counts = pages.binned(errors)
    assert counts == {None: 2, -10: 1, -1: 2, 0: 1, 10: 1}


def test_labels_keep_apart():
    assert pages.apart([40.0, 20.0], 14, 0, 70) == [40, 20]
    moved = pages.apart([50.0, 10.0, 52.0, 51.0], 14, 0, 70)
    assert np.diff(sorted(moved)).min() >= 14
    assert min(moved) >= 0
    assert max(moved) <= 70
    assert np.argsort(moved).tolist() == [1, 0, 3, 2]


def test_lines_break_where_nothing_can_be_drawn():
    x, y = pages.Linear(5, 0, 50), pages.Logarithmic(-2, 0, 100, 0)
    values = [0.0, 1.0, 0.1, math.nan, 0.01]
    assert [*pages.unbroken(values, x, y)] == [[(20, 0), (30, 50)], [(50, 100)]]
    assert [label for _, label in y.ticks(6)] == ["0.01", "0.1", "1"]
    assert [label for _, label in x.ticks(6)] == ["0", "1", "2", "3", "4", "5"]
    assert next(label for _, label in pages.Logarithmic(-15, -1, 0, 1).ticks(6)) == "10⁻¹⁵"


@pytest.mark.slow
@pytest.mark.torch
def test_training_stays_together():
    from parity_tests.trajectory import trajectory

    steps = 8
    found = trajectory(steps)
    assert json.loads(json.dumps(found)) == found  # plain lists and numbers
    losses, distances = found["losses"], found["distances"]
    np.testing.assert_allclose(losses["float64"]["Flax"], losses["float64"]["PyTorch"], rtol=1e-11)
    for of_side in losses["float32"].values():
        np.testing.assert_allclose(of_side, losses["float64"]["Flax"], rtol=1e-3)
        assert of_side[-1] < 0.8 * of_side[0]
    assert {name: len(values) for name, values in distances.items()} == dict.fromkeys(
        ("float32", "float64", "Flax", "PyTorch"), steps
    )
    assert max(distances["float64"]) < 1e-12
    for name in ("float32", "Flax", "PyTorch"):
        assert 1e-8 < distances[name][0] < 1e-5
    assert f"After {steps} steps" in page(report(trajectory=found))
