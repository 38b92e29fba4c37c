"""The Flax side: a linen or NNX module as a pure function, which is traced and trained."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.core.tracers import current_trace
from flax.errors import InvalidRngError

from bcn_flax.interop import trees
from bcn_flax.interop.layouts import Array, Path, is_array
from bcn_flax.interop.trees import Variables
from bcn_flax.parity import widening
from bcn_flax.parity.dropout import Masks, mask_nnx, with_masks
from bcn_flax.parity.protocol import (
    Arguments,
    Observation,
    Snapshot,
    float64_enabled,
    is_differentiable,
    numbered,
    observation,
    output_leaves,
    to_float64,
)

Module = nn.Module | nnx.Module
Call = Callable[[bool], Mapping[str, Any]]
# From variables, input arrays and `train` to the outputs and the statistics after the call.
Forward = Callable[[Variables, Sequence[Any], bool], tuple[list[Any], dict[str, Any]]]


class FlaxTrace(NamedTuple):
    """A call of a Flax module, traced and not run.

    Attributes:
        outputs: by name, their shapes and dtypes.
        modules: by path, the modules that were called; for NNX, all modules.
        random: the paths of modules that draw random numbers. If there are any, the rest may be
            missing.
        run: runs the call and returns what each module gets and returns, in order. There is nothing
            of those inside of a transformation such as `nn.scan`.
    """

    outputs: dict[str, jax.ShapeDtypeStruct]
    modules: dict[Path, Any]
    random: list[Path]
    run: Callable[[], list[Snapshot]]


class FlaxModel(NamedTuple):
    """A Flax module with its variables.

    Attributes:
        module: of linen or NNX.
        variables: parameters and statistics, or their shapes, in linen's form.
        arguments: how the input arrays become the arguments of a call.
        call: function from `train: bool` to the keyword arguments that depend on it.
        wide: whether it is given float64.
        forward: the module as a pure function.
        widened: whether it also computes in float64 what the module narrows.
        masks: of its dropout; None if it draws its own.
    """

    module: Module
    variables: Variables
    arguments: Arguments
    call: Call
    wide: bool
    forward: Forward
    widened: bool = False
    masks: Masks | None = None

    @property
    def leaves(self) -> list[Any]:
        """The parameters and statistics."""
        return jax.tree.leaves(self.variables)

    def in_float64(self, *, own_dtypes: bool = False) -> "FlaxModel":
        """The same module and variables, computed in float64 whatever the module narrows.

        With `own_dtypes`, modules keep their `dtype`, because one accepts no other.
        """
        model = flax_model(
            self.module,
            self.variables,
            self.arguments,
            [],
            self.call,
            wide=True,
            masks=self.masks,
        )
        model = model._replace(widened=True)
        if own_dtypes:
            return model
        if isinstance(model.module, nnx.Module):
            widening.set_wide_dtypes(model.module)
        return model._replace(forward=widening.wide_dtypes(model.forward))

    def randomized(self, rng: np.random.Generator) -> "FlaxModel":
        """The same module with different values for all parameters and statistics.

        Kernels keep the scale of their inputs; everything else, such as a variance, is near 1.
        """

        def draw(x: Any) -> jax.Array:
            if len(x.shape) < 2:
                return jnp.asarray(rng.uniform(0.5, 1.5, x.shape).astype(x.dtype))
            fan_in = np.prod(x.shape[:-1])
            return jnp.asarray((rng.standard_normal(x.shape) / np.sqrt(fan_in)).astype(x.dtype))

        with float64_enabled(self.wide):
            return self._replace(variables=jax.tree.map(draw, nn.unbox(self.variables)))

    def output_shapes(self, inputs: Sequence[Array], train: bool) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the outputs."""
        # JAX keeps traces of the same function with the same shapes.
        forward = jax.jit(self.forward, static_argnums=2)
        with float64_enabled(self.wide):
            outputs, _ = forward.eval_shape(self.variables, list(inputs), train)
        return outputs

    def trace(self, inputs: Sequence[Array], train: bool) -> FlaxTrace:
        """Trace a call."""
        called: dict[Path, Any] = {}
        taken: list[Snapshot] = []
        random: list[Path] = []
        if isinstance(self.module, nnx.Module):
            called = {
                trees.linen_path(place): part for place, part in nnx.iter_modules(self.module)
            }
        with float64_enabled(self.wide):
            try:
                traced = jax.jit(partial(self._recorded, called, taken, random, train=train)).trace(
                    self.variables, list(inputs)
                )
            except InvalidRngError:
                return FlaxTrace({}, called, random[:1], list)

        def run() -> list[Snapshot]:
            arguments = self.variables, list(inputs)
            with float64_enabled(self.wide):
                compute = traced.lower().compile
                if self.widened:
                    with suppress(widening.WideningError):
                        compute = (
                            jax.jit(widening.widened_program(traced)).lower(*arguments).compile
                        )
                _, arrays = compute()(*arguments)
            return [
                snapshot._replace(arrays=[*map(np.asarray, own)])
                for snapshot, own in zip(taken, arrays, strict=True)
            ]

        outputs = numbered(traced.out_info[0])
        return FlaxTrace(outputs, called, random, run)

    def _recorded(
        self,
        called: dict[Path, Any],
        taken: list[Snapshot],
        random: list[Path],
        variables: Variables,
        inputs: Sequence[Any],
        *,
        train: bool,
    ) -> tuple[list[Any], list[list[Any]]]:
        """The outputs of the module, and what all modules inside get and return.

        Adds the modules that are called to `called`, to `taken` what the arrays are, and to
        `random` the modules that draw random numbers.
        """
        calls: Counter[Path] = Counter()
        arrays: list[list[Any]] = []
        trace = current_trace()

        def record(path: Path, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if current_trace() != trace:  # inside of nn.scan or the like
                return method(*args, **kwargs)
            call = calls[path]
            calls[path] += 1
            taken.append(Snapshot(path, call, False, []))
            arrays.append(_arrays([args, kwargs]))
            outputs = method(*args, **kwargs)
            taken.append(Snapshot(path, call, True, []))
            arrays.append(_arrays(outputs))
            return outputs

        def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            path = context.module.path
            called.setdefault(path, context.module)
            try:
                if context.method_name != "__call__":
                    return method(*args, **kwargs)
                return record(path, method, args, kwargs)
            except InvalidRngError:
                random.append(path)  # the innermost module is the first
                raise

        if isinstance(self.module, nnx.Module):
            module = _recording(self.module, record, random.append)
            forward = forward_of(module, self.call, self.arguments, self.masks)
            outputs, _ = forward(variables, inputs, train)
        else:
            with nn.intercept_methods(intercept):
                outputs, _ = self.forward(variables, inputs, train)
        return outputs, arrays


def flax_model(
    module: Module,
    variables: Variables | None,
    arguments: Arguments,
    inputs: Sequence[Array],
    call: Call | None,
    *,
    wide: bool,
    masks: Masks | None = None,
) -> FlaxModel:
    """A module with its variables.

    Args:
        module: of linen or NNX; is not changed.
        variables: its parameters and statistics; None for NNX's own, or the shapes of linen's.
        arguments: how the inputs become the arguments of a call.
        inputs: the arrays of a call, from which these shapes follow.
        call: see `compare`.
        wide: whether to compute in float64.
        masks: of its dropout, in training; by default it draws its own.
    """
    call = call or mode_argument(module)
    with float64_enabled(wide):
        if variables is None:
            variables = _initial_variables(module, arguments, inputs, call)
        if wide:
            variables = to_float64(variables)
        if isinstance(module, nnx.Module):
            module = trees.replace_leaves(nnx.clone(module), trees.flax_leaves(variables))
    if isinstance(module, nnx.Module) and masks is not None:
        mask_nnx(module, masks)
    forward = forward_of(module, call, arguments, masks)
    return FlaxModel(module, variables, arguments, call, wide, forward, masks=masks)


def _initial_variables(
    module: Module, arguments: Arguments, inputs: Sequence[Array], call: Call
) -> Variables:
    """NNX's variables, or the shapes of linen's."""
    if isinstance(module, nnx.Module):
        return trees.variables_of(module)
    # Other values replace the initial ones, so the keys do not matter.
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}

    def init(inputs: Sequence[Any]) -> Variables:
        positional, keywords = arguments.flax(inputs)
        return module.init(keys, *positional, **keywords, **call(False))

    initial = nn.unbox(jax.eval_shape(init, list(inputs)))
    return {name: initial[name] for name in ("params", "batch_stats") if name in initial}


def mode_argument(module: Module) -> Call:
    """Function from `train: bool` to the call keywords of the module, by its argument names."""
    arguments = inspect.signature(module.__call__).parameters
    for name in ("train", "training", "is_training"):
        if name in arguments:
            return lambda train: {name: train}
    for name in ("use_running_average", "deterministic"):
        if name in arguments:
            return lambda train: {name: not train}
    return lambda train: {}


def forward_of(
    module: Module,
    call: Call | None,
    arguments: Arguments | None = None,
    masks: Masks | None = None,
) -> Forward:
    """The module as a pure function.

    Args:
        module: of linen or NNX.
        call: from `train: bool` to the keyword arguments that depend on it.
        arguments: how the input arrays become the others; by default each is one, by position.
        masks: of linen's dropout; by default it draws its own.
    """
    call = call or mode_argument(module)
    if isinstance(module, nn.Module):
        of_module = partial(_linen_forward, module)
    else:
        of_module = partial(_nnx_forward, module)

    def forward(
        variables: Variables, inputs: Sequence[Any], train: bool
    ) -> tuple[list[Any], dict[str, Any]]:
        positional, keywords = arguments.flax(inputs) if arguments else (inputs, {})
        keywords = {**keywords, **call(train)}
        outputs, statistics = of_module(variables, positional, keywords, train)
        return [y for y in output_leaves(outputs) if is_array(y) or np.isscalar(y)], statistics

    return forward if masks is None else with_masks(forward, masks)


class FlaxSide:
    """A Flax module in training, eager or compiled."""

    def __init__(
        self,
        forward: Forward,
        variables: Variables,
        optimizer: optax.GradientTransformation,
        *,
        jit: bool,
        wide: bool = False,
        widened: bool = False,
        arguments: Arguments | None = None,
    ) -> None:
        """Start from the variables.

        Args:
            forward: the module as a function.
            variables: the initial ones.
            optimizer: of the parameters.
            jit: whether to compile the step.
            wide: whether the variables and inputs are of float64.
            widened: whether to compute in float64 what the module narrows, too.
            arguments: the names of the inputs; by default their numbers.
        """
        self._named = arguments.named if arguments else numbered
        self._forward, self._optimizer, self._wide = forward, optimizer, wide
        self._variables = variables
        with float64_enabled(wide):
            self._state = optimizer.init(variables.get("params", {}))
        compute = self._widened if widened else self._compute
        self._step = jax.jit(compute, static_argnames="train") if jit else compute

    def __call__(
        self, inputs: Sequence[Array], output_gradients: Sequence[Array], train: bool
    ) -> Observation:
        """Run forward and backward; in training, take a step of the optimizer."""
        with float64_enabled(self._wide):
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

    def _widened(self, *arrays: Any, train: bool) -> Any:
        return widening.widened(partial(self._compute, train=train))(*arrays)

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
        given = self._named(inputs)
        floats = {name: x for name, x in given.items() if is_differentiable(x)}

        def outputs_of(params: Any, floats: Any) -> tuple[list[jax.Array], Any]:
            arguments = [floats.get(name, x) for name, x in given.items()]
            return self._forward({**variables, "params": params}, arguments, train)

        outputs, pullback, statistics = jax.vjp(outputs_of, params, floats, has_aux=True)
        gradients, dx = pullback(_cotangents(outputs, output_gradients))
        if train:
            changes, state = self._optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, changes)
        return {"params": params, **statistics}, state, outputs, dx, gradients


def _cotangents(outputs: Sequence[jax.Array], gradients: Sequence[jax.Array]) -> list[Any]:
    """The outputs' gradients in the outputs' dtypes; integers have none."""
    return [
        dy.astype(y.dtype) if is_differentiable(y) else np.zeros(y.shape, jax.dtypes.float0)
        for y, dy in zip(outputs, gradients, strict=True)
    ]


def _linen_forward(
    module: nn.Module, variables: Variables, inputs: Sequence[Any], keywords: Any, train: bool
) -> tuple[Any, dict[str, Any]]:
    # Statistics are mutable in evaluation too, so that one that changes there is noticed.
    outputs, updates = module.apply(variables, *inputs, **keywords, mutable=["batch_stats"])
    return outputs, dict(updates)


def _nnx_forward(
    module: nnx.Module, variables: Variables, inputs: Sequence[Any], keywords: Any, train: bool
) -> tuple[Any, dict[str, Any]]:
    module = trees.replace_leaves(nnx.clone(module), trees.flax_leaves(variables))
    (module.train if train else module.eval)()
    outputs = module(*inputs, **keywords)
    after = trees.variables_of(module)
    return outputs, {name: after[name] for name in ("batch_stats",) if name in after}


def _arrays(tree: Any) -> list[Any]:
    """The arrays of numbers, and no random keys."""
    found = [x for x in output_leaves(tree) if is_array(x)]
    return [x for x in found if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]


def _recording(
    module: nnx.Module, record: Callable[..., Any], drawn: Callable[[Path], None]
) -> nnx.Module:
    """A copy of a module whose parts record what they get, return and draw, by their path.

    Each part, and each stream of random numbers, gets a class of its own.
    """
    module = nnx.clone(module)
    paths = {place: trees.linen_path(place) for place, _ in nnx.iter_modules(module)}
    for place, part in list(nnx.iter_graph(module)):
        if place in paths:
            kind = _recording_class(type(part), paths[place], record)
        elif isinstance(part, nnx.RngStream):
            around = next(place[:n] for n in range(len(place), -1, -1) if place[:n] in paths)
            kind = _noticing_class(type(part), partial(drawn, paths[around]))
        else:
            continue
        object.__setattr__(part, "__class__", kind)
    return module


def _noticing_class(kind: Any, notice: Callable[[], None]) -> Any:
    def call(self: Any) -> Any:
        notice()
        return kind.__call__(self)

    return type(kind)(kind.__name__, (kind,), {"__call__": call})


def _recording_class(kind: Any, path: Path, record: Callable[..., Any]) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record(path, partial(kind.__call__, self), args, kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": call})
