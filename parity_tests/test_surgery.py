"""The checks of surgery that mutants and the report run too."""

import pytest

from parity_tests.surgery import SURGERY


@pytest.mark.parametrize("name", SURGERY)
def test_surgery(name):
    SURGERY[name]()
