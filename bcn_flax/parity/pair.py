"""A Flax and a PyTorch module with the same weights, and a probe of what both of them do."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import linen as nn
from flax import nnx

from bcn_flax.interop import Match, layouts, match
from bcn_flax.interop.layouts import Array, Path
from bcn_flax.interop.trees import Variables
from bcn_flax.parity import torch_side
from bcn_flax.parity.counterparts import counterparts
from bcn_flax.parity.dropout import Masks
from bcn_flax.parity.flax_side import (
    Call,
    FlaxModel,
    FlaxSide,
    FlaxTrace,
    Module,
    flax_model,
)
from bcn_flax.parity.protocol import (
    Arguments,
    Optimizer,
    float64_enabled,
    observation,
    split_arguments,
    to_float64,
)
from bcn_flax.parity.torch_side import AXES, Axes, Change, TorchRun, TorchSide

Weights = Literal["torch", "flax", "own", "random"]
# From a PyTorch module and Flax's variables or module to which tensor is which variable.
Matcher = Callable[[Any, Any], Match]


class Calls(NamedTuple):
    """A call of both modules.

    Attributes:
        flax: Flax's.
        torch: PyTorch's.
        unlike_masks: why dropout does not have the same masks in both; empty if it has.
        rates: of dropout in Flax and in PyTorch, if it has.
    """

    flax: FlaxTrace
    torch: TorchRun
    unlike_masks: str = ""
    rates: Sequence[tuple[float, float]] = ()


class PairedModule(NamedTuple):
    """A module inside of Flax's, and its counterpart inside of PyTorch's.

    Attributes:
        path: in Flax.
        flax: the module; None if no call reaches it.
        torch: the counterpart.
    """

    path: Path
    flax: Any
    torch: Any


class Probe(NamedTuple):
    """What both modules are and do, found by one call in evaluation and one in training.

    Attributes:
        inputs: of the calls.
        calls: "evaluation", and "training" if the modules are trained.
        modules: those whose arguments should have the same meaning.
        same_values: by PyTorch's name, the paths of those that should get and return the same.
        constants: the parameters and statistics that have a single value each, as in a fresh
            module.
    """

    inputs: Sequence[Array]
    calls: Mapping[str, Calls]
    modules: list[PairedModule]
    same_values: Mapping[str, Path]
    constants: list[str]


class ModulePair(NamedTuple):
    """A Flax and a PyTorch module, and what connects them.

    Attributes:
        flax: of linen or NNX, with its variables.
        torch: a copy of the module, all of whose parameters are trained.
        axes: the order of the axes of inputs and outputs.
        matcher: finds `match`.
        match: which of PyTorch's tensors is which of Flax's variables.
        same_weights: whether one has got the weights of the other.
    """

    flax: FlaxModel
    torch: Any
    axes: Axes
    matcher: Matcher
    match: Match
    same_weights: bool = True

    def in_float64(self, *, own_dtypes: bool = False) -> "ModulePair":
        """The same modules and weights in float64; see `FlaxModel.in_float64`."""
        if self.flax.wide:
            return self
        flax, torch = (
            self.flax.in_float64(own_dtypes=own_dtypes),
            copy.deepcopy(self.torch).double(),
        )
        matched = _matched(flax, torch, self.matcher)
        if self.same_weights:
            # A sum of PyTorch's biases, for example, has been rounded in Flax's variables.
            with float64_enabled(True):
                flax = flax._replace(variables=matched.to_flax(torch))
        return self._replace(flax=flax, torch=torch, match=matched)

    def probe(self, inputs: Sequence[Array], *, train: bool = True) -> Probe:
        """Call each module once in evaluation and, if they are trained, once in training."""
        if self.flax.wide:
            inputs = to_float64(inputs)
        calls = {
            mode: self._call(inputs, mode == "training")
            for mode in ("evaluation", "training")[: 1 + train]
        }
        flax = {path: part for c in calls.values() for path, part in c.flax.modules.items()}
        weights = observation({}, {}, {}, self.flax.variables)
        constants = [n.path for n, x in weights.items() if x.size > 1 and (x == x.flat[0]).all()]
        known, torch = counterparts(self.match, self.torch), dict(self.torch.named_modules())
        modules = [PairedModule(path, flax.get(path), torch[name]) for path, name in known.settings]
        return Probe(inputs, calls, modules, known.values, constants)

    def _call(self, inputs: Sequence[Array], train: bool) -> Calls:
        calls = Calls(self.flax.trace(inputs, train), self.run_torch(inputs, train))
        masks = self.flax.masks
        if masks is None or masks.problem:
            return calls._replace(unlike_masks=masks.problem if masks else "")
        rates = [(a.rate, b.rate) for a, b in zip(masks.flax, masks.torch, strict=True)]
        return calls._replace(rates=rates)

    def run_torch(
        self, inputs: Sequence[Array], train: bool, *, change: Change | None = None
    ) -> TorchRun:
        """Call PyTorch's module once; see `torch_side.run`."""
        return torch_side.run(
            self.torch,
            self.flax.arguments,
            inputs,
            self.axes,
            train,
            widened=self.flax.widened,
            change=change,
            masks=self.flax.masks,
        )

    def new_flax_side(self, optimizer: Optimizer, *, jit: bool = True) -> FlaxSide:
        """Flax's module, to be trained."""
        flax = self.flax
        return FlaxSide(
            flax.forward,
            flax.variables,
            optimizer.flax,
            jit=jit,
            wide=flax.wide,
            widened=flax.widened,
            arguments=flax.arguments,
        )

    def new_torch_side(
        self,
        optimizer: Optimizer,
        *,
        perturbation: float | None = None,
        every_operation: bool = False,
    ) -> TorchSide:
        """PyTorch's module, to be trained; see there for the arguments."""
        return TorchSide(
            self.torch,
            self.match,
            self.flax.arguments,
            self.axes,
            optimizer,
            wide=self.flax.wide,
            widened=self.flax.widened,
            perturbation=perturbation,
            every_operation=every_operation,
            masks=self.flax.masks,
        )


def module_pair(
    flax: Module,
    torch: Any,
    inputs: Sequence[Array],
    *,
    arguments: Arguments | None = None,
    weights: Weights = "torch",
    variables: Variables | None = None,
    call: Call | None = None,
    axes: Axes = AXES,
    matcher: Matcher = match,
    rng: np.random.Generator | None = None,
) -> ModulePair:
    """Give both modules the same weights; see `compare` for the arguments.

    `arguments` says how the inputs become the arguments of a call; by default each is one.

    Raises:
        ValueError: the weights do not match, `weights` and `variables` contradict each other, or
            inputs and modules are of different precision.
    """
    _require_variables_if_used(flax, weights, variables)
    wide = _computes_in_float64(torch, inputs)
    arguments = arguments or split_arguments("inputs", tuple(inputs))[0]
    variables = nn.unbox(variables)
    model = flax_model(flax, variables, arguments, inputs, call, wide=wide, masks=Masks())
    torch = torch_side.trainable(torch)
    matched = _matched(model, torch, matcher)
    if weights == "random":
        model = model.randomized(rng or np.random.default_rng(0))
    with float64_enabled(wide):
        if weights in ("flax", "random"):
            torch.load_state_dict(matched.to_torch(model.variables))
        # A random number is rounded to PyTorch's dtype, which may be the narrower one.
        if weights in ("torch", "random"):
            model = model._replace(variables=matched.to_flax(torch))
    return ModulePair(model, torch, axes, matcher, matched, weights != "own")


def _require_variables_if_used(flax: Module, weights: Weights, variables: Variables | None) -> None:
    if weights not in ("torch", "flax", "own", "random"):
        raise ValueError(f"weights must be 'torch', 'flax', 'own' or 'random', not {weights!r}.")
    if isinstance(flax, nnx.Module):
        if variables is not None:
            raise ValueError("An NNX module has its own variables: `variables` are for linen's.")
    elif (weights in ("flax", "own")) != (variables is not None):
        raise ValueError(
            "`variables` are Flax's weights, which are used if weights are 'flax' or 'own', but "
            f"weights are {weights!r} and there are {'none' if variables is None else 'some'}."
        )


def _computes_in_float64(torch: Any, inputs: Sequence[Array]) -> bool:
    """Whether inputs and modules are in float64.

    Raises:
        ValueError: only one of them is.
    """
    given = [layouts.dtype(x) for x in inputs if layouts.kind(x) == "floating"]
    held = [layouts.dtype(p) for p in torch.parameters() if p.is_floating_point()]
    if np.float64 in given and held and np.float64 not in held:
        raise ValueError(
            "Inputs and modules must be of one precision, but the inputs are in float64, which is "
            f"NumPy's default, and PyTorch's parameters in {held[0]}: give "
            "inputs.astype(np.float32), or compare in float64 with torch_module.double()."
        )
    if given and np.float64 not in given and {*held} == {np.dtype(np.float64)}:
        raise ValueError(
            "Inputs and modules must be of one precision, but PyTorch's parameters are in float64 "
            f"and the inputs in {given[0]}: give inputs.astype(np.float64)."
        )
    return np.float64 in (*given, *held)


def _matched(flax: FlaxModel, torch: Any, matcher: Matcher) -> Match:
    # An NNX module tells more about its layers than its variables.
    like = flax.module if isinstance(flax.module, nnx.Module) else flax.variables
    with float64_enabled(flax.wide):
        return matcher(torch, like)
