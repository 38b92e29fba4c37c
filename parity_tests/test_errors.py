"""Every complaint, word for word: the rule, the values seen, the way out."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bcn_flax.nnx
from bcn_flax import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    WSConv,
    WSDense,
    standardize_kernel,
)
from bcn_flax.models import VGG

X = jnp.ones((2, 4, 4, 8))
train = partial(BatchChannelNorm, num_groups=4, use_running_average=False)


def error_of(layer, *args, **kwargs):
    with pytest.raises(ValueError, match=r".") as caught:
        jax.eval_shape(lambda: layer.init(jax.random.key(0), *args, **kwargs))
    return str(caught.value)


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (
            train(),
            X.astype(jnp.int32),
            "The input must be of a real floating-point type, but it is int32. "
            "Convert it first, for example with x.astype(jnp.float32).",
        ),
        (
            train(),
            X.astype(jnp.complex64),
            "The input must be of a real floating-point type, but it is complex64. "
            "Convert it first, for example with x.astype(jnp.float32).",
        ),
        (
            train(),
            X[0, 0, 0],
            "The input must have a batch axis and a channel axis, (n, *space, c), but its shape is "
            "(8,). For a single sample, add the batch axis with x[None].",
        ),
        (
            train(axis=4),
            X,
            "The channel axis must be one of 1 to 3, or -3 to -1, for an input of shape "
            "(2, 4, 4, 8), whose axis 0 is the batch, but axis=4.",
        ),
        (
            train(axis=-4),
            X,
            "The channel axis must be one of 1 to 3, or -3 to -1, for an input of shape "
            "(2, 4, 4, 8), whose axis 0 is the batch, but axis=-4.",
        ),
        (
            train(axis=(2, 3)),
            X,
            "The channel axis must be one integer, but axis=(2, 3). Merge several channel axes "
            "into one with a reshape.",
        ),
        (
            train(),
            X[:0],
            "The input must not be empty, but its shape is (0, 4, 4, 8). "
            "Skip the empty batch, or pad it and pass a mask.",
        ),
        (
            train(num_groups=3),
            X,
            "num_groups must divide the number of channels, but num_groups=3 and there are 8 "
            "channels. Any of 1, 2, 4, 8 would do.",
        ),
        (
            ChannelNorm(),
            X,
            "num_groups must divide the number of channels, but num_groups=32 and there are 8 "
            "channels. Any of 1, 2, 4, 8 would do.",
        ),
        (
            train(num_groups=None, group_size=5),
            X,
            "group_size must divide the number of channels, but group_size=5 and there are 8 "
            "channels. Any of 1, 2, 4, 8 would do.",
        ),
        (
            train(num_groups=0),
            X,
            "num_groups must divide the number of channels, but num_groups=0 and there are 8 "
            "channels. Any of 1, 2, 4, 8 would do.",
        ),
        (
            train(num_groups=4, group_size=2),
            X,
            "Exactly one of num_groups and group_size must be given, but num_groups=4 and "
            "group_size=2. Set the other one to None.",
        ),
        (
            train(num_groups=None),
            X,
            "Exactly one of num_groups and group_size must be given, but num_groups=None and "
            "group_size=None. Set the other one to None.",
        ),
        (
            train(momentum=1.5),
            X,
            "momentum is the weight of the old running average and must be from 0 to 1, but "
            "momentum=1.5. A PyTorch momentum m is 1 - m here: 0.1 there is 0.9 here.",
        ),
        (
            train(epsilon=0.0),
            X,
            "epsilon must be positive and finite, but epsilon=0.0. The usual one is 1e-5.",
        ),
        (
            train(epsilon=float("nan")),
            X,
            "epsilon must be positive and finite, but epsilon=nan. The usual one is 1e-5.",
        ),
        (
            WSConv(8, (1, 1)),
            X[..., :1],
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            "kernel of shape (1, 1, 1, 8) has 1. Use the layer without weight standardization "
            "here.",
        ),
        (
            WSDense(3),
            X[..., :1],
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            "kernel of shape (1, 3) has 1. Use the layer without weight standardization here.",
        ),
    ],
)
def test_layers_complain(layer, x, message):
    assert error_of(layer, x) == message


@pytest.mark.parametrize("layer", [BatchNorm, EstimatedBatchNorm, BatchChannelNorm])
def test_a_missing_flag_lists_three_fixes(layer):
    name = layer.__name__
    assert error_of(layer(), X) == (
        f"{name} must be told whether to normalize by the running averages (evaluation) or to "
        "update them (training), but use_running_average is None. Either\n"
        f"  1. set it in the constructor: {name}(use_running_average=not train),\n"
        "  2. pass it in the call: layer(x, use_running_average=not train), or\n"
        f"  3. set it for all layers at once: norm = partial({name}, "
        "use_running_average=not train)."
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            jnp.ones(2, bool),
            "The mask must have as many axes as the input, each of the same length or 1, but the "
            "mask's shape is (2,) and the input's is (2, 4, 4, 8). To mask whole samples, give it "
            "the shape (2, 1, 1, 1).",
        ),
        (
            jnp.ones((2, 3, 4, 1), bool),
            "The mask must have as many axes as the input, each of the same length or 1, but the "
            "mask's shape is (2, 3, 4, 1) and the input's is (2, 4, 4, 8). To mask whole samples, "
            "give it the shape (2, 1, 1, 1).",
        ),
        (
            jnp.ones((2, 1, 1, 1)),
            "The mask must be boolean, true where a value counts, but it is float32. Convert it "
            "first, for example with mask != 0.",
        ),
    ],
)
@pytest.mark.parametrize("layer", [train(), ChannelNorm(4), BatchNorm(False)], ids=type)
def test_masks_must_line_up(layer, mask, message):
    assert error_of(layer, X, mask=mask) == message


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            VGG(),
            X,
            "5 blocks, each halving the image, need images of at least 32x32, but these are 4x4. "
            "Use fewer blocks or larger images.",
        ),
        (
            VGG(),
            X[0],
            "The images must be (n, height, width, channels), but their shape is (4, 4, 8). For a "
            "single image, add the batch axis with x[None].",
        ),
        (
            VGG(norm="layer"),
            X,
            "norm must be one of bcn, bn, gn, none, but norm='layer'.",
        ),
        (
            VGG(blocks=((8,), ())),
            X,
            "blocks must list the features of at least one convolution in each of at least one "
            "block, but blocks=((8,), ()). An example: ((64, 64), (128, 128)).",
        ),
    ],
)
def test_networks_complain(model, x, message):
    assert error_of(model, x, train=True) == message


def test_a_single_value_per_channel_is_warned_of_in_training_only():
    x = jnp.ones((1, 8))
    layer = train()
    init = partial(layer.init, jax.random.key(0))
    variables = jax.eval_shape(init, x)  # initializing with one sample is no mistake
    message = (
        "The batch has a single value per channel (1 sample without space axes, or of size 1), so "
        "its variance is 0, which estimates nothing. Train with a larger batch, or evaluate with "
        "use_running_average=True."
    )
    step = partial(layer.apply, mutable=["batch_stats"])
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        jax.eval_shape(step, variables, x)
    jax.eval_shape(partial(layer.apply, use_running_average=True), variables, x)
    jax.eval_shape(step, variables, jnp.ones((2, 8)))


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_groups_of_a_single_value_are_warned_of(api):
    def run(num_groups, shape):
        x = jnp.ones(shape)
        if api == "linen":
            jax.eval_shape(ChannelNorm(num_groups).init, jax.random.key(0), x)
        else:
            jax.eval_shape(bcn_flax.nnx.ChannelNorm(8, num_groups, rngs=nnx.Rngs(0)), x)

    with pytest.warns(UserWarning, match=r"single value .* so its output is the bias"):
        run(8, (2, 1, 8))
    run(8, (2, 2, 8))
    run(4, (2, 8))


@pytest.mark.parametrize(
    ("shape", "axis", "message"),
    [
        (
            (1, 1, 3),
            -1,
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            "kernel of shape (1, 1, 3) has 1. Use the layer without weight standardization here.",
        ),
        (
            (0, 3),
            -1,
            "Weight standardization needs at least 2 weights per output channel (fan-in), but a "
            "kernel of shape (0, 3) has 0. Use the layer without weight standardization here.",
        ),
        (
            (3,),
            -1,
            "A kernel to standardize must have an output channel axis and another one, but its "
            "shape is (3,) and axis=-1.",
        ),
        (
            (3, 4),
            2,
            "A kernel to standardize must have an output channel axis and another one, but its "
            "shape is (3, 4) and axis=2.",
        ),
    ],
)
def test_standardize_kernel_complains(shape, axis, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        standardize_kernel(jnp.ones(shape), axis=axis)


def test_a_traced_momentum_passes():
    """As a schedule gives inside `jit`, where no value can be checked."""

    @jax.jit
    def mean_after(momentum):
        variables = train().init(jax.random.key(0), X)
        updates = train(momentum=momentum).apply(variables, X, mutable=["batch_stats"])[1]
        return updates["batch_stats"]["batch_norm"]["mean"]

    assert (mean_after(0.75) == 0.25).all()


def test_a_traced_epsilon_passes():
    @jax.jit
    def output(epsilon):
        variables = train().init(jax.random.key(0), X)
        return train(epsilon=epsilon).apply(variables, X, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(output(1e-5), output(jnp.float32(1e-5)))
