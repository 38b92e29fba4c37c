"""What may explain that two modules differ."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bcn_flax.interop.layouts import Array, path_name
from bcn_flax.parity.errors import Row, eps
from bcn_flax.parity.first_difference import first_differences
from bcn_flax.parity.judging import FLAX_64, JITTED, TORCH, TORCH_64
from bcn_flax.parity.pair import ModulePair, Probe
from bcn_flax.parity.protocol import Implementation, Name, module_name, observation, sgd

_SHOWN = 3  # names
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
        *first_differences(pair, probe),
        *settings,
        *statistics_drift(pair, probe, rates=rates),
        *_optimizers(rows),
        *_divergence(rows),
        *_formulas(rows),
    ]


def different_settings(probe: Probe) -> Iterator[str]:
    """A sentence for each argument that differs between a layer of Flax and its counterpart."""
    found: dict[str, list[str]] = {}
    for path, flax, torch in probe.modules:
        for sentence in _settings(flax, torch):
            found.setdefault(sentence, []).append(module_name(path))
    rates = dict.fromkeys(r for calls in probe.calls.values() for r in calls.rates if r[0] != r[1])
    for a, b in rates:
        yield f"dropout: rate is {a:g} in Flax, and p {b:g} in PyTorch."
    for sentence, modules in found.items():
        yield f"{_listed(modules, 'modules')}: {sentence}"


def _settings(flax: Any, torch: Any) -> Iterator[str]:
    for flax_name, torch_name in _ARGUMENTS:
        a, b = getattr(flax, flax_name, None), getattr(torch, torch_name, None)
        if _is_other_number(a, b):
            yield f"{flax_name} is {a:g} in Flax, and {torch_name} {b:g} in PyTorch."
    a, b = getattr(flax, "momentum", None), getattr(torch, "momentum", None)
    if b is not None and _is_other_number(a, 1 - b):
        yield (
            f"momentum is {a:g} in Flax and {b:g} in PyTorch, where it is the weight of the new "
            f"value: {1 - b:g} in Flax's words."
        )


def _listed(names: Sequence[str], kind: str) -> str:
    """A single name, or how many there are and the first ones."""
    if len(names) == 1:
        return names[0]
    more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"


def _is_other_number(a: Any, b: Any) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and not math.isclose(a, b)


class _Drift(NamedTuple):
    """How a running statistic changes if the same batch is repeated.

    Attributes:
        rate: the part of the distance to the limit that it covers in each step; None if that is not
            the same for all channels.
        limit: the value that it converges to, which is the statistic of the batch.
        near: the relative difference that counts as none.
    """

    rate: float | None
    limit: Array
    near: float


def statistics_drift(pair: ModulePair, probe: Probe, *, rates: bool) -> Iterator[str]:
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
    counts = _numbers_of_values(probe)
    rated: dict[str, list[str]] = {}
    limited: dict[str, list[_Limit]] = {}
    for name in start:
        if rates:
            for sentence in _different_rates(flax[name], torch[name]):
                rated.setdefault(sentence, []).append(name.path)
        for limit in _different_limits(name.path, flax[name], torch[name], counts):
            limited.setdefault(limit.kind, []).append(limit)
    for sentence, paths in rated.items():
        yield sentence.format(_listed(paths, "statistics"), "s" * (len(paths) == 1))
    for kind, limits in limited.items():
        yield _limits_sentence(kind, limits)


def _numbers_of_values(probe: Probe) -> dict[str, int]:
    """By the path of a module, how many values its first output has in each channel."""
    return {
        path_name(probe.same_values[s.module]): s.arrays[0].size // max(1, s.arrays[0].shape[1])
        for s in probe.calls["training"].torch.snapshots
        if s.returned and s.module in probe.same_values and s.arrays and s.arrays[0].ndim > 1
    }


def _drift(start: Array, first: Array, second: Array) -> _Drift:
    step, near = first - start, _nearness(first)
    large = np.abs(step) > 1e-6 * np.abs(step).max(initial=0.0)
    if not large.any():
        return _Drift(0.0, first, near)
    rates = 1 - (second - first)[large] / step[large]
    rate = float(np.median(rates))
    if not np.allclose(rates, rate, rtol=near) or not rate > 0:
        return _Drift(None, first, near)
    return _Drift(rate, start + step / rate, near)


def _nearness(x: Array) -> float:
    """The relative difference that counts as none: of float64, unless float32 holds the values."""
    return 1e-3 if (x == x.astype(np.float32)).all() else 1e-6


def _different_rates(flax: _Drift, torch: _Drift) -> Iterator[str]:
    """Sentences with places for the names of the statistics and the ending of the verb."""
    near = max(flax.near, torch.near)
    if flax.rate is None or torch.rate is None or math.isclose(flax.rate, torch.rate, rel_tol=near):
        return
    yield (
        f"{{}} move{{}} {flax.rate:.3g} of the way to the batch's at each step in Flax and "
        f"{torch.rate:.3g} in PyTorch, as if momentum were {1 - flax.rate:.3g} in Flax, where it "
        f"is the weight of the old value, and {torch.rate:.3g} in PyTorch, where it is the weight "
        "of the new one."
    )
    if math.isclose(flax.rate + torch.rate, 1, rel_tol=near):
        yield (
            "One momentum is 1 minus what it should be. Perhaps it was copied from the other "
            "library unchanged."
        )


class _Limit(NamedTuple):
    """A statistic that converges to a multiple of Flax's in PyTorch.

    Attributes:
        path: of the statistic.
        ratio: of PyTorch's limit to Flax's.
        values: the number of values of which it is the variance, if that explains the ratio.
    """

    path: str
    ratio: float
    values: int | None

    @property
    def kind(self) -> str:
        """What explains the ratio."""
        if self.values is None:
            return f"{self.ratio:.6g}"
        return "unbiased in PyTorch" if self.ratio > 1 else "unbiased in Flax"


def _different_limits(
    path: str, flax: _Drift, torch: _Drift, counts: Mapping[str, int]
) -> Iterator[_Limit]:
    if not flax.rate or not torch.rate or not flax.limit.all():
        return
    ratios = torch.limit / flax.limit
    ratio, near = float(np.median(ratios)), max(flax.near, torch.near)
    if np.ptp(ratios) > near * ratio or math.isclose(ratio, 1, rel_tol=near / 100):
        return
    values = 1 / (1 - min(ratio, 1 / ratio))
    count = counts.get(path.rpartition("/")[0], round(values))
    explained = path.endswith("var") and math.isclose(
        values, count, rel_tol=max(near * values, 1e-6)
    )
    yield _Limit(path, ratio, count if explained else None)


def _limits_sentence(kind: str, limits: Sequence[_Limit]) -> str:
    names = _listed([limit.path for limit in limits], "statistics")
    first = limits[0]
    values = sorted({limit.values for limit in limits if limit.values})
    verb = "converges" if len(limits) == 1 else "converge"
    times = f"{names} {verb} to {first.ratio:.6g} times Flax's value in PyTorch"
    if not values:
        return f"{times}."
    correction, kinds = (
        ("n / (n - 1)", "biased in Flax, unbiased in PyTorch")
        if kind == "unbiased in PyTorch"
        else ("(n - 1) / n", "unbiased in Flax, biased in PyTorch")
    )
    if len(values) == 1:
        return f"{times}, which is {correction} for n = {values[0]} values: {kinds}."
    several = f"n = {', '.join(map(str, values[:_SHOWN]))}" + ", ..." * (len(values) > _SHOWN)
    return f"{names} {verb} to {correction} times Flax's value in PyTorch, for {several}: {kinds}."


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
