"""Random numbers for layers and networks."""

import jax
import jax.numpy as jnp


def random_variables(layer, x, rng, **call):
    """Random variables of a layer, between 0.5 and 1.5."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), jnp.asarray(x), **call))
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), shapes)
