"""Neither package imports the other's framework, and the base install is light."""

import subprocess
import sys

import pytest

FLAX_SIDE = (
    "bcn_flax, bcn_flax.interop, bcn_flax.models, bcn_flax.models.nnx, bcn_flax.nnx, "
    "bcn_flax.surgery.linen, bcn_flax.surgery.nnx, bcn_flax.variants"
)
FOREIGN_TO_FLAX = {"torch", "bcn_torch"}
FOREIGN_TO_TORCH = {"jax", "jaxlib", "flax", "optax", "bcn_flax"}
EXTRAS = {"matplotlib", "safetensors", "sklearn", "tyro", "parity_tests", "hypothesis"}


def loaded_by(modules: str) -> set[str]:
    """The top-level packages in memory after `import modules` in a new interpreter."""
    program = f"import {modules}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


def test_bcn_flax_imports_no_torch_and_no_extra():
    assert not loaded_by(FLAX_SIDE) & (FOREIGN_TO_FLAX | EXTRAS)


@pytest.mark.torch
def test_bcn_torch_imports_no_jax_and_no_extra():
    assert not loaded_by("bcn_torch") & (FOREIGN_TO_TORCH | EXTRAS)


def test_an_offender_would_be_caught():
    assert loaded_by(f"{FLAX_SIDE}, sklearn") & EXTRAS
    assert loaded_by("bcn_flax") & FOREIGN_TO_TORCH
