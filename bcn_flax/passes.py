"""The two passes over an activation: one measures it, one maps it.

All other arithmetic of a layer is on small arrays, `(n, c)`, so these two passes determine its
memory traffic. Both use the deviations of the activation from an origin, in float32 or wider, which
are never stored: they are recomputed from the activation, in its own dtype, wherever they are used.

Each pass has one derivative rule, a rematerialized linear function: only the activation, in its own
dtype, and small arrays are saved for the backward pass. JAX derives all other derivatives from
these rules. The gradient of the input goes to `wide`, the input in float32, where the gradients of
both passes add up before they are rounded, once, to the dtype of the input. The values of `wide`
are not used, so it is never stored.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bcn_flax.space import broadcast, sums

Activation = Float[Array, "n *space c"]
PerChannel = Float[Array, "n c"]

# `prevent_cse=True` would put barriers around the recomputation, and the compiler could not fuse
# the deviations into their users.
_rematerialized = partial(jax.checkpoint, prevent_cse=False)


def promote(*dtypes: DTypeLike) -> DTypeLike:
    """The dtype that these promote to, also under `jax.numpy_dtype_promotion("strict")`."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, dtypes)


def widen(x: Array) -> Array:
    """`x` in float32, or unchanged if it is as wide: the precision of all arithmetic."""
    return x.astype(promote(x.dtype, jnp.float32))


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def measure(
    x: Activation, wide: Activation, origin: PerChannel, mask: Bool[Array, "..."] | None, axis: int
) -> tuple[PerChannel, PerChannel]:
    """The sums of `x - origin` and of its square over the space of `x`.

    Args:
        x: the activation, in its own dtype.
        wide: `widen(x)`, which receives the gradient.
        origin: one for each channel of each sample.
        mask: true where a value counts, shaped as `x`.
        axis: the channel axis.
    """
    d, e = (widen(x) - o for copy in (0, 1) for o in broadcast([origin], x, origin, axis, copy))
    return (
        sums(_apply_mask(d, mask), x, origin, axis),
        sums(_apply_mask(jnp.square(e), mask), x, origin, axis),
    )


@measure.defjvp
def _(
    axis: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    @_rematerialized
    def tangent(x: Array, origin: Array, mask: Array | None, dot: Array) -> tuple[Array, Array]:
        (o,) = broadcast([origin], x, origin, axis, 2)
        d = widen(x) - o
        return (
            sums(_apply_mask(dot, mask), x, origin, axis),
            2 * sums(_apply_mask(d * dot, mask), x, origin, axis),
        )

    x, _, origin, mask = primals
    return measure(*primals, axis), tangent(x, origin, mask, tangents[1])


@partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def write(
    scale: PerChannel,
    offset: PerChannel,
    x: Activation,
    wide: Activation,
    origin: PerChannel,
    axis: int,
    dtype: DTypeLike,
) -> Activation:
    """`scale * (x - origin) + offset`, rounded once, to `dtype`; arguments as in `measure`."""
    scale, offset, o = broadcast([scale, offset, origin], x, origin, axis, 3)
    return (scale * (widen(x) - o) + offset).astype(dtype)


@write.defjvp
def _(
    axis: int, dtype: DTypeLike, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    @_rematerialized
    def tangent(
        scale: Array, x: Array, origin: Array, dscale: Array, doffset: Array, dot: Array
    ) -> Array:
        scale, o = broadcast([scale, origin], x, origin, axis, 4)
        dscale, doffset = broadcast([dscale, doffset], x, origin, axis)
        return (scale * dot + dscale * (widen(x) - o) + doffset).astype(dtype)

    scale, _, x, _, origin = primals
    dscale, doffset, _, dot, _ = tangents
    return write(*primals, axis, dtype), tangent(scale, x, origin, dscale, doffset, dot)


def _apply_mask(values: Array, mask: Array | None) -> Array:
    return values if mask is None else jnp.where(mask, values, 0)
