"""The ResNet is the published one for CIFAR, with any norm, and trains on single images."""

import importlib
import sys
from functools import cache, partial, reduce
from operator import getitem

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jaxtyping import install_import_hook

from bcn_flax.linen import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import VGG, ResNet
from bcn_flax.models import nnx as nnx_models
from bcn_flax.models.architecture import residual_blocks, shortcut
from bcn_flax.surgery import linen as surgery
from parity_tests.test_nnx import fill

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
LABELS = jnp.arange(4)
AXES = ("NHWC", "HWIO", "NHWC")
NORMS = {
    "bcn": partial(BatchChannelNorm, num_groups=8),
    "bn": nn.BatchNorm,
    "gn": partial(nn.GroupNorm, num_groups=8),
    "none": None,
}
every_norm = pytest.mark.parametrize("norm", NORMS)

published = partial(ResNet, conv=nn.Conv, norm=BatchNorm)
small = partial(ResNet, depth=8)


@pytest.fixture(autouse=True)
def _quick_initializers():
    with jax.default_prng_impl("rbg"):  # compile several times as fast
        yield


def init(model, x=IMAGES):
    return jax.jit(partial(model.init, train=False))(KEY, x)


def shapes(model, x=IMAGES):
    return jax.eval_shape(partial(model.init, train=False), KEY, x)


def make_step(model):
    """A step of training: from variables and a batch to loss, logits, statistics and gradient."""

    def step(variables, x, labels):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, updates.get("batch_stats", {}))

        (value, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(
            variables["params"]
        )
        return value, logits, stats, gradient

    return jax.jit(step)


@cache
def network(norm):
    """A network, its variables and its step, which compiles once for all tests on single images."""
    model = small(conv=WSConv if norm in ("bcn", "gn") else nn.Conv, norm=NORMS[norm])
    with jax.default_prng_impl("rbg"):
        return model, init(model), make_step(model)


def evaluate(model, variables):
    return jax.jit(partial(model.apply, train=False, mutable=["batch_stats"]))(variables, IMAGES)


# The published architecture


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (110, 1.7)])
def test_there_are_as_many_parameters_as_published(depth, millions):
    images = jnp.ones((1, 32, 32, 3))
    parameters = sum(x.size for x in jax.tree.leaves(shapes(published(depth), images)["params"]))
    # As many decimals as the paper gives.
    assert round(parameters / 1e6, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize("depth", [8, 14])
def test_the_depth_counts_the_layers_with_weights(depth):
    flat = jax.tree_util.tree_leaves_with_path(shapes(published(depth))["params"])
    assert sum("kernel" in jax.tree_util.keystr(path) for path, _ in flat) == depth


@pytest.mark.parametrize(
    ("size", "sizes"), [(32, [32, 16, 8]), (8, [8, 4, 2]), (7, [7, 4, 2]), (1, [1, 1, 1])]
)
def test_the_stages_halve_the_image_and_double_the_channels(size, sizes):
    images = jnp.ones((2, size, size, 3))
    model = small()

    def outputs():
        _, state = model.init_with_output(KEY, images, train=False, capture_intermediates=True)
        return state["intermediates"]

    seen = jax.eval_shape(outputs)
    blocks = [seen[f"blocks_{i}"]["__call__"][0].shape for i in range(3)]
    assert blocks == [(2, s, s, c) for s, c in zip(sizes, (16, 32, 64), strict=True)]


def test_only_the_first_block_of_a_stage_halves_the_image():
    assert residual_blocks(14) == [(16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]


def test_shortcuts_take_every_other_pixel_and_add_channels_of_zeros():
    x = IMAGES[:, :7, :7]
    y = shortcut(x, 5, 2)
    assert y.shape == (1, 4, 4, 5)
    np.testing.assert_array_equal(y[..., :3], x[:, [0, 2, 4, 6]][:, :, [0, 2, 4, 6]])
    assert not y[..., 3:].any()
    np.testing.assert_array_equal(shortcut(x, 3, 1), x)


class Plain:
    """The layers of a network as functions, with these variables; the norms are Flax's."""

    def __init__(self, variables, train):
        self.variables, self.train, self.seen = variables, train, {}

    def own(self, *names):
        return {kind: reduce(getitem, names, tree) for kind, tree in self.variables.items()}

    def conv(self, x, *names, stride=1):
        layer = reduce(getitem, names, self.variables["params"])
        y = lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), ((1, 1), (1, 1)), None, None, AXES
        )
        return y + jnp.reshape(layer.get("bias", jnp.zeros(1)), (1, 1, 1, -1))

    def norm(self, x, *names):
        if "batch_stats" not in self.variables:
            return x
        norm = nn.BatchNorm(use_running_average=not self.train)
        y, after = norm.apply(self.own(*names), x, mutable=["batch_stats"])
        self.seen["/".join(names)] = after["batch_stats"]
        return y

    def head(self, x):
        params = self.variables["params"]["fc"]
        return x.mean((1, 2)) @ params["kernel"] + params["bias"][None]


def plain_resnet(variables, x, train):
    """Logits and statistics, layer after layer."""
    layers = Plain(variables, train)
    x = jax.nn.relu(layers.norm(layers.conv(x, "first_conv"), "first_norm"))
    for i, stride in enumerate((1, 2, 2)):
        block = f"blocks_{i}"
        y = layers.norm(layers.conv(x, block, "convs_0", stride=stride), block, "norms_0")
        y = layers.norm(layers.conv(jax.nn.relu(y), block, "convs_1"), block, "norms_1")
        kept = jnp.zeros_like(y).at[..., : x.shape[-1]].set(x[:, ::stride, ::stride])
        x = jax.nn.relu(kept + y)
    return layers.head(x), layers.seen


def plain_vgg(variables, x, train):
    """Of one block of a convolution, and one of two."""
    layers = Plain(variables, train)
    places = iter(range(20))
    for convolutions in 1, 2:
        for _ in range(convolutions):
            x = layers.conv(x, f"layers_{next(places)}")
            if "batch_stats" in variables:
                x = layers.norm(x, f"layers_{next(places)}")
            x, _ = jax.nn.relu(x), next(places)
        n, h, w, c = x.shape
        x, _ = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4)), next(places)
    return layers.head(x), layers.seen


def perturbed(variables):
    """All values changed, because biases start at 0 and scales at 1; variances stay positive."""
    return jax.tree.map(
        lambda p: p + 0.05 * jax.random.uniform(jax.random.key(p.size), p.shape), variables
    )


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_it_equals_a_plain_implementation(norm):
    model, variables, step = network(norm)
    variables = perturbed(variables)
    _, logits, stats, _ = step(variables, IMAGES, LABELS[:1])
    assert_alike((logits, stats), jax.jit(plain_resnet, static_argnums=2)(variables, IMAGES, True))
    if norm == "bn":
        logits, stats = evaluate(model, variables)
        expected, _ = jax.jit(plain_resnet, static_argnums=2)(variables, IMAGES, False)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, stats["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("norm", ["none", "bn"])
@pytest.mark.parametrize("train", [True, False])
def test_the_vgg_equals_a_plain_implementation(norm, train):
    blocks = ((4,), (6, 5))
    model = VGG(blocks, num_classes=3, conv=nn.Conv, norm=NORMS[norm])
    variables = perturbed(init(model))
    run = jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))
    logits, updates = run(variables, IMAGES)
    expected = jax.jit(plain_vgg, static_argnums=2)(variables, IMAGES, train)
    assert_alike((logits, updates.get("batch_stats", {})), expected)
    if norm == "bn" and train:
        make = partial(nnx_models.VGG, blocks, num_classes=3, conv=nnx.Conv, norm=nnx.BatchNorm)
        in_nnx = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        fill(in_nnx, variables)
        actual = nnx.jit(lambda model, x: model(x))(in_nnx, IMAGES)
        np.testing.assert_allclose(actual, logits, rtol=1e-5, atol=1e-5)


def assert_alike(actual, expected):
    """Logits, and the statistics of each norm."""
    (logits, stats), (plain_logits, plain_stats) = actual, expected
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(logits, plain_logits)
    for name, plain in plain_stats.items():
        jax.tree.map(close, reduce(getitem, name.split("/"), stats), plain)
    assert len(jax.tree.leaves(stats)) == len(jax.tree.leaves(plain_stats))


def test_kernels_start_as_he_et_al_say():
    """With a variance of 2 by fan-in, in linen and NNX."""
    given = []

    def linen_conv(*args, **options):
        given.append(options["kernel_init"])
        return nn.Conv(*args, **options)

    def nnx_conv(*args, **options):
        given.append(options["kernel_init"])
        return nnx.Conv(*args, **options)

    shapes(small(conv=linen_conv, norm=None))
    nnx.eval_shape(lambda: nnx_models.ResNet(8, conv=nnx_conv, norm=None, rngs=nnx.Rngs(0)))
    assert len(given) == 2 * 7
    for kernel_init in given[0], given[-1]:
        kernel = kernel_init(KEY, (3, 3, 64, 64), jnp.float32)
        np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)


@every_norm
def test_convolutions_have_a_bias_only_without_a_norm(norm):
    params = shapes(small(norm=NORMS[norm]))["params"]
    convs = [params["first_conv"], *(params[f"blocks_{i}"]["convs_1"] for i in range(3))]
    assert all(("bias" in conv) == (norm == "none") for conv in convs)
    assert ("first_norm" in params) == (norm != "none")


def test_every_group_of_the_default_has_several_channels():
    norms = [shapes(small())["params"][f"blocks_{i}"]["norms_1"] for i in range(3)]
    sizes = [
        norm["batch_norm"]["scale"].size // norm["channel_norm"]["scale"].size for norm in norms
    ]
    assert sizes == [2, 4, 8]


def test_the_given_classes_are_used_in_every_layer():
    layers = {"conv": nn.Conv, "norm": partial(BatchNorm, momentum=0.7), "dtype": jnp.bfloat16}
    resnet, vgg = (
        model.bind({}, rngs={"params": KEY})
        for model in (small(**layers), VGG(((8,), (8,)), **layers))
    )
    for conv, norm in (
        (resnet.first_conv, resnet.first_norm),
        (resnet.blocks[-1].convs[1], resnet.blocks[-1].norms[1]),
        (vgg.layers[0], vgg.layers[1]),
        (vgg.layers[4], vgg.layers[5]),
    ):
        assert (type(conv), type(norm), norm.momentum) == (nn.Conv, BatchNorm, 0.7)
        assert conv.dtype == norm.dtype == jnp.bfloat16
    assert resnet.fc.dtype == vgg.fc.dtype == jnp.bfloat16


# Training


def test_statistics_move_in_training_only():
    model, variables, step = network("bcn")
    _, _, after, _ = step(variables, IMAGES, LABELS[:1])
    before = variables["batch_stats"]
    moved = [(x != y).any() for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert len(moved) == 2 * 7
    assert all(moved)
    _, updates = evaluate(model, {**variables, "batch_stats": after})
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], after)


def test_in_bfloat16_only_the_computation_is_rounded():
    _, variables, step = network("bcn")
    _, expected, _, _ = step(variables, IMAGES, LABELS[:1])
    model = small(dtype=jnp.bfloat16)
    _, _, stats, gradient = jax.eval_shape(make_step(model), variables, IMAGES, LABELS[:1])
    assert {x.dtype for x in jax.tree.leaves((stats, gradient))} == {np.dtype(np.float32)}
    apply = partial(model.apply, train=True, mutable=["batch_stats", "intermediates"])
    outputs = jax.eval_shape(partial(apply, capture_intermediates=True), variables, IMAGES)
    computed = jax.tree.leaves((outputs[0], outputs[1]["intermediates"]))
    assert {x.dtype for x in computed} == {jnp.dtype(jnp.bfloat16)}
    logits, _ = jax.jit(apply)(variables, IMAGES)
    error = np.abs(np.asarray(logits, np.float32) - expected).max()
    # Some 10 roundings, one a layer.
    assert 0 < error < 10 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(expected).max()


def test_a_few_epochs_of_single_images_lower_the_loss():
    _, variables, step = network("bcn")
    images = jax.random.normal(jax.random.key(2), (4, 1, 8, 8, 3))
    epochs = []
    for _ in range(6):
        losses = []
        for image, label in zip(images, LABELS[:, None], strict=True):
            loss, _, stats, gradient = step(variables, image, label)
            assert all(jnp.isfinite(x).all() and x.any() for x in jax.tree.leaves(gradient))
            params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradient)
            variables = {"params": params, "batch_stats": stats}
            losses.append(float(loss))
        epochs.append(sum(losses))
    assert epochs[-1] < 0.5 * epochs[0]


def test_it_folds():
    model, variables, _ = network("bcn")
    training = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updates = training(variables, IMAGES)
    variables = {**variables, **updates}
    folded = surgery.fold(model, variables, IMAGES, train=False)
    expected, _ = evaluate(model, variables)
    actual = jax.jit(partial(folded.apply, train=False))(folded.variables, IMAGES)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["bcn", "none"])
def test_in_nnx_it_has_the_same_parameters_and_logits(norm):
    model, variables, _ = network(norm)
    layers = {"bcn": {}, "none": {"conv": nnx.Conv, "norm": None}}[norm]
    in_nnx = nnx.eval_shape(lambda: nnx_models.ResNet(8, **layers, rngs=nnx.Rngs(0)))
    fill(in_nnx, variables)
    in_nnx.eval()
    expected, _ = evaluate(model, variables)
    actual = nnx.jit(lambda model, x: model(x))(in_nnx, IMAGES)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# Annotations and errors


def test_the_annotated_shapes_hold(monkeypatch):
    """In copies of the modules, the annotations are checked at every call."""
    names = [f"bcn_flax.models.{name}" for name in ("architecture", "linen", "nnx")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    with install_import_hook(names, "beartype.beartype"):
        _, checked, in_nnx = map(importlib.import_module, names)
    assert checked.ResNet is not ResNet
    model = checked.ResNet(depth=8, num_classes=7)
    logits = jax.eval_shape(partial(model.apply, train=False), shapes(model), IMAGES)
    assert logits.shape == (1, 7)
    make = partial(in_nnx.ResNet, depth=8, num_classes=7)
    assert nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))(IMAGES)).shape == (1, 7)
    with pytest.raises(Exception, match="shortcut"):  # jaxtyping's own class of errors
        checked.shortcut(IMAGES[0], 16, 2)


DEPTH = (
    "depth must be a whole number 6n + 2, which is 3 stages of n blocks of 2 convolutions, a first "
    "convolution and a dense layer, with n at least 1, but depth={}. The nearest that fit are {}."
)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        *(
            (ResNet(depth), IMAGES, DEPTH.format(depth, nearest))
            for depth, nearest in (
                (18, "14 and 20"),
                (111, "110 and 116"),
                (9, "8 and 14"),
                (2, "8 and 14"),
                (-4, "8 and 14"),
            )
        ),
        (ResNet(20.0), IMAGES, "depth must be an integer, but depth=20.0 is of type float."),
        (
            small(),
            IMAGES[0],
            "The images must be (n, height, width, channels), but their shape is (8, 8, 3). For a "
            "single image, add the batch axis with x[None].",
        ),
        (
            small(norm=BatchChannelNorm),
            IMAGES,
            "num_groups must divide the number of channels, but num_groups=32 and there are 16 "
            "channels. Any of 1, 2, 4, 8, 16 would do.",
        ),
    ],
)
def test_bad_arguments_and_images_are_refused(model, x, message):
    with pytest.raises(ValueError, match=r".") as caught:
        shapes(model, x)
    assert str(caught.value) == message
