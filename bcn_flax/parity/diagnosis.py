"""What may explain that two modules differ: their settings, and how their statistics move."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from flax import nnx

from bcn_flax.interop import trees
from bcn_flax.parity.observations import Name, Observation, Side, Values
from bcn_flax.parity.optimizers import sgd
from bcn_flax.parity.rows import Row
from bcn_flax.parity.twins import Twins

_Path = tuple[str, ...]


def explanations(them: Twins, inputs: Sequence[Values], rows: Iterable[Row]) -> list[str]:
    """Sentences for the reader.

    Args:
        them: in float64.
        inputs: of the first call.
        rows: of the comparison.
    """
    settings = list(_settings(them, inputs))
    # The rates of the statistics tell of a momentum that no argument tells of.
    rates = not any("momentum" in sentence for sentence in settings)
    return [*settings, *_statistics(them, inputs, rates), *_formulas(rows)]


def _settings(them: Twins, inputs: Sequence[Values]) -> Iterator[str]:
    """Arguments of layers that are the same layer and have other values."""
    flax = _flax_settings(them, inputs)
    torch = dict(them.torch.named_modules())
    for path, name in _modules(them).items():
        ours, theirs = flax.get(path, {}), torch[name]
        eps, momentum = (getattr(theirs, key, None) for key in ("eps", "momentum"))
        where = f"{'/'.join(path) or 'the layer'}"
        if _differ(ours.get("epsilon"), eps):
            yield f"{where}: epsilon is {ours['epsilon']:g} in Flax, and eps {eps:g} in PyTorch."
        if momentum is not None and _differ(ours.get("momentum"), 1 - momentum):
            yield (
                f"{where}: momentum is {ours['momentum']:g} in Flax and {momentum:g} in PyTorch, "
                f"where it is the weight of the new value: {1 - momentum:g} in Flax's words."
            )


def _modules(them: Twins) -> dict[_Path, str]:
    """By their paths in Flax, the modules that have parameters or statistics, in PyTorch."""
    return {pair.path[1:-1]: pair.module for pair in them.match.pairs}


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and not math.isclose(a, b)


def _flax_settings(them: Twins, inputs: Sequence[Values]) -> dict[_Path, dict[str, Any]]:
    """By path, the epsilon and momentum of Flax's modules."""
    found: dict[_Path, dict[str, Any]] = {}

    def note(path: _Path, module: Any) -> None:
        found[path] = {key: getattr(module, key, None) for key in ("epsilon", "momentum")}

    if isinstance(them.flax, nnx.Module):
        for place, module in nnx.iter_modules(them.flax):
            note(trees.joined(place), module)
        return found

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        note(context.module.path, context.module)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        them.outputs(inputs, train=True)
    return found


class _Movement(NamedTuple):
    """How running statistics move while the same batch comes again and again.

    Attributes:
        rate: the part of the way that they go at each step; None if not the same for all channels.
        target: where they go, which is the statistic of the batch.
    """

    rate: float | None
    target: Values


def _statistics(them: Twins, inputs: Sequence[Values], rates: bool) -> Iterator[str]:
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


def _formulas(rows: Iterable[Row]) -> Iterator[str]:
    """Whether it is a matter of rounding at all."""
    rows = list(rows)
    if not any("in float64" in row.sides[0] for row in rows):
        return
    # Where float64 makes a difference vanish, the truth is known, and with it who is off.
    first = next(row for row in rows if not row.passed)
    if first.from_truth is None:
        yield "They differ in float64 as well: this is no rounding, they compute different things."
    else:
        yield (
            "In float64 they agree, or nearly: they compute the same, and one rounds more. The "
            "table says which is farther from the truth."
        )
