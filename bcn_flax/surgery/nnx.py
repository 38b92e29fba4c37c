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
from bcn_flax.surgery import calibration, checks, folding
from bcn_flax.surgery.flow import Detour, Flow, without_forks
from bcn_flax.weight_standardization import require_fan_in

Path = tuple[Any, ...]
OnCall = Callable[[Path, Any, Any], Any]

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

    Scales, biases, statistics and arguments are carried over; one without scale or bias gets such
    as learn, from 1 and 0. With `ws`, each `nnx.Conv` whose
    output one of these norms is given becomes a `WSConv` with the same parameters. Standardized
    kernels give other outputs, so `recalibrate` the result, and then train it further.

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
        args: an example input, which shows what comes before each norm; needed with `ws` only.
        num_groups: number of groups of channels; None is for each norm the most up to 32, of two
            channels or more.
        ws: whether to standardize the weights of the convolutions before.
        estimate: see `bcn_flax.linen.BatchChannelNorm`.
        momentum: the weight of the old running average, instead of each norm's own.
        leave: true for norms and convolutions to leave as they are, given their path, as in
            "blocks/0/norm", and the module.

    Raises:
        ValueError: some of the norms or convolutions cannot be converted, all of which the message
            lists; there are none; or an example input is missing.
    """
    if ws:
        checks.example_input(args)
    modules = dict(nnx.iter_modules(model))
    left = {p for p, m in modules.items() if leave is not None and leave(_name(p), m)}
    norms = {p: m for p, m in modules.items() if isinstance(m, nnx.BatchNorm) and p not in left}
    pairs = _flow(model, args, nnx.BatchNorm, with_flags=True).pairs() if ws else []
    convolutions: dict[Path, Any] = {
        conv: modules[conv]
        for conv, norm in pairs
        if norm in norms and conv not in left and type(modules[conv]) is nnx.Conv
    }
    complaints = [
        *((p, checks.complaint(checks.plain_batch_norm, type(m))) for p, m in norms.items()),
        *((p, checks.complaint(checks.one_layer, m.mean.ndim)) for p, m in norms.items()),
        *((p, checks.complaint(checks.one_axis, m.axis)) for p, m in norms.items()),
        *((p, checks.complaint(_groups, m.num_features, num_groups)) for p, m in norms.items()),
        *(
            (p, checks.complaint(require_fan_in, m.kernel_shape, -1))
            for p, m in convolutions.items()
        ),
    ]
    checks.convertible([(_name(p), text) for p, text in complaints if text], len(norms))

    def replace(path: Path, node: Any) -> Any:
        if path in norms:
            return _batch_channel_norm(node, num_groups, estimate, momentum)
        return _rebuilt(WSConv, node) if path in convolutions else node

    return nnx.recursive_map(replace, nnx.clone(model))


def recalibrate(model: Any, batches: Iterable[Any]) -> None:
    """Take all running averages of `model` anew, from `batches`.

    See `bcn_flax.surgery.linen.recalibrate`. Only the statistics of the model change, and those
    only when all went well.

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
    checks.several_batches(batches)
    copy = _evaluating(model)
    for norm in _batch_norms(copy):
        norm.mean, norm.var = (nnx.BatchStat(widen(old[...])) for old in (norm.mean, norm.var))
        norm.weight = nnx.BatchStat(jnp.zeros_like(norm.mean[...]))
    graphdef, state = nnx.split(copy)

    @partial(jax.jit, static_argnums=2)
    def step(state: Any, arrays: Any, static: calibration.Static) -> Any:
        copy = nnx.merge(graphdef, state)
        for norm in _batch_norms(copy):
            _override(norm, affine=_averaging(type(norm).affine))
        copy(*calibration.whole(arrays, static))
        return nnx.state(copy, nnx.BatchStat)

    for arrays, static in calibration.arguments(batches):
        state = nnx.merge_state(state, step(state, arrays, static))
        nnx.update(copy, state)
        reached = [norm for norm in _batch_norms(copy) if (norm.weight[...] > 0).any()]
        checks.finite([(norm.mean[...], norm.var[...]) for norm in reached])
    checks.norms(reached)
    for old, new in zip(_batch_norms(model), _batch_norms(copy), strict=True):
        if new in reached:
            old.mean[...] = new.mean[...].astype(old.mean.dtype)
            old.var[...] = new.var[...].astype(old.var.dtype)


def fold(model: Any, *args: Any) -> Any:
    """Bake weight standardization and batch norms into the convolutions before them, for inference.

    The result is a plain network that evaluates: `nnx.Conv` for `WSConv`, `ChannelNorm` for
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
    model = _evaluating(model)
    modules: dict[Path, Any] = dict(nnx.iter_modules(model))
    norm_types = (BatchNorm, BatchChannelNorm)
    flow = _flow(model, args, norm_types, with_flags=False)

    def detour(d: Detour[Path]) -> Any:
        return _watched(
            nnx.clone(model),
            norm_types,
            lambda path, y, _: d.leave(path, y),
            lambda path, x, _: d.enter(path, x),
        )(*args)

    norm_after = without_forks(flow.one_to_one(), detour)
    norms = set(norm_after.values())
    standardized = {path for path in flow.producers if _is_standardized(modules[path])}
    checks.foldable(norms | standardized)

    def replace(path: Path, node: Any) -> Any:
        if path in norms:
            return node.channel_norm if isinstance(node, BatchChannelNorm) else _Nothing(node)
        if path in norm_after or path in standardized:
            return _folded(node, modules[norm_after[path]] if path in norm_after else None)
        return node

    return nnx.recursive_map(replace, nnx.clone(model))


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
    """As many groups as asked for, or the most up to 32, of two channels or more."""
    if num_groups is None:
        divisors = (d for d in range(1, 33) if channels % d == 0)
        num_groups = max(d for d in divisors if d == 1 or channels >= 2 * d)
    return require_group_count(channels, num_groups, None)


def _batch_channel_norm(
    norm: nnx.BatchNorm, num_groups: int | None, estimate: bool, momentum: float | None
) -> BatchChannelNorm:
    """The norm with a channel norm after it, and the same variables."""
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
    """Another kind of the same layer, with the same arguments and parameters."""
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

    standardized = _is_standardized(module)
    conv = folding.Convolution(
        kernel=value(module.kernel),
        bias=value(module.bias),
        axis=-2 if getattr(module, "transpose_kernel", False) else -1,
        standardization=module.standardization if standardized else None,
        gain=value(module.gain) if standardized else None,
        mask=getattr(module, "mask", None),
    )
    batch_norm = None
    if norm is not None:
        inner = norm.batch_norm if isinstance(norm, BatchChannelNorm) else norm
        names = ("mean", "var", "scale", "bias")
        arrays = {name: value(getattr(inner, name)) for name in names}
        batch_norm = folding.BatchNorm(**arrays, epsilon=inner.epsilon)
    weights = folding.fold(conv, batch_norm)
    new = _rebuilt(_PLAIN[type(module)], module, use_bias="bias" in weights)
    new.kernel = module.kernel.replace(weights["kernel"])
    if "bias" in weights:
        new.bias = nnx.Param(weights["bias"])
    return new


class _Nothing(nnx.Module):
    """What is left of a batch norm that was folded: the type of its result."""

    def __init__(self, norm: BatchNorm) -> None:
        self.dtype = norm.dtype
        self.param_dtype = norm.param_dtype
        self.use_scale = norm.use_scale
        self.use_bias = norm.use_bias
        self.axis = norm.axis

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.astype(result_dtype(self, x.dtype))


def _flow(model: Any, args: Any, norms: Any, with_flags: bool) -> Flow[Path]:
    """What convolutions give and norms get: all norms, or those called on their input alone."""
    flow: Flow[Path] = Flow()
    graphdef, state = nnx.split(model)
    modules: list[tuple[Path, Any]] = list(nnx.iter_modules(model))
    shapes = {path: m.kernel.shape for path, m in modules if type(m) in _PLAIN}

    def produce(path: Path, y: Any, module: Any) -> Any:
        if module.kernel.shape == shapes[path]:  # `nnx.scan` stores kernels of many layers as one
            flow.produce(path, y)
        return y

    def consume(path: Path, x: Any, alone: bool) -> Any:
        if with_flags or alone:
            flow.consume(path, x)
        return x

    def forward(state: Any) -> None:
        _watched(nnx.merge(graphdef, state), norms, produce, consume)(*args)

    jax.eval_shape(forward, state)
    return flow


def _watched(model: Any, norms: Any, produce: OnCall, consume: OnCall) -> Any:
    """Change the model: what norms get goes through `consume`, what others give, `produce`.

    `produce` is given path, output and module; `consume`, path, input, and whether it was called on
    that alone.
    """

    def consuming(path: Path, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Any, x: Any, *flags: Any, **named: Any) -> Any:
            if self.axis in (-1, x.ndim - 1):
                x = consume(path, x, not (flags or named))
            return call(self, x, *flags, **named)

        return watched

    def producing(path: Path, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Any, *inputs: Any, **named: Any) -> Any:
            return produce(path, call(self, *inputs, **named), self)

        return watched

    for path, module in list(nnx.iter_modules(model)):
        kind: Any = type(module)
        if isinstance(module, norms):
            _override(module, __call__=consuming(path, kind.__call__))
        elif kind in _PLAIN:
            _override(module, __call__=producing(path, kind.__call__))
    return model


def _averaging(affine: Callable[..., Affine]) -> Callable[..., Affine]:
    """In the place of `BatchNorm.affine`: average, then normalize by the average."""

    def averaged(self: Any, m: Moments, use_running_average: bool, update: bool) -> Affine:
        del use_running_average, update
        average = calibration.Average(self.mean[...], self.var[...], self.weight[...])
        average = calibration.absorb(average, m, self.running_variance)
        self.mean[...], self.var[...], self.weight[...] = average
        return affine(self, m, use_running_average=True, update_stats=False)

    return averaged


def _override(module: nnx.Module, **methods: Any) -> None:
    """Give this one module other methods, by a class of its own."""
    kind: Any = type(module)
    object.__setattr__(module, "__class__", type(kind)(kind.__name__, (kind,), methods))
