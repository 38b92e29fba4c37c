"""The harness on models that are not ours: it passes equal ones, and names what differs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bcn_flax.interop import RULES, Rule, variables_from_torch
from bcn_flax.interop.layouts import Layout, kernel
from bcn_flax.parity import AXES, CHANNELS, SAME, Tolerance, adam, assert_parity, compare

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(6, 5)).astype(np.float32)
IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)
SENTENCES = RNG.normal(size=(2, 4, 8)).astype(np.float32)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(7, name="hidden")(x), approximate=False)
        return nn.Dense(3, name="out")(x)


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(5, 7, rngs=rngs)
        self.out = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.gelu(self.hidden(x), approximate=False))


class TorchMlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, x):
        return self.out(torch.nn.functional.gelu(self.hidden(x)))


class Cnn(nn.Module):
    momentum: float = 0.99

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, name="bn")
        return nn.relu(norm(x)).mean((1, 2))


class NnxCnn(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x))).mean((1, 2))


class TorchCnn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


class Transformer(nn.Module):
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        normalized = nn.LayerNorm(epsilon=self.epsilon, name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(normalized)
        return x + nn.Dense(8, name="mlp")(nn.relu(x))


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value", "out"):
            self.add_module(name, torch.nn.Linear(8, 8))

    def forward(self, x):
        heads = [getattr(self, n)(x).unflatten(-1, (2, 4)).transpose(1, 2) for n in PROJECTIONS]
        mixed = torch.nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class TorchTransformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = torch.nn.LayerNorm(8), TorchAttention()
        self.mlp = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(torch.relu(x))


PROJECTIONS = ("query", "key", "value")


def of_heads(torch_shape, flax_shape, known):
    """Flax gives the features of attention two axes, which PyTorch has as one."""
    if len(flax_shape) != 3:
        return kernel(torch_shape, flax_shape, known)
    return [
        Layout(
            "transposed, heads apart",
            lambda weight: weight.T.reshape(flax_shape),
            lambda array: array.reshape(torch_shape[::-1]).T,
            lambda _: torch_shape,
        )
    ]


def flat(torch_shape, flax_shape, known):
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


@pytest.mark.parametrize("optimizer", [None, adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("mlp", [Mlp(), NnxMlp(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_equal_networks_agree(mlp, optimizer):
    eager = optimizer is None
    comparison = assert_parity(mlp, TorchMlp(), VECTORS, optimizer=optimizer, eager=eager)
    names = {str(row.name) for row in comparison.rows}
    assert names >= {"output", "input gradient", "gradient hidden/kernel", "parameter out/bias"}
    phases = list(dict.fromkeys(row.phase for row in comparison.rows))
    steps = [f"training step {i}" for i in (1, 2, 3)]
    assert phases == ["evaluation", *steps, "evaluation after training"]
    sides = {"Flax, jitted", "Flax in float64", *(["Flax, eager"] if eager else [])}
    assert {row.sides[0] for row in comparison.rows} == sides
    assert "agree in all of" in str(comparison)


def test_neither_module_is_changed():
    mlp, module = NnxMlp(nnx.Rngs(0)), TorchMlp()
    before = jax.tree.map(jnp.copy, nnx.state(mlp)), {**module.state_dict()}
    before[1].update({k: v.clone() for k, v in before[1].items()})
    compare(mlp, module, VECTORS, eager=False)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(mlp), before[0])
    assert all(torch.equal(v, before[1][k]) for k, v in module.state_dict().items())
    assert module.training
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("cnn", [Cnn(), NnxCnn(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_batch_norms_are_told_apart_by_momentum_and_variance(cnn):
    comparison = compare(cnn, TorchCnn(), IMAGES, eager=False)
    failed = [row for row in comparison.rows if not row.passed]
    assert failed[0].phase == "training step 1"
    assert {row.name.path for row in failed if row.phase == "training step 1"} == {
        "bn/mean",
        "bn/var",
    }
    text = str(comparison)
    assert "bn: momentum is 0.99 in Flax and 0.1 in PyTorch" in text
    assert "n / (n - 1) for n = 72 values: biased in Flax, unbiased in PyTorch" in text
    assert "They differ in float64 as well: this is no rounding" in text


def test_with_the_same_momentum_the_variance_remains():
    comparison = compare(Cnn(momentum=0.9), TorchCnn(), IMAGES, eager=False)
    first = [row for row in comparison.rows if not row.passed and row.phase == "training step 1"]
    assert {row.name.path for row in first} == {"bn/var"}
    assert not any("momentum" in hint for hint in comparison.hints)
    assert any("n = 72" in hint for hint in comparison.hints)


def test_a_transformer_agrees_by_rules_of_the_caller():
    assert_parity(Transformer(), TorchTransformer(), SENTENCES, eager=False, **ATTENTION)


def test_another_epsilon_is_named():
    with pytest.raises(AssertionError, match=r"norm: epsilon is 1e-06 in Flax, and eps 1e-05"):
        assert_parity(
            Transformer(1e-6), TorchTransformer(), SENTENCES, eager=False, steps=1, **ATTENTION
        )


def test_three_axes_want_a_word():
    with pytest.raises(ValueError, match="the input has 3 axes, for which there is no rule"):
        compare(Transformer(), TorchTransformer(), SENTENCES, rules=ATTENTION["rules"])


def test_channels_of_sequences_change_places_if_said_so():
    assert_parity(
        nn.Conv(4, (3,), padding=1, name="conv"),
        torch.nn.Conv1d(8, 4, 3, padding=1),
        SENTENCES,
        axes={**AXES, 3: CHANNELS},
        eager=False,
    )


class LessPrecise(nn.Module):
    """The variance as `E[x^2] - E[x]^2`."""

    @nn.compact
    def __call__(self, x):
        mean = x.mean(0, keepdims=True)
        return (x - mean) / jnp.sqrt((x**2).mean(0, keepdims=True) - mean**2)


class TorchStandardized(torch.nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / x.std(0, correction=0)


def test_the_side_that_rounds_more_is_named():
    comparison = compare(LessPrecise(), TorchStandardized(), VECTORS + 300, eager=False, steps=0)
    output = next(row for row in comparison.rows if str(row.name) == "output")
    assert output.from_truth.farther == "Flax"
    assert output.from_truth.flax > 10 * output.from_truth.torch


class Fixed(nn.Module):
    """Returns what it was made with, whatever it is given."""

    values: tuple[float, ...]

    @nn.compact
    def __call__(self, x):
        return jnp.asarray(self.values)[None] + 0 * x


class TorchFixed(torch.nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, x):
        return torch.tensor(self.values) + 0 * x


@pytest.mark.parametrize(
    ("flax", "torch_values", "differ"),
    [
        ((1.0, np.nan, np.inf), (1.0, np.nan, np.inf), False),
        ((1.0, np.nan, np.inf), (1.0, np.nan, -np.inf), True),
        ((np.nan, 1.0, np.inf), (1.0, np.nan, np.inf), True),
        ((1.0, 2.0, np.inf), (1.0, 2.0, 3.0), True),
    ],
)
def test_what_is_not_finite_is_so_at_the_same_places(flax, torch_values, differ):
    x = np.ones((1, 3), np.float32)
    comparison = compare(Fixed(flax), TorchFixed(torch_values), x, eager=False, steps=0)
    assert comparison.passed != differ
    assert ("is not finite in the same way at" in str(comparison)) == differ


def test_a_small_error_in_one_weight_is_found():
    mlp, module = Mlp(), TorchMlp()
    variables = mlp.init(jax.random.key(0), VECTORS)
    assert_parity(mlp, module, VECTORS, variables=variables, weights="flax", eager=False)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(state | {"out.weight": state["out.weight"] * (1 + 1e-4)})
    variables = variables_from_torch(state, variables)
    with pytest.raises(AssertionError, match="First in the phase: evaluation"):
        assert_parity(mlp, module, VECTORS, variables=variables, weights="own", eager=False)


def test_a_wider_tolerance_needs_a_reason_and_shows_it():
    options = {"eager": False, "steps": 1}
    with pytest.raises(ValueError, match="A wider tolerance needs a reason"):
        compare(Mlp(), TorchMlp(), VECTORS, tolerances=[Tolerance("output", 2)], **options)
    with pytest.raises(ValueError, match="is for none of the numbers compared"):
        compare(Mlp(), TorchMlp(), VECTORS, tolerances=[Tolerance("ouput", 0.5)], **options)
    wide = [Tolerance("statistic bn/*", 1e15, "the two count differently, as is well known")]
    comparison = compare(Cnn(), TorchCnn(), IMAGES, tolerances=wide, **options)
    assert "Tolerance of statistic bn/*: 1e+15 times the usual, as the two count" in str(comparison)
    first = [row for row in comparison.rows if row.phase == "training step 1"]
    assert all(row.passed for row in first)
    assert not comparison.passed  # the evaluation that follows goes by the statistics


def test_a_tighter_tolerance_needs_none():
    tight = [Tolerance("*", 1e-9)]
    comparison = compare(Mlp(), TorchMlp(), VECTORS, tolerances=tight, eager=False, steps=1)
    assert not comparison.passed
    assert any("In float64 they agree" in hint or "float64" in hint for hint in comparison.hints)


def test_dropout_is_refused():
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"no dropout, but there is in PyTorch's 1\. Set its p"):
        compare(nn.Dense(3), module, VECTORS)
