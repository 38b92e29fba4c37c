"""Layers of `torch.nn`, of `bcn_torch` and of the authors compute the same in Flax."""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import bcn_flax
import bcn_flax.nnx
import bcn_torch
from bcn_flax import interop
from bcn_flax.parity.errors import roundings
from parity_tests import layout
from parity_tests.conversion import assert_converts, assert_same_state, normal, randomize, shapes
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.torch


class Case(NamedTuple):
    """One layer in PyTorch and in Flax, its input's shape there, and how many terms it sums."""

    torch: Any
    linen: Any
    nnx: Any
    shape: tuple[int, ...]
    terms: int = 1


FLAX, OURS = (nn, nnx), (bcn_flax, bcn_flax.nnx)
EVALUATE = {"use_running_average": True}


def layer(module, apis, name, features, shape, terms=1, **arguments):
    """A layer of PyTorch, and the one of this name in both of Flax's APIs."""
    linen, nnx_layer = (getattr(api, name) for api in apis)
    nnx_layer = partial(nnx_layer, *features, **arguments)
    return Case(module, linen(*features[1:], **arguments), nnx_layer, shape, terms)


def convolution(module, apis, name, strides=1, groups=1):
    window = module.kernel_size
    shape = (2, *(7, 6, 5)[: len(window)], 4)
    arguments = {"strides": strides, "padding": "VALID", "feature_group_count": groups}
    return layer(module, apis, name, (4, 6, window), shape, terms=24, **arguments)


def norm(module, apis, name, terms=1, **arguments):
    return layer(module, apis, name, (8,), (2, 4, 3, 8), terms, **arguments)


GROUPS = {"terms": 24, "num_groups": 4}
CASES = {
    "Conv1d": convolution(torch.nn.Conv1d(4, 6, 3), FLAX, "Conv"),
    "Conv2d": convolution(torch.nn.Conv2d(4, 6, (3, 2), 2), FLAX, "Conv", strides=2),
    "Conv3d": convolution(torch.nn.Conv3d(4, 6, (3, 2, 1)), FLAX, "Conv"),
    "groups": convolution(torch.nn.Conv2d(4, 6, (3, 2), groups=2), FLAX, "Conv", groups=2),
    "WSConv1d": convolution(bcn_torch.WSConv1d(4, 6, 3), OURS, "WSConv"),
    "WSConv2d": convolution(bcn_torch.WSConv2d(4, 6, (3, 2), 2), OURS, "WSConv", strides=2),
    "WSConv3d": convolution(bcn_torch.WSConv3d(4, 6, (3, 2, 1)), OURS, "WSConv"),
    "WS groups": convolution(bcn_torch.WSConv2d(4, 6, (3, 2), groups=2), OURS, "WSConv", groups=2),
    "Linear": Case(torch.nn.Linear(8, 6), nn.Dense(6), partial(nnx.Linear, 8, 6), (5, 8), 8),
    "WSLinear": layer(bcn_torch.WSLinear(8, 6), OURS, "WSDense", (8, 6), (5, 8), 8),
    "BatchNorm2d": norm(torch.nn.BatchNorm2d(8), FLAX, "BatchNorm", epsilon=1e-5, **EVALUATE),
    "BatchNorm": norm(bcn_torch.BatchNorm(8), OURS, "BatchNorm", **EVALUATE),
    "EstBN": norm(bcn_torch.EstimatedBatchNorm(8), OURS, "EstimatedBatchNorm", **EVALUATE),
    "ChannelNorm": norm(bcn_torch.ChannelNorm(8, 4), OURS, "ChannelNorm", **GROUPS),
    "BCN": norm(bcn_torch.BatchChannelNorm(8, 4), OURS, "BatchChannelNorm", **GROUPS, **EVALUATE),
    "GroupNorm": norm(torch.nn.GroupNorm(4, 8), FLAX, "GroupNorm", **GROUPS, epsilon=1e-5),
    "LayerNorm": layer(torch.nn.LayerNorm(8), FLAX, "LayerNorm", (8,), (5, 8), 8, epsilon=1e-5),
    "PReLU": Case(torch.nn.PReLU(), nn.PReLU(), lambda rngs: nnx.PReLU(), (5, 8)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_layer_computes_the_same_and_its_weights_return(case, api):
    flax = case.linen if api == "linen" else case.nnx(rngs=nnx.Rngs(0))
    assert_converts(randomize(case.torch), flax, normal(case.shape), roundings(case.terms))


def test_an_embedding_looks_up_the_same():
    module, tokens = torch.nn.Embedding(7, 3), np.array([[0, 6], [3, 3]])
    layer = nn.Embed(7, 3)
    variables = interop.variables_from_torch(module, shapes(layer, tokens))
    expected = module(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_array_equal(layer.apply(variables, tokens), expected)
    assert_same_state(interop.state_dict_from_variables(variables, module), module.state_dict())


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("window", "outputs", "options"),
    [
        ((3,), 5, {}),
        ((3, 2), 5, {"stride": 2, "output_padding": 1}),
        ((3, 2), 4, {"stride": 2, "output_padding": 1}),  # as many as inputs
        ((4, 4), 5, {"stride": 2, "padding": 1}),
        ((3, 2), 5, {"stride": 2, "padding": 1, "dilation": 2, "output_padding": 1}),
        ((2, 3, 2), 5, {"stride": 2}),
    ],
)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_transposed_convolution_computes_the_same(
    api, window, outputs, options, transpose_kernel
):
    kinds = {1: torch.nn.ConvTranspose1d, 2: torch.nn.ConvTranspose2d, 3: torch.nn.ConvTranspose3d}
    module = randomize(kinds[len(window)](4, outputs, window, **options))
    p, q, d = (
        options.get(k, n) for k, n in (("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    flax = {
        "strides": (options.get("stride", 1),) * len(window),
        # As the docstring of `bcn_flax.interop` states it.
        "padding": [(d * (k - 1) - p, d * (k - 1) - p + q) for k in window],
        "kernel_dilation": (d,) * len(window),
        "transpose_kernel": transpose_kernel,
    }
    x, ulps = normal((2, *(5, 4, 3)[: len(window)], 4)), roundings(4 * np.prod(window))
    if api == "linen":
        layer, given = nn.ConvTranspose(outputs, window, **flax), {"": transpose_kernel}
        assert_converts(module, layer, x, ulps, transposed=given)
    else:
        layer = nnx.ConvTranspose(4, outputs, window, **flax, rngs=nnx.Rngs(0))
        assert_converts(module, layer, x, ulps)


def test_valid_padding_is_no_padding_where_strides_are_not_longer_than_windows():
    module = randomize(torch.nn.ConvTranspose2d(3, 2, 3, stride=2))
    layer = nn.ConvTranspose(2, (3, 3), (2, 2), padding="VALID")
    assert_converts(module, layer, normal((1, 4, 5, 3)), roundings(27), transposed=[""])


class Autoencoder(nn.Module):
    """Convolutions of either sort, one of them square."""

    transpose_kernel: bool = False

    def setup(self):
        self.down = nn.Conv(4, (3, 3))
        self.up = nn.ConvTranspose(4, (3, 3), transpose_kernel=self.transpose_kernel)

    def __call__(self, x):
        return self.up(self.down(x))


def autoencoder():
    return torch.nn.ModuleDict(
        {"down": torch.nn.Conv2d(3, 4, 3), "up": torch.nn.ConvTranspose2d(4, 4, 3)}
    )


def test_a_torch_module_declares_transposed_convolutions_but_not_transpose_kernel():
    like = shapes(Autoencoder(), jnp.ones((1, 8, 8, 3)))
    with pytest.raises(
        ValueError, match=r"transpose_kernel: pass transposed=\{'up': False\}, or True"
    ):
        interop.match(autoencoder(), like)
    flipped = interop.match(autoencoder(), like, transposed={"up": False})
    assert "flipped" in str(flipped)
    assert "flipped" not in str(interop.match(autoencoder(), like, transposed={"up": True}))


def test_both_modules_must_agree_which_convolutions_are_transposed():
    like = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
    module = torch.nn.ConvTranspose2d(4, 4, 3)
    expected = "of weight, PyTorch's module says transposed=True, Flax's module says "
    with pytest.raises(ValueError, match=expected + "transposed=False"):
        interop.match(module, like)
    with pytest.raises(ValueError, match="`transposed` says transposed=True"):
        interop.match(module.state_dict(), like, transposed=[""])


class EstimatedBatchNorm(torch.nn.Module):
    """With the names of the authors' estimated batch norm, in evaluation."""

    def __init__(self, channels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("estbn_moving_speed", torch.zeros(1))

    def forward(self, x):
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias
        )


class AuthorsNorm(torch.nn.Module):
    """With the names of the authors' batch-channel norms: `bn`, or `pbn` without an estimate."""

    def __init__(self, channels, groups, name):
        super().__init__()
        self.name, self.groups = name, groups
        norm = EstimatedBatchNorm if name == "bn" else torch.nn.BatchNorm2d
        self.add_module(name, norm(channels))
        self.weight = torch.nn.Parameter(torch.ones(1, groups, 1))
        self.bias = torch.nn.Parameter(torch.zeros(1, groups, 1))

    def forward(self, x):
        groups = self.get_submodule(self.name)(x).flatten(2).unflatten(1, (self.groups, -1))
        groups = groups.flatten(2)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
        return ((groups - mean) / (var + 1e-5).sqrt() * self.weight + self.bias).view(x.shape)


class AuthorsNetwork(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3)
        self.norm1 = AuthorsNorm(8, 4, name)

    def forward(self, x):
        return self.norm1(self.conv1(x))


class OurNetwork(nn.Module):
    estimate: bool

    @nn.compact
    def __call__(self, x, evaluate=True):
        x = nn.Conv(8, (3, 3), padding="VALID", name="conv1")(x)
        norm = bcn_flax.BatchChannelNorm(num_groups=4, estimate=self.estimate, name="norm1")
        return norm(x, use_running_average=evaluate)


@pytest.mark.parametrize("name", ["bn", "pbn"])
def test_the_authors_batch_channel_norm_computes_the_same_and_its_weights_return(name):
    network = OurNetwork(estimate=name == "bn")
    x = normal((2, 6, 5, 3))
    assert_converts(randomize(AuthorsNetwork(name)), network, x, roundings(27 + 24))


def test_training_updates_the_same_mean_and_in_flax_the_biased_variance():
    module, layer, x = AuthorsNetwork("pbn"), OurNetwork(estimate=False), normal((2, 6, 5, 3))
    module = randomize(module).train()
    match = interop.match(module, shapes(layer, x))
    before = module.norm1.pbn.running_var.clone()
    y, updates = layer.apply(match.to_flax(module), x, evaluate=False, mutable=["batch_stats"])
    expected = layout.to_flax(module(layout.to_torch(x)))
    # The batch norm divides by the deviation of 24 values, each a sum of 27 products.
    assert_close(y, expected, ulps=4 * roundings(27 + 24), dtype=np.float32)
    after = match.to_flax(module)["batch_stats"]["norm1"]["batch_norm"]
    statistics = updates["batch_stats"]["norm1"]["batch_norm"]
    assert_close(statistics["mean"], after["mean"], ulps=roundings(27 + 24), dtype=np.float32)
    n = 2 * 4 * 3
    biased = 0.9 * before + (module.norm1.pbn.running_var - 0.9 * before) * (n - 1) / n
    assert_close(statistics["var"], biased, ulps=roundings(27 + 24), dtype=np.float32)


def test_skipped_tensors_are_reported_with_what_to_do():
    module = AuthorsNetwork("bn")
    module.norm1.bn.estbn_moving_speed.fill_(0.25)
    module.norm1.bn.num_batches_tracked.fill_(7)
    match = interop.match(module, shapes(OurNetwork(True), jnp.ones((1, 6, 5, 3))))
    assert "norm1.bn.num_batches_tracked: skipped, since Flax counts no batches" in str(match)
    assert (
        "norm1.bn.estbn_moving_speed: skipped, since in Flax's batch norm 0.25 is "
        "momentum=0.75" in str(match)
    )
    returned = match.to_torch(match.to_flax(module))
    assert returned["norm1.bn.num_batches_tracked"] == 7
    assert returned["norm1.bn.estbn_moving_speed"] == 0.25
