"""Whole networks of Flax and PyTorch, whose weights differ in layout in every way there is."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bcn_flax import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import VGG
from bcn_flax.parity import Optimizer, adam, assert_parity, sgd

Blocks = tuple[tuple[int, ...], ...]

SMALL: Blocks = ((8, 8), (16,))
# As deep as the published network, with a quarter of its features.
DEEP: Blocks = ((16, 16), (32, 32), (64,) * 3, (128,) * 3, (128,) * 3)


def vgg_pair(
    blocks: Blocks,
    norm: str = "bcn",
    *,
    ws: bool = True,
    groups: int = 4,
    estimate: bool = True,
    dtype: str = "float32",
) -> tuple[VGG, Any]:
    """The same VGG in Flax and in PyTorch; `norm` is bcn, bn, gn or none."""
    import torch

    import bcn_torch

    norms: dict[str, tuple[Any, Any]] = {
        "bcn": (
            partial(BatchChannelNorm, num_groups=groups, estimate=estimate),
            partial(bcn_torch.BatchChannelNorm, groups=groups, estimate=estimate),
        ),
        "bn": (BatchNorm, bcn_torch.BatchNorm),
        "gn": (
            partial(nn.GroupNorm, num_groups=groups, epsilon=1e-5),
            partial(torch.nn.GroupNorm, groups),
        ),
        "none": (None, None),
    }
    convs = (WSConv, bcn_torch.WSConv2d) if ws else (nn.Conv, torch.nn.Conv2d)
    return (
        VGG(blocks, conv=convs[0], norm=norms[norm][0], param_dtype=jnp.dtype(dtype)),
        bcn_torch.VGG(blocks, conv=convs[1], norm=norms[norm][1]).to(getattr(torch, dtype)),
    )


def vgg(
    norm: str = "bcn",
    blocks: Blocks = SMALL,
    *,
    size: int = 9,
    optimizer: Optimizer,
    steps: int = 3,
    **options: Any,
) -> None:
    """Fail unless both networks train alike, in float64."""
    model, module = vgg_pair(blocks, norm, dtype="float64", **options)
    images = np.random.default_rng(0).normal(size=(4, size, size, 3))
    assert_parity(model, module, images, optimizer=optimizer, steps=steps, eager=False)


class Upsampler(nn.Module):
    """A transposed convolution, and a dense layer of flattened images."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (3, 2), strides=(2, 2), padding="VALID", name="up")(x)
        return nn.Dense(5, name="head")(nn.relu(x).reshape(len(x), -1))


def upsampler() -> None:
    """Fail unless flipped and flattened kernels compute the same in Flax and PyTorch."""
    import torch

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ConvTranspose2d(3, 4, (3, 2), stride=2)
            self.head = torch.nn.Linear(4 * 7 * 8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.up(x)).flatten(1))

    images = np.random.default_rng(0).normal(size=(2, 3, 4, 3))
    assert_parity(Upsampler(), Torch().double(), images, flattened={"head": 4}, eager=False)


class SquareUpsampler(nn.Module):
    """A transposed convolution whose inputs and outputs are as many: its shape tells no layout."""

    transpose_kernel: bool

    @nn.compact
    def __call__(self, x):
        return nn.ConvTranspose(
            3,
            (3, 2),
            strides=(2, 2),
            padding="VALID",
            transpose_kernel=self.transpose_kernel,
            name="up",
        )(x)


def square_upsampler(transpose_kernel: bool) -> None:
    """Fail unless the kernel has the layout that Flax's argument declares."""
    import torch

    module = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 3, (3, 2), stride=2))
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 3))
    assert_parity(
        SquareUpsampler(transpose_kernel),
        module.double(),
        images,
        names={"0": "up"},
        transposed={"0": transpose_kernel},
        eager=False,
    )


# Not Adam if a gradient is 0 but for rounding, of which Adam makes a whole step. The gradient of a
# bias is, if a batch norm by the batch's own mean follows.
NETWORKS: Mapping[str, Callable[[], None]] = {
    "VGG bcn": lambda: vgg(optimizer=adam(2.5e-4)),
    "VGG gn": lambda: vgg("gn", optimizer=adam(2.5e-4)),
    "VGG bcn by the batch": lambda: vgg(estimate=False, optimizer=sgd(0.01)),
    "VGG bn without ws": lambda: vgg("bn", ws=False, optimizer=sgd(0.01)),
    "upsampler": upsampler,
    "square upsampler": lambda: square_upsampler(transpose_kernel=False),
    "square upsampler, transposed": lambda: square_upsampler(transpose_kernel=True),
}
