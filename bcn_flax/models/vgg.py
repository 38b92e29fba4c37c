"""What the VGGs of linen and of NNX share: which layers there are, and in which order."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol, get_args

from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from bcn_flax import checks
from bcn_flax.norms import RunningVariance

Norm = Literal["bcn", "bn", "gn", "none"]

BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
"""The configuration that the annotated implementation trains on CIFAR-10."""


class Options(Protocol):
    """What `choose_norm` needs to know of a network: some of the arguments of its constructor."""

    norm: Norm
    num_groups: int
    estimate: bool
    momentum: float
    epsilon: float
    batch_epsilon: float | None
    running_variance: RunningVariance
    dtype: Dtype | None
    param_dtype: Dtype
    axis_name: str | None


def choose_norm(
    network: Options,
    batch_channel_norm: Callable[..., Any],
    batch_norm: Callable[..., Any],
    group_norm: Callable[..., Any],
) -> Callable[..., Any] | None:
    """The one of these classes that `network.norm` names, with the network's arguments, or none.

    Raises:
        ValueError: it names none of them.
    """
    checks.norm_name(network.norm, get_args(Norm))
    shared: dict[str, Any] = {
        "epsilon": network.epsilon,
        "dtype": network.dtype,
        "param_dtype": network.param_dtype,
    }
    batch: dict[str, Any] = {
        "momentum": network.momentum,
        "axis_name": network.axis_name,
        "running_variance": network.running_variance,
    }
    match network.norm:
        case "bcn":
            groups: dict[str, Any] = {
                "num_groups": network.num_groups,
                "estimate": network.estimate,
                "batch_epsilon": network.batch_epsilon,
            }
            return partial(batch_channel_norm, **groups, **batch, **shared)
        case "bn":
            return partial(batch_norm, **batch, **shared)
        case "gn":
            return partial(group_norm, num_groups=network.num_groups, **shared)
        case "none":
            return None


def layers(
    blocks: Sequence[Sequence[int]],
    conv: Callable[[int], Callable[..., Array]],
    norm: Callable[[int], Callable[..., Array]] | None,
) -> Iterator[Callable[..., Array]]:
    """The layers in their order, whose numbering PyTorch shares; the dense one comes after them.

    Args:
        blocks: the features of each convolution, block by block.
        conv: makes a convolution with so many features.
        norm: makes the norm of so many features, if there is one.

    Raises:
        ValueError: a block is empty, or there is none.
    """
    checks.blocks(blocks)
    for block in blocks:
        for features in block:
            yield conv(features)
            if norm is not None:
                yield norm(features)
            yield rectify
        yield halve


def rectify(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """ReLU; unlike `jax.nn.relu` it can be pickled, and so can a network that holds it."""
    return nn.relu(x)


def halve(x: Float[Array, "n h w c"]) -> Float[Array, "n h//2 w//2 c"]:
    """Half the height and width: of each 2x2 pixels the largest value."""
    return nn.max_pool(x, (2, 2), (2, 2))
