"""In what running statistics differ, seen from how they move."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bcn_flax.interop import trees
from bcn_flax.parity.observations import Name, Observation, Side, Values
from bcn_flax.parity.optimizers import sgd
from bcn_flax.parity.twins import Twins


class _Movement(NamedTuple):
    """How running statistics move while the same batch comes again and again.

    Attributes:
        rate: the part of the way that they go at each step; None if not the same for all channels.
        target: where they go, which is the statistic of the batch.
    """

    rate: float | None
    target: Values


def different_movements(them: Twins, inputs: Sequence[Values], rates: bool) -> Iterator[str]:
    """In what the running statistics of the two sides differ, seen from how they move."""
    start = {
        Name("statistic", "/".join(path[1:])): np.asarray(leaf)
        for path, leaf in trees.flax_leaves(them.variables).items()
        if path[0] == "batch_stats"
    }
    if not start:
        return
    # A rate of 0 leaves the parameters, and so the statistics of the batch, as they are.
    still = sgd(rate=0.0)
    sides = them.flax_side(still, jit=True), them.torch_side(still)
    flax, torch = (_movements(side, them, inputs, start) for side in sides)
    for name in start:
        if rates:
            yield from _compared_rates(name.path, flax[name].rate, torch[name].rate)
        yield from _compared_targets(name.path, flax[name], torch[name])


def _movements(
    side: Side, them: Twins, inputs: Sequence[Values], start: Observation
) -> dict[Name, _Movement]:
    outputs = them.outputs(inputs, train=True)
    zeros = [np.zeros(y.shape, y.dtype) for y in outputs]
    first, second = (side(inputs, zeros, True) for _ in range(2))
    return {name: _movement(start[name], first[name], second[name]) for name in start}


def _movement(start: Values, first: Values, second: Values) -> _Movement:
    step = first - start
    large = np.abs(step) > 1e-6 * np.abs(step).max(initial=0.0)
    if not large.any():
        return _Movement(0.0, first)
    rates = 1 - (second - first)[large] / step[large]
    if not np.allclose(rates, rates[0], rtol=1e-6) or not rates[0] > 0:
        return _Movement(None, first)
    return _Movement(float(np.median(rates)), start + step / np.median(rates))


def _compared_rates(path: str, flax: float | None, torch: float | None) -> Iterator[str]:
    if flax is None or torch is None or math.isclose(flax, torch, rel_tol=1e-6):
        return
    yield (
        f"{path} goes {flax:.3g} of the way to the batch's at each step in Flax and {torch:.3g} in "
        f"PyTorch: as if momentum were {1 - flax:.3g} in Flax, where it is the weight of the old "
        f"value, and {torch:.3g} in PyTorch, where it is that of the new one."
    )
    if math.isclose(flax + torch, 1, rel_tol=1e-6):
        yield "One momentum is 1 minus what it should be: the other side's, taken as it is?"


def _compared_targets(path: str, flax: _Movement, torch: _Movement) -> Iterator[str]:
    if not flax.rate or not torch.rate or not flax.target.all():
        return
    ratios = torch.target / flax.target
    ratio = float(np.median(ratios))
    if not np.allclose(ratios, ratio, rtol=1e-6) or math.isclose(ratio, 1, rel_tol=1e-9):
        return
    sentence = f"{path} goes to {ratio:.6g} times Flax's in PyTorch"
    values = 1 / (1 - min(ratio, 1 / ratio))
    if path.endswith("var") and abs(values - round(values)) < 1e-3:
        correction, kinds = (
            ("n / (n - 1)", "biased in Flax, unbiased in PyTorch")
            if ratio > 1
            else ("(n - 1) / n", "unbiased in Flax, biased in PyTorch")
        )
        sentence += f", which is {correction} for n = {round(values)} values: {kinds}"
    yield f"{sentence}."
