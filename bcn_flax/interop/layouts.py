"""Arrays of PyTorch, NumPy and JAX, and how the axes of one correspond to those of another.

PyTorch is not imported: its tensors convert themselves. A `Layout` rearranges values in both
directions; functions such as `kernel` propose the layouts for two shapes. PyTorch's shapes are
written `(O, I, *)`: output features, input features (of one group), and any number of window axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Path = tuple[str, ...]
Array = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """One rearrangement of values between PyTorch and Flax.

    Attributes:
        how: what it does, for the report.
        to_flax: from PyTorch's tensor to Flax's array.
        to_torch: from Flax's array to PyTorch's tensor.
        torch_shape: the shape of PyTorch's tensor for a shape of Flax's array.
        features: the axis of PyTorch's tensor that holds the layer's output features.
    """

    how: str
    to_flax: Callable[[Array], Array]
    to_torch: Callable[[Array], Array]
    torch_shape: Callable[[Shape], Shape]
    features: int = 0


class LayerFacts(NamedTuple):
    """Facts about a layer that its names and shapes do not show; `None` if unknown.

    Attributes:
        transposed: whether it is a transposed convolution.
        transpose_kernel: the argument of that name of Flax's transposed convolutions.
        channels: of the images that were flattened into the inputs of a dense layer.
    """

    transposed: bool | None = None
    transpose_kernel: bool | None = None
    channels: int | None = None


_NO_NUMBERS = tuple("OSUMm")

COPIED = Layout("copied", lambda x: x, lambda x: x, lambda shape: shape)

EMBEDDED = COPIED._replace(features=1)

TRANSPOSED = Layout(
    "transposed (O, I, *) -> (*, I, O)",
    lambda weight: np.moveaxis(weight, (0, 1), (-1, -2)),
    lambda kernel: np.moveaxis(kernel, (-1, -2), (0, 1)),
    lambda shape: (shape[-1], shape[-2], *shape[:-2]),
)

# Flax's transpose_kernel=True: lax.conv_transpose flips and exchanges by itself, as PyTorch does.
UNFLIPPED = TRANSPOSED._replace(how="transposed (I, O, *) -> (*, O, I)", features=1)

# Flax's transpose_kernel=False: a convolution of the dilated input, where PyTorch correlates.
FLIPPED = Layout(
    "transposed (I, O, *) -> (*, I, O) and flipped in space",
    lambda weight: np.moveaxis(_flip(weight, first=2), (0, 1), (-2, -1)),
    lambda kernel: _flip(np.moveaxis(kernel, (-2, -1), (0, 1)), first=2),
    lambda shape: (shape[-2], shape[-1], *shape[:-2]),
    features=1,
)


def reshaped(torch_shape: Shape, flax_shape: Shape) -> Layout:
    """The same values in the same order, between two given shapes."""
    return Layout(
        "reshaped",
        lambda x: x.reshape(flax_shape),
        lambda x: x.reshape(torch_shape),
        lambda _: torch_shape,
    )


def unflattened(channels: int) -> Layout:
    """The weights of a dense layer whose inputs are flattened images.

    PyTorch flattens `(channels, pixels)`, Flax `(pixels, channels)`.
    """
    return TRANSPOSED._replace(
        how=f"transposed (O, I) -> (I, O), inputs reordered from {channels} channels first to last",
        to_flax=lambda weight: (
            weight.reshape(len(weight), channels, -1).transpose(2, 1, 0).reshape(-1, len(weight))
        ),
        to_torch=lambda kernel: (
            kernel.reshape(-1, channels, kernel.shape[1])
            .transpose(2, 1, 0)
            .reshape(kernel.shape[1], -1)
        ),
    )


def kernel(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """Layouts for the kernel of a dense layer, a convolution, or a transposed convolution."""
    if len(flax_shape) < 2:
        return []
    if facts.transposed:
        by_flag = {False: FLIPPED, True: UNFLIPPED}
        return [by_flag[flag] for flag in by_flag if facts.transpose_kernel in (flag, None)]
    if len(flax_shape) == 2 and facts.channels not in (None, flax_shape[0]):
        return [unflattened(facts.channels)]
    return [TRANSPOSED]


def embedding(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """The layout for an embedding: a row of features for each token, on both sides."""
    return [EMBEDDED]


def untransposed(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """The layout for a dense layer that has in PyTorch the kernel `(in, out)`: GPT-2's `Conv1D`.

    In Flax, `in` or `out` may be several axes, such as heads.
    """
    if len(flax_shape) < 3:
        return [EMBEDDED]
    either = flax_shape[0] == torch_shape[0] or flax_shape[-1] == torch_shape[-1]
    if not either or math.prod(flax_shape) != math.prod(torch_shape):
        return []
    return [reshaped(torch_shape, flax_shape)._replace(features=1)]


def hidden_kernel(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """Layouts for the kernel of a dense layer whose inputs are never flattened images."""
    return kernel(torch_shape, flax_shape, LayerFacts())


def to_heads(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """Layouts for a dense layer whose features are heads in Flax: query, key or value.

    Flax's kernel is `(in, heads, size)` and its bias `(heads, size)`; PyTorch's are
    `(heads * size, in)` and `(heads * size,)`.
    """
    if len(torch_shape) == 1:
        merged = _merged(COPIED, flax_shape, (math.prod(flax_shape),))
        return [merged if len(flax_shape) > 1 else COPIED]
    if len(flax_shape) < 3:
        return kernel(torch_shape, flax_shape, facts)
    flat = (flax_shape[0], math.prod(flax_shape[1:]))
    return [_merged(layout, flax_shape, flat) for layout in kernel(torch_shape, flat, facts)]


def from_heads(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """Layouts for a dense layer whose inputs are heads in Flax, the output of an attention.

    Flax's kernel is `(heads, size, out)`, PyTorch's is `(out, heads * size)`.
    """
    if len(flax_shape) < 3:
        return kernel(torch_shape, flax_shape, facts)
    return [_merged(TRANSPOSED, flax_shape, (math.prod(flax_shape[:-1]), flax_shape[-1]))]


def vector(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """Layouts for one number per feature or group; PyTorch's shape may be `(1, G, 1)`."""
    # Of several axes of features, the channels are the first in PyTorch and the last in Flax.
    return same_order(torch_shape, flax_shape, facts) if len(flax_shape) < 2 else []


def same_order(torch_shape: Shape, flax_shape: Shape, facts: LayerFacts) -> list[Layout]:
    """The layout for values in the same order; only axes of length 1 may differ."""
    if torch_shape != flax_shape and _squeezed(torch_shape) == _squeezed(flax_shape):
        return [reshaped(torch_shape, flax_shape)]
    return [COPIED]


# PyTorch's buffers that Flax does without, and why nothing is lost.
SKIPPED: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "num_batches_tracked": lambda _: "Flax counts no batches",
        "estbn_moving_speed": lambda x: (
            f"in Flax's batch norm {to_numpy(x).item():g} is momentum={1 - to_numpy(x).item():g}"
        ),
    }
)


def may_be_transposed(torch_shape: Shape, flax_shape: Shape) -> bool:
    """Whether the shapes are those of a transposed convolution's kernel."""
    return len(flax_shape) > 2 and FLIPPED.torch_shape(flax_shape) == torch_shape


def is_array(x: Any) -> bool:
    """Whether `x` has a shape and a dtype of numbers; it may be a shape without values."""
    # PyTorch's dtypes have no kind; NumPy's of objects, strings and times have these.
    return (
        hasattr(x, "shape")
        and hasattr(x, "dtype")
        and getattr(x.dtype, "kind", "") not in _NO_NUMBERS
    )


def shape(x: Any) -> Shape:
    """The shape as a tuple of integers."""
    return tuple(int(n) for n in x.shape)


def dtype(x: Any) -> np.dtype[Any]:
    """The dtype, as one of NumPy or `ml_dtypes`."""
    return np.dtype(str(x.dtype).removeprefix("torch."))


def kind(x: Any) -> str:
    """The kind of its numbers: `bool`, `integer`, `floating` or `complexfloating`.

    Example:
        >>> kind(np.zeros(3, "bfloat16")), kind(np.array(3))
        ('floating', 'integer')
    """
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return next(k.__name__ for k in kinds if jnp.issubdtype(dtype(x), k)).rstrip("_")


def to_numpy(x: Any) -> Array:
    """The values as a NumPy array of the same dtype, which is one of `ml_dtypes` for bfloat16."""
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x, to = x.detach().cpu(), dtype(x)
    # Copied, since PyTorch changes its tensors in place.
    return np.array(x.numpy() if to.isbuiltin == 1 else x.float().numpy(), to)


def to_jax(x: Array, to: np.dtype[Any]) -> jax.Array:
    """The values as a JAX array of a dtype."""
    return jnp.asarray(cast(x, to), to)


def array_like(like: Any, x: Array) -> Any:
    """The values as an array of the library, dtype and device of `like`."""
    if hasattr(like, "new_tensor"):
        # PyTorch takes from NumPy neither bfloat16 nor negative strides.
        plain = x if x.dtype.isbuiltin == 1 else x.astype(np.float32)
        device = "cpu" if like.is_meta else like.device
        return like.new_tensor(np.array(plain, order="C"), device=device)
    if isinstance(like, np.ndarray | np.generic):
        return np.array(x, like.dtype, order="C")
    return to_jax(x, dtype(like))


def cast(x: Array, to: np.dtype[Any]) -> Array:
    """The values rounded to a dtype."""
    with np.errstate(over="ignore"):
        return x.astype(to)


def total(terms: Sequence[Array]) -> Array:
    """The sum, rounded only later, when it takes its dtype; a single term as it is."""
    if len(terms) == 1:
        return terms[0]
    return np.sum([term.astype(np.float64) for term in terms], axis=0)


def overflow(x: Array, to: np.dtype[Any]) -> list[str]:
    """One line if a finite value would become infinite or NaN in a dtype, else none."""
    finite = np.isfinite(x)
    if np.array_equal(finite, np.isfinite(cast(x, to))):
        return []
    return [f"has values up to {float(np.abs(x[finite]).max()):g}, too large for {to}"]


def equal(x: Any, y: Any) -> bool:
    """Whether the values are equal; NaN equals NaN."""
    return np.array_equal(to_numpy(x), to_numpy(y), equal_nan=True)


def path_name(path: Path) -> str:
    """A path of Flax as it is printed."""
    return "/".join(path)


def _squeezed(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)


def _merged(layout: Layout, flax_shape: Shape, flat: Shape) -> Layout:
    """A layout for Flax's array with its heads merged into one axis, for the array as it is."""
    return layout._replace(
        how=f"{layout.how}, heads {flat} -> {flax_shape}",
        to_flax=lambda x: layout.to_flax(x).reshape(flax_shape),
        to_torch=lambda x: layout.to_torch(x.reshape(flat)),
        torch_shape=lambda _: layout.torch_shape(flat),
    )


def _flip(x: Array, first: int) -> Array:
    return np.flip(x, tuple(range(first, x.ndim)))
