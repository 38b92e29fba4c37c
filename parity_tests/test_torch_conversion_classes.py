"""Conversion of PyTorch models whose norms and convolutions are of other libraries' classes."""

import pytest
from torch import nn

from bcn_torch import convert_batch_norm
from parity_tests.torch_conversions import CONVERSIONS

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("check", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_conversion(check):
    check()


def test_lines_are_printed_unless_somebody_takes_them(capsys):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    convert_batch_norm(model, groups=2)
    assert capsys.readouterr().out.startswith("1: This Conv2d is not standardized, because")
    convert_batch_norm(model, groups=2, leave=lambda name, _: name == "1")
    convert_batch_norm(model, groups=2, ws=False)
    assert capsys.readouterr().out == ""
