"""What may explain that two modules differ."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bcn_flax.interop.layouts import Array
from bcn_flax.parity.errors import Row, eps, narrowest
from bcn_flax.parity.judging import FLAX_64, JITTED, TORCH, TORCH_64
from bcn_flax.parity.pair import Calls, ModulePair, Probe
from bcn_flax.parity.protocol import Implementation, Name, module_name, observation, sgd

_GROWTH = 1e3  # of a parameter in training, beyond which training diverges

# Arguments with the same meaning, in Flax and in PyTorch.
_ARGUMENTS = (
    ("epsilon", "eps"),
    ("num_groups", "num_groups"),
    ("negative_slope", "negative_slope"),
)


def explanations(
    pair: ModulePair, probe: Probe, settings: Sequence[str], rows: Sequence[Row]
) -> list[str]:
    """Sentences for the reader.

    Args:
        pair: in float64.
        probe: of the pair.
        settings: the sentences of `different_settings`.
        rows: of the comparison.
    """
    # The rate of a running average shows a momentum that no argument shows.
    rates = not any("momentum" in sentence for sentence in settings)
    return [
        *_first_modules(probe),
        *settings,
        *_statistics_drift(pair, probe, rates),
        *_optimizers(rows),
        *_divergence(rows),
        *_formulas(rows),
    ]


def different_settings(probe: Probe) -> Iterator[str]:
    """A sentence for each argument that differs between a layer of Flax and its counterpart."""
    for path, flax, _, torch in probe.modules:
        for flax_name, torch_name in _ARGUMENTS:
            a, b = getattr(flax, flax_name, None), getattr(torch, torch_name, None)
            if _is_other_number(a, b):
                yield (
                    f"{module_name(path)}: {flax_name} is {a:g} in Flax, and {torch_name} {b:g} in "
                    "PyTorch."
                )
        a, b = getattr(flax, "momentum", None), getattr(torch, "momentum", None)
        if b is not None and _is_other_number(a, 1 - b):
            yield (
                f"{module_name(path)}: momentum is {a:g} in Flax and {b:g} in PyTorch, where it is "
                f"the weight of the new value: {1 - b:g} in Flax's words."
            )


def _is_other_number(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and not math.isclose(a, b)


def _first_modules(probe: Probe) -> Iterator[str]:
    """The first module whose outputs differ, in evaluation and in training."""
    paths = {module.name: module.path for module in probe.modules}
    found: dict[str, list[str]] = {}
    for mode, calls in probe.calls.items():
        for sentence in _first_module(paths, calls):
            found.setdefault(sentence, []).append(mode)
    for sentence, modes in found.items():
        yield f"In {' and '.join(modes)}, {sentence}"


def _first_module(paths: dict[str, tuple[str, ...]], calls: Calls) -> Iterator[str]:
    flax, agreeing = calls.flax.run(), None
    for name, torch in calls.torch.returned.items():
        path = paths.get(name)
        if path is None or path not in flax:
            continue
        if not _clearly_differ(flax[path], torch):
            agreeing = path
            continue
        sentence = f"the first module whose output differs is {module_name(path)}"
        if agreeing is not None:
            sentence += f"; the last one before it that agrees is {module_name(agreeing)}"
        yield f"{sentence}."
        return


def _clearly_differ(flax: Sequence[Array], torch: Sequence[Array]) -> bool:
    """Whether outputs differ in number, in size, or in value in any order of the axes."""
    return len(flax) != len(torch) or not all(map(_roughly_equal, flax, torch))


def _roughly_equal(a: Array, b: Array) -> bool:
    orders = [b, np.moveaxis(b, 1, -1)] if b.ndim > 2 else [b]
    orders = [x for x in orders if x.shape == a.shape]
    if not orders:
        return a.size == b.size
    return any(_half_of_digits_agree(a, order) for order in orders)


def _half_of_digits_agree(a: Array, b: Array) -> bool:
    near = eps(narrowest((a.dtype, b.dtype))) ** 0.5
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    largest = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return np.allclose(a, b, rtol=near, atol=near * largest, equal_nan=True)


class _Drift(NamedTuple):
    """How a running statistic changes if the same batch is repeated.

    Attributes:
        rate: the part of the distance to the limit that it covers in each step; None if that is not
            the same for all channels.
        limit: the value that it converges to, which is the statistic of the batch.
    """

    rate: float | None
    limit: Array


def _statistics_drift(pair: ModulePair, probe: Probe, rates: bool) -> Iterator[str]:
    """How the running statistics of the two sides change differently; `rates`: how fast, too."""
    shown = observation({}, {}, {}, pair.flax.variables)
    start = {name: x for name, x in shown.items() if name.quantity == "statistic"}
    if not start or "training" not in probe.calls:
        return
    # With a rate of 0 the parameters, and so the statistics of the batch, stay the same.
    fixed = sgd(rate=0.0)
    calls = probe.calls["training"]

    def observed(side: Implementation, outputs: Iterable[Any]) -> dict[Name, _Drift]:
        zeros = [np.zeros(y.shape, y.dtype) for y in outputs]
        first, second = (side(probe.inputs, zeros, True) for _ in range(2))
        return {name: _drift(start[name], first[name], second[name]) for name in start}

    flax = observed(pair.new_flax_side(fixed), calls.flax.outputs.values())
    torch = observed(pair.new_torch_side(fixed), calls.torch.outputs.values())
    for name in start:
        if rates:
            yield from _different_rates(name.path, flax[name].rate, torch[name].rate)
        yield from _different_limits(name.path, flax[name], torch[name])


def _drift(start: Array, first: Array, second: Array) -> _Drift:
    step = first - start
    large = np.abs(step) > 1e-6 * np.abs(step).max(initial=0.0)
    if not large.any():
        return _Drift(0.0, first)
    rates = 1 - (second - first)[large] / step[large]
    if not np.allclose(rates, rates[0], rtol=1e-6) or not rates[0] > 0:
        return _Drift(None, first)
    return _Drift(float(np.median(rates)), start + step / np.median(rates))


def _different_rates(path: str, flax: float | None, torch: float | None) -> Iterator[str]:
    if flax is None or torch is None or math.isclose(flax, torch, rel_tol=1e-6):
        return
    yield (
        f"{path} moves {flax:.3g} of the way to the batch's at each step in Flax and {torch:.3g} "
        f"in PyTorch, as if momentum were {1 - flax:.3g} in Flax, where it is the weight of the "
        f"old value, and {torch:.3g} in PyTorch, where it is the weight of the new one."
    )
    if math.isclose(flax + torch, 1, rel_tol=1e-6):
        yield (
            "One momentum is 1 minus what it should be. Perhaps it was copied from the other "
            "library unchanged."
        )


def _different_limits(path: str, flax: _Drift, torch: _Drift) -> Iterator[str]:
    if not flax.rate or not torch.rate or not flax.limit.all():
        return
    ratios = torch.limit / flax.limit
    ratio = float(np.median(ratios))
    if not np.allclose(ratios, ratio, rtol=1e-6) or math.isclose(ratio, 1, rel_tol=1e-9):
        return
    sentence = f"{path} converges to {ratio:.6g} times Flax's value in PyTorch"
    values = 1 / (1 - min(ratio, 1 / ratio))
    if path.endswith("var") and abs(values - round(values)) < 1e-3:
        correction, kinds = (
            ("n / (n - 1)", "biased in Flax, unbiased in PyTorch")
            if ratio > 1
            else ("(n - 1) / n", "unbiased in Flax, biased in PyTorch")
        )
        sentence += f", which is {correction} for n = {round(values)} values: {kinds}"
    yield f"{sentence}."


def _optimizers(rows: Sequence[Row]) -> Iterator[str]:
    """Whether the first phase with a difference differs only in the steps of the optimizers."""
    failed = [row for row in rows if not row.passed]
    first = {row.name.quantity for row in failed if row.phase == failed[0].phase}
    if first == {"parameter"} and failed[0].phase.startswith("training"):
        yield (
            "All gradients agree, and the parameters after the step do not: the two optimizers "
            "differ in their constants or their formulas."
        )


def _divergence(rows: Sequence[Row]) -> Iterator[str]:
    """Whether training diverges, which amplifies every rounding error."""
    scales: dict[str, list[float]] = {}
    for row in rows:
        if row.name.quantity == "parameter":
            scales.setdefault(row.name.path, []).append(row.error.scale)
    growth = {path: s[-1] / s[0] for path, s in scales.items() if s[0] > 0}
    path = max(growth, key=growth.__getitem__, default="")
    if path and growth[path] > _GROWTH:
        yield (
            f"Training diverges: {path} grows to {growth[path]:.2g} times its size, and every "
            "rounding error grows with it. Pass an optimizer with a smaller rate."
        )


def _formulas(rows: Sequence[Row]) -> Iterator[str]:
    """Whether the cause is rounding or another formula."""
    native = {
        (row.phase, row.name): row.error.absolute.error
        for row in rows
        if row.implementations == (JITTED, TORCH)
    }
    wide = [row for row in rows if row.implementations == (FLAX_64, TORCH_64)]
    failed = [row for row in wide if not row.passed]
    if not wide:
        return
    if all(row.error.absolute.error < 1e-3 * native[row.phase, row.name] for row in failed):
        yield (
            "In float64 they agree to its precision: they compute the same, and one of them rounds "
            "more. The table says which is less accurate."
        )
    elif max(row.worst.error for row in failed) * eps(np.float64) < eps(np.float32):
        yield (
            "They differ in float64 as well, but no more than by roundings of float32: a small "
            "constant differs, or one side computes something in float32 even there."
        )
    else:
        yield (
            "They differ in float64 as well: the cause is not rounding, they compute different "
            "things."
        )
