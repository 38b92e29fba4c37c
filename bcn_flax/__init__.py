"""Batch-Channel Normalization and Weight Standardization for JAX and Flax.

These are the layers of `bcn_flax.linen`; those for NNX are in `bcn_flax.nnx`. The algebra is in
`bcn_flax.affine`.
"""

from bcn_flax.affine import MOMENTS
from bcn_flax.linen import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.weight_standardization import Standardization, standardize_kernel

__version__ = "0.1.0"

__all__ = [
    "MOMENTS",
    "BatchChannelNorm",
    "BatchNorm",
    "ChannelNorm",
    "EstimatedBatchNorm",
    "Standardization",
    "WSConv",
    "WSConvTranspose",
    "WSDense",
    "standardize_kernel",
]
