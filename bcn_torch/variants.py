"""The published variants by name: the arguments with which a layer computes the same.

`BCN` has keyword arguments of `BatchChannelNorm`, `WS` the `standardization` of the
weight-standardized layers:

    BatchChannelNorm(64, 32, **BCN["authors_large_batch"])
    WSConv2d(3, 64, 3, standardization=WS["nfnet"])

The names of `BCN`:

    "annotated": the default.
        `labml_nn/normalization/batch_channel_norm`.
    "authors_readme": THE RUNNING ESTIMATES NEVER CHANGE UNLESS A MOMENTUM IS GIVEN.
        `BCNorm(estimate=True)` with `EstBN`, the README of
        joe-siyuan-qiao/Batch-Channel-Normalization.
    "authors_large_batch": normalizes with the batch statistics, for large batches.
        `GN` of `imagenet/models/layers.py` and `PBCNorm` of `DeepLabV3`, same repository.

In the authors' README the weight of the new value is a buffer that starts at 0, and no published
code sets it. So the variant has `momentum=0.0`, and the running estimates stay at mean 0 and
variance 1. To train with it, give a momentum:

    BatchChannelNorm(64, 32, **{**BCN["authors_readme"], "momentum": 0.1})

The names of `WS`, with the divisor of `w - mean`; `var` is the biased variance and N the fan-in:

    "annotated": sqrt(unbiased var + 1e-5), the default.
        `labml_nn/normalization/weight_standardization`; the authors' `imagenet/models/layers.py`.
    "authors_pytorch": sqrt(unbiased var) + 1e-5.
        README of joe-siyuan-qiao/WeightStandardization; the authors' DeepLabV3; mmcv `ConvWS2d`.
    "authors_tensorflow": sqrt(var) + 1e-5.
        The same README, for TensorFlow; big_vision `bit.py`; google-research/vision_transformer.
    "bit": sqrt(var + 1e-10).
        google-research/big_transfer; big_vision `bit_paper.py`; scenic; MosaicML Composer.
    "timm": sqrt(var + 1e-6).
        timm `StdConv2d`, except in its BiT models.
    "hf_bit": sqrt(var + 1e-8).
        BiT of Hugging Face's transformers; timm `StdConv2d` in its BiT models.
    "tf_deeplab": sqrt(var + 1e-5).
        `conv2d_ws` of the TensorFlow DeepLab.
    "timm_scaled": sqrt(N * (var + 1e-6)), and a learned gain.
        timm `ScaledStdConv2d`; `gamma` is its argument of that name.
    "nfnet": sqrt(max(N * var, 1e-4)), and a learned gain.
        `WSConv2D` of DeepMind's NFNets.

Example:
    >>> from bcn_torch import BatchChannelNorm, WSConv2d
    >>> from bcn_torch.variants import BCN, WS
    >>> BatchChannelNorm(64, 32, **BCN["authors_large_batch"]).batch_norm.running_variance
    'unbiased'
    >>> WSConv2d(3, 64, 3, standardization=WS["timm_scaled"]._replace(gamma=1.7)).gain.shape
    torch.Size([64])
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bcn_torch.weight_standardization import Standardization

BCN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "annotated": MappingProxyType(
            {"estimate": True, "running_variance": "biased", "momentum": 0.1, "eps": 1e-5}
        ),
        # As published. With a momentum of 0 the running estimates never change.
        "authors_readme": MappingProxyType(
            {
                "estimate": True,
                "running_variance": "around_running_mean",
                "momentum": 0.0,
                "batch_eps": 1e-5,
            }
        ),
        "authors_large_batch": MappingProxyType(
            {
                "estimate": False,
                "running_variance": "unbiased",
                "momentum": 0.1,
                "eps": 1e-5,
                "batch_eps": 1e-5,
            }
        ),
    }
)
"""Arguments of `BatchChannelNorm`. "authors_readme" never updates its estimates as published: give
it a `momentum`."""

WS: Mapping[str, Standardization] = MappingProxyType(
    {
        "annotated": Standardization(),
        "authors_pytorch": Standardization(eps_role="added_to_deviation"),
        "authors_tensorflow": Standardization(unbiased=False, eps_role="added_to_deviation"),
        "bit": Standardization(unbiased=False, eps=1e-10),
        "timm": Standardization(unbiased=False, eps=1e-6),
        "hf_bit": Standardization(unbiased=False, eps=1e-8),
        "tf_deeplab": Standardization(unbiased=False),
        "timm_scaled": Standardization(unbiased=False, eps=1e-6, fan_in_scaling=True, gain=True),
        "nfnet": Standardization(
            unbiased=False, eps=1e-4, eps_role="least_variance", fan_in_scaling=True, gain=True
        ),
    }
)
"""The argument `standardization` of `WSConv1d`, `WSConv2d`, `WSConv3d` and `WSLinear`."""
