"""The laws of the layers: how their results change when their inputs change.

A law needs no expected numbers. It calls a layer twice or more, with inputs, variables or devices
that are related in a known way, and demands that what the calls show is related in a known way too.
`LAWS` has them all by name, each law for each layer that it holds for, in double precision.
"""

from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bcn_flax.linen
import bcn_flax.nnx
from bcn_flax import Standardization, standardize_kernel
from parity_tests.tolerances import assert_close

N, C, GROUPS = 8, 6, 2  # groups of 3 channels: neither number passes for the other
SHAPE = (N, 3, 2, C)
HALVES = slice(N // 2), slice(N // 2, N)
DEVICES, AXIS = 4, "devices"
MOMENTUM, EPSILON = 0.7, 1e-3

# --- Layers as data -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer as a pure function of its variables and its input."""

    make: Any
    options: FrozenDict = field(default_factory=FrozenDict)
    call: FrozenDict = field(default_factory=FrozenDict)

    def made_with(self, **options):
        return replace(self, options=self.options.copy(options))

    def called_with(self, **options):
        return replace(self, call=self.call.copy(options))

    def __call__(self, variables, x, mask=None):
        """The output, and the statistics after the call."""
        call = self.call if mask is None else {**self.call, "mask": mask}
        y, after = self.apply(jax.tree.map(jnp.asarray, variables), x, **call)
        return y, after.get("batch_stats", {})


class Linen(Layer):
    """A layer of linen."""

    def start(self, x):
        """The initial variables."""
        return self.make(**self.options).init(jax.random.key(0), x)

    def apply(self, variables, x, **call):
        """The output, and all variables after the call."""
        return self.make(**self.options).apply(variables, x, mutable=True, **call)


class Nnx(Layer):
    """A layer of NNX; its variables have the names that they have in linen."""

    def start(self, x):
        del x
        return variables_of(self.make(**self.options, rngs=nnx.Rngs(0)))

    def apply(self, variables, x, **call):
        module = self.make(**self.options, rngs=nnx.Rngs(0))
        for collection in variables.values():
            nnx.update(module, collection)
        y = module(x, **call)
        return y, variables_of(module)


def variables_of(module):
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return {name: nnx.to_pure_dict(nnx.state(module, kind)) for name, kind in kinds.items()}


def of_linen(name, **options):
    return Linen(getattr(bcn_flax.linen, name)).made_with(**options, param_dtype=jnp.float64)


def of_nnx(name, **options):
    return Nnx(getattr(bcn_flax.nnx, name)).made_with(**options, param_dtype=jnp.float64)


TRAINING = {"use_running_average": False, "momentum": MOMENTUM, "epsilon": EPSILON}
GROUPED = {"num_groups": GROUPS, "epsilon": EPSILON}
ESTIMATED = {**TRAINING, **GROUPED, "estimate": True}
NOT_ESTIMATED = {**TRAINING, **GROUPED, "estimate": False}
WINDOW = {"kernel_size": (3, 2)}
TRANSPOSED = {**WINDOW, "transpose_kernel": True}
BETWEEN = {"in_features": C, "out_features": C}

BY_THE_BATCH = {
    "BatchNorm": of_linen("BatchNorm", **TRAINING),
    "BatchChannelNorm of the batch": of_linen("BatchChannelNorm", **NOT_ESTIMATED),
}
BY_ESTIMATES = {
    "EstimatedBatchNorm": of_linen("EstimatedBatchNorm", **TRAINING),
    "BatchChannelNorm": of_linen("BatchChannelNorm", **ESTIMATED),
}
WITH_ESTIMATES = {**BY_THE_BATCH, **BY_ESTIMATES}
BATCH_CHANNEL_NORMS = {k: v for k, v in WITH_ESTIMATES.items() if "BatchChannelNorm" in k}
CHANNEL_NORM = {"ChannelNorm": of_linen("ChannelNorm", **GROUPED)}
NORMS = {**WITH_ESTIMATES, **CHANNEL_NORM}
IN_EVALUATION = {
    f"{name} in evaluation": layer.called_with(use_running_average=True)
    for name, layer in WITH_ESTIMATES.items()
}
KERNELS = {
    "WSDense": of_linen("WSDense", features=C),
    "WSConv": of_linen("WSConv", features=C, **WINDOW),
    "WSConvTranspose": of_linen("WSConvTranspose", features=C, **TRANSPOSED),
}
# These equal linen's layers bit for bit, whatever the arguments of constructor and call.
NNX_ESTIMATED = of_nnx("BatchChannelNorm", num_features=C, **ESTIMATED)
NNX_NOT_ESTIMATED = of_nnx("BatchChannelNorm", num_features=C, **NOT_ESTIMATED)
NNX_NORMS = {
    "NNX BatchChannelNorm": NNX_ESTIMATED,
    "NNX BatchChannelNorm of the batch": NNX_NOT_ESTIMATED,
}
NNX = {
    "NNX EstimatedBatchNorm": of_nnx(
        "EstimatedBatchNorm",
        num_features=C,
        use_running_average=False,
        running_variance="around_running_mean",
    ),
    **NNX_NORMS,
    "NNX BatchChannelNorm in evaluation": NNX_ESTIMATED.called_with(use_running_average=True),
    "NNX BatchChannelNorm, frozen": NNX_NOT_ESTIMATED.called_with(update_stats=False),
    "NNX BatchChannelNorm with all options": NNX_NOT_ESTIMATED.made_with(
        num_features=3,
        num_groups=1,
        axis=1,
        batch_epsilon=0.1,
        running_variance="unbiased",
        dtype=jnp.bfloat16,
    ),
    "NNX WSDense": of_nnx("WSDense", **BETWEEN),
    "NNX WSDense in half precision": of_nnx("WSDense", **BETWEEN, dtype=jnp.bfloat16),
    "NNX WSConv": of_nnx("WSConv", **BETWEEN, **WINDOW, standardization=Standardization(gain=True)),
    "NNX WSConvTranspose": of_nnx("WSConvTranspose", **BETWEEN, **TRANSPOSED),
}
LAYERS = {**NORMS, **IN_EVALUATION, **KERNELS, **NNX}

# --- The results of a call ------------------------------------------------------------------------


class Case(NamedTuple):
    """A call of a layer, or of a function with the same arguments."""

    layer: Any
    variables: Any
    x: Any
    dy: Any
    mask: Any = None

    @property
    def statistics(self):
        return self.variables.get("batch_stats", {})

    def of(self, layer):
        return self._replace(layer=layer)

    def starting(self, **collections):
        """The same call with other variables."""
        return self._replace(variables={**self.variables, **collections})

    def part(self, samples):
        """The same call with a part of the batch."""
        return self._replace(x=self.x[samples], dy=self.dy[samples])


class Seen(NamedTuple):
    """The results of a call; its gradients are those of `sum(y * dy)`."""

    output: Any
    statistics: Any
    gradients: Any
    input_gradient: Any


def see(layer, variables, x, dy, mask):
    """The results of a call, computed operation by operation."""

    def loss(params, x):
        y, statistics = layer({**variables, "params": params}, x, mask)
        return jnp.sum(y * dy), (y, statistics)

    gradients, (y, statistics) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return Seen(y, statistics, *gradients)


compiled_see = jax.jit(see, static_argnums=0)
compiled_call = jax.jit(lambda layer, *args: layer(*args), static_argnums=0)


def observe(case):
    """The results of a call, compiled once for each layer, shape, and kind of mask."""
    return jax.tree.map(np.asarray, compiled_see(*case))


def output_and_statistics(case):
    """The results without gradients, which take most of the time to compile."""
    args = case.layer, case.variables, case.x, case.mask
    return jax.tree.map(np.asarray, compiled_call(*args))


@cache
def case_of(layer, seed):
    """A call with random numbers; no variable has its initial value."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(3, 2, SHAPE), rng.normal(size=SHAPE)
    shapes = jax.eval_shape(layer.start, x)
    return Case(layer, jax.tree.map(lambda v: rng.uniform(0.5, 1.5, v.shape), shapes), x, dy)


ULPS = 1000  # of float64: sums of some hundred terms in another order


def assert_same(actual, expected, ulps=ULPS):
    """Fail unless two trees are equal but for rounding."""

    def check(path, a, e):
        scale = 1 + np.max(np.abs(e), initial=0, where=np.isfinite(e))
        name = jax.tree_util.keystr(path)
        assert_close(a, e, ulps=ulps, dtype=np.float64, scale=scale, name=name)

    jax.tree.map_with_path(check, actual, expected)


def assert_identical(actual, expected):
    """Fail unless two trees are equal to the last bit."""

    def check(path, a, e):
        np.testing.assert_array_equal(a, e, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(check, actual, expected)


def assert_finite(tree):
    for path, value in jax.tree.leaves_with_path(tree):
        assert np.isfinite(value).all(), f"{jax.tree_util.keystr(path)} is not finite"


# --- Rearrangements -------------------------------------------------------------------------------


def samples_may_change_places(case):
    order = [3, 1, 4, 0, 7, 6, 2, 5]
    assert_follows(case, lambda x: x[order])


def positions_may_change_places(case):
    assert_follows(case, lambda x: x[:, [2, 0, 1], ::-1])


def channels_of_a_group_may_change_places(case):
    assert_follows(case, *by_channel(np.array([2, 0, 1, 4, 3, 5])))


def groups_may_change_places(case):
    assert_follows(case, *by_channel(np.array([3, 4, 5, 0, 1, 2])))


def a_batch_norm_does_not_see_which_sample_a_value_is_of(case):
    """Every value has the same weight, however many of its sample count."""
    order = np.random.default_rng(0).permutation(N * 6)
    assert_follows(some_hidden(case), lambda x: x.reshape(-1, C)[order].reshape(SHAPE))


def a_channel_norm_does_not_see_which_channel_of_a_group_a_value_is_of(case):
    """Every value has the same weight, however many of its channel count."""
    order = np.random.default_rng(0).permutation(6 * C // GROUPS)

    def move(x):
        by_group = x.reshape(N, 6, GROUPS, -1).swapaxes(1, 2)
        moved = by_group.reshape(N, GROUPS, -1)[..., order].reshape(by_group.shape)
        return moved.swapaxes(1, 2).reshape(SHAPE)

    assert_follows(some_hidden(case), move)


def channels_may_lie_along_any_axis(case):
    case = some_hidden(case)
    y, statistics = output_and_statistics(case)
    for axis in (1, -2):
        x, mask = (np.moveaxis(a, -1, axis) for a in (case.x, case.mask))
        moved = case.of(case.layer.made_with(axis=axis))._replace(x=x, mask=mask)
        assert_same(output_and_statistics(moved), (np.moveaxis(y, -1, axis), statistics))


def the_layout_in_memory_changes_nothing(case):
    backwards = np.asfortranarray(case.x)
    with_gaps = np.stack([case.x, case.dy], axis=-1)[..., 0]
    for x in (backwards, with_gaps):
        assert_identical(observe(case._replace(x=x)), observe(case))


def assert_follows(case, move, rename=lambda tree: tree):
    """A permutation of the input permutes the output and the input gradient.

    `rename` permutes parameters and statistics, if channels move.
    """
    layer, variables, *arrays = case
    moved = Case(layer, rename(variables), *(None if a is None else move(a) for a in arrays))
    seen = observe(case)
    expected = Seen(
        output=move(seen.output),
        statistics=rename(seen.statistics),
        gradients=rename(seen.gradients),
        input_gradient=move(seen.input_gradient),
    )
    assert_same(observe(moved), expected)


def by_channel(order):
    """Functions that reorder the channels of the input, and of parameters and statistics."""
    groups = order[:: C // GROUPS] // (C // GROUPS)

    def rename(tree):
        return jax.tree.map(lambda v: v[order if len(v) == C else groups], tree)

    return lambda x: x[..., order], rename


# --- Units ----------------------------------------------------------------------------------------


def scaling_the_input_is_scaling_epsilon(case):
    """A power of two changes no bit of the output."""
    name = "batch_epsilon" if "estimate" in case.layer.options else "epsilon"
    scaled = case.of(case.layer.made_with(**{name: 4**2 * EPSILON}))
    assert_identical(observe(in_units(scaled, 4)), seen_in_units(observe(case), 4))


def the_sign_of_the_input_is_that_of_the_scale(case):
    def negate_scale(params):
        return change(params, scale=np.negative)

    negated = case.starting(params=negate_scale(case.variables["params"]))
    seen = seen_in_units(observe(case), -1)
    expected = seen._replace(gradients=negate_scale(seen.gradients))
    assert_identical(observe(in_units(negated, -1)), expected)


def shifting_a_channel_shifts_its_mean_alone(case):
    """However far: the rounding grows as the distance, not as its square."""
    far = 1e6 * np.arange(1, C + 1)
    expected = seen_in_units(observe(case), 1, far)
    assert_same(observe(in_units(case, 1, far)), expected, ULPS * far.max())


def shifting_a_sample_changes_nothing(case):
    """However far: the rounding grows as the distance, not as its square."""
    far = 1e6 * np.arange(1, N + 1).reshape(N, 1, 1, 1)
    assert_same(observe(case._replace(x=case.x + far)), observe(case), ULPS * far.max())


def a_constant_comes_out_as_the_bias(case):
    seen, bias = observe(case._replace(x=np.full(SHAPE, 3.0))), case.variables["params"]["bias"]
    assert_same(seen.output, np.broadcast_to(np.repeat(bias, C // len(bias)), SHAPE))
    assert_finite(seen)


def in_units(case, a, b=0.0):
    """The case with `a * x + b` in place of `x`, and its statistics in the same units."""
    return case.starting(batch_stats=convert(case.statistics, a, b))._replace(x=a * case.x + b)


def seen_in_units(seen, a, b=0.0):
    """The results with statistics and input gradient in the units of `a * x + b`."""
    statistics, input_gradient = convert(seen.statistics, a, b), seen.input_gradient / a
    return seen._replace(statistics=statistics, input_gradient=input_gradient)


def convert(statistics, a, b):
    return change(statistics, mean=lambda mean: a * mean + b, var=lambda var: a**2 * var)


def first(tree):
    """The parameters or statistics of the norm that sees the input."""
    return tree.get("batch_norm", tree)


def change(tree, **functions):
    """Parameters or statistics with some of the first norm's changed."""
    changed = {name: functions.get(name, lambda v: v)(value) for name, value in first(tree).items()}
    return {**tree, "batch_norm": changed} if "batch_norm" in tree else changed


# --- What counts ----------------------------------------------------------------------------------


def constants_far_from_0_leave_all_finite(case):
    """Rounding could make the variance negative here, by more than epsilon."""
    far = 1e25 * np.random.default_rng(0).uniform(1, 10, C)
    # The usual compilation replaces a division by a product with the inverse, which rounds the mean
    # of three equal values.
    dy = case.dy.swapaxes(1, 2)
    layer, *args = case._replace(x=np.broadcast_to(far, dy.shape), dy=dy)
    usually = {"xla_backend_optimization_level": 3}
    assert_finite(jax.jit(partial(see, layer), compiler_options=usually)(*args))


def values_whose_squares_overflow_come_out_as_the_bias(case):
    """Their variance is infinite; in float64 too, if they are large enough."""
    huge = 1e160 * np.random.default_rng(0).normal(size=SHAPE)
    seen, bias = observe(case._replace(x=huge)), case.variables["params"]["bias"]
    assert_same(seen.output, np.broadcast_to(np.repeat(bias, C // len(bias)), SHAPE))
    assert_finite(seen)


def a_mask_that_hides_nothing_changes_nothing(case):
    assert_same(observe(case._replace(mask=np.ones(SHAPE, bool))), observe(case))


def what_a_mask_hides_might_as_well_not_be_there(case):
    kept, hidden = HALVES
    seen = observe(hiding(case, hidden))
    output, input_gradient = seen.output[kept], seen.input_gradient[kept]
    of_the_kept = seen._replace(output=output, input_gradient=input_gradient)
    assert_same(of_the_kept, observe(case.part(kept)))
    assert_identical(seen.input_gradient[hidden], np.zeros_like(input_gradient))


def what_a_mask_hides_may_be_huge_and_has_no_gradient(case):
    """Only its own output changes, and the values that count lose no digits."""
    case = some_hidden(case)
    mask = case.mask
    case = case._replace(dy=np.where(mask, case.dy, 0))
    plain, huge = (observe(case._replace(x=np.where(mask, case.x, v))) for v in (0, 1e100))
    shown = [seen._replace(output=seen.output[mask]) for seen in (huge, plain)]
    assert_same(*shown)
    assert_identical(huge.input_gradient[~mask], np.zeros(np.sum(~mask)))


def the_unbiased_variance_counts_what_a_mask_leaves(case):
    unbiased = case.layer.made_with(running_variance="unbiased")
    what_a_mask_hides_might_as_well_not_be_there(case.of(unbiased))


def what_a_mask_hides_is_normalized_all_the_same(case):
    """A masked value gets the output of an equal value that counts."""
    mask, x = np.ones(SHAPE, bool), case.x.copy()
    mask[:, 0, 0], x[:, 0, 0] = False, x[:, 1, 1]
    output = observe(case._replace(x=x, mask=mask)).output
    assert_same(output[:, 0, 0], output[:, 1, 1])


def nothing_moves_where_nothing_counts(case):
    seen = observe(hiding(case, slice(N))._replace(dy=case.dy))
    assert_identical(seen.statistics, case.statistics)
    assert_finite(seen)


def a_batch_twice_over_counts_as_one(case):
    def twice(x):
        return np.concatenate([x, x])

    once = case.part(HALVES[0])
    seen = observe(once)
    expected = Seen(
        output=twice(seen.output),
        statistics=seen.statistics,
        gradients=jax.tree.map(lambda g: 2 * g, seen.gradients),
        input_gradient=twice(seen.input_gradient),
    )
    assert_same(observe(once._replace(x=twice(once.x), dy=twice(once.dy))), expected)


def hiding(case, samples):
    """The case with NaN or infinity in some masked samples, whose output does not matter."""
    mask, x, dy = np.ones(SHAPE, bool), case.x.copy(), case.dy.copy()
    mask[samples], x[samples], dy[samples] = False, np.nan, 0
    x[samples, 0] = np.inf
    return case._replace(x=x, dy=dy, mask=mask)


def some_hidden(case):
    """The case with a mask that hides more of some samples and channels than of others."""
    return case._replace(mask=np.random.default_rng(0).random(SHAPE) < 0.7)


# --- Running estimates ----------------------------------------------------------------------------


def evaluation_moves_no_estimates(case):
    assert_identical(observe(case).statistics, case.statistics)


def training_by_estimates_is_evaluation_by_those_that_it_leaves(case):
    """Gradients too: none flows through the estimates."""
    seen = observe(case)
    assert_same(seen, observe(evaluating(case).starting(batch_stats=seen.statistics)))


def a_channel_that_is_not_finite_keeps_its_estimates(case):
    """All other channels move, and the output shows the bad value."""
    clean, channel = observe(case).statistics, 3
    expected = jax.tree.map(np.copy, clean)
    for after, before in zip(*map(jax.tree.leaves, (expected, case.statistics)), strict=True):
        after[channel] = before[channel]
    for bad in (np.nan, np.inf, -np.inf, 1e200):  # of which only the square is infinite
        x = case.x.copy()
        x[1, 2, 0, channel] = bad
        seen = observe(case._replace(x=x))
        assert_identical(seen.statistics, expected)
        if not np.isfinite(bad):
            assert not np.isfinite(seen.output[1]).all(), f"the output hides {bad}"


def a_value_that_is_not_finite_is_the_only_one(case):
    """The bad value lies at another place in each sample."""
    x = case.x.copy()
    bad = np.arange(N), np.arange(N) % 3, np.arange(N) // 3 % 2, 3
    x[bad] = np.nan
    finite = np.ones(SHAPE, bool)
    finite[bad] = False
    assert_identical(np.isfinite(output_and_statistics(case._replace(x=x))[0]), finite)


def evaluating(case):
    return case.of(case.layer.called_with(use_running_average=True))


# --- Samples by themselves ------------------------------------------------------------------------


def a_sample_does_not_see_the_others(case):
    others = case.x.copy()
    others[1:] *= 100
    seen, beside_others = observe(case), observe(case._replace(x=others))
    assert_identical(seen.output[0], beside_others.output[0])
    assert_identical(seen.input_gradient[0], beside_others.input_gradient[0])


def a_sample_has_no_gradient_from_the_others(case):
    dy = case.dy.copy()
    dy[1:] = 0
    assert_identical(observe(case._replace(dy=dy)).input_gradient[1:], np.zeros_like(dy[1:]))


def gradients_of_micro_batches_add_up(case):
    first, second = (observe(case.part(half)) for half in HALVES)
    seen = observe(case)
    assert_same(jax.tree.map(np.add, first.gradients, second.gradients), seen.gradients)
    together = np.concatenate([first.input_gradient, second.input_gradient])
    assert_same(together, seen.input_gradient)


# --- Layers among each other ----------------------------------------------------------------------


def a_channel_norm_follows_a_batch_norm(case):
    estimate = case.layer.options["estimate"]
    batch_norm = part_of(case, "batch_norm", "EstimatedBatchNorm" if estimate else "BatchNorm")
    channel_norm = part_of(case, "channel_norm", "ChannelNorm")
    last = observe(channel_norm._replace(x=observe(batch_norm).output))
    first = observe(batch_norm._replace(dy=last.input_gradient))
    expected = Seen(
        output=last.output,
        statistics={"batch_norm": first.statistics},
        gradients={"batch_norm": first.gradients, "channel_norm": last.gradients},
        input_gradient=first.input_gradient,
    )
    assert_same(observe(case), expected)


def under_a_mask_too_a_channel_norm_follows_a_batch_norm(case):
    """Both count the same values, more of some channels than of others."""
    a_channel_norm_follows_a_batch_norm(some_hidden(case))


def a_channel_norm_is_a_group_norm_with_one_scale_and_bias_for_a_group(case):
    group_norm = Linen(nn.GroupNorm, FrozenDict(GROUPED)).made_with(
        use_fast_variance=False, param_dtype=jnp.float64
    )
    params = jax.tree.map(lambda p: np.repeat(p, C // GROUPS), case.variables["params"])
    seen = observe(case.of(group_norm).starting(params=params))
    gradients = jax.tree.map(lambda g: g.reshape(GROUPS, -1).sum(-1), seen.gradients)
    assert_same(observe(case), seen._replace(gradients=gradients))


def part_of(case, part, name):
    variables = {kind: tree[part] for kind, tree in case.variables.items() if part in tree}
    return case.of(LAYERS[name])._replace(variables=variables)


def an_nnx_layer_is_linens(case):
    """Their results are equal to the last bit."""
    assert_identical(observe(case), observe(case.of(in_linen(case.layer))))


def under_a_mask_too_an_nnx_layer_is_linens(case):
    an_nnx_layer_is_linens(some_hidden(case))


def over_devices_too_an_nnx_layer_is_linens(case):
    groups = {"axis_index_groups": ((0, 1), (2, 3))}
    actual, expected = (
        output_and_statistics(case.of(over_devices(layer.made_with(**groups), check_vma=False)))
        for layer in (case.layer, in_linen(case.layer))
    )
    assert_identical(actual, expected)


def in_linen(layer):
    """Linen's layer of this name, which infers the number of input features from the input."""
    options = {k: v for k, v in layer.options.items() if k not in ("num_features", "in_features")}
    if "out_features" in options:
        options["features"] = options.pop("out_features")
    make = getattr(bcn_flax.linen, layer.make.__name__)
    return Linen(make, FrozenDict(options), layer.call)


# --- Precision ------------------------------------------------------------------------------------


def half_precision_is_widened_first_and_rounded_last(case):
    """The results are equal to the last bit, operation by operation."""
    layer, variables, x, *_ = in_float32(case)
    for half in (ml_dtypes.bfloat16, np.float16):
        narrow = x.astype(half)
        y, statistics = layer(variables, narrow.astype(np.float32))
        assert_identical(layer(variables, narrow), (y, statistics))
        to_half = layer.made_with(dtype=half)
        assert_identical(to_half(variables, narrow), (y.astype(half), statistics))


def gradients_in_half_precision_are_rounded_once(case):
    case, half = in_float32(case), ml_dtypes.bfloat16
    narrow = case._replace(x=case.x.astype(half))
    wide = narrow._replace(x=narrow.x.astype(np.float32))
    actual, expected = (observe(case).input_gradient for case in (narrow, wide))
    assert actual.dtype == half, actual.dtype
    assert_close(actual, expected, ulps=64, dtype=np.float32, stored=half)


def weights_are_standardized_before_they_are_rounded(case):
    """Rounded first, weights far from 0 would keep no digits to standardize."""
    narrow = in_float32(case)
    narrow = narrow.of(narrow.layer.made_with(dtype=jnp.bfloat16))
    y, _ = output_and_statistics(narrow)
    shifted, _ = output_and_statistics(with_kernel(narrow, lambda kernel: kernel + 64))
    assert_close(shifted, y, ulps=8, dtype=jnp.bfloat16)


def gradients_of_weights_in_half_precision_are_rounded_once(case):
    half = ml_dtypes.bfloat16
    kernel = case.variables["params"]["kernel"].astype(half)
    dy = random_like(kernel).astype(half)

    def gradient(kernel):
        return jax.grad(lambda w: jnp.sum(standardize_kernel(w).astype(half) * dy))(kernel)

    actual, expected = (np.asarray(gradient(jnp.asarray(k))) for k in (kernel, np.float32(kernel)))
    assert actual.dtype == half, actual.dtype
    assert_close(actual, expected, ulps=64, dtype=np.float32, stored=half)


def in_float32(case):
    narrow = jax.tree.map(np.float32, case._replace(layer=None))
    return narrow.of(case.layer.made_with(param_dtype=jnp.float32))


# --- Weight standardization -----------------------------------------------------------------------


def shifting_the_weights_of_an_output_changes_nothing(case):
    shift = np.arange(1.0, C + 1)
    if out_axis(case) == -2:
        shift = shift[:, None]
    assert_same(observe(with_kernel(case, lambda kernel: kernel + shift)), observe(case))


def constant_weights_leave_the_bias(case):
    seen = observe(with_kernel(case, np.ones_like))
    assert_same(seen.output, np.broadcast_to(case.variables["params"]["bias"], SHAPE))
    assert_finite(seen)


def constant_weights_leave_all_finite(case):
    """This includes epsilon added to the deviation, whose derivative at 0 is infinite."""
    how = Standardization(epsilon_role="added_to_deviation")
    case = case.of(case.layer.made_with(standardization=how))
    assert_finite(observe(with_kernel(case, np.ones_like)))


def scaling_the_weights_is_scaling_epsilon(case):
    """A power of two changes no bit of the output."""
    how = Standardization(epsilon=4**2 * Standardization().epsilon)
    scaled = case.of(case.layer.made_with(standardization=how))
    seen = observe(with_kernel(scaled, lambda kernel: 4 * kernel))
    gradients = {**seen.gradients, "kernel": 4 * seen.gradients["kernel"]}
    assert_identical(seen._replace(gradients=gradients), observe(case))


def gradients_of_the_weights_of_an_output_have_mean_0(case):
    gradient = np.moveaxis(observe(case).gradients["kernel"], out_axis(case), -1)
    assert_same(gradient - gradient.reshape(-1, C).mean(0), gradient)


def a_call_changes_no_parameter(case):
    after = jax.jit(lambda *args: case.layer.apply(*args)[1]["params"])(case.variables, case.x)
    assert_identical(after, case.variables["params"])


def with_kernel(case, change):
    params = case.variables["params"]
    return case.starting(params={**params, "kernel": change(params["kernel"])})


def out_axis(case):
    return -2 if "transpose_kernel" in case.layer.options else -1


# --- Derivatives ----------------------------------------------------------------------------------

STEP = 1e-5
# The error of a central difference is the square of its step, plus float64 roundings over the step.
SLOPE_ULPS = 1e-5 / np.finfo(np.float64).eps


def gradients_are_slopes(case):
    values = case.variables["params"], case.x
    toward = random_like(values)

    def output(step):
        params, x = jax.tree.map(lambda v, d: v + step * d, values, toward)
        return observe(case.starting(params=params)._replace(x=x)).output

    slope, seen = (output(STEP) - output(-STEP)) / (2 * STEP), observe(case)
    along = inner((seen.gradients, seen.input_gradient), toward)
    assert_same(along, inner(case.dy, slope), SLOPE_ULPS)


def curvatures_are_slopes_of_gradients(case):
    toward = random_like(case.x)

    def gradient(x):
        return compiled_see(*case._replace(x=x)).input_gradient

    _, curvature = jax.jvp(gradient, (case.x,), (toward,))
    after, before = (np.asarray(gradient(case.x + step * toward)) for step in (STEP, -STEP))
    assert_same(curvature, (after - before) / (2 * STEP), SLOPE_ULPS)


def forward_mode_is_reverse_mode(case):
    toward = random_like(case.x)

    def output(x):
        return compiled_call(case.layer, case.variables, x)[0]

    _, derivative = jax.jvp(output, (case.x,), (toward,))
    assert_same(inner(derivative, case.dy), inner(toward, observe(case).input_gradient))


def random_like(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: rng.normal(size=v.shape), tree)


def inner(a, b):
    """The inner product."""
    return np.sum([np.sum(v * w) for v, w in zip(*map(jax.tree.leaves, (a, b)), strict=True)])


# --- How it is executed ---------------------------------------------------------------------------


def compiling_changes_nothing(case):
    assert_same(observe(case), see(*case))


def checkpointing_changes_nothing(case):
    assert_same(observe(case.of(jax.checkpoint(case.layer))), observe(case))


def rematerializing_changes_nothing(case):
    rematerialized = replace(case.layer, make=nn.remat(case.layer.make))
    assert_same(observe(case.of(rematerialized)), observe(case))


def a_sharded_batch_is_pooled_whole(case):
    x, dy = jax.device_put((case.x, case.dy), NamedSharding(mesh(), P(AXIS)))
    assert_same(observe(case._replace(x=x, dy=dy)), observe(case))


def the_parts_of_a_vmap_are_pooled(case):
    assert_same(observe(case.of(over_vmap(case.layer))), by_each_part(observe(case)))


def a_vmap_may_run_along_any_axis(case):
    assert_same(observe(case.of(over_vmap(case.layer, -1))), by_each_part(observe(case)))


def devices_are_pooled(case):
    assert_same(observe(case.of(over_devices(case.layer))), by_each_part(observe(case)))


def devices_weigh_by_what_counts_there(case):
    """The 4 devices have 2, 2, 1 and 0 samples that count."""
    devices_are_pooled(hiding(case, slice(5, N)))


def groups_of_devices_pool_among_themselves(case):
    # The unbiased variance depends on the size of the batch too.
    case = case.of(case.layer.made_with(running_variance="unbiased"))
    in_groups = case.layer.made_with(axis_index_groups=((0, 1), (2, 3)))
    # Statistics of groups are neither replicated over all devices nor different on each.
    seen = output_and_statistics(case.of(over_devices(in_groups, check_vma=False)))
    halves = (output_and_statistics(case.part(half)) for half in HALVES)
    outputs, statistics = zip(*halves, strict=True)
    assert_same(seen, (np.concatenate(outputs), for_each_part(*statistics)))


def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), (AXIS,))


def over_vmap(layer, axis=0):
    """The layer on parts of the batch along an axis of `vmap`; returns statistics per part."""
    layer = layer.made_with(axis_name=AXIS)

    def part(a):
        return jnp.moveaxis(a.reshape(DEVICES, -1, *a.shape[1:]), 0, axis)

    def forward(variables, x, mask):
        over_parts = jax.vmap(layer, in_axes=(None, axis, axis), axis_name=AXIS)
        y, statistics = over_parts(variables, *jax.tree.map(part, (x, mask)))
        return y.reshape(x.shape), statistics

    return forward


def over_devices(layer, **options):
    """The layer on parts of the batch, one per device; returns statistics per device."""
    layer = layer.made_with(axis_name=AXIS)

    def forward(variables, x, mask):
        y, statistics = layer(variables, x, mask)
        return y, jax.tree.map(lambda s: s[None], statistics)

    specs = P(), P(AXIS), P(AXIS)
    return jax.shard_map(forward, mesh=mesh(), in_specs=specs, out_specs=P(AXIS), **options)


def by_each_part(seen):
    return seen._replace(statistics=for_each_part(seen.statistics))


def for_each_part(*statistics):
    """Statistics repeated for each of the consecutive parts that share them."""
    return jax.tree.map(lambda *s: np.repeat(s, DEVICES // len(s), axis=0), *statistics)


# --- The table ------------------------------------------------------------------------------------


def only(*names):
    return {name: LAYERS[name] for name in names}


# Laws that compile programs of their own run with few layers: batch-channel norms contain the batch
# norms, and two of them cover all differences.
SOME = {**BY_THE_BATCH, **only("BatchChannelNorm")}
TWO = only("BatchChannelNorm", "BatchChannelNorm of the batch")

TABLE = {
    samples_may_change_places: NORMS,
    positions_may_change_places: NORMS,
    channels_of_a_group_may_change_places: NORMS,
    groups_may_change_places: NORMS,
    a_batch_norm_does_not_see_which_sample_a_value_is_of: only("BatchNorm"),
    a_channel_norm_does_not_see_which_channel_of_a_group_a_value_is_of: CHANNEL_NORM,
    channels_may_lie_along_any_axis: {**TWO, **CHANNEL_NORM},
    the_layout_in_memory_changes_nothing: {**NORMS, **IN_EVALUATION, **KERNELS},
    scaling_the_input_is_scaling_epsilon: {**TWO, **CHANNEL_NORM},
    the_sign_of_the_input_is_that_of_the_scale: NORMS,
    shifting_a_channel_shifts_its_mean_alone: WITH_ESTIMATES,
    shifting_a_sample_changes_nothing: CHANNEL_NORM,
    a_constant_comes_out_as_the_bias: only("BatchNorm", "ChannelNorm"),
    constants_far_from_0_leave_all_finite: only("BatchNorm", "EstimatedBatchNorm"),
    values_whose_squares_overflow_come_out_as_the_bias: only("BatchNorm", "ChannelNorm"),
    a_mask_that_hides_nothing_changes_nothing: {**SOME, **CHANNEL_NORM},
    what_a_mask_hides_might_as_well_not_be_there: {**SOME, **CHANNEL_NORM},
    what_a_mask_hides_may_be_huge_and_has_no_gradient: only("BatchNorm", "ChannelNorm"),
    the_unbiased_variance_counts_what_a_mask_leaves: only("BatchNorm"),
    what_a_mask_hides_is_normalized_all_the_same: {**SOME, **CHANNEL_NORM},
    nothing_moves_where_nothing_counts: {**SOME, **CHANNEL_NORM},
    a_batch_twice_over_counts_as_one: SOME,
    evaluation_moves_no_estimates: IN_EVALUATION,
    training_by_estimates_is_evaluation_by_those_that_it_leaves: BY_ESTIMATES,
    a_channel_that_is_not_finite_keeps_its_estimates: WITH_ESTIMATES,
    a_value_that_is_not_finite_is_the_only_one: only(
        "EstimatedBatchNorm", "BatchNorm in evaluation"
    ),
    a_sample_does_not_see_the_others: {**IN_EVALUATION, **CHANNEL_NORM, **KERNELS},
    a_sample_has_no_gradient_from_the_others: {**IN_EVALUATION, **BY_ESTIMATES, **KERNELS},
    gradients_of_micro_batches_add_up: {**only("BatchChannelNorm in evaluation"), **CHANNEL_NORM},
    a_channel_norm_follows_a_batch_norm: BATCH_CHANNEL_NORMS,
    under_a_mask_too_a_channel_norm_follows_a_batch_norm: TWO,
    a_channel_norm_is_a_group_norm_with_one_scale_and_bias_for_a_group: CHANNEL_NORM,
    an_nnx_layer_is_linens: NNX,
    under_a_mask_too_an_nnx_layer_is_linens: NNX_NORMS,
    over_devices_too_an_nnx_layer_is_linens: NNX_NORMS,
    half_precision_is_widened_first_and_rounded_last: only(
        "BatchChannelNorm", "BatchChannelNorm in evaluation"
    ),
    gradients_in_half_precision_are_rounded_once: only("BatchChannelNorm of the batch"),
    gradients_of_weights_in_half_precision_are_rounded_once: only("WSDense"),
    weights_are_standardized_before_they_are_rounded: KERNELS,
    shifting_the_weights_of_an_output_changes_nothing: KERNELS,
    constant_weights_leave_the_bias: KERNELS,
    constant_weights_leave_all_finite: only("WSDense"),
    scaling_the_weights_is_scaling_epsilon: KERNELS,
    gradients_of_the_weights_of_an_output_have_mean_0: KERNELS,
    a_call_changes_no_parameter: {**NORMS, **KERNELS, **only("NNX WSDense")},
    gradients_are_slopes: {**BY_THE_BATCH, **IN_EVALUATION, **CHANNEL_NORM, **KERNELS},
    curvatures_are_slopes_of_gradients: only(
        "BatchChannelNorm of the batch", "BatchChannelNorm in evaluation"
    ),
    forward_mode_is_reverse_mode: only("BatchChannelNorm of the batch", "WSConv"),
    compiling_changes_nothing: only("BatchChannelNorm of the batch"),
    checkpointing_changes_nothing: only("BatchChannelNorm of the batch"),
    rematerializing_changes_nothing: only("BatchChannelNorm"),
    a_sharded_batch_is_pooled_whole: TWO,
    the_parts_of_a_vmap_are_pooled: TWO,
    a_vmap_may_run_along_any_axis: only("BatchNorm"),
    devices_are_pooled: only("BatchNorm"),
    devices_weigh_by_what_counts_there: TWO,
    groups_of_devices_pool_among_themselves: TWO,
}


def check(law, layer, seed=0):
    """Fail if the law does not hold, for random numbers of that seed."""
    with jax.enable_x64(True):
        law(case_of(layer, seed))


# Ordered by layer, so that consecutive laws share its compiled programs.
LAWS = {
    f"{name}: {law.__name__.replace('_', ' ')}": partial(check, law, layer)
    for name, layer in LAYERS.items()
    for law, layers in TABLE.items()
    if name in layers
}
