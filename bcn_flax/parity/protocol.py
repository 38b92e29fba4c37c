"""What implementations of one model share: what they are given, and what they show in return."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from bcn_flax.interop import layouts
from bcn_flax.interop.layouts import Array, Path, is_array, path_name
from bcn_flax.interop.trees import Variables


class Name(NamedTuple):
    """The name of an array that is compared.

    Attributes:
        quantity: "output", "input gradient", "gradient", "statistic" or "parameter".
        path: in Flax, such as `batch_norm/mean`; the name or number of an input, and the number of
            an output, if there are several.
    """

    quantity: str
    path: str

    def __str__(self) -> str:
        """As it is printed, and as the pattern of a tolerance matches it."""
        return f"{self.quantity} {self.path}".rstrip()


Observation = Mapping[Name, Array]

# In the order in which they are computed: the first difference explains the later ones.
QUANTITIES = ("output", "statistic", "input gradient", "gradient", "parameter")


class Implementation(Protocol):
    """A model in training: it keeps its parameters, statistics and optimizer between the calls."""

    def __call__(
        self, inputs: Sequence[Array], output_gradients: Sequence[Array], train: bool
    ) -> Observation:
        """Run forward and backward; in training, take a step of the optimizer.

        Args:
            inputs: the arrays, in Flax's order of axes; those of dictionaries by key, in order.
            output_gradients: of each output, in Flax's order of axes.
            train: whether this is training.

        Returns:
            The outputs, the gradients of the inputs and of the parameters, and the statistics and
            parameters after the call, under Flax's names and in Flax's layouts.
        """
        ...


class Snapshot(NamedTuple):
    """The arrays that a module gets or returns in a call.

    Attributes:
        module: the path in Flax, the name in PyTorch.
        call: the number of the module's call, from 0.
        returned: whether the module returns them.
        arrays: in the order of the arguments, or of the outputs.
    """

    module: Any
    call: int
    returned: bool
    arrays: list[Array]

    @property
    def key(self) -> tuple[Any, int, bool]:
        """What tells it from other snapshots."""
        return self[:3]


def observation(
    outputs: Mapping[str, Array],
    input_gradients: Mapping[str, Array],
    gradients: Mapping[str, Any],
    variables: Variables,
) -> dict[Name, Array]:
    """All arrays of one call, by name.

    Args:
        outputs: by name.
        input_gradients: by name.
        gradients: in the tree of the parameters.
        variables: parameters and statistics after the call.
    """
    trees = {
        "statistic": variables.get("batch_stats", {}),
        "gradient": gradients,
        "parameter": variables.get("params", {}),
    }
    return {
        **{Name("output", name): y for name, y in outputs.items()},
        **{Name("input gradient", name): dx for name, dx in input_gradients.items()},
        **{
            Name(quantity, path_name(path)): np.asarray(leaf)
            for quantity, tree in trees.items()
            for path, leaf in flatten_dict(tree).items()
        },
    }


class _Place(NamedTuple):
    """Where an array is among the arguments of a call: its number among the arrays."""

    number: int


class Arguments(NamedTuple):
    """How arrays become the arguments of a call, the same on both sides.

    Attributes:
        names: of the arrays, such as "1", "mask" or "batch/mask"; "" of a single one.
        positional: the arguments, with a place for each array.
        keywords: the keyword arguments by Flax's names, with a place for each array.
        torch_names: PyTorch's names of keyword arguments that have other names there, by Flax's.
    """

    names: tuple[str, ...]
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any] = MappingProxyType({})
    torch_names: Mapping[str, str] = MappingProxyType({})

    def named(self, arrays: Sequence[Any]) -> dict[str, Any]:
        """The arrays by name."""
        return dict(zip(self.names, arrays, strict=True))

    def flax(self, arrays: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional and the keyword arguments of Flax's module."""
        return _filled([*self.positional], arrays), _filled(dict(self.keywords), arrays)

    def __str__(self) -> str:
        """As they are written in Python, with the names of the arrays."""
        named = [f"array {name}".rstrip() for name in self.names]
        positional, keywords = self.flax(named)
        return ", ".join([*map(str, positional), *(f"{k}={x}" for k, x in keywords.items())])

    def torch(self, arrays: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional and the keyword arguments of PyTorch's module."""
        positional, keywords = self.flax(arrays)
        return positional, {self.torch_names.get(name, name): x for name, x in keywords.items()}


def split_arguments(
    name: str, inputs: Any, torch_names: Mapping[str, str] | None = None
) -> tuple[Arguments, list[Array]]:
    """The arrays of a call, and how they become its arguments.

    Args:
        name: of the inputs, for messages.
        inputs: an array; a tuple of positional arguments; or a dictionary of keyword arguments.
            Each may be an array, a plain value such as None, or a nested structure of these.
        torch_names: PyTorch's names of keyword arguments, by Flax's.

    Raises:
        ValueError: something else is among the inputs, or a name in `torch_names` is none of them.
    """
    named = isinstance(inputs, Mapping)
    given = plain(inputs if named else inputs if isinstance(inputs, tuple) else (inputs,))
    leaves, structure = jax.tree.flatten_with_path(given)
    unknown = [x for _, x in leaves if not is_array(x) and not isinstance(x, _PLAIN)]
    unknown += [key for key in given if named and not isinstance(key, str)]
    if isinstance(inputs, list) or unknown:
        found = inputs if isinstance(inputs, list) else unknown[0]
        raise ValueError(
            f"{name} must be an array, a tuple of positional arguments, or a dictionary of keyword "
            "arguments, made of arrays, None, numbers, strings, and lists, tuples and dictionaries "
            f"of these, but there is a {type(found).__name__}. Pass np.asarray(x) if it is one "
            "input, tuple(x) if it holds all of them, (x,) if it is the only argument."
        )
    other = sorted((torch_names or {}).keys() - (given if named else ()))
    if other:
        raise ValueError(
            "torch_names must give PyTorch's names of keyword arguments by Flax's names, but "
            f"{other} are not among {[*given] if named else 'the inputs, which have no names'}."
        )
    alone = not named and len(given) == 1
    arrays: list[Array] = []
    names: list[str] = []
    places: list[Any] = []
    for path, x in leaves:
        places.append(_Place(len(arrays)) if is_array(x) else x)
        if is_array(x):
            arrays.append(layouts.to_numpy(x))
            names.append(jax.tree_util.keystr(path[alone:], simple=True, separator="/"))
    filled = jax.tree.unflatten(structure, places)
    positional, keywords = ((), filled) if named else (filled, {})
    return Arguments((*names,), positional, keywords, torch_names or {}), arrays


_PLAIN = (bool, int, float, complex, str)


def _filled(tree: Any, arrays: Sequence[Any]) -> Any:
    """The tree with the arrays in their places."""
    return jax.tree.map(
        lambda x: arrays[x.number] if isinstance(x, _Place) else x,
        tree,
        is_leaf=lambda x: isinstance(x, _Place),
    )


def plain(tree: Any) -> Any:
    """Nested data as lists, tuples and dictionaries, as JAX does not look into other mappings.

    A dataclass, such as a model's output, becomes a dictionary of its fields.
    """
    if isinstance(tree, Mapping):
        return {key: plain(x) for key, x in tree.items()}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, nn.Module)):
        return {field.name: plain(getattr(tree, field.name)) for field in dataclasses.fields(tree)}
    if isinstance(tree, list | tuple):
        return [*map(plain, tree)] if isinstance(tree, list) else (*map(plain, tree),)
    return tree


def output_leaves(outputs: Any) -> list[Any]:
    """All that a module returns, in an order that both sides share: by position, and by key."""
    return jax.tree.leaves(plain(outputs))


def numbered(values: Sequence[Any]) -> dict[str, Any]:
    """Outputs by name: the number, or nothing if there is only one."""
    return {str(i) if len(values) > 1 else "": value for i, value in enumerate(values)}


def float64_enabled(wide: bool) -> AbstractContextManager[Any]:
    """The context in which JAX has float64, if it is needed."""
    return jax.enable_x64(True) if wide else nullcontext()


def to_float64(tree: Any) -> Any:
    """Arrays or shapes, the floating-point ones in float64. JAX's need `float64_enabled`."""

    def wide(x: Any) -> Any:
        if not is_differentiable(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float64)
        return x.astype(np.float64)

    return jax.tree.map(wide, tree)


def is_differentiable(x: Any) -> bool:
    """Whether it has a floating-point dtype."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def module_name(path: Path) -> str:
    """The path of a module, as it is printed."""
    return path_name(path) or "the module itself"


class Optimizer(NamedTuple):
    """One optimizer in both libraries.

    Attributes:
        flax: optax's.
        torch: makes PyTorch's from a module's parameters.
        error: of the optimizer's own arithmetic; 1 is the error of one operation.

    Example:
        >>> import optax
        >>> rmsprop = Optimizer(
        ...     optax.rmsprop(1e-3, decay=0.99, eps_in_sqrt=False),
        ...     lambda parameters: torch.optim.RMSprop(parameters, 1e-3),
        ... )
    """

    flax: optax.GradientTransformation
    torch: Callable[[Iterable[Any]], Any]
    error: float = 1.0


def sgd(rate: float = 0.1, momentum: float = 0.9) -> Optimizer:
    """Stochastic gradient descent with momentum."""

    def torch_sgd(parameters: Iterable[Any]) -> Any:
        import torch

        return torch.optim.SGD(parameters, rate, momentum=momentum)

    return Optimizer(optax.sgd(rate, momentum=momentum), torch_sgd)


def adam(rate: float = 1e-3) -> Optimizer:
    """Adam with the constants that are the defaults of optax and PyTorch.

    Adam divides each gradient by its size. A gradient that is 0 except for rounding then moves its
    parameter by a full step, in a direction that rounding decides. The tolerances widen by
    themselves in that case.
    """

    def torch_adam(parameters: Iterable[Any]) -> Any:
        import torch

        return torch.optim.Adam(parameters, rate)

    # Optax computes 1 - 0.999 in the precision of the parameters, where it loses three digits, and
    # takes its square root.
    return Optimizer(optax.adam(rate), torch_adam, error=32)
