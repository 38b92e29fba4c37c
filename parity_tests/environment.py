"""How JAX is set up for the checks: strict about ranks, eight devices to spread over."""

import jax

# For XLA: how long one device waits for another before it gives up.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"

# For XLA: LLVM's optimizations take most of the time, and then the generators of fused kernels, for
# which there is a simpler one before JAX 0.11.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
)


def prepare() -> None:
    """Set JAX up, before its first computation."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
