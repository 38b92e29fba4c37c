"""Neither package imports the other's framework, and the base install is light."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAX_SIDE = (
    "bcn_flax, bcn_flax.interop, bcn_flax.models, bcn_flax.models.nnx, bcn_flax.nnx, "
    "bcn_flax.parity, bcn_flax.surgery.linen, bcn_flax.surgery.nnx, bcn_flax.variants"
)
FOREIGN_TO_FLAX = {"torch", "bcn_torch"}
FOREIGN_TO_TORCH = {"jax", "jaxlib", "flax", "optax", "bcn_flax"}
EXTRAS = {"matplotlib", "safetensors", "sklearn", "tyro", "parity_tests", "hypothesis"}
TRAINING = {"training"}  # what the training script is built on, extras included


@cache
def loaded_by(modules: str) -> set[str]:
    """The modules loaded after `import modules` in a new interpreter."""
    program = f"import {modules}, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.split())


def test_bcn_flax_imports_no_torch_and_no_extra():
    assert not loaded_by(FLAX_SIDE) & (FOREIGN_TO_FLAX | EXTRAS | TRAINING)


@pytest.mark.torch
def test_bcn_torch_imports_no_jax_and_no_extra():
    assert not loaded_by("bcn_torch") & (FOREIGN_TO_TORCH | EXTRAS)


def test_an_offender_would_be_caught():
    offender = loaded_by("training.config, safetensors")
    for foreign in EXTRAS, TRAINING, FOREIGN_TO_TORCH:
        assert offender & foreign
