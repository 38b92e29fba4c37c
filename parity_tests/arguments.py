"""Arguments of every type for every public constructor and function, and what becomes of each.

`VALUES` has numbers, flags, names, arrays, containers and dtypes; `TARGETS` has every constructor
and function with arguments that work. `outcome` puts one value in the place of one argument, and
says how that ends: in the right result, in an error of this project that contains the value, or in
an error of Flax's, PyTorch's, JAX's or Python's that is clear. Anything else is unclear.
"""

import inspect
import math
import re
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax import nnx
from flax.errors import FlaxError

import bcn_flax
import bcn_flax.linen
import bcn_flax.nnx
import bcn_flax.surgery.linen
import bcn_flax.surgery.nnx
import bcn_torch
from bcn_flax import interop

ROOT = Path(__file__).parents[1]
OURS = (ROOT / "bcn_flax", ROOT / "bcn_torch")


class Value(NamedTuple):
    """A value to try.

    Attributes:
        value: the value.
        plain: what it should be taken for: the Python number of an array, for example.
    """

    value: Any
    plain: Any

    def __str__(self) -> str:
        shown = re.sub(r"0x\w+", "0x", " ".join(repr(self.value).split()))
        return f"{type(self.value).__name__} {shown}"[:60]


X = np.linspace(-1, 1, 2 * 4 * 4).astype(np.float32).reshape(2, 4, 4)
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
NAN, INF = math.nan, math.inf
PLAIN = (
    *(None, True, False, 0, 1, 2, 3, 4, 8, -1, -2, -5, 10**30),
    *(0.0, 0.5, 1.0, 4.0, -0.5, 1.5, 1e-5, 1e-40, 1e39, NAN, INF, -INF, 1j, Fraction(1, 2)),
    *("", "0.5", "4", "False", "biased", "unbiased", "added_to_variance", "SAME", b"x"),
    *([], [2], (2,), (0.5,), ((4,),), ["a"], {}, {"a": 1}, {"params": {}}, set(), range(2)),
    *(object(), Ellipsis, Decimal("0.5"), int, len, np.linspace),
    *(jnp.bfloat16, np.dtype("float16"), jnp.int32, jnp.bool_, jnp.complex64, "int32"),
    *(torch.float32, torch.bfloat16, torch.int32, torch.complex64),
    *(bcn_flax.Standardization(), bcn_torch.Standardization()),
    *(bcn_flax.Standardization(gain=True), bcn_torch.Standardization(gain=True)),
    *(np.array([0.5]), np.array([2]), np.array([2, 1]), np.array([[0.5]]), jnp.array([0.5])),
    *(torch.tensor([0.5]), torch.tensor([2])),
    *(X, X > 0, X.astype(int), X + 1j, X[:0], X[0, 0], X.astype(object), X.astype(str)),
    *(torch.tensor(X), torch.tensor(X) > 0, torch.tensor(X).int(), torch.tensor(X) * 1j),
    *(np.array("x"), np.array(None, object), np.str_("x"), np.complex64(1)),
)
VALUES = (
    *(Value(value, value) for value in PLAIN),
    *(
        Value(value, plain)
        for plain, values in {
            0.5: (np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5)),
            0.25: (jnp.float32(0.25), jnp.bfloat16(0.25), torch.tensor(0.25)),
            1.5: (np.float32(1.5), jnp.float32(1.5), torch.tensor(1.5)),
            NAN: (np.float32(NAN), jnp.float32(NAN)),
            2: (np.int64(2), np.uint8(2), np.array(2), jnp.int32(2), torch.tensor(2)),
            0: (np.int32(0), np.array(0), jnp.int32(0)),
            3: (np.int64(3), jnp.int32(3), torch.tensor(3)),
            True: (),
        }.items()
        for value in values
    ),
    *(Value(value, True) for value in (np.True_, np.array(True), jnp.array(True))),
    *(Value(value, False) for value in (np.False_, np.array(False), torch.tensor(False))),
    *(Value(value, jnp.float32) for value in (float, "float32", np.dtype("float32"))),
)

# --- Which values an argument takes ---------------------------------------------------------------

Takes = Callable[[Any], bool]


def real(value: Any) -> bool:
    return isinstance(value, int | float | Fraction) and not isinstance(value, bool)


def integer(value: Any) -> bool:
    return type(value) is int


def flag(value: Any) -> bool:
    return type(value) in (bool, int) and value in (0, 1)


def floats(value: Any) -> bool:
    return (
        value is None
        or any(value is x for x in (jnp.float32, jnp.bfloat16))
        or (isinstance(value, np.dtype) and value == np.float16)
    )


def like(array: np.ndarray) -> Takes:
    """An array of that shape and kind of numbers."""

    def takes(value: Any) -> bool:
        is_array = isinstance(value, np.ndarray | jax.Array | torch.Tensor)
        return (
            is_array
            and value.shape == array.shape
            and np.asarray(value).dtype.kind == array.dtype.kind
        )

    return takes


def tensor(array: np.ndarray) -> Takes:
    return lambda value: isinstance(value, torch.Tensor) and like(array)(value)


def or_none(takes: Takes) -> Takes:
    return lambda value: value is None or takes(value)


def one_of(*values: Any) -> Takes:
    return lambda value: any(type(value) is type(x) and value == x for x in values)


def nothing(value: Any) -> bool:
    return False


EPSILON = lambda value: real(value) and TINY <= value <= LARGEST  # noqa: E731
UNIT = lambda value: real(value) and 0 <= value <= 1  # noqa: E731
DIVISOR = lambda value: integer(value) and value in (1, 2, 4)  # noqa: E731

TAKES: dict[str, Takes] = {
    "use_running_average": flag,
    "axis": lambda value: integer(value) and value in (1, 2, -1, -2),
    "momentum": UNIT,
    "epsilon": EPSILON,
    "eps": EPSILON,
    "batch_epsilon": or_none(EPSILON),
    "batch_eps": or_none(EPSILON),
    "dtype": floats,
    "param_dtype": lambda value: value is not None and floats(value),
    "use_bias": flag,
    "use_scale": flag,
    "affine": flag,
    "estimate": flag,
    "bias_init": nothing,
    "scale_init": nothing,
    "axis_name": or_none(nothing),
    "axis_index_groups": or_none(one_of(((4,),))),
    "running_variance": one_of("biased", "unbiased"),
    "update_stats": or_none(flag),
    "num_features": one_of(4),
    "channels": one_of(4),
    "num_groups": DIVISOR,
    "groups": DIVISOR,
    "group_size": or_none(nothing),
    "mask": or_none(like(X > 0)),
    "x": like(X),
    "rngs": nothing,
    "bias_metadata": lambda value: isinstance(value, dict),
    "scale_metadata": lambda value: isinstance(value, dict),
}

# --- What is called -------------------------------------------------------------------------------


class Target(NamedTuple):
    """A constructor or function.

    Attributes:
        name: as users write it.
        run: calls it with arguments by name, and what it made with those of the form `call.x`.
        base: arguments that work.
        parameters: the names of all arguments.
        takes: which values they take; by default as in `TAKES`.
        reference: the same by Flax or PyTorch.
        shared: the arguments that go to Flax or PyTorch as they are, which decide what is right.
    """

    name: str
    run: Callable[[Mapping[str, Any]], Any]
    base: Mapping[str, Any]
    parameters: tuple[str, ...]
    takes: Mapping[str, Takes] = {}
    reference: Callable[[Mapping[str, Any]], Any] | None = None
    shared: frozenset[str] = frozenset()


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

# --- How it ends ----------------------------------------------------------------------------------

CALLED = ("bias_init", "scale_init", "conv", "norm", "leave", "report", "names")
CLEAR: tuple[tuple[type[Exception], str], ...] = (
    (TypeError, "Overflow when unpacking long"),
    (ValueError, "an example input is needed"),
    # They show the shape that the value has led to.
    (ValueError, r"at least 2 weights per output channel .* of shape"),
    (UserWarning, "has a single value"),
)


def outcome(target: Target, parameter: str, value: Value) -> str:
    """One word, and if that is "unclear" what happened."""
    try:
        result = target.run({**target.base, parameter: value.value})
    except Exception as error:
        return error_outcome(target, parameter, value, error)
    plain = {**target.base, parameter: value.plain}
    try:
        if parameter in target.shared:
            expected = target.reference({**target.base, parameter: value.value})
        elif takes_of(target, parameter)(value.plain):
            expected = target.run(plain)
        else:
            return "unclear: accepted"
    except Exception as error:
        return f"unclear: accepted, but not as {value.plain!r}: {error}"
    wrong = difference(result, expected)
    return f"unclear: {wrong}" if wrong else "right"


def takes_of(target: Target, parameter: str) -> Takes:
    name = parameter.removeprefix("call.")
    return {**TAKES, name: TAKES.get(name, nothing), **target.takes}.get(parameter) or TAKES[name]


def error_outcome(target: Target, parameter: str, value: Value, error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = Path(place).is_relative_to(OURS[0]) or Path(place).is_relative_to(OURS[1])
    if (
        ours
        and isinstance(error, ValueError | UserWarning)
        and any(form in str(error) for form in (*seen(value.value), *seen(value.plain)))
    ):
        if parameter not in target.shared and takes_of(target, parameter)(value.plain):
            return f"unclear: refused: {error}"
        return "ours"
    if target.reference is not None:
        try:
            target.reference({**target.base, parameter: value.value})
        except Exception as theirs:
            if type(theirs) is type(error) and alike(theirs) == alike(error):
                return "theirs"
    if callable(value.value) and parameter.rpartition(".")[2] in CALLED:
        return "theirs"  # an error of the function that was given
    if isinstance(error, FlaxError):
        return "theirs"
    for kind, pattern in CLEAR:
        if type(error) is kind and re.search(pattern, str(error)):
            return "ours" if ours else "theirs"
    return f"unclear: {type(error).__name__}: {str(error)[:150]!r} at {Path(place).name}"


def alike(error: Exception) -> str:
    """The beginning of an error's message, without what is the name of a layer."""
    names = r"<class '[^']*'>|WS|Parameter|Tensor|0x\w+"
    return " ".join(re.sub(names, "", str(error)).split())[:100]


def seen(value: Any) -> Iterator[str]:
    """Forms of a value of which an error shall have one."""
    yield from (repr(value), str(value) or "''", f"{value}")
    yield f"type {type(value).__name__}"
    if isinstance(value, Mapping):
        yield from (form for key in value for form in (repr(key), f"  {key} is"))
    if isinstance(value, list | tuple | dict | set) and value in (
        [],
        (),
        {},
        set(),
        {"params": {}},
    ):
        yield from ("missing", "unexpected", "at least one", "[]")  # what there should be
    if isinstance(value, list | tuple) and value:
        yield from seen(value[0])
    if isinstance(value, bool):
        yield f" {int(value)},"
    if isinstance(value, bcn_flax.Standardization | bcn_torch.Standardization):
        yield f"gain={value.gain}"
    for as_array in (np.asarray, jnp.asarray):
        with suppress(Exception):
            array = as_array(value)
            yield from (f"is {array.dtype}", f"is torch.{array.dtype}")
            yield from (f"is {array.shape}", f"shape {array.shape}")
            yield from (f"has {n}" for n in array.shape[-1:])


def leaves(tree: Any) -> list[Any]:
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, torch.Tensor))
    return [np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x) for x in found]


def difference(result: Any, expected: Any) -> str:
    """What is different, or not finite; "" if nothing is."""
    a, b = leaves(result), leaves(expected)
    if [(x.shape, x.dtype) for x in a] != [(x.shape, x.dtype) for x in b]:
        return f"other shapes: {[(x.shape, x.dtype) for x in a]} {[(x.shape, x.dtype) for x in b]}"[
            :300
        ]
    if not all(
        np.array_equal(x, y, equal_nan=x.dtype.kind in "fc") for x, y in zip(a, b, strict=True)
    ):
        return "other numbers"
    return ""
