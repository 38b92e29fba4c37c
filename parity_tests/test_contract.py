"""Every argument of the layers of linen and NNX does what the tables say."""

import pytest

from parity_tests.contract import CONTRACT
from parity_tests.kernel_contract import KERNEL_CONTRACT

CHECKS = {**CONTRACT, **KERNEL_CONTRACT}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_contract(check):
    check()
