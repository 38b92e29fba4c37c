"""Operations on linen models and their variables.

A linen model cannot be converted, because its own code makes its modules. Write it with their
classes as attributes, `conv: Any = nn.Conv` and `norm: Any = nn.BatchNorm`, and pass others.
"""

import dataclasses
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax.checks import require_running_average_flag
from bcn_flax.linen import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.norms import result_dtype
from bcn_flax.passes import widen
from bcn_flax.surgery import calibration, folding
from bcn_flax.surgery.flow import Observer, record, require_foldable, sole_readers

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
        mark: a unique name, with which `apply` prevents the use of what was compiled before.
    """

    variables: dict[str, Any]
    model: nn.Module
    convolutions: Mapping[Path, bool]
    norms: frozenset[Path]
    mark: str

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """Run the folded model, with the arguments of `model.apply`."""
        simplifying = False

        def simplify(next_fun: Any, fun_args: Any, fun_kwargs: Any, context: Any) -> Any:
            nonlocal simplifying
            module = context.module
            is_folded = module.path in self.convolutions or module.path in self.norms
            if simplifying or not is_folded or context.method_name != "__call__":
                return next_fun(*fun_args, **fun_kwargs)
            simplifying = True  # the plain layer, called below, may have the same path
            try:
                if module.path in self.norms:
                    return _without_batch_norm(module, *fun_args, **fun_kwargs)
                plain = _plain(module, self.convolutions[module.path])
                params = module.variables["params"]
                return plain.apply({"params": params}, *fun_args, **fun_kwargs)
            finally:
                simplifying = False

        with nn.intercept_methods(simplify):
            return self.model.apply(_marked(variables, self.mark), *args, **kwargs)


def fold(model: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> Folded:
    """Fold weight standardization and batch norms into the layers before them, for inference.

    A standardized kernel becomes a plain one. A batch norm by its running averages, alone or inside
    `BatchChannelNorm`, goes into the kernel and bias of the convolution or dense layer before it;
    the channel norm stays. Everything else is left unchanged, such as a norm after a layer whose
    output is also used elsewhere. To find the layer before each norm, the model is run on the
    example input.

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
        model: a network with layers of this library.
        variables: its variables.
        args: an example input, and whatever else the model takes.
        kwargs: further arguments of the model, such as those that make it evaluate.

    Raises:
        ValueError: there is nothing to fold, or a norm was called in training.
    """
    variables = meta.unbox(variables)
    modules: dict[Path, nn.Module] = {}

    def run(observer: Observer[Path]) -> Any:
        intercept = partial(_intercept, observer=observer, modules=modules, variables=variables)
        with nn.intercept_methods(intercept):
            return model.apply(_marked(variables, _new_mark()), *args, **kwargs)

    calls = record(run)
    norm_after = sole_readers(calls, run)
    params = flatten_dict(variables.get("params", {}))
    stats = flatten_dict(variables.get("batch_stats", {}))
    convolutions = {}
    for path in calls.layers:
        module = modules[path]
        if path not in norm_after and getattr(module, "standardization", None) is None:
            continue
        weights = [params.pop((*path, name), None) for name in ("kernel", "bias", "gain")]
        norm = None
        if path in norm_after:
            after = norm_after[path]
            norm = _pop_batch_norm(after, modules[after], params, stats)
        folded = folding.fold(folding.describe(module, *weights), norm)
        params.update({(*path, name): value for name, value in folded.items()})
        convolutions[path] = "bias" in folded
    require_foldable(convolutions)
    rest = {name: v for name, v in variables.items() if name not in ("params", "batch_stats")}
    return Folded(
        variables={
            **rest,
            "params": unflatten_dict(params),
            **({"batch_stats": unflatten_dict(stats)} if stats else {}),
        },
        model=model,
        convolutions=convolutions,
        norms=frozenset(norm_after.values()),
        mark=_new_mark(),
    )


def _new_mark() -> str:
    return f"mark_{uuid.uuid4().hex}"


def _marked(variables: Variables, mark: str) -> Variables:
    """The variables with one more beside each kernel.

    Modules under `nn.jit` are traced again only if the structure of their variables changes, and
    interceptors see only what is traced.
    """
    params = flatten_dict(variables.get("params", {}))
    marks = {(*path[:-1], mark): value for path, value in params.items() if path[-1] == "kernel"}
    return {**variables, "params": unflatten_dict(params | marks)}


def _intercept(
    next_fun: Any,
    args: Any,
    kwargs: Any,
    context: Any,
    *,
    observer: Observer[Path],
    modules: dict[Path, nn.Module],
    variables: Variables,
) -> Any:
    """Intercept a call: show it to the observer, and keep the module of it in `modules`."""
    module = context.module
    if context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    modules[module.path] = module
    if isinstance(module, BatchNorm | BatchChannelNorm):
        _require_evaluation(module, *args, **kwargs)
        x, *flags = args or (kwargs["x"],)
        named = {name: value for name, value in kwargs.items() if name != "x"}
        x = observer.norm_input(module.path, x, foldable=module.axis in (-1, x.ndim - 1))
        return next_fun(x, *flags, **named)
    y = next_fun(*args, **kwargs)
    if type(module) not in _PLAIN:
        return y
    return observer.layer_output(module.path, y, _is_stored_as_used(module, variables))


def _require_evaluation(
    norm: BatchNorm | BatchChannelNorm, x: Any, flag: bool | None = None, **kwargs: Any
) -> None:
    """Raise a `ValueError` if the norm is called in training."""
    flag = kwargs.get("use_running_average", flag)
    if not require_running_average_flag(type(norm).__name__, norm.use_running_average, flag):
        raise ValueError(
            "Folding is for inference, so every norm must use its running averages, but on the "
            f"example input {'/'.join(norm.path) or 'the model'} was in training. Pass what makes "
            "the model evaluate, such as train=False."
        )


def _is_stored_as_used(module: nn.Module, variables: Variables) -> bool:
    """False under `nn.scan` and `nn.vmap`, which store the kernels of many layers in one array."""
    stored = flatten_dict(variables.get("params", {})).get((*module.path, "kernel"))
    return stored is not None and stored.shape == module.variables["params"]["kernel"].shape


def _pop_batch_norm(
    path: Path, module: nn.Module, params: dict[Path, Any], stats: dict[Path, Any]
) -> folding.BatchNorm:
    """Take the batch norm at `path`, or inside it, out of the variables."""
    epsilon = module.epsilon
    if isinstance(module, BatchChannelNorm):
        path = (*path, "batch_norm")
        epsilon = module.batch_epsilon or epsilon
    return folding.BatchNorm(
        mean=stats.pop((*path, "mean")),
        var=stats.pop((*path, "var")),
        scale=params.pop((*path, "scale"), None),
        bias=params.pop((*path, "bias"), None),
        epsilon=epsilon,
    )


def _plain(module: nn.Module, use_bias: bool) -> nn.Module:
    """The same layer without weight standardization."""
    make = _PLAIN[type(module)]
    names = {f.name for f in dataclasses.fields(make)} - {"name", "parent", "use_bias"}
    fields = {name: getattr(module, name) for name in names}
    return make(**fields, use_bias=use_bias, parent=None)


def _without_batch_norm(
    module: nn.Module, x: Any, use_running_average: Any = None, **kwargs: Any
) -> Any:
    """Apply what is left of a folded norm: its channel norm, or nothing."""
    if not isinstance(module, BatchChannelNorm):
        return x.astype(result_dtype(module, x.dtype))
    names = ("axis", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale")
    channel_norm = ChannelNorm(
        module.num_groups,
        module.group_size,
        **{name: getattr(module, name) for name in names},
        parent=None,
    )
    params = module.variables.get("params", {}).get("channel_norm", {})
    return channel_norm.apply({"params": params}, x, mask=kwargs.get("mask"))
