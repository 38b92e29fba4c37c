"""Flax computes what the golden files hold, and they hold what the oracle computes."""

from importlib.util import find_spec

import numpy as np
import pytest

from parity_tests import golden
from parity_tests.cases import BCN

BCN_NAME = next(name for name, case in golden.CASES.items() if case.layer == BCN.layer)
# If PyTorch is present, Flax is compared with it directly in such cases.
VERIFIED = [BCN_NAME] if find_spec("torch") else golden.CASES


@pytest.mark.parametrize("name", VERIFIED)
def test_flax_computes_what_the_files_hold(name):
    golden.verify(name)


def test_nnx_computes_what_a_file_holds():
    golden.verify(BCN_NAME, "nnx")  # NNX equals linen bit for bit in the other cases, too


@pytest.mark.parametrize("name", golden.CASES)
def test_the_files_hold_what_the_oracle_computes(name):
    arrays = golden.read(name)
    oracle = golden.CASES[name].oracle_side(golden.variables(arrays))
    for key, value in golden.replay(oracle, arrays, np.float64):
        # Another build of NumPy may sum in another order.
        scale = np.nanmax(np.abs(arrays[key]), initial=1.0) * (1e4 if "1e4" in name else 1)
        np.testing.assert_allclose(value, arrays[key], rtol=0, atol=1e-12 * scale)


def test_another_result_is_noticed(monkeypatch):
    arrays = golden.read(BCN_NAME)
    arrays["phase 1/statistic batch_norm/var"] *= 1.001
    monkeypatch.setattr(golden, "read", lambda _: arrays)
    with pytest.raises(AssertionError, match=r"phase 1/statistic batch_norm/var is .* off"):
        golden.verify(BCN_NAME)


def test_every_file_has_a_case():
    files = {path.name for path in golden.FOLDER.iterdir()}
    assert files == {golden.path_of(name).name for name in golden.CASES}
