"""PyTorch's layers for the table of cases."""

from collections.abc import Mapping
from typing import Any

import torch

import bcn_torch
from parity_tests.cases import STANDARDIZATIONS

_WORDS = {
    "num_groups": "groups",
    "epsilon": "eps",
    "batch_epsilon": "batch_eps",
    "use_bias": "bias",
    "strides": "stride",
}


def layer(name: str, shape: tuple[int, ...], options: Mapping[str, Any]) -> torch.nn.Module:
    """The layer of this name in `bcn_torch`, its arguments given in Flax's words.

    Args:
        name: Flax's.
        shape: of the input, channels last.
        options: Flax's.
    """
    options = {_WORDS.get(key, key): value for key, value in options.items()}
    if "standardization" in options:
        standardization = STANDARDIZATIONS[options["standardization"]]
        options["standardization"] = bcn_torch.Standardization(*standardization)
    if "momentum" in options:
        options["momentum"] = 1 - options["momentum"]
    first = [shape[-1]]
    if "features" in options:
        first.append(options.pop("features"))
    if name == "WSConv":
        name = f"WSConv{len(shape) - 2}d"
    return getattr(bcn_torch, {"WSDense": "WSLinear"}.get(name, name))(*first, **options)


class Kept(torch.nn.Module):
    """A layer that is given the first samples only, with the channels last in memory."""

    def __init__(self, layer: torch.nn.Module, kept: int) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels_last = x[: self.kept].movedim(1, -1).contiguous()
        return self.layer(channels_last.movedim(-1, 1))
