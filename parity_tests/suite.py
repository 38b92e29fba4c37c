"""Everything that the layers must satisfy, by name: what pytest, the mutants and the report run."""

from collections.abc import Callable

from parity_tests.cases import CASES
from parity_tests.laws import LAWS
from parity_tests.networks import NETWORKS


def checks() -> dict[str, Callable[[], object]]:
    """By name, functions that raise an error where something does not hold."""
    return {**{str(case): case.check for case in CASES}, **NETWORKS, **LAWS}
