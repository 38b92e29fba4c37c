"""Which convolution feeds which norm: seen in a forward pass, not guessed from names or order."""

from collections import Counter
from collections.abc import Hashable
from itertools import chain
from typing import Generic, TypeVar

from jax import Array

Path = TypeVar("Path", bound=Hashable)


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
