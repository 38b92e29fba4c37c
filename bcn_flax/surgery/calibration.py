"""What recalibration does with each batch, in linen and in NNX."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bcn_flax import norms
from bcn_flax.affine import Moments, pool_batch
from bcn_flax.norms import RunningVariance
from bcn_flax.passes import widen
from bcn_flax.surgery import checks

Leaves = Mapping[tuple[str, ...], Any]


class Average(NamedTuple):
    """The average of so many values, the weight: all arrays `(c,)`. At 0 it is yet to be taken."""

    mean: Array
    var: Array
    weight: Array


class Static(NamedTuple):
    """What of the arguments of a model is no array; hashable, for `jax.jit`."""

    tree: Any
    leaves: tuple[Any, ...]


def arguments(batches: Iterable[Any]) -> Iterator[tuple[list[Any], Static]]:
    """The positional arguments of the model for each batch: the arrays, and the rest.

    Raises:
        ValueError: there are no batches.
    """
    seen = 0
    for batch in batches:
        seen += 1
        leaves, tree = jax.tree.flatten(batch if isinstance(batch, tuple) else (batch,))
        is_array = [isinstance(leaf, Array | np.ndarray) for leaf in leaves]
        arrays = [x if yes else None for x, yes in zip(leaves, is_array, strict=True)]
        rest = tuple(None if yes else x for x, yes in zip(leaves, is_array, strict=True))
        yield arrays, Static(tree, rest)
    checks.batches(seen)


def whole(arrays: list[Any], static: Static) -> tuple[Any, ...]:
    """The arguments again."""
    leaves = [x if y is None else y for x, y in zip(arrays, static.leaves, strict=True)]
    args: tuple[Any, ...] = jax.tree.unflatten(static.tree, leaves)
    return args


def absorb(average: Average, m: Moments, running_variance: RunningVariance) -> Average:
    """Average an input with moments `m` in, every value with the same weight.

    The variances average as they are, around the mean of each input, for it is they that enter the
    running average in training; around the running mean, with the variance of the means.
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
    absorbed = Average(mean + rate * change, var, total)
    return Average(
        *(jnp.where(total > 0, new, old) for new, old in zip(absorbed, average, strict=True))
    )


def start(stats: Leaves) -> dict[tuple[str, ...], Array]:
    """Statistics of linen, by path, as averages of nothing: wide, and with a weight of 0."""
    wide = {path: widen(value) for path, value in stats.items()}
    weights = {(*p[:-1], "weight"): jnp.zeros_like(v) for p, v in wide.items() if p[-1] == "mean"}
    return wide | weights


def reached(stats: Leaves) -> dict[tuple[str, ...], Array]:
    """Those of the averages, by path, that have a weight."""
    return {
        path: value
        for path, value in stats.items()
        if path[-1] in ("mean", "var") and bool((stats[(*path[:-1], "weight")] > 0).any())
    }
