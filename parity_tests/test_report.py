"""The report's page holds everything in the report, and the training in it stays together."""

import json
import math
import re
from html import unescape

import numpy as np
import pytest

from parity_tests.page import number, page

QUANTITY = {
    "quantity": "output",
    "absolute": 1e-7,
    "relative": 2e-6,
    "ulps": 1.7,
    "place": "training step 2, params/batch_norm/scale at (3,)",
    "allowed_ulps": 164.0,
    "used": 0.012,
    "flax_ulps": 1.1,
    "torch_ulps": 1.5,
}
CASE = {
    "name": "BatchChannelNorm linen float32 groups=2",
    "layer": "BatchChannelNorm",
    "api": "linen",
    "dtype": "float32",
    "passed": True,
    "message": "",
    "seconds": 0.8,
    "quantities": [QUANTITY, QUANTITY | {"quantity": "gradient", "ulps": 123_456.0}],
}
LAW = {"name": "chains are associative", "passed": True, "message": "", "seconds": 0.5}
MUTANT = {
    "name": "momentum-swapped",
    "side": "Flax",
    "file": "bcn_flax/norms.py",
    "defect": "The momentum weighs the new value.",
    "old": "    return momentum * old",
    "new": "    return momentum * new",
    "caught_by": "the check of momentum",
    "message": "statistic: 3.2e+15 ulps apart",
    "seconds": 1.2,
}
LOSSES = {"Flax": [2.5, 1.5, 0.5], "PyTorch": [2.5, 1.5, 0.6]}
REPORT = {
    "passed": True,
    "versions": {"python": "3.11.9", "torch": "2.13.0", "batch-channel-norm": "0.1.0"},
    "device": "some processor",
    "seconds": 123.4,
    "command": "python -m parity_tests",
    "cases": [CASE],
    "laws": [LAW],
    "trajectory": {
        "setting": {
            "blocks": [[8, 8], [16]],
            "groups": 4,
            "batch_size": 32,
            "optimizer": "Adam",
            "learning_rate": 0.002,
        },
        "losses": {"float32": LOSSES, "float64": LOSSES},
        "distances": {
            name: [1e-6, 1e-4, 1e-2] for name in ("float32", "float64", "Flax", "PyTorch")
        },
    },
    "mutants": [MUTANT],
}
FAILED = {"passed": False, "message": "gradient: 8e5 ulps apart"}
FAILING = REPORT | {
    "passed": False,
    "cases": [CASE, CASE | FAILED | {"name": "failed case"}],
    "laws": [LAW, LAW | {"name": "failed law", "passed": False, "message": "0.9 != 1"}],
    "mutants": [MUTANT, MUTANT | {"name": "missed mutant", "caught_by": None, "message": ""}],
}


def texts(part):
    """All strings in a report."""
    if isinstance(part, dict | list):
        for value in part.values() if isinstance(part, dict) else part:
            yield from texts(value)
    elif isinstance(part, str):
        yield part.strip()


@pytest.mark.parametrize("report", [REPORT, FAILING], ids=["passing", "failing"])
def test_the_page_holds_the_report_and_nothing_from_elsewhere(report):
    html = page(report)
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<svg.*?</svg>|</?b>", "", html, flags=re.S)))
    assert not [t for t in texts(report) if t not in text]
    for wanted in ("0.1.0", "123 s", "8 + 8 and 16", "1.23e+05"):
        assert wanted in text
    assert not re.search(r"\w+://|@import|url\((?!#)|\bsrc=|<link|<img", html)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', html)) <= set(ids)


def test_no_text_becomes_markup():
    hostile = json.loads(json.dumps(FAILING).replace("failed", "<script>alert(1)</script>"))
    assert page(hostile).count("<script") == 1


@pytest.mark.parametrize(
    ("report", "verdict", "counts"),
    [
        (REPORT, "Flax and PyTorch agree.", ["1 of 1"] * 3),
        (FAILING, "Flax and PyTorch do not agree.", ["1 of 2"] * 3),
        (
            FAILING | {"cases": [CASE]},
            "Flax and PyTorch agree in every case, but not all is well.",
            ["1 of 1", "1 of 2", "1 of 2"],
        ),
    ],
    ids=["passing", "failing", "failing law"],
)
def test_the_verdict_comes_first(report, verdict, counts):
    html = page(report | {"trajectory": None})
    assert re.findall(r"<h1>(.*)</h1>", html) == [verdict]
    assert re.findall(r"\d of \d", html) == counts


def test_what_failed_comes_before_what_passed():
    html = page(FAILING | {"trajectory": None})
    assert html.index("What failed") < html.index("How to read this")
    cases, laws, mutants = (html.index(f'id="{part}"') for part in ("cases", "laws", "mutants"))
    for part, failed, passed in (
        (cases, "failed case", CASE["name"]),
        (laws, "failed law", LAW["name"]),
        (mutants, "missed mutant", MUTANT["name"]),
    ):
        assert html.index(failed, part) < html.index(passed, part)


def test_parts_that_were_not_run():
    html = page(REPORT | {"cases": [], "laws": [], "trajectory": None, "mutants": None})
    assert html.count("Not part of this run.") == 4


def test_numbers_that_are_not_finite_or_not_known():
    odd = {"ulps": math.nan, "used": math.nan, "absolute": math.inf, "flax_ulps": None}
    case = CASE | {"quantities": [QUANTITY | odd]}
    losses = {name: LOSSES | {"Flax": [math.nan, 0.0, math.inf]} for name in ("float32", "float64")}
    training = REPORT["trajectory"] | {"losses": losses}
    html = page(REPORT | {"cases": [case], "trajectory": training})
    assert re.search(r"over failed[^>]*>nan", html)
    assert "The oracle measured no float32 case." in html


def test_numbers_are_written_alike():
    written = {
        None: "\N{EN DASH}",
        0: "0",
        1e-7: "1e-07",
        1.74: "1.74",
        12345.6: "12,346",
        math.inf: "inf",
    }
    assert {x: number(x) for x in written} == written


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
    assert f"After {steps} steps" in page(REPORT | {"trajectory": found})
