"""Batch-Channel Normalization and Weight Standardization for JAX and Flax.

The layers here are those of `bcn_flax.linen`. The algebra they stand on is in `bcn_flax.affine`.
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
