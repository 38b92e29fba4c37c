"""Which modules read a layer's output: seen while the model runs on an example, once."""

import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bcn_torch.norms import BatchChannelNorm

# Functions, methods and attributes that depend on a tensor's type and shape, not on its values.
METADATA = {
    *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__"),
    *("stride", "storage_offset", "element_size", "itemsize", "nbytes", "names", "layout"),
    *("dtype", "device", "get_device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta"),
    *("is_floating_point", "is_complex", "is_contiguous", "is_sparse", "is_quantized", "is_nested"),
    *("is_mkldnn", "is_inference", "is_leaf", "requires_grad", "grad_fn", "result_type"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
}


class Flow(NamedTuple):
    """What reads what, in one run of a model.

    Attributes:
        readers: of the outputs of each layer that ran: the norms that were called on them; None
            stands for everything else, an operation or the model's caller.
        sources: of the inputs of each norm that ran: the layers whose outputs they were, or views
            of them; None stands for everything else.
        exposed: the layers and norms that cannot be replaced by others: something else reads their
            parameters or buffers, or they are called with a keyword that only they have.
    """

    readers: dict[nn.Module, set[nn.Module | None]]
    sources: dict[nn.Module, set[nn.Module | None]]
    exposed: set[nn.Module]

    def sole_readers(self) -> dict[nn.Module, nn.Module]:
        """The norm after each layer, if it alone reads the layer and reads nothing else."""
        return {
            layer: norm
            for layer, readers in self.readers.items()
            for norm in readers
            if norm is not None
            and readers == {norm}
            and self.sources[norm] == {layer}
            and not {layer, norm} & self.exposed
        }


def observe(
    model: nn.Module,
    example_inputs: Sequence[Any],
    is_layer: Callable[[nn.Module], bool],
    is_norm: Callable[[nn.Module], bool],
) -> Flow:
    """Run a copy of the model once, in evaluation, and see where the outputs of layers go.

    The random state does not change.

    Args:
        model: any module; it is not changed.
        example_inputs: its positional arguments; they are not changed either.
        is_layer: whether a module is one of the layers, which have a weight.
        is_norm: whether a module is one of the norms. Norms inside a `BatchChannelNorm` are parts
            of that one.
    """
    observed = copy.deepcopy(model).eval()
    original = dict(zip(observed.modules(), model.modules(), strict=True))
    reads = _Reads()

    def before_layer(layer: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        reads.running.append((original[layer], None))
        if kwargs:
            reads.exposed.add(original[layer])

    def after_layer(layer: Any, _: Any, y: Any) -> None:
        reads.running.pop()
        reads.register(original[layer], y, layer.weight.dim())

    def before_norm(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [] if norm.training else [*args, *kwargs.values()]
        reads.enter(original[norm], inputs[0] if len(inputs) == 1 else None)
        # The channel norm that stays has the same keyword.
        if kwargs and not isinstance(norm, BatchChannelNorm):
            reads.exposed.add(original[norm])

    def after_norm(*_: Any) -> None:
        reads.running.pop()

    inner = {m.batch_norm for m in observed.modules() if isinstance(m, BatchChannelNorm)}
    devices = {t.device for t in chain(observed.parameters(), observed.buffers()) if t.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), ExitStack() as hooks:
        for module in observed.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            if is_layer(module):
                before = module.register_forward_pre_hook(before_layer, with_kwargs=True)
                after = module.register_forward_hook(after_layer, always_call=True)
            elif is_norm(module) and module not in inner:
                before = module.register_forward_pre_hook(before_norm, with_kwargs=True)
                after = module.register_forward_hook(after_norm, always_call=True)
            else:
                continue
            hooks.callback(before.remove)
            hooks.callback(after.remove)
            reads.own(original[module], chain(module.parameters(), module.buffers()))
        tensors = {id(x): x.clone() for x in example_inputs if isinstance(x, Tensor)}
        inputs = copy.deepcopy(example_inputs, tensors)
        with _Operations(reads), _Functions(reads):
            output = observed(*inputs)
    reads.read(reads.storages(None, output))
    # An output that is alive now is part of the model's output, or was stored somewhere.
    if reads.alive:
        gc.collect()
    reads.read([*reads.alive])
    del output
    return Flow(reads.readers, reads.sources, reads.exposed)


class _Reads:
    """The outputs of layers that are alive, and what has read them so far; weights likewise.

    A tensor is known by its storage, which every alias shares: `nn.Parameter(y)` makes one unseen.

    Attributes:
        alive: the storages of the outputs.
        running: the layers and norms that are running, each norm with the storage of its input if
            that is the output of a layer. The norm may read it, whatever it does.
    """

    def __init__(self) -> None:
        self.readers: dict[nn.Module, set[nn.Module | None]] = {}
        self.sources: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self.exposed: set[nn.Module] = set()
        self.alive: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        self.running: list[tuple[nn.Module, int | None]] = []
        self._layers: dict[int, nn.Module] = {}
        self._owners: dict[int, set[nn.Module]] = defaultdict(set)

    def own(self, module: nn.Module, weights: Iterable[Tensor]) -> None:
        """Watch the parameters and buffers of a layer or norm, which only its call may read."""
        for storage in filter(None, map(_storage, weights)):
            self._owners[storage._cdata].add(module)

    def register(self, layer: nn.Module, y: Any, dim: int) -> None:
        """Watch the output of a layer."""
        readers = self.readers.setdefault(layer, set())
        storage = _storage(y)
        # With channels at axis 1: a batch, and of a linear layer nothing more than that.
        if storage is None or y.dim() != dim:
            readers.add(None)
        else:
            self.alive[storage._cdata] = storage
            self._layers[storage._cdata] = layer

    def enter(self, norm: nn.Module, x: Any) -> None:
        """Note that a norm is called on `x`, and may read it from now on."""
        storage = _storage(x)
        key = storage._cdata if storage and storage._cdata in self.alive else None
        layer = None if key is None else self._layers[key]
        self.sources[norm].add(layer)
        self.running.append((norm, key))
        if layer is not None:
            # Of a view of the output, its making is another read.
            self.readers[layer].add(norm)

    def storages(self, function: Any, arguments: Any) -> dict[int, Any]:
        """The watched tensors that a function reads, if it reads its arguments."""
        if isinstance(function, HigherOrderOperator):
            # It calls functions, which may have a closure.
            return dict(self.alive)
        if _name(function) in METADATA:
            return {}
        stored = [(storage._cdata, x) for x in tree_leaves(arguments) if (storage := _storage(x))]
        return {key: x for key, x in stored if self._is_watched(key)}

    def read(self, storages: Iterable[int]) -> None:
        """Note that something other than a norm, or than the owner of a weight, reads these."""
        for key in storages:
            self.exposed |= self._owners.get(key, set())
            if key in self._layers:
                self.readers[self._layers[key]].add(None)

    def _is_watched(self, key: int) -> bool:
        if key in self.alive:
            return all(key != given for _, given in self.running)
        owners = self._owners.get(key, set())
        return bool(owners) and not any(module in owners for module, _ in self.running)


class _Functions(TorchFunctionMode):
    """Sees every function of PyTorch that is called from Python.

    Some read a tensor's memory without an operation: `numpy`, `tolist`, `data_ptr`. But one that
    returns its argument itself, as dropout does in evaluation, has read nothing; if it has written,
    an operation did so.
    """

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        storages = self.reads.storages(func, (args, kwargs))
        result = func(*args, **kwargs or {})
        self.reads.read([s for s, x in storages.items() if x is not result])
        return result


class _Operations(TorchDispatchMode):
    """Sees every operation, also of compiled code, that no function of PyTorch stands for."""

    supports_higher_order_operators = True

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reads.read(self.reads.storages(func, (args, kwargs)))
        return func(*args, **kwargs or {})


def _name(function: Any) -> str:
    """Of an attribute's getter, the attribute's; of an operation, without its overload."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(function.__self__, "__name__", "")
    return name.partition(".")[0]


def _storage(x: Any) -> torch.UntypedStorage | None:
    """The memory of a tensor; None if `x` is no tensor or has none."""
    if not isinstance(x, Tensor):
        return None
    with torch._C.DisableTorchFunction():
        try:
            return x.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return None
