"""The examples in the docstrings run as they are printed, and every public name has a docstring."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

FLAX_SIDE = [
    "bcn_flax.interop",
    "bcn_flax.interop.layouts",
    "bcn_flax.interop.matching",
    "bcn_flax.interop.naming",
    "bcn_flax.interop.rules",
    "bcn_flax.interop.trees",
    "bcn_flax.linen",
    "bcn_flax.models.linen",
    "bcn_flax.models.nnx",
    "bcn_flax.nnx",
    "bcn_flax.surgery.linen",
    "bcn_flax.surgery.nnx",
    "bcn_flax.variants",
    "bcn_flax.weight_standardization",
]
TORCH_SIDE = [
    "bcn_torch.norms",
    "bcn_torch.surgery.conversion",
    "bcn_torch.surgery.folding",
    "bcn_torch.surgery.recalibration",
    "bcn_torch.variants",
    "bcn_torch.vgg",
    "bcn_torch.weight_standardization",
]
MODULES = [
    *FLAX_SIDE,
    *(pytest.param(name, marks=pytest.mark.torch) for name in TORCH_SIDE),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    "package", ["bcn_flax", pytest.param("bcn_torch", marks=pytest.mark.torch)]
)
def test_everything_public_is_explained(package):
    module = importlib.import_module(package)
    assert all(getattr(module, name).__doc__ for name in module.__all__)


@pytest.mark.torch
def test_readme_runs_from_top_to_bottom():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(programs) == 2
    scope = {"__name__": "readme"}
    exec("\n".join(programs), scope)
    [report] = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    assert report.strip() in str(scope["comparison"])
