"""Operations on linen models and their variables.

A linen model cannot be converted, because its own code makes its modules. Write it with their
classes as attributes, `conv: Any = nn.Conv` and `norm: Any = nn.BatchNorm`, and pass others.
"""

import dataclasses
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype

from bcn_flax import checks
from bcn_flax.linen import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.passes import promote, widen
from bcn_flax.surgery import calibration, flow, folding

Path = tuple[str, ...]
Variables = Mapping[str, Any]

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv: nn.Conv,
    nn.ConvTranspose: nn.ConvTranspose,
    nn.Dense: nn.Dense,
    WSConv: nn.Conv,
    WSConvTranspose: nn.ConvTranspose,
    WSDense: nn.Dense,
}
_WEIGHTS = ("kernel", "bias", "gain")
_MARK = "mark_"
_NORMS = (nn.BatchNorm, BatchNorm, EstimatedBatchNorm, BatchChannelNorm)


def recalibrate(
    model: nn.Module, variables: Variables, batches: Iterable[Any], **kwargs: Any
) -> dict[str, Any]:
    """The variables, with their running statistics replaced by averages over `batches`.

    Use it for a model that moves to other data, or whose running averages have diverged. Each batch
    counts by its number of values; old statistics are discarded. Every norm first updates its
    average and then normalizes by it, as it will in evaluation, so that after a single batch the
    input of every norm has exactly the stored mean and variance. Everything else in the model runs
    as the arguments say.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax import BatchChannelNorm
        >>> from bcn_flax.surgery.linen import recalibrate
        >>> model = BatchChannelNorm(num_groups=4, use_running_average=True)
        >>> images = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))
        >>> variables = model.init(jax.random.key(1), images)
        >>> variables = recalibrate(model, variables, [images, 2 * images])

    Args:
        model: a network with norms of this library.
        variables: its variables.
        batches: inputs, each an array, or a tuple of the positional arguments of the model.
        kwargs: further arguments of the model, such as those that make it evaluate.

    Raises:
        ValueError: there are no batches, or no norms, or a batch has values that are not finite.
    """
    _require_model(model, variables)
    names = calibration.Average._fields

    def update_first(next_fun: Any, fun_args: Any, fun_kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not (isinstance(norm, BatchNorm) and context.method_name == "affine"):
            return next_fun(*fun_args, **fun_kwargs)
        m = fun_args[0]
        old: list[Any] = [norm.get_variable("batch_stats", name) for name in names]
        average = calibration.update(calibration.Average(*old), m, norm.running_variance)
        for name, value in zip(names, average, strict=True):
            norm.put_variable("batch_stats", name, value)
        return next_fun(m, use_running_average=True, update_stats=False)

    @partial(jax.jit, static_argnums=2)
    def step(variables: Variables, arrays: Any, static: calibration.Static) -> Variables:
        args = calibration.join(arrays, static)
        with nn.intercept_methods(update_first):
            _, updates = model.apply(variables, *args, mutable=["batch_stats"], **kwargs)
        return {**variables, **updates}

    def statistics(variables: Variables) -> calibration.Statistics:
        return flatten_dict(variables["batch_stats"])

    stats = flatten_dict(variables.get("batch_stats", {}))
    wide = {path: widen(value) for path, value in stats.items()}
    weights = {(*p[:-1], "weight"): jnp.zeros_like(v) for p, v in wide.items() if p[-1] == "mean"}
    start: Variables = {**variables, "batch_stats": unflatten_dict(wide | weights)}
    averages = calibration.average(step, start, statistics, batches)
    after = {
        path: averages[path].astype(old.dtype) if path in averages else old
        for path, old in stats.items()
    }
    return {**variables, "batch_stats": unflatten_dict(after)}


@dataclasses.dataclass(frozen=True)
class Folded:
    """A folded model: its variables, and `apply`, which runs it.

    Attributes:
        variables: with the standardization, and the batch norm after it, folded into the kernels.
        model: the model before folding.
        convolutions: paths of the layers that are plain now, and whether they have a bias.
        norms: paths of the norms of which only a channel norm, or nothing, is left.
        dtypes: of the parameters of these norms, with which those of their inputs are promoted.
        mark: a unique name, with which `apply` prevents the use of what was compiled before.
    """

    variables: dict[str, Any]
    model: nn.Module
    convolutions: Mapping[Path, bool]
    norms: frozenset[Path]
    dtypes: Mapping[Path, Dtype | None]
    mark: str

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """Run the folded model, with the arguments of `model.apply`.

        Raises:
            ValueError: a norm that was folded is called in training.
        """

        def replacement(module: nn.Module) -> Callable[..., Any] | None:
            if module.path in self.norms:
                return partial(_without_batch_norm, module, self.dtypes[module.path])
            if module.path in self.convolutions:
                plain = _plain(module, self.convolutions[module.path])
                return partial(plain.apply, {"params": module.variables["params"]})
            return None

        with nn.intercept_methods(_interceptor(replacement)):
            return self.model.apply(_marked(variables, self.mark), *args, **kwargs)


def fold(model: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> Folded:
    """Fold weight standardization and batch norms into the layers before them, for inference.

    A standardized kernel becomes a plain one. A batch norm by its running averages, `nn.BatchNorm`
    or one of this library, alone or inside `BatchChannelNorm`, goes into the kernel and bias of the
    convolution or dense layer before it; the channel norm stays. Under `nn.vmap`, with variables
    stacked along axis 0, each member of the ensemble folds.

    Everything else is left unchanged: a norm after a layer whose output is also read elsewhere,
    returned, or stored in a mutable collection; a layer whose kernel is read elsewhere or changed
    before use; what is called twice; what runs inside scan, while or cond; subclasses.

    What reads an output is seen in a trace of the model. Nothing runs, and the values of the
    example do not matter; but it must take every branch of the Python code that a later call may
    take, with shapes and arguments such as those of later calls.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.models import VGG
        >>> from bcn_flax.surgery.linen import fold
        >>> model, images = VGG(((32,), (64,))), jnp.ones((1, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images, train=False)
        >>> folded = fold(model, variables, images, train=False)
        >>> logits = jax.jit(partial(folded.apply, train=False))(folded.variables, images)

    Args:
        model: a network; it evaluates.
        variables: its variables.
        args: an example input, and whatever else the model takes.
        kwargs: further arguments of the model, such as those that make it evaluate.

    Raises:
        ValueError: there is nothing to fold, or a norm was called in training.
    """
    _require_model(model, variables)
    variables = meta.unbox(variables)
    modules, seen = _trace(model, variables, args, kwargs)
    after = seen.sole_readers()
    stored = {name: flatten_dict(variables.get(name, {})) for name in ("params", "batch_stats")}
    convolutions: dict[Path, bool] = {}
    norm_dtypes: dict[Path, Dtype | None] = {}
    for path, call in seen.foldable_layers().items():
        layer, norm, epsilon = modules[path], None, 0.0
        if path in after:
            norm = seen.weights(after[path])
            module = modules[after[path].path]
            epsilon, norm_dtypes[module.path] = _pop_batch_norm(module, norm, stored)
        elif getattr(layer, "standardization", None) is None:
            continue
        folded = folding.fold(layer, seen.weights(call), norm, epsilon, call.stacked)
        stored["params"].pop((*path, "gain"), None)
        stored["params"].update({(*path, name): value for name, value in folded.items()})
        convolutions[path] = "bias" in folded
    folding.require_foldable(convolutions)
    folded_variables = {name: unflatten_dict(flat) for name, flat in stored.items() if flat}
    rest = {name: v for name, v in variables.items() if name not in stored}
    return Folded(
        variables={**rest, "params": {}, **folded_variables},
        model=model,
        convolutions=convolutions,
        norms=frozenset(norm_dtypes),
        dtypes=norm_dtypes,
        mark=_new_mark(),
    )


def _require_model(model: Any, variables: Any) -> None:
    checks.require_type("model", model, nn.Module, "a linen module")
    checks.require_type("variables", variables, Mapping, "a mapping of collections")


def _new_mark() -> str:
    return f"{_MARK}{uuid.uuid4().hex}"


def _marked(variables: Variables, mark: str) -> Variables:
    """The variables with one more beside each kernel, each with a name of its own.

    Modules under `nn.jit` are traced again only if the structure of their variables changes, and
    interceptors see only what is traced.
    """
    params = flatten_dict(variables.get("params", {}))
    kernels = [path for path in params if path[-1] == "kernel"]
    marks = {(*path[:-1], f"{mark}_{i}"): params[path] for i, path in enumerate(kernels)}
    return {**variables, "params": unflatten_dict(params | marks)}


def _interceptor(replacement: Callable[[nn.Module], Callable[..., Any] | None]) -> Any:
    """An interceptor of calls of modules, but not of those that a replacement makes itself.

    Args:
        replacement: returns what to call instead of a module, or None to call the module.
    """
    replacing = False

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal replacing
        call = None
        if context.method_name == "__call__" and not replacing:
            call = replacement(context.module)
        if call is None:
            return next_fun(*args, **kwargs)
        replacing = True
        try:
            return call(*args, **kwargs)
        finally:
            replacing = False

    return intercept


def _trace(
    model: nn.Module, variables: Variables, args: Any, kwargs: Any
) -> tuple[dict[Path, nn.Module], flow.Flow[Path]]:
    """Trace the model: its layers and norms, and their calls."""
    modules: dict[Path, nn.Module] = {}

    def replacement(module: nn.Module) -> Callable[..., Any] | None:
        is_norm = type(module) in _NORMS
        if not is_norm and not (type(module) in _PLAIN and _has_only_weights(module)):
            return None
        modules[module.path] = module
        return partial(_norm if is_norm else _layer, module)

    rest = {name: v for name, v in variables.items() if name not in ("params", "batch_stats")}
    returns_state = kwargs.get("mutable", False) is not False or bool(
        kwargs.get("capture_intermediates", False)
    )

    def run(stored: Any) -> tuple[Any, Any]:
        with nn.intercept_methods(_interceptor(replacement)):
            returned = model.apply({**rest, **stored}, *args, **kwargs)
        return returned if returns_state else (returned, None)

    marked = _marked(variables, _new_mark())
    stored = {name: v for name, v in marked.items() if name not in rest}
    flat = {path[1:]: value for path, value in flatten_dict(stored).items()}

    def own(path: Path) -> dict[str, Any]:
        places = (path, (*path, "batch_norm"))
        return {place[-1]: value for place, value in flat.items() if place[:-1] in places}

    return modules, flow.trace(run, stored, own)


def _has_only_weights(layer: nn.Module) -> bool:
    """Whether the layer has a kernel and nothing that is not folded, such as a scale for float8."""
    variables = flatten_dict(layer.variables)
    names = {path[1:] for path in variables if not path[-1].startswith(_MARK)}
    return {("kernel",)} <= names <= {(name,) for name in _WEIGHTS}


def _layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a layer in a trace."""
    params = layer.variables["params"]
    weights = flow.weights({name: params[name] for name in _WEIGHTS if name in params})
    y: Any = layer.clone(parent=None, name=None).apply({"params": weights}, *args, **kwargs)
    return flow.layer_output(layer.path, y, weights)


def _norm(norm: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a norm in a trace."""
    x, *flags = args or (kwargs.pop("x"),)
    _require_evaluation(norm, *flags, **kwargs)
    variables = flatten_dict(norm.variables)
    inside = _batch_norm_in(norm)
    own = {path[-1]: path for path in variables if path[1:-1] == inside}
    weights = flow.weights({name: variables[path] for name, path in own.items()})
    x = flow.norm_input(norm.path, x, weights, folding.is_last_axis(norm.axis, x.ndim))
    variables |= {path: weights[name] for name, path in own.items()}
    return norm.clone(parent=None, name=None).apply(unflatten_dict(variables), x, *flags, **kwargs)


def _batch_norm_in(norm: nn.Module) -> Path:
    """The path of the batch norm in a norm: it is the norm, or inside it."""
    return ("batch_norm",) if isinstance(norm, BatchChannelNorm) else ()


def _require_evaluation(norm: Any, flag: bool | None = None, **kwargs: Any) -> None:
    """Raise a `ValueError` if the norm is called in training."""
    flag = kwargs.get("use_running_average", flag)
    name = "/".join(norm.path)
    folding.require_evaluation(type(norm).__name__, name, norm.use_running_average, flag)


def _pop_batch_norm(
    norm: Any, weights: folding.Weights, stored: dict[str, dict[Path, Any]]
) -> tuple[float, Dtype | None]:
    """Take the batch norm in `norm` out of the variables.

    Returns:
        Its epsilon, and the dtype with which that of its input is promoted, if with any.
    """
    path = (*norm.path, *_batch_norm_in(norm))
    for flat in stored.values():
        for name in weights:
            flat.pop((*path, name), None)
    epsilon = getattr(norm, "batch_epsilon", None)
    dtypes = [weights[name].dtype for name in ("scale", "bias") if name in weights]
    if dtypes:
        # Flax promotes with the parameters as they are stored.
        is_flax = isinstance(norm, nn.BatchNorm)
        dtypes = [jnp.result_type(*dtypes) if is_flax else norm.param_dtype]
    return norm.epsilon if epsilon is None else epsilon, dtypes[0] if dtypes else None


def _plain(module: nn.Module, use_bias: bool) -> nn.Module:
    """The same layer without weight standardization."""
    make = _PLAIN[type(module)]
    names = {f.name for f in dataclasses.fields(make)} - {"name", "parent", "use_bias"}
    fields = {name: getattr(module, name) for name in names}
    return make(**fields, use_bias=use_bias, parent=None)


def _without_batch_norm(norm: Any, dtype: Dtype | None, x: Any, *flags: Any, **kwargs: Any) -> Any:
    """Call what is left of a folded norm: its channel norm, or a cast."""
    _require_evaluation(norm, *flags, **kwargs)
    if not isinstance(norm, BatchChannelNorm):
        return x.astype(norm.dtype or (x.dtype if dtype is None else promote(x.dtype, dtype)))
    names = ("axis", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale")
    channel_norm = ChannelNorm(
        norm.num_groups,
        norm.group_size,
        **{name: getattr(norm, name) for name in names},
        parent=None,
    )
    params = norm.variables.get("params", {}).get("channel_norm", {})
    return channel_norm.apply({"params": params}, x, mask=kwargs.get("mask"))
