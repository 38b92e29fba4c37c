"""The ResNet is the published one for CIFAR, with any norm, and trains on single images."""

import importlib
import sys
from functools import cache, partial

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
from bcn_flax.models.architecture import shortcut
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


def test_shortcuts_take_every_other_pixel_and_add_channels_of_zeros():
    x = IMAGES[:, :7, :7]
    y = shortcut(x, 5, 2)
    assert y.shape == (1, 4, 4, 5)
    np.testing.assert_array_equal(y[..., :3], x[:, [0, 2, 4, 6]][:, :, [0, 2, 4, 6]])
    assert not y[..., 3:].any()
    np.testing.assert_array_equal(shortcut(x, 3, 1), x)


def plain(params, x):
    """The network without norms, layer after layer."""

    def conv(layer, x, stride=1):
        y = lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), ((1, 1), (1, 1)), None, None, AXES
        )
        return y + jnp.reshape(layer["bias"], (1, 1, 1, -1))

    x = jax.nn.relu(conv(params["first_conv"], x))
    for i, stride in enumerate((1, 2, 2)):
        block = params[f"blocks_{i}"]
        y = conv(block["convs_1"], jax.nn.relu(conv(block["convs_0"], x, stride)))
        kept = jnp.zeros_like(y).at[..., : x.shape[-1]].set(x[:, ::stride, ::stride])
        x = jax.nn.relu(kept + y)
    return x.mean((1, 2)) @ params["fc"]["kernel"] + params["fc"]["bias"][None]


def test_without_a_norm_it_equals_a_plain_implementation():
    model = small(conv=nn.Conv, norm=None)
    # Perturbed, because all biases start at 0.
    params = jax.tree.map(
        lambda p: p + 0.05 * jax.random.normal(KEY, p.shape), init(model)["params"]
    )
    logits, _ = evaluate(model, {"params": params})
    np.testing.assert_allclose(logits, jax.jit(plain)(params, IMAGES), rtol=1e-4, atol=1e-4)


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


@every_norm
def test_a_single_image_gives_finite_logits_and_gradients(norm):
    _, variables, step = network(norm)
    image = jax.random.normal(KEY, (1, 8, 8, 3))
    loss, logits, stats, gradient = step(variables, image, LABELS[:1])
    assert logits.shape == (1, 10)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((loss, logits, stats, gradient)))
    kernels = [gradient["first_conv"], *(gradient[f"blocks_{i}"]["convs_1"] for i in range(3))]
    assert all(kernel["kernel"].any() for kernel in kernels)


@pytest.mark.parametrize("norm", ["bcn", "bn"])
def test_statistics_move_in_training_only(norm):
    model, variables, step = network(norm)
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
                (20.0, "20 and 26"),
            )
        ),
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
