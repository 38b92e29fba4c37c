"""One model twice, in Flax and in PyTorch, with the same weights."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from bcn_flax import interop
from bcn_flax.interop import arrays, trees
from bcn_flax.parity import flax_side, torch_side
from bcn_flax.parity.axes import Axes
from bcn_flax.parity.flax_side import Call, FlaxSide, Forward, Module
from bcn_flax.parity.observations import Values
from bcn_flax.parity.optimizers import Optimizer
from bcn_flax.parity.torch_side import TorchSide

Weights = Literal["torch", "flax", "own", "random"]


class Twins(NamedTuple):
    """The two modules and what connects them.

    Attributes:
        flax: of linen or NNX.
        torch: a copy of the module.
        variables: of the Flax module.
        match: which of PyTorch's tensors is which of these.
        call: keyword arguments of a call of the Flax module, of whether it trains.
        axes: how those of inputs and outputs lie.
        wide: whether there is float64 in it.
    """

    flax: Module
    torch: Any
    variables: Mapping[str, Any]
    match: interop.Match
    call: Call
    axes: Axes
    wide: bool

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

    def torch_side(
        self, optimizer: Optimizer, shake: np.random.Generator | None = None
    ) -> TorchSide:
        """PyTorch's module in training."""
        return TorchSide(
            self.torch,
            self.match,
            self.axes,
            optimizer.torch,
            precision=self.precision,
            shake=shake,
        )

    def outputs(self, inputs: Sequence[Values], train: bool) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of Flax's outputs."""
        with self.precision():
            outputs, _ = jax.eval_shape(
                lambda variables, inputs: self.forward(variables, inputs, train),
                self.variables,
                list(inputs),
            )
        return jax.tree.leaves(outputs)

    def flax_is_wide(self, inputs: Sequence[Values]) -> bool:
        """Whether Flax's module computes in float64 if it is given float64."""
        floats = filter(
            flax_side.is_differentiable, self.outputs(flax_side.in_float64(inputs), False)
        )
        return all(y.dtype == np.float64 for y in floats)


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
        ValueError: the weights do not match, or `weights` and `variables` contradict each other.
    """
    if weights not in ("torch", "flax", "own", "random"):
        raise ValueError(f"weights must be 'torch', 'flax', 'own' or 'random', not {weights!r}.")
    owns = weights in ("flax", "own")
    if isinstance(flax, nnx.Module):
        if variables is not None:
            raise ValueError("An NNX module has its own variables: `variables` are for linen's.")
        variables = trees.variables_of(flax)
    elif owns != (variables is not None):
        raise ValueError(
            f"`variables` are Flax's weights, which count if weights are 'flax' or 'own', but "
            f"weights are {weights!r} and there are {'none' if variables is None else 'some'}."
        )
    call = call or flax_side.mode_argument(flax)
    wide = any(arrays.dtype(x) == np.float64 for x in inputs)
    with jax.enable_x64(True) if wide else nullcontext():
        own = variables or flax_side.shapes_of(flax, inputs, call)
        if wide and not owns:
            flax, own = _in_float64(flax, own)
        match = interop.match(torch, _like(flax, own), **matching)
        torch = copy.deepcopy(torch)
        if weights == "random":
            own = _random(own, rng)
        if weights in ("flax", "random"):
            torch.load_state_dict(match.to_torch(own))
        if weights == "torch":
            own = match.to_flax(torch)
    return Twins(flax, torch, own, match, call, axes, wide)


def in_float64(them: Twins, **matching: Any) -> Twins:
    """The same twins in float64."""
    with jax.enable_x64(True):
        flax, variables = _in_float64(them.flax, them.variables)
        torch = torch_side.in_float64(them.torch)
        match = interop.match(torch, _like(flax, variables), **matching)
    return them._replace(flax=flax, torch=torch, variables=variables, match=match, wide=True)


def _in_float64(flax: Module, variables: Mapping[str, Any]) -> tuple[Module, Mapping[str, Any]]:
    """Flax's module and its variables or their shapes, in float64."""
    variables = flax_side.in_float64(variables)
    if isinstance(flax, nnx.Module):
        flax = trees.filled(nnx.clone(flax), trees.flax_leaves(variables))
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
