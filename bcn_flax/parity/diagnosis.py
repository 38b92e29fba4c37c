"""What may explain that two modules differ."""

from collections.abc import Iterator, Sequence

import numpy as np

from bcn_flax.parity import modules
from bcn_flax.parity.errors import eps, narrowest
from bcn_flax.parity.movements import different_movements
from bcn_flax.parity.observations import Values
from bcn_flax.parity.rows import Row
from bcn_flax.parity.sides import FLAX_64, JITTED, TORCH, TORCH_64
from bcn_flax.parity.twins import Twins

_GROWTH = 1e3  # of a parameter in training, beyond which it diverges


def explanations(
    them: Twins, inputs: Sequence[Values], settings: Sequence[str], rows: Sequence[Row]
) -> list[str]:
    """Sentences for the reader.

    Args:
        them: in float64.
        inputs: of the first call.
        settings: in which their layers differ.
        rows: of the comparison.
    """
    # The rates of the statistics tell of a momentum that no argument tells of.
    rates = not any("momentum" in sentence for sentence in settings)
    return [
        *_first_modules(them, inputs),
        *settings,
        *different_movements(them, inputs, rates),
        *_optimizers(rows),
        *_divergence(rows),
        *_formulas(rows),
    ]


def _first_modules(them: Twins, inputs: Sequence[Values]) -> Iterator[str]:
    """Where on the way forward the outputs begin to differ, in evaluation and in training."""
    found: dict[str, list[str]] = {}
    for mode, train in (("evaluation", False), ("training", True)):
        for sentence in _first_module(them, inputs, train):
            found.setdefault(sentence, []).append(mode)
    for sentence, modes in found.items():
        yield f"In {' and '.join(modes)}, {sentence}"


def _first_module(them: Twins, inputs: Sequence[Values], train: bool) -> Iterator[str]:
    paths = {name: path for path, name in modules.pairs(them).items()}
    flax = modules.flax_calls(them, inputs, train)
    torch = modules.torch_calls(them, inputs, train)
    agree = None
    for name in torch:
        path = paths.get(name)
        if path is None or path not in flax:
            continue
        if not _differ(flax[path], torch[name]):
            agree = path
            continue
        sentence = f"the first module whose output differs is {modules.written(path)}"
        if agree is not None:
            sentence += f"; the last before it that agrees is {modules.written(agree)}"
        yield f"{sentence}."
        return


def _differ(flax: Sequence[Values], torch: Sequence[Values]) -> bool:
    """Whether outputs clearly differ: in number, in size, or in value in any order of the axes."""
    return len(flax) != len(torch) or any(map(_clearly_differ, flax, torch))


def _clearly_differ(a: Values, b: Values) -> bool:
    orders = [x for x in (b, *([np.moveaxis(b, 1, -1)] * (b.ndim > 2))) if x.shape == a.shape]
    if not orders:
        return a.size != b.size
    return not any(_agree(a, order) for order in orders)


def _agree(a: Values, b: Values) -> bool:
    """Whether two arrays of one shape agree in half of their digits."""
    near = eps(narrowest((a.dtype, b.dtype))) ** 0.5
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    largest = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return np.allclose(a, b, rtol=near, atol=near * largest, equal_nan=True)


def _optimizers(rows: Sequence[Row]) -> Iterator[str]:
    """Whether it is the optimizer's steps alone that differ, in the first phase that does."""
    failed = [row for row in rows if not row.passed]
    first = {row.name.quantity for row in failed if row.phase == failed[0].phase}
    if first == {"parameter"} and failed[0].phase.startswith("training"):
        yield (
            "All gradients agree, and the parameters after the step do not: the two optimizers "
            "differ in their constants or their formulas."
        )


def _divergence(rows: Sequence[Row]) -> Iterator[str]:
    """Whether training blows up, and so every rounding with it."""
    scales: dict[str, list[float]] = {}
    for row in rows:
        if row.name.quantity == "parameter":
            scales.setdefault(row.name.path, []).append(row.error.scale)
    growth = {path: s[-1] / s[0] for path, s in scales.items() if s[0] > 0}
    path = max(growth, key=growth.__getitem__, default="")
    if path and growth[path] > _GROWTH:
        yield (
            f"Training diverges: {path} grows to {growth[path]:.2g} times its size, and every "
            "rounding with it. Give an optimizer with a smaller rate."
        )


def _formulas(rows: Sequence[Row]) -> Iterator[str]:
    """Whether it is a matter of rounding at all."""
    native = {
        (row.phase, row.name): row.error.absolute.error
        for row in rows
        if row.sides == (JITTED, TORCH)
    }
    wide = [row for row in rows if row.sides == (FLAX_64, TORCH_64)]
    failed = [row for row in wide if not row.passed]
    if not wide:
        return
    if all(row.error.absolute.error < 1e-3 * native[row.phase, row.name] for row in failed):
        yield (
            "In float64 they are as near as its precision: they compute the same, and one rounds "
            "more. The table says which is farther from the truth."
        )
    elif max(row.worst.error for row in failed) * eps(np.float64) < eps(np.float32):
        yield (
            "They differ in float64 as well, by no more than roundings of float32 do: a small "
            "constant differs, or something is computed in float32 on one side even there."
        )
    else:
        yield "They differ in float64 as well: this is no rounding, they compute different things."
