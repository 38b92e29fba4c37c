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
from parity_tests.test_interop_layers import assert_same_state, normal, randomize, shapes
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
    module, model, x = randomize(TorchResNet()), FlaxResNet(), normal((2, 9, 8, 3))
    match = interop.match(module.state_dict(), shapes(model, x), names=names)
    variables = match.to_flax(module.state_dict())
    expected = module(layout.to_torch(x)).detach().numpy()
    # Weights are positive, so the largest sum is no larger than the sum of its terms' sizes.
    assert_close(model.apply(variables, x), expected, ulps=8 * roundings(72), dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())


def test_a_path_in_names_stands_for_what_is_in_it():
    module, model = torch.nn.DataParallel(TorchResNet()), FlaxResNet()
    names = {"module": ""} | {f"module.{path}": place for path, place in NAMES.items()}
    match = interop.match(module.state_dict(), shapes(model, jnp.ones((1, 9, 8, 3))), names)
    assert {pair.path[1] for pair in match.pairs if "conv1" in pair.key} == {
        "stem",
        "block_0",
        "block_1",
        "block_2",
    }


def test_a_wrapper_s_name_is_taken_off_when_told_and_the_error_tells_how():
    module = torch.nn.DataParallel(torch.nn.Linear(3, 2))
    like = shapes(nn.Dense(2), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r'names=\{"module": ""\} removes'):
        interop.match(module.state_dict(), like)
    variables = interop.variables_from_torch(module, like, names={"module": ""})
    np.testing.assert_array_equal(
        variables["params"]["kernel"].T, module.module.weight.detach().numpy()
    )


def test_a_sequential_of_sequentials_needs_no_names():
    module = torch.nn.ModuleDict(
        {
            "features": torch.nn.Sequential(
                torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)), torch.nn.ReLU()
            )
        }
    )

    class Model(nnx.Module):
        def __init__(self, rngs):
            first = nnx.Sequential(
                nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, epsilon=1e-5, rngs=rngs)
            )
            self.features = nnx.Sequential(first, jax.nn.relu)

    x = normal((2, 3))
    moved = interop.module_from_torch(randomize(module), Model(nnx.Rngs(0)))
    expected = module["features"](torch.from_numpy(x)).detach().numpy()
    assert_close(moved.features(x), expected, ulps=roundings(7), dtype=np.float32)


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
    module, model = randomize(flattening_torch()), FlatteningFlax()
    match = interop.match(module, shapes(model, IMAGES), flattened={"fc": 4})
    variables = match.to_flax(module)
    expected = module(layout.to_torch(IMAGES)).detach().numpy()
    assert_close(model.apply(variables, IMAGES), expected, ulps=roundings(51), dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())


def alphabetical(state_dict):
    return dict(sorted(state_dict.items()))


def head_first(state_dict):
    """As if a module had defined its last layer before the others."""
    return dict(sorted(state_dict.items(), key=lambda item: not item[0].startswith("fc")))


@pytest.mark.parametrize("order", [dict, alphabetical, head_first])
def test_a_possible_flatten_must_be_declared(order):
    state_dict, like = order(flattening_torch().state_dict()), shapes(FlatteningFlax(), IMAGES)
    with pytest.raises(ValueError, match=r"ambiguous: fc\.weight has 24 inputs") as caught:
        interop.match(state_dict, like)
    assert "pass flattened={'fc': 4}; if none were, pass flattened={'fc': 24}" in str(caught.value)
    assert "reordered" in str(interop.match(state_dict, like, flattened={"fc": 4}))
    assert "reordered" not in str(interop.match(state_dict, like, flattened={"fc": 24}))


def layers(**weights):
    """A `state_dict` and its Flax twin, with weights of PyTorch's shapes."""
    state_dict = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in weights.items()}
    kernels = {
        name: {"kernel": np.ones((*shape[2:], shape[1], shape[0]), np.float32)}
        for name, shape in weights.items()
    }
    return state_dict, {"params": kernels}


def test_every_head_on_flattened_images_is_suspect_but_nothing_behind_them():
    state_dict, like = layers(
        features=(8, 3, 3, 3), policy=(6, 72), action=(9, 6), advantage=(6, 72), other=(9, 6)
    )
    with pytest.raises(ValueError, match="ambiguous") as caught:
        interop.match(state_dict, like)
    complaints = [line for line in str(caught.value).splitlines() if "ambiguous" in line]
    assert [line.split()[1] for line in complaints] == ["policy.weight", "advantage.weight"]


@pytest.mark.parametrize("order", [dict, alphabetical])
def test_heads_on_pooled_images_are_not_suspect(order):
    state_dict, like = layers(
        conv=(8, 3, 3, 3), layer=(64, 8, 3, 3), fc=(5, 64), head=(3, 64), zoom=(3, 5)
    )
    assert interop.match(order(state_dict), like)


def test_a_flatten_that_the_order_would_show_is_noted_where_the_order_is_lost():
    state_dict, like = layers(stem=(64, 3, 3, 3), conv2=(16, 64, 3, 3), fc=(5, 64))
    with pytest.raises(ValueError, match=r"ambiguous: fc\.weight has 64 inputs"):
        interop.match(state_dict, like)
    note = (
        "assumed to follow no flatten: fc, because the order of the layers is unknown; otherwise "
        "pass flattened={'fc': 16}"
    )
    assert str(interop.match(alphabetical(state_dict), like)).splitlines()[-1] == note
    said = interop.match(alphabetical(state_dict), like, flattened={"fc": 64})
    assert "assumed" not in str(said)


@pytest.mark.parametrize("order", [dict, alphabetical])
def test_a_number_of_channels_that_no_layer_before_has_is_noted(order):
    state_dict, like = layers(conv=(16, 3, 3, 3), fc=(5, 64))
    report = str(interop.match(order(state_dict), like, flattened={"fc": 32}))
    assert "'fc' is given 32 channels, but no convolution or norm before it" in report
    assert report.endswith("there are [16]")
    for channels in (16, 64):
        report = str(interop.match(order(state_dict), like, flattened={"fc": channels}))
        assert "is given" not in report


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


def test_flattened_must_name_dense_layers_and_divide_their_inputs():
    module, like = flattening_torch(), shapes(FlatteningFlax(), IMAGES)
    with pytest.raises(ValueError, match="flattened: 'conv' is no dense layer") as caught:
        interop.match(module, like, flattened={"conv": 4, "fc": 5}, transposed=["fc"])
    assert "flattened: 'fc' has 24 inputs, which 5 does not divide" in str(caught.value)
    assert "transposed: 'fc' is no convolution" in str(caught.value)
    with pytest.raises(ValueError, match="which 0 does not divide"):
        interop.match(module, like, flattened={"fc": 0})


def test_gradients_move_by_the_match_of_the_weights():
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
