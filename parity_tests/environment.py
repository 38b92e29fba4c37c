"""How JAX is set up for the checks: strict about ranks, eight devices to spread over."""

import os

import jax

DEVICES = 8

# For XLA: LLVM's optimizations take most of the time, and then the generators of fused kernels, for
# which there is a simpler one before JAX 0.11.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
)


def prepare() -> None:
    """Set JAX up, before its first computation."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # A device that waits for the others keeps a thread, of which XLA has as many as there are cores
    # or as this says. With fewer threads than devices they may wait for each other for ever.
    os.environ.setdefault("NPROC", str(DEVICES))
    jax.config.update("jax_numpy_rank_promotion", "raise")
