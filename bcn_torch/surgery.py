"""Changes to a whole model: into batch-channel normalization, to new statistics, and for inference.

convert_batch_norm   a model with `torch.nn.BatchNorm2d` becomes one with BCN and WS
recalibrate          its running estimates become those of given data
fold                 its norms and standardized weights become plain weights, for inference
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from bcn_torch import checks
from bcn_torch.norms import (
    BatchChannelNorm,
    BatchNorm,
    EstimatedBatchNorm,
    batch_moments,
)
from bcn_torch.precision import widen
from bcn_torch.weight_standardization import (
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLayer,
    WSLinear,
    standardize_weight,
)

Layer = _ConvNd | nn.Linear
Norm = BatchNorm | BatchChannelNorm

STANDARDIZED: dict[type[_ConvNd], type[_ConvNd]] = {
    nn.Conv1d: WSConv1d,
    nn.Conv2d: WSConv2d,
    nn.Conv3d: WSConv3d,
}
PLAIN: dict[type[nn.Module], type[_ConvNd] | type[nn.Linear]] = {
    WSLinear: nn.Linear,
    **{ours: theirs for theirs, ours in STANDARDIZED.items()},
}
LAYERS = (*STANDARDIZED, nn.Linear, *PLAIN)
NORMS = (BatchNorm, EstimatedBatchNorm, BatchChannelNorm)
CONVOLUTION_ARGUMENTS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
LINEAR_ARGUMENTS = ("in_features", "out_features")


def convert_batch_norm(
    model: nn.Module,
    groups: int | None = 32,
    ws: bool = True,
    *,
    example_inputs: Sequence[Any] | None = None,
    estimate: bool = True,
    momentum: float | None = None,
    leave: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Copy a model with a `BatchChannelNorm` for each batch norm, and weights standardized.

    Each takes over scale, shift, running mean and variance, eps, momentum, mode, dtype, device and
    `requires_grad` of a `torch.nn.BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d` or `SyncBatchNorm`;
    its channel norm starts at scale 1 and shift 0, and learns if the scale it took over does. One
    without scale and shift (`affine=False`) gets such as learn, from 1 and 0; one without
    statistics (`track_running_stats=False`) gets mean 0 and variance 1 to start from.

    With `ws`, the convolution before each norm becomes a `WSConv` with the same parameters. Which
    one that is shows where `example_inputs` run through the model: it is the one whose output the
    norm is given. Without them it is the one defined last before the norm in the same parent
    module, of the layers with as many outputs as the norm has channels. Standardized weights
    change what the convolution gives, so that the statistics are no longer its own: `recalibrate`
    the model, and fine-tune it.

    The model itself is not changed. What it shares stays shared in the copy. Hooks of what is
    replaced are not carried over.

    Args:
        model: any module that has batch norms, or is one.
        groups: of the channel norms; None: in each the most up to 32, of two channels or more.
        ws: whether to standardize the weights of the convolutions.
        example_inputs: positional arguments of the model, to see what comes before each norm.
        estimate: see `BatchChannelNorm`.
        momentum: the weight of the *new* value, if not that of each batch norm.
        leave: tells by dotted name and module which batch norms and convolutions stay as they are;
            at all places, where a module is shared.

    Raises:
        ValueError: there is no batch norm to convert; groups do not divide the channels of a norm;
            a norm is lazy, has a forward of its own, or averages cumulatively (`momentum=None`)
            while no momentum is given; a convolution has a fan-in of 1, or by its definition stands
            before two norms; a weight is parametrized. It lists all such modules.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from bcn_torch import convert_batch_norm, recalibrate
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> model = convert_batch_norm(model)
        >>> [type(layer).__name__ for layer in model]
        ['WSConv2d', 'BatchChannelNorm', 'ReLU']
        >>> recalibrate(model, [torch.randn(8, 3, 8, 8) for _ in range(4)])

    Source: in the manner of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    if momentum is not None:
        checks.require_momentum(momentum)
    kept = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if leave and isinstance(module, _BatchNorm | _ConvNd) and leave(name, module)
    }
    norms = {m for m in model.modules() if isinstance(m, _BatchNorm)} - kept
    _require_torch_batch_norm(norms)
    convolutions: set[_ConvNd] = set()
    if ws:
        before = _defined_before(norms, model)
        if example_inputs is not None:
            before = _given_to(norms, model, example_inputs)
        convolutions = before - kept

    def converted(module: _BatchNorm | _ConvNd) -> nn.Module:
        if isinstance(module, _BatchNorm):
            like = _first_floating_point(module, model)
            return _batch_channel_norm(module, groups, estimate, momentum, like)
        _refuse_parametrized(module)
        return _remade(module, STANDARDIZED[type(module)], module.weight, module.bias)

    replacements: dict[nn.Module, nn.Module] = {}
    complaints = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm | _ConvNd) and module in norms | convolutions:
            try:
                replacements[module] = converted(module)
            except ValueError as error:
                complaints.append(f"{name or 'the model itself'}: {error}")
    _require_convertible(complaints)
    return _copy_with(replacements, model)


def _given_to(
    norms: set[_BatchNorm], model: nn.Module, example_inputs: Sequence[Any]
) -> set[_ConvNd]:
    """The convolutions whose outputs these norms are given."""
    seen = _observed(
        model, example_inputs, STANDARDIZED, lambda module: isinstance(module, _BatchNorm)
    )
    return {layer for layer, norm in seen.pairs if norm in norms and isinstance(layer, _ConvNd)}


def _defined_before(norms: set[_BatchNorm], model: nn.Module) -> set[_ConvNd]:
    """Of each norm's siblings the last layer before it with as many outputs, if a convolution."""
    found: dict[nn.Module, nn.Module] = {}
    siblings: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        before = siblings[name.rpartition(".")[0]]
        before.append(module)
        if isinstance(module, _BatchNorm) and module in norms:
            fitting = [m for m in before if _outputs(m) == module.num_features]
            if fitting:
                found[module] = fitting[-1]
    layers = [
        layer
        for layer in found.values()
        if isinstance(layer, _ConvNd) and type_before_parametrizations(layer) in STANDARDIZED
    ]
    names = {module: name for name, module in model.named_modules()}
    _require_one_norm_each([names[layer] for layer, n in Counter(layers).items() if n > 1])
    return set(layers)


def _outputs(module: nn.Module) -> int | None:
    """How many channels or features come out of a convolution or linear layer."""
    if isinstance(module, _ConvNd):
        return module.out_channels
    return module.out_features if isinstance(module, nn.Linear) else None


def _first_floating_point(*modules: nn.Module) -> Tensor:
    """The first parameter or buffer, which tells dtype and device."""
    tensors = (t for m in modules for t in chain(m.parameters(), m.buffers()))
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _batch_channel_norm(
    norm: _BatchNorm, groups: int | None, estimate: bool, momentum: float | None, like: Tensor
) -> BatchChannelNorm:
    """A batch-channel norm that takes over what `norm` has, of the dtype and device of `like`."""
    _refuse_lazy(norm)
    _refuse_own_forward(norm, (_BatchNorm, nn.SyncBatchNorm))
    _refuse_parametrized(norm)
    momentum = _require_moving_average(norm.momentum if momentum is None else momentum)
    channels = norm.num_features
    if groups is None:
        groups = max(d for d in range(1, 33) if channels % d == 0 and (d == 1 or channels >= 2 * d))
    new = BatchChannelNorm(channels, groups, norm.eps, momentum, estimate)
    new.to(like.device, like.dtype).train(norm.training)
    if norm.weight is not None:
        new.batch_norm.scale = norm.weight
        new.channel_norm.requires_grad_(norm.weight.requires_grad)
    if norm.bias is not None:
        new.batch_norm.shift = norm.bias
    if norm.running_mean is not None and norm.running_var is not None:
        new.batch_norm.exp_mean.copy_(norm.running_mean)
        new.batch_norm.exp_var.copy_(norm.running_var)
    return new


def _remade(
    layer: Layer, kind: type[_ConvNd] | type[nn.Linear], weight: Tensor, bias: Tensor | None
) -> nn.Module:
    """A layer of this kind with the arguments of `layer` and these parameters."""
    names = CONVOLUTION_ARGUMENTS if isinstance(layer, _ConvNd) else LINEAR_ARGUMENTS
    arguments = {name: getattr(layer, name) for name in names}
    # On the meta device nothing is drawn that would be thrown away.
    new: Any = kind(**arguments, bias=bias is not None, device="meta")
    new.weight, new.bias = weight, bias
    return new.train(layer.training)


def _copy_with(replacements: Mapping[nn.Module, nn.Module], model: nn.Module) -> nn.Module:
    """Copy the model with the new modules wherever the old ones are, sharing what it shares."""
    memo: dict[int, Any] = {}
    for old, new in replacements.items():
        # What the memo holds for an object passes for its copy: here, the copy of its successor.
        memo[id(old)] = copy.deepcopy(new, memo)
    return copy.deepcopy(model, memo)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...]]) -> None:
    """Compute all running estimates anew from data, in place.

        exp_mean = sum(n_t * mean_t) / sum(n_t)
        exp_var = sum(n_t * var_t) / sum(n_t)

    over the batches t of `n_t` values in a channel each. What the estimates were before plays no
    part. The variance is the batch's, around its own mean; unbiased where `running_variance` says
    so; and where that says "around_running_mean", of all the values together.

    All runs as in evaluation, but every `BatchNorm` and `EstimatedBatchNorm`, alone or inside a
    `BatchChannelNorm`, first averages its input in and then normalizes by the average so far. After
    one batch the network is consistent on that batch: the input of every norm has the stored mean
    and variance. With more it is nearly so, as the layers below change while those above are
    measured.

    Modes and `update_stats` are in the end what they were, and after an error the statistics too. A
    norm that no batch reaches keeps its own.

    Args:
        model: any module that has batch norms of `bcn_torch`, not compiled.
        batches: the model's input of each batch: a tensor, or a tuple of positional arguments.

    Raises:
        ValueError: there is no batch norm, no batch reaches one, or in some batch the mean or
            variance of a channel is not finite.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchNorm, recalibrate
        >>> layer = BatchNorm(1)
        >>> recalibrate(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]] * 4)])
        >>> layer.exp_mean, layer.exp_var
        (tensor([6.]), tensor([0.3333]))

    Source: "precise BatchNorm" of Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    arXiv 2105.07576.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    _require_batch_norm(names)
    _require_several_batches(batches)
    values = dict.fromkeys(names, 0)

    def average(norm: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (x,) = (*args, *kwargs.values())
        _average(norm, widen(x), values[norm], names[norm])
        values[norm] += x.numel() // norm.channels

    with _restored(model, names), ExitStack() as hooks:
        model.eval()
        for norm in names:
            norm.training, norm.update_stats = False, False
            hooks.callback(norm.register_forward_pre_hook(average, with_kwargs=True).remove)
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
        _require_reached(values.values())


def _average(norm: BatchNorm, x: Tensor, before: int, name: str) -> None:
    """Average the moments of `x` into the estimates, which are those of so many values before."""
    n = x.numel() // norm.channels
    mu, sigma2 = (moment.flatten() for moment in batch_moments(x))
    _require_finite(mu, sigma2, name)
    if norm.running_variance == "unbiased":
        sigma2 = sigma2 * (n / max(n - 1, 1))
    if not before:
        # A weight of 0 would not do away with an old estimate that is not finite.
        norm.exp_mean.zero_()
        norm.exp_var.zero_()
    r = n / (before + n)
    change = mu - norm.exp_mean
    norm.exp_mean.copy_(norm.exp_mean + r * change)
    # Var = E[var] + Var[mean], the second term only where all the values count together
    together = norm.running_variance == "around_running_mean"
    between = r * (1 - r) * change**2 if together else 0
    norm.exp_var.copy_((1 - r) * norm.exp_var + r * sigma2 + between)


@contextmanager
def _restored(model: nn.Module, norms: Iterable[BatchNorm]) -> Iterator[None]:
    """In the end bring back modes and settings, and after an error the estimates too."""
    modes = {module: module.training for module in model.modules()}
    settings = {norm: norm.update_stats for norm in norms}
    estimates = [(e, e.clone()) for n in norms for e in (n.exp_mean, n.exp_var)]
    try:
        yield
    except BaseException:
        for estimate, before in estimates:
            estimate.copy_(before)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, update_stats in settings.items():
            norm.update_stats = update_stats


@torch.inference_mode(False)
@torch.no_grad()
def fold(model: nn.Module, *example_inputs: Any) -> nn.Module:
    """Copy a model for inference, with its norms and standardized weights as plain weights.

    In evaluation a batch norm is an affine map of each channel, which the convolution or linear
    layer before it can do as well:

        factor = scale / sqrt(exp_var + eps)
        weight = factor * weight
        bias = factor * (bias - exp_mean) + shift

    So a `WSConv` or `WSLinear` becomes PyTorch's own layer, with the standardized weight; a
    `BatchNorm` or `EstimatedBatchNorm` that follows such a layer, or PyTorch's own, goes into it
    and leaves `torch.nn.Identity` behind; the batch norm of a `BatchChannelNorm` likewise, which
    leaves its `ChannelNorm`. Computed in float64, rounded once to the weight's dtype.

    What follows what is seen while the example runs through the model, in evaluation. The norm's
    input is the layer's output itself; both run once; and nothing but the norm uses that output:
    the model gives the same, bit for bit, where all else is given garbage for it, once NaN and once
    large random numbers. What does not stand in this relation stays as it is, so that of the
    example only the path that it takes matters, not the values. Layers whose weight is computed by
    a parametrization or a hook stay too.

    Call layers and norms: a forward that reads their weights itself would find others. Hooks of
    what is replaced are not carried over.

    Args:
        model: any module. It is not changed; the copy is in evaluation.
        *example_inputs: positional arguments of the model, which are not changed either.

    Raises:
        ValueError: there is nothing to fold.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from bcn_torch import BatchChannelNorm, WSConv2d, fold
        >>> model = nn.Sequential(WSConv2d(3, 64, 3), BatchChannelNorm(64, 32))
        >>> fold(model, torch.randn(1, 3, 8, 8))
        Sequential(
          (0): Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1))
          (1): ChannelNorm(64, groups=32, eps=1e-05, affine=True)
        )
    """
    norm_after = _private_norms(model, example_inputs)
    replacements: dict[nn.Module, nn.Module] = {
        layer: _folded(layer, norm_after.get(layer))
        for layer in model.modules()
        if isinstance(layer, Layer) and (layer in norm_after or type(layer) in PLAIN)
        if "weight" in layer._parameters
    }
    _require_foldable(replacements)
    for norm in norm_after.values():
        rest = norm.channel_norm if isinstance(norm, BatchChannelNorm) else nn.Identity()
        replacements[norm] = rest
    return _copy_with(replacements, model).eval()


def _private_norms(model: nn.Module, example_inputs: Sequence[Any]) -> dict[nn.Module, Any]:
    """The norm after each layer whose output nothing but that norm uses."""
    observe = partial(_observed, model, example_inputs, LAYERS, lambda m: type(m) in NORMS)
    seen = observe()

    def unused(layers: Collection[nn.Module], garbage: Callable[[Tensor], Tensor]) -> bool:
        try:
            again = observe(lambda layer, y: garbage(y) if layer in layers else y)
            return again[1:] == seen[1:] and _same(again.output, seen.output)
        except Exception:  # Who knows what garbage leads to?
            return False

    def private(layers: Collection[nn.Module]) -> bool:
        # NaN shows wherever it is computed with; where it is compared, random numbers do.
        return unused(layers, lambda y: torch.full_like(y, torch.nan)) and unused(layers, _noise())

    norm_after = {
        layer: norm for layer, norm in seen.one_to_one().items() if "weight" in layer._parameters
    }
    if private(norm_after):
        return norm_after
    alone: dict[nn.Module, Any] = {}
    for layer, norm in norm_after.items():
        if private({*alone, layer}):
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


class Observation(NamedTuple):
    """What happened while the model ran.

    Attributes:
        output: of the model.
        pairs: a layer and the norm that was given its very output, for each such call.
        calls: how often each of the layers and norms ran.
    """

    output: Any
    pairs: list[tuple[nn.Module, nn.Module]]
    calls: Counter[nn.Module]

    def one_to_one(self) -> dict[nn.Module, Any]:
        """The norm after each layer, where both ran once and neither has another partner."""
        partners = Counter(chain.from_iterable(self.pairs))
        return {
            layer: norm
            for layer, norm in self.pairs
            if all(partners[m] == self.calls[m] == 1 for m in (layer, norm))
        }


def _observed(
    model: nn.Module,
    example_inputs: Sequence[Any],
    layers: Collection[type[nn.Module]],
    is_norm: Callable[[nn.Module], bool],
    shown: Callable[[nn.Module, Tensor], Tensor] = lambda layer, y: y,
) -> Observation:
    """Run a copy of the model, and see which layers of these types give their output to a norm.

    `shown` tells what passes for the output of a layer, by the layer and its output, with all but
    the norms that are given it. Every run starts from the same random state, and leaves it.
    """
    calls: Counter[nn.Module] = Counter()
    maker: dict[tuple[int, int], tuple[nn.Module, Tensor, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    twin = copy.deepcopy(model).eval()
    original = dict(zip(twin.modules(), model.modules(), strict=True))

    def after_layer(layer: Any, _: Any, y: Tensor) -> Tensor:
        calls[original[layer]] += 1
        # With channels at axis 1: a batch, and of a linear layer nothing more than that.
        if y.dim() != layer.weight.dim():
            return y
        z = shown(original[layer], y)
        # Kept alive, or another tensor could come by its id. The version counts changes in place.
        maker[id(z), z._version] = original[layer], y, z
        return z

    def before_norm(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls[original[norm]] += 1
        (x,) = (*args, *kwargs.values())
        if (id(x), x._version) not in maker:
            return None
        layer, y, _ = maker[id(x), x._version]
        pairs.append((layer, original[norm]))
        return (y,), {}

    inner = {m.batch_norm for m in twin.modules() if isinstance(m, BatchChannelNorm)}
    devices = {t.device for t in chain(twin.parameters(), twin.buffers()) if t.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), ExitStack() as hooks:
        for module in twin.modules():
            # Exactly these types: a subclass may do more than the layer that it would become.
            if type(module) in layers:
                hooks.callback(module.register_forward_hook(after_layer).remove)
            if is_norm(module) and module not in inner:
                hook = module.register_forward_pre_hook(before_norm, with_kwargs=True)
                hooks.callback(hook.remove)
        tensors = {id(x): x.clone() for x in example_inputs if isinstance(x, Tensor)}
        output = twin(*copy.deepcopy(example_inputs, tensors))
    return Observation(output, pairs, calls)


def _folded(layer: Layer, norm: Norm | None) -> nn.Module:
    """`layer`, plain, with the batch norm of `norm`, if any, by its estimates behind it."""
    weight, bias = _exact(layer.weight), layer.bias
    if isinstance(layer, WSLayer):
        gain = None if layer.gain is None else _exact(layer.gain)
        weight = standardize_weight(weight, layer.standardization, gain)
    if norm is not None:
        batch_norm = norm.batch_norm if isinstance(norm, BatchChannelNorm) else norm
        mean, var = _exact(batch_norm.exp_mean), _exact(batch_norm.exp_var)
        scale, shift = _exact(batch_norm.scale, otherwise=1), _exact(batch_norm.shift)
        # y = scale * (w x + b - mu_hat) / sqrt(sigma2_hat + eps) + shift
        factor = scale / (var + batch_norm.eps).sqrt()
        weight = factor.view(-1, *(1,) * (weight.dim() - 1)) * weight
        bias = factor * (_exact(bias) - mean) + shift

    def rounded(values: Tensor) -> nn.Parameter:
        return nn.Parameter(values.to(layer.weight), layer.weight.requires_grad)

    bias = None if bias is None else rounded(bias)
    return _remade(layer, PLAIN.get(type(layer), type(layer)), rounded(weight), bias)


def _exact(values: Tensor | None, otherwise: float = 0) -> Tensor:
    """In float64, on the CPU, since not every device has it; a number where there is nothing."""
    if values is None:
        return torch.tensor(otherwise, dtype=torch.float64)
    return values.detach().to("cpu", torch.float64)


def _require_moving_average(momentum: float | None) -> float:
    if momentum is None:
        raise ValueError(
            "momentum=None, a cumulative average, has no counterpart here. Give a momentum, for "
            "example momentum=0.1."
        )
    return momentum


def _refuse_lazy(module: nn.Module) -> None:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(
            f"A {type(module).__name__} does not know its size yet. Run the model on a batch first."
        )


def _refuse_own_forward(module: nn.Module, known: Iterable[type[nn.Module]]) -> None:
    if type(module).forward not in [kind.forward for kind in known]:
        raise ValueError(
            f"{type(module).__name__} has a forward of its own, which a conversion would lose. "
            "Convert it by hand, or leave it as it is with leave."
        )


def _refuse_parametrized(module: nn.Module) -> None:
    computed = [name for name in ("weight", "bias") if name not in module._parameters]
    if computed:
        raise ValueError(
            f"The {' and '.join(computed)} of this {type(module).__name__} is computed by a "
            "parametrization, such as weight_norm or spectral_norm, which a conversion would lose. "
            "Remove it first, or leave the module as it is with leave."
        )


def _require_convertible(complaints: Sequence[str]) -> None:
    if complaints:
        raise ValueError(
            f"Nothing was converted, because of {len(complaints)} of the modules, which can also "
            "be left as they are with leave=lambda name, module: name in {...}:\n"
            + "\n".join(complaints)
        )


def _require_torch_batch_norm(norms: Collection[nn.Module]) -> None:
    if not norms:
        raise ValueError(
            "The model must have a batch norm of torch.nn to convert, but it has none that is not "
            "to be left as it is."
        )


def _require_one_norm_each(names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            "The convolution before each norm must be clear from the order in which the modules "
            f"are defined, but by that order {', '.join(names)} would be before several norms. "
            "Give example_inputs, which show where the outputs of the convolutions go."
        )


def _require_several_batches(batches: object) -> None:
    if isinstance(batches, Tensor):
        raise ValueError(
            "The batches must be an iterable of inputs, but they are one tensor of shape "
            f"{tuple(batches.shape)}. For a single batch, put it in a list."
        )


def _require_foldable(replacements: Collection[nn.Module]) -> None:
    if not replacements:
        raise ValueError(
            "The model must have something to fold, a standardized weight, or a batch norm of "
            "bcn_torch that alone uses the output of a convolution or linear layer, but on the "
            "example there was neither. Convert the norms of torch.nn with convert_batch_norm."
        )


def _require_batch_norm(norms: Collection[nn.Module]) -> None:
    if not norms:
        raise ValueError(
            "The model must have a BatchNorm, EstimatedBatchNorm or BatchChannelNorm of bcn_torch, "
            "but it has none. Convert those of torch.nn with convert_batch_norm."
        )


def _require_reached(samples: Iterable[int]) -> None:
    if not any(samples):
        raise ValueError(
            "The batches must reach a batch norm at least once, but none did. Give at least one "
            "batch (an iterator can be used once only), and the model as it was before "
            "torch.compile."
        )


def _require_finite(mean: Tensor, var: Tensor, name: str) -> None:
    bad = (~(mean.isfinite() & var.isfinite())).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The mean and variance of every channel must be finite, but at {name!r} those of the "
            f"channels {', '.join(map(str, bad))} are not. The statistics are as they were before; "
            "leave the batch out."
        )
