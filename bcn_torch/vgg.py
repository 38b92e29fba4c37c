"""The network that the annotated implementation trains on CIFAR-10."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from bcn_torch import checks
from bcn_torch.norms import BatchChannelNorm, BatchNorm, RunningVariance
from bcn_torch.weight_standardization import Standardization, WSConv2d


class VGG(nn.Module):
    """A VGG-style image classifier: blocks of 3x3 convolutions, each with a norm and a ReLU.

        blocks -> mean over space -> linear

    Each block ends in a 2x2 max pool, so that images must be at least `2**len(blocks)` wide and
    high. The space axes that remain are averaged; at the smallest size there is nothing to average
    and this is the network of the annotated implementation, whose checkpoints load as they are.

    Example:
        >>> import torch
        >>> from bcn_torch import VGG
        >>> VGG(blocks=((32,), (64, 64)))(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Source: Qiao et al., arXiv 1903.10520, for the norm and the standardized weights; the network is
    that of the annotated implementation (`labml_nn/normalization/weight_standardization`).
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]] = (
            (64, 64),
            (128, 128),
            (256,) * 3,
            (512,) * 3,
            (512,) * 3,
        ),
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: str = "bcn",
        ws: bool = True,
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float = 0.1,
        estimate: bool = True,
        batch_eps: float | None = None,
        running_variance: RunningVariance = "biased",
        standardization: Standardization = Standardization(),
    ) -> None:
        """Make the layers.

        Args:
            blocks: the output channels of each convolution of each block.
            in_channels: channels of the images.
            num_classes: number of outputs.
            norm: after each convolution: "bcn" (`BatchChannelNorm`), "bn" (`BatchNorm`), "gn"
                (`torch.nn.GroupNorm`) or "none".
            ws: whether the convolutions standardize their weights (`WSConv2d`).
            groups: of "bcn" and "gn"; must divide the channels of every convolution.
            eps: of the norm.
            momentum: of "bcn" and "bn", the weight of the *new* value in the running estimates.
            estimate: of "bcn", see `BatchChannelNorm`.
            batch_eps: of "bcn", see `BatchChannelNorm`.
            running_variance: of "bcn" and "bn", see `BatchNorm`.
            standardization: of the standardized weights.

        Raises:
            ValueError: an argument is out of its range, or groups do not divide the channels.
        """
        super().__init__()
        _require_blocks(blocks)
        make_conv = partial(WSConv2d, standardization=standardization) if ws else nn.Conv2d
        bcn = partial(
            BatchChannelNorm,
            groups=groups,
            eps=eps,
            momentum=momentum,
            estimate=estimate,
            batch_eps=batch_eps,
            running_variance=running_variance,
        )
        bn = partial(BatchNorm, eps=eps, momentum=momentum, running_variance=running_variance)
        make_norm: dict[str, Callable[[int], list[nn.Module]]] = {
            "bcn": lambda channels: [bcn(channels)],
            "bn": lambda channels: [bn(channels)],
            "gn": lambda channels: [_group_norm(channels, groups, eps)],
            "none": lambda channels: [],
        }
        checks.require_one_of("norm", norm, make_norm)
        self.in_channels = in_channels
        self.halvings = len(blocks)
        layers: list[nn.Module] = []
        last = in_channels
        for block in blocks:
            for channels in block:
                conv = make_conv(last, channels, kernel_size=3, padding=1)
                layers += [conv, *make_norm[norm](channels), nn.ReLU()]
                last = channels
            layers += [nn.MaxPool2d(2, 2)]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, `[batch, in_channels, height, width]`, as logits, `[batch, classes]`.

        Raises:
            ValueError: `x` is no such batch, or its images are too small.
        """
        _require_images(x, self.in_channels, self.halvings)
        return self.fc(self.layers(x).mean((2, 3)))


def _group_norm(channels: int, groups: int, eps: float) -> nn.GroupNorm:
    checks.require_group_count(channels, groups)
    checks.require_eps(eps)
    return nn.GroupNorm(groups, channels, eps)


def _require_blocks(blocks: Sequence[Sequence[int]]) -> None:
    if not blocks or not all(blocks):
        raise ValueError(
            "blocks must have at least one block, and each block at least one convolution, but "
            f"blocks={blocks!r}. Give each block the output channels of its convolutions, for "
            "example ((64, 64), (128, 128))."
        )


def _require_images(x: Tensor, channels: int, halvings: int) -> None:
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
