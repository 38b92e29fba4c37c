"""The harness on small models: it passes equal ones, and finds and explains every difference."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bcn_flax.interop import RULES, Layout, Rule, kernel
from bcn_flax.parity import (
    AXES,
    CHANNELS,
    SAME,
    Tolerance,
    adam,
    assert_parity,
    compare,
    observation,
)
from bcn_flax.parity.pair import module_pair
from parity_tests.small_models import (
    EVALUATION,
    ONE_STEP,
    SENTENCES,
    TOKENS,
    VECTORS,
    Flax,
    FlaxWithModes,
    NnxBn,
    NnxMlp,
    Torch,
    doubled_gradient,
    failures,
    first_failures,
    flax_bn,
    flax_mlp,
    in_flax,
    in_torch,
    torch_bn,
    torch_mlp,
    twice,
)

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seeded():
    """The same initial weights in every run."""
    torch.manual_seed(0)


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
