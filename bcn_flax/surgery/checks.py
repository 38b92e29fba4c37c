"""Every complaint about models that cannot be converted, recalibrated or folded."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from bcn_flax import checks


def convertible(complaints: Sequence[tuple[str, str]], norms: int) -> None:
    """There is a norm to convert, and each of the modules can be converted."""
    if not norms:
        raise ValueError(
            "The model must have an nnx.BatchNorm to convert, but it has none that is not to be "
            "left as it is."
        )
    if complaints:
        raise ValueError(
            "Every module that is to be converted must allow it, but:\n  "
            + "\n  ".join(f"{name}: {text}" for name, text in complaints)
            + "\nGive other arguments, or leave these modules as they are, with the argument leave."
        )


def complaint(rule: Any, *args: Any) -> str | None:
    """What a rule of `bcn_flax.checks` has to complain about its arguments."""
    try:
        rule(*args)
    except ValueError as error:
        return str(error)
    return None


def one_layer(stats_rank: int) -> None:
    """The module is one norm, not many that are stored as one."""
    if stats_rank != 1:
        raise ValueError(
            f"The statistics of a norm must be (num_features,), but they have {stats_rank} axes, "
            "as under nnx.vmap or nnx.scan. Convert one of the layers, and stack them then."
        )


def plain_batch_norm(kind: type) -> None:
    """The norm is Flax's own, without other code."""
    if kind is not nnx.BatchNorm:
        raise ValueError(
            f"Only nnx.BatchNorm itself is converted, but this is a {kind.__name__}, whose code "
            "would be lost."
        )


def one_axis(axis: int | Sequence[int]) -> None:
    """The norm has one channel axis."""
    if not isinstance(axis, int):
        raise ValueError(f"The channel axis must be one integer, but axis={axis!r}.")


def example_input(args: Sequence[Any]) -> None:
    """Which convolution comes before a norm can be seen."""
    if not args:
        raise ValueError(
            "To standardize the weights of the convolution before each norm, an example input is "
            "needed, which shows where its output goes, but there is none. Call "
            "convert_batch_norm(model, x), or leave the convolutions as they are, with ws=False."
        )


def several_batches(batches: object) -> None:
    """Batches are given one by one, not as one array."""
    if isinstance(batches, jax.Array | np.ndarray):
        raise ValueError(
            "The batches must be an iterable of inputs, but they are one array of shape "
            f"{batches.shape}. For a single batch, put it in a list."
        )


def batches(seen: int) -> None:
    """There is something to take statistics from."""
    if not seen:
        raise ValueError("Recalibration needs at least one batch, but there was none.")


def norms(reached: Collection[Any]) -> None:
    """There is something to recalibrate."""
    if not reached:
        raise ValueError(
            "The batches must reach norms of this library with running averages, BatchNorm, "
            "EstimatedBatchNorm or BatchChannelNorm, but the model called none on them."
        )


def finite(stats: Any) -> None:
    """No batch has brought NaN or infinity into the statistics."""
    if not all(np.isfinite(s).all() for s in jax.tree.leaves(stats)):
        raise ValueError(
            "Statistics can only be taken from finite values, but in one of the batches the input "
            "of a norm was infinite or NaN, or its variance overflowed. Leave that batch out; "
            "nothing was changed."
        )


def evaluating(norm: str, attribute: bool | None, argument: bool | None, name: str) -> None:
    """What is folded is for inference."""
    if not checks.require_running_average_flag(norm, attribute, argument):
        raise ValueError(
            "Folding is for inference, so every norm must use its running averages, but on the "
            f"example input {name or 'the model'} was in training. Pass what makes the model "
            "evaluate, such as train=False."
        )


def foldable(convolutions: object) -> None:
    """There is something to fold."""
    if not convolutions:
        raise ValueError(
            "The model must have something to fold, a standardized kernel, or a batch norm of this "
            "library right after a convolution or dense layer, but on the example input neither "
            "was called."
        )
