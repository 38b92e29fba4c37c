"""The published variants by name: the arguments with which a layer computes the same.

| checkpoint or code                                                     | `BCN[...]`              |
|------------------------------------------------------------------------|-------------------------|
| annotated implementation (labmlai, `normalization/batch_channel_norm`) | `"annotated"`, default  |
| authors' README (`BCNorm(estimate=True)` with `EstBN`)                 | `"authors_readme"`      |
| authors' README, `estimate=False`; ImageNet `GN`; DeepLab `PBCNorm`    | `"authors_large_batch"` |

| checkpoint or code                                                     | `WS[...]`               |
|------------------------------------------------------------------------|-------------------------|
| annotated implementation; authors' ImageNet code for BCN               | `"annotated"`, default  |
| authors' WS README in PyTorch; their DeepLabV3; mmcv `ConvWS2d`        | `"authors_pytorch"`     |
| authors' WS README (TF); big_vision `bit.py`, vision_transformer       | `"authors_tensorflow"`  |
| BiT: big_transfer, big_vision `bit_paper.py`, scenic; Composer         | `"bit"`                 |
| timm `StdConv2d`, except in its BiT models                             | `"timm"`                |
| Hugging Face transformers' BiT; timm's BiT models                      | `"hf_bit"`              |
| TensorFlow DeepLab `conv2d_ws`                                         | `"tf_deeplab"`          |
| timm `ScaledStdConv2d`                                                 | `"timm_scaled"`         |
| DeepMind's NFNets `WSConv2D`                                           | `"nfnet"`               |

The same names are in `bcn_torch.variants`.

Example:
    >>> from bcn_flax import BatchChannelNorm, WSConv
    >>> from bcn_flax.variants import BCN, WS
    >>> norm = BatchChannelNorm(**{**BCN["authors_readme"], "momentum": 0.9})
    >>> conv = WSConv(64, (3, 3), standardization=WS["authors_pytorch"])
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bcn_flax.weight_standardization import Standardization

BCN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "annotated": MappingProxyType(
            {
                "estimate": True,
                "running_variance": "biased",
                "momentum": 0.9,
                "epsilon": 1e-5,
            }
        ),
        # In the published code the update rate is a buffer that is 0 and never set, so the running
        # averages never change. A checkpoint may hold another rate: `momentum` is 1 - rate.
        "authors_readme": MappingProxyType(
            {
                "estimate": True,
                "running_variance": "around_running_mean",
                "momentum": 1.0,
                "batch_epsilon": 1e-5,
            }
        ),
        "authors_large_batch": MappingProxyType(
            {
                "estimate": False,
                "running_variance": "unbiased",
                "momentum": 0.9,
                "epsilon": 1e-5,
                "batch_epsilon": 1e-5,
            }
        ),
    }
)
"""Arguments of `BatchChannelNorm`. "authors_readme" never updates its statistics as published: give
it a `momentum`."""

WS: Mapping[str, Standardization] = MappingProxyType(
    {
        "annotated": Standardization(),
        "authors_pytorch": Standardization(epsilon_role="added_to_deviation"),
        "authors_tensorflow": Standardization(unbiased=False, epsilon_role="added_to_deviation"),
        "bit": Standardization(unbiased=False, epsilon=1e-10),
        "timm": Standardization(unbiased=False, epsilon=1e-6),
        "hf_bit": Standardization(unbiased=False, epsilon=1e-8),
        "tf_deeplab": Standardization(unbiased=False),
        "timm_scaled": Standardization(
            unbiased=False, epsilon=1e-6, fan_in_scaling=True, gain=True
        ),
        "nfnet": Standardization(
            unbiased=False,
            epsilon=1e-4,
            epsilon_role="least_variance",
            fan_in_scaling=True,
            gain=True,
        ),
    }
)
"""The argument `standardization` of `WSConv`, `WSConvTranspose` and `WSDense`."""
