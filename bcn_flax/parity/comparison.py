"""Compare a Flax and a PyTorch module, number by number, through evaluation and training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from bcn_flax import interop
from bcn_flax.interop.layers import Transposed
from bcn_flax.interop.layouts import Rules
from bcn_flax.interop.naming import Names
from bcn_flax.parity import checks, flax_side, judging, notes
from bcn_flax.parity import tolerances as tolerance_rules
from bcn_flax.parity.axes import AXES, Axes
from bcn_flax.parity.diagnosis import explanations
from bcn_flax.parity.flax_side import Call, Module
from bcn_flax.parity.optimizers import Optimizer, sgd
from bcn_flax.parity.phases import Inputs, phases
from bcn_flax.parity.report import Comparison
from bcn_flax.parity.settings import different_settings
from bcn_flax.parity.sides import ORACLE as ORACLE
from bcn_flax.parity.sides import Oracle, precisions, sides
from bcn_flax.parity.tolerances import Tolerance
from bcn_flax.parity.twins import Weights, in_float64, twins


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
            independently. All are then compared with it, and with each other in what it does not
            show.
        tolerances: other tolerances for some numbers, the last that fits; one that is wider must
            give a reason.
        precision: the narrowest dtype to compute in, by default that of the numbers; float32
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
        ValueError: the weights do not match, the order of axes is not known, inputs and modules are
            of different precision, a wider tolerance has no reason, or there is dropout; the
            message says what to do.
    """
    tolerance_rules.check(tolerances)
    checks.refuse_dropout(torch_module)
    matching: dict[str, Any] = {
        "names": names,
        "rules": rules,
        "transposed": transposed,
        "flattened": flattened,
    }
    rng = np.random.default_rng(seed)
    plan = phases(inputs, steps)
    first = plan[0].inputs
    native = twins(
        flax_module,
        torch_module,
        first,
        weights=weights,
        variables=variables,
        call=call,
        axes=axes,
        rng=rng,
        **matching,
    )
    checks.refuse_noise(native, first)
    checks.refuse_other_outputs(native, first)
    wide, wide_first = in_float64(native, **matching), flax_side.in_float64(first)
    errors = precisions(native, plan, precision)
    narrowing = [] if native.wide or oracle else wide.narrowing(wide_first)
    rows = judging.initial(native) if weights == "own" else []
    misshapen = judging.misshapen(native, first)
    rows += misshapen
    if not misshapen:
        everybody = sides(
            native,
            wide,
            optimizer or sgd(),
            errors,
            eager=eager,
            oracle=oracle,
            compare_wide=not (native.wide or oracle or narrowing),
        )
        judge = judging.Judge(errors, tolerances)
        for phase in plan:
            rows += judge.rows(phase, judging.observe(phase, everybody, native, rng))
        judging.check_names(tolerances, rows)
    hints = list(different_settings(wide, wide_first))
    if not all(row.passed for row in rows):
        hints = explanations(wide, wide_first, hints, rows)
    said = notes.of(torch_module, native, weights, narrowing)
    return Comparison(tuple(rows), native.match, tuple(said), tuple(hints))
