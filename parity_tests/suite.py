"""Everything that the layers must satisfy, by name: what pytest, the mutants and the report run."""

from collections.abc import Callable

from parity_tests.cases import CASES
from parity_tests.laws import LAWS
from parity_tests.networks import NETWORKS


def checks() -> dict[str, Callable[[], object]]:
    """By name, functions that raise an error where something does not hold. Needs PyTorch."""
    from parity_tests.torch_layers import HALF_PRECISION

    cases = {str(case): case.check for case in CASES}
    return {**cases, **NETWORKS, **HALF_PRECISION, **LAWS}
