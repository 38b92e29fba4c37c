"""Which norm reads which layer's output: seen in a forward pass, not guessed from names or order.

linen and NNX each have a function `run(observer)`, which runs the model and tells the observer of
the layers and norms that are called. The rest is here, for both.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Path = TypeVar("Path", bound=Hashable)
PathArgument = TypeVar("PathArgument", bound=Hashable, contravariant=True)


class Observer(Protocol[PathArgument]):
    """Sees, and may replace, what layers return and what norms are given.

    `foldable` is false if the module is called in a way that a folded one could not be.
    """

    def layer_output(self, layer: PathArgument, y: Array, foldable: bool) -> Array:
        """Return the array to use as the output `y` of `layer`."""

    def norm_input(self, norm: PathArgument, x: Array, foldable: bool) -> Array:
        """Return the array to use as the input `x` of `norm`."""


Run = Callable[[Observer[Path]], Any]


class Calls(Generic[Path]):
    """An observer that records the calls of layers and norms."""

    def __init__(self) -> None:
        """Start with no calls."""
        self._count: Counter[Path] = Counter()
        self._outputs: list[tuple[Path, Array]] = []
        self._inputs: list[tuple[Path, Array]] = []

    def layer_output(self, layer: Path, y: Array, foldable: bool) -> Array:
        """Record that `layer` returned `y`."""
        self._count[layer] += 1
        if foldable:
            self._outputs.append((layer, y))
        return y

    def norm_input(self, norm: Path, x: Array, foldable: bool) -> Array:
        """Record that `norm` was given `x`."""
        self._count[norm] += 1
        if foldable:
            self._inputs.append((norm, x))
        return x

    @property
    def layers(self) -> list[Path]:
        """The layers with a foldable call, in the order of their first one."""
        return list(dict.fromkeys(layer for layer, _ in self._outputs))

    def pairs(self) -> list[tuple[Path, Path]]:
        """Each call of a norm on the very output of a layer, as (layer, norm)."""
        # The arrays are held here, so that no two of them have had the same id.
        made_by = {id(y): layer for layer, y in self._outputs}
        return [(made_by[id(x)], norm) for norm, x in self._inputs if id(x) in made_by]

    def one_to_one(self) -> dict[Path, Path]:
        """The norm after each layer, if both ran once and neither has another partner."""
        pairs = self.pairs()
        partners = Counter(chain.from_iterable(pairs))
        return {
            layer: norm
            for layer, norm in pairs
            if all(partners[path] == self._count[path] == 1 for path in (layer, norm))
        }


def record(run: Run[Path]) -> Calls[Path]:
    """The calls of layers and norms while the model is traced."""
    calls: Calls[Path] = Calls()

    def forward() -> None:
        run(calls)

    jax.eval_shape(forward)
    return calls


def sole_readers(calls: Calls[Path], run: Run[Path]) -> dict[Path, Path]:
    """The norm after each layer, if nothing but that norm reads the layer's output.

    To every other reader the output is replaced, first by NaN and then by large random numbers. If
    the model still returns the same, there is no other reader.
    """
    norm_after = calls.one_to_one()
    expected = run(_Replacement({}, _nan))

    def unread(pairs: dict[Path, Path]) -> bool:
        replaced = (run(_Replacement(pairs, values)) for values in (_nan, _noise))
        return all(_same(actual, expected) for actual in replaced)

    if unread(norm_after):
        return norm_after
    return {layer: norm for layer, norm in norm_after.items() if unread({layer: norm})}


class _Replacement(Generic[Path]):
    """An observer that replaces the outputs of layers, except as inputs of the norms after them."""

    def __init__(self, norm_after: dict[Path, Path], values: Callable[[Array], Array]) -> None:
        self._layer_before = {norm: layer for layer, norm in norm_after.items()}
        self._values = values
        self._outputs: dict[Path, Array] = {}

    def layer_output(self, layer: Path, y: Array, foldable: bool) -> Array:
        del foldable
        if layer not in self._layer_before.values():
            return y
        self._outputs[layer] = y
        return self._values(y)

    def norm_input(self, norm: Path, x: Array, foldable: bool) -> Array:
        del foldable
        return self._outputs[self._layer_before[norm]] if norm in self._layer_before else x


def _nan(y: Array) -> Array:
    return jnp.full_like(y, jnp.nan)


def _noise(y: Array) -> Array:
    """For outputs in which NaN does not show, such as the index of the largest value."""
    return 1e4 * jax.random.normal(jax.random.key(0), y.shape, y.dtype)


def _same(actual: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(a, e, equal_nan=_inexact(e)) for a, e in pairs)


def _inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def require_foldable(layers: Collection[object]) -> None:
    """Raise a `ValueError` if no layer can be folded."""
    if not layers:
        raise ValueError(
            "The model must have something to fold, a standardized kernel, or a batch norm of this "
            "library right after a convolution or dense layer, but on the example input neither "
            "was called."
        )
