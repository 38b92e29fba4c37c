"""Which convolution feeds which norm: seen in a forward pass, not guessed from names or order."""

from collections import Counter
from collections.abc import Callable, Hashable
from itertools import chain
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Path = TypeVar("Path", bound=Hashable)
Poison = Callable[[Array], Array]


class Flow(Generic[Path]):
    """The calls of the layers of interest in one forward pass, each under its module's path."""

    def __init__(self) -> None:
        """Start before the first call."""
        self._outputs: list[tuple[Path, Array]] = []
        self._inputs: list[tuple[Path, Array]] = []

    def produce(self, path: Path, y: Array) -> None:
        """Note that the convolution at `path` gave `y`."""
        self._outputs.append((path, y))

    def consume(self, path: Path, x: Array) -> None:
        """Note that the norm at `path` was given `x`."""
        self._inputs.append((path, x))

    @property
    def producers(self) -> set[Path]:
        """The convolutions that were called."""
        return {path for path, _ in self._outputs}

    def pairs(self) -> list[tuple[Path, Path]]:
        """A convolution and the norm that was given its very output, for each such call."""
        # The arrays are held here, so that no two of them have had the same id.
        made_by = {id(y): path for path, y in self._outputs}
        return [(made_by[id(x)], norm) for norm, x in self._inputs if id(x) in made_by]

    def one_to_one(self) -> dict[Path, Path]:
        """The norm after each convolution, where both ran once and neither has another partner."""
        calls = Counter(path for path, _ in self._outputs + self._inputs)
        partners = Counter(chain.from_iterable(self.pairs()))
        return {
            conv: norm
            for conv, norm in self.pairs()
            if all(partners[path] == calls[path] == 1 for path in (conv, norm))
        }


class Detour(Generic[Path]):
    """A forward pass in which some norms get the outputs of their convolutions, and nobody else.

    All others get poison. If the network gives what it always gives, there are no others.
    """

    def __init__(self, norm_after: dict[Path, Path], poison: Poison) -> None:
        """Of these pairs of convolution and norm."""
        self._conv_before = {norm: conv for conv, norm in norm_after.items()}
        self._poison = poison
        self._hidden: dict[Path, Array] = {}

    def leave(self, path: Path, y: Array) -> Array:
        """What the convolution at `path` is to give in the place of `y`."""
        if path not in self._conv_before.values():
            return y
        self._hidden[path] = y
        return self._poison(y)

    def enter(self, path: Path, x: Array) -> Array:
        """What the norm at `path` is to get in the place of `x`."""
        return self._hidden[self._conv_before[path]] if path in self._conv_before else x


def without_forks(
    norm_after: dict[Path, Path], run: Callable[[Detour[Path]], Any]
) -> dict[Path, Path]:
    """Those pairs where the output of the convolution goes to the norm and nowhere else.

    Args:
        norm_after: the norm after each convolution.
        run: gives the output of the network for a detour.
    """
    expected = run(Detour({}, jnp.zeros_like))

    def alone(pairs: dict[Path, Path]) -> bool:
        return all(_same(run(Detour(pairs, poison)), expected) for poison in (_nan, _noise))

    if alone(norm_after):
        return norm_after
    return {conv: norm for conv, norm in norm_after.items() if alone({conv: norm})}


def _nan(y: Array) -> Array:
    return jnp.full_like(y, jnp.nan)


def _noise(y: Array) -> Array:
    """For outputs that hide NaN, such as the index of the largest value."""
    return 1e4 * jax.random.normal(jax.random.key(0), y.shape, y.dtype)


def _same(actual: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(a, e, equal_nan=_inexact(e)) for a, e in pairs)


def _inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))
