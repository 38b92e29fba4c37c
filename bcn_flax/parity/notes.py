"""What a reader of a comparison should know, whatever its outcome."""

from collections.abc import Iterator, Sequence
from typing import Any

from bcn_flax.parity import torch_side
from bcn_flax.parity.twins import Twins, Weights, constants

_SHOWN = 4  # names


def of(
    torch_module: Any, native: Twins, weights: Weights, narrowing: Sequence[str]
) -> Iterator[str]:
    """Sentences.

    Args:
        torch_module: the caller's.
        native: the modules as they are compared.
        weights: whose count.
        narrowing: who computes in less than float64 if given float64.
    """
    if narrowing:
        yield (
            f"Given float64, {' and '.join(narrowing)} still compute{'s' * (len(narrowing) == 1)} "
            "in a narrower type somewhere, as a cast or a `dtype` says: there is no comparison in "
            "float64, and so no telling of formulas from roundings."
        )
    if frozen := torch_side.frozen(torch_module):
        yield f"Trained here, though PyTorch has them frozen: {_listed(frozen)}."
    if weights != "random" and (same := constants(native)):
        yield (
            f"All of one value, as in a fresh module, so that a mix-up of them would not be seen: "
            f'{_listed(same)}. Say weights="random" to draw values for all.'
        )


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    return ", ".join(names[:_SHOWN]) + more
