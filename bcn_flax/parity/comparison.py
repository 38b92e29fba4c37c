"""Compare a Flax and a PyTorch module, number by number, through evaluation and training."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from flax import linen as nn
from flax import nnx
from jax.typing import DTypeLike

from bcn_flax import interop
from bcn_flax.interop import Names, Rules
from bcn_flax.interop.layers import Transposed
from bcn_flax.interop.layouts import Array
from bcn_flax.parity import judging
from bcn_flax.parity.diagnosis import different_settings, explanations
from bcn_flax.parity.errors import Tolerance
from bcn_flax.parity.flax_side import Call, Module
from bcn_flax.parity.judging import Inputs, Oracle
from bcn_flax.parity.pair import ModulePair, Probe, Weights, module_pair
from bcn_flax.parity.protocol import Optimizer, module_name, sgd
from bcn_flax.parity.report import Comparison
from bcn_flax.parity.torch_side import AXES, Axes, AxisOrder
from bcn_flax.parity.widening import WideningError

_SHOWN = 4  # names
_NO_FLOAT64 = (
    "There is no comparison in float64, which tells other formulas from roundings, because Flax's"
)
_CONCLUSIVE = (
    "Replace that in the module, or pass an `oracle`, which computes the expected values in "
    "float64."
)
_DETERMINISTIC = (
    "Modules must be deterministic, apart from layers of dropout, since the two sides cannot draw "
    "the same random numbers, but"
)


def assert_parity(
    flax_module: Module,
    torch_module: Any,
    inputs: Inputs,
    *,
    allow_inconclusive: bool = False,
    **options: Any,
) -> Comparison:
    """Fail unless a Flax and a PyTorch module compute the same.

    Example:
        >>> def test_my_port():
        ...     assert_parity(FlaxNet(), TorchNet(), images)

    Args:
        flax_module: of linen or NNX.
        torch_module: with the same architecture.
        inputs: an array, a tuple, or a dictionary of keyword arguments: see `compare`.
        allow_inconclusive: whether to pass if no difference is found, but the evidence does not
            suffice to call the modules equal.
        **options: see `compare`.

    Returns:
        The comparison, to print or to examine.

    Raises:
        AssertionError: the modules differ; the message says where, by how much, which side is less
            accurate, and what may explain the difference. Or the comparison is inconclusive; the
            message says what is missing, and how to supply it.
        ValueError: the modules cannot be compared; the message says what to do.
    """
    __tracebackhide__ = True
    comparison = compare(flax_module, torch_module, inputs, **options)
    if not comparison.passed and not (allow_inconclusive and comparison.verdict == "inconclusive"):
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
    axes: Axes | None = None,
    torch_names: Mapping[str, str] | None = None,
    names: Names | None = None,
    rules: Rules = interop.RULES,
    transposed: Transposed = (),
    flattened: Mapping[str, int] | None = None,
    call: Call | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare a Flax and a PyTorch module in evaluation, in training, and in evaluation again.

    Both get the same weights, inputs and output gradients, and then run independently. After each
    step, everything that can be observed is compared: outputs, statistics, the gradients of the
    inputs and of each parameter, and each parameter after the optimizer's step. Flax runs jitted
    and eagerly, and both are compared with PyTorch. Neither module is changed.

    The allowed error follows from the dtype, the size of the reductions, and how the model
    amplifies rounding errors: see `bcn_flax.parity.errors`. Values that are not finite must be the
    same, at the same places.

    The same comparison is made of both modules in float64, whatever their `dtype`s and casts say.
    If they agree there, float64 is the reference that tells which side is less accurate in the
    precision at hand. If they do not, they compute different things, and no tolerance will help. If
    there is no such comparison, the verdict is "inconclusive" unless an `oracle` takes its place.

    Args:
        flax_module: of linen or NNX.
        torch_module: with the same architecture.
        inputs: an array; a tuple of positional arguments; or a dictionary of keyword arguments, by
            name. They may be nested, and hold None, numbers and strings, which both modules get as
            they are. Arrays are in Flax's order of axes.
        variables: linen's, if `weights` says that they are used.
        weights: which weights are used: "torch", PyTorch's, converted to Flax; "flax", Flax's,
            converted to PyTorch; "own", each side's own, as they are; or "random", new values for
            every parameter and statistic, so that exchanging equal ones is noticed.
        steps: the number of training steps on the same inputs, or the inputs of each step.
        optimizer: of both sides; by default stochastic gradient descent with momentum.
        eager: whether to run Flax eagerly too.
        oracle: makes from Flax's variables in float64 an `Implementation` that computes the
            expected values independently. All others are compared with it, and with each other in
            what it does not show.
        tolerances: other tolerances for some arrays; the last that matches takes precedence. A
            wider one must give a reason.
        precision: the narrowest dtype to compute in, by default that of the modules and inputs.
            With float32 a layer for bfloat16 may only round its results.
        axes: the order of the axes of inputs and outputs, by rank or by name, as in
            `{3: SAME, "input mask": SAME, "output 1": CHANNELS}`. What is not given is as in
            `AXES`.
        torch_names: PyTorch's names of keyword arguments in `inputs`, by Flax's, if they differ.
        names: which of PyTorch's modules is which of Flax's: see `bcn_flax.interop.match`.
        rules: which variables have which names and layouts: see `bcn_flax.interop.match`.
        transposed: see `bcn_flax.interop.match`.
        flattened: see `bcn_flax.interop.match`.
        call: function from `train: bool` to the keyword arguments of a call of Flax's module; by
            default `train`, `use_running_average` or `deterministic`, if the module has such an
            argument.
        seed: of the output gradients and of random weights.

    Raises:
        ValueError: the weights do not match, the order of axes is not known, inputs and modules are
            of different precision, a wider tolerance has no reason, or a module draws random
            numbers; the message says what to do.
    """
    started = time.perf_counter()
    _require_modules(flax_module, torch_module)
    _require_options(optimizer, axes, call, tolerances)
    _require_reasons(tolerances)
    arguments, plan = judging.phases(inputs, steps, torch_names)
    first, rng = plan[0].inputs, np.random.default_rng(seed)
    native = module_pair(
        flax_module,
        torch_module,
        first,
        arguments=arguments,
        weights=weights,
        variables=variables,
        call=call,
        axes={**AXES, **(axes or {})},
        matcher=partial(
            interop.match, names=names, rules=rules, transposed=transposed, flattened=flattened
        ),
        rng=rng,
    )
    wide, probe = _probed_in_float64(native, first, train=len(plan) > 1)
    _refuse_random_numbers(probe)
    _require_comparable_outputs(probe)
    precisions = judging.find_precisions(native, plan, precision)
    rows = judging.initial_weights(native) if weights == "own" else []
    misshapen = judging.different_shapes(probe)
    rows += misshapen
    missing: list[str] = []
    if not misshapen:
        make = partial(
            judging.make_implementations,
            native,
            wide,
            optimizer or sgd(),
            precisions,
            eager=eager,
            oracle=oracle,
        )
        judge = partial(
            judging.compare_phases,
            plan=plan,
            native=native,
            precisions=precisions,
            tolerances=tolerances,
            seed=seed,
        )
        try:
            rows += judge(make(compare_wide=not (native.flax.wide or oracle)))
        except WideningError as error:
            missing.append(f"{_NO_FLOAT64} {error}. {_CONCLUSIVE}")
            rows += judge(make(compare_wide=False))
        if oracle is None:
            missing += judging.undecided(rows)
    hints = list(different_settings(probe))
    if not all(row.passed for row in rows):
        hints = explanations(wide, probe, hints, rows)
    notes = _notes(torch_module, probe, weights)
    return Comparison(
        tuple(rows),
        native.match,
        tuple(notes),
        tuple(hints),
        tuple(missing),
        time.perf_counter() - started,
    )


def _probed_in_float64(
    native: ModulePair, inputs: Sequence[Array], *, train: bool
) -> tuple[ModulePair, Probe]:
    """The pair in float64, and what it is and does."""
    wide = native.in_float64()
    # A module may accept no other dtype than its own. Every other error comes again.
    with suppress(Exception):
        return wide, wide.probe(inputs, train=train)
    wide = native.in_float64(own_dtypes=True)
    return wide, wide.probe(inputs, train=train)


def _require_modules(flax_module: Any, torch_module: Any) -> None:
    """Refuse anything but a Flax module that can be called, and a PyTorch module, in this order."""
    import torch

    flax_kinds = nn.Module, nnx.Module
    if isinstance(flax_module, torch.nn.Module) and isinstance(torch_module, flax_kinds):
        raise ValueError(
            "Flax's module comes first and PyTorch's second, but they are exchanged: pass "
            "(flax_module, torch_module, inputs)."
        )
    for side, module, kinds, way_out in (
        ("Flax", flax_module, flax_kinds, "a module of flax.linen or flax.nnx"),
        ("PyTorch", torch_module, (torch.nn.Module,), "a torch.nn.Module"),
    ):
        if isinstance(module, type):
            raise ValueError(
                f"{side}'s module must be an instance, but it is the class {module.__name__}: pass "
                f"{module.__name__}(...)."
            )
        if not isinstance(module, kinds):
            raise ValueError(
                f"{side}'s module must be {way_out}, but it is of type {type(module).__name__}. "
                "Wrap a function in a module that calls it."
            )
    if isinstance(flax_module, nn.Module) and flax_module.scope is not None:
        raise ValueError(
            "Flax's module must not be bound to variables, but it is: pass the module alone, and "
            'with weights="flax" its variables as `variables`.'
        )


def _require_options(optimizer: Any, axes: Any, call: Any, tolerances: Any) -> None:
    """Refuse arguments of another kind than their parameters name."""
    if not (optimizer is None or isinstance(optimizer, Optimizer)):
        raise ValueError(
            "optimizer must be a bcn_flax.parity.Optimizer, which has one of each library, but it "
            f"is of type {type(optimizer).__name__}. Pass sgd(...) or adam(...) of "
            "bcn_flax.parity, or Optimizer(optax_optimizer, lambda parameters: "
            "torch_optimizer(parameters))."
        )
    if axes is not None and not (
        isinstance(axes, Mapping) and all(isinstance(order, AxisOrder) for order in axes.values())
    ):
        raise ValueError(
            "axes must map ranks or names to SAME, CHANNELS or another AxisOrder, as in {3: SAME}, "
            f"but it is {axes!r}."
        )
    if not (call is None or callable(call)):
        raise ValueError(
            "call must be a function from `train: bool` to keyword arguments, as in "
            f"lambda train: {{'train': train}}, but it is {call!r}."
        )
    if isinstance(tolerances, Tolerance) or not all(isinstance(t, Tolerance) for t in tolerances):
        raise ValueError(f"tolerances must be a list of Tolerance, but it is {tolerances!r}.")


def _require_reasons(tolerances: Sequence[Tolerance]) -> None:
    """Refuse a wider tolerance without a reason, and a factor that is not positive."""
    for tolerance in tolerances:
        if not tolerance.factor > 0:
            raise ValueError(f"The factor of a tolerance must be positive, but: {tolerance}.")
        if tolerance.factor > 1 and not tolerance.reason.strip():
            raise ValueError(
                f"A wider tolerance needs a reason, which the report prints, but: {tolerance}."
            )


def _refuse_random_numbers(probe: Probe) -> None:
    if any(calls.torch.random for calls in probe.calls.values()):
        raise ValueError(
            f"{_DETERMINISTIC} PyTorch's module draws random numbers. Switch that off for the "
            "comparison, on both sides."
        )
    paths = dict.fromkeys(p for calls in probe.calls.values() for p in calls.flax.random)
    if paths:
        names = ", ".join(map(module_name, paths))
        raise ValueError(
            f"{_DETERMINISTIC} Flax's module draws random numbers in {names}. Set the rate to 0 if "
            "that is dropout, or switch it off, on both sides."
        )
    for mode, calls in probe.calls.items():
        if calls.unlike_masks:
            raise ValueError(
                "Dropout gets the same masks on both sides, in the order of its calls, but in "
                f"{mode} {calls.unlike_masks}. Set the rate to 0 in Flax and p to 0 in PyTorch, or "
                "pass steps=0 to compare the evaluation alone."
            )


def _require_comparable_outputs(probe: Probe) -> None:
    """Refuse modules that return no arrays, different numbers of them, or complex numbers."""
    for mode, calls in probe.calls.items():
        flax, torch = [*calls.flax.outputs.values()], [*calls.torch.outputs.values()]
        if len(flax) != len(torch) or not flax:
            shapes = [y.shape for y in flax], [y.shape for y in torch]
            raise ValueError(
                "Both modules must return the same number of arrays, at least one, but in "
                f"{mode} Flax's returns {len(flax)}, of shapes {shapes[0]}, and PyTorch's "
                f"{len(torch)}, of shapes {shapes[1]}. Tuples, lists, dictionaries and dataclasses "
                "are flattened; if there is anything else, wrap your module in one that returns a "
                "tuple."
            )
        if any(np.issubdtype(y.dtype, np.complexfloating) for y in flax):
            raise ValueError(
                "Outputs must be real, but there are complex ones, whose gradients the two "
                "libraries define differently. Wrap your modules in modules that return real and "
                "imaginary parts."
            )


def _notes(torch_module: Any, probe: Probe, weights: Weights) -> Iterator[str]:
    """What a reader should know, whether the modules agree or not."""
    frozen = [name for name, p in torch_module.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"Trained here, though PyTorch has them frozen: {_listed(frozen)}."
    if weights != "random" and (same := probe.constants):
        yield (
            "These have a single value each, as in a fresh module, so that exchanging them would "
            f'not be noticed: {_listed(same)}. Pass weights="random" to draw values for all.'
        )


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    return ", ".join(names[:_SHOWN]) + more
