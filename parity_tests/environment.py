"""JAX and PyTorch as the checks configure them: strict about ranks, with eight CPU devices."""

import os

import jax

DEVICES = 8

# A flag for XLA. A device that waits longer than this for the others ends the process. By default
# it is 40 seconds, which a busy machine exceeds.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=200"

# Flags for XLA. LLVM's optimizations take most of the time, and after them the emitters of fused
# kernels, which can be replaced by a simpler one before JAX 0.11.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
)


def prepare() -> None:
    """Configure JAX before its first computation, and PyTorch before it is imported."""
    # PyTorch's idle threads spin, and take the cores from JAX and from other processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # A device that waits for the others blocks a thread. XLA has one thread per core, or as many as
    # this sets. If the waiting devices block all of them, none is left for the convolution of the
    # last device, which several threads compute, and the devices wait forever.
    os.environ.setdefault("NPROC", str(2 * DEVICES))
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PATIENT}"
    jax.config.update("jax_numpy_rank_promotion", "raise")
