"""Flax computes what the golden files say, and these say what the oracle does."""

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from parity_tests import golden
from parity_tests.cases import BCN

NNX = [name for name in golden.CASES if golden.CASES[name].layer in ("BatchChannelNorm", "WSConv")]


@pytest.mark.parametrize("name", golden.CASES)
def test_linen_computes_what_the_files_say(name):
    golden.verify(name)


@pytest.mark.parametrize("name", [name for name in NNX if "nnx" in golden.apis(name)])
def test_nnx_computes_what_the_files_say(name):
    golden.verify(name, "nnx")


@pytest.mark.parametrize("name", golden.CASES)
def test_the_files_say_what_the_oracle_does(name):
    arrays = golden.read(name)
    variables = {
        tuple(key.split("/")[1:]): value
        for key, value in arrays.items()
        if key.startswith("variables/")
    }
    judge = golden.CASES[name].judge(unflatten_dict(variables))
    for phase in golden.phases(arrays):
        given = (np.float64(arrays[f"{phase}/{key}"]) for key in ("input", "output gradient"))
        shown = judge(*([x] for x in given), bool(arrays[f"{phase}/train"]))
        for quantity, value in shown.items():
            expected = arrays[f"{phase}/{quantity}"]
            # Another build of NumPy may sum in another order.
            scale = np.nanmax(np.abs(expected), initial=1.0) * (1e4 if "1e4" in name else 1)
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * scale)


def test_another_result_is_noticed(monkeypatch):
    name = next(name for name, case in golden.CASES.items() if case.layer == BCN.layer)
    arrays = golden.read(name)
    arrays["phase 1/statistic batch_norm/var"] *= 1.001
    monkeypatch.setattr(golden, "read", lambda _: arrays)
    with pytest.raises(AssertionError, match=r"phase 1/statistic batch_norm/var is .* off"):
        golden.verify(name)


def test_every_file_has_a_case():
    files = {path.name for path in golden.FOLDER.iterdir()}
    assert files == {golden.path_of(name).name for name in golden.CASES}
