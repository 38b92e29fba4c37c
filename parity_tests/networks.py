"""Whole networks side by side: where layers meet, and weights change their layout in every way."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bcn_flax.models import VGG
from bcn_flax.parity import Optimizer, adam, assert_parity, sgd

SMALL = ((8, 8), (16,))
# As deep as the published network, of a quarter of its features.
DEEP = ((16, 16), (32, 32), (64,) * 3, (128,) * 3, (128,) * 3)


def vgg(
    blocks: tuple[tuple[int, ...], ...] = SMALL,
    size: int = 9,
    *,
    optimizer: Optimizer,
    norm: str = "bcn",
    ws: bool = True,
    estimate: bool = True,
    groups: int = 4,
    steps: int = 3,
) -> None:
    """Fail unless both networks train alike, in float64."""
    import bcn_torch

    shared: dict[str, Any] = {"norm": norm, "ws": ws, "estimate": estimate}
    images = np.random.default_rng(0).normal(size=(4, size, size, 3))
    assert_parity(
        VGG(blocks, **shared, num_groups=groups, param_dtype=jnp.float64),
        bcn_torch.VGG(blocks, **shared, groups=groups).double(),
        images,
        optimizer=optimizer,
        steps=steps,
        eager=False,
    )


class Upsampler(nn.Module):
    """A transposed convolution, and a dense layer of flattened images."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (3, 2), strides=(2, 2), padding="VALID", name="up")(x)
        return nn.Dense(5, name="head")(nn.relu(x).reshape(len(x), -1))


def upsampler() -> None:
    """Fail unless flipped and flattened kernels compute the same on both sides."""
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
    """A transposed convolution with as many inputs as outputs, whose layout no shape tells."""

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
    """Fail unless the kernel is laid out as Flax's argument says."""
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


# Adam only where no gradient is 0 but for rounding: that of a bias is, ahead of a batch norm by the
# batch's own mean, and Adam would make a whole step of it.
NETWORKS: Mapping[str, Callable[[], None]] = {
    "VGG bcn": lambda: vgg(optimizer=adam(2.5e-4)),
    "VGG gn": lambda: vgg(norm="gn", optimizer=adam(2.5e-4)),
    "VGG bcn by the batch": lambda: vgg(estimate=False, optimizer=sgd(0.01)),
    "VGG bn without ws": lambda: vgg(norm="bn", ws=False, optimizer=sgd(0.01)),
    "upsampler": upsampler,
    "square upsampler": lambda: square_upsampler(transpose_kernel=False),
    "square upsampler, transposed": lambda: square_upsampler(transpose_kernel=True),
}
