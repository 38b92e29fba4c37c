"""Every complaint about models that cannot be converted, recalibrated or folded."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def norms(found: int) -> None:
    """There is something to recalibrate."""
    if not found:
        raise ValueError(
            "The model must have norms of this library with running averages, BatchNorm, "
            "EstimatedBatchNorm or BatchChannelNorm, but it called none."
        )


def finite(stats: Any) -> None:
    """No batch has brought NaN or infinity into the statistics."""
    if not all(np.isfinite(s).all() for s in jax.tree.leaves(stats)):
        raise ValueError(
            "Statistics can only be taken from finite values, but in one of the batches the input "
            "of a norm was infinite or NaN. Leave that batch out; nothing was changed."
        )


def evaluating(norm: str, attribute: bool | None, argument: bool | None, name: str) -> None:
    """What is folded is for inference."""
    if not checks.running_average_flag(norm, attribute, argument):
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


def same_output(folded: Any, original: Any, variables: Any) -> None:
    """The folded network, with these variables, computes what the original does.

    Roundings change the last digits, and a few layers pass them on; a wrong structure changes the
    first ones. The square root of the coarsest type's rounding lies between.
    """
    for actual, expected in zip(jax.tree.leaves(folded), jax.tree.leaves(original), strict=True):
        floats = [v.dtype for v in (expected, *jax.tree.leaves(variables))]
        tolerance = math.sqrt(
            max(jnp.finfo(t).eps for t in floats if jnp.issubdtype(t, jnp.floating))
        )
        a, e = (np.asarray(v, np.float64) for v in (actual, expected))
        difference, size = np.abs(a - e).max(initial=0), np.abs(e).max(initial=0)
        if not difference <= tolerance * size:
            raise ValueError(
                "A network and its folded form must give the same output, but on the example input "
                f"they differ by {difference:.3g}, where the largest output is {size:.3g}. Either "
                "the output of a convolution goes somewhere else too, not only to its norm, or an "
                "output is not finite."
            )
