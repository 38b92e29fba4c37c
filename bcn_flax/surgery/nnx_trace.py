"""Traces of NNX models: their layers and norms, and which follows which."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from bcn_flax.nnx import (
    BatchChannelNorm,
    BatchNorm,
    EstimatedBatchNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.surgery import flow, folding

Path = tuple[Any, ...]

PLAIN: dict[type[nnx.Module], type[nnx.Module]] = {
    nnx.Conv: nnx.Conv,
    nnx.ConvTranspose: nnx.ConvTranspose,
    nnx.Linear: nnx.Linear,
    WSConv: nnx.Conv,
    WSConvTranspose: nnx.ConvTranspose,
    WSDense: nnx.Linear,
}
# Subclasses may do other things besides, so they are no such norms.
NORMS = (nnx.BatchNorm, BatchNorm, EstimatedBatchNorm, BatchChannelNorm)
_WEIGHTS = {"kernel", "bias", "gain", "mean", "var", "scale"}


def name_of(path: Path) -> str:
    """The path of a module as in "blocks/0/norm"."""
    return "/".join(map(str, path))


def batch_norm_in(norm: Any) -> Any:
    """The norm, or the batch norm inside a `BatchChannelNorm`."""
    return norm.batch_norm if isinstance(norm, BatchChannelNorm) else norm


def _variables(module: Any) -> dict[str, nnx.Variable[Any]]:
    """The weights of a layer or batch norm, by name."""
    return {name: v for name, v in vars(module).items() if name in _WEIGHTS and v is not None}


def _marked(module: Any) -> dict[str, jax.Array]:
    """Mark the weights of a module, in place."""
    variables = _variables(module)
    weights = flow.weights({name: v[...] for name, v in variables.items()})
    for name, variable in variables.items():
        variable[...] = weights[name]
    return weights


def trace(
    model: Any, args: Any, kinds: Any, *, evaluation: bool
) -> tuple[flow.Flow[Path], set[Path]]:
    """Trace a copy of the model.

    Args:
        model: an NNX module; it is not changed.
        args: its arguments.
        kinds: the classes of the norms.
        evaluation: whether all norms must be in evaluation.

    Returns:
        The calls of its layers and norms, and the norms that are called with more than an input and
        a mask.
    """
    flagged = set()

    def norm_call(path: Path, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(self: Any, x: Any, *flags: Any, **named: Any) -> Any:
            if evaluation:
                flag = named.get("use_running_average", flags[0] if flags else None)
                folding.require_evaluation(
                    type(self).__name__, name_of(path), self.use_running_average, flag
                )
            if flags or named.keys() - {"mask"}:
                flagged.add(path)
            own = nnx.clone(self)
            batch_norm_in(own).axis_name = None  # the devices take no part in this trace
            weights = _marked(batch_norm_in(own))
            foldable = folding.is_last_axis(self.axis, x.ndim)
            if evaluation and isinstance(self, nnx.BatchNorm):
                foldable &= self.promote_dtype is dtypes.promote_dtype
            return call(own, flow.norm_input(path, x, weights, foldable), *flags, **named)

        return marked

    def layer_call(path: Path, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(self: Any, *inputs: Any, **named: Any) -> Any:
            own = nnx.clone(self)
            weights = _marked(own)
            return flow.layer_output(path, call(own, *inputs, **named), weights)

        return marked

    graphdef, weights, *rest = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)

    def run(weights: Any) -> tuple[Any, Any]:
        copy = nnx.clone(nnx.merge(graphdef, weights, *rest))
        modules: list[tuple[Path, Any]] = list(nnx.iter_modules(copy))
        for path, module in modules:
            kind = type(module)
            if kind in kinds:
                override(module, __call__=norm_call(path, kind.__call__))
            elif kind in PLAIN:
                override(module, __call__=layer_call(path, kind.__call__))
        return copy(*args), nnx.state(copy)

    modules = dict(nnx.iter_modules(model))

    def own(path: Path) -> dict[str, Any]:
        return {n: v.get_raw_value() for n, v in _variables(batch_norm_in(modules[path])).items()}

    return flow.trace(run, weights, own), flagged


def override(module: nnx.Module, **methods: Any) -> None:
    """Replace methods of this one module, which becomes an instance of a new subclass."""
    kind: Any = type(module)
    object.__setattr__(module, "__class__", type(kind)(kind.__name__, (kind,), methods))
