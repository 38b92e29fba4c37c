"""The precision of the arithmetic."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if it is as wide."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
