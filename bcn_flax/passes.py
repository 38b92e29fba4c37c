"""The two passes over an activation: one measures it, one maps it.

All other arithmetic of a layer is of small numbers, `(n, c)`, so these two decide what it moves
through memory. Both see the activation as its deviations from an origin. Those are in float32 or
wider, but never stored: they are computed from the activation as it came wherever they are needed.
So a pass, and its derivative, reads and writes the activation's own type, and what it keeps for the
backward pass is the activation itself and small numbers.

Each has one derivative rule: a linear function that is computed again, and not stored, when it is
transposed for the backward pass. JAX makes every other derivative out of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from bcn_flax.space import spread, sums

Activation = Float[Array, "n *space c"]
PerChannel = Float[Array, "n c"]

# Nothing is saved, so the compiler may share with the forward pass what it likes.
_not_stored = partial(jax.checkpoint, prevent_cse=False)


def widen(x: Array) -> Array:
    """`x` in float32, or as it is where it is already as wide: the precision of all arithmetic."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.custom_jvp
def deviations(x: Activation, wide: Activation, origin: Activation) -> Activation:
    """`widen(x) - origin`, of which the derivative goes to `wide`, which is `widen(x)`.

    So the gradients of all uses of `x` add up in full precision, in `wide`, and are rounded once,
    to the type of `x`; while the value of `wide` is never needed. The origin is a constant.
    """
    return widen(x) - origin


@deviations.defjvp
def _(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    return deviations(*primals), tangents[1]


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def measure(
    x: Activation, wide: Activation, origin: PerChannel, mask: Bool[Array, "..."] | None, axis: int
) -> tuple[PerChannel, PerChannel]:
    """The sums of `x - origin` and of its square over the space of `x`.

    Args:
        x: the activation, in its own type.
        wide: `widen(x)`, for the derivative.
        origin: one for each channel of each sample.
        mask: of the shape of `x`, true where a value counts.
        axis: the channel axis.
    """
    d, e = (deviations(x, wide, *spread([origin], x, origin, axis, copy)) for copy in (0, 1))
    return (
        sums(_counted(d, mask), x, origin, axis),
        sums(_counted(jnp.square(e), mask), x, origin, axis),
    )


@measure.defjvp
def _(
    axis: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    @_not_stored
    def tangent(
        x: Array, wide: Array, origin: Array, mask: Array | None, dot: Array
    ) -> tuple[Array, Array]:
        d = deviations(x, wide, *spread([origin], x, origin, axis, 2))
        return (
            sums(_counted(dot, mask), x, origin, axis),
            2 * sums(_counted(d * dot, mask), x, origin, axis),
        )

    return measure(*primals, axis), tangent(*primals, tangents[1])


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
    return (scale * deviations(x, wide, o) + offset).astype(dtype)


@write.defjvp
def _(
    axis: int, dtype: DTypeLike, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    @_not_stored
    def tangent(
        scale: Array, x: Array, wide: Array, origin: Array, dots: tuple[Array, Array, Array]
    ) -> Array:
        scale, o = spread([scale, origin], x, origin, axis, 4)
        dscale, doffset = spread(dots[:2], x, origin, axis)
        return (scale * dots[2] + dscale * deviations(x, wide, o) + doffset).astype(dtype)

    scale, _, x, wide, origin = primals
    dscale, doffset, _, dot, _ = tangents
    return write(*primals, axis, dtype), tangent(scale, x, wide, origin, (dscale, doffset, dot))


def _counted(values: Array, mask: Array | None) -> Array:
    return values if mask is None else jnp.where(mask, values, 0)
