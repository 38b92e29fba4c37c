"""Operations on linen models and their variables.

There is nothing to convert in a linen model, whose modules are made in its code: let it take their
classes as attributes, `conv: Any = nn.Conv` and `norm: Any = nn.BatchNorm`, and give it others.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax import layer
from bcn_flax.linen import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.surgery import calibration, checks, folding
from bcn_flax.surgery.flow import Flow

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
    """The variables with all running averages taken anew, from `batches`.

    For a model that moves to other data, or whose averages went astray. They become the average of
    what each batch contributes, weighted by its number of values, the old ones being forgotten.
    Every norm averages first and then normalizes by the average so far, as it will in evaluation;
    so a single batch makes the whole network agree with itself exactly. All else evaluates.

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
        kwargs: further arguments of the model, such as those that say that it evaluates.

    Raises:
        ValueError: there are no batches, or no norms, or a batch has values that are not finite.
    """
    checks.several_batches(batches)
    calls = 0

    def average_first(next_fun: Any, fun_args: Any, fun_kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not (isinstance(norm, BatchNorm) and context.method_name == "affine"):
            return next_fun(*fun_args, **fun_kwargs)
        nonlocal calls
        calls += 1
        names, m = calibration.Average._fields, fun_args[0]
        average: Any = [norm.get_variable("batch_stats", name) for name in names]
        average = calibration.absorb(calibration.Average(*average), m, norm.running_variance)
        for name, value in zip(names, average, strict=True):
            norm.put_variable("batch_stats", name, value)
        return next_fun(m, use_running_average=True, update_stats=False)

    @jax.jit
    def step(variables: Variables, args: tuple[Any, ...]) -> Variables:
        with nn.intercept_methods(average_first):
            _, updates = model.apply(variables, *args, mutable=["batch_stats"], **kwargs)
        return {**variables, **updates}

    stats = flatten_dict(variables.get("batch_stats", {}))
    weights = {(*p[:-1], "weight"): jnp.zeros_like(v) for p, v in stats.items() if p[-1] == "mean"}
    weighed: Variables = {**variables, "batch_stats": unflatten_dict(stats | weights)}
    for args in calibration.arguments(batches):
        weighed = step(weighed, args)
        checks.norms(calls)
        checks.finite(weighed["batch_stats"])
    after = flatten_dict(weighed["batch_stats"])
    return {**variables, "batch_stats": unflatten_dict({path: after[path] for path in stats})}


@dataclasses.dataclass(frozen=True)
class Folded:
    """A model that has been folded, with the variables to `apply` it to.

    Attributes:
        variables: kernels with their standardization, and the batch norm after them, baked in.
        model: the model as it was.
        convolutions: paths of the convolutions that are plain now, with or without a bias.
        norms: paths of the norms of which only a channel norm, or nothing, is left.
    """

    variables: dict[str, Any]
    model: nn.Module
    convolutions: Mapping[Path, bool]
    norms: frozenset[Path]

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """What `model.apply` does, with the folded variables."""
        with nn.intercept_methods(self._simplify):
            return self.model.apply(variables, *args, **kwargs)

    def _simplify(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if module.path in self.convolutions:
            plain = _plain(module, self.convolutions[module.path])
            return plain.apply({"params": module.variables["params"]}, *args)
        if module.path in self.norms:
            return _without_batch_norm(module, *args, **kwargs)
        return next_fun(*args, **kwargs)


def fold(model: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> Folded:
    """Bake weight standardization and batch norms into the convolutions before them, for inference.

    A standardized kernel becomes a plain one. A batch norm by its running averages, alone or inside
    `BatchChannelNorm`, goes into the kernel and bias of the convolution or dense layer whose output
    it is given; the channel norm stays. What does not stand in this relation stays as it is. On the
    example input, folded and unfolded model are seen to give the same output.

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
        kwargs: those that make the model evaluate among them.

    Raises:
        ValueError: there is nothing to fold, a norm was called in training, or the output of a
            convolution goes not only to its norm.
    """
    variables = meta.unbox(variables)
    norm_after, modules = _flow(model, variables, args, kwargs)
    params = flatten_dict(variables.get("params", {}))
    stats = flatten_dict(variables.get("batch_stats", {}))
    convolutions = {}
    for path, module in modules.items():
        standardization = getattr(module, "standardization", None)
        if type(module) not in _PLAIN or not (standardization or path in norm_after):
            continue
        conv = folding.Convolution(
            axis=-2 if getattr(module, "transpose_kernel", False) else -1,
            standardization=standardization,
            mask=getattr(module, "mask", None),
            **{name: params.pop((*path, name), None) for name in ("kernel", "bias", "gain")},
        )
        norm = None
        if path in norm_after:
            after = norm_after[path]
            norm = _pop_batch_norm(after, modules[after], params, stats)
        weights = folding.fold(conv, norm)
        params.update({(*path, name): value for name, value in weights.items()})
        convolutions[path] = "bias" in weights
    checks.foldable(convolutions)
    rest = {name: v for name, v in variables.items() if name not in ("params", "batch_stats")}
    folded = Folded(
        variables={
            **rest,
            "params": unflatten_dict(params),
            **({"batch_stats": unflatten_dict(stats)} if stats else {}),
        },
        model=model,
        convolutions=convolutions,
        norms=frozenset(norm_after.values()),
    )
    checks.same_output(
        folded.apply(folded.variables, *args, **kwargs),
        model.apply(variables, *args, **kwargs),
        folded.variables,
    )
    return folded


def _flow(
    model: nn.Module, variables: Variables, args: Any, kwargs: Any
) -> tuple[dict[Path, Path], dict[Path, nn.Module]]:
    """The norm after each convolution, and the modules at those paths and others."""
    flow: Flow[Path] = Flow()
    modules: dict[Path, nn.Module] = {}

    def watch(next_fun: Any, fun_args: Any, fun_kwargs: Any, context: Any) -> Any:
        module, path = context.module, context.module.path
        if context.method_name != "__call__":
            return next_fun(*fun_args, **fun_kwargs)
        if isinstance(module, BatchNorm | BatchChannelNorm):
            _check_evaluation(module, *fun_args, **fun_kwargs)
            if module.axis in (-1, fun_args[0].ndim - 1):
                modules[path] = module
                flow.consume(path, fun_args[0])
        y = next_fun(*fun_args, **fun_kwargs)
        if type(module) in _PLAIN and _is_stored_as_used(module, variables):
            modules[path] = module
            flow.produce(path, y)
        return y

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.apply(variables, *args, **kwargs))
    return flow.one_to_one(), modules


def _check_evaluation(
    norm: BatchNorm | BatchChannelNorm, x: Any, flag: bool | None = None, **kwargs: Any
) -> None:
    flag = kwargs.get("use_running_average", flag)
    checks.evaluating(type(norm).__name__, norm.use_running_average, flag, "/".join(norm.path))


def _is_stored_as_used(module: nn.Module, variables: Variables) -> bool:
    """Not so under `nn.scan` and `nn.vmap`, which store the kernels of many layers as one."""
    stored = variables.get("params", {})
    for name in module.path:
        stored = stored.get(name, {})
    return (
        "kernel" in stored and stored["kernel"].shape == module.variables["params"]["kernel"].shape
    )


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
    """What is left of a norm: its channel norm, or nothing."""
    if not isinstance(module, BatchChannelNorm):
        return x.astype(layer.result_dtype(module, x.dtype))
    names = ("axis", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale")
    channel_norm = ChannelNorm(
        module.num_groups,
        module.group_size,
        **{name: getattr(module, name) for name in names},
        parent=None,
    )
    params = module.variables.get("params", {}).get("channel_norm", {})
    return channel_norm.apply({"params": params}, x, mask=kwargs.get("mask"))
