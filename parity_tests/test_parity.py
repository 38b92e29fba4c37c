"""Flax, PyTorch and the oracle agree in every number, after every step."""

from dataclasses import replace

import numpy as np
import pytest

from bcn_flax.parity import adam
from parity_tests.cases import CASES, NORMS
from parity_tests.networks import DEEP, NETWORKS, vgg
from parity_tests.torch_layers import TORCH_CONTRACT

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layers_agree(case):
    comparison = case.check()
    if case.dtype == "float64" and not case.ill_conditioned:
        errors = {row.error.absolute.error / (row.error.scale or 1) for row in comparison.rows}
        assert max(errors) < 1e-12


@pytest.mark.parametrize("name", TORCH_CONTRACT)
def test_the_contract_of_the_norms(name):
    TORCH_CONTRACT[name]()


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_agree(network):
    NETWORKS[network]()


@pytest.mark.slow
def test_a_network_as_deep_as_the_published_one_agrees():
    vgg(blocks=DEEP, size=32, groups=8, optimizer=adam(2.5e-4), steps=2)


@pytest.mark.slow  # so that the compiler optimizes as it does for users
@pytest.mark.parametrize(("data", "times"), [("normal", 1), ("mean 1e4", 0.2)])
def test_flax_is_no_less_accurate_than_pytorch(data, times):
    """In float32, by the geometric mean over all numbers of all norms: 0.86 and 0.10 measured."""
    ratios = []
    for case in NORMS:
        rows = replace(case, data=data, shape=(4, 16, 16, 16)).check().rows
        errors = [row.accuracy for row in rows if row.accuracy]
        ratios += [e.flax / e.torch for e in errors if e.flax > 0 and e.torch > 0]
    assert np.exp(np.mean(np.log(ratios))) < times
