"""What recalibration does with each batch, for linen and for NNX."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bcn_flax import norms
from bcn_flax.affine import Moments, pool_batch
from bcn_flax.norms import RunningVariance
from bcn_flax.passes import widen

State = TypeVar("State")
Statistics = Mapping[tuple[Hashable, ...], Array]


class Average(NamedTuple):
    """The average over `weight` values; where that is 0, `mean` and `var` are not used.

    Attributes:
        mean: `(c,)`.
        var: `(c,)`.
        weight: `(c,)`, the number of values.
    """

    mean: Array
    var: Array
    weight: Array


class Static(NamedTuple):
    """The arguments of a model that are not arrays; hashable, for `jax.jit`."""

    tree: Any
    leaves: tuple[Any, ...]


def average(
    step: Callable[[State, list[Any], Static], State],
    state: State,
    statistics: Callable[[State], Statistics],
    batches: Iterable[Any],
) -> Statistics:
    """The averages over `batches`, of the norms that were called.

    Args:
        step: runs the model on one batch; `join` makes its arguments. Returns the next state.
        state: the state to start from, all weights 0.
        statistics: reads the fields of each norm's `Average` from a state, as `(*norm, field)`.
        batches: inputs, each an array, or a tuple of the positional arguments of the model.

    Raises:
        ValueError: there are no batches, or no norms, or a batch has values that are not finite.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise ValueError(f"The batches must be an iterable of inputs, but they are {batches!r}.")
    if hasattr(batches, "shape"):
        raise ValueError(
            "The batches must be an iterable of inputs, but they are one array of shape "
            f"{tuple(batches.shape)}. For a single batch, put it in a list."
        )
    called: Statistics = {}
    empty = True
    for batch in batches:
        empty = False
        state = step(state, *_split(batch))
        called = _called(statistics(state))
        _require_finite(called)
    if empty:
        raise ValueError("Recalibration needs at least one batch, but there was none.")
    if not called:
        raise ValueError(
            "The batches must reach norms of this library with running averages, BatchNorm, "
            "EstimatedBatchNorm or BatchChannelNorm, but the model called none on them."
        )
    return called


def _split(batch: Any) -> tuple[list[Any], Static]:
    """The arrays among the arguments of the model, and the rest."""
    leaves, tree = jax.tree.flatten(batch if isinstance(batch, tuple) else (batch,))
    is_array = [isinstance(leaf, Array | np.ndarray) for leaf in leaves]
    arrays = [x if yes else None for x, yes in zip(leaves, is_array, strict=True)]
    rest = tuple(None if yes else x for x, yes in zip(leaves, is_array, strict=True))
    return arrays, Static(tree, rest)


def join(arrays: list[Any], static: Static) -> tuple[Any, ...]:
    """The positional arguments of the model, from their arrays and the rest."""
    leaves = [x if y is None else y for x, y in zip(arrays, static.leaves, strict=True)]
    args: tuple[Any, ...] = jax.tree.unflatten(static.tree, leaves)
    return args


def update(average: Average, m: Moments, running_variance: RunningVariance) -> Average:
    """The average with an input of moments `m` added, every value with the same weight.

    As in training, the variance that is averaged is that of each input around its own mean. Around
    the running mean, the variance of those means is added.
    """
    batch = pool_batch(m)
    size = jnp.broadcast_to(jnp.asarray(batch.weight), batch.mean.shape)[0]
    total = average.weight + size
    rate = size / jnp.maximum(total, 1)
    mean, var = (jnp.where(average.weight > 0, widen(old), 0) for old in average[:2])
    change = batch.mean_from_zero[0] - mean
    new = (norms.unbiased(batch) if running_variance == "unbiased" else batch.var)[0]
    var = (1 - rate) * var + rate * new
    if running_variance == "around_running_mean":
        var = var + rate * (1 - rate) * jnp.square(change)
    updated = Average(mean + rate * change, var, total)
    return Average(
        *(jnp.where(total > 0, new, old) for new, old in zip(updated, average, strict=True))
    )


def _called(statistics: Statistics) -> Statistics:
    """The means and variances of the norms that were called: they have a weight."""
    return {
        path: value
        for path, value in statistics.items()
        if path[-1] in ("mean", "var") and bool((statistics[*path[:-1], "weight"] > 0).any())
    }


def _require_finite(statistics: Statistics) -> None:
    if not all(np.isfinite(s).all() for s in statistics.values()):
        raise ValueError(
            "Statistics can only be taken from finite values, but in one of the batches the input "
            "of a norm was infinite or NaN, or its variance overflowed. Leave that batch out; "
            "nothing was changed."
        )
