"""Flax's side: a linen or an NNX module as a pure function of its variables."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from bcn_flax.interop import trees
from bcn_flax.interop.trees import Variables
from bcn_flax.parity.observations import Observation, Values, numbered, observation

Module = nn.Module | nnx.Module
Call = Callable[[bool], Mapping[str, Any]]
# Of variables, inputs and whether to train: the outputs, and the statistics afterwards.
Forward = Callable[[Variables, Sequence[Any], bool], tuple[Any, dict[str, Any]]]


def mode_argument(module: Module) -> Call:
    """How a call of the module is told whether it trains, by the names of its arguments."""
    arguments = inspect.signature(module.__call__).parameters
    for name in ("train", "training", "is_training"):
        if name in arguments:
            return lambda train: {name: train}
    for name in ("use_running_average", "deterministic"):
        if name in arguments:
            return lambda train: {name: not train}
    return lambda train: {}


def forward_of(module: Module, call: Call | None) -> Forward:
    """The module as a function; `call` tells its keyword arguments, of whether to train."""
    call = call or mode_argument(module)
    if isinstance(module, nn.Module):
        return partial(_linen_forward, module, call)
    return partial(_nnx_forward, module, call)


def shapes_of(module: Module, inputs: Sequence[Values], call: Call | None) -> dict[str, Any]:
    """The shapes of the module's variables."""
    if isinstance(module, nnx.Module):
        return shapes(trees.variables_of(module))
    keywords = (call or mode_argument(module))(False)
    # PyTorch's weights replace all initial values: the keys are of no consequence.
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    variables = jax.eval_shape(partial(module.init, **keywords), keys, *inputs)
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


def shapes(variables: Variables) -> dict[str, Any]:
    """Of arrays or shapes, boxed or not, the shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nn.unbox(variables))


def in_float64(tree: Any) -> Any:
    """Arrays or shapes, those of floating point in float64. Wants `jax.enable_x64`."""

    def wide(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float64)
        return x.astype(np.float64)

    return jax.tree.map(wide, tree)


def is_differentiable(x: Any) -> bool:
    """Whether it is of floating point."""
    return jnp.issubdtype(x.dtype, jnp.floating)


class FlaxSide:
    """A module in training, eager or compiled."""

    def __init__(
        self,
        forward: Forward,
        variables: Variables,
        optimizer: optax.GradientTransformation,
        *,
        jit: bool,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Start from the variables.

        Args:
            forward: the module as a function.
            variables: to begin with.
            optimizer: of the parameters.
            jit: whether to compile the step.
            precision: the context in which JAX has the dtypes of the variables.
        """
        self._forward, self._optimizer, self._precision = forward, optimizer, precision
        self._variables = variables
        with precision():
            self._state = optimizer.init(variables.get("params", {}))
        self._step = jax.jit(self._compute, static_argnames="train") if jit else self._compute

    def __call__(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        """Go forward and back, and in training take a step of the optimizer."""
        with self._precision():
            arrays = [list(map(jnp.asarray, values)) for values in (inputs, output_gradients)]
            self._variables, self._state, outputs, dx, gradients = self._step(
                self._variables, self._state, *arrays, train=train
            )
            return observation(
                {name: np.asarray(y) for name, y in numbered(outputs).items()},
                {name: np.asarray(gradient) for name, gradient in dx.items()},
                gradients,
                self._variables,
            )

    def _compute(
        self,
        variables: Variables,
        state: Any,
        inputs: Sequence[jax.Array],
        output_gradients: Sequence[jax.Array],
        *,
        train: bool,
    ) -> tuple[Variables, Any, list[jax.Array], dict[str, jax.Array], Any]:
        params = variables.get("params", {})
        given = numbered(inputs)
        floats = {name: x for name, x in given.items() if is_differentiable(x)}

        def outputs_of(params: Any, floats: Any) -> tuple[list[jax.Array], Any]:
            arguments = [floats.get(name, x) for name, x in given.items()]
            outputs, statistics = self._forward({**variables, "params": params}, arguments, train)
            return jax.tree.leaves(outputs), statistics

        outputs, pullback, statistics = jax.vjp(outputs_of, params, floats, has_aux=True)
        gradients, dx = pullback(_cotangents(outputs, output_gradients))
        if train:
            changes, state = self._optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, changes)
        return {"params": params, **statistics}, state, outputs, dx, gradients


def _cotangents(outputs: Sequence[jax.Array], gradients: Sequence[jax.Array]) -> list[Any]:
    """The outputs' gradients, in their types; an output of integers has none."""
    return [
        dy.astype(y.dtype) if is_differentiable(y) else np.zeros(y.shape, jax.dtypes.float0)
        for y, dy in zip(outputs, gradients, strict=True)
    ]


def _linen_forward(
    module: nn.Module, call: Call, variables: Variables, inputs: Sequence[Any], train: bool
) -> tuple[Any, dict[str, Any]]:
    # Statistics may be written in evaluation too, so that one that moves there is seen.
    outputs, updates = module.apply(variables, *inputs, **call(train), mutable=["batch_stats"])
    return outputs, dict(updates)


def _nnx_forward(
    module: nnx.Module, call: Call, variables: Variables, inputs: Sequence[Any], train: bool
) -> tuple[Any, dict[str, Any]]:
    module = trees.replace_leaves(nnx.clone(module), trees.flax_leaves(variables))
    (module.train if train else module.eval)()
    outputs = module(*inputs, **call(train))
    after = trees.variables_of(module)
    return outputs, {name: after[name] for name in ("batch_stats",) if name in after}
