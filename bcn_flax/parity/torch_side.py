"""The PyTorch side: a module, with its arrays under Flax's names and in Flax's layouts."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from bcn_flax.interop import Match, layouts
from bcn_flax.interop.layouts import Array
from bcn_flax.parity.dropout import Masks, mask_torch
from bcn_flax.parity.protocol import (
    Arguments,
    Observation,
    Optimizer,
    Snapshot,
    float64_enabled,
    numbered,
    observation,
    output_leaves,
)


class AxisOrder(NamedTuple):
    """How an array's axes are ordered in Flax and in PyTorch.

    Attributes:
        how: a description, for messages.
        to_torch: from Flax's order to PyTorch's.
        to_flax: from PyTorch's order to Flax's.
    """

    how: str
    to_torch: Callable[[Array], Array]
    to_flax: Callable[[Array], Array]


SAME = AxisOrder("the same on both sides", lambda x: x, lambda x: x)

CHANNELS = AxisOrder(
    "channels last in Flax, first in PyTorch",
    lambda x: np.moveaxis(x, -1, 1),
    lambda x: np.moveaxis(x, 1, -1),
)

Axes = Mapping[int | str, AxisOrder]

# By rank, or by name ("input 1", "output"), which takes precedence. Three axes are missing: they
# may be (batch, length, channels), whose order differs or not, so the caller has to say.
AXES: Axes = MappingProxyType({0: SAME, 1: SAME, 2: SAME, 4: CHANNELS, 5: CHANNELS})


def _axis_order(axes: Axes, name: str, rank: int) -> AxisOrder:
    """The order of the axes of an input or output.

    Raises:
        ValueError: `axes` has neither its name nor its rank.
    """
    order = axes.get(name, axes.get(rank))
    if order is None:
        raise ValueError(
            "The order of axes must be known for every input and output, but the "
            f"{name} has {rank} axes, for which there is no rule. Pass "
            f"axes={{{rank}: SAME}} if PyTorch's module has them in the same order, "
            f"axes={{{rank}: CHANNELS}} if its channels are the second axis, or an entry for "
            f"{name!r} alone."
        )
    return order


class TorchRun(NamedTuple):
    """A call of a PyTorch module.

    Attributes:
        outputs: by name, in Flax's order of axes.
        snapshots: what each module gets and returns, in order.
        random: whether it drew random numbers from the processor's generator.
    """

    outputs: dict[str, Array]
    snapshots: list[Snapshot]
    random: bool


# From a snapshot and one of its tensors to the tensor that takes its place.
Change = Callable[[Snapshot, Any], Any]


def run(
    module: Any,
    arguments: Arguments,
    inputs: Sequence[Array],
    axes: Axes,
    train: bool,
    *,
    widened: bool = False,
    change: Change | None = None,
    masks: Masks | None = None,
) -> TorchRun:
    """Call a copy of the module once, and record what it does.

    `widened` says whether to compute in float64 what the module narrows. `change` replaces what the
    modules get and return; its snapshots have no arrays yet. `masks` are those of dropout, in the
    place of its own.
    """
    import torch

    module = copy.deepcopy(module).train(train)
    snapshots: list[Snapshot] = []
    calls: Counter[str] = Counter()

    def record(name: str, call: int, returned: bool, tensors: Any) -> Any:
        snapshot = Snapshot(name, call, returned, [])
        if change is not None:
            tensors = _map_tensors(partial(change, snapshot), tensors)
        # These are copies, since another module may write into the tensors.
        arrays = [*map(layouts.to_numpy, _tensors_of(tensors))]
        snapshots.append(snapshot._replace(arrays=arrays))
        return tensors

    def attach(name: str, part: Any) -> None:
        def before(_module: Any, args: Any, kwargs: Any) -> Any:
            calls[name] += 1
            return record(name, calls[name] - 1, False, (args, kwargs))

        def after(_module: Any, _inputs: Any, outputs: Any) -> Any:
            return record(name, calls[name] - 1, True, outputs)

        part.register_forward_pre_hook(before, with_kwargs=True)
        part.register_forward_hook(after)

    if masks is not None:
        mask_torch(module, masks)
    for name, part in module.named_modules():
        attach(name, part)
    given = _tensors(module, arguments.named(inputs), axes)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        with widening(widened):
            outputs = _outputs(module, arguments, [*given.values()])
        random = not torch.equal(before, torch.get_rng_state())
    flax_outputs = {name: _in_flax_order(f"output {name}", y, axes) for name, y in outputs.items()}
    return TorchRun(flax_outputs, snapshots, random)


@contextmanager
def widening(enabled: bool) -> Iterator[None]:
    """The context in which PyTorch's functions take float64 for a narrower dtype, if enabled."""
    import torch
    from torch.overrides import TorchFunctionMode

    casts = torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16

    def wide(x: Any) -> Any:
        narrow = isinstance(x, torch.dtype) and x.is_floating_point
        return torch.float64 if narrow else x

    class Wide(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            function = torch.Tensor.double if function in casts else function
            args, kwargs = jax.tree.map(wide, (args, kwargs or {}))
            return function(*args, **kwargs)

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if enabled else default)
    try:
        with Wide() if enabled else nullcontext():
            yield
    finally:
        torch.set_default_dtype(default)


def trainable(module: Any) -> Any:
    """A copy of the module, all of whose parameters are trained."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def is_floating(x: Any) -> bool:
    """Whether it is a floating-point tensor."""
    return hasattr(x, "detach") and x.is_floating_point()


class Perturbation:
    """Perturbs tensors by a relative error, to measure how a model amplifies rounding errors.

    Each value goes up or down on its own, as if it had been rounded. All values of a tensor also
    move together, by that part of their root mean square, as if a mean that is in all of them had
    been rounded. A value of 0 stays 0: a ReLU or a mask has made it.
    """

    def __init__(self, error: float) -> None:
        """Perturb by this error, the same way in every run."""
        self._error = error
        self._rng = np.random.default_rng(0)

    def __call__(self, x: Any, times: float = 1.0) -> Any:
        """The tensor, perturbed by so many times the error; other things are left unchanged."""
        if not is_floating(x):
            return x
        error, values = times * self._error, x.detach()
        finite = values[values.isfinite()]
        mean_square = float(finite.square().mean()) if finite.numel() else 0.0
        together = error * float(self._signs()) * mean_square**0.5
        return x * (1 + error * x.new_tensor(self._signs(*x.shape))) + together * (values != 0)

    def attach(self, module: Any) -> None:
        """Perturb the parameters of a module, and what its parts return when they are called."""
        for parameter in module.parameters():
            parameter.data = self(parameter.data)
        for part in module.modules():
            part.register_forward_hook(lambda _part, _inputs, y: _map_tensors(self, y))

    def of_operations(self) -> Any:
        """The context in which the results of all operations are perturbed.

        Numbers of float32 are exact, such as those of a mask, and are left unchanged.
        """
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        def perturbed(x: Any) -> Any:
            if not is_floating(x):
                return x
            exact = x == x.to(torch.float32)
            # Twice: Flax has operations of its own in the place of these.
            return x if exact.all() else torch.where(exact, x, self(x, times=2.0))

        class Perturbing(TorchDispatchMode):
            def __torch_dispatch__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                outputs = function(*args, **(kwargs or {}))
                aliases = [returned.alias_info for returned in function._schema.returns]
                if not any(aliases):
                    return jax.tree.map(perturbed, outputs)
                if len(aliases) == 1 and aliases[0].is_write and is_floating(outputs):
                    outputs.copy_(perturbed(outputs))
                return outputs

        return Perturbing()

    def step(self, optimizer: Any, parameters: Sequence[Any], times: float) -> None:
        """Take a step of the optimizer, and perturb the changes that it makes."""
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=True):
            parameter.data = old + self(parameter.data - old, times)

    def _signs(self, *shape: int) -> Any:
        return self._rng.choice((-1.0, 1.0), shape)


class TorchSide:
    """A copy of a PyTorch module in training."""

    def __init__(
        self,
        module: Any,
        matched: Match,
        arguments: Arguments,
        axes: Axes,
        optimizer: Optimizer,
        *,
        wide: bool = False,
        widened: bool = False,
        perturbation: float | None = None,
        every_operation: bool = False,
        masks: Masks | None = None,
    ) -> None:
        """Start from the module's parameters and statistics.

        Args:
            module: is not changed.
            matched: which of its tensors is which of Flax's variables.
            arguments: how the input arrays become the arguments of a call.
            axes: the order of the axes of inputs and outputs.
            optimizer: of its parameters.
            wide: whether the module and its inputs are in float64.
            widened: whether to compute in float64 what the module narrows, too.
            perturbation: the relative error by which to perturb the inputs, the parameters, what
                the parts of the module return, the gradients, and the steps; None for none.
            every_operation: whether to perturb the result of every operation in a part, too, so
                that the errors of this module's own formulas are allowed.
            masks: of dropout; by default it draws its own.
        """
        self._module, self._matched = copy.deepcopy(module), matched
        self._arguments, self._axes = arguments, axes
        self._wide, self._widened, self._every_operation = wide, widened, every_operation
        self._perturb = None if perturbation is None else Perturbation(perturbation)
        if masks is not None:
            mask_torch(self._module, masks)
        if self._perturb is not None:
            self._perturb.attach(self._module)
        self._parameters = list(self._module.parameters())
        self._error = optimizer.error
        # PyTorch's optimizers refuse an empty list.
        self._optimizer = optimizer.torch(self._parameters) if self._parameters else None

    def __call__(
        self, inputs: Sequence[Array], output_gradients: Sequence[Array], train: bool
    ) -> Observation:
        """Run forward and backward; in training, take a step of the optimizer."""
        import torch

        with float64_enabled(self._wide), widening(self._widened), torch.enable_grad():
            return self._step(inputs, output_gradients, train)

    def _step(
        self, inputs: Sequence[Array], output_gradients: Sequence[Array], train: bool
    ) -> Observation:
        import torch

        self._module.train(train)
        self._module.zero_grad()
        given = _tensors(self._module, self._arguments.named(inputs), self._axes)
        if self._perturb is not None:
            given = {name: self._perturb(x) for name, x in given.items()}
        for x in given.values():
            x.requires_grad_(x.is_floating_point())
        perturbing = self._perturb.of_operations() if self._perturb else nullcontext()
        with perturbing if self._every_operation else nullcontext():
            # A module may write into its inputs, which PyTorch refuses if these are leaves.
            outputs = _outputs(self._module, self._arguments, [x.clone() for x in given.values()])
        gradients = {
            name: _tensor(f"output {name}", dy, self._axes, y)
            for (name, y), dy in zip(outputs.items(), output_gradients, strict=True)
            if y.requires_grad
        }
        # An output of another shape has no gradient, so that the shapes can be reported.
        fitting = {name: dy for name, dy in gradients.items() if dy.shape == outputs[name].shape}
        with perturbing:
            torch.autograd.backward([outputs[name] for name in fitting], [*fitting.values()])
        # A tied parameter has several names, and the match may have chosen any of them.
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        gradient = {name: _gradient(p).clone() for name, p in parameters.items()}
        if train:
            self._take_step()
        return observation(
            {name: _in_flax_order(f"output {name}", y, self._axes) for name, y in outputs.items()},
            {
                name: _in_flax_order(f"input {name}", _gradient(x), self._axes)
                for name, x in given.items()
                if x.requires_grad
            },
            self._matched.to_flax(gradient, partial=True, gradients=True).get("params", {}),
            self._matched.to_flax(self._module.state_dict()),
        )

    def _take_step(self) -> None:
        if self._optimizer is None:
            return
        if self._perturb is None:
            self._optimizer.step()
        else:
            self._perturb.step(self._optimizer, self._parameters, self._error)


def _tensors(module: Any, inputs: Mapping[str, Array], axes: Axes) -> dict[str, Any]:
    """The inputs by name, in PyTorch's order of axes and on the module's device."""
    import torch

    at = next(module.parameters(), torch.empty(0))
    return {
        name: _tensor(f"input {name}", x, axes, at.new_empty(0, dtype=_torch_dtype(x)))
        for name, x in inputs.items()
    }


def _tensor(name: str, x: Array, axes: Axes, like: Any) -> Any:
    moved = _axis_order(axes, name.strip(), x.ndim).to_torch(x)
    return layouts.array_like(like, np.asarray(moved))


def _outputs(module: Any, arguments: Arguments, inputs: Sequence[Any]) -> dict[str, Any]:
    """The tensors of a module's outputs by name, in the order of Flax's leaves."""
    positional, keywords = arguments.torch(inputs)
    return numbered(_tensors_of(module(*positional, **keywords)))


def _tensors_of(outputs: Any) -> list[Any]:
    """The tensors that a module returns."""
    return [y for y in output_leaves(outputs) if hasattr(y, "detach")]


def _map_tensors(function: Callable[[Any], Any], outputs: Any) -> Any:
    """What a module returns, with the function applied to each tensor."""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        names = [field.name for field in dataclasses.fields(outputs) if field.init]
        new = {name: _map_tensors(function, getattr(outputs, name)) for name in names}
        return dataclasses.replace(outputs, **new)
    if isinstance(outputs, MutableMapping):
        mapped = copy.copy(outputs)
        mapped.update({key: _map_tensors(function, y) for key, y in outputs.items()})
        return mapped
    if isinstance(outputs, list | tuple):
        made = [_map_tensors(function, y) for y in outputs]
        return getattr(type(outputs), "_make", type(outputs))(made)
    return function(outputs)


def _in_flax_order(name: str, x: Any, axes: Axes) -> Array:
    """The values of an input or output in Flax's order of axes."""
    return _axis_order(axes, name.strip(), x.dim()).to_flax(layouts.to_numpy(x))


def _gradient(x: Any) -> Any:
    """The gradient of a tensor, 0 if nothing depends on it."""
    return x.new_zeros(x.shape) if x.grad is None else x.grad


def _torch_dtype(x: Array) -> Any:
    import torch

    return getattr(torch, layouts.dtype(x).name)
