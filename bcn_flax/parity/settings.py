"""Arguments of layers that are the same layer and have other values."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from bcn_flax.parity import modules
from bcn_flax.parity.observations import Values
from bcn_flax.parity.twins import Twins

# In Flax and in PyTorch.
_SAME = (("epsilon", "eps"), ("num_groups", "num_groups"), ("negative_slope", "negative_slope"))


def different_settings(them: Twins, inputs: Sequence[Values]) -> Iterator[str]:
    """A sentence for each."""
    flax = modules.flax_modules(them, inputs)
    torch = dict(them.torch.named_modules())
    for path, name in modules.pairs(them).items():
        ours, theirs = flax.get(path), torch[name]
        where = modules.written(path)
        for flax_name, torch_name in _SAME:
            a, b = getattr(ours, flax_name, None), getattr(theirs, torch_name, None)
            if _differ(a, b):
                yield f"{where}: {flax_name} is {a:g} in Flax, and {torch_name} {b:g} in PyTorch."
        yield from _different_momentum(where, ours, theirs)


def _different_momentum(where: str, flax: Any, torch: Any) -> Iterator[str]:
    a, b = getattr(flax, "momentum", None), getattr(torch, "momentum", None)
    if b is not None and _differ(a, 1 - b):
        yield (
            f"{where}: momentum is {a:g} in Flax and {b:g} in PyTorch, where it is the weight of "
            f"the new value: {1 - b:g} in Flax's words."
        )


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and not math.isclose(a, b)
