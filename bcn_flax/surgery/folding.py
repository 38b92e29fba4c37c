"""The arithmetic of folding: a convolution and the affine map that follows it are a convolution."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bcn_flax import norms
from bcn_flax.affine import Moments, chain, standardize
from bcn_flax.weight_standardization import Standardization, standardize_kernel

Array = jax.Array | np.ndarray


class BatchNorm(NamedTuple):
    """A batch norm that normalizes by its running averages: all arrays `(c,)`."""

    mean: Array
    var: Array
    scale: Array | None
    bias: Array | None
    epsilon: float


class Convolution(NamedTuple):
    """The weights of a convolution, transposed convolution or dense layer.

    Attributes:
        kernel: `(*window, in, out)`, or another order with `out` along `axis`.
        bias: `(out,)`.
        axis: the output channel's, in the kernel.
        standardization: of the kernel; None if it is used as it is.
        gain: of the standardization, `(out,)`.
        mask: of the kernel, zeros and ones.
    """

    kernel: Array
    bias: Array | None
    axis: int = -1
    standardization: Standardization | None = None
    gain: Array | None = None
    mask: Array | None = None


def describe(layer: Any, kernel: Array, bias: Array | None, gain: Array | None) -> Convolution:
    """The weights of `layer`, a linen or NNX module: both name these attributes alike."""
    return Convolution(
        kernel,
        bias,
        axis=-2 if getattr(layer, "transpose_kernel", False) else -1,
        standardization=getattr(layer, "standardization", None),
        gain=gain,
        mask=getattr(layer, "mask", None),
    )


def fold(conv: Convolution, norm: BatchNorm | None) -> dict[str, jax.Array]:
    """The `kernel` and `bias` of one plain layer that does what `conv` and then `norm` do.

    Computed in float64 and rounded once, to the kernel's dtype. Without a norm, a layer without a
    bias stays without one.
    """
    with jax.enable_x64(True):
        kernel, bias = _wide(conv.kernel), _wide(conv.bias)
        if conv.standardization is not None:
            kernel = standardize_kernel(
                kernel,
                conv.standardization,
                gain=_wide(conv.gain),
                axis=conv.axis,
                mask=None if conv.mask is None else jnp.asarray(conv.mask) != 0,
            )
        if norm is not None:
            mean, var, scale, shift = map(_wide, norm[:4])
            learned = norms.learned_affine(scale, shift, mean.size, jnp.float64)
            f = chain(standardize(Moments(mean[None], var[None]), norm.epsilon), learned)
            shape = [1] * kernel.ndim
            shape[conv.axis] = -1
            kernel = kernel * f.scale.reshape(shape)
            bias = f.offset[0] if bias is None else f.scale[0] * bias + f.offset[0]
        weights = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
        return {name: w.astype(conv.kernel.dtype) for name, w in weights.items()}


def _wide(values: Array | None) -> Any:
    return None if values is None else jnp.asarray(np.asarray(values, np.float64))
