"""The contract of the norms: what each argument does, in linen, in NNX and in bcn_torch.

One table has the arguments of the constructor and of the call; one plain restatement of the layers,
in long double, says what comes out: initial variables, output, statistics and gradients. Every row
runs with all implementations that have its arguments. Channels are of very different sizes, and
each is compared at its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

import bcn_flax.linen
import bcn_flax.nnx
from parity_tests.laws import Linen, Nnx

C = 6
SHAPE = (5, 3, 2, C)
NOTHING: Mapping[str, Any] = MappingProxyType({})
DEFAULTS = {
    "axis": -1,
    "momentum": 0.9,
    "epsilon": 1e-5,
    "batch_epsilon": None,
    "running_variance": "biased",
    "num_groups": 32,
    "group_size": None,
    "use_scale": True,
    "use_bias": True,
    "scale_init": nn.initializers.ones,
    "bias_init": nn.initializers.zeros,
}
ESTIMATES = {"BatchNorm": False, "EstimatedBatchNorm": True, "BatchChannelNorm": True}


# --- Inputs ---------------------------------------------------------------------------------------


class Data(NamedTuple):
    """An input.

    Attributes:
        std: of each channel.
        far: the mean of each channel, in its standard deviations.
        dtype: of the input and the parameters.
        stored: the dtype of the running averages.
        roundings: by how many the output may be off, each channel at its own size; the running
            averages by 4.
    """

    std: tuple[float, ...] = (1e-2, 0.1, 1, 3, 10, 100)
    far: float = 2
    dtype: Any = np.float64
    stored: Any = np.float64
    roundings: float = 1000

    def draw(self, shape, rng):
        std = np.resize(self.std, shape[-1])
        x = std * (self.far * rng.uniform(0.5, 1, shape[-1:]) + rng.standard_normal(shape))
        return x.astype(self.dtype)


ORDINARY = Data()
SINGLE = {"dtype": np.float32, "stored": np.float32, "roundings": 32}
SIZES = Data((1e-4, 1e-2, 1, 10, 1e3, 1e6), **SINGLE)
FAR = Data(far=1e4, **SINGLE)
NARROW = Data((1.0,), **{**SINGLE, "stored": jnp.bfloat16})


class Row(NamedTuple):
    """Arguments, and what they are tried on.

    Attributes:
        layer: its name.
        options: arguments of the constructor.
        call: arguments of the call.
        mask: what is hidden: nothing, values here and there, whole samples that are all zeros, or
            all but one value of each channel.
        data: the input.
        shape: of the input, channels last.
    """

    layer: str
    options: Mapping[str, Any] = NOTHING
    call: Mapping[str, Any] = NOTHING
    mask: str = ""
    data: Data = ORDINARY
    shape: tuple[int, ...] = SHAPE

    @property
    def settings(self):
        """All options, with the defaults."""
        estimate = {"estimate": ESTIMATES.get(self.layer)}
        return {**DEFAULTS, **estimate, **self.options}

    @property
    def groups(self):
        size, number = (self.settings[name] for name in ("group_size", "num_groups"))
        return number if size is None else self.shape[-1] // size

    @property
    def parts(self):
        """The norms inside, and the length of their parameters."""
        sizes = {"batch_norm": self.shape[-1], "channel_norm": self.groups}
        if self.layer == "BatchChannelNorm":
            return sizes
        return {"": sizes["channel_norm" if self.layer == "ChannelNorm" else "batch_norm"]}

    def initial(self, constant):
        """The initial variables, flat; `constant` makes an array of a given size and value."""
        made = {}
        settings = self.settings
        for part, size in self.parts.items():
            last = part != "batch_norm"
            for name, usual in (("scale", 1.0), ("bias", 0.0)):
                if settings[f"use_{name}"]:
                    init = settings[f"{name}_init"]
                    value = init(jax.random.key(0), (1,), np.float32)[0] if last else usual
                    made["params", part, name] = constant(size, float(value), "param")
            if self.layer != "ChannelNorm" and part != "channel_norm":
                made["batch_stats", part, "mean"] = constant(size, 0.0, "stats")
                made["batch_stats", part, "var"] = constant(size, 1.0, "stats")
        return {tuple(filter(None, path)): value for path, value in made.items()}


# --- The restatement ------------------------------------------------------------------------------


def moments(x, weight, axes):
    """Weighted mean and variance, and how much there is of each."""
    n = weight.sum(axes, keepdims=True)
    values = np.where(weight > 0, x, 0)
    mean = (weight * values).sum(axes, keepdims=True) / np.maximum(n, 1)
    var = (weight * (values - mean) ** 2).sum(axes, keepdims=True) / np.maximum(n, 1)
    return mean, var, n


class Restated:
    """A row in long double: the statistics after a call, and the output."""

    def __init__(self, row, statistics, x, mask):
        self.row, self.settings = row, row.settings
        flags = {**row.options, **row.call}
        self.evaluates = flags.get("use_running_average", False)
        self.updates = flags.get("update_stats", not self.evaluates)
        self.weight = np.broadcast_to(True if mask is None else mask, x.shape).astype(np.longdouble)
        self.axes = tuple(range(x.ndim - 1))
        self.before = self.after = {k: np.longdouble(v) for k, v in statistics.items()}
        if statistics and self.updates:
            mean, var, n = (m.reshape(-1) for m in moments(x, self.weight, self.axes))
            match self.settings["running_variance"]:
                case "unbiased":
                    var = var * n / np.maximum(n - 1, 1)
                case "around_running_mean":
                    var = var + (mean - self.before["mean"]) ** 2
            old = np.longdouble(self.settings["momentum"])
            new = {"mean": mean, "var": var}
            self.after = {k: old * v + (1 - old) * new[k] for k, v in self.before.items()}

    def output(self, params, x):
        """The output, with the running averages as constants."""
        row, settings = self.row, self.settings
        if row.layer != "ChannelNorm":
            epsilon = settings["batch_epsilon"] or settings["epsilon"]
            if self.evaluates:
                mean, var = self.before["mean"], self.before["var"]
            elif settings["estimate"]:
                mean, var = self.after["mean"], self.after["var"]
            else:
                mean, var, _ = moments(x, self.weight, self.axes)
            x = (x - mean) / np.sqrt(var + epsilon)
            first = "batch_norm/" if row.layer == "BatchChannelNorm" else ""
            x = params.get(f"{first}scale", 1) * x + params.get(f"{first}bias", 0)
        if row.layer in ("ChannelNorm", "BatchChannelNorm"):
            shape = *x.shape[:-1], row.groups, -1
            grouped, axes = x.reshape(shape), (*range(1, x.ndim - 1), x.ndim)
            mean, var, _ = moments(grouped, self.weight.reshape(shape), axes)
            grouped = (grouped - mean) / np.sqrt(var + settings["epsilon"])
            last = "channel_norm/" if row.layer == "BatchChannelNorm" else ""
            scale, bias = (
                np.reshape(params.get(f"{last}{name}", usual), (-1, 1))
                for name, usual in (("scale", 1), ("bias", 0))
            )
            x = (scale * grouped + bias).reshape(x.shape)
        return x


# --- Implementations ------------------------------------------------------------------------------


class Seen(NamedTuple):
    """The results of a call, flat; the gradients are those of `sum(y * dy)`."""

    output: Any
    statistics: Mapping[str, Any]
    gradients: Mapping[str, Any]
    input_gradient: Any


class Flax(NamedTuple):
    """Linen or NNX.

    Attributes:
        make: a layer of a name and these arguments.
    """

    make: Callable[[Row], Any]

    def has(self, row):
        """Whether the layer has these arguments."""
        del row
        return True

    def roundings(self, row):
        """By how many the output may be off."""
        return row.data.roundings

    def output_types(self, row):
        """The dtypes of the output in training and in evaluation."""
        layer, x = self.make(row), jax.ShapeDtypeStruct(row.shape, row.data.dtype)
        modes = [{}] if row.layer == "ChannelNorm" else [TRAIN, EVALUATE]

        def call(mode, x):
            return layer.called_with(**mode)(layer.start(x), x)[0]

        return {jax.eval_shape(partial(call, mode), x).dtype.name for mode in modes}

    def start(self, row, x):
        """The initial variables, flat."""
        start = self.make(row).start(x)
        return flatten_dict({kind: tree for kind, tree in start.items() if tree})

    def see(self, row, variables, x, dy, mask):
        axis = row.settings["axis"]
        x, dy, mask = (
            None if a is None else jnp.asarray(np.moveaxis(a, -1, axis)) for a in (x, dy, mask)
        )
        layer = self.make(row)
        stats = variables.get("batch_stats", {})

        def call(params, x):
            return layer({"params": params, "batch_stats": stats}, x, mask)

        y, pullback, statistics = jax.vjp(call, variables.get("params", {}), x, has_aux=True)
        gradients, dx = pullback(dy.astype(y.dtype))
        y, dx = (np.moveaxis(np.asarray(a), axis, -1) for a in (y, dx))
        return Seen(y, flat(statistics), flat(gradients), dx)


def in_linen(row):
    """Linen's layer, which has no default for its mode."""
    mode = {} if row.layer == "ChannelNorm" else {"use_running_average": False}
    options, call = arguments(row)
    return Linen(getattr(bcn_flax.linen, row.layer), FrozenDict({**mode, **options}), call)


def in_nnx(row):
    """The layer of NNX."""
    layer = Nnx(getattr(bcn_flax.nnx, row.layer), *arguments(row))
    return layer.made_with(num_features=row.shape[-1])


def arguments(row):
    """Those of the constructor, and those of the call."""
    options = {"param_dtype": row.data.dtype, **row.options}
    return FrozenDict(options), FrozenDict(row.call)


def flat(tree):
    return flatten_dict(jax.tree.map(np.asarray, dict(tree)), sep="/")


# --- The checks -----------------------------------------------------------------------------------


def check_start(implementation, row):
    """The initial variables have the names, shapes, dtypes and values that the row says."""
    types = {"param": row.settings.get("param_dtype", row.data.dtype)}
    types["stats"] = jnp.promote_types(types["param"], jnp.float32)
    expected = row.initial(lambda size, value, kind: np.full(size, value, types[kind]))
    with jax.enable_x64(True):
        x = np.moveaxis(np.ones(row.shape, row.data.dtype), -1, row.settings["axis"])
        actual = implementation.start(row, x)
    assert actual.keys() == expected.keys(), f"{sorted(actual)} is not {sorted(expected)}"
    for path, value in expected.items():
        name = "/".join(path)
        assert actual[path].dtype == value.dtype, f"{name}: {actual[path].dtype}"
        np.testing.assert_array_equal(np.asarray(actual[path]), value, err_msg=name)


def check_types(implementation, row, expected):
    """The output is of this type, in every mode."""
    assert implementation.output_types(row) == {expected}


def check_call(implementation, row):
    """Output, statistics and gradients are those of the restatement."""
    rng = np.random.default_rng(0)
    x, dy = row.data.draw(row.shape, rng), rng.standard_normal(row.shape)
    mask = masks(row, x, rng)
    variables = draw(row, x, mask, rng)
    with jax.enable_x64(row.data.dtype == np.float64):
        seen = implementation.see(row, variables, x, dy, mask)
    params, statistics = (flat(variables.get(kind, {})) for kind in ("params", "batch_stats"))
    wide = x.astype(np.longdouble)
    short = {path.rpartition("/")[2]: value for path, value in statistics.items()}
    expected = Restated(row, short, wide, mask)
    after = {path.rpartition("/")[2]: value for path, value in seen.statistics.items()}
    std = np.resize(row.data.std, row.shape[-1])
    for name, value in expected.after.items():
        scale = np.abs(value) if name == "var" else np.abs(value) + std
        stored = row.data.stored
        assert after[name].dtype == np.dtype(stored), (name, after[name].dtype)
        off = 4 * np.finfo(row.data.dtype).eps * scale
        if stored == jnp.bfloat16:
            off += float(jnp.finfo(stored).eps) / 2 * np.abs(value)
        assert_within(after[name], value, off, name)
    if row.data.dtype != np.float64:
        expected.after = {k: v.astype(np.longdouble) for k, v in after.items()}
    y = expected.output({k: v.astype(np.longdouble) for k, v in params.items()}, wide)
    off = np.finfo(row.data.dtype).eps * implementation.roundings(row)
    size = np.abs(y).max(tuple(range(y.ndim - 1)))
    if mask is not None:
        y, size = np.where(mask, y, 0), np.abs(np.where(mask, y, 0)).max((0, 1, 2))
        seen = seen._replace(output=np.where(mask, seen.output, 0))
    assert_within(seen.output, y, off * size, "output")
    if row.data.dtype == np.float64:
        check_gradients(expected, params, wide, dy, seen, std, rng)


def check_gradients(restated, params, x, dy, seen, std, rng):
    """Along a random direction of each parameter, and of the input, they are the slopes."""
    params = {k: v.astype(np.longdouble) for k, v in params.items()}
    step = np.longdouble(1e-6)
    assert seen.gradients.keys() == params.keys()
    for name, value in {**params, "input": x}.items():
        toward = rng.standard_normal(value.shape) * (std if name == "input" else 1)

        def loss(step, name=name, value=value, toward=toward):
            moved = value + step * toward
            if name == "input":
                return restated.output(params, moved) * dy
            return restated.output({**params, name: moved}, x) * dy

        difference = (loss(step) - loss(-step)) / (2 * step)
        gradient = seen.input_gradient if name == "input" else seen.gradients[name]
        size = 1e-8 * (np.abs(difference).sum() + np.abs(gradient * toward).sum())
        assert_within((gradient * toward).sum(), difference.sum(), size, f"gradient of {name}")


def assert_within(actual, expected, off, name):
    actual = np.asarray(actual, np.longdouble)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, not {expected.shape}"
    assert np.isfinite(actual).all(), f"{name} is not finite"
    ratio = np.abs(actual - expected) / off
    worst = np.unravel_index(ratio.argmax(), ratio.shape)
    assert ratio.max() <= 1, (
        f"{name} at {tuple(map(int, worst))}: {actual[worst]}, not {expected[worst]}, "
        f"{float(ratio.max()):.3g} times what is allowed"
    )


def masks(row, x, rng):
    """A mask, if the row has one; what it hides becomes something that no one may measure."""
    if not row.mask:
        return None
    if row.mask == "samples":
        mask = np.arange(len(x)).reshape(-1, 1, 1, 1) > 0
        x[0] = 0  # as padding is
        return mask
    mask = rng.random(row.shape) < 0.7
    if row.mask == "all but one":
        mask = np.arange(x.size).reshape(x.shape) < row.shape[-1]
    x[~mask] = 100 * np.abs(x).max()
    return mask


def draw(row, x, mask, rng):
    """Variables, none at its initial value; running averages that fit the data, nearly."""
    kept = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    mean, var, _ = (m.reshape(-1) for m in moments(x.astype(np.longdouble), kept, (0, 1, 2)))
    var = np.where(var > 0, var, np.square(row.data.std))  # of a single value

    def value(size, initial, kind):
        if kind == "param":
            return rng.uniform(0.5, 1.5, size).astype(row.data.dtype)
        drawn = mean + np.sqrt(var) * rng.uniform(-0.5, 0.5, size) if not initial else None
        drawn = var * rng.uniform(0.5, 1.5, size) if drawn is None else drawn
        return np.asarray(drawn, np.float64).astype(row.data.stored)

    return unflatten_dict(row.initial(value))


# --- The table ------------------------------------------------------------------------------------

TRAIN = {"use_running_average": False}
EVALUATE = {"use_running_average": True}
UNBIASED = {"running_variance": "unbiased"}
BCN = {"num_groups": 2}
BY_BATCH = {**BCN, "estimate": False}
SEVEN = nn.initializers.constant(7.0)
FIVE = nn.initializers.constant(5.0)

START = {
    **{name: Row(name) for name in ("BatchNorm", "EstimatedBatchNorm")},
    "ChannelNorm of 32 groups": Row("ChannelNorm", shape=(2, 3, 64)),
    "BatchChannelNorm of 32 groups": Row("BatchChannelNorm", shape=(2, 3, 64)),
    **{
        f"{row.layer} {text}": row._replace(options={**row.options, **options})
        for row in (
            Row("BatchNorm"),
            Row("ChannelNorm", BCN),
            Row("BatchChannelNorm", BCN),
        )
        for text, options in {
            "with initializers": {"scale_init": SEVEN, "bias_init": FIVE},
            "without scale": {"use_scale": False, "bias_init": FIVE},
            "without bias": {"use_bias": False, "scale_init": SEVEN},
            "without both": {"use_scale": False, "use_bias": False},
            "in bfloat16": {"param_dtype": jnp.bfloat16},
        }.items()
    },
    "ChannelNorm by size": Row("ChannelNorm", {"num_groups": None, "group_size": 3}),
    "BatchChannelNorm by size": Row("BatchChannelNorm", {"num_groups": None, "group_size": 3}),
}

BASES = {
    "BatchNorm": Row("BatchNorm"),
    "EstimatedBatchNorm": Row("EstimatedBatchNorm"),
    "ChannelNorm": Row("ChannelNorm", BCN),
    "BatchChannelNorm": Row("BatchChannelNorm", BCN),
    "BatchChannelNorm of the batch": Row("BatchChannelNorm", BY_BATCH),
}
AVERAGING = {name: row for name, row in BASES.items() if name != "ChannelNorm"}
PER_NORM = {
    "": {},
    "epsilon": {"epsilon": 1e-2},
    "without scale": {"use_scale": False},
    "without bias": {"use_bias": False},
    "axis": {"axis": 1},
    "axis from the end": {"axis": -2},
}
PER_AVERAGING = {
    "momentum": {"momentum": 0.3},
    "unbiased": UNBIASED,
    "around the running mean": {"running_variance": "around_running_mean"},
    "evaluating": EVALUATE,
    "frozen": {"update_stats": False},
    "evaluating and updating": {**EVALUATE, "update_stats": True},
}
CALLS = {
    "called to evaluate": EVALUATE,
    "called to freeze": {**TRAIN, "update_stats": False},
    "called to evaluate and update": {**EVALUATE, "update_stats": True},
}


TYPED = {name: BASES[name] for name in ("BatchNorm", "ChannelNorm", "BatchChannelNorm")}
# Types of input and parameters, options, and the type of the output.
TYPES = (
    ("bfloat16", "float32", {}, "float32"),
    ("bfloat16", "float32", {"use_scale": False}, "float32"),
    ("bfloat16", "float32", {"use_bias": False}, "float32"),
    ("bfloat16", "float32", {"use_scale": False, "use_bias": False}, "bfloat16"),
    ("bfloat16", "bfloat16", {}, "bfloat16"),
    ("bfloat16", "float16", {}, "float32"),
    ("float32", "bfloat16", {"use_scale": False}, "float32"),
    ("bfloat16", "float32", {"dtype": "bfloat16"}, "bfloat16"),
    ("float32", "float32", {"use_scale": False, "use_bias": False, "dtype": "float16"}, "float16"),
)


def with_options(bases, options):
    """Each base with each of these options."""
    return {
        f"{name} {text}".strip(): row._replace(options={**row.options, **more})
        for name, row in bases.items()
        for text, more in options.items()
    }


def with_fields(bases, text, **fields):
    return {f"{name} {text}": row._replace(**fields) for name, row in bases.items()}


CALL = {
    **with_options(BASES, PER_NORM),
    **with_options(AVERAGING, PER_AVERAGING),
    **{
        f"{name} {text}": row._replace(call=call)
        for text, call in CALLS.items()
        for name, row in AVERAGING.items()
    },
    "BatchChannelNorm called to train": Row(
        "BatchChannelNorm",
        {**BCN, **EVALUATE, "update_stats": False},
        {**TRAIN, "update_stats": True},
    ),
    "BatchChannelNorm two epsilons": Row(
        "BatchChannelNorm", {**BY_BATCH, "epsilon": 1e-2, "batch_epsilon": 0.1}
    ),
    "BatchChannelNorm by size": Row("BatchChannelNorm", {"num_groups": None, "group_size": 3}),
    "ChannelNorm by size": Row("ChannelNorm", {"num_groups": None, "group_size": 3}),
    **with_fields(BASES, "masked", mask="values"),
    **with_fields(with_options(AVERAGING, {"unbiased": UNBIASED}), "and masked", mask="values"),
    "BatchNorm unbiased, of one value": Row("BatchNorm", UNBIASED, mask="all but one"),
    **with_fields(BASES, "of many sizes", data=SIZES),
    **with_fields(BASES, "far from 0", data=FAR),
    **with_fields(BASES, "far from 0, padded", data=FAR, mask="samples"),
    **with_fields(AVERAGING, "with narrow statistics", data=NARROW),
    **{
        f"{name} far from 0, around the running mean": row._replace(
            data=FAR, options={**row.options, "running_variance": "around_running_mean"}
        )
        for name, row in AVERAGING.items()
    },
}


def checks(implementations):
    """The checks of these implementations, by name."""
    return {
        f"contract of {side}, {what}: {name}": partial(check, implementation, row)
        for side, implementation in implementations.items()
        for what, check, rows in (("start", check_start, START), ("call", check_call, CALL))
        for name, row in rows.items()
        if implementation.has(row)
    }


def type_checks():
    """The checks of the types of outputs, by name."""
    return {
        f"contract of {side}, type: {name}, {i}": partial(check_types, implementation, row, output)
        for side, implementation in FLAX.items()
        for i, (x, param_dtype, options, output) in enumerate(TYPES)
        for name, row in TYPED.items()
        for row in [
            row._replace(
                options={**row.options, **options, "param_dtype": param_dtype},
                data=Data(dtype=jnp.dtype(x)),
            )
        ]
    }


FLAX = {"linen": Flax(in_linen), "NNX": Flax(in_nnx)}


def check_parts():
    """The norms inside of NNX's batch-channel norm are layers, along the same axis."""
    for axis, shape in ((1, (2, C, 3)), (-1, (2, 3, C))):
        layer = bcn_flax.nnx.BatchChannelNorm(C, num_groups=2, axis=axis, rngs=nnx.Rngs(0))
        layer.eval()
        x = jnp.asarray(np.random.default_rng(0).normal(1, 2, shape), jnp.float32)
        parts = layer.channel_norm(layer.batch_norm(x))
        assert_within(parts, np.asarray(layer(x), np.longdouble), 1e-5, "the parts in a row")


CONTRACT = {**checks(FLAX), **type_checks(), "contract of NNX, parts": check_parts}
