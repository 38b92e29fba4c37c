"""Flax, PyTorch and the oracle show the same numbers, in everything and after every step."""

import pytest

from parity_tests.cases import CASES
from parity_tests.networks import NETWORKS, PUBLISHED, vgg

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_agree(case):
    case.check()


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_agree(network):
    NETWORKS[network]()
