"""Operations on linen models and their variables.

There is nothing to convert in a linen model, whose modules are made in its code: let it take their
classes as attributes, `conv: Any = nn.Conv` and `norm: Any = nn.BatchNorm`, and give it others.
"""

import dataclasses
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from bcn_flax.linen import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.norms import result_dtype
from bcn_flax.surgery import calibration, checks, folding
from bcn_flax.surgery.flow import Detour, Flow, without_forks

Path = tuple[str, ...]
Variables = Mapping[str, Any]
OnCall = Callable[[Any, Any], Any]

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
    so a single batch makes the whole network agree with itself exactly. All else does as the
    arguments say.

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
    names = calibration.Average._fields

    def average_first(next_fun: Any, fun_args: Any, fun_kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not (isinstance(norm, BatchNorm) and context.method_name == "affine"):
            return next_fun(*fun_args, **fun_kwargs)
        m = fun_args[0]
        old: list[Any] = [norm.get_variable("batch_stats", name) for name in names]
        average = calibration.absorb(calibration.Average(*old), m, norm.running_variance)
        for name, value in zip(names, average, strict=True):
            norm.put_variable("batch_stats", name, value)
        return next_fun(m, use_running_average=True, update_stats=False)

    @partial(jax.jit, static_argnums=2)
    def step(variables: Variables, arrays: Any, static: calibration.Static) -> Variables:
        args = calibration.whole(arrays, static)
        with nn.intercept_methods(average_first):
            _, updates = model.apply(variables, *args, mutable=["batch_stats"], **kwargs)
        return {**variables, **updates}

    stats = flatten_dict(variables.get("batch_stats", {}))
    start = calibration.start(stats)
    averaged: Variables = {**variables, "batch_stats": unflatten_dict(start)}
    for arrays, static in calibration.arguments(batches):
        averaged = step(averaged, arrays, static)
        checks.finite(calibration.reached(flatten_dict(averaged["batch_stats"])))
    reached = calibration.reached(flatten_dict(averaged["batch_stats"]))
    checks.norms(reached)
    after = {
        path: reached[path].astype(old.dtype) if path in reached else old
        for path, old in stats.items()
    }
    return {**variables, "batch_stats": unflatten_dict(after)}


@dataclasses.dataclass(frozen=True)
class Folded:
    """A model that has been folded, with the variables to `apply` it to.

    Attributes:
        variables: kernels with their standardization, and the batch norm after them, baked in.
        model: the model as it was.
        convolutions: paths of the convolutions that are plain now, with or without a bias.
        norms: paths of the norms of which only a channel norm, or nothing, is left.
        mark: a name of its own, for `apply`.
    """

    variables: dict[str, Any]
    model: nn.Module
    convolutions: Mapping[Path, bool]
    norms: frozenset[Path]
    mark: str

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """What `model.apply` does, with the folded variables."""
        simplifying = False

        def simplify(next_fun: Any, fun_args: Any, fun_kwargs: Any, context: Any) -> Any:
            nonlocal simplifying
            module = context.module
            planned = module.path in self.convolutions or module.path in self.norms
            if simplifying or not planned or context.method_name != "__call__":
                return next_fun(*fun_args, **fun_kwargs)
            simplifying = True  # until the plain layer is done, whose path may be the same
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
    """Bake weight standardization and batch norms into the convolutions before them, for inference.

    A standardized kernel becomes a plain one. A batch norm by its running averages, alone or inside
    `BatchChannelNorm`, goes into the kernel and bias of the convolution or dense layer whose output
    it is given; the channel norm stays. What stands in another relation stays as it is, such as a
    norm whose input goes elsewhere too. All this is seen while the example input runs through the
    model.

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
        ValueError: there is nothing to fold, or a norm was called in training.
    """
    variables = meta.unbox(variables)
    flow: Flow[Path] = Flow()
    modules: dict[Path, nn.Module] = {}

    def run(produce: OnCall, consume: OnCall) -> Any:
        with nn.intercept_methods(partial(_watch, produce=produce, consume=consume)):
            return model.apply(_marked(variables, _new_mark()), *args, **kwargs)

    def produced(module: nn.Module, y: Any) -> Any:
        if _is_stored_as_used(module, variables):
            modules[module.path] = module
            flow.produce(module.path, y)
        return y

    def consumed(module: nn.Module, x: Any) -> Any:
        if module.axis in (-1, x.ndim - 1):
            modules[module.path] = module
            flow.consume(module.path, x)
        return x

    def detour(d: Detour[Path]) -> Any:
        return run(lambda m, y: d.leave(m.path, y), lambda m, x: d.enter(m.path, x))

    jax.eval_shape(lambda: run(produced, consumed))
    norm_after = without_forks(flow.one_to_one(), detour)
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

    Modules under `nn.jit` are traced again only where their variables have another structure, and
    interceptors see only what is traced.
    """
    params = flatten_dict(variables.get("params", {}))
    marks = {(*path[:-1], mark): value for path, value in params.items() if path[-1] == "kernel"}
    return {**variables, "params": unflatten_dict(params | marks)}


def _watch(
    next_fun: Any, args: Any, kwargs: Any, context: Any, produce: OnCall, consume: OnCall
) -> Any:
    """Intercept calls: what a norm gets goes through `consume`, what others give, `produce`."""
    module = context.module
    if context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    if isinstance(module, BatchNorm | BatchChannelNorm):
        _check_evaluation(module, *args, **kwargs)
        if args:
            args = (consume(module, args[0]), *args[1:])
        else:
            kwargs = {**kwargs, "x": consume(module, kwargs["x"])}
    y = next_fun(*args, **kwargs)
    return produce(module, y) if type(module) in _PLAIN else y


def _check_evaluation(
    norm: BatchNorm | BatchChannelNorm, x: Any, flag: bool | None = None, **kwargs: Any
) -> None:
    flag = kwargs.get("use_running_average", flag)
    checks.evaluating(type(norm).__name__, norm.use_running_average, flag, "/".join(norm.path))


def _is_stored_as_used(module: nn.Module, variables: Variables) -> bool:
    """Not so under `nn.scan` and `nn.vmap`, which store the kernels of many layers as one."""
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
    """What is left of a norm: its channel norm, or nothing."""
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
