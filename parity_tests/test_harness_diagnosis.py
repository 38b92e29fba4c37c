"""The harness names the module in which a difference arises, and no innocent one."""

from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bcn_flax.interop import match
from bcn_flax.parity import compare
from bcn_flax.parity.first_difference import first_differences
from bcn_flax.parity.pair import Calls, module_pair
from parity_tests.small_models import (
    EVALUATION,
    IMAGES,
    VECTORS,
    Torch,
    in_flax,
)

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seeded():
    """The same initial weights in every run."""
    torch.manual_seed(0)


# One network, in which a defect is injected at each place


class FlaxPatch(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(6, name="proj")(x))


class FlaxBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        y = nn.relu(nn.Dense(8, name="fc1")(y))
        return x + nn.Dense(6, name="fc2")(y)


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = FlaxPatch(name="emb")(x)
        for i in range(2):
            x = FlaxBlock(name=f"blocks_{i}")(x)
        mix = nn.Dense(6, name="mix")
        x = jnp.tanh(mix(jnp.tanh(mix(x))))
        x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        return jnp.tanh(nn.Dense(3, name="head")(x))


class NnxPatch(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(5, 6, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.proj(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.fc2(nnx.relu(self.fc1(self.norm(x))))


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.emb = NnxPatch(rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.mix = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        x = jnp.tanh(self.mix(jnp.tanh(self.mix(x))))
        return jnp.tanh(self.head(self.norm(x)))


class Defective(torch.nn.Module):
    """A module whose values are changed at one place."""

    place, size = "", 0.0

    def at(self, place, x):
        return x + self.size * x.square() if place == self.place else x


class Changed(Defective):
    """A layer whose output is changed."""

    def __init__(self, layer, name):
        super().__init__()
        self.weight, self.bias, self.name = layer.weight, layer.bias, name
        self.compute = [layer]

    def forward(self, x):
        if isinstance(self.compute[0], torch.nn.Linear):
            y = torch.nn.functional.linear(x, self.weight, self.bias)
        else:
            y = torch.nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)
        return self.at(self.name, y)


class TorchPatch(Defective):
    def __init__(self):
        super().__init__()
        self.proj = Changed(torch.nn.Linear(5, 6), "emb/proj")

    def forward(self, x):
        return torch.tanh(self.at("emb", self.proj(x)))


class TorchOuterPatch(torch.nn.Module):
    """The patch inside of another module, so that names are needed."""

    def __init__(self):
        super().__init__()
        self.patch = TorchPatch()

    def forward(self, x):
        return self.patch(x)


class TorchBlock(Defective):
    def __init__(self, i):
        super().__init__()
        self.norm = Changed(torch.nn.LayerNorm(6), f"blocks_{i}/norm")
        self.fc1 = Changed(torch.nn.Linear(6, 8), f"blocks_{i}/fc1")
        self.act = torch.nn.ReLU()
        self.fc2 = Changed(torch.nn.Linear(8, 6), f"blocks_{i}/fc2")
        self.i = i

    def forward(self, x):
        y = self.at(f"blocks_{self.i} after norm", self.norm(x))
        y = self.at(f"blocks_{self.i} after act", self.act(self.fc1(y)))
        return x + self.at(f"blocks_{self.i} before sum", self.fc2(y))


class TorchNet(Defective):
    def __init__(self, patch):
        super().__init__()
        self.emb, self.blocks = patch(), torch.nn.ModuleList(map(TorchBlock, range(2)))
        self.mix = Changed(torch.nn.Linear(6, 6), "mix")
        self.norm = Changed(torch.nn.LayerNorm(6), "norm")
        self.head = Changed(torch.nn.Linear(6, 3), "head")

    def forward(self, x):
        x = self.at("after emb", self.emb(x))
        for i, block in enumerate(self.blocks):
            x = self.at(f"after blocks_{i}", block(x))
        x = torch.tanh(self.mix(self.at("between", torch.tanh(self.mix(x)))))
        x = self.at("after norm", self.norm(self.at("after mix", x)))
        return self.at("end", torch.tanh(self.head(x)))


def of_module(name):
    return f"the first module whose output differs is {name}; its input agrees."


def between(before, after, calls=""):
    return (
        f"the first difference arises between the {before}, which agrees, and the {after}, which "
        f"does not{calls and f'; in between, PyTorch calls {calls}'}."
    )


def places(proj, patch):
    """What the harness should say of a defect at each place; `proj` as it is printed."""
    said = {
        "emb/proj": of_module(proj),
        "emb": between(f"output of {proj}", "output of emb", patch),
        "after emb": between("output of emb", "input of blocks_0 (blocks.0 in PyTorch)"),
        "between": between("output of mix in call 1", "input of mix in call 2"),
        "mix": of_module("mix in call 1"),
        "after mix": between("output of mix in call 2", "input of norm"),
        "norm": of_module("norm"),
        "after norm": between("output of norm", "input of head"),
        "head": of_module("head"),
        "end": between("output of head", "output of the module itself"),
    }
    for i in range(2):
        whole, norm, fc1, fc2 = (
            f"blocks_{i}{part} (blocks.{i}{part.replace('/', '.')} in PyTorch)"
            for part in ("", "/norm", "/fc1", "/fc2")
        )
        following = "mix in call 1" if i else "blocks_1 (blocks.1 in PyTorch)"
        said |= {
            f"blocks_{i}/norm": of_module(norm),
            f"blocks_{i}/fc1": of_module(fc1),
            f"blocks_{i}/fc2": of_module(fc2),
            f"blocks_{i} after norm": between(f"output of {norm}", f"input of {fc1}"),
            f"blocks_{i} after act": between(
                f"output of {fc1}", f"input of {fc2}", f"blocks.{i}.act"
            ),
            f"blocks_{i} before sum": between(f"output of {fc2}", f"output of {whole}"),
            f"after blocks_{i}": between(f"output of {whole}", f"input of {following}"),
        }
    return said


NAMES = {"emb.patch.proj": "emb/proj"}
MODELS = {
    "linen": (FlaxNet(), TorchPatch, None),
    "linen with names": (FlaxNet(), TorchOuterPatch, NAMES),
    "NNX": (NnxNet(), TorchPatch, None),
    "NNX with names": (NnxNet(), TorchOuterPatch, NAMES),
}


@pytest.mark.parametrize("model", MODELS)
def test_an_injected_defect_is_located(model, monkeypatch):
    flax, patch, names = MODELS[model]
    torch.manual_seed(0)
    pair = module_pair(
        flax, TorchNet(patch), [VECTORS], matcher=lambda *sides: match(*sides, names)
    ).in_float64()
    probe = pair.probe([VECTORS], train=False)
    trace = probe.calls["evaluation"].flax
    snapshots = trace.run()
    trace = trace._replace(run=lambda: snapshots)
    assert [*first_differences(pair, probe)] == []
    said = places(
        "emb/proj (emb.patch.proj in PyTorch)" if names else "emb/proj", "emb.patch" * bool(names)
    )
    for number, (place, expected) in enumerate(said.items()):
        size = 1.0 if number % 2 else 1e-5
        monkeypatch.setattr(Defective, "place", place)
        monkeypatch.setattr(Defective, "size", size)
        calls = {"evaluation": Calls(trace, pair.run_torch(probe.inputs, False))}
        found = [*first_differences(pair, probe._replace(calls=calls))]
        assert found == [f"In evaluation, {expected}"], place


# Modules of other forms


class ConvBlock(nn.Module):
    """Includes the activation, and its padding."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(4, (3, 3), name="conv")(x))


def flax_conv_net(x):
    x = ConvBlock(name="first")(x)
    x = ConvBlock(name="second")(x)
    return nn.Dense(2, name="head")(jnp.tanh(x.mean((1, 2))))


def torch_conv_net(mean):
    class TorchConvBlock(torch.nn.Module):
        """Includes neither."""

        def __init__(self, channels):
            super().__init__()
            self.conv = torch.nn.Conv2d(channels, 4, 3)

        def forward(self, x):
            return self.conv(x)

    def forward(self, x):
        for block in (self.first, self.second):
            x = torch.relu(block(torch.nn.functional.pad(x, (1, 1, 1, 1))))
        return self.head(torch.tanh(mean(x)))

    return Torch(
        forward, first=TorchConvBlock(3), second=TorchConvBlock(4), head=torch.nn.Linear(4, 2)
    )


def flax_towers(x):
    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.tanh(nn.Dense(4, name="dense")(x))

    return nn.Dense(2, name="head")(Tower(name="left")(x) + Tower(name="right")(x))


def torch_towers(left=torch.tanh, right=torch.tanh):
    def tower(activation):
        return Torch(lambda self, x: activation(self.dense(x)), dense=torch.nn.Linear(5, 4))

    return Torch(
        lambda self, x: self.head(self.left(x) + self.right(x)),
        left=tower(left),
        right=tower(right),
        head=torch.nn.Linear(4, 2),
    )


def scaled_flax_mlp(constant=0.1):
    def forward(x):
        x = nn.Dense(7, name="hidden")(x * jnp.asarray(np.float32(constant)))
        x = nn.Dense(6, name="middle")(jnp.tanh(x))
        return nn.Dense(3, name="out")(jnp.tanh(x))

    return in_flax(forward)


def scaled_torch_mlp(first=lambda x: 0.1 * x, second=torch.tanh, third=torch.tanh):
    return Torch(
        lambda self, x: self.out(third(self.middle(second(self.hidden(first(x)))))),
        hidden=torch.nn.Linear(5, 7),
        middle=torch.nn.Linear(7, 6),
        out=torch.nn.Linear(6, 3),
    )


def other(x):
    return torch.tanh(1.001 * x)


class FlaxPool(nn.Module):
    def __call__(self, x):
        return nn.avg_pool(x, (2, 2), (2, 2))


def flax_pooled(x):
    x = FlaxPool(name="pool")(nn.Conv(4, (3, 3), padding=1, name="conv")(x))
    return nn.Dense(2, name="head")(x.reshape(len(x), -1))


def torch_pooled(flatten, head):
    return torch.nn.Sequential(
        OrderedDict(
            conv=torch.nn.Conv2d(3, 4, 3, padding=1),
            reduce=torch.nn.MaxPool2d(2),
            **flatten,
            head=head,
        )
    )


class FlatLinear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))


class Case(NamedTuple):
    """Two modules, and what the harness says of the place where they differ."""

    flax: Any
    module: Any
    expected: str
    inputs: Any = VECTORS
    options: dict[str, Any] = EVALUATION


CASES = {
    "blocks with and without activation and padding": Case(
        in_flax(flax_conv_net),
        torch_conv_net(lambda x: x.amax((2, 3))),
        between("output of second/conv", "input of head"),
        IMAGES,
    ),
    "a block beside a correct one": Case(
        in_flax(flax_towers),
        torch_towers(left=other),
        between("output of left/dense", "output of left"),
    ),
    "the other block": Case(
        in_flax(flax_towers),
        torch_towers(right=other),
        between("output of right/dense", "output of right"),
    ),
    "beside a module that is called in between": Case(
        in_flax(
            lambda x: (
                nn.Dense(2, name="last")(jnp.tanh(nn.Dense(3, name="first")(x)))
                + nn.Dense(2, name="aside")(x)
            )
        ),
        Torch(
            lambda self, x: [
                first := self.first(x),
                aside := self.aside(x),
                self.last(other(first)) + aside,
            ][-1],
            first=torch.nn.Linear(5, 3),
            aside=torch.nn.Linear(5, 2),
            last=torch.nn.Linear(3, 2),
        ),
        between("output of first", "input of last"),
    ),
    "values in another order": Case(
        in_flax(lambda x: nn.Dense(5, name="out")(x[:, ::-1])),
        Torch(lambda self, x: self.out(x), out=torch.nn.Linear(5, 5)),
        between("input of the module itself", "output of out"),
    ),
    "after a constant in float32": Case(
        scaled_flax_mlp(),
        scaled_torch_mlp(third=other),
        between("output of middle", "input of out"),
    ),
    "after arithmetic in float32": Case(
        scaled_flax_mlp(0.125),
        scaled_torch_mlp(lambda x: (0.125 * (x.float() + 0.1)).to(x.dtype) - 0.0125, third=other),
        between("output of middle", "input of out"),
    ),
    "a constant in float32": Case(
        scaled_flax_mlp(),
        scaled_torch_mlp(),
        between("input of the module itself", "input of hidden"),
    ),
    "a module without weights": Case(
        in_flax(flax_pooled),
        torch_pooled({}, FlatLinear(36, 2)),
        of_module("pool (reduce in PyTorch)"),
        IMAGES,
        {**EVALUATION, "flattened": {"head": 4}},
    ),
    "modules without weights that cannot be paired": Case(
        in_flax(flax_pooled),
        torch_pooled({"flatten": torch.nn.Flatten()}, torch.nn.Linear(36, 2)),
        between("output of conv", "input of head", "reduce, flatten"),
        IMAGES,
        {**EVALUATION, "flattened": {"head": 4}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_right_module_is_named(name):
    flax, module, expected, inputs, options = CASES[name]
    comparison = compare(flax, module, inputs, **options)
    assert comparison.hints[0] == f"In evaluation, {expected}"
