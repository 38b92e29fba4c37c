"""Whole networks of `torch.nn` compute in Flax what they compute in PyTorch."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

from bcn_flax import interop
from bcn_flax.parity.errors import roundings
from parity_tests import layout
from parity_tests.conversion import assert_converts, assert_same_state, normal, randomize, shapes
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.torch


class TorchBlock(torch.nn.Module):
    """A residual block with torchvision's names."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(outputs)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = torch.nn.Sequential(
                torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                torch.nn.BatchNorm2d(outputs),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchResNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.layer1 = torch.nn.Sequential(TorchBlock(4, 4, 1), TorchBlock(4, 4, 1))
        self.layer2 = torch.nn.Sequential(TorchBlock(4, 8, 2))
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(x.mean((2, 3)))


class FlaxBlock(nn.Module):
    outputs: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def conv(window, stride, name):
            pads = window // 2
            return nn.Conv(
                self.outputs, (window,) * 2, stride, padding=pads, use_bias=False, name=name
            )

        def norm(name):
            return nn.BatchNorm(True, epsilon=1e-5, name=name)

        y = nn.relu(norm("norm_a")(conv(3, self.stride, "conv_a")(x)))
        y = norm("norm_b")(conv(3, 1, "conv_b")(y))
        if self.stride != 1:
            x = norm("norm_proj")(conv(1, self.stride, "conv_proj")(x))
        return nn.relu(x + y)


class FlaxResNet(nn.Module):
    """The same with names of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(True, epsilon=1e-5, name="stem_norm")(x))
        for n, (outputs, stride) in enumerate([(4, 1), (4, 1), (8, 2)]):
            x = FlaxBlock(outputs, stride, name=f"block_{n}")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


PARTS = {
    "conv1": "conv_a",
    "bn1": "norm_a",
    "conv2": "conv_b",
    "bn2": "norm_b",
    "downsample.0": "conv_proj",
    "downsample.1": "norm_proj",
}
BLOCKS = {"layer1.0": "block_0", "layer1.1": "block_1", "layer2.0": "block_2"}
NAMES = {"conv1": "stem", "bn1": "stem_norm", "fc": "head"} | {
    f"{layer}.{part}": f"{block}/{name}"
    for layer, block in BLOCKS.items()
    for part, name in PARTS.items()
    if block == "block_2" or "downsample" not in part
}


@pytest.mark.parametrize("names", [NAMES, NAMES.get], ids=["mapping", "function"])
def test_a_torchvision_style_resnet_computes_the_same_under_other_names(names):
    # Weights are positive, so the largest sum is no larger than the sum of its terms' sizes.
    ulps = 8 * roundings(72)
    assert_converts(randomize(TorchResNet()), FlaxResNet(), normal((2, 9, 8, 3)), ulps, names=names)


def test_a_path_in_names_stands_for_the_modules_in_it():
    module, model = torch.nn.DataParallel(TorchResNet()), FlaxResNet()
    names = {"module": ""} | {f"module.{path}": place for path, place in NAMES.items()}
    match = interop.match(module.state_dict(), shapes(model, jnp.ones((1, 9, 8, 3))), names)
    assert {pair.path[1] for pair in match.pairs if "conv1" in pair.key} == {
        "stem",
        "block_0",
        "block_1",
        "block_2",
    }


def test_names_remove_a_wrapper_and_the_error_says_how():
    module = torch.nn.DataParallel(torch.nn.Linear(3, 2))
    like = shapes(nn.Dense(2), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r'names=\{"module": ""\} removes'):
        interop.match(module.state_dict(), like)
    variables = interop.variables_from_torch(module, like, names={"module": ""})
    np.testing.assert_array_equal(
        variables["params"]["kernel"].T, module.module.weight.detach().numpy()
    )


def test_a_sequential_of_sequentials_needs_no_names():
    first = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module = torch.nn.Sequential(first, torch.nn.ReLU())
    first = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0))
    )
    flax = nnx.Sequential(first, jax.nn.relu)
    assert_converts(randomize(module), flax, normal((2, 3)), roundings(7))


class FlatteningFlax(nn.Module):
    """Its images end as 3 x 2 pixels of 4 channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), padding="VALID", name="conv")(x))
        return nn.Dense(5, name="fc")(x.reshape(len(x), -1))


def flattening_torch():
    layers = torch.nn.Sequential()
    layers.add_module("conv", torch.nn.Conv2d(3, 4, 3))
    layers.add_module("relu", torch.nn.ReLU())
    layers.add_module("flatten", torch.nn.Flatten())
    layers.add_module("fc", torch.nn.Linear(24, 5))
    return layers


IMAGES = normal((2, 5, 4, 3))


def test_the_first_dense_layer_after_a_flatten_is_reordered():
    module = randomize(flattening_torch())
    assert_converts(module, FlatteningFlax(), IMAGES, roundings(51), flattened={"fc": 4})


def proposed(module, like):
    """The `names` to copy from the error."""
    with pytest.raises(ValueError, match="under other names") as caught:
        interop.match(module, like)
    message = str(caught.value)
    assert "missing" not in message
    assert "unexpected" not in message
    return ast.literal_eval(message.rpartition("names=")[2])


def test_names_are_proposed_by_shape_and_order():
    like = shapes(FlaxResNet(), jnp.ones((1, 9, 8, 3)))
    assert proposed(TorchResNet(), like) == NAMES
    wrapped = {f"module.{path}": place for path, place in NAMES.items()}
    assert proposed(torch.nn.DataParallel(TorchResNet()), like) == {"module": "", **wrapped}


def test_gradients_are_converted_by_the_match_of_the_weights():
    module, model = flattening_torch(), FlatteningFlax()
    match = interop.match(module, shapes(model, IMAGES), flattened={"fc": 4})
    variables = match.to_flax(module)
    module(layout.to_torch(IMAGES)).square().sum().backward()
    module.fc.bias.grad = None  # as of a parameter that is frozen
    expected = jax.grad(lambda v: (model.apply(v, IMAGES) ** 2).sum())(variables)
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    moved = match.to_flax(gradients, partial=True)
    del expected["params"]["fc"]["bias"]
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: assert_close(a, b, ulps=roundings(24), dtype=np.float32, scale=scale),
        moved,
        expected,
    )
    returned = match.to_torch(moved, partial=True)
    assert_same_state(returned, gradients)
    with pytest.raises(ValueError, match=r"missing: fc.bias \(5,\)"):
        match.to_flax(gradients)
