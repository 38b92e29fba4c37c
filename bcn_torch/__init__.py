"""Batch-Channel Normalization and Weight Standardization in PyTorch: the reference.

Every layer follows the paper stage by stage, with the equation beside each line. Nothing in the
layers is clever: read them to learn the method, and test faster implementations against them.

Source: Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and
Weight Standardization", arXiv 1903.10520.
"""

from bcn_torch import variants
from bcn_torch.norms import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    frozen_statistics,
)
from bcn_torch.surgery import convert_batch_norm, fold, recalibrate
from bcn_torch.vgg import VGG
from bcn_torch.weight_standardization import (
    Standardization,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLinear,
    standardize_weight,
)

__version__ = "0.1.0"

__all__ = [
    "VGG",
    "BatchChannelNorm",
    "BatchNorm",
    "ChannelNorm",
    "EstimatedBatchNorm",
    "Standardization",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSLinear",
    "convert_batch_norm",
    "fold",
    "frozen_statistics",
    "recalibrate",
    "standardize_weight",
    "variants",
]
