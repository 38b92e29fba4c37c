"""The modules inside the two models: which they are, and what each returns on the way."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.errors import InvalidRngError

from bcn_flax.interop import layouts, trees
from bcn_flax.parity import flax_side, torch_side
from bcn_flax.parity.observations import Values
from bcn_flax.parity.twins import Twins

Path = tuple[str, ...]


def written(path: Path) -> str:
    """A path as it is printed."""
    return "/".join(path) or "the module itself"


def pairs(them: Twins) -> dict[Path, str]:
    """By their paths in Flax, the modules that are one of PyTorch's, and which.

    They are those that have parameters or statistics, and what these are in, if it has one name.
    """
    found = {}
    for pair in them.match.pairs:
        path, name = pair.path[1:-1], pair.module
        found[path] = name
        while path and name.rpartition(".")[2] == path[-1]:
            path, name = path[:-1], name.rpartition(".")[0]
            found[path] = name
    # Two of Flax's may be one of PyTorch's, as in the authors' batch-channel norm.
    shared = Counter(found.values())
    return {path: name for path, name in found.items() if shared[name] == 1}


def flax_modules(them: Twins, inputs: Sequence[Values]) -> dict[Path, Any]:
    """Flax's modules, by path; of linen's, those that a step of training calls.

    That ends where linen's want random numbers, of which there are none.
    """
    if isinstance(them.flax, nnx.Module):
        return {trees.linen_path(place): part for place, part in nnx.iter_modules(them.flax)}
    found: dict[Path, Any] = {}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        found[context.module.path] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept), suppress(InvalidRngError):
        them.outputs(inputs, train=True)
    return found


def flax_calls(them: Twins, inputs: Sequence[Values], train: bool) -> dict[Path, list[Values]]:
    """What Flax's modules return, by path, in the order in which they do; of the first call."""
    calls: dict[Path, list[Values]] = {}

    def note(path: Path, outputs: Any) -> None:
        leaves = jax.tree.leaves(outputs)
        # In a transformation such as nn.scan there are no values.
        if not any(isinstance(y, jax.core.Tracer) for y in leaves):
            calls.setdefault(path, [np.asarray(y) for y in leaves])

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if context.method_name == "__call__":
            note(context.module.path, outputs)
        return outputs

    module = _noting(them.flax, note) if isinstance(them.flax, nnx.Module) else them.flax
    with them.precision(), nn.intercept_methods(intercept):
        forward = flax_side.forward_of(module, them.call)
        forward(them.variables, [jax.numpy.asarray(x) for x in inputs], train)
    return calls


def torch_calls(them: Twins, inputs: Sequence[Values], train: bool) -> dict[str, list[Values]]:
    """What PyTorch's modules return, by name, in the order in which they do; of the first call."""
    calls: dict[str, list[Values]] = {}
    module = copy.deepcopy(them.torch).train(train)

    def hook(name: str) -> Callable[..., None]:
        def note(_module: Any, _inputs: Any, outputs: Any) -> None:
            leaves = [y for y in jax.tree.leaves(outputs) if hasattr(y, "detach")]
            # Another module may write into these tensors.
            values = [layouts.to_numpy(y) for y in leaves]
            calls.setdefault(name, values)

        return note

    for name, part in module.named_modules():
        part.register_forward_hook(hook(name))
    module(*torch_side.tensors(module, inputs, them.axes).values())
    return calls


def _noting(module: nnx.Module, note: Callable[[Path, Any], None]) -> nnx.Module:
    """A copy of a module whose parts note what they return: each is of a class of its own."""
    module = nnx.clone(module)
    for place, part in list(nnx.iter_modules(module)):
        object.__setattr__(
            part, "__class__", _noting_class(type(part), trees.linen_path(place), note)
        )
    return module


def _noting_class(kind: Any, path: Path, note: Callable[[Path, Any], None]) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = kind.__call__(self, *args, **kwargs)
        note(path, outputs)
        return outputs

    return type(kind)(kind.__name__, (kind,), {"__call__": call})
