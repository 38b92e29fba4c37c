"""What both sides show, and whether it is the same."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from bcn_flax.parity import flax_side
from bcn_flax.parity import tolerances as tolerance_rules
from bcn_flax.parity.errors import narrowest
from bcn_flax.parity.observations import Name, Observation, Side, Values, numbered, observation
from bcn_flax.parity.phases import Phase
from bcn_flax.parity.rows import EXACT, Allowance, Row, Truth, compare_observations, how_far
from bcn_flax.parity.sides import (
    EAGER,
    FLAX,
    FLAX_64,
    JITTED,
    ORACLE,
    TORCH,
    TORCH_64,
    Precision,
    Precisions,
)
from bcn_flax.parity.tolerances import Tolerance
from bcn_flax.parity.twins import Twins


def initial(them: Twins) -> list[Row]:
    """Whether both sides begin with the same weights, exactly, but for how they are stored."""
    with them.precision():
        variables = them.variables, them.match.to_flax(them.torch)
    flax, torch = (observation({}, {}, {}, own) for own in variables)
    stored = {name: narrowest((flax[name].dtype, torch[name].dtype)) for name in flax}
    flax, torch = (
        {name: x[name].astype(dtype) for name, dtype in stored.items()} for x in (flax, torch)
    )
    return compare_observations("initial weights", (FLAX, TORCH), {FLAX: flax, TORCH: torch}, EXACT)


def misshapen(them: Twins, inputs: Sequence[Values]) -> list[Row]:
    """The outputs whose shapes differ, after which there is nothing to compare."""
    flax = numbered(them.outputs(inputs, False))
    torch = them.torch_outputs(inputs, False)
    names = [name for name in flax if flax[name].shape != torch[name].shape]
    seen = {
        FLAX: {Name("output", name): np.zeros(flax[name].shape) for name in names},
        TORCH: {Name("output", name): torch[name] for name in names},
    }
    return compare_observations("evaluation", (FLAX, TORCH), seen, EXACT)


def observe(
    phase: Phase, everybody: Mapping[str, Side], native: Twins, rng: np.random.Generator
) -> dict[str, Observation]:
    """What everybody shows in one phase."""
    outputs = native.outputs(phase.inputs, phase.train)
    gradients = [_output_gradient(y, rng) for y in outputs]
    return {name: side(phase.inputs, gradients, phase.train) for name, side in everybody.items()}


def _output_gradient(y: jax.ShapeDtypeStruct, rng: np.random.Generator) -> Values:
    """The same for all sides, in the type of the output; as long as 1, so that steps stay small."""
    dtype = y.dtype if flax_side.is_differentiable(y) else np.float32
    return (rng.standard_normal(y.shape) / np.sqrt(max(1, np.prod(y.shape)))).astype(dtype)


class Judge:
    """Compares what everybody shows, phase after phase."""

    def __init__(self, precisions: Precisions, tolerances: Sequence[Tolerance]) -> None:
        """Allow errors according to the precisions and the caller's tolerances."""
        self._precisions, self._tolerances = precisions, tolerances
        # How far the shaken sides have gone so far: they may come back by chance.
        self._went: dict[Precision, dict[Name, float]] = {p: {} for p in precisions}

    def rows(self, phase: Phase, seen: Mapping[str, Observation]) -> list[Row]:
        """All comparisons of one phase."""
        native = self._allowance(self._precisions.native, phase, seen)
        flax = [side for side in (JITTED, EAGER) if side in seen]

        def compare(
            sides: tuple[str, str], allowance: Allowance = native, truth: Truth | None = None
        ) -> list[Row]:
            return compare_observations(phase.name, sides, seen, allowance, truth)

        if ORACLE in seen:
            _check_oracle(seen)
            truth = Truth(seen[ORACLE], seen[ORACLE], seen[TORCH])
            by_flax = [row for side in flax for row in compare((side, ORACLE), truth=truth)]
            others = [row for side in flax for row in compare((side, TORCH))]
            unseen = [row for row in others if row.name not in seen[ORACLE]]
            return [*by_flax, *compare((TORCH, ORACLE)), *unseen]
        if FLAX_64 not in seen:
            return [row for side in flax for row in compare((side, TORCH))]
        truth = Truth(seen[TORCH_64], seen[FLAX_64], seen[TORCH])
        wide = self._allowance(self._precisions.wide, phase, seen)
        by_flax = [row for side in flax for row in compare((side, TORCH), truth=truth)]
        return by_flax + compare((FLAX_64, TORCH_64), wide)

    def _allowance(
        self, precision: Precision, phase: Phase, seen: Mapping[str, Observation]
    ) -> Allowance:
        went = self._went[precision]
        for side in precision.shaken:
            for name, distance in how_far(seen[TORCH_64], seen[side]).items():
                went[name] = max(distance, went.get(name, 0.0))
        return Allowance(precision.dtype, precision.error, phase.steps, went, self._tolerances)


def _check_oracle(seen: Mapping[str, Observation]) -> None:
    """Refuse numbers that nobody else shows, which would be misnamed ones."""
    unknown = seen[ORACLE].keys() - seen[TORCH].keys()
    if unknown:
        raise ValueError(
            f"The oracle must show what the modules do, but it shows {sorted(map(str, unknown))}; "
            f"they show {sorted(map(str, seen[TORCH]))}."
        )


def check_names(tolerances: Sequence[Tolerance], rows: Sequence[Row]) -> None:
    """Refuse a tolerance for nothing, which would be a misspelled one."""
    for tolerance in tolerances:
        if not any(tolerance_rules.of(str(row.name), [tolerance]) for row in rows):
            names = sorted({str(row.name) for row in rows})
            raise ValueError(f"{tolerance} is for none of the numbers compared: {names}.")
