"""Every complaint of the PyTorch side, word for word, and when there is none."""

import re
import warnings

import pytest
import torch

from bcn_torch import (
    VGG,
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    Standardization,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLinear,
    frozen_statistics,
    standardize_weight,
)

pytestmark = pytest.mark.torch

LAYERS = {
    "BatchNorm": lambda: BatchNorm(8),
    "EstimatedBatchNorm": lambda: EstimatedBatchNorm(8),
    "ChannelNorm": lambda: ChannelNorm(8, 2),
    "BatchChannelNorm": lambda: BatchChannelNorm(8, 2),
}
SMALL = {"blocks": ((8,), (8,)), "groups": 2}

INPUTS = {
    "integers": (
        torch.ones(2, 8, dtype=torch.int64),
        "The input must be of a real floating-point type, but it is torch.int64. Convert it first, "
        "for example with x.float().",
    ),
    "complex": (
        torch.ones(2, 8, dtype=torch.complex64),
        "The input must be of a real floating-point type, but it is torch.complex64. Convert it "
        "first, for example with x.float().",
    ),
    "rank 1": (
        torch.ones(8),
        "The input must have a batch axis and a channel axis, [batch, channels, *], but its shape "
        "is (8,). For a single sample, add the batch axis with x[None].",
    ),
    "channels last": (
        torch.ones(2, 4, 5, 8),
        "The number of channels, axis 1 of [batch, channels, *], must be 8 here, but it is 4: the "
        "input's shape is (2, 4, 5, 8). If its channels come last, move them with "
        "x.movedim(-1, 1); otherwise make the module for that many channels.",
    ),
    "empty batch": (
        torch.ones(0, 8, 4),
        "The input must not be empty, but its shape is (0, 8, 4). Skip the empty batch.",
    ),
}

MOMENTUM = (
    "momentum is the weight of the new value in the running estimates and must be from 0 to 1, but "
    "momentum={}. A Flax momentum m, the weight of the old value, is 1 - m here: 0.9 there is 0.1 "
    "here."
)
EPS = "eps must be positive and finite, but eps={}. The usual one is 1e-5."
GROUPS = (
    "groups must divide the number of channels, but groups={} and there are {} channels. Any of {} "
    "would do."
)
CHANNELS = "There must be at least 1 channel, but channels={}."
FAN_IN = (
    "Weight standardization needs at least 2 weights per output channel (fan-in), but a weight of "
    "shape {} has {}. Use the layer without weight standardization here."
)
GAIN = (
    "The gain must be None without Standardization(gain=True), and with it have one value for each "
    "output channel: for a weight of shape (2, 3) and gain={} its shape must be {}, but it is {}."
)
BLOCKS = (
    "blocks must have at least one block, and each block at least one convolution, but blocks={}. "
    "Give each block the output channels of its convolutions, for example ((64, 64), (128, 128))."
)
ARGUMENTS = {
    "momentum 1.1": (lambda: BatchNorm(8, momentum=1.1), MOMENTUM.format(1.1)),
    "momentum -0.1": (lambda: EstimatedBatchNorm(8, momentum=-0.1), MOMENTUM.format(-0.1)),
    "momentum nan": (lambda: BatchChannelNorm(8, 2, momentum=float("nan")), MOMENTUM.format("nan")),
    "eps 0": (lambda: BatchNorm(8, eps=0.0), EPS.format(0.0)),
    "eps -1": (lambda: EstimatedBatchNorm(8, -1.0), EPS.format(-1.0)),
    "eps inf": (lambda: ChannelNorm(8, 2, float("inf")), EPS.format("inf")),
    "eps nan": (lambda: BatchChannelNorm(8, 2, float("nan")), EPS.format("nan")),
    "eps of the batch norm": (lambda: BatchChannelNorm(8, 2, batch_eps=0.0), EPS.format(0.0)),
    "eps of a weight": (
        lambda: standardize_weight(torch.ones(2, 3), Standardization(eps=0.0)),
        EPS.format(0.0),
    ),
    "eps of a layer": (
        lambda: WSConv2d(4, 4, 3, standardization=Standardization(eps=-1.0)),
        EPS.format(-1.0),
    ),
    "eps_role": (
        lambda: standardize_weight(torch.ones(2, 3), Standardization(eps_role="added")),
        "eps_role must be one of 'added_to_variance', 'added_to_deviation', 'least_variance', but "
        "eps_role='added'.",
    ),
    "gamma 0": (
        lambda: standardize_weight(torch.ones(2, 3), Standardization(gamma=0.0)),
        "gamma must be positive and finite, but gamma=0.0. Without a factor it is 1.",
    ),
    "gamma inf": (
        lambda: WSLinear(4, 4, standardization=Standardization(gamma=float("inf"))),
        "gamma must be positive and finite, but gamma=inf. Without a factor it is 1.",
    ),
    "a gain too few": (
        lambda: standardize_weight(torch.ones(2, 3), Standardization(gain=True)),
        GAIN.format(True, "(2,)", None),
    ),
    "a gain too many": (
        lambda: standardize_weight(torch.ones(2, 3), gain=torch.ones(2)),
        GAIN.format(False, None, "(2,)"),
    ),
    "a gain of another shape": (
        lambda: standardize_weight(torch.ones(2, 3), Standardization(gain=True), torch.ones(2, 1)),
        GAIN.format(True, "(2,)", "(2, 1)"),
    ),
    "running_variance": (
        lambda: BatchChannelNorm(8, 2, running_variance="of the batch"),
        "running_variance must be one of 'biased', 'unbiased', 'around_running_mean', but "
        "running_variance='of the batch'.",
    ),
    "eps of gn": (lambda: VGG(**SMALL, norm="gn", eps=0.0), EPS.format(0.0)),
    "channels 0": (lambda: BatchNorm(0), CHANNELS.format(0)),
    "channels -1": (lambda: ChannelNorm(-1, 1), CHANNELS.format(-1)),
    "groups 5": (lambda: BatchChannelNorm(12, 5), GROUPS.format(5, 12, "1, 2, 3, 4, 6, 12")),
    "groups 0": (lambda: ChannelNorm(12, 0), GROUPS.format(0, 12, "1, 2, 3, 4, 6, 12")),
    "groups -1": (lambda: ChannelNorm(7, -1), GROUPS.format(-1, 7, "1, 7")),
    "groups of bcn": (lambda: VGG(((8,),)), GROUPS.format(32, 8, "1, 2, 4, 8")),
    "groups of gn": (lambda: VGG(((8,),), norm="gn"), GROUPS.format(32, 8, "1, 2, 4, 8")),
    "integer weight": (
        lambda: standardize_weight(torch.ones(2, 3, dtype=torch.int32)),
        "The weight must be of a real floating-point type, but it is torch.int32. Convert it "
        "first, for example with x.float().",
    ),
    "fan-in 1": (lambda: standardize_weight(torch.ones(3, 1, 1)), FAN_IN.format((3, 1, 1), 1)),
    "weight of rank 1": (lambda: standardize_weight(torch.ones(3)), FAN_IN.format((3,), 1)),
    "weight of rank 0": (lambda: standardize_weight(torch.tensor(3.0)), FAN_IN.format((), 1)),
    "fan-in 0": (lambda: standardize_weight(torch.ones(3, 0)), FAN_IN.format((3, 0), 0)),
    "WSLinear": (lambda: WSLinear(1, 4), FAN_IN.format((4, 1), 1)),
    "WSConv1d": (lambda: WSConv1d(1, 4, 1), FAN_IN.format((4, 1, 1), 1)),
    "WSConv2d": (lambda: WSConv2d(4, 4, 1, groups=4), FAN_IN.format((4, 1, 1, 1), 1)),
    "fan-in 1, biased": (
        lambda: standardize_weight(torch.ones(3, 1), Standardization(unbiased=False)),
        FAN_IN.format((3, 1), 1),
    ),
    "WSConv3d": (lambda: WSConv3d(1, 4, 1), FAN_IN.format((4, 1, 1, 1, 1), 1)),
    "norm": (
        lambda: VGG(norm="layer"),
        "norm must be one of 'bcn', 'bn', 'gn', 'none', but norm='layer'.",
    ),
    "no blocks": (lambda: VGG(()), BLOCKS.format("()")),
    "an empty block": (lambda: VGG([[8], []]), BLOCKS.format("[[8], []]")),
}

IMAGES = {
    "rank 3": (
        torch.ones(3, 8, 8),
        "The input must be a batch of images, [batch, channels, height, width], but its shape is "
        "(3, 8, 8). For a single image, add the batch axis with x[None].",
    ),
    "channels": (
        torch.ones(2, 1, 8, 8),
        "The number of channels, axis 1 of [batch, channels, *], must be 3 here, but it is 1: the "
        "input's shape is (2, 1, 8, 8). If its channels come last, move them with "
        "x.movedim(-1, 1); otherwise make the module for that many channels.",
    ),
    "bytes": (
        torch.ones(2, 3, 8, 8, dtype=torch.uint8),
        "The input must be of a real floating-point type, but it is torch.uint8. Convert it first, "
        "for example with x.float().",
    ),
    "small": (
        torch.ones(2, 3, 8, 3),
        "The images are 8x3, too small for 2 blocks, each of which halves them: the smallest size "
        "is 4x4. Use larger images, or fewer blocks.",
    ),
}

SINGLE_VALUE = (
    "The batch has a single value per channel (its shape is {}), so its variance is 0 and a batch "
    "norm in training learns nothing from it. Use a larger batch, or evaluate with .eval()."
)


def test_groups_of_a_single_value_are_warned_of():
    layer = ChannelNorm(8, 8)
    with pytest.warns(UserWarning, match="single value .* so the output is the shift"):
        layer(torch.ones(2, 8, 1))
    layer(torch.ones(2, 8, 2))
    ChannelNorm(8, 4)(torch.ones(2, 8))


def exactly(text):
    """The pattern of this text and nothing else."""
    return re.escape(text) + r"\Z"


@pytest.mark.parametrize(("make", "text"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument_is_refused_with_the_rule_the_value_and_the_way_out(make, text):
    with pytest.raises(ValueError, match=exactly(text)):
        make()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("x", "text"), INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_bad_input_is_refused_before_it_can_spoil_the_statistics(make, x, text, training):
    layer = make().train(training)
    with pytest.raises(ValueError, match=exactly(text)):
        layer(x)
    torch.testing.assert_close(layer.state_dict(), make().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("x", "text"), IMAGES.values(), ids=IMAGES.keys())
@pytest.mark.parametrize("norm", ["bcn", "none"])
def test_vgg_refuses_what_is_no_batch_of_images_of_sufficient_size(norm, x, text):
    with pytest.raises(ValueError, match=exactly(text)):
        VGG(**SMALL, norm=norm)(x)


def test_the_published_vgg_refuses_images_below_32x32():
    with torch.device("meta"):
        model, x = VGG(), torch.ones(2, 3, 31, 32)
    text = (
        "The images are 31x32, too small for 5 blocks, each of which halves them: the smallest "
        "size is 32x32. Use larger images, or fewer blocks."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        model(x)


@pytest.mark.parametrize("estimate", [True, False])
@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 1, 1)])
def test_a_single_value_per_channel_is_warned_of_in_training(shape, estimate):
    layer = BatchChannelNorm(8, 2, estimate=estimate)
    with pytest.warns(UserWarning, match=exactly(SINGLE_VALUE.format(shape))):
        layer(torch.randn(shape))


@pytest.mark.parametrize("estimate", [True, False])
def test_a_single_value_per_channel_is_fine_where_no_statistics_are_collected(estimate):
    layer, x = BatchChannelNorm(8, 2, estimate=estimate), torch.randn(1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(x)
        with frozen_statistics(layer):
            layer.train()(x)
        layer(torch.randn(1, 8, 2))


def test_the_bounds_themselves_are_allowed():
    BatchNorm(8, momentum=0), BatchNorm(8, momentum=1)
    ChannelNorm(8, 8), ChannelNorm(8, 1)
    standardize_weight(torch.ones(1, 2))
    VGG(**SMALL)(torch.randn(2, 3, 4, 4))
