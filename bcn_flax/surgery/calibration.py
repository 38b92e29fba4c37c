"""What recalibration does with each batch, in linen and in NNX."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bcn_flax import norms
from bcn_flax.affine import Moments, pool_batch, widen
from bcn_flax.norms import RunningVariance
from bcn_flax.surgery import checks


class Average(NamedTuple):
    """The average of so many values, the weight: all arrays `(c,)`. At 0 it is yet to be taken."""

    mean: Array
    var: Array
    weight: Array


def arguments(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The positional arguments of the model for each batch.

    Raises:
        ValueError: there are no batches.
    """
    seen = 0
    for batch in batches:
        seen += 1
        yield batch if isinstance(batch, tuple) else (batch,)
    checks.batches(seen)


def absorb(average: Average, m: Moments, running_variance: RunningVariance) -> Average:
    """Average an input with moments `m` in, every value with the same weight.

    The variances average as they are, around the mean of each input, for it is they that enter the
    running average in training; around the running mean, with the variance of the means.
    """
    batch = pool_batch(m)
    size = jnp.broadcast_to(jnp.asarray(batch.size), batch.mean.shape)[0]
    total = average.weight + size
    rate = size / jnp.maximum(total, 1)
    mean, var = (jnp.where(average.weight > 0, widen(old), 0) for old in average[:2])
    change = batch.mean[0] - mean
    new = (norms.unbiased(batch) if running_variance == "unbiased" else batch.var)[0]
    var = (1 - rate) * var + rate * new
    if running_variance == "around_running_mean":
        var = var + rate * (1 - rate) * jnp.square(change)
    absorbed = Average(mean + rate * change, var, total)
    return Average(
        *(
            jnp.where(total > 0, new, old).astype(old.dtype)
            for new, old in zip(absorbed, average, strict=True)
        )
    )
