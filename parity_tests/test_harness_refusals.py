"""What the harness refuses to compare, and what it says of it."""

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

from bcn_flax.parity import CHANNELS, SAME, Name, Tolerance, compare
from parity_tests.small_models import (
    EVALUATION,
    ONE_STEP,
    RNG,
    SENTENCES,
    VECTORS,
    FlaxWithModes,
    NnxMlp,
    Torch,
    flax_bn,
    in_flax,
    in_torch,
    torch_bn,
    torch_mlp,
    twice,
)

pytestmark = pytest.mark.torch


class Refused(NamedTuple):
    """A call of `compare` that is refused, and the message, which may stop or begin at `...`."""

    message: str
    flax: Any = nn.Dense(3)
    module: Any = torch.nn.Linear(5, 3)
    inputs: Any = VECTORS
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
    "exchanged modules": Refused(
        "...Flax's module comes first and PyTorch's second, but they are exchanged...",
        torch.nn.Linear(5, 3),
        nn.Dense(3),
    ),
    "no Flax module": Refused(
        "...Flax's module must be a module of flax.linen or flax.nnx, but it is of type None...",
        None,
    ),
    "no PyTorch module": Refused(
        "...PyTorch's module must be a torch.nn.Module, but it is of type NoneType....", module=None
    ),
    "two modules of PyTorch": Refused(
        "...Flax's module must be a module of flax.linen or flax.nnx, but it is of type Linear....",
        torch.nn.Linear(5, 3),
    ),
    "a function": Refused("...Wrap a function in a module that calls it....", module=torch.tanh),
    "a class of Flax": Refused(
        "...Flax's module must be an instance, but it is the class Dense: pass Dense(...)....",
        nn.Dense,
    ),
    "a class of PyTorch": Refused(
        "...PyTorch's module must be an instance, but it is the class Linear: pass Linear(...)....",
        module=torch.nn.Linear,
    ),
    "a bound module": Refused(
        "...must not be bound to variables...", nn.Dense(3).bind({"params": {}})
    ),
    "an optimizer of optax": Refused(
        "...optimizer must be a bcn_flax.parity.Optimizer, which has one of each library, but it "
        "is of type GradientTransformation...",
        options={"optimizer": optax.sgd(0.1)},
    ),
    "an order of axes": Refused("...axes must map ranks or names...", options={"axes": CHANNELS}),
    "axes that are none": Refused(
        "...axes must map ranks or names...", options={"axes": {3: (0, 2, 1)}}
    ),
    "keywords of a call": Refused(
        "...call must be a function from `train: bool`...", options={"call": {"train": True}}
    ),
    "a single tolerance": Refused(
        "...tolerances must be a list of Tolerance...", options={"tolerances": Tolerance("*", 0.5)}
    ),
    "an object": Refused("...but there is a object....", inputs={"x": object()}),
    "a number as a name": Refused("...but there is a int....", inputs={1: VECTORS}),
    "names without keywords": Refused(
        "...['x'] are not among the inputs, which have no names...",
        options={"torch_names": {"x": "y"}},
    ),
    "unknown names": Refused(
        "...['z'] are not among ['x']...",
        inputs={"x": VECTORS},
        options={"torch_names": {"z": "y"}},
    ),
    "other names in a step": Refused(
        "...those of steps[0] differ in a name or in a value that is no array: y=array y against "
        "x=array x....",
        inputs={"x": VECTORS},
        options={"steps": [{"y": VECTORS}]},
    ),
    "other outputs in training": Refused(
        "...but in training Flax's returns 1, of shapes [(6, 4)], and PyTorch's 2...",
        flax_bn(),
        torch_bn(lambda x, train: (x, x) if train else x),
        options=ONE_STEP,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name):
    require_refusal(*REFUSED[name])


def require_refusal(message, flax_module, module, inputs, options):
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        compare(flax_module, module, inputs, **options)


# Random numbers


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
        "...Flax's module draws random numbers in steps_1....", AroundNoise(), Steps()
    ),
    "dropout in attention": Refused(
        "...Flax's module draws random numbers in attention....",
        Attention(),
        TorchAttention(),
        SENTENCES,
        {**ONE_STEP, "axes": {3: SAME}},
    ),
    "dropout in a scan": Refused(
        "...in evaluation Flax's module calls dropout inside of a transformation such as...",
        Scan(),
        torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)),
    ),
    "dropout of as many channels as pixels": Refused(
        "...the masks, [(2, 4, 4, 4)], do not show whether PyTorch's has channels first...",
        SquareDropout(),
        torch.nn.Dropout(0.5),
        SQUARE,
        ONE_STEP,
    ),
    "other dropout": Refused(
        "...PyTorch's module draws random numbers....",
        SquareDropout(),
        torch.nn.AlphaDropout(0.5),
        options=ONE_STEP,
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_that_cannot_be_the_same_are_refused(name):
    require_refusal(*RANDOM[name])
