"""What recalibration does with each batch, in linen and in NNX."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bcn_flax import norms
from bcn_flax.affine import Moments, pool_batch, widen
from bcn_flax.norms import RunningVariance
from bcn_flax.surgery import checks


def weighed(batches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], float]]:
    """The arguments of each batch, and its weight among all the samples so far.

    Raises:
        ValueError: there are no batches.
    """
    seen = 0
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        samples = jnp.shape(jax.tree.leaves(args)[0])[0]
        seen += samples
        yield args, samples / seen
    checks.batches(seen)


def absorb(
    mean: Array, var: Array, m: Moments, rate: Array, running_variance: RunningVariance
) -> tuple[Array, Array]:
    """The average of the statistics, `(c,)`, and a batch with moments `m`, whose weight is `rate`.

    Plain averages, without a memory of what was there before the first batch, even if it was NaN.
    Around the running mean, the average variance is that of all the values together.
    """
    batch = pool_batch(m)
    old_mean, old_var = (jnp.where(rate < 1, widen(old), 0) for old in (mean, var))
    change = batch.mean[0] - old_mean
    new = (norms.unbiased(batch) if running_variance == "unbiased" else batch.var)[0]
    averaged = (1 - rate) * old_var + rate * new
    if running_variance == "around_running_mean":
        averaged = averaged + rate * (1 - rate) * jnp.square(change)
    return (old_mean + rate * change).astype(mean.dtype), averaged.astype(var.dtype)
