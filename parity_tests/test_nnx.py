"""Layers and networks of NNX are those of linen, bit for bit, after every step of training."""

import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import bcn_flax.linen
import bcn_flax.models
import bcn_flax.models.nnx
import bcn_flax.nnx
from bcn_flax.variants import WS

STEPS = 10
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.01)}


class Case(NamedTuple):
    """The same layer in both.

    Attributes:
        linen: makes it there.
        nnx: makes it here, from the same arguments and `rngs`.
        shape: of the input.
        mode: the arguments of linen's call in training and in evaluation.
        nnx_mode: the same in NNX, where `.train()` and `.eval()` do it.
        arrays: more arguments of both constructors. An NNX module holds them as its state, so that
            `jit` sees arguments. It must see arguments in linen too, since it computes with
            constants while it compiles, and that may round differently.
        mask: whether to pass a mask in the call.
    """

    linen: Callable[..., nn.Module]
    nnx: Callable[..., nnx.Module]
    shape: tuple[int, ...]
    mode: Callable[[bool], Mapping[str, bool]] = lambda train: {}
    nnx_mode: Callable[[bool], Mapping[str, Any]] = lambda train: {}
    arrays: Mapping[str, jax.Array] = {}
    mask: bool = False


def norm(name, channels=4, **options):
    return Case(
        partial(getattr(bcn_flax.linen, name), **options),
        partial(getattr(bcn_flax.nnx, name), channels, **options),
        (4, 5, 3, channels),
        lambda train: {} if name == "ChannelNorm" else {"use_running_average": not train},
    )


def weights(name, *window, features=6, arrays=(), **options):
    return Case(
        partial(getattr(bcn_flax.linen, name), features, *window, **options),
        partial(getattr(bcn_flax.nnx, name), 4, features, *window, **options),
        (2, *(5 for _ in (window or [()])[0]), 4),
        arrays=dict(arrays),
    )


def vgg(layers, **options):
    """`layers` gives the arguments `conv` and `norm`, for a module of layers and Flax's."""
    options = {"blocks": ((4,),), "num_classes": 3, **options}
    return Case(
        partial(bcn_flax.models.VGG, **layers(bcn_flax.linen, nn), **options),
        partial(bcn_flax.models.nnx.VGG, **layers(bcn_flax.nnx, nnx), **options),
        (2, 4, 4, 3),
        lambda train: {"train": train},
    )


def bcn(ours, flax):
    return {"norm": partial(ours.BatchChannelNorm, num_groups=2)}


# Every value but 0 counts, and multiplies the weight.
KERNEL_MASK = jnp.ones((3, 3, 4, 6)).at[1:, 1:].set(0).at[0, 0].set(0.5)
NORMS = {
    "batch_norm": norm("BatchNorm", running_variance="unbiased"),
    "estimated": norm("EstimatedBatchNorm", running_variance="around_running_mean"),
    "channel_norm": norm("ChannelNorm", num_groups=2),
    "bcn": norm("BatchChannelNorm", num_groups=2, batch_epsilon=1e-3, momentum=0.8),
    "bcn_batch": norm(
        "BatchChannelNorm",
        num_groups=None,
        group_size=2,
        estimate=False,
        running_variance="unbiased",
    ),
    "bcn_plain": norm("BatchChannelNorm", num_groups=2, use_scale=False, use_bias=False),
}
KERNELS = {
    "grouped": weights("WSConv", (3,), feature_group_count=2, use_bias=False),
    "masked": weights("WSConv", (3, 3), arrays={"mask": KERNEL_MASK}, standardization=WS["nfnet"]),
    "transpose": weights("WSConvTranspose", (3, 3), (2, 2)),
    "transpose_kernel": weights(
        "WSConvTranspose", (3, 3), transpose_kernel=True, standardization=WS["timm_scaled"]
    ),
    "dense": weights("WSDense"),
}
NETWORKS = {
    "vgg": vgg(bcn, blocks=((4,), (6,))),
    "vgg_bn": vgg(
        lambda ours, flax: {
            "conv": partial(ours.WSConv, standardization=WS["timm_scaled"]),
            "norm": ours.BatchNorm,
        }
    ),
    "vgg_gn": vgg(
        lambda ours, flax: {"conv": flax.Conv, "norm": partial(flax.GroupNorm, num_groups=2)}
    ),
    "vgg_none": vgg(lambda ours, flax: {"norm": None}),
    "resnet": Case(
        partial(bcn_flax.models.ResNet, 8),
        partial(bcn_flax.models.nnx.ResNet, 8),
        (2, 4, 4, 3),
        lambda train: {"train": train},
    ),
}
CASES = {
    **NORMS,
    **{f"{name}_under_mask": NORMS[name]._replace(mask=True) for name in ("batch_norm", "bcn")},
    **KERNELS,
    **NETWORKS,
}
TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Batch(NamedTuple):
    x: jax.Array
    dy: jax.Array
    call: Mapping[str, jax.Array]


def batches(case, dtype, steps=STEPS):
    rng = np.random.default_rng(0)
    shape = output_shape(case)
    for _ in range(steps):
        mask = {"mask": jnp.asarray(rng.random(case.shape) < 0.7)} if case.mask else {}
        x, dy = (jnp.asarray(rng.normal(2, 1, s), dtype) for s in (case.shape, shape))
        yield Batch(x, dy, mask)


def output_shape(case):
    layer = case.linen(**case.arrays)
    init = partial(layer.init_with_output, jax.random.key(0), **case.mode(True))
    return jax.eval_shape(init, jnp.ones(case.shape))[0].shape


def random_variables(case, dtype):
    """Random variables, between 0.5 and 1.5."""
    layer = case.linen(param_dtype=dtype, **case.arrays)
    x = jnp.ones(case.shape, dtype)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **case.mode(True)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), shapes)


def linen_path(path):
    """`("layers", 0, "kernel")` as `("layers_0", "kernel")`."""
    return tuple(re.sub(r"/(\d+)", r"_\1", "/".join(map(str, path))).split("/"))


def as_linen(state):
    """An NNX state as the variables of linen."""
    collections = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}
    return unflatten_dict(
        {
            (collections[type(variable)], *linen_path(path)): jnp.array(variable[...])
            for path, variable in nnx.to_flat_state(state)
        }
    )


def fill(model, variables):
    """Set all variables and other arrays of an NNX module to those of linen."""
    values = {path[1:]: value for path, value in flatten_dict(variables).items()}
    state = nnx.to_flat_state(nnx.state(model))
    filled = [(path, values.pop(linen_path(path))) for path, _ in state]
    for (path, value), (_, own) in zip(filled, state, strict=True):
        assert (value.shape, value.dtype) == (own.shape, own.dtype), path
    nnx.update(model, nnx.from_flat_state(filled))
    assert not values, f"of linen alone: {list(values)}"


def train_linen(case, optimizer, dtype, variables, jit=jax.jit):
    """Train; return output, gradients and variables of each step, and the evaluation at the end."""

    def step(variables, state, arrays, x, dy, call):
        layer = make(**arrays)

        def loss(params, x):
            y, updates = layer.apply(
                {**variables, "params": params},
                x,
                **case.mode(True),
                **call,
                mutable=["batch_stats"],
            )
            return jnp.sum(y * dy), (y, updates)

        params = variables.get("params", {})
        (gradients, dx), (y, updates) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        changes, state = optimizer.update(gradients, state, params)
        params = {"params": optax.apply_updates(params, changes)} if params else {}
        return {**params, **updates}, state, (y, dx, gradients)

    make = partial(case.linen, dtype=dtype, param_dtype=dtype)
    step, state, reports = jit(step), optimizer.init(variables.get("params", {})), []
    for batch in batches(case, dtype):
        variables, state, seen = step(variables, state, case.arrays, *batch)
        reports.append((*seen, variables))

    def evaluate(variables, arrays, x):
        return make(**arrays).apply(variables, x, **case.mode(False))

    return [*reports, jit(evaluate)(variables, case.arrays, batch.x)]


def train_nnx(case, optimizer, dtype, variables, jit=nnx.jit):
    """The same in NNX."""

    def step(model, optimizer, x, dy, call):
        def loss(model, x):
            y = model(x, **case.nnx_mode(True), **call)
            return jnp.sum(y * dy), y

        (gradients, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
        gradients = nnx.state(gradients, nnx.Param)  # in tree mode also of the statistics
        optimizer.update(model, gradients)
        return y, dx, gradients

    def evaluate(model, x):
        return model(x, **case.nnx_mode(False))

    make = partial(case.nnx, dtype=dtype, param_dtype=dtype, **case.arrays)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    fill(model, {**variables, "arrays": case.arrays})
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    step, reports = jit(step), []
    for batch in batches(case, dtype):
        y, dx, gradients = step(model, optimizer, *batch)
        gradients = as_linen(gradients).get("params", {})
        after = as_linen(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        reports.append((y, dx, gradients, after))
    model.eval()
    return [*reports, jit(evaluate)(model, batch.x)]


def assert_identical(actual, expected):
    def check(a, e):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)

    jax.tree.map(check, actual, expected)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(expected)), "the test proves nothing"


def eager(step):
    return step


WAYS = {
    "graph": (jax.jit, nnx.jit, {"graph": True, "graph_updates": True}),
    "graph_without_updates": (jax.jit, nnx.jit, {"graph": True, "graph_updates": False}),
    "tree": (jax.jit, nnx.jit, {"graph": False, "graph_updates": False}),
    "eager": (eager, eager, {"graph": True, "graph_updates": True}),
}
QUICK = ("float32", "sgd", "graph")
SLOW = ("bfloat16", "adam", "tree")
EAGER = ("float32", "sgd", "eager")


# One of every class, with the most options.
SLOW_CASES = ("bcn", "bcn_under_mask", "masked", "transpose_kernel")


def combinations():
    """Every case in one way, some in another, and one eagerly.

    Networks are slow tests, because quick compilation rounds them differently in linen and NNX.
    """
    ways = [(name, QUICK) for name in CASES]
    ways += [(name, SLOW) for name in SLOW_CASES]
    ways += [("bcn", EAGER)]
    for name, choice in ways:
        marks = () if choice == QUICK and name not in NETWORKS else pytest.mark.slow
        yield pytest.param(name, *choice, id="-".join([name, *choice]), marks=marks)


@contextmanager
def nnx_mode(graph, graph_updates):
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph_updates):
        yield


@cache
def start_and_training(name, dtype, optimizer, way):
    """The arguments of the training of a case, and its results in linen."""
    variables = random_variables(CASES[name], TYPES[dtype])
    training = OPTIMIZERS[optimizer], TYPES[dtype], variables
    return training, train_linen(CASES[name], *training, WAYS[way][0])


@pytest.mark.parametrize(("name", "dtype", "optimizer", "way"), list(combinations()))
def test_ten_steps_are_linens_to_the_last_bit(name, dtype, optimizer, way):
    training, expected = start_and_training(name, dtype, optimizer, way)
    _, nnx_jit, mode = WAYS[way]
    with nnx_mode(**mode):
        assert_identical(train_nnx(CASES[name], *training, nnx_jit), expected)


def to_nnx(case):
    """The case with linen's layer as an NNX module, made by the bridge."""

    def make(rngs, **options):
        layer = nnx.bridge.ToNNX(case.linen(**options), rngs=rngs)
        layer.lazy_init(jnp.ones(case.shape), **case.mode(True))
        layer.to_nnx__rngs = None  # there are no more variables to make
        return layer

    def mode(train):
        return {**case.mode(train), **({"mutable": ["batch_stats"]} if train else {})}

    return case._replace(nnx=make, nnx_mode=mode)


def to_linen(case):
    """The case with NNX's layer as a linen module, made by the bridge."""

    def make(**options):
        layer, arguments = case.nnx.func, {**case.nnx.keywords, **options}
        return nnx.bridge.ToLinen(layer, args=case.nnx.args, kwargs=arguments)

    return case._replace(linen=make)


@pytest.mark.parametrize(
    "name", ["batch_norm", "channel_norm", "bcn_under_mask", "transpose_kernel"]
)
def test_the_bridges_train_as_the_native_layers(name):
    training, expected = start_and_training(name, *QUICK)
    assert_identical(train_nnx(to_nnx(CASES[name]), *training), expected)
    assert_identical(train_linen(to_linen(CASES[name]), *training), expected)


def test_the_state_of_a_network_is_the_tree_of_linens_variables():
    norm = bcn(bcn_flax.nnx, nnx)
    model = bcn_flax.models.nnx.VGG(((8,),), **norm, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    assert jax.tree.map(jnp.shape, as_linen(state)) == {
        "params": {
            "layers_0": {"kernel": (3, 3, 3, 8), "bias": (8,)},
            "layers_1": {
                "batch_norm": {"scale": (8,), "bias": (8,)},
                "channel_norm": {"scale": (2,), "bias": (2,)},
            },
            "fc": {"kernel": (8, 10), "bias": (10,)},
        }
    }
    statistics = as_linen(nnx.state(model, nnx.BatchStat))
    assert jax.tree.map(jnp.shape, statistics) == {
        "batch_stats": {"layers_1": {"batch_norm": {"mean": (8,), "var": (8,)}}}
    }
    linen = bcn_flax.models.VGG(((8,),), **bcn(bcn_flax.linen, nn))
    init = partial(linen.init, train=True)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 2, 2, 3)))
    assert jax.tree.map(jnp.shape, as_linen(nnx.state(model))) == jax.tree.map(jnp.shape, shapes)
