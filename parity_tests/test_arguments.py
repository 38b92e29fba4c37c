"""Arguments of a wrong type or out of range are refused; numbers of NumPy and JAX are numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import bcn_flax
import bcn_torch
from bcn_flax import interop, standardize_kernel
from bcn_torch import standardize_weight
from parity_tests.argument_targets import TARGETS
from parity_tests.arguments import VALUES, outcome

pytestmark = pytest.mark.torch

X = jnp.linspace(-1.0, 1.0, 32).reshape(2, 4, 4)
TINY = float(np.finfo(np.float32).tiny)


def linen(name, **options):
    return getattr(bcn_flax.linen, name)(**options)


def in_nnx(name, **options):
    return getattr(bcn_flax.nnx, name)(4, **options, rngs=nnx.Rngs(0))


def in_torch(name, **options):
    return getattr(bcn_torch, name)(4, **options)


def refuses(call, *args, text, **options):
    """Whether a call raises a `ValueError` with this text."""
    with pytest.raises(ValueError, match=r".") as caught:
        call(*args, **options)
    assert text in str(caught.value)


# --- When a layer is made -------------------------------------------------------------------------

REAL = "{0} must be a real number, but {0}={1!r}"
FLAG = "{0} must be True or False, but {0}={1!r}"
INTEGER = "{0} must be an integer, but {0}={1!r}"
DTYPE = "{0} must be a real floating-point type"
NORMAL = "{0} must be positive and finite, and a normal number of float32"
FLAX = (
    *(("dtype", value, DTYPE) for value in (jnp.int32, jnp.bool_, jnp.complex64, "int8", 3)),
    *(("param_dtype", value, DTYPE) for value in (jnp.int32, bool, jnp.complex64, None)),
    *(("momentum", value, REAL) for value in (None, "0.9", 1j, True, [0.9], np.array([0.9]))),
    *(("epsilon", value, REAL) for value in (None, "1e-5")),
    *(("epsilon", value, NORMAL) for value in (TINY / 2, 1e-40, 1e39, np.float64(1e-300))),
    *(("use_scale", value, FLAG) for value in (None, "False", 2, 0.0, np.array([True]))),
    *(("use_running_average", value, FLAG) for value in ("False", 0.5)),
    *(("update_stats", value, FLAG) for value in ("True", [])),
    ("axis_name", 0, "{0} must be the name of an axis of vmap, shard_map or pmap"),
    ("axis_index_groups", [0, 1], "{0} must be groups of numbers of devices"),
    ("running_variance", None, "{0} must be one of biased, unbiased, around_running_mean"),
    ("bias_init", "zeros", "{0} must be callable, but {0}='zeros'"),
)
FLAX_GROUPS = (
    *(("num_groups", value, INTEGER) for value in (4.0, "4", True, np.array([4]))),
    *(("estimate", value, FLAG) for value in ("False", None)),
    ("batch_epsilon", 1e-40, NORMAL),
)
TORCH = (
    *(("momentum", value, REAL) for value in (None, "0.1", True, torch.ones(1))),
    *(("eps", value, REAL) for value in ("1e-5", None)),
    *(("eps", value, NORMAL) for value in (TINY / 2, 1e39)),
    *(("update_stats", value, FLAG) for value in ("False", 2, 1.0)),
    ("running_variance", None, "{0} must be one of 'biased', 'unbiased', 'around_running_mean'"),
)
TORCH_GROUPS = (
    *(("groups", value, INTEGER) for value in (2.0, "2", True, torch.tensor([2]))),
    *(("estimate", value, FLAG) for value in ("False", None)),
    ("batch_eps", 1e-40, NORMAL),
)


@pytest.mark.parametrize(
    ("make", "options", "rows"),
    [
        (partial(linen, "BatchNorm"), {}, FLAX),
        (partial(in_nnx, "BatchNorm"), {}, FLAX),
        (partial(linen, "BatchChannelNorm"), {"num_groups": 2}, FLAX + FLAX_GROUPS),
        (partial(in_nnx, "BatchChannelNorm"), {"num_groups": 2}, FLAX + FLAX_GROUPS),
        (partial(in_torch, "BatchNorm"), {}, TORCH),
        (partial(in_torch, "BatchChannelNorm"), {"groups": 2}, TORCH + TORCH_GROUPS),
    ],
)
def test_a_layer_is_not_made_with_a_wrong_argument(make, options, rows):
    make(**options)
    for name, value, text in rows:
        refuses(make, **{**options, name: value}, text=text.format(name, value))


def test_numbers_of_numpy_jax_and_pytorch_are_taken_as_pythons():
    halves = (np.float32(0.5), np.array(0.5), jnp.float32(0.5), torch.tensor(0.5))
    twos = (np.int64(2), np.array(2), jnp.int32(2), torch.tensor(2))
    for half, two in zip(halves, twos, strict=True):
        flax = {"num_groups": two, "momentum": half, "epsilon": half, "use_scale": np.True_}
        norm = in_nnx("BatchChannelNorm", **flax).batch_norm
        layer = linen("BatchChannelNorm", **flax)
        theirs = in_torch("BatchChannelNorm", groups=two, momentum=half, eps=half)
        for number in (norm.momentum, norm.epsilon, layer.momentum, theirs.batch_norm.momentum):
            assert (type(number), number) == (float, 0.5)
        for number in (layer.num_groups, theirs.channel_norm.groups):
            assert (type(number), number) == (int, 2)
        assert layer.use_scale is norm.use_scale is True
        assert layer == linen("BatchChannelNorm", num_groups=2, momentum=0.5, epsilon=0.5)


def test_the_smallest_epsilon_normalizes_constant_channels():
    ones = jnp.ones((2, 4, 4))
    layer = linen("BatchNorm", use_running_average=False, epsilon=TINY)
    y = layer.apply({}, ones, mutable=True, rngs={"params": jax.random.key(0)})[0]
    assert (y == 0).all()
    assert (in_torch("BatchNorm", eps=TINY)(torch.ones(2, 4, 4)) == 0).all()


@pytest.mark.parametrize("frozen", [np.False_, np.array(False), 0, torch.tensor(False)])
def test_any_false_freezes_the_estimates_of_pytorch(frozen):
    for name, options in (("BatchNorm", {}), ("BatchChannelNorm", {"groups": 2})):
        made, later = in_torch(name, **options, update_stats=frozen), in_torch(name, **options)
        later.update_stats = frozen
        for layer in (made, later):
            assert layer.update_stats is False
            layer(torch.randn(3, 4, 5))
            norm = getattr(layer, "batch_norm", layer)
            norm.reset_running_stats()
            assert (norm.exp_mean == 0).all()
        with pytest.raises(ValueError, match="update_stats='no' is of type str"):
            later.update_stats = "no"


# --- When it is called ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [jnp.ones(1), jnp.ones(()), jnp.ones((4, 1)), jnp.ones(4, int)])
@pytest.mark.parametrize("evaluate", [False, True])
def test_restored_statistics_of_another_shape_are_refused(value, evaluate):
    text = f"so the shape (4,), but it is {value.dtype} of shape {value.shape}"
    for name in ("mean", "var"):
        stats = {"mean": jnp.zeros(4), "var": jnp.ones(4), name: value}
        params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
        layer = linen("BatchNorm", use_running_average=evaluate)
        variables = {"params": params, "batch_stats": stats}
        refuses(layer.apply, variables, X, mutable=["batch_stats"], text=text)
        layer = in_nnx("BatchNorm", use_running_average=evaluate)
        setattr(layer, name, nnx.BatchStat(value))
        refuses(layer, X, text=text)
    layer = in_nnx("ChannelNorm", num_groups=4)
    layer.scale = nnx.Param(value)
    refuses(layer, X, text=text)


def test_flags_of_the_call_are_flags():
    for layer in (in_nnx("BatchNorm"), linen("BatchNorm").bind({}, mutable=True)):
        refuses(layer, X, use_running_average="False", text="use_running_average='False'")
        refuses(layer, X, True, update_stats="False", text="update_stats='False'")
    refuses(in_nnx("BatchNorm").set_view, use_running_average="no", text="use_running_average='no'")


KERNEL = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
FLOATING = "The {} must be of a real floating-point type, but it is {}"
WEIGHT = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kernel": KERNEL.astype(int)}, FLOATING.format("kernel", "int32")),
        ({"kernel": KERNEL > 0}, FLOATING.format("kernel", "bool")),
        ({"kernel": KERNEL + 1j}, FLOATING.format("kernel", "complex64")),
        ({"kernel": "kernel"}, "The kernel must be an array of numbers, but it is 'kernel'"),
        ({"mask": KERNEL}, "The mask must be boolean, true where a value counts"),
        ({"mask": jnp.ones(3, bool)}, "the mask's shape is (3,) and the kernel's is (4, 3)"),
        ({"gain": jnp.ones(3)}, "gain=False its shape must be None, but it is (3,)"),
        ({"axis": 0.0}, "axis must be an integer, but axis=0.0"),
        ({"standardization": {}}, "standardization must be a Standardization"),
        ({"standardization": bcn_torch.Standardization()}, "must be a Standardization"),
    ],
)
def test_a_kernel_is_not_standardized_with_a_wrong_argument(options, text):
    refuses(standardize_kernel, **{"kernel": KERNEL, **options}, text=text)


def test_a_gain_is_given_if_the_standardization_has_one_and_only_then():
    for standardize, weight, how in (
        (standardize_kernel, KERNEL, bcn_flax.Standardization),
        (standardize_weight, WEIGHT, bcn_torch.Standardization),
    ):
        gain = weight[:3, 0]
        refuses(standardize, weight, how(gain=True), text="shape must be (3,), but it is None")
        refuses(standardize, weight, gain=gain, text="shape must be None, but it is (3,)")
        wrong = {"standardization": how(gain=True), "gain": weight[:2, 0]}
        refuses(standardize, weight, **wrong, text="shape must be (3,), but it is (2,)")
        standardize(weight, how(gain=True), gain=gain)


def test_a_standardization_has_the_same_rules_in_flax_and_pytorch():
    for how, call in (
        (bcn_flax.Standardization, lambda how: standardize_kernel(KERNEL, how)),
        (bcn_torch.Standardization, lambda how: standardize_weight(WEIGHT, how)),
    ):
        for gamma in (0.0, float("nan"), float("inf"), 1e-40, 1e39):
            refuses(call, how(gamma=gamma), text="gamma must be finite and not 0")
        for name in ("unbiased", "fan_in_scaling", "gain"):
            refuses(call, how(**{name: "False"}), text=f"{name} must be True or False")
        refuses(call, how(gamma="2"), text="gamma must be a real number")
        np.testing.assert_array_equal(call(how(gamma=-2)), -call(how(gamma=np.float32(2))))
        np.testing.assert_array_equal(call(how(unbiased=np.False_)), call(how(unbiased=False)))


# --- Conversions ----------------------------------------------------------------------------------


def test_conversions_refuse_other_things_by_name():
    variables = {"params": {"kernel": jnp.ones((2, 3))}}
    refuses(interop.variables_of, variables, text="`module` must be an NNX module")
    objects = np.array([[None] * 2] * 3)
    refuses(
        interop.match, {"weight": objects}, variables, text="'weight' holds a ndarray of object"
    )
    like = {"params": {"kernel": objects.T}}
    refuses(
        interop.match, {"weight": np.ones((3, 2))}, like, text="params/kernel is of type ndarray"
    )


# --- All arguments --------------------------------------------------------------------------------

CASES = [
    (target, parameter, value)
    for target in TARGETS.values()
    for parameter in target.parameters
    for value in VALUES
]


def unclear(cases):
    """The cases that end in nothing of what they should, and in what."""
    ends = {}
    for target, parameter, value in cases:
        end = outcome(target, parameter, value)
        ends[f"{target.name}: {parameter} is {value}"] = end
    return [f"{case}: {end}" for case, end in ends.items() if end.startswith("unclear")]


def test_arguments_end_in_the_right_result_or_in_a_clear_error():
    assert not unclear(CASES[::97])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_arguments_end_in_the_right_result_or_in_a_clear_error(part):
    assert not unclear(CASES[::5][part::4])
