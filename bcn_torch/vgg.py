"""The network that the annotated implementation trains on CIFAR-10."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from bcn_torch import checks
from bcn_torch.norms import BatchChannelNorm
from bcn_torch.weight_standardization import WSConv2d

BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
NORM = partial(BatchChannelNorm, groups=32)


class VGG(nn.Module):
    """A VGG-style image classifier: blocks of 3x3 convolutions, each with a norm and a ReLU.

        blocks -> mean over space -> linear

    Each block ends in a 2x2 max pool, so that images must be at least `2**len(blocks)` wide and
    high. The space axes that remain are averaged; at the smallest size there is nothing to average
    and this is the network of the annotated implementation, whose checkpoints load as they are.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from bcn_torch import VGG, BatchChannelNorm
        >>> model = VGG(blocks=((32,), (64, 64)), norm=partial(BatchChannelNorm, groups=16))
        >>> model(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source: Qiao et al., arXiv 1903.10520, for the norm and the standardized weights; the network is
    that of the annotated implementation (`labml_nn/normalization/weight_standardization`).
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]] = BLOCKS,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        conv: Callable[..., nn.Module] = WSConv2d,
        norm: Callable[[int], nn.Module] | None = NORM,
    ) -> None:
        """Make the layers.

        Args:
            blocks: the output channels of each convolution of each block.
            in_channels: channels of the images.
            num_classes: number of outputs.
            conv: the class of the convolutions, `WSConv2d` or `nn.Conv2d`, or a `partial` of one.
            norm: makes a norm for a number of channels, for example `BatchNorm`,
                `partial(BatchChannelNorm, groups=16)` or `partial(nn.GroupNorm, 16)`; None for no
                norms.

        Raises:
            ValueError: there is no block, a block is empty, or groups do not divide the channels.
        """
        super().__init__()
        found = _require_blocks(blocks)
        checks.require_callable("conv", conv)
        if norm is not None:
            checks.require_callable("norm", norm)
        self.in_channels = last = checks.require_channel_count(in_channels, "in_channels")
        self.halvings = len(found)
        layers: list[nn.Module] = []
        for block in found:
            for channels in block:
                layers.append(conv(last, channels, kernel_size=3, padding=1))
                if norm is not None:
                    layers.append(norm(channels))
                layers.append(nn.ReLU())
                last = channels
            layers.append(nn.MaxPool2d(2, 2))
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(last, checks.require_channel_count(num_classes, "num_classes"))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, `[batch, in_channels, height, width]`, as logits, `[batch, classes]`.

        Raises:
            ValueError: `x` is no such batch, or its images are too small.
        """
        _require_images(x, self.in_channels, self.halvings)
        return self.fc(self.layers(x).mean((2, 3)))


def _require_blocks(blocks: Any) -> list[list[int]]:
    """The output channels of each convolution, block by block, as Python integers."""
    try:
        found = [[checks.require_channel_count(n) for n in block] for block in blocks]
    except (TypeError, ValueError):
        found = []
    if not found or not all(found):
        raise ValueError(
            "blocks must have at least one block, and each block at least one convolution, but "
            f"blocks={blocks!r}. Give each block the output channels of its convolutions, for "
            "example ((64, 64), (128, 128))."
        )
    return found


def _require_images(x: Tensor, channels: int, halvings: int) -> None:
    checks.require_floating_point(x)
    if x.dim() != 4:
        raise ValueError(
            "The input must be a batch of images, [batch, channels, height, width], but its shape "
            f"is {tuple(x.shape)}. For a single image, add the batch axis with x[None]."
        )
    checks.require_input(x, channels)
    height, width = x.shape[2:]
    smallest = 2**halvings
    if min(height, width) < smallest:
        raise ValueError(
            f"The images are {height}x{width}, too small for {halvings} blocks, each of which "
            f"halves them: the smallest size is {smallest}x{smallest}. Use larger images, or fewer "
            "blocks."
        )
