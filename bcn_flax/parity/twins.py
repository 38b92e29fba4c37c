"""One model twice, in Flax and in PyTorch, with the same weights."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from bcn_flax import interop
from bcn_flax.interop import layouts, trees
from bcn_flax.parity import flax_side, torch_side
from bcn_flax.parity.axes import Axes
from bcn_flax.parity.errors import narrowest
from bcn_flax.parity.flax_side import Call, FlaxSide, Forward, Module
from bcn_flax.parity.observations import Values
from bcn_flax.parity.optimizers import Optimizer
from bcn_flax.parity.precision import flax_narrows, torch_narrows
from bcn_flax.parity.shaking import Shaking
from bcn_flax.parity.torch_side import TorchSide

Weights = Literal["torch", "flax", "own", "random"]


class Twins(NamedTuple):
    """The two modules and what connects them.

    Attributes:
        flax: of linen or NNX.
        torch: a copy of the module, all of whose parameters are trained.
        variables: of the Flax module.
        match: which of PyTorch's tensors is which of these.
        call: keyword arguments of a call of the Flax module, of whether it trains.
        axes: how those of inputs and outputs lie.
        wide: whether there is float64 in it.
        known_outputs: what `outputs` has found so far, since to trace a model takes its time.
    """

    flax: Module
    torch: Any
    variables: Mapping[str, Any]
    match: interop.Match
    call: Call
    axes: Axes
    wide: bool
    known_outputs: dict[Any, list[jax.ShapeDtypeStruct]]

    @property
    def forward(self) -> Forward:
        """Flax's module as a function."""
        return flax_side.forward_of(self.flax, self.call)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which JAX has float64, if it is needed."""
        return jax.enable_x64(True) if self.wide else nullcontext()

    def flax_side(self, optimizer: Optimizer, *, jit: bool) -> FlaxSide:
        """Flax's module in training."""
        return FlaxSide(
            self.forward, self.variables, optimizer.flax, jit=jit, precision=self.precision
        )

    def torch_side(self, optimizer: Optimizer, shake: float | None = None) -> TorchSide:
        """PyTorch's module in training, shaken by a relative error if there is one."""
        return TorchSide(
            self.torch,
            self.match,
            self.axes,
            optimizer,
            precision=self.precision,
            shaking=Shaking(shake) if shake is not None else None,
        )

    def outputs(self, inputs: Sequence[Values], train: bool) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of Flax's outputs."""
        key = train, tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.known_outputs:
            with self.precision():
                shapes = jax.eval_shape(self._outputs(train), self.variables, list(inputs))
            self.known_outputs[key] = jax.tree.leaves(shapes)
        return self.known_outputs[key]

    def torch_outputs(self, inputs: Sequence[Values], train: bool) -> dict[str, Values]:
        """PyTorch's outputs in Flax's order of axes, by name."""
        module = copy.deepcopy(self.torch).train(train)
        given = torch_side.tensors(module, inputs, self.axes)
        outputs = torch_side.outputs_of(module, [*given.values()])
        return {
            name: torch_side.in_flax(f"output {name}", y, self.axes) for name, y in outputs.items()
        }

    def narrowing(self, inputs: Sequence[Values]) -> list[str]:
        """Who makes something narrower than float64 though it is given float64."""
        with self.precision():
            flax = flax_narrows(self._outputs(False), self.variables, list(inputs))
        module = copy.deepcopy(self.torch).eval()
        given = torch_side.tensors(module, inputs, self.axes)
        torch = torch_narrows(module, [*given.values()])
        return ["Flax"] * flax + ["PyTorch"] * torch

    def dtype(self, inputs: Sequence[Values]) -> np.dtype[Any]:
        """The narrowest dtype in which anything is computed, as far as it can be seen."""
        seen = [
            *map(layouts.dtype, inputs),
            *(y.dtype for y in self.outputs(inputs, False)),
            *(x.dtype for x in self.leaves()),
            *(layouts.dtype(p) for p in self.torch.parameters()),
        ]
        return narrowest([*seen, np.float64 if self.wide else np.float32])

    def leaves(self) -> list[Any]:
        """Flax's parameters and statistics."""
        return jax.tree.leaves(self.variables)

    def _outputs(self, train: bool) -> Any:
        return lambda variables, inputs: self.forward(variables, inputs, train)[0]


def twins(
    flax: Module,
    torch: Any,
    inputs: Sequence[Values],
    *,
    weights: Weights,
    variables: Mapping[str, Any] | None,
    call: Call | None,
    axes: Axes,
    rng: np.random.Generator,
    **matching: Any,
) -> Twins:
    """Bring the two modules together; see `compare` for the arguments.

    Raises:
        ValueError: the weights do not match, or `weights` and `variables` contradict each other, or
            inputs and modules are of different precision.
    """
    variables = _own_variables(flax, weights, variables)
    wide = _is_wide(torch, inputs)
    call = call or flax_side.mode_argument(flax)
    torch = torch_side.trainable(torch)
    with jax.enable_x64(True) if wide else nullcontext():
        own = variables or flax_side.shapes_of(flax, inputs, call)
        if wide:
            flax, own = _in_float64(flax, own)
        match = interop.match(torch, _like(flax, own), **matching)
        if weights == "random":
            own = _random(own, rng)
        if weights in ("flax", "random"):
            torch.load_state_dict(match.to_torch(own))
        if weights == "torch":
            own = match.to_flax(torch)
    return Twins(flax, torch, own, match, call, axes, wide, {})


def in_float64(them: Twins, **matching: Any) -> Twins:
    """The same twins in float64."""
    with jax.enable_x64(True):
        flax, variables = _in_float64(them.flax, them.variables)
        torch = torch_side.in_float64(them.torch)
        match = interop.match(torch, _like(flax, variables), **matching)
    return Twins(flax, torch, variables, match, them.call, them.axes, True, {})


def constants(them: Twins) -> list[str]:
    """The parameters and statistics that have one value in all places, as in a fresh module."""
    return [
        layouts.path_name(path[1:])
        for path, x in trees.flax_leaves(them.variables).items()
        if np.size(x) > 1 and np.all(np.asarray(x) == np.ravel(x)[0])
    ]


def _own_variables(
    flax: Module, weights: Weights, variables: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    if weights not in ("torch", "flax", "own", "random"):
        raise ValueError(f"weights must be 'torch', 'flax', 'own' or 'random', not {weights!r}.")
    if isinstance(flax, nnx.Module):
        if variables is not None:
            raise ValueError("An NNX module has its own variables: `variables` are for linen's.")
        return trees.variables_of(flax)
    if (weights in ("flax", "own")) != (variables is not None):
        raise ValueError(
            f"`variables` are Flax's weights, which count if weights are 'flax' or 'own', but "
            f"weights are {weights!r} and there are {'none' if variables is None else 'some'}."
        )
    return nn.unbox(variables)


def _is_wide(torch: Any, inputs: Sequence[Values]) -> bool:
    """Whether inputs and modules are in float64."""
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


def _in_float64(flax: Module, variables: Mapping[str, Any]) -> tuple[Module, Mapping[str, Any]]:
    """Flax's module and its variables or their shapes, in float64."""
    variables = flax_side.in_float64(variables)
    if isinstance(flax, nnx.Module):
        flax = trees.replace_leaves(nnx.clone(flax), trees.flax_leaves(variables))
    return flax, variables


def _like(flax: Module, variables: Mapping[str, Any]) -> Any:
    """What tells most of Flax's layers."""
    return flax if isinstance(flax, nnx.Module) else variables


def _random(variables: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Values for parameters and statistics: all different, and sane.

    Kernels keep the size of what passes through; everything else is near 1, variances included.
    """

    def draw(x: Any) -> Any:
        if len(x.shape) < 2:
            return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
        fan_in = np.prod(x.shape[:-1])
        return (rng.standard_normal(x.shape) / np.sqrt(fan_in)).astype(x.dtype)

    return jax.tree.map(lambda x: jax.numpy.asarray(draw(x)), flax_side.shapes(variables))
