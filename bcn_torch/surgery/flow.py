"""Which norm reads which layer's output: seen while the model runs on an example."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bcn_torch.norms import BatchChannelNorm

Observe = Callable[..., "Observation"]


class Observation(NamedTuple):
    """The calls of layers and norms in one run of a model.

    Attributes:
        output: of the model.
        pairs: each call of a norm on the very output of a layer, as (layer, norm).
        calls: how often each of the layers and norms ran.
    """

    output: Any
    pairs: list[tuple[nn.Module, nn.Module]]
    calls: Counter[nn.Module]

    def one_to_one(self) -> dict[nn.Module, Any]:
        """The norm after each layer, if both ran once and neither has another partner."""
        partners = Counter(chain.from_iterable(self.pairs))
        return {
            layer: norm
            for layer, norm in self.pairs
            if all(partners[m] == self.calls[m] == 1 for m in (layer, norm))
        }


def observe(
    model: nn.Module,
    example_inputs: Sequence[Any],
    layers: Collection[type[nn.Module]],
    is_norm: Callable[[nn.Module], bool],
    replace: Callable[[nn.Module, Tensor], Tensor] = lambda layer, y: y,
) -> Observation:
    """Run a copy of the model in evaluation, and record which layers feed which norms.

    Every run starts from the current random state, and does not change it.

    Args:
        model: any module; it is not changed.
        example_inputs: its positional arguments; they are not changed either.
        layers: the types of the layers. Subclasses are not meant.
        is_norm: whether a module is one of the norms.
        replace: returns what to use as the output of a layer, given the layer and its output, for
            every reader except the norms that are called on it.
    """
    calls: Counter[nn.Module] = Counter()
    outputs: dict[tuple[int, int], tuple[nn.Module, Tensor, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    observed = copy.deepcopy(model).eval()
    original = dict(zip(observed.modules(), model.modules(), strict=True))

    def after_layer(layer: Any, _: Any, y: Tensor) -> Tensor:
        calls[original[layer]] += 1
        # With channels at axis 1: a batch, and of a linear layer nothing more than that.
        if y.dim() != layer.weight.dim():
            return y
        z = replace(original[layer], y)
        # Kept alive, or another tensor could get its id. The version counts changes in place.
        outputs[id(z), z._version] = original[layer], y, z
        return z

    def before_norm(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls[original[norm]] += 1
        (x,) = (*args, *kwargs.values())
        if (id(x), x._version) not in outputs:
            return None
        layer, y, _ = outputs[id(x), x._version]
        pairs.append((layer, original[norm]))
        return (y,), {}

    inner = {m.batch_norm for m in observed.modules() if isinstance(m, BatchChannelNorm)}
    devices = {t.device for t in chain(observed.parameters(), observed.buffers()) if t.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), ExitStack() as hooks:
        for module in observed.modules():
            # A subclass may do more than the layer that it would become.
            if type(module) in layers:
                hooks.callback(module.register_forward_hook(after_layer).remove)
            if is_norm(module) and module not in inner:
                hook = module.register_forward_pre_hook(before_norm, with_kwargs=True)
                hooks.callback(hook.remove)
        tensors = {id(x): x.clone() for x in example_inputs if isinstance(x, Tensor)}
        output = observed(*copy.deepcopy(example_inputs, tensors))
    return Observation(output, pairs, calls)


def sole_readers(observe: Observe, candidates: Collection[nn.Module]) -> dict[nn.Module, Any]:
    """The norm after each candidate, if nothing but that norm reads the layer's output.

    To every other reader the output is replaced, first by NaN and then by large random numbers. If
    the model still returns the same, there is no other reader.

    Args:
        observe: runs the model, with the argument `replace` of `observe` if there is one.
        candidates: the layers to look at.
    """
    seen = observe()

    def unread(layers: Collection[nn.Module], values: Callable[[Tensor], Tensor]) -> bool:
        try:
            again = observe(replace=lambda layer, y: values(y) if layer in layers else y)
            return again[1:] == seen[1:] and _same(again.output, seen.output)
        except Exception:  # Any code of the model may fail on such values.
            return False

    def only_norm_reads(layers: Collection[nn.Module]) -> bool:
        # A computation passes NaN on; a comparison may hide it, but not the random numbers.
        return unread(layers, lambda y: torch.full_like(y, torch.nan)) and unread(layers, _noise())

    norm_after = {x: norm for x, norm in seen.one_to_one().items() if x in candidates}
    if only_norm_reads(norm_after):
        return norm_after
    alone: dict[nn.Module, Any] = {}
    for layer, norm in norm_after.items():
        if only_norm_reads({*alone, layer}):
            alone[layer] = norm
    return alone


def _noise() -> Callable[[Tensor], Tensor]:
    """Large random numbers in place of a tensor, others in each call."""
    generator = torch.Generator().manual_seed(0)

    def like(y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=generator, device="cpu", dtype=torch.float32)
        return torch.empty_like(y).copy_(1e4 * noise)

    return like


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs of a model are equal in all that they hold, NaN to NaN too."""
    if a is b:
        return True
    if isinstance(a, Number) or hasattr(a, "__array__"):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and _same(vars(a), vars(b))
    return bool(a == b)
