"""The arithmetic of folding: a convolution and the affine map that follows it are a convolution.

And the rules of folding, for linen and NNX.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcn_flax import norms
from bcn_flax.affine import Moments, chain, standardize
from bcn_flax.checks import require_running_average_flag
from bcn_flax.weight_standardization import standardize_kernel

Weights = Mapping[str, Any]


def fold(
    layer: Any, weights: Weights, norm: Weights | None, epsilon: float, stacked: int
) -> dict[str, jax.Array]:
    """The `kernel` and `bias` of one plain layer that does what `layer` and then a batch norm do.

    Computed in float64 and rounded once, to the kernel's dtype. Without a norm, a layer without a
    bias stays without one.

    Args:
        layer: a linen or NNX module: both name its attributes alike.
        weights: its `kernel`, `(*window, in, out)`, and its `bias` and `gain`, `(out,)`, if it has
            them.
        norm: `mean` and `var` of a batch norm, and its `scale` and `bias` if it has them, `(out,)`;
            None without a norm.
        epsilon: of the norm.
        stacked: how many leading axes all weights have besides, as in an ensemble.
    """
    axis = -2 if getattr(layer, "transpose_kernel", False) else -1
    standardization, mask = (getattr(layer, name, None) for name in ("standardization", "mask"))

    def folded(weights: Weights, norm: Weights | None) -> dict[str, jax.Array]:
        kernel, bias = weights["kernel"], weights.get("bias")
        if standardization is not None:
            kernel = standardize_kernel(
                kernel,
                standardization,
                gain=weights.get("gain"),
                axis=axis,
                mask=None if mask is None else jnp.asarray(mask) != 0,
            )
        if norm is not None:
            m = Moments(norm["mean"][None], norm["var"][None])
            learned = (norm.get("scale"), norm.get("bias"), norm["mean"].size, jnp.float64)
            f = chain(standardize(m, epsilon), norms.learned_affine(*learned))
            shape = [1] * kernel.ndim
            shape[axis] = -1
            kernel = kernel * f.scale.reshape(shape)
            bias = f.offset[0] if bias is None else f.scale[0] * bias + f.offset[0]
        return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}

    for _ in range(stacked):
        folded = jax.vmap(folded)
    dtype = weights["kernel"].dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda value: jnp.asarray(np.asarray(value, np.float64)), (weights, norm)
        )
        return {name: value.astype(dtype) for name, value in folded(*wide).items()}


def is_last_axis(axis: Any, ndim: int) -> bool:
    """Whether `axis`, an integer or a sequence of one, is the last of `ndim` axes."""
    return bool(np.array_equal(np.ravel(axis) % ndim, [ndim - 1]))


def require_foldable(layers: Collection[object]) -> None:
    """Raise a `ValueError` if no layer can be folded."""
    if not layers:
        raise ValueError(
            "The model must have something to fold, a standardized kernel, or a batch norm that "
            "alone reads the output of a convolution or dense layer, but on the example input "
            "there was none. Subclasses are left unchanged, and so is what runs inside scan, while "
            "or cond, what a wrapper such as WeightNorm changes, and what an ensemble stacks along "
            "another axis than 0."
        )


def require_evaluation(kind: str, name: str, attribute: bool | None, flag: bool | None) -> None:
    """Raise a `ValueError` if a norm is called in training.

    Args:
        kind: the name of its class.
        name: its path.
        attribute: its `use_running_average`.
        flag: that of the call.
    """
    if not require_running_average_flag(kind, attribute, flag):
        raise ValueError(
            "Folding is for inference, so every norm must use its running averages, but "
            f"{name or 'the model'} was in training. Pass what makes the model evaluate, such as "
            "train=False or use_running_average=True."
        )
