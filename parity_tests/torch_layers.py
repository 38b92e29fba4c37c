"""PyTorch's layers for the table of cases."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from flax.traverse_util import flatten_dict

import bcn_torch
from parity_tests import contract, layout

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


class Torch:
    """bcn_torch, as an implementation of the contract."""

    NAMES: ClassVar = {"scale": "scale", "bias": "shift", "mean": "exp_mean", "var": "exp_var"}
    OPTIONS: ClassVar = {"momentum", "epsilon", "batch_epsilon", "estimate", "running_variance"}
    FLAGS: ClassVar = {"use_running_average", "update_stats"}

    def has(self, row: contract.Row) -> bool:
        """Whether its layer has these arguments."""
        grouped = row.groups != 32 and not row.mask and row.data.stored == row.data.dtype
        return grouped and row.options.keys() <= {
            *(self.OPTIONS | self.FLAGS),
            "num_groups",
            "group_size",
        }

    def roundings(self, row: contract.Row) -> float:
        """By how many the output may be off: a mean is rounded at its own size."""
        return row.data.roundings + row.data.far

    def make(self, row: contract.Row) -> tuple[torch.nn.Module, dict[tuple[str, ...], Any]]:
        """A layer in the mode of the row, and its tensors by Flax's paths."""
        options = {k: v for k, v in row.options.items() if k in self.OPTIONS}
        if row.layer in ("ChannelNorm", "BatchChannelNorm"):
            options["num_groups"] = row.groups
        flags = {**row.options, **row.call}
        like = torch.from_numpy(np.empty(0, row.data.dtype))
        made = layer(row.layer, row.shape, options).to(like.dtype)
        made.train(not flags.get("use_running_average", False))
        if "update_stats" in flags:
            made.update_stats = flags["update_stats"]
        paths = row.initial(lambda *_: None)
        return made, {p: attrgetter(".".join([*p[1:-1], self.NAMES[p[-1]]]))(made) for p in paths}

    def start(self, row: contract.Row, x: np.ndarray) -> dict[tuple[str, ...], np.ndarray]:
        """The initial variables, flat."""
        made, tensors = self.make(row)
        assert len(made.state_dict()) == len(tensors)
        return {path: tensor.detach().numpy() for path, tensor in tensors.items()}

    def see(
        self, row: contract.Row, variables: Any, x: np.ndarray, dy: np.ndarray, mask: None
    ) -> contract.Seen:
        """The results of a call."""
        made, tensors = self.make(row)
        for path, value in flatten_dict(variables).items():
            tensors[path].data.copy_(torch.from_numpy(value))
        x = layout.to_torch(x).requires_grad_()
        y = made(x)
        y.backward(layout.to_torch(dy).to(y.dtype))
        statistics = {"/".join(p[1:]): v.numpy() for p, v in tensors.items() if not v.requires_grad}
        gradients = {"/".join(p[1:]): v.grad.numpy() for p, v in tensors.items() if v.requires_grad}
        return contract.Seen(layout.to_flax(y), statistics, gradients, layout.to_flax(x.grad))


TORCH_CONTRACT = contract.checks({"PyTorch": Torch()})


class Kept(torch.nn.Module):
    """A layer that gets the first samples only, with channels last in memory."""

    def __init__(self, layer: torch.nn.Module, kept: int) -> None:
        super().__init__()
        self.layer, self.kept = layer, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels_last = x[: self.kept].movedim(1, -1).contiguous()
        return self.layer(channels_last.movedim(-1, 1))
