"""The harness on small models: it passes equal ones, and finds and explains every difference."""

import re
from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from bcn_flax.interop import RULES, Layout, Rule, kernel
from bcn_flax.parity import (
    AXES,
    CHANNELS,
    SAME,
    Name,
    Optimizer,
    Tolerance,
    adam,
    assert_parity,
    compare,
    observation,
    sgd,
)
from bcn_flax.parity.pair import module_pair

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(6, 5)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
SENTENCES = RNG.normal(size=(2, 4, 8)).astype(np.float32)
TOKENS = np.array([[0, 3, 3], [1, 2, 0]])

# Each phase with other shapes or another mode is another program to compile.
ONE_STEP = {"eager": False, "steps": 1}
EVALUATION = {"eager": False, "steps": 0}


@pytest.fixture(autouse=True)
def seeded():
    """The same initial weights in every run."""
    torch.manual_seed(0)


class Flax(nn.Module):
    """A function of itself and its inputs."""

    function: object

    @nn.compact
    def __call__(self, *inputs):
        return self.function(self, *inputs)


class FlaxWithModes(Flax):
    @nn.compact
    def __call__(self, *inputs, train):
        return self.function(self, *inputs, train)


class Torch(torch.nn.Module):
    """The same, with modules and parameters by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def flax_mlp(activation=jnp.tanh):
    return Flax(lambda _, x: nn.Dense(3, name="out")(activation(nn.Dense(7, name="hidden")(x))))


class NnxMlp(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(7, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def torch_mlp(activation=torch.tanh):
    return Torch(
        lambda self, x: self.out(activation(self.hidden(x))),
        hidden=torch.nn.Linear(5, 7),
        out=torch.nn.Linear(7, 3),
    )


def flax_bn(momentum=0.99):
    def forward(_, x, train):
        x = nn.Dense(4, name="dense")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=momentum, name="bn")(x)

    return FlaxWithModes(forward)


class NnxBn(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.bn(self.dense(x))


def torch_bn():
    return Torch(
        lambda self, x: self.bn(self.dense(x)),
        dense=torch.nn.Linear(5, 4),
        bn=torch.nn.BatchNorm1d(4),
    )


def failures(comparison):
    return [row for row in comparison.rows if not row.passed]


def first_failures(comparison):
    """The first phase with a difference, and the names of what differs in it."""
    failed = failures(comparison)
    return failed[0].phase, {str(row.name) for row in failed if row.phase == failed[0].phase}


# Equal models


@pytest.mark.parametrize(
    ("mlp", "optimizer", "steps"),
    [(flax_mlp(), None, 3), (NnxMlp(), adam(), 1)],
    ids=["linen", "nnx"],
)
def test_equal_networks_agree(mlp, optimizer, steps):
    comparison = assert_parity(mlp, torch_mlp(), VECTORS, optimizer=optimizer, steps=steps)
    names = {str(row.name) for row in comparison.rows}
    parameters = ("hidden/kernel", "hidden/bias", "out/kernel", "out/bias")
    quantities = (f"{q} {p}" for q in ("gradient", "parameter") for p in parameters)
    assert names == {"output", "input gradient", *quantities}
    phases = list(dict.fromkeys(row.phase for row in comparison.rows))
    training = [f"training step {i + 1}" for i in range(steps)]
    assert phases == ["evaluation", *training, "evaluation after training"]
    assert list(dict.fromkeys(row.implementations for row in comparison.rows)) == [
        ("Flax, jitted", "PyTorch"),
        ("Flax, eager", "PyTorch"),
        ("Flax in float64", "PyTorch in float64"),
    ]
    count = len(names) * len(phases) * 3
    assert str(comparison).startswith(
        f"Equal: Flax and PyTorch agree in all of {count} comparisons."
    )


class Pair(NamedTuple):
    first: object
    second: object


def tied_flax(self, x):
    layer = nn.Dense(5, name="a")
    return layer(jnp.tanh(layer(x)))


def tied_torch():
    a, b = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    b.weight, b.bias = a.weight, a.bias
    return Torch(lambda self, x: self.b(torch.tanh(self.a(x))), a=a, b=b)


def unused_flax(self, x):
    self.param("offset", nn.initializers.ones, (2,))
    return x * self.param("gain", nn.initializers.ones, ())


def unused_torch():
    shapes = {"offset": (2,), "gain": ()}
    parameters = {name: torch.nn.Parameter(torch.ones(n)) for name, n in shapes.items()}
    return Torch(lambda self, x: x * self.gain, **parameters)


def in_torch(function):
    return Torch(lambda _, *inputs: function(*inputs))


def in_flax(function):
    return Flax(lambda _, *inputs: function(*inputs))


STRUCTURES = {
    "tied weights": (Flax(tied_flax), tied_torch(), VECTORS, ONE_STEP),
    "an unused parameter": (Flax(unused_flax), unused_torch(), VECTORS, ONE_STEP),
    "no parameters": (in_flax(jnp.tanh), torch.nn.Tanh(), VECTORS, ONE_STEP),
    "tokens": (nn.Embed(4, 5), torch.nn.Embedding(4, 5), TOKENS, ONE_STEP),
    "a scalar": (
        in_flax(lambda x: (x**2).mean()),
        in_torch(lambda x: (x**2).mean()),
        VECTORS,
        EVALUATION,
    ),
    "tuples": (
        in_flax(lambda x, y: (x * y, {"b": x + y, "a": x - y})),
        in_torch(lambda x, y: (x * y, {"a": x - y, "b": x + y})),
        (VECTORS, VECTORS + 1),
        EVALUATION,
    ),
    "named tuples": (
        in_flax(lambda x: Pair(x, 2 * x)),
        Torch(lambda self, x: self.inner(x), inner=in_torch(lambda x: Pair(x, 2 * x))),
        VECTORS,
        EVALUATION,
    ),
    "whole numbers": (
        in_flax(lambda x: (x.argmax(-1), x > 0)),
        in_torch(lambda x: (x.argmax(-1), x > 0)),
        VECTORS,
        EVALUATION,
    ),
    "inputs that are written to": (
        in_flax(nn.relu),
        torch.nn.Sequential(torch.nn.ReLU(inplace=True)),
        VECTORS,
        EVALUATION,
    ),
    "PyTorch's inputs": (
        nn.Dense(3),
        torch.nn.Linear(5, 3),
        torch.from_numpy(VECTORS),
        EVALUATION,
    ),
    "channels of sequences": (
        nn.Conv(4, (3,), padding=1),
        torch.nn.Conv1d(8, 4, 3, padding=1),
        SENTENCES,
        {**EVALUATION, "axes": {**AXES, 3: CHANNELS}},
    ),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_models_of_any_structure_agree(structure):
    flax, module, inputs, options = STRUCTURES[structure]
    assert_parity(flax, module, inputs, **{"axes": {**AXES, 3: SAME}, **options})


def of_heads(torch_shape, flax_shape, facts):
    """Flax gives the features of attention two axes, which PyTorch has as one."""
    if len(flax_shape) != 3:
        return kernel(torch_shape, flax_shape, facts)
    return [
        Layout(
            "transposed, heads apart",
            lambda weight: weight.T.reshape(flax_shape),
            lambda array: array.reshape(torch_shape[::-1]).T,
            lambda _: torch_shape,
        )
    ]


def flat(torch_shape, flax_shape, facts):
    """A bias for each feature of each head."""
    return [
        Layout(
            "reshaped",
            lambda x: x.reshape(flax_shape),
            lambda x: x.reshape(torch_shape),
            lambda _: torch_shape,
        )
    ]


def test_attention_agrees_by_rules_of_the_caller():
    def attention(self, x):
        heads = [
            project(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        ]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    names = ("query", "key", "value", "out")
    module = Torch(attention, **{name: torch.nn.Linear(8, 8) for name in names})
    rules = {
        ("params", "kernel"): Rule(("weight",), of_heads),
        ("params", "bias"): Rule(("bias",), flat),
    }
    assert_parity(
        nn.MultiHeadDotProductAttention(num_heads=2),
        module,
        SENTENCES,
        rules={**RULES, **rules},
        axes={**AXES, 3: SAME},
        **EVALUATION,
    )


def test_gradients_are_computed_even_if_they_are_disabled_around_the_call():
    with torch.no_grad():
        assert_parity(nn.Dense(3), torch.nn.Linear(5, 3), VECTORS, **EVALUATION)


def flax_norm(x):
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt((wide**2).mean(-1, keepdims=True))).astype(x.dtype)


def torch_norm(x):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class TorchNarrowInTraining(torch.nn.Module):
    def forward(self, x):
        return torch_norm(x) if self.training else x


NARROW = {
    "Flax": (
        nn.Dense(3, dtype=jnp.bfloat16),
        torch.nn.Linear(5, 3).bfloat16(),
        VECTORS.astype(jnp.bfloat16),
    ),
    "both": (in_flax(flax_norm), in_torch(torch_norm), VECTORS),
    "PyTorch": (
        FlaxWithModes(lambda _, x, t: x / jnp.sqrt((x**2).mean(-1, keepdims=True)) if t else x),
        TorchNarrowInTraining(),
        VECTORS,
    ),
}


@pytest.mark.parametrize("side", NARROW)
def test_modules_that_narrow_float64_are_compared_in_it_all_the_same(side):
    comparison = assert_parity(*NARROW[side], **ONE_STEP)
    wide = [row for row in comparison.rows if row.implementations[0] == "Flax in float64"]
    assert wide
    assert all(row.dtype == np.float64 for row in wide)
    assert all(row.error.absolute.error < 1e-14 * (1 + row.error.scale) for row in wide)


@pytest.mark.parametrize("mean", [0, 100])
def test_adam_may_take_any_step_for_a_gradient_that_is_0_except_for_rounding(mean):
    """A bias before a norm over the batch, whose statistics no variable shows."""

    def flax_norm(_, x):
        x = nn.Dense(4, name="dense")(x)
        x = x - x.mean(0, keepdims=True)
        return x / jnp.sqrt((x**2).mean(0, keepdims=True) + 1e-5)

    def torch_norm(self, x):
        x = self.dense(x)
        x = x - x.mean(0)
        return x / (x.square().mean(0) + 1e-5).sqrt()

    module, options = Torch(torch_norm, dense=torch.nn.Linear(5, 4)), {"optimizer": adam()}
    assert_parity(Flax(flax_norm), module, VECTORS + np.float32(mean), eager=False, **options)


def test_a_rounding_may_open_a_relu():
    """0.1 + 0.3 - 0.4 is 0 or not, depending on the order; its gradient is 0 or 1."""
    x = np.asarray([[0.1, 0.3, 0.4], [1.0, 2.0, -1.0]], np.float32)
    opened = in_flax(lambda x: nn.relu(x[:, 0] + x[:, 1] - x[:, 2]))
    closed = in_torch(lambda x: torch.relu(x[:, 0] + (x[:, 1] - x[:, 2])))
    comparison = assert_parity(opened, closed, x, **EVALUATION)
    gradient = next(row for row in comparison.rows if str(row.name) == "input gradient")
    assert gradient.error.relative.error == 1


def test_the_probe_calls_each_module_once_in_evaluation_and_in_training():
    calls = []

    def flax(_, x, train):
        calls.append(("Flax", train))
        return x

    def module(self, x):
        calls.append(("PyTorch", self.training))
        return x

    pair = module_pair(FlaxWithModes(flax), Torch(module), [VECTORS]).in_float64()
    calls.clear()
    probe = pair.probe([VECTORS])
    assert calls == [(side, train) for train in (False, True) for side in ("Flax", "PyTorch")]
    assert [*probe.calls] == ["evaluation", "training"]


# Differences are found and explained


@jax.custom_jvp
def doubled_gradient(x):
    return x


doubled_gradient.defjvp(lambda x, dx: (x[0], 2 * dx[0]))


def counted(self, x, train, *, by=1.0, of_gain=lambda gain: gain):
    count = self.variable("batch_stats", "mean", jnp.zeros, ())
    if train and not self.is_initializing():
        count.value = count.value + by
    return x * of_gain(self.param("gain", nn.initializers.ones, ()))


class TorchCounted(torch.nn.Module):
    def __init__(self, factors=(1, 1)):
        super().__init__()
        self.gain, self.factors = torch.nn.Parameter(torch.ones(())), factors
        self.register_buffer("running_mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.running_mean += 1
        return x * self.gain * self.factors[self.training]


def flax_layer_norm(_, x):
    return nn.Dense(3, name="out")(nn.LayerNorm(epsilon=1e-6, name="norm")(x))


def torch_layer_norm():
    return Torch(
        lambda self, x: self.out(self.norm(x)),
        norm=torch.nn.LayerNorm(5),
        out=torch.nn.Linear(5, 3),
    )


class FlaxCell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(x), None


def flax_scan(_, x):
    """The outputs of the cells have no values outside of the scan."""
    x, _ = nn.scan(FlaxCell, length=2)(name="cells")(x, None)
    return nn.Dense(3, name="out")(x)


class Difference(NamedTuple):
    """Two modules that differ, where they first do, and the beginnings of the hints."""

    flax: object
    module: object
    phase: str
    names: set[str]
    hints: list[str]
    options: dict[str, Any] = ONE_STEP


ADAMW = Optimizer(optax.adamw(0.1), lambda p: torch.optim.AdamW(p, 0.1))  # weight decay 1e-4, 1e-2
COUNTED = FlaxWithModes(counted)
OF_OUTPUT = {"output", "input gradient", "gradient gain"}
STATISTICS = {"statistic bn/mean", "statistic bn/var"}
FIRST_MODULE = (
    "In evaluation, the first difference arises between the output of hidden, which agrees, and "
    "the input of out, which does not."
)
MOMENTUM = (
    "bn: momentum is 0.99 in Flax and 0.1 in PyTorch, where it is the weight of the new value: 0.9 "
    "in Flax's words."
)
VARIANCE = (
    "bn/var converges to 1.2 times Flax's value in PyTorch, which is n / (n - 1) for n = 6 values: "
    "biased in Flax, unbiased in PyTorch."
)
OTHER_FORMULA = "They differ in float64 as well: the cause is not rounding, they compute different"
DIFFERENCES = {
    "only in evaluation": Difference(
        COUNTED, TorchCounted((2, 1)), "evaluation", OF_OUTPUT, ["In evaluation, the first module"]
    ),
    "only in training": Difference(
        COUNTED,
        TorchCounted((1, 2)),
        "training step 1",
        {*OF_OUTPUT, "parameter gain"},
        ["In training, the first module whose output differs is the module itself; its input"],
    ),
    "only in a statistic": Difference(
        FlaxWithModes(lambda self, x, train: counted(self, x, train, by=1.1)),
        TorchCounted(),
        "training step 1",
        {"statistic mean"},
        [],
    ),
    "only in an input's gradient": Difference(
        FlaxWithModes(lambda self, x, train: counted(self, doubled_gradient(x), train)),
        TorchCounted(),
        "evaluation",
        {"input gradient"},
        [],
    ),
    "only in a parameter's gradient": Difference(
        FlaxWithModes(lambda self, x, train: counted(self, x, train, of_gain=doubled_gradient)),
        TorchCounted(),
        "evaluation",
        {"gradient gain"},
        [],
    ),
    "only after the optimizer": Difference(
        COUNTED,
        TorchCounted(),
        "training step 1",
        {"parameter gain"},
        ["All gradients agree, and the parameters after the step do not: the two optimizers"],
        {**ONE_STEP, "optimizer": ADAMW},
    ),
    "training that diverges": Difference(
        COUNTED,
        TorchCounted((1, 2)),
        "training step 1",
        {*OF_OUTPUT, "parameter gain"},
        ["In training, the first", "Training diverges: gain grows to "],
        {**ONE_STEP, "optimizer": sgd(1e5)},
    ),
    "momentum and variance": Difference(
        flax_bn(), torch_bn(), "training step 1", STATISTICS, [MOMENTUM, VARIANCE]
    ),
    "momentum and variance of NNX": Difference(
        NnxBn(), torch_bn(), "training step 1", STATISTICS, [MOMENTUM, VARIANCE]
    ),
    "variance": Difference(
        flax_bn(momentum=0.9), torch_bn(), "training step 1", {"statistic bn/var"}, [VARIANCE]
    ),
    "epsilon": Difference(
        Flax(flax_layer_norm),
        torch_layer_norm(),
        "evaluation",
        {"output", "input gradient"},
        [
            "In evaluation, the first module whose output differs is norm; its input agrees.",
            "norm: epsilon is 1e-06 in Flax, and eps 1e-05 in PyTorch.",
        ],
        {**EVALUATION, "weights": "random"},
    ),
    "formula": Difference(
        flax_mlp(nn.gelu),
        torch_mlp(torch.nn.functional.gelu),
        "evaluation",
        {"output"},
        [FIRST_MODULE],
        EVALUATION,
    ),
    "formula after a scan": Difference(
        Flax(flax_scan),
        Torch(lambda self, x: self.out(torch.tanh(x)), out=torch.nn.Linear(5, 3)),
        "evaluation",
        {"output"},
        ["In evaluation, the first difference arises between the input of the module itself,"],
        EVALUATION,
    ),
    "formula of NNX": Difference(
        NnxMlp(), torch_mlp(torch.relu), "evaluation", {"output"}, [FIRST_MODULE], EVALUATION
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_found_and_explained(difference):
    flax, module, phase, names, hints, options = DIFFERENCES[difference]
    comparison = compare(flax, module, VECTORS, **options)
    first_phase, first_names = first_failures(comparison)
    assert first_phase == phase
    assert first_names == names if phase == "training step 1" else first_names >= names
    hints = [*hints, OTHER_FORMULA]
    assert len(comparison.hints) == len(hints), comparison.hints
    for actual, expected in zip(comparison.hints, hints, strict=True):
        assert actual.startswith(expected)


def test_settings_that_differ_without_a_difference_yet_are_named():
    def forward(_, x, train):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))

    module = Torch(
        lambda self, x: torch.relu(self.bn(self.conv(x))),
        conv=torch.nn.Conv2d(3, 4, 3, padding=1),
        bn=torch.nn.BatchNorm2d(4),
    )
    comparison = assert_parity(FlaxWithModes(forward), module, IMAGES, **EVALUATION)
    assert "They agree, but their settings differ:\n  - bn: momentum is 0.99" in str(comparison)


def test_a_constant_in_float32_is_told_from_another_formula():
    """Both multiply by 0.1, and only one rounds it, which only float64 shows."""
    flax = in_flax(lambda x: x * jnp.asarray(np.float32(0.1)))
    comparison = compare(flax, in_torch(lambda x: x * 0.1), VECTORS, **EVALUATION)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax in float64"}
    assert comparison.hints[-1].startswith(
        "They differ in float64 as well, but no more than by roundings of float32: a small constant"
    )


# Which side is less accurate


def standardized(correction):
    """The variance as `E[x^2] - E[x]^2` in Flax and by the book in PyTorch."""

    def less_accurate(x):
        mean = x.mean(0, keepdims=True)
        return (x - mean) / jnp.sqrt((x**2).mean(0, keepdims=True) - mean**2 + correction)

    return in_flax(less_accurate), in_torch(lambda x: (x - x.mean(0)) / x.std(0, correction=0))


def more_accurate():
    """The other way round."""

    def less_accurate(x):
        return (x - x.mean(0)) / (x.square().mean(0) - x.mean(0).square()).sqrt()

    def by_the_book(x):
        x = x - x.mean(0, keepdims=True)
        return x / jnp.sqrt((x**2).mean(0, keepdims=True))

    return in_flax(by_the_book), in_torch(less_accurate)


@pytest.mark.parametrize(
    ("sides", "less_accurate"), [(standardized(0), "Flax"), (more_accurate(), "PyTorch")]
)
def test_the_less_accurate_side_is_named(sides, less_accurate):
    comparison = compare(*sides, VECTORS + 300, **EVALUATION)
    output = next(row for row in comparison.rows if str(row.name) == "output")
    assert not output.passed
    assert output.accuracy.less_accurate == less_accurate
    assert max(output.accuracy) > 10 * min(output.accuracy)
    assert f"; {less_accurate} is less accurate" in str(comparison)
    assert comparison.hints[-1].startswith("In float64 they agree to its precision")


def test_no_side_is_called_less_accurate_if_the_formulas_differ():
    comparison = compare(*standardized(0.1), VECTORS, **EVALUATION)
    assert not comparison.passed
    assert all(row.accuracy is None for row in comparison.rows)


class Doubled:
    """An oracle for `2 * x`, which shows only some quantities."""

    def __init__(self, quantities=("output", "input gradient"), factor=2.0):
        self.quantities, self.factor = quantities, factor

    def __call__(self, variables):
        return self.call

    def call(self, inputs, output_gradients, train):
        (x,), (dy,) = inputs, output_gradients
        assert x.dtype == dy.dtype == np.float64
        seen = observation({"": self.factor * x}, {"": self.factor * dy}, {}, {})
        return {name: value for name, value in seen.items() if name.quantity in self.quantities}


def twice(by=2.0):
    return in_flax(lambda x: by * x), in_torch(lambda x: 2 * x)


def test_all_implementations_are_compared_with_an_oracle():
    comparison = assert_parity(*twice(), VECTORS, oracle=Doubled(), **ONE_STEP)
    assert {row.implementations for row in comparison.rows} == {
        ("Flax, jitted", "the oracle"),
        ("PyTorch", "the oracle"),
    }
    comparison = compare(*twice(2.1), VECTORS, oracle=Doubled(), **EVALUATION)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax, jitted"}
    assert all(row.accuracy.less_accurate == "Flax" for row in failures(comparison))
    comparison = compare(*twice(), VECTORS, oracle=Doubled(factor=3.0), **EVALUATION)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax, jitted", "PyTorch"}
    assert {row.accuracy.less_accurate for row in comparison.rows if row.accuracy} == {"neither"}


def test_what_the_oracle_does_not_show_is_compared_with_pytorch():
    oracle = Doubled(quantities=["output"])
    flax = in_flax(lambda x: 2 * doubled_gradient(x))
    comparison = compare(flax, twice()[1], VECTORS, oracle=oracle, **EVALUATION)
    assert [(row.implementations, str(row.name)) for row in failures(comparison)] == [
        (("Flax, jitted", "PyTorch"), "input gradient")
    ]


# Values that are not finite, and shapes


def fixed(values):
    """Returns these values, whatever it is given."""
    values = np.asarray([values], np.float32)
    return in_flax(lambda x: values + 0 * x), in_torch(lambda x: torch.tensor(values) + 0 * x)


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("flax", "module", "mismatch"),
    [
        ((1.0, NAN, INF), (1.0, NAN, INF), None),
        ((1.0, NAN, INF), (1.0, NAN, -INF), "1 of 3 places, the first at (0, 2): inf against -inf"),
        ((NAN, 1.0, INF), (1.0, NAN, INF), "2 of 3 places, the first at (0, 0): nan against 1"),
        ((1.0, 2.0, 3.0), (1.0, INF, NAN), "2 of 3 places, the first at (0, 1): 2 against inf"),
    ],
)
def test_values_that_are_not_finite_must_be_at_the_same_places(flax, module, mismatch):
    x = np.ones((1, 3), np.float32)
    comparison = compare(fixed(flax)[0], fixed(module)[1], x, **EVALUATION)
    assert comparison.passed == (mismatch is None)
    if mismatch:
        assert f"output: is not finite in the same way at {mismatch}" in str(comparison)


def test_outputs_of_other_shapes_are_the_only_difference_reported():
    transposed = Torch(lambda self, x: self.out(x).T, out=torch.nn.Linear(5, 3))
    comparison = compare(Flax(lambda _, x: nn.Dense(3, name="out")(x)), transposed, VECTORS)
    assert first_failures(comparison) == ("evaluation", {"output"})
    assert len(comparison.rows) == 1
    assert (
        "output: has shape (6, 3) against (3, 6), in Flax's order of axes"
        in str(comparison).splitlines()[3]
    )


def test_the_table_has_the_largest_error_of_each_kind_and_its_place():
    flax, module = fixed((1.0, 100.0, 0.001))[0], fixed((1.001, 100.5, 0.0015))[1]
    text = str(compare(flax, module, np.ones((1, 3), np.float32), **EVALUATION))
    table = text[text.index("Flax, jitted, against PyTorch:\n        ") :].splitlines()
    assert [" ".join(line.split()) for line in table[2:6]] == [
        "output absolute 0.5 evaluation, output (0, 1)",
        "relative 0.333 evaluation, output (0, 2)",
        "ulps 4.29e+06 evaluation, output (0, 2)",
        "of allowed 1.5e+03 times evaluation, output (0, 1)",
    ]


# Tolerances


def test_a_small_error_in_one_weight_is_found():
    flax, module = nn.Dense(3), torch.nn.Linear(5, 3)
    params = {"kernel": module.weight.T, "bias": module.bias}
    variables = {"params": {name: x.detach().numpy().copy() for name, x in params.items()}}
    variables["params"]["kernel"][2, 1] *= 1.0001
    comparison = compare(flax, module, VECTORS, variables=variables, weights="own", **EVALUATION)
    assert first_failures(comparison) == ("initial weights", {"parameter kernel"})
    outputs = [row for row in failures(comparison) if str(row.name) == "output"]
    assert {row.implementations[0] for row in outputs} == {"Flax, jitted", "Flax in float64"}


def test_a_wider_tolerance_is_printed_with_its_reason():
    wide = [Tolerance("statistic bn/*", 1e15, "the two count differently, as is well known")]
    comparison = compare(flax_bn(), torch_bn(), VECTORS, tolerances=wide, **ONE_STEP)
    assert "Tolerance of statistic bn/*: 1e+15 times the usual, as the two count" in str(comparison)
    # The evaluation that follows uses the statistics.
    phase, names = first_failures(comparison)
    assert phase == "evaluation after training"
    assert names > {"output", "input gradient"}


def test_a_tighter_tolerance_needs_no_reason():
    tight = [Tolerance("*", 1e-9), Tolerance("gradient *", 1.0)]
    comparison = compare(flax_mlp(), torch_mlp(), VECTORS, tolerances=tight, **EVALUATION)
    assert {row.name.quantity for row in failures(comparison)} == {"output", "input gradient"}


def test_precision_may_be_tightened():
    x = VECTORS.astype(jnp.bfloat16)
    rounded_twice = in_flax(lambda x: (x * jnp.bfloat16(1.1)) * jnp.bfloat16(1.1))
    once = in_torch(lambda x: (x.float() * float(jnp.bfloat16(1.1)) ** 2).bfloat16())
    assert compare(rounded_twice, once, x, **EVALUATION).passed
    assert not compare(rounded_twice, once, x, precision=np.float32, **EVALUATION).passed


def test_modules_of_float64_are_compared_in_it():
    x = VECTORS.astype(np.float64)
    comparison = assert_parity(nn.Dense(3), torch.nn.Linear(5, 3).double(), x, **EVALUATION)
    assert {row.dtype for row in comparison.rows} == {np.dtype(np.float64)}
    assert {row.implementations[0] for row in comparison.rows} == {"Flax, jitted"}


# Which weights, and which steps


def test_neither_module_is_changed():
    flax, module = NnxBn(), torch_bn().eval()
    module.dense.weight.requires_grad_(False)
    module.bn.weight.grad = torch.ones(4)
    before = jax.tree.map(jnp.copy, nnx.state(flax))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    comparison = compare(flax, module, VECTORS, weights="random", **ONE_STEP)
    assert "Trained here, though PyTorch has them frozen: dense.weight." in comparison.notes
    assert not any(row.name.path == "dense/kernel" for row in failures(comparison)[:2])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(flax), before)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not module.training
    assert not flax.bn.use_running_average
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["dense.weight"]
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert torch.equal(grads.pop("bn.weight"), torch.ones(4))
    assert set(grads.values()) == {None}


@pytest.mark.parametrize("weights", ["torch", "flax", "own", "random"])
def test_the_caller_chooses_the_weights(weights):
    flax, module = nn.Dense(3, use_bias=False), torch.nn.Linear(5, 3, bias=False)
    module.weight.data = torch.full((3, 5), 2.0)
    variables = (
        {"params": {"kernel": jnp.full((5, 3), 3.0)}} if weights in ("flax", "own") else None
    )
    comparison = compare(flax, module, VECTORS, weights=weights, variables=variables, **EVALUATION)
    assert comparison.passed == (weights != "own")
    row = next(row for row in comparison.rows if str(row.name) == "parameter kernel")
    size = row.error.scale
    assert size == {"torch": 2, "flax": 3, "own": 2}.get(weights, size)
    assert weights != "random" or 0 < size < 2
    same = 'Pass weights="random" to draw values for all.'
    assert any(note.endswith(f"noticed: kernel. {same}") for note in comparison.notes) == (
        weights != "random"
    )


def test_only_random_weights_show_that_two_are_exchanged():
    def flax_scales(self, x):
        for name in ("first", "second"):
            x = jnp.tanh(x * self.param(name, nn.initializers.ones, ()))
        return x

    scales = {name: torch.nn.Parameter(torch.ones(())) for name in ("first", "second")}
    exchanged = Torch(
        lambda self, x: torch.tanh(torch.tanh(x * self.second) * self.first), **scales
    )
    output = Tolerance("*gradient*", 1e15, "of which this is not about")
    options = {"tolerances": [output], **EVALUATION}
    assert compare(Flax(flax_scales), exchanged, VECTORS, **options).passed
    assert not compare(Flax(flax_scales), exchanged, VECTORS, weights="random", **options).passed


def test_each_step_may_have_its_own_inputs():
    batches = [VECTORS[:3], VECTORS[3:], VECTORS[:1]]
    dense, linear = nn.Dense(3), torch.nn.Linear(5, 3)
    comparison = assert_parity(dense, linear, VECTORS, steps=batches, eager=False)
    assert list(dict.fromkeys(row.phase for row in comparison.rows)) == [
        "evaluation",
        "training step 1",
        "training step 2",
        "training step 3",
        "evaluation after training",
    ]


# What is refused


class Refused(NamedTuple):
    """A call of `compare` that is refused, and the message, which may stop or begin at `...`."""

    message: str
    flax: object = nn.Dense(3)
    module: object = torch.nn.Linear(5, 3)
    inputs: object = VECTORS
    options: dict[str, Any] = EVALUATION


def misnaming(variables):
    return lambda inputs, *_: {Name("output", "logits"): inputs[0]}


NOT_RANDOM = (
    "Modules must be deterministic, apart from layers of dropout, since the two sides cannot draw "
    "the same random numbers, but "
)
UNLIKE_MASKS = (
    "Dropout gets the same masks on both sides, in the order of its calls, but in training "
)
NO_MASKS = (
    "Set the rate to 0 in Flax and p to 0 in PyTorch, or pass steps=0 to compare the evaluation "
    "alone."
)
DROP = torch.nn.Dropout(0.1)
REFUSED = {
    "inputs in float64": Refused(
        "Inputs and modules must be of one precision, but the inputs are in float64, which is "
        "NumPy's default, and PyTorch's parameters in float32: give inputs.astype(np.float32), "
        "or compare in float64 with torch_module.double().",
        inputs=VECTORS.astype(np.float64),
    ),
    "parameters in float64": Refused(
        "Inputs and modules must be of one precision, but PyTorch's parameters are in float64 "
        "and the inputs in float32: give inputs.astype(np.float64).",
        module=torch.nn.Linear(5, 3).double(),
    ),
    "a list": Refused(
        "inputs must be an array, a tuple of positional arguments, or a dictionary of keyword "
        "arguments, made of arrays, None, numbers, strings, and lists, tuples and dictionaries of "
        "these, but there is a list. Pass np.asarray(x) if it is one input, tuple(x) if it holds "
        "all of them, (x,) if it is the only argument.",
        inputs=[VECTORS],
    ),
    "three axes": Refused(
        "... the input has 3 axes, for which there is no rule...",
        module=torch.nn.Linear(8, 3),
        inputs=SENTENCES,
    ),
    "other outputs": Refused(
        "Both modules must return the same number of arrays, at least one, but in evaluation "
        "Flax's returns 2, of shapes [(6, 5), (6, 5)], and PyTorch's 1, of shapes [(6, 5)]. "
        "Tuples, lists, dictionaries and dataclasses are flattened; if there is anything else, "
        "wrap your module in one that returns a tuple.",
        in_flax(lambda x: (x, x)),
        torch.nn.Identity(),
    ),
    "complex outputs": Refused(
        "Outputs must be real, but there are complex ones, whose gradients the two libraries "
        "define differently. Wrap your modules in modules that return real and imaginary "
        "parts.",
        in_flax(lambda x: x + 1j),
        in_torch(lambda x: x + 1j),
    ),
    "dropout of PyTorch": Refused(
        f"{UNLIKE_MASKS}the masks have the shapes [] in Flax and [(6, 3)] in PyTorch. {NO_MASKS}",
        module=torch.nn.Sequential(OrderedDict(kernel=torch.nn.Linear(5, 3), drop=DROP)),
        options={**ONE_STEP, "names": {"kernel": ""}},
    ),
    "a random function of PyTorch": Refused(
        f"{NOT_RANDOM}PyTorch's module draws random numbers. Switch that off for the comparison, "
        "on both sides.",
        in_flax(lambda x: x),
        Torch(lambda self, x: torch.nn.functional.dropout(x, 0.1, self.training)),
        options=ONE_STEP,
    ),
    "dropout of linen": Refused(
        f"{UNLIKE_MASKS}the masks have the shapes [(6, 5)] in Flax and [] in PyTorch. {NO_MASKS}",
        FlaxWithModes(lambda _, x, t: nn.Dropout(0.1, name="drop")(x, deterministic=not t)),
        torch.nn.Dropout(0.0),
        options=ONE_STEP,
    ),
    "dropout of NNX": Refused(
        f"{UNLIKE_MASKS}the masks have the shapes [(6, 5)] in Flax and [] in PyTorch. {NO_MASKS}",
        nnx.Dropout(0.1, rngs=nnx.Rngs(0)),
        torch.nn.Identity(),
        options=ONE_STEP,
    ),
    "unknown weights": Refused(
        "weights must be 'torch', 'flax', 'own' or 'random', not 'mine'.",
        options={"weights": "mine"},
    ),
    "unused variables": Refused(
        "... but weights are 'torch' and there are some.", options={"variables": {"params": {}}}
    ),
    "no variables": Refused(
        "... but weights are 'own' and there are none.", options={"weights": "own"}
    ),
    "variables of NNX": Refused(
        "An NNX module has its own variables...",
        NnxMlp(),
        torch_mlp(),
        options={"variables": {"params": {}}},
    ),
    "a negative number of steps": Refused(
        "steps must be a number of steps, or a list of the inputs of each, but it is -1.",
        options={"steps": -1},
    ),
    "steps of an array": Refused(
        "steps must be a number of steps, or a list of the inputs of each, but it is of type...",
        options={"steps": VECTORS},
    ),
    "steps with more inputs": Refused(
        "... as many inputs as evaluation has, 1, but steps[0] has 2...",
        options={"steps": [(VECTORS, VECTORS)]},
    ),
    "a tolerance without a reason": Refused(
        "A wider tolerance needs a reason, which the report prints...",
        options={"tolerances": [Tolerance("output", 2)]},
    ),
    "a tolerance of 0": Refused(
        "The factor of a tolerance must be positive, but...",
        options={"tolerances": [Tolerance("output", 0)]},
    ),
    "a tolerance that matches nothing": Refused(
        "... matches none of the arrays compared: ['input gradient', 'output'].",
        *twice(),
        options={"tolerances": [Tolerance("ouput", 0.5)], **EVALUATION},
    ),
    "a lower precision": Refused(
        "... numbers' own, float32, but bfloat16 is less: give a Tolerance, with a reason.",
        options={"precision": jnp.bfloat16},
    ),
    "an oracle with other names": Refused(
        "... shows ['output logits']; they show ['input gradient', 'output'].",
        *twice(),
        options={"oracle": misnaming, **EVALUATION},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(name):
    message, flax, module, inputs, options = REFUSED[name]
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        compare(flax, module, inputs, **options)
