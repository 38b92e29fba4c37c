"""Every public constructor and function, with arguments that work: see `parity_tests.arguments`."""

import inspect
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax import nnx

import bcn_flax
import bcn_flax.linen
import bcn_flax.nnx
import bcn_flax.surgery.linen
import bcn_flax.surgery.nnx
import bcn_torch
from bcn_flax import interop
from parity_tests.arguments import (
    LARGEST,
    TINY,
    UNIT,
    Target,
    X,
    flag,
    integer,
    like,
    nothing,
    one_of,
    or_none,
    real,
    tensor,
)


def parameters(function: Any, prefix: str = "") -> tuple[str, ...]:
    """The names of the arguments of a function, or of a constructor."""
    names = inspect.signature(function).parameters
    return tuple(prefix + n for n in names if n not in ("self", "parent", "name", "args", "kwargs"))


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a constructor, and those of the call."""
    made = {name: value for name, value in arguments.items() if "." not in name}
    return made, {n.removeprefix("call."): v for n, v in arguments.items() if "." in n}


KEY = jax.random.key(0)
FLAX_X = jnp.asarray(X)
TORCH_X = torch.tensor(X)


def standardized(layer: Any, kernel: Any) -> Any:
    """The kernel of a layer of Flax, as the same layer with weight standardization uses it."""
    axis = -2 if getattr(layer, "transpose_kernel", False) else -1
    mask = getattr(layer, "mask", None)
    mask = None if mask is None else jnp.asarray(mask) != 0
    return bcn_flax.standardize_kernel(kernel, axis=axis, mask=mask)


def of_linen(make: Any, standardize: bool = False) -> Callable[..., Any]:
    def run(arguments: Mapping[str, Any]) -> Any:
        made, call = split(arguments)
        layer = make(**made)
        y, variables = layer.apply({}, **call, mutable=True, rngs={"params": KEY})
        if standardize:
            params = variables["params"]
            kernel = standardized(layer, params["kernel"])
            y = layer.apply({"params": {**params, "kernel": kernel}}, **call)
        return y, variables

    return run


def of_nnx(make: Any, standardize: bool = False) -> Callable[..., Any]:
    def run(arguments: Mapping[str, Any]) -> Any:
        made, call = split(arguments)
        if isinstance(made["rngs"], nnx.Rngs):
            made["rngs"] = nnx.Rngs(0)
        layer = make(**made)
        params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
        if standardize:
            layer(**call)
            layer.kernel[...] = standardized(layer, layer.kernel[...])
        return layer(**call), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)), params

    return run


def of_torch(make: Any, standardize: bool = False) -> Callable[..., Any]:
    def run(arguments: Mapping[str, Any]) -> Any:
        made, call = split(arguments)
        torch.manual_seed(0)
        layer = make(**made)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        if standardize:
            layer.weight.data = bcn_torch.standardize_weight(layer.weight.data)
        (x,) = call.values()
        return layer(x), layer.eval()(x), dict(layer.named_buffers()), state

    return run


def only(names: Collection[str], run: Callable[..., Any], **base: Any) -> Callable[..., Any]:
    """A reference that has fewer arguments."""
    return lambda arguments: run({**base, **{n: v for n, v in arguments.items() if n in names}})


def norms() -> Iterator[Target]:
    flags = {"call.use_running_average": or_none(flag)}
    for name in ("BatchNorm", "EstimatedBatchNorm", "ChannelNorm", "BatchChannelNorm"):
        groups = {"num_groups": 2} if "Channel" in name else {}
        training = {} if name == "ChannelNorm" else {"use_running_average": False}
        theirs = "GroupNorm" if name == "ChannelNorm" else "BatchNorm"

        make, reference = getattr(bcn_flax.linen, name), getattr(nn, theirs)
        names = parameters(make) + parameters(make.__call__, "call.")
        known = parameters(reference) + parameters(reference.__call__, "call.")
        base = {**groups, **training, "call.x": FLAX_X}
        yield Target(
            f"linen.{name}", of_linen(make), base, names, flags, only(known, of_linen(reference))
        )
        make, reference = getattr(bcn_flax.nnx, name), getattr(nnx, theirs)
        names = parameters(make.__init__) + parameters(make.__call__, "call.")
        known = parameters(reference.__init__) + parameters(reference.__call__, "call.")
        base = {**groups, "num_features": 4, "rngs": nnx.Rngs(0), "call.x": FLAX_X}
        yield Target(
            f"nnx.{name}", of_nnx(make), base, names, flags, only(known, of_nnx(reference))
        )
        make = getattr(bcn_torch, name)
        names = parameters(make.__init__) + parameters(make.forward, "call.")
        base = {"channels": 4, "call.x": TORCH_X} | ({"groups": 2} if groups else {})
        yield Target(f"bcn_torch.{name}", of_torch(make), base, names, {"call.x": tensor(X)})


def layers() -> Iterator[Target]:
    how = {"standardization": lambda v: isinstance(v, bcn_flax.Standardization)}
    for name in ("Conv", "ConvTranspose", "Dense"):
        window = {} if name == "Dense" else {"kernel_size": (3,)}
        make, theirs = getattr(bcn_flax.linen, f"WS{name}"), getattr(nn, name)
        shared = parameters(theirs) + parameters(theirs.__call__, "call.")
        base = {**window, "features": 2, "call.inputs": FLAX_X}
        yield Target(
            f"linen.WS{name}",
            of_linen(make),
            base,
            (*shared, "standardization"),
            how,
            of_linen(theirs, True),
            frozenset(shared),
        )
        theirs = nnx.Linear if name == "Dense" else getattr(nnx, name)
        make = getattr(bcn_flax.nnx, f"WS{name}")
        shared = parameters(theirs.__init__) + parameters(theirs.__call__, "call.")
        base = {**window, "in_features": 4, "out_features": 2, "call.inputs": FLAX_X}
        yield Target(
            f"nnx.WS{name}",
            of_nnx(make),
            {**base, "rngs": nnx.Rngs(0)},
            (*shared, "standardization"),
            how,
            of_nnx(theirs, True),
            frozenset(shared),
        )
    how = {"standardization": lambda v: isinstance(v, bcn_torch.Standardization)}
    for name, x in {
        "Conv1d": TORCH_X,
        "Conv2d": torch.linspace(-1, 1, 36).view(1, 4, 3, 3),
        "Conv3d": torch.linspace(-1, 1, 108).view(1, 4, 3, 3, 3),
        "Linear": TORCH_X,
    }.items():
        make, theirs = getattr(bcn_torch, f"WS{name}"), getattr(torch.nn, name)
        shared = parameters(theirs.__init__) + parameters(theirs.forward, "call.")
        sizes = {"in_channels": 4, "out_channels": 2, "kernel_size": 3}
        if name == "Linear":
            sizes = {"in_features": 4, "out_features": 2}
        yield Target(
            f"bcn_torch.WS{name}",
            of_torch(make),
            {**sizes, shared[-1]: x},
            (*shared, "standardization"),
            how,
            of_torch(theirs, True),
            frozenset(shared),
        )


def functions() -> Iterator[Target]:
    kernel = X[0]
    yield Target(
        "standardize_kernel",
        lambda arguments: bcn_flax.standardize_kernel(**arguments),
        {"kernel": kernel},
        parameters(bcn_flax.standardize_kernel),
        {
            "kernel": like(X),
            "axis": lambda v: integer(v) and v in (0, 1, -1, -2),
            "gain": or_none(nothing),
            "mask": or_none(nothing),
            "standardization": lambda v: isinstance(v, bcn_flax.Standardization) and not v.gain,
        },
    )
    yield Target(
        "bcn_torch.standardize_weight",
        lambda arguments: bcn_torch.standardize_weight(**arguments),
        {"weight": torch.tensor(kernel)},
        parameters(bcn_torch.standardize_weight),
        {
            "weight": tensor(X),
            "gain": or_none(nothing),
            "standardization": lambda v: isinstance(v, bcn_torch.Standardization) and not v.gain,
        },
    )
    attributes = {
        "unbiased": flag,
        "epsilon_role": one_of("added_to_variance"),
        "eps_role": one_of("added_to_variance"),
        "fan_in_scaling": flag,
        "gain": flag,
        "gamma": lambda v: real(v) and TINY <= abs(v) <= LARGEST,
    }
    for module, standardize, weight in (
        (bcn_flax, bcn_flax.standardize_kernel, kernel),
        (bcn_torch, bcn_torch.standardize_weight, torch.tensor(kernel)),
    ):
        make = module.Standardization

        def run(arguments: Any, make=make, standardize=standardize, weight=weight) -> Any:  # type: ignore[no-untyped-def]
            how = make(**arguments)
            gain = (
                None
                if str(how.gain) in ("None", "False", "0") or not np.any(np.asarray(how.gain) == 1)
                else weight[0]
            )
            return standardize(weight, how, gain=gain)

        yield Target(f"{module.__name__}.Standardization", run, {}, parameters(make), attributes)


def networks() -> Iterator[Target]:
    make = bcn_torch.VGG
    names = parameters(make.__init__) + parameters(make.forward, "call.")
    own = {"norm": None, "call.x": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
    yield Target(
        "bcn_torch.VGG",
        of_torch(make),
        {"blocks": ((4,),), "num_classes": 2, **own},
        names,
        {
            "blocks": one_of(((4,),)),
            "num_classes": lambda value: integer(value) and 0 < value < 9,
            "in_channels": one_of(3),
            "conv": nothing,
            "norm": or_none(nothing),
            "call.x": nothing,
        },
    )


def called(function: Any, *args: Any) -> Callable[..., Any]:
    """A function that is called with keywords, after these."""
    return lambda arguments: function(*args, **arguments)


def surgery() -> Iterator[Target]:
    in_linen, in_nnx = bcn_flax.surgery.linen, bcn_flax.surgery.nnx
    example = lambda value: getattr(value, "shape", ())[-1:] == (4,)  # noqa: E731
    takes = {
        "x": example,
        "num_groups": or_none(lambda v: integer(v) and v in (1, 2)),
        "groups": or_none(lambda v: integer(v) and v in (1, 2)),
        "momentum": or_none(UNIT),
        "ws": flag,
        "leave": or_none(nothing),
        "report": callable,
        "example_inputs": or_none(nothing),
    }
    norm = bcn_flax.BatchNorm(use_running_average=True)
    dense = bcn_flax.WSDense(2)
    batches = {"batches": [X]}
    base = {"model": norm, "variables": norm.init(KEY, FLAX_X), **batches}
    yield Target("linen.recalibrate", called(in_linen.recalibrate), base, tuple(base))
    base = {"model": dense, "variables": dense.init(KEY, FLAX_X), "x": FLAX_X}
    yield Target(
        "linen.fold",
        lambda a: in_linen.fold(*a.values()).variables,
        base,
        tuple(base),
        takes,
        lambda a: a["model"].apply(a["variables"], a["x"]),
    )

    def convert(arguments: Mapping[str, Any]) -> Any:
        new = in_nnx.convert_batch_norm(**{**arguments, "ws": False, **arguments})
        return nnx.to_pure_dict(nnx.state(new)), new.layers[0].batch_norm.momentum

    base = {"model": nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))}
    names = parameters(in_nnx.convert_batch_norm)
    yield Target("nnx.convert_batch_norm", convert, base, names, {**takes, "ws": one_of(False, 0)})
    base = {"model": bcn_flax.nnx.BatchNorm(4, rngs=nnx.Rngs(0)), **batches}
    yield Target("nnx.recalibrate", called(in_nnx.recalibrate), base, tuple(base))
    base = {"model": bcn_flax.nnx.WSDense(4, 2, rngs=nnx.Rngs(0)), "x": FLAX_X}
    yield Target(
        "nnx.fold",
        lambda a: nnx.to_pure_dict(nnx.state(in_nnx.fold(*a.values()))),
        base,
        tuple(base),
        takes,
        lambda a: a["model"](a["x"]),
    )
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3), torch.nn.BatchNorm1d(4))
    yield Target(
        "bcn_torch.convert_batch_norm",
        lambda a: bcn_torch.convert_batch_norm(**a).state_dict(),
        {"model": model, "report": str},
        parameters(bcn_torch.convert_batch_norm),
        takes,
        lambda a: a["model"](*a["example_inputs"]),
    )
    base = {"model": torch.nn.Sequential(bcn_torch.WSLinear(4, 2)), "x": TORCH_X}
    yield Target(
        "bcn_torch.fold",
        lambda a: bcn_torch.fold(*a.values()).state_dict(),
        base,
        tuple(base),
        {"x": lambda value: example(value) and value.dtype == torch.float32},
        lambda a: a["model"](a["x"]),
    )
    base = {"model": bcn_torch.BatchNorm(4), "batches": [TORCH_X]}
    yield Target("bcn_torch.recalibrate", called(bcn_torch.recalibrate), base, tuple(base))
    base = {"module": bcn_torch.BatchNorm(4)}
    frozen = lambda a: bcn_torch.frozen_statistics(**a).__enter__()  # noqa: E731
    yield Target("bcn_torch.frozen_statistics", frozen, base, tuple(base))


def conversions() -> Iterator[Target]:
    folder = Path(tempfile.mkdtemp())
    state_dict = {"weight": X[0, :2], "bias": X[0, 0, :2]}
    variables = {"params": {"kernel": X[0, :, :2], "bias": X[0, 0, :2]}}
    module = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    takes = {
        "names": or_none(one_of({})),
        "transposed": lambda v: isinstance(v, list | dict | set) and not v,
        "flattened": or_none(one_of({})),
        "strict": flag,
        "state_dict": one_of({}),
        "key": or_none(nothing),
    }
    for function, base, show in (
        (interop.match, {"source": state_dict, "like": variables}, str),
        (interop.variables_from_torch, {"source": state_dict, "like": variables}, dict),
        (
            interop.module_from_torch,
            {"source": state_dict, "like": module},
            lambda m: nnx.to_pure_dict(nnx.state(m)),
        ),
        (interop.state_dict_from_variables, {"variables": variables, "like": state_dict}, dict),
        (
            interop.module_with,
            {"module": module, "variables": variables},
            lambda m: nnx.to_pure_dict(nnx.state(m)),
        ),
        (interop.variables_of, {"module": module}, dict),
        (interop.save, {"path": folder / "a.safetensors", "state_dict": state_dict}, str),
        (interop.load, {"path": folder / "b.safetensors"}, dict),
    ):
        yield Target(
            f"interop.{function.__name__}",
            lambda arguments, function=function, show=show: show(function(**arguments)),
            base,
            parameters(function),
            takes,
        )
    interop.save(folder / "b.safetensors", state_dict)


def targets() -> Iterator[Target]:
    """All constructors and functions."""
    for part in (norms, layers, functions, networks, surgery, conversions):
        yield from part()


TARGETS = {target.name: target for target in targets()}
