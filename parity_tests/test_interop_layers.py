"""Layers of `torch.nn`, and the authors' norms, compute in Flax what they compute in PyTorch."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import bcn_flax
from bcn_flax import interop
from bcn_flax.parity.errors import roundings
from parity_tests import layout
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.torch


class Case(NamedTuple):
    """One layer three times, its input's shape in Flax, and how many products a result sums."""

    torch: Any
    linen: Any
    nnx: Any
    shape: tuple[int, ...]
    terms: int = 1


def convolution(dimensions, groups=1, strides=1):
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dimensions]
    window = (3, 2, 1)[:dimensions]
    flax = {"strides": strides, "padding": "VALID", "feature_group_count": groups}
    return Case(
        partial(kind, 4, 6, window, stride=strides, groups=groups),
        nn.Conv(6, window, **flax),
        lambda rngs: nnx.Conv(4, 6, window, **flax, rngs=rngs),
        (2, *(7, 6, 5)[:dimensions], 4),
        terms=24,
    )


CASES = {
    "Conv1d": convolution(1),
    "Conv2d": convolution(2, strides=2),
    "Conv3d": convolution(3),
    "Conv2d, grouped": convolution(2, groups=2),
    "Linear": Case(
        lambda: torch.nn.Linear(8, 6),
        nn.Dense(6),
        lambda rngs: nnx.Linear(8, 6, rngs=rngs),
        (5, 8),
        terms=8,
    ),
    "BatchNorm2d": Case(
        lambda: torch.nn.BatchNorm2d(8),
        nn.BatchNorm(True, epsilon=1e-5),
        lambda rngs: nnx.BatchNorm(8, use_running_average=True, epsilon=1e-5, rngs=rngs),
        (2, 4, 3, 8),
    ),
    "GroupNorm": Case(
        lambda: torch.nn.GroupNorm(4, 8),
        nn.GroupNorm(4, epsilon=1e-5),
        lambda rngs: nnx.GroupNorm(8, 4, epsilon=1e-5, rngs=rngs),
        (2, 4, 3, 8),
        terms=24,
    ),
    "LayerNorm": Case(
        lambda: torch.nn.LayerNorm(8),
        nn.LayerNorm(epsilon=1e-5),
        lambda rngs: nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs),
        (5, 8),
        terms=8,
    ),
    "PReLU": Case(lambda: torch.nn.PReLU(), nn.PReLU(), lambda rngs: nnx.PReLU(), (5, 8)),
}


def randomize(module):
    """Give every number of a PyTorch module another value, and evaluate."""
    rng = np.random.default_rng(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tuple(tensor.shape))))
    return module.eval()


def shapes(layer, x, **call):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **call))


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def normal(shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_layer_computes_the_same_and_its_weights_return(case, api):
    module, x = randomize(case.torch()), normal(case.shape)
    if api == "linen":
        like = shapes(case.linen, x)
        moved = interop.variables_from_torch(module.state_dict(), like)
        y = case.linen.apply(moved, x)
    else:
        like = case.nnx(nnx.Rngs(0))
        moved = interop.module_from_torch(module.state_dict(), like)
        y = moved(x)
    expected = layout.to_flax(module(layout.to_torch(x)))
    assert_close(y, expected, ulps=roundings(case.terms), dtype=np.float32)
    returned = interop.state_dict_from_variables(moved, case.torch().state_dict())
    assert_same_state(returned, module.state_dict())


def test_an_embedding_looks_up_the_same():
    module, tokens = torch.nn.Embedding(7, 3), np.array([[0, 6], [3, 3]])
    layer = nn.Embed(7, 3)
    variables = interop.variables_from_torch(module, shapes(layer, tokens))
    expected = module(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_array_equal(layer.apply(variables, tokens), expected)
    assert_same_state(interop.state_dict_from_variables(variables, module), module.state_dict())


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("outputs", [5, 4], ids=["4 to 5", "square"])
@pytest.mark.parametrize(
    ("window", "options"),
    [
        ((3,), {}),
        ((3, 2), {"stride": 2, "output_padding": 1}),
        ((4, 4), {"stride": 2, "padding": 1}),
        ((3, 2), {"stride": 2, "padding": 1, "dilation": 2, "output_padding": 1}),
        ((2, 3, 2), {"stride": 2}),
    ],
)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_transposed_convolution_computes_the_same(
    api, window, options, outputs, transpose_kernel
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
    x = normal((2, *(5, 4, 3)[: len(window)], 4))
    if api == "linen":
        layer = nn.ConvTranspose(outputs, window, **flax)
        told = {"transposed": {"": transpose_kernel}}
        like = shapes(layer, x)
        moved = interop.variables_from_torch(module.state_dict(), like, **told)
        y = layer.apply(moved, x)
    else:
        like, told = nnx.ConvTranspose(4, outputs, window, **flax, rngs=nnx.Rngs(0)), {}
        moved = interop.module_from_torch(module.state_dict(), like)
        y = moved(x)
    expected = layout.to_flax(module(layout.to_torch(x)))
    assert_close(y, expected, ulps=roundings(4 * np.prod(window)), dtype=np.float32)
    returned = interop.state_dict_from_variables(moved, module.state_dict(), **told)
    assert_same_state(returned, module.state_dict())


def test_valid_padding_is_no_padding_where_strides_are_not_longer_than_windows():
    module, x = randomize(torch.nn.ConvTranspose2d(3, 2, 3, stride=2)), normal((1, 4, 5, 3))
    layer = nn.ConvTranspose(2, (3, 3), (2, 2), padding="VALID")
    variables = interop.variables_from_torch(module, shapes(layer, x))
    expected = layout.to_flax(module(layout.to_torch(x)))
    assert_close(layer.apply(variables, x), expected, ulps=roundings(27), dtype=np.float32)


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


def test_a_torch_module_tells_which_convolutions_are_transposed_but_not_flax_s_argument():
    like = shapes(Autoencoder(), jnp.ones((1, 8, 8, 3)))
    with pytest.raises(
        ValueError, match=r"transpose_kernel: pass transposed=\{'up': False\}, or True"
    ):
        interop.match(autoencoder(), like)
    flipped = interop.match(autoencoder(), like, transposed={"up": False})
    assert "flipped" in str(flipped)
    assert "flipped" not in str(interop.match(autoencoder(), like, transposed={"up": True}))


def test_what_square_kernels_belong_to_is_presumed_aloud_in_one_line():
    kernel = torch.ones(4, 4, 3, 3)
    state_dict = {"a.weight": kernel, "b.weight": kernel, "c.weight": torch.ones(5, 4, 3, 3)}
    like = {
        name.removesuffix(".weight"): {"kernel": jnp.ones((3, 3, 4, len(weight)))}
        for name, weight in state_dict.items()
    }
    report = str(interop.match(state_dict, {"params": like})).splitlines()
    note = "assumed to be ordinary convolutions: a, b; otherwise pass transposed=['a']"
    assert [line for line in report if "assumed" in line] == [note]
    assert report[-1] == note


def decoder():
    """One square convolution, one that is transposed by its shape, and one of a single pixel."""
    state_dict = {
        "square.weight": torch.ones(4, 4, 3, 3),
        "up.weight": torch.ones(4, 5, 3, 3),
        "mix.weight": torch.ones(4, 4, 1, 1),
    }
    like = {
        "square": {"kernel": jnp.ones((3, 3, 4, 4))},
        "up": {"kernel": jnp.ones((3, 3, 4, 5))},
        "mix": {"kernel": jnp.ones((1, 1, 4, 4))},
    }
    return state_dict, {"params": like}


@pytest.mark.parametrize("transposed", [(), ["up"], {"up": False}])
def test_beside_transposed_convolutions_square_ones_must_be_declared(transposed):
    expected = r"ambiguous: square\.weight .* pass transposed=\{'square': None\}"
    with pytest.raises(ValueError, match=expected) as caught:
        interop.match(*decoder(), transposed=transposed)
    assert "mix" not in str(caught.value)


def test_none_is_an_ordinary_convolution():
    report = str(interop.match(*decoder(), transposed={"up": False, "square": None}))
    (square,) = [line for line in report.splitlines() if line.startswith("square")]
    assert square.endswith("(O, I, *) -> (*, I, O)")
    assert report.splitlines()[-1].startswith("assumed to be ordinary convolutions: mix;")


def test_no_transposed_convolution_of_flax_has_groups():
    state_dict, like = {"up.weight": torch.ones(8, 4, 3, 3)}, jnp.ones((3, 3, 8, 8))
    expected = r"needs \(8, 8, 3, 3\); Flax has no grouped transposed convolution"
    with pytest.raises(ValueError, match=expected):
        interop.match(state_dict, {"params": {"up": {"kernel": like}}}, transposed=["up"])


def test_both_sides_must_agree_which_convolutions_are_transposed():
    like = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
    module = torch.nn.ConvTranspose2d(4, 4, 3)
    expected = "of weight, PyTorch's module says transposed=True, Flax's module says "
    with pytest.raises(ValueError, match=expected + "transposed=False"):
        interop.match(module, like)
    with pytest.raises(ValueError, match="`transposed` says transposed=True"):
        interop.match(module.state_dict(), like, transposed=[""])


def test_an_undeclared_transposed_convolution_is_misshapen_and_the_error_says_how_to_declare_it():
    layer, module = nn.ConvTranspose(5, (3, 3)), torch.nn.ConvTranspose2d(4, 5, 3)
    like = shapes(layer, jnp.ones((1, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"misshapen: weight .* pass transposed=\[''\]"):
        interop.match(module.state_dict(), like)
    assert interop.match(module.state_dict(), like, transposed=[""])


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
def test_the_authors_batch_channel_norm_moves_both_ways_and_computes_the_same(name):
    module, layer, x = AuthorsNetwork(name), OurNetwork(name == "bn"), normal((2, 6, 5, 3))
    module = randomize(module)
    match = interop.match(module.state_dict(), shapes(layer, x))
    variables = match.to_flax(module)
    expected = layout.to_flax(module(layout.to_torch(x)))
    assert_close(layer.apply(variables, x), expected, ulps=roundings(27 + 24), dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())


def test_training_by_the_batch_moves_the_same_mean_and_flax_s_variance_biased():
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


def test_what_stays_behind_is_reported_with_what_to_do():
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


def test_a_gain_for_each_output_may_have_axes_of_length_1_in_pytorch():
    state_dict = {"conv.weight": torch.ones(6, 4, 3, 3), "conv.gain": torch.rand(6, 1, 1, 1)}
    like = {"params": {"conv": {"kernel": jnp.ones((3, 3, 4, 6)), "gain": jnp.ones(6)}}}
    match = interop.match(state_dict, like)
    variables = match.to_flax(state_dict)
    np.testing.assert_array_equal(
        variables["params"]["conv"]["gain"], state_dict["conv.gain"].flatten().numpy()
    )
    assert_same_state(match.to_torch(variables), state_dict)
