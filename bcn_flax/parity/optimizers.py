"""Optimizers that take the same steps on both sides."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import optax


class Optimizer(NamedTuple):
    """One optimizer, twice.

    Attributes:
        flax: optax's.
        torch: makes PyTorch's, of a module's parameters.
        error: of a step, for what the optimizer itself computes; 1 is that of an operation.

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
    """Adam with its usual constants, which are optax's and PyTorch's defaults.

    It divides each gradient by its size, so that one which is 0 but for rounding decides by its
    rounding errors where a parameter goes: the tolerances widen by themselves where that is so.
    """

    def torch_adam(parameters: Iterable[Any]) -> Any:
        import torch

        return torch.optim.Adam(parameters, rate)

    # Optax has 1 - 0.999 in the precision of the parameters, where it loses three digits, and takes
    # the root of it.
    return Optimizer(optax.adam(rate), torch_adam, error=32)
