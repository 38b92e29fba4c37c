"""All checks of the layers by name, as pytest, the mutants and the report run them."""

from collections.abc import Callable

from parity_tests.cases import CASES
from parity_tests.contract import CONTRACT
from parity_tests.extremes import EXTREMES, PYTORCH_EXTREMES
from parity_tests.kernel_contract import KERNEL_CONTRACT
from parity_tests.laws import LAWS
from parity_tests.networks import NETWORKS
from parity_tests.surgery import SURGERY


def checks() -> dict[str, Callable[[], object]]:
    """Functions that raise an error if a check fails, by name. Needs PyTorch."""
    from parity_tests import torch_surgery, weights
    from parity_tests.torch_conversions import CONVERSIONS
    from parity_tests.torch_layers import HALF_PRECISION, TORCH_CONTRACT

    cases = {str(case): case.check for case in CASES}
    contract = {**CONTRACT, **KERNEL_CONTRACT, **TORCH_CONTRACT}
    surgery = {**SURGERY, **torch_surgery.SURGERY, **CONVERSIONS}
    layers = {**contract, **cases, **NETWORKS, **HALF_PRECISION}
    laws = {**LAWS, **EXTREMES, **PYTORCH_EXTREMES}
    return {**layers, **weights.CHECKS, **laws, **surgery}
