"""The laws hold for all numbers, and the layers compute what the oracle computes."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests import oracle
from parity_tests.laws import LAWS, Case, Seen, assert_same, observe, of_linen

seeds = st.integers(0, 2**32 - 1)

# Laws of these layers that share one program, and another one with a mask.
QUICK = [
    f"{layer}: {law}"
    for layer in ("BatchChannelNorm", "BatchChannelNorm of the batch")
    for law in (
        "samples may change places",
        "channels of a group may change places",
        "groups may change places",
        "the sign of the input is that of the scale",
        "shifting a channel shifts its mean alone",
        "a mask that hides nothing changes nothing",
        "nothing moves where nothing counts",
        "a channel that is not finite keeps its estimates",
    )
]


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_law(law):
    law()


@given(st.sampled_from(QUICK), seeds)
def test_laws_hold_for_all_numbers(name, seed):
    LAWS[name](seed=seed)


# Each combination of these compiles a program.
SHAPES = [((5, 6), 2), ((4, 3, 6), 3), ((2, 3, 2, 4), 2), ((1, 3, 2, 4), 1)]  # and groups
MODES = {
    "by the batch": {"estimate": False, "use_running_average": False},
    "by estimates": {"estimate": True, "use_running_average": False},
    "in evaluation": {"estimate": True, "use_running_average": True},
}
VARIANCES = ["biased", "unbiased", "around_running_mean"]
# These share programs.
DATA = {
    "ordinary": lambda x: 2 + 3 * x,
    "far from 0": lambda x: 1e4 + x,
    "tiny": lambda x: 1e-4 * x,
    "with a constant channel": lambda x: np.where(np.arange(x.shape[-1]) == 0, 5.0, x),
    "with a NaN": lambda x: np.where(x == x.max(), np.nan, x),
}


@settings(max_examples=8)
@given(*map(st.sampled_from, (SHAPES, [*MODES], VARIANCES, [*DATA])), seeds)
def test_batch_channel_norm_is_the_oracles(sizes, mode, variance, data, seed):
    (shape, groups), options, rng = sizes, MODES[mode], np.random.default_rng(seed)
    options = {**options, "momentum": 0.8, "epsilon": 1e-3, "running_variance": variance}
    assert_is_the_oracles(
        of_linen("BatchChannelNorm", num_groups=groups, **options),
        oracle.BatchChannelNorm(groups, options["estimate"], 0.8, 1e-3, variance),
        DATA[data](rng.standard_normal(shape)),
        rng,
        train=not options["use_running_average"],
    )


WINDOWS = [(3,), (2, 3), (1, 2)]
PADDINGS = {
    "SAME": lambda window: "SAME",
    "unequal": lambda window: tuple((k - 1, k // 2) for k in window),
}


@settings(max_examples=6)
@given(*map(st.sampled_from, (WINDOWS, [1, 2, 3], [*PADDINGS, "transposed"])), seeds)
def test_convolutions_with_standardized_weights_are_the_oracles(window, stride, padding, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, *(5 for _ in window), 4))
    options = {"features": 3, "kernel_size": window, "strides": (stride,) * len(window)}
    if padding == "transposed":
        layer = of_linen("WSConvTranspose", **options, padding="VALID")
        reference = oracle.WSConvTranspose(strides=stride)
    else:
        pads = PADDINGS[padding](window)
        layer = of_linen("WSConv", **options, padding=pads)
        reference = oracle.WSConv(strides=stride, padding=pads)
    assert_is_the_oracles(layer, reference, x, rng)


def test_dense_layers_with_standardized_weights_are_the_oracles():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    assert_is_the_oracles(of_linen("WSDense", features=5), oracle.WSDense(), x, rng)


def assert_is_the_oracles(layer, reference, x, rng, train=True):
    """Compare but for rounding, which data at 1e4 deviations from 0 magnify by the square of it."""
    with jax.enable_x64(True):
        shapes = jax.eval_shape(layer.start, x)
        variables = jax.tree.map(lambda v: rng.uniform(0.5, 1.5, v.shape), shapes)
        for collection in variables.values():
            write(reference, collection)
        y = reference.forward(x, train)
        dy = rng.standard_normal(y.shape)
        dx = reference.backward(dy)
        seen = observe(Case(layer, variables, x, dy))
        expected = Seen(
            output=y,
            statistics=read(reference, seen.statistics),
            gradients=read(reference, seen.gradients, "d_"),
            input_gradient=dx,
        )
        assert_same(seen, expected, ulps=1e9)


def write(reference, tree):
    """Set the attributes of an oracle, and of its parts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            write(getattr(reference, name), value)
        else:
            setattr(reference, name, value)


def read(reference, tree, prefix=""):
    """The attributes of an oracle and of its parts that have the names in the tree."""
    return {
        name: read(getattr(reference, name), value, prefix)
        if isinstance(value, dict)
        else getattr(reference, prefix + name)
        for name, value in tree.items()
    }
