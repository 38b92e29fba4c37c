"""Every error of Flax and PyTorch, word for word: the rule, the values seen, the way out."""

import re
import warnings
from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bcn_flax.linen
import bcn_flax.nnx
from bcn_flax import BatchChannelNorm, standardize_kernel
from bcn_flax.models import VGG

if find_spec("torch"):  # without it, what needs it is not run
    import torch

    import bcn_torch
    from bcn_torch import Standardization, standardize_weight

needs_torch = pytest.mark.torch
X = jnp.ones((2, 4, 4, 8))


def linen(layer, x=X, mask=None, **options):
    """Initialize a layer of linen."""
    module = getattr(bcn_flax.linen, layer)(**options)
    call = {} if mask is None else {"mask": mask}
    return jax.eval_shape(partial(module.init, **call), jax.random.key(0), x)


def of_nnx(layer, x=X, mask=None, num_features=8, **options):
    """Make a layer of NNX and call it."""
    if "features" in options:
        sizes = {"in_features": x.shape[-1], "out_features": options.pop("features")}
    else:
        sizes = {"num_features": num_features}
    call = {} if mask is None else {"mask": mask}
    make = partial(getattr(bcn_flax.nnx, layer), **sizes, **options)
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))(x, **call))


def network(x=X, **options):
    """Initialize a network of linen."""
    return jax.eval_shape(partial(VGG(**options).init, train=True), jax.random.key(0), x)


def kernel(shape, axis=-1):
    """Standardize a kernel of that shape."""
    return standardize_kernel(jnp.ones(shape), axis=axis)


def small_vgg(**options):
    """A network of PyTorch."""
    norm = partial(bcn_torch.BatchChannelNorm, groups=2)
    return bcn_torch.VGG(((8,), (8,)), **{"norm": norm, **options})


def torch_images(make, shape, dtype="float32"):
    """Give images to a network of PyTorch, without computing anything."""
    with torch.device("meta"):
        return make()(torch.ones(shape, dtype=getattr(torch, dtype)))


# --- The rules, {} for what is seen ---------------------------------------------------------------

FLOAT = (
    "The input must be of a real floating-point type, but it is {}. Convert it first, for example "
    "with {}."
)
AXES = (
    "The input must have a batch axis and a channel axis, {}, but its shape is {}. For a single "
    "sample, add the batch axis with x[None]."
)
AXIS = (
    "The channel axis must be from 1 to 3, or from -3 to -1, for an input of shape (2, 4, 4, 8), "
    "because axis 0 is the batch axis, but axis={}."
)
MASK = (
    "The mask must have as many axes as the input, each of the same length or 1, but the mask's "
    "shape is {} and the input's is (2, 4, 4, 8). To mask whole samples, give it the shape "
    "(2, 1, 1, 1)."
)
DIVISOR = (
    "{0} must divide the number of channels, but {0}={1} and there are {2} channels. Any of {3} "
    "would do."
)
ONE_OF_TWO = (
    "Exactly one of num_groups and group_size must be given, but num_groups={} and group_size={}. "
    "Set the other one to None."
)
EPSILON = (
    "{0} must be positive and finite, and a normal number of float32, from 1.18e-38 to 3.4e+38, "
    "but {0}={1}. The usual one is 1e-5."
)
FACTOR = (
    "gamma must be finite and not 0, as a normal number of float32, but gamma={}. Without a factor "
    "it is 1.0."
)
FAN_IN = (
    "Weight standardization needs at least 2 weights per output channel (fan-in), but a {} of "
    "shape {} has {}. Use the layer without weight standardization here."
)
KERNEL = (
    "A kernel to standardize must have an output channel axis and another one, but its shape is {} "
    "and axis={}."
)
FLAG = (
    "{0} needs use_running_average, true to normalize with the running averages (evaluation) or "
    "false to update them (training), but it is None. Either\n"
    "  1. set it in the constructor: {0}(use_running_average=not train),\n"
    "  2. pass it in the call: layer(x, use_running_average=not train), or\n"
    "  3. set it for all layers at once: norm = partial({0}, use_running_average=not train)."
)
MOMENTUM = (
    "momentum is the weight of the new value in the running estimates and must be from 0 to 1, but "
    "momentum={}. A Flax momentum m, the weight of the old value, is 1 - m here: 0.9 there is 0.1 "
    "here."
)
CHANNELS = (
    "The number of channels, axis 1 of [batch, channels, *], must be {} here, but it is {}: the "
    "input's shape is {}. If its channels come last, move them with x.movedim(-1, 1); otherwise "
    "make the module for that many channels."
)
GAIN = (
    "The gain must be None without Standardization(gain=True), and with it have one value for each "
    "output channel: for a weight of shape (2, 3) and gain={} its shape must be {}, but it is {}."
)
SIZE = (
    "The images are {}, too small for {} blocks, each of which halves them: the smallest size is "
    "{}. Use larger images, or fewer blocks."
)
BLOCKS = (
    "blocks must have at least one block, and each block at least one convolution, but blocks={}. "
    "Give each block the output channels of its convolutions, for example ((64, 64), (128, 128))."
)

# --- The tables -----------------------------------------------------------------------------------

TRAIN = {"num_groups": 4, "use_running_average": False}
ONE_CHANNEL = {"x": X[..., :1], "features": 8}
MASKS = {
    (2,): jnp.ones(2, bool),
    (2, 3, 4, 1): jnp.ones((2, 3, 4, 1), bool),
}
MASKED = {
    "BatchChannelNorm": TRAIN,
    "ChannelNorm": {"num_groups": 4},
    "BatchNorm": {"use_running_average": False},
}
# A layer with its arguments, the same for linen and NNX.
FLAX = (
    *(
        ("BatchChannelNorm", {**TRAIN, **options}, text)
        for options, text in (
            ({"x": X.astype(int)}, FLOAT.format("int32", "x.astype(jnp.float32)")),
            ({"x": X.astype(complex)}, FLOAT.format("complex64", "x.astype(jnp.float32)")),
            ({"x": X[0, 0, 0]}, AXES.format("(n, *space, c)", "(8,)")),
            ({"axis": 4}, AXIS.format(4)),
            ({"axis": -4}, AXIS.format(-4)),
            (
                {"axis": (2, 3)},
                "The channel axis must be one integer, but axis=(2, 3). Merge several channel axes "
                "into one with a reshape.",
            ),
            (
                {"axis": 1.0},
                "The channel axis must be one integer, but axis=1.0. Merge several channel axes "
                "into one with a reshape.",
            ),
            (
                {"x": X[:0]},
                "The input must not be empty, but its shape is (0, 4, 4, 8). Skip the empty batch, "
                "or pad it and pass a mask.",
            ),
            ({"num_groups": 3}, DIVISOR.format("num_groups", 3, 8, "1, 2, 4, 8")),
            ({"num_groups": 0}, DIVISOR.format("num_groups", 0, 8, "1, 2, 4, 8")),
            (
                {"num_groups": None, "group_size": 5},
                DIVISOR.format("group_size", 5, 8, "1, 2, 4, 8"),
            ),
            ({"group_size": 2}, ONE_OF_TWO.format(4, 2)),
            ({"num_groups": None}, ONE_OF_TWO.format(None, None)),
            (
                {"momentum": 1.5},
                "momentum is the weight of the old running average and must be from 0 to 1, but "
                "momentum=1.5. A PyTorch momentum m is 1 - m here: 0.1 there is 0.9 here.",
            ),
            ({"epsilon": 0.0}, EPSILON.format("epsilon", 0.0)),
            ({"epsilon": float("nan")}, EPSILON.format("epsilon", "nan")),
        )
    ),
    ("ChannelNorm", {}, DIVISOR.format("num_groups", 32, 8, "1, 2, 4, 8")),
    (
        "WSConv",
        {**ONE_CHANNEL, "kernel_size": (1, 1)},
        FAN_IN.format("kernel", (1, 1, 1, 8), 1),
    ),
    ("WSDense", ONE_CHANNEL, FAN_IN.format("kernel", (1, 8), 1)),
    *(
        (layer, {"use_running_average": None}, FLAG.format(layer))
        for layer in ("BatchNorm", "EstimatedBatchNorm")
    ),
    (
        "BatchChannelNorm",
        {"num_groups": 4, "use_running_average": None},
        FLAG.format("BatchChannelNorm"),
    ),
    *(
        (layer, {**options, "mask": mask}, MASK.format(shape))
        for layer, options in MASKED.items()
        for shape, mask in MASKS.items()
    ),
    *(
        (
            layer,
            {**options, "mask": jnp.ones((2, 1, 1, 1))},
            "The mask must be boolean, true where a value counts, but it is float32. Convert it "
            "first, for example with mask != 0.",
        )
        for layer, options in MASKED.items()
    ),
)
# A call of anything else.
FLAX_CALLS = (
    (
        lambda: of_nnx("BatchChannelNorm", num_features=4, **TRAIN),
        "The input must have the 4 channels that the layer was made for, but it has 8. Make the "
        "layer with num_features=8, or set axis to the channel axis of the input.",
    ),
    (lambda: kernel((1, 1, 3)), FAN_IN.format("kernel", (1, 1, 3), 1)),
    (lambda: kernel((0, 3)), FAN_IN.format("kernel", (0, 3), 0)),
    (lambda: kernel((3,)), KERNEL.format((3,), -1)),
    (lambda: kernel((3, 4), 2), KERNEL.format((3, 4), 2)),
    (
        network,
        "5 blocks, each halving the image, need images of at least 32x32, but these are 4x4. Use "
        "fewer blocks or larger images.",
    ),
    (
        lambda: network(X[0]),
        "The images must be (n, height, width, channels), but their shape is (4, 4, 8). For a "
        "single image, add the batch axis with x[None].",
    ),
    (
        lambda: network(blocks=((8,), ())),
        "blocks must list the features of at least one convolution in each of at least one block, "
        "but blocks=((8,), ()). An example: ((64, 64), (128, 128)).",
    ),
)
EPS = partial(EPSILON.format, "eps")
GROUPS = partial(DIVISOR.format, "groups")
WEIGHT = partial(FAN_IN.format, "weight")
NO_CHANNEL = "There must be at least 1 channel, but channels={}."
NAN, INF = float("nan"), float("inf")


def weight(*shape, gain=None, **how):
    """Standardize a PyTorch weight of that shape."""
    return standardize_weight(torch.ones(shape), Standardization(**how), gain)


def learning_gain(gain=None):
    return standardize_weight(torch.ones(2, 3), Standardization(gain=True), gain)


TORCH_CALLS = (
    (lambda: bcn_torch.BatchNorm(8, momentum=1.1), MOMENTUM.format(1.1)),
    (lambda: bcn_torch.EstimatedBatchNorm(8, momentum=-0.1), MOMENTUM.format(-0.1)),
    (lambda: bcn_torch.BatchChannelNorm(8, 2, momentum=NAN), MOMENTUM.format("nan")),
    (lambda: bcn_torch.BatchNorm(8, eps=0.0), EPS(0.0)),
    (lambda: bcn_torch.EstimatedBatchNorm(8, -1.0), EPS(-1.0)),
    (lambda: bcn_torch.ChannelNorm(8, 2, INF), EPS("inf")),
    (lambda: bcn_torch.BatchChannelNorm(8, 2, NAN), EPS("nan")),
    (lambda: bcn_torch.BatchChannelNorm(8, 2, batch_eps=0.0), EPSILON.format("batch_eps", 0.0)),
    (lambda: weight(2, 3, eps=0.0), EPS(0.0)),
    (
        lambda: bcn_torch.WSConv2d(4, 4, 3, standardization=Standardization(eps=-1.0)),
        EPS(-1.0),
    ),
    (
        lambda: weight(2, 3, eps_role="added"),
        "eps_role must be one of 'added_to_variance', 'added_to_deviation', 'least_variance', but "
        "eps_role='added'.",
    ),
    (lambda: weight(2, 3, gamma=0.0), FACTOR.format(0.0)),
    (
        lambda: bcn_torch.WSLinear(4, 4, standardization=Standardization(gamma=INF)),
        FACTOR.format("inf"),
    ),
    (lambda: weight(2, 3, gain=torch.ones(2)), GAIN.format(False, None, "(2,)")),
    (learning_gain, GAIN.format(True, "(2,)", None)),
    (lambda: learning_gain(torch.ones(2, 1)), GAIN.format(True, "(2,)", "(2, 1)")),
    (
        lambda: bcn_torch.BatchChannelNorm(8, 2, running_variance="of the batch"),
        "running_variance must be one of 'biased', 'unbiased', 'around_running_mean', but "
        "running_variance='of the batch'.",
    ),
    (lambda: bcn_torch.BatchNorm(0), NO_CHANNEL.format(0)),
    (lambda: bcn_torch.ChannelNorm(-1, 1), NO_CHANNEL.format(-1)),
    (lambda: bcn_torch.BatchChannelNorm(12, 5), GROUPS(5, 12, "1, 2, 3, 4, 6, 12")),
    (lambda: bcn_torch.ChannelNorm(12, 0), GROUPS(0, 12, "1, 2, 3, 4, 6, 12")),
    (lambda: bcn_torch.ChannelNorm(7, -1), GROUPS(-1, 7, "1, 7")),
    (lambda: bcn_torch.VGG(((8,),)), GROUPS(32, 8, "1, 2, 4, 8")),
    (
        lambda: standardize_weight(torch.ones(2, 3, dtype=torch.int32)),
        FLOAT.replace("input", "weight").format("torch.int32", "x.float()"),
    ),
    (lambda: weight(3, 1, 1), WEIGHT((3, 1, 1), 1)),
    (lambda: weight(3), WEIGHT((3,), 1)),
    (lambda: weight(), WEIGHT((), 1)),
    (lambda: weight(3, 0), WEIGHT((3, 0), 0)),
    (lambda: weight(3, 1, unbiased=False), WEIGHT((3, 1), 1)),
    (lambda: bcn_torch.WSLinear(1, 4), WEIGHT((4, 1), 1)),
    (lambda: bcn_torch.WSConv1d(1, 4, 1), WEIGHT((4, 1, 1), 1)),
    (lambda: bcn_torch.WSConv2d(4, 4, 1, groups=4), WEIGHT((4, 1, 1, 1), 1)),
    (lambda: bcn_torch.WSConv3d(1, 4, 1), WEIGHT((4, 1, 1, 1, 1), 1)),
    (lambda: bcn_torch.VGG(()), BLOCKS.format("()")),
    (lambda: bcn_torch.VGG([[8], []]), BLOCKS.format("[[8], []]")),
    *(
        (partial(torch_images, make, *of), text)
        for make in (small_vgg, partial(small_vgg, norm=None))
        for of, text in (
            (
                ((3, 8, 8),),
                "The input must be a batch of images, [batch, channels, height, width], but its "
                "shape is (3, 8, 8). For a single image, add the batch axis with x[None].",
            ),
            (((2, 1, 8, 8),), CHANNELS.format(3, 1, "(2, 1, 8, 8)")),
            (((2, 3, 8, 8), "uint8"), FLOAT.format("torch.uint8", "x.float()")),
            (((2, 3, 8, 3),), SIZE.format("8x3", 2, "4x4")),
        )
    ),
    (lambda: torch_images(bcn_torch.VGG, (2, 3, 31, 32)), SIZE.format("31x32", 5, "32x32")),
)
# What PyTorch's norms refuse before it can spoil their statistics.
TORCH_INPUTS = (
    ((2, 8), "int64", FLOAT.format("torch.int64", "x.float()")),
    ((2, 8), "complex64", FLOAT.format("torch.complex64", "x.float()")),
    ((8,), "float32", AXES.format("[batch, channels, *]", "(8,)")),
    ((2, 4, 5, 8), "float32", CHANNELS.format(8, 4, "(2, 4, 5, 8)")),
    (
        (0, 8, 4),
        "float32",
        "The input must not be empty, but its shape is (0, 8, 4). Skip the empty batch.",
    ),
)
TORCH_NORMS = {
    "BatchNorm": (8,),
    "EstimatedBatchNorm": (8,),
    "ChannelNorm": (8, 2),
    "BatchChannelNorm": (8, 2),
}


def rows():
    """What is called, and what its error says."""
    for api in (linen, of_nnx):
        for layer, options, text in FLAX:
            yield pytest.param(
                partial(api, layer, **options), text, id=f"{api.__name__} {layer} {text[:40]}"
            )
    for call, text in FLAX_CALLS:
        yield pytest.param(call, text, id=f"flax {text[:40]}")
    for call, text in TORCH_CALLS:
        yield pytest.param(call, text, id=f"torch {text[:40]}", marks=needs_torch)


def error_of(call):
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    return str(caught.value)


def exactly(text):
    """The pattern of this text and nothing else."""
    return re.escape(text) + r"\Z"


@pytest.mark.parametrize(("call", "text"), list(rows()))
def test_an_error_says_the_rule_the_values_seen_and_the_way_out(call, text):
    assert error_of(call) == text


@needs_torch
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "dtype", "text"), TORCH_INPUTS)
def test_a_refused_input_leaves_the_statistics_alone(shape, dtype, text, training):
    x = torch.ones(shape, dtype=getattr(torch, dtype))
    for name, sizes in TORCH_NORMS.items():
        layer, fresh = (getattr(bcn_torch, name)(*sizes).train(training) for _ in range(2))
        assert error_of(partial(layer, x)) == text
        torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), rtol=0, atol=0)


# --- Warnings, and what passes --------------------------------------------------------------------


def test_a_single_value_per_channel_is_warned_of_in_training_only():
    x = jnp.ones((1, 8))
    layer = BatchChannelNorm(**TRAIN)
    init = partial(layer.init, jax.random.key(0))
    variables = jax.eval_shape(init, x)  # initializing with one sample is no mistake
    message = (
        "The batch has a single value per channel (1 sample without space axes, or of size 1), so "
        "its variance is always 0. Train with a larger batch, or evaluate with "
        "use_running_average=True."
    )
    step = partial(layer.apply, mutable=["batch_stats"])
    with pytest.warns(UserWarning, match=exactly(message)):
        jax.eval_shape(step, variables, x)
    jax.eval_shape(partial(layer.apply, use_running_average=True), variables, x)
    jax.eval_shape(step, variables, jnp.ones((2, 8)))


@pytest.mark.parametrize("api", [linen, of_nnx])
def test_groups_of_a_single_value_are_warned_of(api):
    with pytest.warns(UserWarning, match=r"single value .* so its output is the bias"):
        api("ChannelNorm", jnp.ones((2, 1, 8)), num_groups=8)
    api("ChannelNorm", jnp.ones((2, 2, 8)), num_groups=8)
    api("ChannelNorm", jnp.ones((2, 8)), num_groups=4)


@needs_torch
@pytest.mark.parametrize("estimate", [True, False])
def test_pytorch_warns_of_single_values_too(estimate):
    layer = bcn_torch.BatchChannelNorm(8, 2, estimate=estimate)
    for shape in ((1, 8), (1, 8, 1, 1)):
        message = (
            f"The batch has a single value per channel (its shape is {shape}), so its variance is "
            "always 0. Train with a larger batch, or evaluate with .eval()."
        )
        with pytest.warns(UserWarning, match=exactly(message)):
            layer(torch.randn(shape))
    groups = bcn_torch.ChannelNorm(8, 8)
    with pytest.warns(UserWarning, match=r"single value .* so the output is the shift"):
        groups(torch.ones(2, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups(torch.ones(2, 8, 2))
        bcn_torch.ChannelNorm(8, 4)(torch.ones(2, 8))
        layer.eval()(torch.randn(1, 8))
        with bcn_torch.frozen_statistics(layer):
            layer.train()(torch.randn(1, 8))
        layer(torch.randn(1, 8, 2))


@needs_torch
def test_the_bounds_themselves_are_allowed():
    bcn_torch.BatchNorm(8, momentum=0), bcn_torch.BatchNorm(8, momentum=1)
    bcn_torch.ChannelNorm(8, 8), bcn_torch.ChannelNorm(8, 1)
    standardize_weight(torch.ones(1, 2))
    small_vgg()(torch.randn(2, 3, 4, 4))


def train(**options):
    return BatchChannelNorm(**{**TRAIN, **options})


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
