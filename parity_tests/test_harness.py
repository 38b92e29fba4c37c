"""The harness on models that are not ours: it passes equal ones, and names what differs."""

import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from bcn_flax.interop import RULES, Layout, Rule, kernel, variables_from_torch
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

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(6, 5)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
SENTENCES = RNG.normal(size=(2, 4, 8)).astype(np.float32)


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


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 7, rngs=rngs)
        self.out = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.gelu(self.hidden(x), approximate=False))


def flax_mlp(approximate=False):
    def forward(_, x):
        x = nn.gelu(nn.Dense(7, name="hidden")(x), approximate=approximate)
        return nn.Dense(3, name="out")(x)

    return Flax(forward)


def torch_mlp():
    return Torch(
        lambda self, x: self.out(torch.nn.functional.gelu(self.hidden(x))),
        hidden=torch.nn.Linear(5, 7),
        out=torch.nn.Linear(7, 3),
    )


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x))).mean((1, 2))


def flax_cnn(momentum=0.99):
    def forward(_, x, train):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=momentum, name="bn")
        return nn.relu(norm(x)).mean((1, 2))

    return FlaxWithModes(forward)


def torch_cnn():
    return Torch(
        lambda self, x: torch.relu(self.bn(self.conv(x))).mean((2, 3)),
        conv=torch.nn.Conv2d(3, 4, 3, padding=1),
        bn=torch.nn.BatchNorm2d(4),
    )


def flax_transformer(epsilon=1e-5):
    def forward(_, x):
        normalized = nn.LayerNorm(epsilon=epsilon, name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(normalized)
        return x + nn.Dense(8, name="mlp")(nn.relu(x))

    return Flax(forward)


def torch_transformer():
    def attention(self, x):
        heads = [
            project(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        ]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(torch.relu(x))

    projections = {name: torch.nn.Linear(8, 8) for name in ("query", "key", "value", "out")}
    return Torch(
        forward,
        norm=torch.nn.LayerNorm(8),
        attention=Torch(attention, **projections),
        mlp=torch.nn.Linear(8, 8),
    )


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


ATTENTION = {
    "rules": {
        **RULES,
        ("params", "kernel"): Rule(("weight",), of_heads),
        ("params", "bias"): Rule(("bias",), flat),
    },
    "axes": {**AXES, 3: SAME},
}
QUICK = {"eager": False, "steps": 1}
QUICKEST = {"eager": False, "steps": 0}


def failures(comparison):
    return [row for row in comparison.rows if not row.passed]


def first_failures(comparison):
    """The first phase in which something differs, and what does."""
    failed = failures(comparison)
    return failed[0].phase, {str(row.name) for row in failed if row.phase == failed[0].phase}


# Equal models


@pytest.mark.parametrize(
    ("mlp", "optimizer"), [(flax_mlp(), None), (NnxMlp(nnx.Rngs(0)), adam())], ids=["linen", "nnx"]
)
def test_equal_networks_agree(mlp, optimizer):
    comparison = assert_parity(mlp, torch_mlp(), VECTORS, optimizer=optimizer)
    names = {str(row.name) for row in comparison.rows}
    parameters = ("hidden/kernel", "hidden/bias", "out/kernel", "out/bias")
    quantities = (f"{q} {p}" for q in ("gradient", "parameter") for p in parameters)
    assert names == {"output", "input gradient", *quantities}
    phases = list(dict.fromkeys(row.phase for row in comparison.rows))
    steps = [f"training step {i}" for i in (1, 2, 3)]
    assert phases == ["evaluation", *steps, "evaluation after training"]
    assert list(dict.fromkeys(row.implementations for row in comparison.rows)) == [
        ("Flax, jitted", "PyTorch"),
        ("Flax, eager", "PyTorch"),
        ("Flax in float64", "PyTorch in float64"),
    ]
    assert str(comparison).startswith("Flax and PyTorch agree in all of 150 comparisons.")


def test_a_transformer_agrees_by_rules_of_the_caller():
    assert_parity(flax_transformer(), torch_transformer(), SENTENCES, **QUICK, **ATTENTION)


def test_channels_of_sequences_change_places_if_said_so():
    conv, torch_conv = nn.Conv(4, (3,), padding=1), torch.nn.Conv1d(8, 4, 3, padding=1)
    assert_parity(conv, torch_conv, SENTENCES, axes={**AXES, 3: CHANNELS}, **QUICK)
    with pytest.raises(ValueError, match="the input has 3 axes, for which there is no rule"):
        compare(conv, torch_conv, SENTENCES)


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


TOKENS = np.array([[0, 3, 3], [1, 2, 0]])
INPLACE = torch.nn.Sequential(torch.nn.ReLU(inplace=True))
STRUCTURES = {
    "tied weights": (Flax(tied_flax), tied_torch(), VECTORS),
    "an unused parameter": (Flax(unused_flax), unused_torch(), VECTORS),
    "no parameters": (Flax(lambda _, x: jnp.tanh(x)), torch.nn.Tanh(), VECTORS),
    "a scalar": (
        Flax(lambda _, x: (x**2).mean()),
        Torch(lambda _, x: (x**2).mean()),
        VECTORS,
    ),
    "tuples": (
        Flax(lambda _, x, y: (x * y, {"b": x + y, "a": x - y})),
        Torch(lambda _, x, y: (x * y, {"a": x - y, "b": x + y})),
        (VECTORS, VECTORS + 1),
    ),
    "named tuples": (
        Flax(lambda _, x: Pair(x, 2 * x)),
        Torch(lambda self, x: self.inner(x), inner=Torch(lambda _, x: Pair(x, 2 * x))),
        VECTORS,
    ),
    "tokens": (nn.Embed(4, 5), torch.nn.Embedding(4, 5), TOKENS),
    "whole numbers": (
        Flax(lambda _, x: (x.argmax(-1), x > 0)),
        Torch(lambda _, x: (x.argmax(-1), x > 0)),
        VECTORS,
    ),
    "inputs that are written to": (Flax(lambda _, x: nn.relu(x)), INPLACE, VECTORS),
    "PyTorch's inputs": (nn.Dense(3), torch.nn.Linear(5, 3), torch.from_numpy(VECTORS)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_models_of_any_structure_agree(structure):
    flax, module, inputs = STRUCTURES[structure]
    assert_parity(flax, module, inputs, axes={**AXES, 3: SAME}, **QUICK)


def test_without_gradients_around_it_all_is_the_same():
    with torch.no_grad():
        assert_parity(nn.Dense(3), torch.nn.Linear(5, 3), VECTORS, **QUICK)


def test_half_precision_agrees_without_a_word():
    inputs = VECTORS.astype(jnp.bfloat16)
    dense, linear = nn.Dense(3, dtype=jnp.bfloat16), torch.nn.Linear(5, 3).bfloat16()
    comparison = assert_parity(dense, linear, inputs, **QUICK)
    assert {row.implementations[0] for row in comparison.rows} == {"Flax, jitted"}
    assert any(
        note.startswith("Given float64, Flax still computes in a narrower type somewhere")
        for note in comparison.notes
    )


def test_what_upcasts_is_not_taken_for_wrong_in_float64():
    def flax_norm(self, x):
        wide = x.astype(jnp.float32)
        return (wide / jnp.sqrt((wide**2).mean(-1, keepdims=True))).astype(x.dtype)

    def torch_norm(_, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)

    comparison = assert_parity(Flax(flax_norm), Torch(torch_norm), VECTORS, **QUICKEST)
    assert comparison.notes[0].startswith("Given float64, Flax and PyTorch still compute ")


@pytest.mark.parametrize("mean", [0, 100])
def test_adam_may_do_what_it_likes_where_a_gradient_is_0_but_for_rounding(mean):
    """A bias ahead of a norm by the batch, whose statistics are kept where nobody sees them."""

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
    opened = Flax(lambda _, x: nn.relu(x[:, 0] + x[:, 1] - x[:, 2]))
    closed = Torch(lambda _, x: torch.relu(x[:, 0] + (x[:, 1] - x[:, 2])))
    comparison = assert_parity(opened, closed, x, **QUICKEST)
    gradient = next(row for row in comparison.rows if str(row.name) == "input gradient")
    assert gradient.error.relative.error == 1


# What is different is found where it is


@pytest.mark.parametrize("cnn", [flax_cnn(), NnxCnn(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_batch_norms_are_told_apart_by_momentum_and_variance(cnn):
    comparison = compare(cnn, torch_cnn(), IMAGES, eager=False, steps=2)
    phase, names = first_failures(comparison)
    assert (phase, names) == ("training step 1", {"statistic bn/mean", "statistic bn/var"})
    assert comparison.hints == (
        "bn: momentum is 0.99 in Flax and 0.1 in PyTorch, where it is the weight of the new value: "
        "0.9 in Flax's words.",
        "bn/var converges to 1.01408 times Flax's value in PyTorch, which is n / (n - 1) for n = "
        "72 values: biased in Flax, unbiased in PyTorch.",
        "They differ in float64 as well: the cause is not rounding, they compute different things.",
    )


def test_with_the_same_momentum_the_variance_remains():
    comparison = compare(flax_cnn(momentum=0.9), torch_cnn(), IMAGES, **QUICK)
    assert first_failures(comparison) == ("training step 1", {"statistic bn/var"})
    assert [hint.startswith("bn/var converges to 1.01408 times") for hint in comparison.hints] == [
        True,
        False,
    ]


def test_settings_that_nothing_shows_yet_are_named():
    comparison = assert_parity(flax_cnn(), torch_cnn(), IMAGES, **QUICKEST)
    assert "They agree, but their settings differ:\n  - bn: momentum is 0.99" in str(comparison)


def test_another_epsilon_is_named_and_where_it_shows_first():
    flax, module = flax_transformer(1e-6), torch_transformer()
    with pytest.raises(AssertionError) as caught:
        assert_parity(flax, module, SENTENCES, weights="random", **QUICKEST, **ATTENTION)
    message = str(caught.value)
    assert "norm: epsilon is 1e-06 in Flax, and eps 1e-05 in PyTorch." in message
    assert "In evaluation and training, the first module whose output differs is norm." in message


@pytest.mark.parametrize(
    "mlp", [flax_mlp(approximate=True), NnxMlp(nnx.Rngs(0))], ids=["linen", "nnx"]
)
def test_the_first_module_that_differs_is_named(mlp):
    module = torch_mlp()
    if isinstance(mlp, NnxMlp):
        module.function = lambda self, x: self.out(torch.relu(self.hidden(x)))
    comparison = compare(mlp, module, VECTORS, **QUICKEST)
    assert comparison.hints[0] == (
        "In evaluation and training, the first module whose output differs is out; the last one "
        "before it that agrees is hidden."
    )


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


ADAMW = Optimizer(optax.adamw(0.1), lambda p: torch.optim.AdamW(p, 0.1))  # weight decay 1e-4, 1e-2
COUNTED = FlaxWithModes(counted)
OF_OUTPUT = {"output", "input gradient", "gradient gain"}
DIFFERENCES = {
    "only in evaluation": (COUNTED, TorchCounted((2, 1)), {}, "evaluation", OF_OUTPUT),
    "only in training": (
        COUNTED,
        TorchCounted((1, 2)),
        {},
        "training step 1",
        {*OF_OUTPUT, "parameter gain"},
    ),
    "only in a statistic": (
        FlaxWithModes(lambda self, x, train: counted(self, x, train, by=1.1)),
        TorchCounted(),
        {},
        "training step 1",
        {"statistic mean"},
    ),
    "only in an input's gradient": (
        FlaxWithModes(lambda self, x, train: counted(self, doubled_gradient(x), train)),
        TorchCounted(),
        {},
        "evaluation",
        {"input gradient"},
    ),
    "only in a parameter's gradient": (
        FlaxWithModes(lambda self, x, train: counted(self, x, train, of_gain=doubled_gradient)),
        TorchCounted(),
        {},
        "evaluation",
        {"gradient gain"},
    ),
    "only after the optimizer": (
        COUNTED,
        TorchCounted(),
        {"optimizer": ADAMW},
        "training step 1",
        {"parameter gain"},
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_found_where_it_is(difference):
    flax, module, options, phase, names = DIFFERENCES[difference]
    comparison = compare(flax, module, VECTORS, **QUICK, **options)
    assert first_failures(comparison) == (phase, names)
    by_optimizer = any("the two optimizers differ" in hint for hint in comparison.hints)
    assert by_optimizer == (difference == "only after the optimizer")


def test_a_constant_in_float32_is_told_from_another_formula():
    """Both multiply by 0.1, and only one rounds it, which only float64 shows."""
    flax = Flax(lambda _, x: x * jnp.asarray(np.float32(0.1)))
    comparison = compare(flax, Torch(lambda _, x: x * 0.1), VECTORS, **QUICKEST)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax in float64"}
    assert comparison.hints[0].startswith(
        "They differ in float64 as well, but no more than by roundings of float32: a small constant"
    )


def test_training_that_blows_up_is_noticed():
    flax, module = flax_mlp(approximate=True), torch_mlp()
    comparison = compare(flax, module, VECTORS, optimizer=sgd(1e5), **QUICK)
    diverges = r"Training diverges: .* grows to .* times its size, and every rounding error grows"
    assert any(re.match(diverges, hint) for hint in comparison.hints)


# Which side is less accurate


def standardized(correction):
    """The variance as `E[x^2] - E[x]^2` in Flax and by the book in PyTorch."""

    def less_precise(_, x):
        mean = x.mean(0, keepdims=True)
        return (x - mean) / jnp.sqrt((x**2).mean(0, keepdims=True) - mean**2 + correction)

    return Flax(less_precise), Torch(lambda _, x: (x - x.mean(0)) / x.std(0, correction=0))


def more_precise():
    """The other way round."""

    def less_precise(_, x):
        return (x - x.mean(0)) / (x.square().mean(0) - x.mean(0).square()).sqrt()

    def by_the_book(_, x):
        x = x - x.mean(0, keepdims=True)
        return x / jnp.sqrt((x**2).mean(0, keepdims=True))

    return Flax(by_the_book), Torch(less_precise)


@pytest.mark.parametrize(
    ("sides", "farther"), [(standardized(0), "Flax"), (more_precise(), "PyTorch")]
)
def test_the_side_that_rounds_more_is_named(sides, farther):
    comparison = compare(*sides, VECTORS + 300, **QUICKEST)
    output = next(row for row in comparison.rows if str(row.name) == "output")
    assert not output.passed
    assert output.accuracy.less_accurate == farther
    assert max(output.accuracy) > 10 * min(output.accuracy)
    assert f"; {farther} is less accurate" in str(comparison)
    assert comparison.hints[-1].startswith("In float64 they agree to its precision")


def test_where_formulas_differ_nobody_is_said_to_be_nearer():
    comparison = compare(*standardized(0.1), VECTORS, **QUICKEST)
    assert not comparison.passed
    assert all(row.accuracy is None for row in comparison.rows)


class Doubled:
    """The truth of `2 * x`, as far as it is told."""

    def __init__(self, quantities=("output", "input gradient"), factor=2.0):
        self.quantities, self.factor = quantities, factor

    def __call__(self, variables):
        return self.side

    def side(self, inputs, output_gradients, train):
        (x,), (dy,) = inputs, output_gradients
        assert x.dtype == dy.dtype == np.float64
        seen = observation({"": self.factor * x}, {"": self.factor * dy}, {}, {})
        return {name: value for name, value in seen.items() if name.quantity in self.quantities}


def twice(by=2.0):
    return Flax(lambda _, x: by * x), Torch(lambda _, x: 2 * x)


def test_an_oracle_judges_both():
    comparison = assert_parity(*twice(), VECTORS, oracle=Doubled(), **QUICK)
    assert {row.implementations for row in comparison.rows} == {
        ("Flax, jitted", "the oracle"),
        ("PyTorch", "the oracle"),
    }
    comparison = compare(*twice(2.1), VECTORS, oracle=Doubled(), **QUICK)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax, jitted"}
    assert all(row.accuracy.less_accurate == "Flax" for row in failures(comparison))
    comparison = compare(*twice(), VECTORS, oracle=Doubled(factor=3.0), **QUICKEST)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax, jitted", "PyTorch"}
    assert {row.accuracy.less_accurate for row in comparison.rows if row.accuracy} == {"neither"}


def test_what_the_oracle_does_not_show_is_compared_all_the_same():
    oracle = Doubled(quantities=["output"])
    flax = Flax(lambda _, x: 2 * doubled_gradient(x))
    comparison = compare(flax, twice()[1], VECTORS, oracle=oracle, **QUICKEST)
    failed = failures(comparison)
    assert [(row.implementations, str(row.name)) for row in failed] == [
        (("Flax, jitted", "PyTorch"), "input gradient")
    ]


def test_an_oracle_must_show_what_there_is():
    def misnaming(variables):
        return lambda inputs, *_: {Name("output", "logits"): inputs[0]}

    problem = r"shows \['output logits'\]; they show \['input gradient', 'output'\]"
    with pytest.raises(ValueError, match=problem):
        compare(*twice(), VECTORS, oracle=misnaming, **QUICKEST)


# Numbers that are not finite, and shapes


def fixed(values):
    """Returns these values, whatever it is given."""
    values = np.asarray([values], np.float32)
    return Flax(lambda _, x: values + 0 * x), Torch(lambda _, x: torch.tensor(values) + 0 * x)


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
def test_what_is_not_finite_is_so_at_the_same_places(flax, module, mismatch):
    x = np.ones((1, 3), np.float32)
    comparison = compare(fixed(flax)[0], fixed(module)[1], x, **QUICKEST)
    assert comparison.passed == (mismatch is None)
    if mismatch:
        assert f"output: is not finite in the same way at {mismatch}" in str(comparison)


def test_outputs_of_other_shapes_are_no_more_than_that():
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
    text = str(compare(flax, module, np.ones((1, 3), np.float32), **QUICKEST))
    table = text[text.index("Flax, jitted, against PyTorch:\n        ") :].splitlines()
    assert [" ".join(line.split()) for line in table[2:6]] == [
        "output absolute 0.5 evaluation, output (0, 1)",
        "relative 0.333 evaluation, output (0, 2)",
        "ulps 4.29e+06 evaluation, output (0, 2)",
        "of allowed 1.5e+03 times evaluation, output (0, 1)",
    ]


# Tolerances


def test_a_small_error_in_one_weight_is_found():
    flax, module = flax_mlp(), torch_mlp()
    variables = variables_from_torch(module, flax.init(jax.random.key(0), VECTORS))
    variables["params"]["out"]["kernel"] = variables["params"]["out"]["kernel"].at[2, 1].mul(1.0001)
    comparison = compare(flax, module, VECTORS, variables=variables, weights="own", **QUICKEST)
    assert first_failures(comparison) == ("initial weights", {"parameter out/kernel"})
    assert {
        row.implementations[0] for row in failures(comparison) if str(row.name) == "output"
    } == {
        "Flax, jitted",
        "Flax in float64",
    }


def test_a_wider_tolerance_needs_a_reason_and_shows_it():
    with pytest.raises(ValueError, match="A wider tolerance needs a reason, which the report"):
        compare(*twice(), VECTORS, tolerances=[Tolerance("output", 2)])
    with pytest.raises(ValueError, match="The factor of a tolerance must be positive, but"):
        compare(*twice(), VECTORS, tolerances=[Tolerance("output", 0)])
    with pytest.raises(ValueError, match="compared: \\['input gradient', 'output'\\]"):
        compare(*twice(), VECTORS, tolerances=[Tolerance("ouput", 0.5)], **QUICKEST)
    wide = [Tolerance("statistic bn/*", 1e15, "the two count differently, as is well known")]
    comparison = compare(flax_cnn(), torch_cnn(), IMAGES, tolerances=wide, **QUICK)
    assert "Tolerance of statistic bn/*: 1e+15 times the usual, as the two count" in str(comparison)
    # The evaluation that follows goes by the statistics.
    phase, names = first_failures(comparison)
    assert phase == "evaluation after training"
    assert names > {"output", "input gradient"}


def test_a_tighter_tolerance_needs_none():
    flax, module = flax_mlp(), torch_mlp()
    tight = [Tolerance("*", 1e-9), Tolerance("gradient *", 1.0)]
    comparison = compare(flax, module, VECTORS, tolerances=tight, **QUICKEST)
    assert {row.name.quantity for row in failures(comparison)} == {"output", "input gradient"}


def test_precision_may_be_tightened_and_not_loosened():
    x = VECTORS.astype(jnp.bfloat16)
    twice_rounded = Flax(lambda _, x: (x * jnp.bfloat16(1.1)) * jnp.bfloat16(1.1))
    once = Torch(lambda _, x: (x.float() * float(jnp.bfloat16(1.1)) ** 2).bfloat16())
    assert compare(twice_rounded, once, x, **QUICKEST).passed
    assert not compare(twice_rounded, once, x, precision=np.float32, **QUICKEST).passed
    with pytest.raises(ValueError, match="numbers' own, float32, but bfloat16 is less: give a Tol"):
        compare(*twice(), VECTORS, precision=jnp.bfloat16)


# Whose weights, and which steps


def test_neither_module_is_changed():
    flax, module = NnxCnn(nnx.Rngs(0)), torch_cnn().eval()
    module.conv.weight.requires_grad_(False)
    module.bn.weight.grad = torch.ones(4)
    before = jax.tree.map(jnp.copy, nnx.state(flax))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    comparison = compare(flax, module, IMAGES, weights="random", **QUICK)
    assert "Trained here, though PyTorch has them frozen: conv.weight." in comparison.notes
    assert not any(row.name.path == "conv/kernel" for row in failures(comparison)[:2])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(flax), before)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not module.training
    assert not flax.bn.use_running_average
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["conv.weight"]
    grads = {name: p.grad for name, p in module.named_parameters()}
    assert torch.equal(grads.pop("bn.weight"), torch.ones(4))
    assert set(grads.values()) == {None}


def begun_with(comparison, name):
    """The size of a parameter at the beginning."""
    row = next(row for row in comparison.rows if str(row.name) == name)
    return row.error.scale


@pytest.mark.parametrize("weights", ["torch", "flax", "own", "random"])
def test_the_weights_are_whose_they_are_said_to_be(weights):
    flax, module = nn.Dense(3, use_bias=False), torch.nn.Linear(5, 3, bias=False)
    module.weight.data = torch.full((3, 5), 2.0)
    variables = (
        {"params": {"kernel": jnp.full((5, 3), 3.0)}} if weights in ("flax", "own") else None
    )
    comparison = compare(
        flax, module, VECTORS, weights=weights, variables=variables, tolerances=(), **QUICKEST
    )
    assert comparison.passed == (weights != "own")
    size = begun_with(comparison, "parameter kernel")
    assert size == {"torch": 2, "flax": 3, "own": 2}.get(weights, size)
    assert weights != "random" or 0 < size < 2
    same = 'Pass weights="random" to draw values for all.'
    assert any(note.endswith(f"noticed: kernel. {same}") for note in comparison.notes) == (
        weights != "random"
    )


def test_only_random_weights_show_that_two_are_mixed_up():
    def flax_scales(self, x):
        for name in ("first", "second"):
            x = jnp.tanh(x * self.param(name, nn.initializers.ones, ()))
        return x

    scales = {name: torch.nn.Parameter(torch.ones(())) for name in ("first", "second")}
    mixed_up = Torch(lambda self, x: torch.tanh(torch.tanh(x * self.second) * self.first), **scales)
    output = Tolerance("*gradient*", 1e15, "of which this is not about")
    options = {"tolerances": [output], **QUICKEST}
    assert compare(Flax(flax_scales), mixed_up, VECTORS, **options).passed
    assert not compare(Flax(flax_scales), mixed_up, VECTORS, weights="random", **options).passed


def test_weights_are_said_in_one_way():
    module, variables = torch.nn.Linear(5, 3), {"params": {}}
    with pytest.raises(ValueError, match="must be 'torch', 'flax', 'own' or 'random', not 'mine'"):
        compare(nn.Dense(3), module, VECTORS, weights="mine")
    with pytest.raises(ValueError, match="but weights are 'torch' and there are some"):
        compare(nn.Dense(3), module, VECTORS, variables=variables)
    with pytest.raises(ValueError, match="but weights are 'own' and there are none"):
        compare(nn.Dense(3), module, VECTORS, weights="own")
    with pytest.raises(ValueError, match="An NNX module has its own variables"):
        compare(NnxMlp(nnx.Rngs(0)), torch_mlp(), VECTORS, variables=variables)


def test_each_step_may_have_its_own_inputs():
    batches = [VECTORS[:3], VECTORS[3:], VECTORS[:1]]
    comparison = assert_parity(
        nn.Dense(3), torch.nn.Linear(5, 3), VECTORS, steps=batches, eager=False
    )
    assert list(dict.fromkeys(row.phase for row in comparison.rows)) == [
        "evaluation",
        "training step 1",
        "training step 2",
        "training step 3",
        "evaluation after training",
    ]
    module = torch.nn.Linear(5, 3)
    for steps, problem in (
        (-1, "steps must be a number of steps, or a list of the inputs of each, but it is -1."),
        (
            VECTORS,
            "steps must be a number of steps, or a list of the inputs of each, but it is of type",
        ),
        ([(VECTORS, VECTORS)], "as many inputs as evaluation has, 1, but steps[0] has 2."),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)):
            compare(nn.Dense(3), module, VECTORS, steps=steps)


# What cannot be compared


@pytest.mark.parametrize(
    ("flax", "module", "inputs", "problem"),
    [
        (
            nn.Dense(3),
            torch.nn.Linear(5, 3),
            VECTORS.astype(np.float64),
            "Inputs and modules must be of one precision, but the inputs are in float64, which is "
            "NumPy's default, and PyTorch's parameters in float32: give inputs.astype(np.float32), "
            "or compare in float64 with torch_module.double().",
        ),
        (
            nn.Dense(3),
            torch.nn.Linear(5, 3).double(),
            VECTORS,
            "Inputs and modules must be of one precision, but PyTorch's parameters are in float64 "
            "and the inputs in float32: give inputs.astype(np.float64).",
        ),
        (
            nn.Dense(3),
            torch.nn.Linear(5, 3),
            [VECTORS],
            "inputs must be an array, or a tuple of arrays if there are several, but there is a "
            "list. Pass np.asarray(x) if it is one input, tuple(x) if it holds all of them; if the "
            "inputs have names, wrap your module in one that takes a tuple.",
        ),
        (
            Flax(lambda _, x: (x, x)),
            torch.nn.Identity(),
            VECTORS,
            "Both modules must return the same number of arrays, at least one, but Flax's returns "
            "2, of shapes [(6, 5), (6, 5)], and PyTorch's 1, of shapes [(6, 5)]. Tuples, lists and "
            "dictionaries are flattened; if there is anything else, wrap your module in one that "
            "returns a tuple.",
        ),
        (
            Flax(lambda _, x: x + 1j),
            Torch(lambda _, x: x + 1j),
            VECTORS,
            "Outputs must be real, but there are complex ones, whose gradients the two libraries "
            "define differently. Wrap your modules in modules that return real and imaginary "
            "parts.",
        ),
    ],
    ids=["float64", "float32", "list", "outputs", "complex"],
)
def test_what_cannot_be_compared_is_refused(flax, module, inputs, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        compare(flax, module, inputs)


def test_modules_of_float64_are_compared_in_it():
    x = VECTORS.astype(np.float64)
    comparison = assert_parity(nn.Dense(3), torch.nn.Linear(5, 3).double(), x, **QUICKEST)
    assert {row.dtype for row in comparison.rows} == {np.dtype(np.float64)}
    assert {row.implementations[0] for row in comparison.rows} == {"Flax, jitted"}


NOT_RANDOM = (
    "Modules must be deterministic, since the two sides cannot draw the same random numbers, but"
)


@pytest.mark.parametrize(
    ("flax", "module", "problem"),
    [
        (
            nn.Dense(3),
            torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Dropout(0.1)),
            "PyTorch's module has dropout in 1. Set p to 0 there, and the rate to 0 in Flax.",
        ),
        (
            Flax(lambda _, x: x),
            Torch(lambda self, x: torch.nn.functional.dropout(x, 0.1, self.training)),
            "PyTorch's module draws random numbers. Switch that off for the comparison, on both "
            "sides.",
        ),
        (
            FlaxWithModes(lambda _, x, t: nn.Dropout(0.1, name="drop")(x, deterministic=not t)),
            torch.nn.Dropout(0.0),
            "Flax's module has dropout in drop. Set the rate to 0 there, and p to 0 in PyTorch.",
        ),
        (
            nnx.Dropout(0.1, rngs=nnx.Rngs(0)),
            torch.nn.Identity(),
            "Flax's module has dropout in the module itself. Set the rate to 0 there, and p to 0 "
            "in PyTorch.",
        ),
    ],
    ids=["PyTorch's", "PyTorch's function", "linen's", "NNX's"],
)
def test_dropout_is_refused(flax, module, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(f'{NOT_RANDOM} {problem}')}$"):
        compare(flax, module, VECTORS)
