"""What the harness takes and what modules may return: dictionaries, nested data, nonsense."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bcn_flax.parity import SAME, Tolerance, assert_parity, compare
from parity_tests.small_models import (
    EVALUATION,
    ONE_STEP,
    RNG,
    SENTENCES,
    VECTORS,
    flax_bn,
    torch_bn,
)

pytestmark = pytest.mark.torch

MASK = np.arange(6) % 2 > 0


class Dense(nn.Module):
    """A dense layer around a function of the layer and the arguments."""

    function: Any

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.function(nn.Dense(3, name="out"), *args, **kwargs)


class Linear(torch.nn.Module):
    """The same in PyTorch."""

    def __init__(self, function, inputs=5):
        super().__init__()
        self.out, self.function = torch.nn.Linear(inputs, 3), function

    def forward(self, *args, **kwargs):
        return self.function(self.out, *args, **kwargs)


class NnxDense(nnx.Module):
    def __init__(self, function):
        self.out, self.function = nnx.Linear(5, 3, rngs=nnx.Rngs(0)), function

    def __call__(self, *args, **kwargs):
        return self.function(self.out, *args, **kwargs)


# Inputs


def masked(out, *, x, mask=None, scale=1.0):
    return out(x) * (1.0 if mask is None else mask[:, None]) * scale


def of_batch(out, batch, shift=None):
    x, more = batch["x"], batch["more"]
    return out(x) + sum(more["weights"]) + (0 if shift is None else shift)


BATCH = {"x": VECTORS, "more": {"weights": [VECTORS[:, :1], VECTORS[:, 1:2]], "none": None}}


class Inputs(NamedTuple):
    """Inputs of one function on both sides, and the names of the arrays among them."""

    function: Any
    inputs: Any
    names: list[str]
    options: dict[str, Any] = EVALUATION


INPUTS = {
    "keyword arguments": Inputs(masked, {"x": VECTORS, "mask": MASK}, ["x"]),
    "one keyword argument": Inputs(masked, {"x": VECTORS}, ["x"]),
    "None and a number": Inputs(masked, {"x": VECTORS, "mask": None, "scale": 0.5}, ["x"]),
    "another name in PyTorch": Inputs(
        lambda out, **arrays: out(arrays["y" if isinstance(out, torch.nn.Module) else "x"]),
        {"x": VECTORS},
        ["x"],
        {**EVALUATION, "torch_names": {"x": "y"}},
    ),
    "a nested dictionary": Inputs(
        of_batch, (BATCH,), ["more/weights/0", "more/weights/1", "x"]
    ),
    "a mapping": Inputs(of_batch, {"batch": OrderedDict(BATCH), "shift": None}, [
        "batch/more/weights/0", "batch/more/weights/1", "batch/x"
    ]),
    "positional arguments and None": Inputs(
        lambda out, x, _, y: out(x) + y[:, :3], (VECTORS, None, VECTORS), ["0", "2"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", [Dense, NnxDense])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_may_be_named_and_nested(name, module):
    function, inputs, names, options = INPUTS[name]
    comparison = assert_parity(module(function), Linear(function), inputs, **options)
    gradients = (row.name.path for row in comparison.rows if row.name.quantity == "input gradient")
    assert list(dict.fromkeys(gradients)) == names


def test_each_step_may_have_its_own_named_inputs():
    steps = [{"x": VECTORS[:2], "mask": MASK[:2]}, {"x": VECTORS[2:], "mask": MASK[2:]}]
    assert_parity(Dense(masked), Linear(masked), {"x": VECTORS, "mask": MASK}, steps=steps)


def test_a_module_gets_the_named_inputs_of_its_own_side():
    comparison = compare(
        Dense(masked),
        Linear(lambda out, *, x, mask: out(x) * mask[:, None] * 2),
        {"x": VECTORS, "mask": MASK},
        **EVALUATION,
    )
    assert not comparison.passed


def test_orders_of_axes_are_added_to_the_usual_ones():
    def images(out, x, y):
        return out(x), y

    x = SENTENCES, RNG.normal(size=(2, 4, 3, 5)).astype(np.float32)
    comparison = assert_parity(
        Dense(images), Linear(images, 8), x, axes={3: SAME}, **EVALUATION
    )  # fmt: skip
    assert "input gradient 1" in {str(row.name) for row in comparison.rows}
    swapped = {"axes": {3: SAME, "output 1": SAME}, **EVALUATION}
    assert not compare(Dense(images), Linear(images, 8), x, **swapped).passed


# Outputs


class ModelOutput(OrderedDict):
    """As in public libraries of models: a dictionary that is a dataclass, too."""


@dataclass
class Prediction:
    logits: Any
    hidden: Any = None


@flax.struct.dataclass
class FlaxPrediction:
    logits: Any
    hidden: Any = None


def in_order(out, x):
    return out(x), jnp.tanh(x) if isinstance(out, nn.Module) else torch.tanh(x)


def flax_output(kind):
    return Dense(lambda out, x: kind(*in_order(out, x)))


def torch_output(kind):
    return Linear(lambda out, x: kind(*in_order(out, x)))


OUTPUTS = {
    "a mapping": (
        lambda logits, hidden: {"logits": logits, "hidden": hidden},
        lambda logits, hidden: ModelOutput(logits=logits, hidden=hidden, none=None),
    ),
    "a dataclass": (FlaxPrediction, Prediction),
    "a mapping and a dataclass": (FlaxPrediction, lambda *y: ModelOutput(vars(Prediction(*y)))),
    "a result of PyTorch": (
        lambda _, hidden: (hidden.max(-1), hidden.argmax(-1)),
        lambda _, hidden: hidden.max(-1),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_may_be_of_other_classes(name):
    flax_kind, torch_kind = OUTPUTS[name]
    flax_kind = (lambda *y: {"logits": y[0], "hidden": y[1]}) if flax_kind is dict else flax_kind
    comparison = assert_parity(
        flax_output(flax_kind), torch_output(torch_kind), VECTORS, **ONE_STEP
    )
    assert {str(row.name) for row in comparison.rows} >= {
        "output 0",
        "output 1",
        "gradient out/bias",
    }


def test_a_mapping_that_another_module_returns_is_perturbed():
    """A sum that cancels is allowed the roundings of its terms, also through a mapping."""

    class Inner(torch.nn.Module):
        def forward(self, x):
            return ModelOutput(first=x * 1.1)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)["first"] - x * np.float32(1.1)

    class FlaxOuter(nn.Module):
        def __call__(self, x):
            return x * 1.1 - x * np.float32(1.1)

    row = next(iter(compare(FlaxOuter(), Outer(), VECTORS, **EVALUATION).rows))
    assert row.allowed > 1e-8


@pytest.mark.parametrize(
    ("reshape", "phase"),
    [
        (lambda x, _: x.T, "evaluation"),
        (lambda x, _: x[:, :2], "evaluation"),
        (lambda x, train: x.mean(1) if train else x, "training"),
    ],
)
def test_outputs_of_other_shapes_are_reported_for_models_with_a_batch_norm(reshape, phase):
    comparison = compare(flax_bn(), torch_bn(reshape), VECTORS, **ONE_STEP)
    assert [(row.phase, str(row.name)) for row in comparison.rows] == [(phase, "output")]
    assert "output: has shape (6, 4) against" in str(comparison)


def test_outputs_of_other_shapes_in_a_later_step_are_reported():
    def reshape(x, train):
        return x.T if train and len(x) == 2 else x

    steps = [VECTORS, VECTORS[:2]]
    comparison = compare(flax_bn(), torch_bn(reshape), VECTORS, steps=steps, eager=False)
    shapes = {(row.phase, row.error.mismatch) for row in comparison.rows if row.error.mismatch}
    assert shapes == {
        ("training step 2", "has shape (2, 4) against (4, 2), in Flax's order of axes")
    }


# The result as data


def test_a_comparison_is_written_as_json():
    comparison = compare(flax_bn(), torch_bn(lambda x, _: x.T), VECTORS, **ONE_STEP)
    read = json.loads(comparison.to_json())
    assert read["passed"] is False
    assert read["seconds"] == comparison.seconds > 0
    assert [row["mismatch"] for row in read["rows"]] == [
        "has shape (6, 4) against (4, 6), in Flax's order of axes"
    ]
    assert read["rows"][0]["of_allowed"] == "inf"
    assert read["weights"]["dense.weight"] == "params/dense/kernel"

    tight = Tolerance("output", 1e-9)
    comparison = compare(
        nn.Dense(3), torch.nn.Linear(5, 3), VECTORS, tolerances=[tight], **EVALUATION
    )
    read = json.loads(comparison.to_json())
    assert (read["hints"], read["notes"]) == ([*comparison.hints], [*comparison.notes])
    assert len(read["rows"]) == len(comparison.rows)
    for row, expected in zip(read["rows"], comparison.rows, strict=True):
        assert (row["phase"], row["quantity"], row["path"]) == (expected.phase, *expected.name)
        assert row["passed"] == expected.passed
        assert row["values"] == [*expected.values]
        assert row["tolerance"] == (tight._asdict() if row["quantity"] == "output" else None)
