"""Compare a Flax and a PyTorch module, number by number, through evaluation and training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from bcn_flax import interop
from bcn_flax.interop.matching import Transposed
from bcn_flax.interop.naming import Names, Rules
from bcn_flax.parity import flax_side, torch_side
from bcn_flax.parity import tolerances as tolerance_rules
from bcn_flax.parity.axes import AXES, Axes
from bcn_flax.parity.diagnosis import explanations
from bcn_flax.parity.flax_side import Call, Module
from bcn_flax.parity.observations import Observation, Side, Values
from bcn_flax.parity.optimizers import Optimizer, sgd
from bcn_flax.parity.report import Comparison
from bcn_flax.parity.rows import Allowance, Row, Truth, compare_observations, sensitivity
from bcn_flax.parity.tolerances import Tolerance, roundings
from bcn_flax.parity.twins import Twins, Weights, in_float64, twins

Inputs = Any | tuple[Any, ...]
Oracle = Callable[[Mapping[str, Any]], Side]

TORCH, TORCH_64, SHAKEN = "PyTorch", "PyTorch in float64", "PyTorch in float64, shaken"
JITTED, EAGER, FLAX_64 = "Flax, jitted", "Flax, eager", "Flax in float64"
ORACLE = "the oracle"


def assert_parity(
    flax_module: Module, torch_module: Any, inputs: Inputs, **options: Any
) -> Comparison:
    """Fail if a Flax and a PyTorch module do not compute the same.

    Example:
        >>> def test_my_port():
        ...     assert_parity(FlaxNet(), TorchNet(), images)

    Args:
        flax_module: of linen or NNX.
        torch_module: with the same architecture.
        inputs: an array, or a tuple of them, in Flax's order of axes.
        **options: see `compare`.

    Returns:
        The comparison, to print or to look closer.

    Raises:
        AssertionError: the modules differ; the message says where, by how much, which side is
            farther from the truth, and what may explain it.
        ValueError: they cannot be compared; the message says what to do.
    """
    __tracebackhide__ = True
    comparison = compare(flax_module, torch_module, inputs, **options)
    if not comparison.passed:
        raise AssertionError(str(comparison))
    return comparison


def compare(
    flax_module: Module,
    torch_module: Any,
    inputs: Inputs,
    *,
    variables: Mapping[str, Any] | None = None,
    weights: Weights = "torch",
    steps: int | Sequence[Inputs] = 3,
    optimizer: Optimizer | None = None,
    eager: bool = True,
    oracle: Oracle | None = None,
    tolerances: Sequence[Tolerance] = (),
    precision: DTypeLike | None = None,
    axes: Axes = AXES,
    names: Names | None = None,
    rules: Rules = interop.RULES,
    transposed: Transposed = (),
    flattened: Mapping[str, int] | None = None,
    call: Call | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare a Flax and a PyTorch module through evaluation, training and evaluation again.

    Both get the same weights, inputs and output gradients, and go on by themselves. After each
    step, everything that can be observed is compared: outputs, statistics, the gradients of the
    inputs and of each parameter, and each parameter after the optimizer's step; Flax jitted and
    eager, both against PyTorch. Neither module is changed.

    How far they may be apart follows from the dtype, the size of the reductions, and what the model
    makes of roundings: see `bcn_flax.parity.tolerances`. Values that are not finite must be the
    same, at the same places.

    The same comparison is made of both modules in float64. If they agree there, that is the truth
    that tells which side is farther from it in the precision at hand. If they do not, they compute
    different things, and no tolerance will help.

    Args:
        flax_module: of linen or NNX.
        torch_module: with the same architecture.
        inputs: an array, or a tuple of them, in Flax's order of axes.
        variables: linen's, where `weights` says that they count.
        weights: whose count: "torch", PyTorch's, moved to Flax; "flax", the other way round;
            "own", each side's own, as they are; or "random", values drawn anew for every parameter
            and statistic, so that no mix-up of equal ones goes unseen.
        steps: of training, on the same inputs; or the inputs of each step.
        optimizer: on both sides; by default stochastic gradient descent with momentum.
        eager: whether to run Flax eagerly too.
        oracle: makes, of Flax's variables in float64, a `Side` that computes the truth
            independently. All are then compared with it, instead of with each other. What it does
            not show is not compared.
        tolerances: other tolerances for some numbers, the last that fits; one that is wider must
            give a reason.
        precision: the narrowest dtype that is computed in, by default that of the numbers; float32
            demands of a layer for bfloat16 that it only rounds its results.
        axes: how those of inputs and outputs lie, by rank or by name, as in
            `{**AXES, 3: SAME, "input 1": SAME}`.
        names: which of PyTorch's modules is which of Flax's: see `bcn_flax.interop.match`.
        rules: which variables have which names and layouts: see `bcn_flax.interop.match`.
        transposed: see `bcn_flax.interop.match`.
        flattened: see `bcn_flax.interop.match`.
        call: keyword arguments of a call of Flax's module, of whether it trains; by default
            `train`, `use_running_average` or `deterministic`, if the module has such an argument.
        seed: of the output gradients and of random weights.

    Raises:
        ValueError: the weights do not match, an order of axes is not known, a wider tolerance has
            no reason, or there is dropout; the message says what to do.
    """
    tolerance_rules.check(tolerances)
    torch_side.refuse_dropout(torch_module)
    matching: dict[str, Any] = {
        "names": names,
        "rules": rules,
        "transposed": transposed,
        "flattened": flattened,
    }
    rng = np.random.default_rng(seed)
    phases = _phases(inputs, steps)
    native = twins(
        flax_module,
        torch_module,
        phases[0].inputs,
        weights=weights,
        variables=variables,
        call=call,
        axes=axes,
        rng=rng,
        **matching,
    )
    wide = in_float64(native, **matching)
    sides, notes = _sides(native, wide, phases[0].inputs, optimizer or sgd(), eager, oracle)
    rows: list[Row] = []
    for phase in phases:
        dys = [_output_gradient(y, rng) for y in native.outputs(phase.inputs, phase.train)]
        seen = {name: side(phase.inputs, dys, phase.train) for name, side in sides.items()}
        rows += _rows(phase, seen, precision, tolerances)
    _check_names(tolerances, rows)
    passed = all(row.passed for row in rows)
    hints = []
    if not passed:
        hints = explanations(wide, flax_side.in_float64(list(phases[0].inputs)), rows)
    return Comparison(tuple(rows), native.match, notes, tuple(hints))


class _Phase(NamedTuple):
    name: str
    inputs: Sequence[Values]
    train: bool
    steps: int  # of training, this one included


def _phases(inputs: Inputs, steps: int | Sequence[Inputs]) -> list[_Phase]:
    first = _as_arrays(inputs)
    batches = [first] * steps if isinstance(steps, int) else list(map(_as_arrays, steps))
    return [
        _Phase("evaluation", first, False, 1),
        *(_Phase(f"training step {i}", batch, True, i) for i, batch in enumerate(batches, 1)),
        _Phase("evaluation after training", first, False, len(batches) + 1),
    ]


def _as_arrays(inputs: Inputs) -> list[Values]:
    return list(map(np.asarray, inputs if isinstance(inputs, tuple) else (inputs,)))


def _sides(
    native: Twins,
    wide: Twins,
    inputs: Sequence[Values],
    optimizer: Optimizer,
    eager: bool,
    oracle: Oracle | None,
) -> tuple[dict[str, Side], tuple[str, ...]]:
    """All that compute, by name, and what to say of them."""
    sides: dict[str, Side] = {JITTED: native.flax_side(optimizer, jit=True)}
    if eager:
        sides[EAGER] = native.flax_side(optimizer, jit=False)
    sides[TORCH] = native.torch_side(optimizer)
    sides[TORCH_64] = _Wide(wide.torch_side(optimizer))
    sides[SHAKEN] = _Wide(wide.torch_side(optimizer, shake=np.random.default_rng(0)))
    if oracle is not None:
        sides[ORACLE] = _Wide(oracle(wide.variables))
        return sides, ()
    if native.wide:
        return sides, ()
    if not wide.flax_is_wide(inputs):
        return sides, (
            "Flax's module does not compute in float64, as some `dtype` in it says: there is no "
            "comparison in float64, and so no telling of formulas from roundings.",
        )
    sides[FLAX_64] = _Wide(wide.flax_side(optimizer, jit=True))
    return sides, ()


class _Wide:
    """A side in float64, that takes inputs of any precision."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def __call__(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        inputs, output_gradients = map(flax_side.in_float64, (inputs, output_gradients))
        return self._side(inputs, output_gradients, train)


def _output_gradient(y: jax.ShapeDtypeStruct, rng: np.random.Generator) -> Values:
    """The same for all sides, in the type of the output."""
    floating = flax_side.is_differentiable(y)
    return rng.standard_normal(y.shape).astype(y.dtype if floating else np.float32)


def _rows(
    phase: _Phase,
    seen: Mapping[str, Observation],
    precision: DTypeLike | None,
    tolerances: Sequence[Tolerance],
) -> list[Row]:
    """All comparisons of one phase."""
    allowance = Allowance(
        roundings(_largest_reduction(seen[TORCH]), phase.steps),
        sensitivity(seen[TORCH_64], seen[SHAKEN]),
        precision,
        tolerances,
    )

    def compare(actual: str, expected: str, truth: Truth | None = None) -> list[Row]:
        sides = (actual, expected)
        return compare_observations(
            phase.name, sides, seen[actual], seen[expected], allowance, truth
        )

    native = [side for side in (JITTED, EAGER) if side in seen]
    if ORACLE in seen:
        truth = Truth(seen[ORACLE], seen[ORACLE], seen[TORCH])
        by_flax = [row for side in native for row in compare(side, ORACLE, truth)]
        return by_flax + compare(TORCH, ORACLE)
    if FLAX_64 not in seen:
        return [row for side in native for row in compare(side, TORCH)]
    truth = Truth(seen[TORCH_64], seen[FLAX_64], seen[TORCH])
    by_flax = [row for side in native for row in compare(side, TORCH, truth)]
    return by_flax + compare(FLAX_64, TORCH_64)


def _check_names(tolerances: Sequence[Tolerance], rows: Sequence[Row]) -> None:
    """Refuse a tolerance for nothing, which would be a misspelled one."""
    for tolerance in tolerances:
        if not any(tolerance_rules.of(str(row.name), [tolerance]) for row in rows):
            names = sorted({str(row.name) for row in rows})
            raise ValueError(f"{tolerance} is for none of the numbers compared: {names}.")


def _largest_reduction(seen: Observation) -> int:
    """How many numbers are summed at most: all of a channel, or all of a sample."""
    return max(
        x.size // max(1, min(x.shape[0], x.shape[-1])) if x.ndim else 1 for x in seen.values()
    )
