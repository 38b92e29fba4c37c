"""PyTorch's layers for the table of cases."""

from collections.abc import Mapping
from typing import Any

import torch

import bcn_torch

_WORDS = {
    "num_groups": "groups",
    "epsilon": "eps",
    "batch_epsilon": "batch_eps",
    "use_bias": "bias",
    "strides": "stride",
}


def layer(name: str, shape: tuple[int, ...], options: Mapping[str, Any]) -> torch.nn.Module:
    """The layer of this name in `bcn_torch`, from Flax's arguments.

    Args:
        name: Flax's.
        shape: of the input, channels last.
        options: Flax's.
    """
    options = {_WORDS.get(key, key): value for key, value in options.items()}
    if "standardization" in options:
        options["standardization"] = bcn_torch.Standardization(*options["standardization"])
    if "momentum" in options:
        options["momentum"] = 1 - options["momentum"]
    first = [shape[-1]]
    if "features" in options:
        first.append(options.pop("features"))
    if name == "WSConv":
        name = f"WSConv{len(shape) - 2}d"
    return getattr(bcn_torch, {"WSDense": "WSLinear"}.get(name, name))(*first, **options)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values whose channels have different means and spreads."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ramp = torch.arange(1.0, shape[1] + 1).view(1, -1, *(1,) * (len(shape) - 2))
    return (ramp + 0.5 * ramp * x).to(dtype)


def estimates_stay_wide() -> None:
    """Fail if a module in half precision rounds its running estimates."""
    norm = bcn_torch.EstimatedBatchNorm(8)
    norm.exp_mean += 1 / 3
    before = norm.exp_mean.clone()
    torch.testing.assert_close(norm.bfloat16().exp_mean, before, rtol=0, atol=0)


def weights_are_standardized_wide() -> None:
    """Fail if weights in half precision are rounded more than once."""
    weight = torch.linspace(2, 4, 240).reshape(6, 40).bfloat16()
    once = bcn_torch.standardize_weight(weight.float()).bfloat16()
    torch.testing.assert_close(bcn_torch.standardize_weight(weight), once, rtol=0, atol=0)


HALF_PRECISION = {
    "PyTorch's estimates stay wide": estimates_stay_wide,
    "PyTorch's weights are standardized wide": weights_are_standardized_wide,
}


class Kept(torch.nn.Module):
    """A layer that gets the first samples only, with channels last in memory."""

    def __init__(self, layer: torch.nn.Module, kept: int) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels_last = x[: self.kept].movedim(1, -1).contiguous()
        return self.layer(channels_last.movedim(-1, 1))
