"""What the harness takes and what modules may return: dictionaries, nested data, nonsense."""

import json
import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from bcn_flax.parity import CHANNELS, SAME, Tolerance, assert_parity, compare

pytestmark = pytest.mark.torch

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(6, 5)).astype(np.float32)
SENTENCES = RNG.normal(size=(2, 4, 8)).astype(np.float32)
MASK = np.arange(6) % 2 > 0

EVALUATION = {"eager": False, "steps": 0}
ONE_STEP = {"eager": False, "steps": 1}


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
        lambda out, **arrays: out(arrays.get("x", arrays.get("y"))),
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


class FlaxNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, name="dense")(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(x)


class TorchNorm(torch.nn.Module):
    def __init__(self, reshape=lambda x, _: x.T):
        super().__init__()
        self.dense, self.bn = torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)
        self.reshape = reshape

    def forward(self, x):
        return self.reshape(self.bn(self.dense(x)), self.training)


@pytest.mark.parametrize(
    ("reshape", "phase"),
    [
        (lambda x, _: x.T, "evaluation"),
        (lambda x, _: x[:, :2], "evaluation"),
        (lambda x, train: x.mean(1) if train else x, "training"),
    ],
)
def test_outputs_of_other_shapes_are_reported_for_models_with_a_batch_norm(reshape, phase):
    comparison = compare(FlaxNorm(), TorchNorm(reshape), VECTORS, **ONE_STEP)
    assert [(row.phase, str(row.name)) for row in comparison.rows] == [(phase, "output")]
    assert "output: has shape (6, 3) against" in str(comparison)


def test_outputs_of_other_shapes_in_a_later_step_are_reported():
    def reshape(x, train):
        return x.T if train and len(x) == 2 else x

    steps = [VECTORS, VECTORS[:2]]
    comparison = compare(FlaxNorm(), TorchNorm(reshape), VECTORS, steps=steps, eager=False)
    shapes = {(row.phase, row.error.mismatch) for row in comparison.rows if row.error.mismatch}
    assert shapes == {
        ("training step 2", "has shape (2, 3) against (3, 2), in Flax's order of axes")
    }


# Wrong arguments


class Refused(NamedTuple):
    """A call of `compare` that is refused, and a part of the message."""

    message: str
    flax: Any = nn.Dense(3)
    module: Any = torch.nn.Linear(5, 3)
    inputs: Any = VECTORS
    options: dict[str, Any] = EVALUATION


REFUSED = {
    "exchanged modules": Refused(
        "Flax's module comes first and PyTorch's second, but they are exchanged",
        torch.nn.Linear(5, 3),
        nn.Dense(3),
    ),
    "no Flax module": Refused(
        "Flax's module must be a module of flax.linen or flax.nnx, but it is of type NoneType.",
        None,
    ),
    "no PyTorch module": Refused(
        "PyTorch's module must be a torch.nn.Module, but it is of type NoneType.", module=None
    ),
    "two modules of PyTorch": Refused(
        "Flax's module must be a module of flax.linen or flax.nnx, but it is of type Linear.",
        torch.nn.Linear(5, 3),
    ),
    "a function": Refused("Wrap a function in a module that calls it.", module=torch.tanh),
    "a class of Flax": Refused(
        "Flax's module must be an instance, but it is the class Dense: pass Dense(...).", nn.Dense
    ),
    "a class of PyTorch": Refused(
        "PyTorch's module must be an instance, but it is the class Linear: pass Linear(...).",
        module=torch.nn.Linear,
    ),
    "a bound module": Refused("must not be bound to variables", nn.Dense(3).bind({"params": {}})),
    "an optimizer of optax": Refused(
        "optimizer must be a bcn_flax.parity.Optimizer, which has one of each library, but it is "
        "of type GradientTransformation",
        options={"optimizer": optax.sgd(0.1)},
    ),
    "an order of axes": Refused("axes must map ranks or names", options={"axes": CHANNELS}),
    "axes that are none": Refused("axes must map ranks or names", options={"axes": {3: (0, 2, 1)}}),
    "keywords of a call": Refused(
        "call must be a function from `train: bool`", options={"call": {"train": True}}
    ),
    "a single tolerance": Refused(
        "tolerances must be a list of Tolerance", options={"tolerances": Tolerance("*", 0.5)}
    ),
    "an object": Refused("but there is a object.", inputs={"x": object()}),
    "a number as a name": Refused("but there is a int.", inputs={1: VECTORS}),
    "names without keywords": Refused(
        "['x'] are not among the inputs, which have no names", options={"torch_names": {"x": "y"}}
    ),
    "unknown names": Refused(
        "['z'] are not among ['x']", inputs={"x": VECTORS}, options={"torch_names": {"z": "y"}}
    ),
    "other names in a step": Refused(
        "those of steps[0] differ in a name or in a value that is no array: y=array y against "
        "x=array x.",
        inputs={"x": VECTORS},
        options={"steps": [{"y": VECTORS}]},
    ),
    "other outputs in training": Refused(
        "but in training Flax's returns 1, of shapes [(6, 3)], and PyTorch's 2",
        FlaxNorm(),
        TorchNorm(lambda x, train: (x, x) if train else x),
        options=ONE_STEP,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name):
    require_refusal(*REFUSED[name])


def require_refusal(message, flax_module, module, inputs, options):
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(flax_module, module, inputs, **options)


# Dropout


class FlaxDropout(nn.Module):
    """A convolution, channels that are dropped, and values that are dropped."""

    rates: tuple[float, float] = (0.5, 0.25)

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), padding=1, name="conv")(x)
        x = nn.Dropout(self.rates[0], broadcast_dims=(1, 2))(x, deterministic=not train)
        x = nn.Dense(6, name="hidden")(jnp.tanh(x.mean((1, 2))))
        x = nn.Dropout(self.rates[1], deterministic=not train, name="drop")(x)
        return nn.Dense(3, name="out")(jnp.tanh(x))


class NnxDropout(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), padding=1, rngs=rngs)
        self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.channels = nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.channels(self.conv(x)).mean((1, 2)))
        return self.out(jnp.tanh(self.drop(self.hidden(x))))


class TorchDropout(torch.nn.Module):
    def __init__(self, rates=(0.5, 0.25), function=torch.tanh):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.hidden, self.out = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)
        self.channels, self.drop = torch.nn.Dropout2d(rates[0]), torch.nn.Dropout(rates[1])
        self.function = function

    def forward(self, x):
        x = torch.tanh(self.channels(self.conv(x)).mean((2, 3)))
        return self.out(self.function(self.drop(self.hidden(x))))


IMAGES = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("flax_module", "options"),
    [(FlaxDropout(), {"steps": [IMAGES, IMAGES[:1]]}), (NnxDropout(), ONE_STEP)],
    ids=["linen", "NNX"],
)
def test_dropout_gets_the_same_masks_on_both_sides(flax_module, options):
    assert_parity(flax_module, TorchDropout(), IMAGES, **options)


def test_differences_after_dropout_are_found_in_training():
    after = TorchDropout(function=lambda x: torch.tanh(1.001 * x))
    after.function = lambda x: torch.tanh(1.001 * x) if after.training else torch.tanh(x)
    comparison = compare(FlaxDropout(), after, IMAGES, **ONE_STEP)
    assert "arises between the output of drop, which agrees, and the input" in comparison.hints[0]
    wrong_rate = TorchDropout(rates=(0.5, 0.3))
    comparison = compare(FlaxDropout(), wrong_rate, IMAGES, **ONE_STEP)
    assert {row.phase for row in comparison.rows if not row.passed} >= {"training step 1"}
    assert all(row.passed for row in comparison.rows if row.phase == "evaluation")
    assert "dropout: rate is 0.25 in Flax, and p 0.3 in PyTorch." in comparison.hints
    assert comparison.hints[0].startswith(
        "In training, the first module whose output differs is drop; its input agrees."
    )


def test_modules_that_drop_everything_agree():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(1.0)(x, deterministic=not train)

    comparison = assert_parity(Dropped(), torch.nn.Dropout(1.0), VECTORS, **ONE_STEP)
    output = next(r for r in comparison.rows if r.phase != "evaluation")
    assert (str(output.name), output.error.scale) == ("output", 0)


def test_modules_with_dropout_are_not_changed():
    flax_module, module = NnxDropout(), TorchDropout()
    before = nnx.state(flax_module, nnx.RngCount)
    compare(flax_module, module, IMAGES, **ONE_STEP)
    assert type(flax_module.drop) is nnx.Dropout
    assert "forward" not in vars(module.drop)
    assert not module.drop._forward_pre_hooks
    assert nnx.state(flax_module, nnx.RngCount) == before


@pytest.mark.parametrize("flax_module", [FlaxDropout(), NnxDropout()], ids=["linen", "NNX"])
def test_without_training_dropout_needs_no_counterpart(flax_module):
    assert_parity(flax_module, TorchDropout(rates=(0.0, 0.1)), IMAGES, **EVALUATION)


class Noise(nnx.Module):
    """Draws random numbers without a rate."""

    def __init__(self):
        self.rngs = nnx.Rngs(0, noise=1)

    def __call__(self, x):
        return x + jax.random.normal(self.rngs.noise(), x.shape)


class AroundNoise(nnx.Module):
    def __init__(self):
        self.steps = nnx.List([nnx.Linear(5, 5, rngs=nnx.Rngs(0)), Noise()])

    def __call__(self, x):
        return self.steps[1](self.steps[0](x))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dropout(0.5, deterministic=False)(x), None


class Scan(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        del train
        return nn.scan(Scanned, length=2, split_rngs={"dropout": True})()(x, None)[0]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, name="attention")
        return layer(x, deterministic=not train)


class SquareDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5)(x, deterministic=not train)


SQUARE = RNG.normal(size=(2, 4, 4, 4)).astype(np.float32)


class Steps(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = torch.nn.ModuleList([torch.nn.Linear(5, 5)])

    def forward(self, x):
        return self.steps[0](x)


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


RANDOM = {
    "noise in NNX": Refused(
        "Flax's module draws random numbers in steps_1.", AroundNoise(), Steps()
    ),
    "dropout in attention": Refused(
        "Flax's module draws random numbers in attention.",
        Attention(),
        TorchAttention(),
        SENTENCES,
        {**ONE_STEP, "axes": {3: SAME}},
    ),
    "dropout in a scan": Refused(
        "in evaluation Flax's module calls dropout inside of a transformation such as nn.scan.",
        Scan(),
        torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)),
    ),
    "dropout of as many channels as pixels": Refused(
        "the shapes of the masks, [(2, 4, 4, 4)], do not show whether PyTorch's has channels first",
        SquareDropout(),
        torch.nn.Dropout(0.5),
        SQUARE,
        ONE_STEP,
    ),
    "other dropout": Refused(
        "PyTorch's module draws random numbers.",
        SquareDropout(),
        torch.nn.AlphaDropout(0.5),
        options=ONE_STEP,
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_that_cannot_be_the_same_are_refused(name):
    require_refusal(*RANDOM[name])


# The result as data


def test_a_comparison_is_written_as_json():
    comparison = compare(FlaxNorm(), TorchNorm(), VECTORS, **ONE_STEP)
    read = json.loads(comparison.to_json())
    assert read["passed"] is False
    assert read["seconds"] == comparison.seconds > 0
    assert [row["mismatch"] for row in read["rows"]] == [
        "has shape (6, 3) against (3, 6), in Flax's order of axes"
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
