"""Three verdicts: equal, different, inconclusive; each only if the evidence suffices."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.interpreters import mlir

from bcn_flax.parity import SAME, Tolerance, adam, assert_parity, compare
from bcn_flax.parity.errors import Worst
from parity_tests.model_pairs import defective_pairs, random_pair, vit
from parity_tests.small_models import (
    EVALUATION,
    ONE_STEP,
    SENTENCES,
    VECTORS,
    Flax,
    Torch,
    in_flax,
    in_torch,
)

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seeded():
    """The same initial weights in every run."""
    torch.manual_seed(0)


def implementations(comparison):
    return {row.implementations for row in comparison.rows}


def first_failure(comparison):
    return next(row for row in comparison.rows if not row.passed)


# Defects that float32 hides


def fresh_mlp(approximate):
    """Its layers compute in float32; their inputs are small, as those of fresh layers."""

    def forward(_, x):
        x = nn.Dense(8, dtype=jnp.float32, name="hidden")(x)
        return nn.Dense(3, dtype=jnp.float32, name="out")(nn.gelu(x, approximate=approximate))

    def torch_forward(self, x):
        return self.out(torch.nn.functional.gelu(self.hidden(x)))

    module = Torch(torch_forward, hidden=torch.nn.Linear(5, 8), out=torch.nn.Linear(8, 3))
    module.hidden.weight.data *= 0.1
    module.hidden.bias.data *= 0
    return Flax(forward), module


def norm(epsilon):
    module = torch.nn.LayerNorm(5, eps=1e-12)
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32), module


class NnxAttention(nnx.Module):
    """With a dtype of float32 in all its parts."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(2, 8, dtype=jnp.float32, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x)


class TorchAttention(torch.nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.axis = axis
        for name in ("query", "key", "value", "out"):
            setattr(self, name, torch.nn.Linear(8, 8))

    def forward(self, x):
        q, k, v = (
            project(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-1, -2) / 2).softmax(self.axis)
        return self.out((scores @ v).transpose(1, 2).flatten(-2))


def attention(axis):
    return NnxAttention(), Torch(lambda self, x: self.attention(x), attention=TorchAttention(axis))


HIDDEN = {
    "GELU": (fresh_mlp(approximate=False), fresh_mlp(approximate=True), VECTORS),
    "epsilon": (norm(1e-12), norm(1e-6), VECTORS),
    "the axis of a softmax": (attention(-1), attention(-2), SENTENCES),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_defect_is_found_in_float64_though_layers_have_a_dtype_of_float32(name):
    equal, different, inputs = HIDDEN[name]
    options = {"axes": {3: SAME}, **EVALUATION}
    assert_parity(*equal, inputs, **options)
    comparison = compare(*different, inputs, **options)
    assert comparison.verdict == "different"
    wide = [row for row in comparison.rows if row.implementations[0] == "Flax in float64"]
    assert any(row.worst.error > 1e4 for row in wide)


def test_a_fresh_gelu_hides_in_float32():
    """So float64 is what finds it."""
    comparison = compare(*fresh_mlp(approximate=True), VECTORS, **EVALUATION)
    assert {row.implementations[0] for row in comparison.rows if not row.passed} == {
        "Flax in float64"
    }


class OnlyFloat32(nn.Module):
    """It accepts no other dtype."""

    approximate: bool
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        if self.dtype != jnp.float32:
            raise TypeError("It must be float32.")
        x = nn.Dense(8, name="hidden")(x.astype(self.dtype))
        return nn.Dense(3, name="out")(nn.gelu(x, approximate=self.approximate))


def test_a_module_that_accepts_one_dtype_is_compared_in_float64():
    module = fresh_mlp(False)[1]
    assert compare(OnlyFloat32(False), module, VECTORS, **EVALUATION).verdict == "equal"
    comparison = compare(OnlyFloat32(True), module, VECTORS, **EVALUATION)
    assert {row.implementations[0] for row in comparison.rows if not row.passed} == {
        "Flax in float64"
    }


# `benchmarks/harness.py` tries all of them, and 200 random models.
DEFECTIVE = {pair.name: pair for pair in list(defective_pairs())[1::12]}


@pytest.mark.slow
def test_a_small_vit_is_equal_to_itself():
    assert vit("nnx").compare().verdict == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTIVE)
def test_a_defect_of_a_small_vit_bert_or_resnet_is_found(name):
    comparison = DEFECTIVE[name].compare()
    assert comparison.verdict == "different"
    assert comparison.hints


# Of all kinds of layers, and quick to compile.
@pytest.mark.parametrize("seed", [3, 5, 14, pytest.param(16, marks=pytest.mark.slow)])
def test_equal_models_of_a_random_architecture_are_called_equal(seed):
    comparison = random_pair(seed).compare()
    assert comparison.verdict == "equal", str(comparison)


# PyTorch in float64


def torch_casts(x):
    wide = x.float() + torch.full((5,), 0.1)
    ones = torch.ones(5, dtype=torch.float32)
    return (torch.softmax(wide, -1, dtype=torch.float32) / 3 * ones).to(torch.bfloat16).to(x.dtype)


def test_what_pytorch_narrows_is_computed_in_float64():
    flax = in_flax(lambda x: (jax.nn.softmax(x + 0.1) / 3).astype(jnp.bfloat16).astype(x.dtype))
    comparison = assert_parity(flax, in_torch(torch_casts), VECTORS, **EVALUATION)
    wide = [row for row in comparison.rows if row.implementations[0] == "Flax in float64"]
    assert max(row.error.absolute.error for row in wide) < 1e-15
    assert torch.get_default_dtype() == torch.float32


def test_the_gradient_of_a_key_s_bias_is_0_but_for_roundings():
    """The softmax removes the bias, so that only the terms of the gradient say how large it is."""
    options = {"optimizer": adam(), "axes": {3: SAME}}
    comparison = assert_parity(*attention(-1), SENTENCES, **options, **ONE_STEP)
    names = {str(row.name) for row in comparison.rows}
    assert "gradient attention/key/bias" in names


# Inconclusive

only_float32 = jax.extend.core.Primitive("only_float32")


@only_float32.def_abstract_eval
def _(x):
    if x.dtype != np.float32:
        raise TypeError(f"it takes float32, not {x.dtype}")
    return x


mlir.register_lowering(only_float32, mlir.lower_fun(lambda x: 2 * x, multiple_results=False))


@jax.custom_vjp
def twice_in_float32(x):
    return only_float32.bind(x.astype(jnp.float32)).astype(x.dtype)


twice_in_float32.defvjp(lambda x: (twice_in_float32(x), None), lambda _, dy: (2 * dy,))


def test_without_float64_a_comparison_is_inconclusive_and_says_what_is_missing():
    modules = in_flax(twice_in_float32), in_torch(lambda x: 2 * x)
    comparison = compare(*modules, VECTORS, **EVALUATION)
    assert comparison.verdict == "inconclusive"
    assert not comparison.passed
    assert all(row.passed for row in comparison.rows)
    assert implementations(comparison) == {("Flax, jitted", "PyTorch")}
    message = str(comparison)
    assert message.startswith("Inconclusive: no difference was found in 2 comparisons")
    assert (
        "There is no comparison in float64, which tells other formulas from roundings, because "
        "Flax's only_float32 cannot be computed in float64: it takes float32, not float64. Replace "
        "that in the module, or pass an `oracle`, which computes the expected values in float64."
    ) in message
    assert "agree" not in message
    with pytest.raises(AssertionError, match=r"(?s)^Inconclusive: .*allow_inconclusive=True"):
        assert_parity(*modules, VECTORS, **EVALUATION)
    accepted = assert_parity(*modules, VECTORS, allow_inconclusive=True, **EVALUATION)
    assert accepted.verdict == "inconclusive"


def test_a_difference_is_never_allowed_as_inconclusive():
    modules = in_flax(twice_in_float32), in_torch(lambda x: 2.1 * x)
    with pytest.raises(AssertionError, match=r"^Flax and PyTorch differ in 2 of 2"):
        assert_parity(*modules, VECTORS, allow_inconclusive=True, **EVALUATION)


def test_an_array_that_rounding_alone_decides_makes_a_comparison_inconclusive():
    """Even in float64 1e17 radians have no meaning."""
    modules = in_flax(lambda x: jnp.sin(1e17 * x)), in_torch(lambda x: torch.cos(1e17 * x))
    comparison = compare(*modules, VECTORS, **EVALUATION)
    assert comparison.verdict == "inconclusive"
    (missing,) = comparison.missing
    assert missing.startswith("The error allowed of output, input gradient is more than 10% of the")
    tolerances = [Tolerance("*", 2, "angles are not what this is about")]
    options = {"tolerances": tolerances, **EVALUATION}
    assert compare(*modules, VECTORS, **options).verdict == "equal"


def test_outputs_of_0_show_nothing():
    flax, module = nn.Dense(3), torch.nn.Linear(5, 3)
    for parameter in module.parameters():
        parameter.data *= 0
    comparison = compare(flax, module, VECTORS, **EVALUATION)
    assert comparison.verdict == "inconclusive"
    assert comparison.missing[0].startswith("Every output is 0, or not finite")
    assert compare(flax, module, VECTORS, weights="random", **EVALUATION).verdict == "equal"


# How much of the allowed error is used


def test_the_verdict_says_how_much_of_the_allowed_error_is_used_and_whether_that_is_much():
    comparison = assert_parity(nn.Dense(3), torch.nn.Linear(5, 3), VECTORS, **EVALUATION)
    head = str(comparison).split("\n\n")[0]
    assert "  Flax, jitted, against PyTorch: at most " in head
    assert "of the allowed error, in evaluation, " in head
    assert "unusually" not in head
    row = comparison.rows[0]
    near = replace(comparison, rows=(row._replace(worst=Worst(0.6, (0, 0))),))
    assert "at most 60.0% of the allowed error" in str(near)
    assert "That is unusually much." in str(near)


def test_whole_numbers_are_said_to_be_weaker_evidence():
    comparison = assert_parity(
        in_flax(lambda x: x.argmax(-1)), in_torch(lambda x: x.argmax(-1)), VECTORS, **EVALUATION
    )
    assert "All outputs are whole numbers or truth values, so that these say only" in str(
        comparison
    )
