"""The reference has every public name, and the pages of the site are found from its index."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
REFERENCE = DOCS / "reference"


@pytest.mark.parametrize(
    "name",
    [
        "bcn_flax.interop",
        "bcn_flax.parity",
        pytest.param("bcn_torch", marks=pytest.mark.torch),
    ],
)
def test_reference_has_every_public_name(name):
    """Where a page lists them, instead of taking all of a module."""
    module = importlib.import_module(name)
    page = (REFERENCE / f"{name}.md").read_text()
    listed = re.findall(r"\.\. (?:py:|auto(?!module))\w+:: (\w+)$", page, re.M)
    submodules = {n for n in module.__all__ if type(getattr(module, n)) is type(module)}
    assert sorted(listed) == sorted(set(module.__all__) - submodules)


def test_index_lists_every_page():
    listed = re.findall(r"^bcn_\S+$", (REFERENCE / "index.md").read_text(), re.M)
    assert sorted(listed) == sorted(page.stem for page in REFERENCE.glob("bcn_*.md"))


def test_figures_are_drawn_from_the_tables_of_today():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    names = sorted(f"{name}-{theme}" for name in figures.DRAWINGS for theme in figures.THEMES)
    assert names == sorted(path.stem for path in figures.FIGURES.glob("*.svg"))
    for path in figures.FIGURES.glob("*.svg"):
        drawn_from = figures.fingerprint(path.stem.rpartition("-")[0])
        assert drawn_from in path.read_text(), f"{path.name} is old: python docs/figures.py"
