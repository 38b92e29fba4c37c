"""Operations on NNX models."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers

from bcn_flax.affine import Affine, Moments
from bcn_flax.checks import require_group_count
from bcn_flax.nnx import BatchChannelNorm, BatchNorm, WSConv, WSConvTranspose, WSDense
from bcn_flax.norms import result_dtype
from bcn_flax.passes import widen
from bcn_flax.surgery import calibration, folding
from bcn_flax.surgery.flow import Observer, record, require_foldable, sole_readers

Path = tuple[Any, ...]

_PLAIN: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.Conv: nnx.Conv,
    nnx.ConvTranspose: nnx.ConvTranspose,
    nnx.Linear: nnx.Linear,
    WSConv: nnx.Conv,
    WSConvTranspose: nnx.ConvTranspose,
    WSDense: nnx.Linear,
}


def convert_batch_norm(
    model: Any,
    *args: Any,
    num_groups: int | None = 32,
    ws: bool = True,
    estimate: bool = True,
    momentum: float | None = None,
    leave: Callable[[str, nnx.Module], bool] | None = None,
) -> Any:
    """A copy of `model` with `BatchChannelNorm` for `nnx.BatchNorm`, and `WSConv` before it.

    Scales, biases, statistics and arguments are carried over; missing scales and biases are added
    as trainable parameters (1 and 0). With `ws`, each `nnx.Conv` whose output is the input of one
    of these norms becomes a `WSConv` with the same parameters. Standardized kernels give other
    outputs, so `recalibrate` the result, and then fine-tune it.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.surgery.nnx import convert_batch_norm
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Conv(3, 24, (3, 3), rngs=rngs), nnx.BatchNorm(24, rngs=rngs))
        >>> model = convert_batch_norm(model, jnp.ones((2, 8, 8, 3)), num_groups=8)
        >>> [type(layer).__name__ for layer in model.layers]
        ['WSConv', 'BatchChannelNorm']

    Args:
        model: an NNX module; it is not changed.
        args: an example input, to find the convolution before each norm; needed with `ws` only.
        num_groups: number of groups of channels; None gives each norm as many as possible, up to
            32, of two channels or more.
        ws: whether to standardize the kernels of the convolutions before the norms.
        estimate: see `bcn_flax.linen.BatchChannelNorm`.
        momentum: the weight of the old running average, instead of each norm's own.
        leave: returns true for each norm and convolution to leave unchanged, given its path, as
            in "blocks/0/norm", and the module.

    Raises:
        ValueError: there is no norm to convert; some of the norms or convolutions cannot be
            converted (the message lists all of them); or an example input is missing.
    """
    if ws and not args:
        raise ValueError(
            "To standardize the weights of the convolution before each norm, an example input is "
            "needed, which shows where its output goes, but there is none. Call "
            "convert_batch_norm(model, x), or leave the convolutions as they are, with ws=False."
        )
    copy = nnx.clone(model)
    modules: dict[Path, Any] = dict(nnx.iter_modules(copy))
    left = {p for p, m in modules.items() if leave is not None and leave(_name(p), m)}
    norms = {p for p, m in modules.items() if isinstance(m, nnx.BatchNorm)} - left
    if not norms:
        raise ValueError(
            "The model must have an nnx.BatchNorm to convert, but it has none that is not to be "
            "left as it is."
        )
    run = partial(_run, copy, args, nnx.BatchNorm, with_flags=True)
    pairs = record(run).pairs() if ws else []
    convolutions = {
        conv for conv, norm in pairs if norm in norms and type(modules[conv]) is nnx.Conv
    } - left
    converted: dict[Path, Any] = {}
    problems = []
    for path, module in modules.items():
        try:
            if path in norms:
                converted[path] = _batch_channel_norm(module, num_groups, estimate, momentum)
            elif path in convolutions:
                converted[path] = _rebuilt(WSConv, module)
        except ValueError as error:
            problems.append(f"{_name(path)}: {error}")
    if problems:
        raise ValueError(
            "Every module that is to be converted must allow it, but:\n  "
            + "\n  ".join(problems)
            + "\nGive other arguments, or leave these modules as they are, with the argument leave."
        )
    return nnx.recursive_map(lambda path, node: converted.get(path, node), copy)


def recalibrate(model: Any, batches: Iterable[Any]) -> None:
    """Replace the running statistics of `model` by averages over `batches`, in place.

    See `bcn_flax.surgery.linen.recalibrate`. Nothing else in the model changes, and nothing at all
    if there is an error.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from bcn_flax.nnx import BatchChannelNorm
        >>> from bcn_flax.surgery.nnx import recalibrate
        >>> model = BatchChannelNorm(16, num_groups=4, rngs=nnx.Rngs(0))
        >>> recalibrate(model, [jax.random.normal(jax.random.key(0), (2, 8, 8, 16))])

    Args:
        model: a network with norms of this library.
        batches: inputs, each an array, or a tuple of the positional arguments of the model.

    Raises:
        ValueError: there are no batches, or no norms, or a batch has values that are not finite.
    """
    copy = _evaluating(model)
    for norm in _batch_norms(copy):
        norm.mean, norm.var = (nnx.BatchStat(widen(old[...])) for old in (norm.mean, norm.var))
        norm.weight = nnx.BatchStat(jnp.zeros_like(norm.mean[...]))
    graphdef, start = nnx.split(copy)

    @partial(jax.jit, static_argnums=2)
    def step(state: Any, arrays: Any, static: calibration.Static) -> Any:
        copy = nnx.merge(graphdef, state)
        for norm in _batch_norms(copy):
            _override(norm, affine=_updating(type(norm).affine))
        copy(*calibration.join(arrays, static))
        return nnx.merge_state(state, nnx.state(copy, nnx.BatchStat))

    def statistics(state: Any) -> calibration.Statistics:
        return {
            (i, name): getattr(norm, name)[...]
            for i, norm in enumerate(_batch_norms(nnx.merge(graphdef, state)))
            for name in calibration.Average._fields
        }

    averages = calibration.average(step, start, statistics, batches)
    for i, norm in enumerate(_batch_norms(model)):
        if (i, "mean") in averages:
            norm.mean[...] = averages[i, "mean"].astype(norm.mean.dtype)
            norm.var[...] = averages[i, "var"].astype(norm.var.dtype)


def fold(model: Any, *args: Any) -> Any:
    """Fold weight standardization and batch norms into the layers before them, for inference.

    The result is a copy of plain layers, in evaluation: `nnx.Conv` for `WSConv`, `ChannelNorm` for
    `BatchChannelNorm`, nothing for a batch norm. See `bcn_flax.surgery.linen.fold`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from bcn_flax.nnx import BatchChannelNorm, WSConv
        >>> from bcn_flax.surgery.nnx import fold
        >>> rngs = nnx.Rngs(0)
        >>> conv = WSConv(3, 24, (3, 3), rngs=rngs)
        >>> model = nnx.Sequential(conv, BatchChannelNorm(24, num_groups=8, rngs=rngs))
        >>> folded = fold(model, jnp.ones((1, 8, 8, 3)))
        >>> [type(layer).__name__ for layer in folded.layers]
        ['Conv', 'ChannelNorm']

    Args:
        model: a network with layers of this library; it is not changed.
        args: an example input, and whatever else the model takes.

    Raises:
        ValueError: there is nothing to fold.
    """
    copy = _evaluating(model)
    modules: dict[Path, Any] = dict(nnx.iter_modules(copy))
    run = partial(_run, copy, args, (BatchNorm, BatchChannelNorm), with_flags=False)
    calls = record(run)
    norm_after = sole_readers(calls, run)
    layers = [p for p in calls.layers if p in norm_after or _is_standardized(modules[p])]
    require_foldable(layers)
    replacements = {
        path: _folded(modules[path], modules[norm_after[path]] if path in norm_after else None)
        for path in layers
    }
    for path in norm_after.values():
        norm = modules[path]
        is_bcn = isinstance(norm, BatchChannelNorm)
        replacements[path] = norm.channel_norm if is_bcn else _FoldedBatchNorm(norm)
    return nnx.recursive_map(lambda path, node: replacements.get(path, node), copy)


def _name(path: Path) -> str:
    return "/".join(map(str, path))


def _evaluating(model: Any) -> Any:
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _batch_norms(model: Any) -> list[Any]:
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]


def _is_standardized(module: Any) -> bool:
    return type(module) in (WSConv, WSConvTranspose, WSDense)


def _groups(channels: int, num_groups: int | None) -> int:
    """The number of groups, by default as many as possible up to 32, of two channels or more."""
    if num_groups is None:
        divisors = (d for d in range(1, 33) if channels % d == 0)
        num_groups = max(d for d in divisors if d == 1 or channels >= 2 * d)
    return require_group_count(channels, num_groups, None)


def _batch_channel_norm(
    norm: nnx.BatchNorm, num_groups: int | None, estimate: bool, momentum: float | None
) -> BatchChannelNorm:
    """A batch-channel norm with the variables of `norm`."""
    if type(norm) is not nnx.BatchNorm:
        raise ValueError(
            f"Only nnx.BatchNorm itself is converted, but this is a {type(norm).__name__}, whose "
            "code would be lost."
        )
    if norm.mean.ndim != 1:
        raise ValueError(
            f"The statistics of a norm must be (num_features,), but they have {norm.mean.ndim} "
            "axes, as under nnx.vmap or nnx.scan. Convert one of the layers, and stack them then."
        )
    if not isinstance(norm.axis, int):
        raise ValueError(f"The channel axis must be one integer, but axis={norm.axis!r}.")
    names = ("use_running_average", "axis", "epsilon", "dtype", "param_dtype", "axis_name")
    new = BatchChannelNorm(
        norm.num_features,
        num_groups=_groups(norm.num_features, num_groups),
        estimate=estimate,
        momentum=norm.momentum if momentum is None else momentum,
        axis_index_groups=norm.axis_index_groups,
        **{name: getattr(norm, name) for name in names},
        rngs=nnx.Rngs(0),
    )
    for name in ("scale", "bias", "mean", "var"):
        if getattr(norm, name) is not None:
            setattr(new.batch_norm, name, getattr(norm, name))
    return new


def _rebuilt(make: Any, module: Any, **changes: Any) -> Any:
    """The same layer as a module of class `make`, with its arguments and parameters."""
    not_kept = {"self", "rngs", "kernel_init", "bias_init", "kernel_metadata", "bias_metadata"}
    init: Any = _PLAIN[type(module)].__init__
    names = inspect.signature(init).parameters.keys() - not_kept
    arguments = {name: getattr(module, name) for name in names} | changes
    if _is_standardized(module):
        arguments["promote_dtype"] = module._promote_dtype
    new = make(**arguments, kernel_init=initializers.zeros, rngs=nnx.Rngs(0))
    new.kernel, new.bias = module.kernel, module.bias
    return new


def _folded(module: Any, norm: BatchNorm | BatchChannelNorm | None) -> Any:
    """The plain layer that does what `module` and then the batch norm in `norm` do."""

    def value(variable: nnx.Variable[Any] | None) -> Any:
        return None if variable is None else variable[...]

    weights = [value(getattr(module, name, None)) for name in ("kernel", "bias", "gain")]
    batch_norm = None
    if norm is not None:
        inner = norm.batch_norm if isinstance(norm, BatchChannelNorm) else norm
        names = ("mean", "var", "scale", "bias")
        arrays = {name: value(getattr(inner, name)) for name in names}
        batch_norm = folding.BatchNorm(**arrays, epsilon=inner.epsilon)
    folded = folding.fold(folding.describe(module, *weights), batch_norm)
    new = _rebuilt(_PLAIN[type(module)], module, use_bias="bias" in folded)
    new.kernel = module.kernel.replace(folded["kernel"])
    if "bias" in folded:
        new.bias = nnx.Param(folded["bias"])
    return new


class _FoldedBatchNorm(nnx.Module):
    """What is left of a batch norm that was folded: it casts to the type of its result."""

    def __init__(self, norm: BatchNorm) -> None:
        self.dtype = norm.dtype
        self.param_dtype = norm.param_dtype
        self.use_scale = norm.use_scale
        self.use_bias = norm.use_bias
        self.axis = norm.axis

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(result_dtype(self, x.dtype))


def _run(model: Any, args: Any, norms: Any, observer: Observer[Path], *, with_flags: bool) -> Any:
    """Run a copy of the model, with an observer of its layers, and of its norms of these classes.

    Args:
        model: an NNX module; it is not changed.
        args: its arguments.
        norms: the classes of the norms.
        observer: sees the calls.
        with_flags: whether a norm may be called on more than its input.
    """

    def norm_call(path: Path, call: Callable[..., Any]) -> Callable[..., Any]:
        def observed(self: Any, x: Any, *flags: Any, **named: Any) -> Any:
            foldable = self.axis in (-1, x.ndim - 1) and (with_flags or not (flags or named))
            return call(self, observer.norm_input(path, x, foldable), *flags, **named)

        return observed

    def layer_call(path: Path, shape: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def observed(self: Any, *inputs: Any, **named: Any) -> Any:
            y = call(self, *inputs, **named)
            # `nnx.scan` and `nnx.vmap` store the kernels of many layers in one array.
            return observer.layer_output(path, y, foldable=self.kernel.shape == shape)

        return observed

    copy = nnx.clone(model)
    modules: list[tuple[Path, Any]] = list(nnx.iter_modules(copy))
    for path, module in modules:
        kind = type(module)
        if isinstance(module, norms):
            _override(module, __call__=norm_call(path, kind.__call__))
        elif kind in _PLAIN:
            _override(module, __call__=layer_call(path, module.kernel.shape, kind.__call__))
    return copy(*args)


def _updating(affine: Callable[..., Affine]) -> Callable[..., Affine]:
    """A method for `BatchNorm.affine`: update the average, then normalize by it."""

    def updated(self: Any, m: Moments, use_running_average: bool, update: bool) -> Affine:
        del use_running_average, update
        average = calibration.Average(self.mean[...], self.var[...], self.weight[...])
        average = calibration.update(average, m, self.running_variance)
        self.mean[...], self.var[...], self.weight[...] = average
        return affine(self, m, use_running_average=True, update_stats=False)

    return updated


def _override(module: nnx.Module, **methods: Any) -> None:
    """Replace methods of this one module, which becomes an instance of a new subclass."""
    kind: Any = type(module)
    object.__setattr__(module, "__class__", type(kind)(kind.__name__, (kind,), methods))
