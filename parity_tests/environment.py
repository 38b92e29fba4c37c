"""How JAX is set up for the checks: strict about ranks, eight devices to spread over."""

import jax


def prepare() -> None:
    """Set JAX up, before its first computation."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
