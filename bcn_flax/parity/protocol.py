"""What implementations of one model share: what they are given, and what they show in return."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from bcn_flax.interop.layouts import Array, Path, path_name
from bcn_flax.interop.trees import Variables


class Name(NamedTuple):
    """The name of an array that is compared.

    Attributes:
        quantity: "output", "input gradient", "gradient", "statistic" or "parameter".
        path: in Flax, such as `batch_norm/mean`; the number of an input or output, if several.
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
            inputs: in Flax's order of axes.
            output_gradients: of each output, in Flax's order of axes.
            train: whether this is training.

        Returns:
            The outputs, the gradients of the inputs and of the parameters, and the statistics and
            parameters after the call, under Flax's names and in Flax's layouts.
        """
        ...


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


def numbered(values: Sequence[Any]) -> dict[str, Any]:
    """Inputs or outputs by name: the number, or nothing if there is only one."""
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
