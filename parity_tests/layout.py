"""The order of the axes: channels last in Flax, channels first in PyTorch.

The layout of kernels is the business of `bcn_flax.interop`, which is under test as well.
"""

import numpy as np
import torch


def to_torch(x: np.ndarray) -> torch.Tensor:
    """An activation `(n, *space, c)` as a tensor `[n, c, *space]`."""
    x = np.moveaxis(np.asarray(x), -1, 1)
    if x.dtype.name == "bfloat16":  # which NumPy does not know, so that PyTorch cannot take it over
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16()
    return torch.from_numpy(np.ascontiguousarray(x))


def to_flax(x: torch.Tensor) -> np.ndarray:
    """A tensor `[n, c, *space]` as an array `(n, *space, c)`; bfloat16 becomes float32."""
    x = x.detach()
    x = x.float() if x.dtype == torch.bfloat16 else x
    return np.moveaxis(x.numpy(), 1, -1)
