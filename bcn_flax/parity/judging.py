"""Run all implementations of a pair of modules, phase after phase, and compare what they show."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from bcn_flax.interop import layouts
from bcn_flax.interop.layouts import Array
from bcn_flax.parity.errors import (
    EXACT,
    Allowance,
    Reference,
    Row,
    Tolerance,
    compare_observations,
    eps,
    largest_differences,
    narrowest,
    relative_error,
)
from bcn_flax.parity.pair import ModulePair, Probe
from bcn_flax.parity.protocol import (
    Arguments,
    Implementation,
    Name,
    Observation,
    Optimizer,
    float64_enabled,
    is_differentiable,
    observation,
    split_arguments,
    to_float64,
)

Inputs = Any | tuple[Any, ...] | Mapping[str, Any]
# From Flax's variables in float64 to an implementation.
Oracle = Callable[[Mapping[str, Any]], Implementation]

# The names of the implementations. The perturbed ones are not compared: how far they move from
# PyTorch in float64 is how far rounding errors may move the others.
FLAX, JITTED, EAGER, FLAX_64 = "Flax", "Flax, jitted", "Flax, eager", "Flax in float64"
TORCH, TORCH_64, ORACLE = "PyTorch", "PyTorch in float64", "the oracle"
PERTURBED = "PyTorch, perturbed", "PyTorch, perturbed the other way"
PERTURBED_64 = "PyTorch, perturbed in float64", "PyTorch, perturbed in float64 the other way"
_NATIVE = JITTED, EAGER, TORCH  # the others compute in float64
# An allowed error shows differences if it is less than this share of the largest value.
_VISIBLE = 0.1


class Phase(NamedTuple):
    """One call of all implementations.

    Attributes:
        name: as it is printed.
        inputs: the arrays, in Flax's order of axes.
        train: whether it is a step of training.
        steps: of training so far, this one included; one more in the evaluation afterwards.
    """

    name: str
    inputs: list[Array]
    train: bool
    steps: int


def phases(
    inputs: Inputs, steps: int | Sequence[Inputs], torch_names: Mapping[str, str] | None = None
) -> tuple[Arguments, list[Phase]]:
    """Evaluation, training, and evaluation again; and how the arrays become arguments of a call.

    Raises:
        ValueError: an input is not what a module can take, or `steps` is neither a number nor
            inputs.
    """
    arguments, first = split_arguments("inputs", inputs, torch_names)
    batches = _batches(arguments, first, steps)
    last = Phase("evaluation after training", first, False, len(batches) + 1)
    return arguments, [
        Phase("evaluation", first, False, 1),
        *(Phase(f"training step {i}", batch, True, i) for i, batch in enumerate(batches, 1)),
        *([last] if batches else []),
    ]


def _batches(
    arguments: Arguments, first: list[Array], steps: int | Sequence[Inputs]
) -> list[list[Array]]:
    if isinstance(steps, int) and steps >= 0:
        return [first] * steps
    if not isinstance(steps, list | tuple):
        raise ValueError(
            "steps must be a number of steps, or a list of the inputs of each, but it is "
            f"{steps if isinstance(steps, int) else f'of type {type(steps).__name__}'}."
        )
    batches = []
    for i, batch in enumerate(steps):
        own, arrays = split_arguments(f"steps[{i}]", batch, arguments.torch_names)
        if len(arrays) != len(first):
            raise ValueError(
                f"Each step must have as many inputs as evaluation has, {len(first)}, but "
                f"steps[{i}] has {len(arrays)}. Several inputs of one step are a tuple in the list."
            )
        if own != arguments:
            raise ValueError(
                f"Each step must have the same arguments as evaluation, but those of steps[{i}] "
                f"differ in a name or in a value that is no array: {own} against {arguments}."
            )
        batches.append(arrays)
    return batches


class Precision(NamedTuple):
    """The precision of the arithmetic.

    Attributes:
        dtype: the narrowest one.
        error: the relative error of an operation.
        perturbed: the names of the implementations that are perturbed by it and by its opposite.
    """

    dtype: np.dtype[Any]
    error: float
    perturbed: tuple[str, str]


class Precisions(NamedTuple):
    """The precision of the modules as they are, and in float64."""

    native: Precision
    wide: Precision


def find_precisions(
    native: ModulePair, plan: Sequence[Phase], demanded: DTypeLike | None
) -> Precisions:
    """The precision of the modules and inputs, or a higher one that the caller demands.

    Raises:
        ValueError: the caller demands a lower one.
    """
    inputs, outputs = plan[0].inputs, native.flax.output_shapes(plan[0].inputs, train=False)
    stored = [*inputs, *native.flax.leaves, *native.torch.parameters(), *outputs]
    seen = narrowest([*map(layouts.dtype, stored), np.float64 if native.flax.wide else np.float32])
    dtype = np.dtype(demanded or seen)
    if eps(dtype) > eps(seen):
        raise ValueError(
            f"precision may demand more than the numbers' own, {seen}, but {dtype} is less: give a "
            "Tolerance, with a reason."
        )
    given = [x for phase in plan for x in phase.inputs]
    terms = _largest_reduction([*given, *outputs, *native.flax.leaves])
    wide = np.dtype(np.float64)
    return Precisions(
        Precision(dtype, relative_error(dtype, terms), PERTURBED),
        Precision(wide, relative_error(wide, terms), PERTURBED_64),
    )


def _largest_reduction(values: Sequence[Any]) -> int:
    """How many numbers are summed at most: all of a channel, or all of a sample."""
    shapes = [x.shape for x in values if len(x.shape)]
    return max((math.prod(s) // max(1, min(s[0], s[-1])) for s in shapes), default=1)


def make_implementations(
    native: ModulePair,
    wide: ModulePair,
    optimizer: Optimizer,
    precisions: Precisions,
    *,
    eager: bool,
    oracle: Oracle | None,
    compare_wide: bool,
) -> dict[str, Implementation]:
    """All implementations, by name.

    Args:
        native: the modules as they are.
        wide: the modules in float64.
        optimizer: of all.
        precisions: of the modules, by whose errors to perturb.
        eager: whether to run Flax eagerly too.
        oracle: see `compare`.
        compare_wide: whether to compare in float64.
    """
    made: dict[str, Implementation] = {JITTED: native.new_flax_side(optimizer)}
    if eager:
        made[EAGER] = native.new_flax_side(optimizer, jit=False)
    made[TORCH] = native.new_torch_side(optimizer)
    made[TORCH_64] = wide.new_torch_side(optimizer)
    if oracle is not None:
        made[ORACLE] = oracle(wide.flax.variables)
    if compare_wide:
        made[FLAX_64] = wide.new_flax_side(optimizer)
    for precision in precisions if compare_wide else precisions[:1]:
        for name, sign in zip(precision.perturbed, (1, -1), strict=True):
            # An inaccurate formula of one side is to be found in the precision at hand, not in
            # float64, which is there to tell other formulas from it.
            made[name] = wide.new_torch_side(
                optimizer,
                perturbation=sign * precision.error,
                every_operation=precision is precisions.wide,
            )
    return made


def initial_weights(pair: ModulePair) -> list[Row]:
    """Rows for the weights at the beginning, which must be equal but for how they are stored."""
    with float64_enabled(pair.flax.wide):
        variables = pair.flax.variables, pair.match.to_flax(pair.torch)
    flax, torch = (observation({}, {}, {}, own) for own in variables)
    stored = {name: narrowest((flax[name].dtype, torch[name].dtype)) for name in flax}
    flax, torch = (
        {name: x[name].astype(dtype) for name, dtype in stored.items()} for x in (flax, torch)
    )
    return compare_observations("initial weights", (FLAX, TORCH), {FLAX: flax, TORCH: torch}, EXACT)


def different_shapes(probe: Probe) -> list[Row]:
    """Rows for the outputs whose shapes differ, so that nothing else can be compared."""
    rows: list[Row] = []
    for phase, calls in probe.calls.items():
        flax, torch = calls.flax.outputs, calls.torch.outputs
        known = {row.name.path for row in rows}
        names = [n for n in flax if n not in known and flax[n].shape != torch[n].shape]
        seen = {
            FLAX: {Name("output", name): np.zeros(flax[name].shape) for name in names},
            TORCH: {Name("output", name): torch[name] for name in names},
        }
        rows += compare_observations(phase, (FLAX, TORCH), seen, EXACT)
    return rows


def compare_phases(
    implementations: Mapping[str, Implementation],
    plan: Sequence[Phase],
    native: ModulePair,
    precisions: Precisions,
    tolerances: Sequence[Tolerance],
    seed: int,
) -> list[Row]:
    """Run all implementations through all phases, and compare them.

    Args:
        implementations: by name.
        plan: the phases.
        native: the modules as they are.
        precisions: of the modules.
        tolerances: the caller's.
        seed: of the output gradients.

    Raises:
        ValueError: a tolerance matches no array, or the oracle shows one that the modules do not.
        WideningError: Flax's module cannot be computed in float64.
    """
    rows: list[Row] = []
    rng = np.random.default_rng((seed, 1))  # other numbers than those of random weights
    # How far the perturbed implementations have moved at most: they may come back by chance.
    moved: dict[Precision, dict[Name, float]] = {precision: {} for precision in precisions}
    for phase in plan:
        seen = _observe(phase, native, implementations, rng)
        for precision, largest in moved.items():
            for perturbed in (seen[name] for name in precision.perturbed if name in seen):
                for name, distance in largest_differences(seen[TORCH_64], perturbed).items():
                    largest[name] = max(distance, largest.get(name, 0.0))
        allowed, allowed_wide = (
            Allowance(precision.dtype, precision.error, phase.steps, largest, tolerances)
            for precision, largest in moved.items()
        )
        rows += _compare_phase(phase.name, seen, allowed, allowed_wide)
    _require_matches(tolerances, rows)
    return rows


def undecided(rows: Sequence[Row]) -> Iterator[str]:
    """What keeps equal rows from being evidence, and what to do: nothing could have been seen."""
    sizes: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row.phase, row.name.quantity
        sizes[key] = max(row.error.scale, sizes.get(key, 0.0))
    visible: dict[tuple[bool, Name], bool] = {}
    for row in rows:
        visible.setdefault((row.trains, row.name), False)
        size = sizes[row.phase, row.name.quantity]
        # Of values that are 0 or not finite, every difference shows.
        visible[row.trains, row.name] |= (
            row.tolerance is not None or not size or row.allowed <= _VISIBLE * size
        )
    hidden = list(dict.fromkeys(str(name) for (_, name), seen in visible.items() if not seen))
    if hidden:
        yield (
            f"The error allowed of {', '.join(hidden)} is more than {_VISIBLE:.0%} of the largest "
            "value, since the model or the optimizer amplifies rounding errors that much. Take a "
            "smaller learning rate, another optimizer, or other inputs; or pass a Tolerance, with "
            "a reason."
        )
    outputs = [row for row in rows if row.name.quantity == "output" and eps(row.dtype)]
    if outputs and not any(row.error.scale for row in outputs):
        yield (
            "Every output is 0, or not finite, so that it shows nothing of what it is computed "
            'from. Pass weights="random", or other inputs.'
        )


def _require_matches(tolerances: Sequence[Tolerance], rows: Sequence[Row]) -> None:
    """Refuse a tolerance that matches no array: its pattern must be misspelled."""
    for tolerance in tolerances:
        if not any(tolerance.matches(row.name) for row in rows):
            names = sorted({str(row.name) for row in rows})
            raise ValueError(f"{tolerance} matches none of the arrays compared: {names}.")


def _observe(
    phase: Phase,
    native: ModulePair,
    implementations: Mapping[str, Implementation],
    rng: np.random.Generator,
) -> dict[str, Observation]:
    outputs = native.flax.output_shapes(phase.inputs, phase.train)
    gradients = [_output_gradient(y, rng) for y in outputs]
    wide_inputs, wide_gradients = to_float64(phase.inputs), to_float64(gradients)
    return {
        name: implementation(phase.inputs, gradients, phase.train)
        if name in _NATIVE
        else implementation(wide_inputs, wide_gradients, phase.train)
        for name, implementation in implementations.items()
    }


def _output_gradient(y: Any, rng: np.random.Generator) -> Array:
    """In the dtype of the output; its norm is about 1, so that steps stay small."""
    dtype = y.dtype if is_differentiable(y) else np.float32
    return (rng.standard_normal(y.shape) / np.sqrt(max(1, np.prod(y.shape)))).astype(dtype)


def _compare_phase(
    phase: str, seen: Mapping[str, Observation], allowed: Allowance, allowed_wide: Allowance
) -> list[Row]:
    flax = [name for name in (JITTED, EAGER) if name in seen]

    def against(expected: str, reference: Reference | None = None) -> list[Row]:
        rows = (compare_observations(phase, (f, expected), seen, allowed, reference) for f in flax)
        return [row for of_one in rows for row in of_one]

    if ORACLE in seen:
        _require_shown_names(seen)
        rows = against(ORACLE, Reference(seen[ORACLE], seen[ORACLE], seen[TORCH]))
        rows += compare_observations(phase, (TORCH, ORACLE), seen, allowed)
        return rows + [row for row in against(TORCH) if row.name not in seen[ORACLE]]
    if FLAX_64 not in seen:
        return against(TORCH)
    rows = against(TORCH, Reference(seen[TORCH_64], seen[FLAX_64], seen[TORCH]))
    return rows + compare_observations(phase, (FLAX_64, TORCH_64), seen, allowed_wide)


def _require_shown_names(seen: Mapping[str, Observation]) -> None:
    """Refuse an oracle's arrays that the modules do not show: their names must be wrong."""
    unknown = seen[ORACLE].keys() - seen[TORCH].keys()
    if unknown:
        raise ValueError(
            f"The oracle must show what the modules do, but it shows {sorted(map(str, unknown))}; "
            f"they show {sorted(map(str, seen[TORCH]))}."
        )
