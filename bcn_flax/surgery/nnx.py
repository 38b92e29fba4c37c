"""Operations on NNX models."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype

from bcn_flax import checks
from bcn_flax.affine import Affine, Moments
from bcn_flax.nnx import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.passes import promote, widen
from bcn_flax.surgery import calibration, folding
from bcn_flax.surgery.nnx_trace import NORMS, PLAIN, Path, batch_norm_in, name_of, override, trace


def convert_batch_norm(
    model: Any,
    *args: Any,
    num_groups: int | None = None,
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
    checks.require_type("model", model, nnx.Module, "an NNX module")
    ws, estimate = checks.require_flag("ws", ws), checks.require_flag("estimate", estimate)
    num_groups = checks.or_none(checks.require_integer)("num_groups", num_groups)
    momentum = checks.or_none(checks.require_momentum)("momentum", momentum)
    checks.or_none(checks.require_callable)("leave", leave)
    if ws and not args:
        raise ValueError(
            "To standardize the weights of the convolution before each norm, an example input is "
            "needed, which shows where its output goes, but there is none. Call "
            "convert_batch_norm(model, x), or leave the convolutions as they are, with ws=False."
        )
    copy = nnx.clone(model)
    modules: dict[Path, Any] = dict(nnx.iter_modules(copy))
    left = {p for p, m in modules.items() if leave is not None and leave(name_of(p), m)}
    norms = {p for p, m in modules.items() if isinstance(m, nnx.BatchNorm)} - left
    if not norms:
        raise ValueError(
            "The model must have an nnx.BatchNorm to convert, but it has none that is not to be "
            "left as it is."
        )
    pairs = trace(copy, args, (nnx.BatchNorm,), evaluation=False)[0].pairs() if ws else []
    convolutions = {
        conv for conv, norm in pairs if norm in norms and _is_single(modules[conv])
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
            problems.append(f"{name_of(path)}: {error}")
    if problems:
        raise ValueError(
            "Every module that is to be converted must allow it, but:\n  "
            + "\n  ".join(problems)
            + "\nGive other arguments, or leave these modules as they are, with the argument leave."
        )
    return nnx.recursive_map(lambda path, node: converted.get(path, node), copy)


def recalibrate(model: Any, batches: Iterable[Any]) -> None:
    """Replace the running statistics of `model` by averages over `batches`, in place.

    See `bcn_flax.surgery.linen.recalibrate`. The batches run through a copy in evaluation: dropout
    is off. Nothing else in the model changes, its mode neither, and nothing at all if there is an
    error.

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
            override(norm, _affine=_updating(type(norm)._affine))
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

    The result is a copy of plain layers, `nnx.Conv` for `WSConv`, `ChannelNorm` for
    `BatchChannelNorm`, nothing for a batch norm, `nnx.BatchNorm` or one of this library. It is in
    evaluation, all of its submodules: `.eval()`. See `bcn_flax.surgery.linen.fold` for what is
    folded, and what an example must do. An output that the model stores in its own state, by `sow`
    for example, is read.

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
        model: a network; it is not changed.
        args: an example input, and whatever else the model takes.

    Raises:
        ValueError: there is nothing to fold, or a norm is called with `use_running_average=False`.
    """
    copy = _evaluating(model)
    modules: dict[Path, Any] = dict(nnx.iter_modules(copy))
    seen, flagged = trace(copy, args, NORMS, evaluation=True)
    after = seen.sole_readers()
    replacements: dict[Path, Any] = {}
    for path, call in seen.foldable_layers().items():
        layer, weights, epsilon = modules[path], None, 0.0
        if path in after:
            norm, weights = modules[after[path].path], seen.weights(after[path])
            epsilon = batch_norm_in(norm).epsilon
            replacements[after[path].path] = _without_batch_norm(norm, after[path].path in flagged)
        elif not _is_standardized(layer):
            continue
        folded = folding.fold(layer, seen.weights(call), weights, epsilon, call.stacked)
        new = _rebuilt(PLAIN[type(layer)], layer, use_bias="bias" in folded)
        new.kernel = layer.kernel.replace(folded["kernel"])
        if "bias" in folded:
            new.bias = nnx.Param(folded["bias"])
        replacements[path] = new
    folding.require_foldable(replacements)
    return nnx.recursive_map(lambda path, node: replacements.get(path, node), copy)


def _evaluating(model: Any) -> Any:
    checks.require_type("model", model, nnx.Module, "an NNX module")
    copy = nnx.clone(model)
    copy.eval()
    return copy


def _batch_norms(model: Any) -> list[Any]:
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]


def _is_single(module: Any) -> bool:
    """Whether it is one convolution, not several that are stored as one."""
    return type(module) is nnx.Conv and module.kernel.ndim == len(module.kernel_size) + 2


def _is_standardized(module: Any) -> bool:
    return type(module) in (WSConv, WSConvTranspose, WSDense)


def _groups(channels: int, num_groups: int | None) -> int:
    """The number of groups, by default as many as possible up to 32, of two channels or more."""
    possible = [d for d in range(1, channels + 1) if channels % d == 0 and channels >= 2 * d] or [1]
    if num_groups is None:
        return max(d for d in possible if d <= 32)
    if num_groups not in possible:
        raise ValueError(
            "num_groups must divide the number of channels into groups of two or more, because a "
            "channel norm of single channels undoes what the batch norm has learned, but "
            f"num_groups={num_groups} and there are {channels} channels. Any of "
            f"{', '.join(map(str, possible))} would do, and num_groups=None chooses for each norm."
        )
    return num_groups


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
    if not isinstance(norm.axis, SupportsIndex):
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
    init: Any = PLAIN[type(module)].__init__
    names = inspect.signature(init).parameters.keys() - not_kept
    arguments = {name: getattr(module, name) for name in names} | changes
    if _is_standardized(module):
        arguments["promote_dtype"] = module._promote_dtype
    new = make(**arguments, kernel_init=initializers.zeros, rngs=nnx.Rngs(0))
    new.kernel, new.bias = module.kernel, module.bias
    return new


class _Cast(nnx.Module):
    """What is left of a batch norm that was folded: it casts to the type of its result."""

    def __init__(self, dtype: Dtype | None, promoted: Dtype | None) -> None:
        self.dtype = dtype
        self.promoted = promoted

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        _require_evaluation("BatchNorm", use_running_average)
        if self.dtype is not None:
            return x.astype(self.dtype)
        return x if self.promoted is None else x.astype(promote(x.dtype, self.promoted))


class _ChannelNorm(ChannelNorm):
    """What is left of a `BatchChannelNorm` that is called with `use_running_average`."""

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        _require_evaluation("BatchChannelNorm", use_running_average)
        del update_stats
        return super().__call__(x, mask=mask)


def _require_evaluation(kind: str, flag: bool | None) -> None:
    folding.require_evaluation(kind, "a folded norm", True, flag)


def _without_batch_norm(norm: Any, flagged: bool) -> nnx.Module:
    """What is left of a folded norm; `flagged` if it is called with `use_running_average`."""
    if isinstance(norm, BatchChannelNorm):
        if flagged:
            object.__setattr__(norm.channel_norm, "__class__", _ChannelNorm)
        return norm.channel_norm
    if isinstance(norm, BatchNorm):
        return _Cast(norm.dtype, norm.param_dtype if norm.use_scale or norm.use_bias else None)
    # Flax promotes the input with the statistics too.
    variables = (norm.mean, norm.var, norm.scale, norm.bias)
    return _Cast(norm.dtype, jnp.result_type(*(v.dtype for v in variables if v is not None)))


def _updating(affine: Callable[..., Affine]) -> Callable[..., Affine]:
    """A method for `BatchNorm._affine`: update the average, then normalize by it."""

    def updated(self: Any, m: Moments, use_running_average: bool, update: bool) -> Affine:
        del use_running_average, update
        average = calibration.Average(self.mean[...], self.var[...], self.weight[...])
        average = calibration.update(average, m, self.running_variance)
        self.mean[...], self.var[...], self.weight[...] = average
        return affine(self, m, use_running_average=True, update_stats=False)

    return updated
