"""One version, wherever it is written."""

import re
from pathlib import Path

import pytest

import bcn_flax

ROOT = Path(__file__).parents[1]
PLACES = {
    "bcn_torch/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CHANGELOG.md": r"^## \[(.+)\]",  # the newest comes first
}


@pytest.mark.parametrize("path", PLACES)
def test_one_version_everywhere(path):
    first = re.findall(PLACES[path], (ROOT / path).read_text(), re.MULTILINE)[:1]
    assert first == [bcn_flax.__version__]
