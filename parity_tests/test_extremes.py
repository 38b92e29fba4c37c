"""Results at the extremes of each type are finite and precise, against longdouble."""

import numpy as np
import pytest

from parity_tests.extremes import EXTREMES, PYTORCH_EXTREMES

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps, reason="longdouble is float64 here"
)


@pytest.mark.parametrize("check", EXTREMES)
def test_extremes(check):
    EXTREMES[check]()


@pytest.mark.torch
@pytest.mark.parametrize("check", PYTORCH_EXTREMES)
def test_extremes_of_pytorch(check):
    PYTORCH_EXTREMES[check]()
