"""The two passes over an activation: one measures it, one maps it.

All other arithmetic of a layer is of small numbers, `(n, c)`, so these two decide what it moves
through memory. Both see the activation as its deviations from an origin, which are float32 or wider
and never stored: they are computed from the activation, as it came, wherever they are needed.

Each pass has one derivative rule, a linear function. It is not stored either, but computed again
for the backward pass: so what is kept for it is the activation as it came, and small numbers. JAX
makes every other derivative out of these rules. The derivative of the input goes to `wide`, which
is the input in float32: there the gradients of both passes add up before they are rounded, once, to
the type of the input. The values of `wide` are not used, and so it is never stored.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bcn_flax.space import spread, sums

Activation = Float[Array, "n *space c"]
PerChannel = Float[Array, "n c"]

# With `prevent_cse=True` there would be barriers around what is computed again, and the compiler
# could not compute the deviations where they are used.
_not_stored = partial(jax.checkpoint, prevent_cse=False)


def promote(*dtypes: DTypeLike) -> DTypeLike:
    """The type that holds all of these, however strict JAX is told to be about mixing them."""
    with jax.numpy_dtype_promotion("standard"):
        return reduce(jnp.promote_types, dtypes)


def widen(x: Array) -> Array:
    """`x` in float32, or as it is where it is already as wide: the precision of all arithmetic."""
    return x.astype(promote(x.dtype, jnp.float32))


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def measure(
    x: Activation, wide: Activation, origin: PerChannel, mask: Bool[Array, "..."] | None, axis: int
) -> tuple[PerChannel, PerChannel]:
    """The sums of `x - origin` and of its square over the space of `x`.

    Args:
        x: the activation, in its own type.
        wide: `widen(x)`, which has the derivative.
        origin: one for each channel of each sample.
        mask: of the shape of `x`, true where a value counts.
        axis: the channel axis.
    """
    d, e = (widen(x) - o for copy in (0, 1) for o in spread([origin], x, origin, axis, copy))
    return (
        sums(_counted(d, mask), x, origin, axis),
        sums(_counted(jnp.square(e), mask), x, origin, axis),
    )


@measure.defjvp
def _(
    axis: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    @_not_stored
    def tangent(x: Array, origin: Array, mask: Array | None, dot: Array) -> tuple[Array, Array]:
        (o,) = spread([origin], x, origin, axis, 2)
        d = widen(x) - o
        return (
            sums(_counted(dot, mask), x, origin, axis),
            2 * sums(_counted(d * dot, mask), x, origin, axis),
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
    """`scale * (x - origin) + offset`, rounded once, to `dtype`; arguments as of `measure`."""
    scale, offset, o = spread([scale, offset, origin], x, origin, axis, 3)
    return (scale * (widen(x) - o) + offset).astype(dtype)


@write.defjvp
def _(
    axis: int, dtype: DTypeLike, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    @_not_stored
    def tangent(
        scale: Array, x: Array, origin: Array, dscale: Array, doffset: Array, dot: Array
    ) -> Array:
        scale, o = spread([scale, origin], x, origin, axis, 4)
        dscale, doffset = spread([dscale, doffset], x, origin, axis)
        return (scale * dot + dscale * (widen(x) - o) + doffset).astype(dtype)

    scale, _, x, _, origin = primals
    dscale, doffset, _, dot, _ = tangents
    return write(*primals, axis, dtype), tangent(scale, x, origin, dscale, doffset, dot)


def _counted(values: Array, mask: Array | None) -> Array:
    return values if mask is None else jnp.where(mask, values, 0)
