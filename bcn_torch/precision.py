"""In which precision the arithmetic is done."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is already as wide."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
