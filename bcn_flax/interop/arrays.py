"""Values, whatever library holds them: PyTorch, which is not imported, NumPy or JAX."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcn_flax.interop.layouts import Shape, Values


def is_array(x: Any) -> bool:
    """Whether `x` has a shape and a dtype, if not necessarily values."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def shape(x: Any) -> Shape:
    """The shape, as a tuple of numbers."""
    return tuple(int(n) for n in x.shape)


def dtype(x: Any) -> np.dtype[Any]:
    """The dtype, as NumPy's or that of `ml_dtypes`."""
    return np.dtype(str(x.dtype).removeprefix("torch."))


def kind(x: Any) -> str:
    """What its values are: `bool`, `integer`, `floating` or `complexfloating`.

    Example:
        >>> kind(np.zeros(3, "bfloat16")), kind(np.array(3))
        ('floating', 'integer')
    """
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next(k.__name__ for k in kinds if jnp.issubdtype(dtype(x), k)).rstrip("_")


def values(x: Any) -> Values:
    """The values, exactly, as NumPy's; narrow types that PyTorch has and NumPy not are widened."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    builtin = dtype(x).isbuiltin == 1
    return np.asarray((x if builtin else x.float()).numpy())


def cast(x: Values, to: np.dtype[Any]) -> Values:
    """The values rounded to a dtype."""
    with np.errstate(over="ignore"):
        return x.astype(to)


def overflow(x: Values, to: np.dtype[Any]) -> list[str]:
    """A complaint, if a finite value would become infinite or NaN in a dtype."""
    finite = np.isfinite(x)
    if np.array_equal(finite, np.isfinite(cast(x, to))):
        return []
    return [f"has values up to {np.abs(x[finite]).max():g}, too large for {to}"]


def as_kind_of(like: Any, x: Values) -> Any:
    """The values as the kind of array that `like` is, of its dtype and on its device."""
    if hasattr(like, "new_tensor"):
        # PyTorch takes from NumPy neither bfloat16 nor strides that run backwards.
        plain = x if x.dtype.isbuiltin == 1 else x.astype(np.float32)
        device = "cpu" if like.is_meta else like.device
        return like.new_tensor(np.array(plain, order="C"), device=device)
    if isinstance(like, np.ndarray | np.generic):
        return np.array(x, like.dtype, order="C")
    return to_jax(x, dtype(like))


def to_jax(x: Values, to: np.dtype[Any]) -> jax.Array:
    """The values as a JAX array of a dtype."""
    return jnp.asarray(cast(x, to), to)


def memory(x: Any) -> Hashable | None:
    """Equal for PyTorch's tensors that are one and the same in memory; `None` for all others."""
    if not hasattr(x, "data_ptr") or not x.data_ptr():
        return None
    return x.data_ptr(), shape(x), x.stride()
