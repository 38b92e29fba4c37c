"""Flax computes what the golden files hold, and they hold what the oracle computes."""

from importlib.util import find_spec

import numpy as np
import pytest

from parity_tests import golden
from parity_tests.cases import BCN

ALL = [(name, api) for name in golden.CASES for api in golden.apis(name)]
BCN_LINEN, BCN_NNX = [(name, api) for name, api in ALL if golden.CASES[name].layer == BCN.layer][:2]
# Where PyTorch is present, Flax is compared with it directly in such cases.
VERIFIED = [BCN_LINEN, BCN_NNX] if find_spec("torch") else ALL


@pytest.mark.parametrize(("name", "api"), VERIFIED)
def test_flax_computes_what_the_files_hold(name, api):
    golden.verify(name, api)


@pytest.mark.parametrize("name", golden.CASES)
def test_the_files_hold_what_the_oracle_computes(name):
    arrays = golden.read(name)
    oracle = golden.CASES[name].oracle_side(golden.variables(arrays))
    for key, value in golden.replay(oracle, arrays, np.float64):
        # Another build of NumPy may sum in another order.
        scale = np.nanmax(np.abs(arrays[key]), initial=1.0) * (1e4 if "1e4" in name else 1)
        np.testing.assert_allclose(value, arrays[key], rtol=0, atol=1e-12 * scale)


def test_another_result_is_noticed(monkeypatch):
    name, api = BCN_LINEN
    arrays = golden.read(name)
    arrays["phase 1/statistic batch_norm/var"] *= 1.001
    monkeypatch.setattr(golden, "read", lambda _: arrays)
    with pytest.raises(AssertionError, match=r"phase 1/statistic batch_norm/var is .* off"):
        golden.verify(name, api)


def test_every_file_has_a_case():
    files = {path.name for path in golden.FOLDER.iterdir()}
    assert files == {golden.path_of(name).name for name in golden.CASES}
