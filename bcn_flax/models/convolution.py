"""Convolutions of images smaller than the window, in a form that is fast on a CPU.

XLA exchanges the operands of such a convolution, and the result takes 15 to 40 times as long on a
CPU as the matrix products that it consists of. A VGG ends with 3x3 windows on 2x2 images.

The networks use it in all their convolutions. Any layer of Flax takes it, too:

    nn.Conv(512, (3, 3), conv_general_dilated_cls=conv_general_dilated_cls)
    nnx.Conv(512, 512, (3, 3), conv_general_dilated=conv_general_dilated, rngs=rngs)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bcn_flax.passes import widen


def conv_general_dilated(
    x: Float[Array, "n *space c"],
    kernel: Float[Array, "*window c features"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "n *out features"]:
    """`lax.conv_general_dilated` as Flax's layers call it: the same result, to rounding.

    On a CPU, if the window has more pixels than the image, it is one matrix product for each pixel
    of the output. The platform is the one that the program is lowered for.
    """

    def convolve(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    space, window = x.shape[1:-1], kernel.shape[:-2]
    if not _is_larger(window, space) or not _is_plain(x, options):
        return convolve(x, kernel)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(space, window, strides, padding)
    starts = [
        range(-low, size + high - width + 1, stride)
        for size, width, stride, (low, high) in zip(space, window, strides, padding, strict=True)
    ]
    # An output with more pixels than the window is mostly padding, and its program would be long.
    if not 0 < math.prod(map(len, starts)) <= math.prod(window):
        return convolve(x, kernel)
    by_pixel = partial(_by_pixel, starts=starts, precision=options.get("precision"))
    return lax.platform_dependent(x, kernel, cpu=by_pixel, default=convolve)


def conv_general_dilated_cls() -> Callable[..., Array]:
    """Return `conv_general_dilated`, as the argument of `nn.Conv` with this name has to."""
    return conv_general_dilated


def _is_larger(window: Sequence[int], space: Sequence[int]) -> bool:
    """Whether the window has more pixels than the image, all of whose sizes are known."""
    return all(isinstance(size, int) for size in space) and math.prod(window) > math.prod(space)


def _is_plain(x: Array, options: Mapping[str, Any]) -> bool:
    """Whether it is a sliding window over real numbers, without any other option."""
    ones = (1,) * (x.ndim - 2)
    plain = {
        "lhs_dilation": ones,
        "rhs_dilation": ones,
        "feature_group_count": 1,
        "batch_group_count": 1,
        "preferred_element_type": None,
        "out_sharding": None,
    }
    usual = all(options.get(name, value) == value for name, value in plain.items())
    return usual and jnp.issubdtype(x.dtype, jnp.floating)


def _by_pixel(
    x: Float[Array, "n *space c"],
    kernel: Float[Array, "*window c features"],
    starts: Sequence[range],
    precision: lax.PrecisionLike,
) -> Float[Array, "n *out features"]:
    """The convolution whose windows start at these pixels of each axis, or before the first."""
    dtype, x, kernel = x.dtype, widen(x), widen(kernel)  # the gradients are rounded once
    space, window = x.shape[1:-1], kernel.shape[:-2]

    def pixel(start: Sequence[int]) -> Float[Array, "n features"]:
        seen = (slice(max(a, 0), max(a + w, 0)) for a, w in zip(start, window, strict=True))
        used = (slice(max(-a, 0), max(s - a, 0)) for a, s in zip(start, space, strict=True))
        image, weights = lax.collapse(x[:, *seen], 1), lax.collapse(kernel[*used], 0, -1)
        return lax.dot(image, weights, precision=precision)

    pixels = jnp.stack([pixel(start) for start in product(*starts)], axis=1)
    return pixels.reshape(*x.shape[:1], *map(len, starts), kernel.shape[-1]).astype(dtype)
