"""Complaints about modules that cannot be compared."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from flax.errors import InvalidRngError

from bcn_flax.parity import modules, torch_side
from bcn_flax.parity.observations import Values
from bcn_flax.parity.twins import Twins

_RULE = "The two sides cannot draw the same random numbers, so there must be no"


def refuse_dropout(torch_module: Any) -> None:
    """Refuse a module with dropout.

    Raises:
        ValueError: there is some; the message says where.
    """
    names = [
        name or type(part).__name__
        for name, part in torch_module.named_modules()
        if "Dropout" in type(part).__name__ and part.p > 0
    ]
    if names:
        raise ValueError(
            f"{_RULE} dropout, but there is in PyTorch's {', '.join(names)}. Set its p to 0 there, "
            "and its rate in Flax."
        )


def refuse_noise(them: Twins, inputs: Sequence[Values]) -> None:
    """Refuse modules that draw random numbers in training.

    Raises:
        ValueError: one does.
    """
    if _torch_draws(them, inputs):
        raise ValueError(
            f"{_RULE} chance in the modules, but PyTorch's draws random numbers in training."
        )
    if names := _flax_noise(them, inputs):
        raise ValueError(
            f"{_RULE} dropout, but there is in Flax's {', '.join(names)}. Set its rate to 0 there, "
            "and its p in PyTorch."
        )


def refuse_other_outputs(them: Twins, inputs: Sequence[Values]) -> None:
    """Refuse modules that return no arrays, different numbers of them, or complex numbers.

    Raises:
        ValueError: they do.
    """
    flax, torch = them.outputs(inputs, False), them.torch_outputs(inputs, False)
    if len(flax) != len(torch) or not flax:
        shapes = [y.shape for y in flax], [y.shape for y in torch.values()]
        raise ValueError(
            f"Both modules must return as many arrays, one at least, but Flax's returns "
            f"{len(flax)}, of shapes {shapes[0]}, and PyTorch's {len(torch)}, of shapes "
            f"{shapes[1]}. Tuples, lists and dictionaries are taken apart; where there is anything "
            "else, put a small module around yours that returns a tuple."
        )
    if any(np.issubdtype(y.dtype, np.complexfloating) for y in flax):
        raise ValueError(
            "Outputs must be real, but there are complex ones, whose gradients the two sides "
            "define differently. Put small modules around yours that return real and imaginary "
            "parts."
        )


def _torch_draws(them: Twins, inputs: Sequence[Values]) -> bool:
    """Whether PyTorch's module draws random numbers, of the processor's generator."""
    import torch

    module = copy.deepcopy(them.torch).train()
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        module(*torch_side.tensors(module, inputs, them.axes).values())
        return not torch.equal(before, torch.get_rng_state())


def _flax_noise(them: Twins, inputs: Sequence[Values]) -> list[str]:
    """The modules that draw random numbers; of linen's, the first."""
    if isinstance(them.flax, nnx.Module):
        parts = modules.flax_modules(them, inputs)
        return [modules.written(path) for path, part in parts.items() if _rate(part) > 0]
    try:
        them.outputs(inputs, train=True)
    except InvalidRngError:
        *_, last = modules.flax_modules(them, inputs)
        return [modules.written(last)]
    return []


def _rate(module: Any) -> float:
    rates = (getattr(module, name, 0.0) for name in ("rate", "dropout_rate"))
    return max(rate if isinstance(rate, int | float) else 0.0 for rate in rates)
