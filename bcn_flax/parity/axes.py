"""How the axes of inputs and outputs lie: channels last in Flax, channels first in PyTorch."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

Values = np.ndarray[Any, Any]


class AxisOrder(NamedTuple):
    """One way in which an array's axes lie in Flax and in PyTorch.

    Attributes:
        how: what it is, for messages.
        to_torch: from Flax's order to PyTorch's.
        to_flax: and back.
    """

    how: str
    to_torch: Callable[[Values], Values]
    to_flax: Callable[[Values], Values]


SAME = AxisOrder("the same on both sides", lambda x: x, lambda x: x)

CHANNELS = AxisOrder(
    "channels last in Flax, first in PyTorch",
    lambda x: np.moveaxis(x, -1, 1),
    lambda x: np.moveaxis(x, 1, -1),
)

Axes = Mapping[int | str, AxisOrder]

# By rank, or by name ("input 1", "output"), which wins. Three axes may be (batch, length, channels)
# with or without an order to change, so that somebody has to say.
AXES: Axes = MappingProxyType({0: SAME, 1: SAME, 2: SAME, 4: CHANNELS, 5: CHANNELS})


def axis_order(axes: Axes, name: str, rank: int) -> AxisOrder:
    """The order of an input's or output's axes.

    Raises:
        ValueError: nobody said it.
    """
    order = axes.get(name, axes.get(rank))
    if order is None:
        raise ValueError(
            f"Whether the channels change their place must be known of every input and output, but "
            f"the {name} has {rank} axes, for which there is no rule. Say "
            f"axes={{**AXES, {rank}: SAME}} if PyTorch's module has them in the same order, "
            f"axes={{**AXES, {rank}: CHANNELS}} if there the channels are the second axis, or give "
            f"{name!r} an order of its own."
        )
    return order
