"""Which convolution feeds which norm: seen in a forward pass, not guessed from names or order."""

from collections import Counter
from collections.abc import Hashable
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

    @property
    def producers(self) -> list[Path]:
        """The convolutions that were called, in order."""
        return list(dict.fromkeys(path for path, _ in self._outputs))

    @property
    def consumers(self) -> list[Path]:
        """The norms that were called, in order."""
        return list(dict.fromkeys(path for path, _ in self._inputs))

    def feeders(self) -> dict[Path, Path]:
        """For each norm, the convolution whose very output it is given.

        Without the norms that are given anything else, and without those where the convolution or
        the norm is called more than once.
        """
        # The arrays are held here, so that no two of them have had the same id.
        made_by = {id(y): path for path, y in self._outputs}
        calls = Counter(path for path, _ in self._outputs + self._inputs)
        pairs = [(norm, made_by[id(x)]) for norm, x in self._inputs if id(x) in made_by]
        return {norm: conv for norm, conv in pairs if calls[norm] == calls[conv] == 1}
