"""What NNX expects of a module: switches, views, state, copies, checkpoints, metadata."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.nnx.nn import dtypes

from bcn_flax import Standardization, standardize_kernel
from bcn_flax.models.nnx import VGG
from bcn_flax.nnx import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    WSConv,
    WSConvTranspose,
    WSDense,
)
from bcn_flax.variants import WS

AVERAGING = {
    "batch_norm": partial(BatchNorm, 4),
    "estimated": partial(EstimatedBatchNorm, 4),
    "bcn": partial(BatchChannelNorm, 4, num_groups=2),
    "bcn_batch": partial(BatchChannelNorm, 4, num_groups=2, estimate=False),
    "vgg": partial(VGG, ((4,),), in_channels=4, norm=partial(BatchChannelNorm, num_groups=2)),
}
STANDARDIZING = {
    "conv": partial(WSConv, 4, 6, (3, 3)),
    "masked": partial(WSConv, 4, 6, (3, 3), mask=jnp.ones((3, 3, 4, 6)).at[2].set(0)),
    "transpose": partial(WSConvTranspose, 4, 6, (3, 3), transpose_kernel=True),
    "gain": partial(WSDense, 4, 6, standardization=WS["nfnet"]),
}
MODULES = {**AVERAGING, "channel_norm": partial(ChannelNorm, 4, 2), **STANDARDIZING}

every_averaging = pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING)
every_standardizing = pytest.mark.parametrize("make", STANDARDIZING.values(), ids=STANDARDIZING)
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def build(make, **options):
    return make(**options, rngs=nnx.Rngs(0))


def data(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(3, 2, (4, 6, 6, 4)), jnp.float32)


def arrays(module, *filters):
    """Copies of the values, which later calls do not change."""
    return jax.tree.map(jnp.array, nnx.as_pure(nnx.state(module, *filters)))


def identical(a, b):
    return jax.tree.all(jax.tree.map(lambda u, v: bool((u == v).all()), a, b))


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def evaluates(module):
    """Whether a call keeps the statistics, and the output of a sample depends on it alone."""
    module = nnx.clone(module)
    before = arrays(module)
    one, other = (module(data(seed).at[0].set(1.0))[0] for seed in (0, 1))
    return identical(arrays(module), before) and np.allclose(one, other, atol=1e-5)


IN_PLACE = {
    "eval": lambda module: module.eval(),
    "set_attributes": lambda module: module.set_attributes(use_running_average=True),
}
IN_A_COPY = {
    "view": lambda module: nnx.view(module, use_running_average=True),
    "view_tree": lambda module: nnx.view(module, use_running_average=True, graph=False),
    "with_attributes": lambda module: nnx.with_attributes(module, use_running_average=True),
}


class TestSwitches:
    @pytest.mark.parametrize("switch", IN_PLACE.values(), ids=IN_PLACE)
    @every_averaging
    def test_in_place(self, make, switch):
        module = build(make)
        assert not evaluates(module)
        switch(module)
        assert evaluates(module)
        module.train()
        assert not evaluates(module)

    @pytest.mark.parametrize("switch", IN_A_COPY.values(), ids=IN_A_COPY)
    @every_averaging
    def test_in_a_copy_that_shares_the_variables(self, make, switch):
        module = build(make)
        evaluating = switch(module)
        assert evaluates(evaluating)
        assert not evaluates(module)
        module(data())
        assert identical(arrays(evaluating), arrays(module))

    def test_of_one_kind_of_layer_only(self):
        """The layer around a norm passes the switch on to it."""
        module = nnx.List([build(AVERAGING["bcn"]), build(AVERAGING["batch_norm"])])
        for graph in (True, False):
            view = nnx.view(module, only=BatchChannelNorm, use_running_average=True, graph=graph)
            assert [evaluates(layer) for layer in view] == [True, False]

    def test_set_view_keeps_what_is_not_given(self):
        layer = build(AVERAGING["bcn"], update_stats=False)
        layer.set_view(use_running_average=True)
        assert (layer.use_running_average, layer.update_stats) == (True, False)
        layer.set_view(update_stats=True)
        assert (layer.use_running_average, layer.update_stats) == (True, True)

    @pytest.mark.parametrize("name", ["batch_norm", "estimated", "bcn", "bcn_batch"])
    def test_the_call_wins(self, name):
        layer = build(AVERAGING[name], use_running_average=True, update_stats=True)
        before = arrays(layer)
        layer(data(), update_stats=False)
        assert identical(arrays(layer), before)
        expected = build(AVERAGING[name])
        np.testing.assert_array_equal(layer(data(), use_running_average=False), expected(data()))
        assert identical(arrays(layer), arrays(expected))

    def test_updating_can_be_switched_apart_from_normalizing(self):
        layer = build(AVERAGING["bcn"])
        before = arrays(layer)
        training, evaluation = layer(data(), update_stats=False), layer(data(), True)
        frozen = nnx.view(layer, update_stats=False)
        np.testing.assert_array_equal(frozen(data()), training)
        assert identical(arrays(layer), before)
        updating = nnx.view(layer, use_running_average=True, update_stats=True)
        np.testing.assert_array_equal(updating(data()), evaluation)
        assert not identical(arrays(layer), before)

    def test_a_missing_flag_is_refused(self):
        layer = build(AVERAGING["bcn"], use_running_average=None)
        with pytest.raises(ValueError, match="BatchChannelNorm needs use_running_average"):
            layer(data())

    def test_view_info_explains_them(self):
        switches = """\
  use_running_average: bool | None = None
    true in evaluation, false in training.
  update_stats: bool | None = None
    whether a call updates the running averages."""
        assert nnx.view_info(build(AVERAGING["batch_norm"])) == f"BatchNorm:\n{switches}"
        assert nnx.view_info(build(AVERAGING["bcn"])).count(switches) == 2


@pytest.mark.parametrize("train", [True, False])
@every_module
def test_a_call_changes_nothing_but_the_statistics(make, train):
    module = build(make)
    (module.train if train else module.eval)()
    graphdef, before = nnx.graphdef(module), arrays(module)
    variables = dict(nnx.iter_graph(module))
    attributes = {path: sorted(vars(m)) for path, m in nnx.iter_modules(module)}
    module(data())
    assert nnx.graphdef(module) == graphdef
    assert {path: sorted(vars(m)) for path, m in nnx.iter_modules(module)} == attributes
    after = dict(nnx.iter_graph(module))
    assert after.keys() == variables.keys()
    assert all(after[p] is v for p, v in variables.items() if isinstance(v, nnx.Variable))
    statistics = arrays(module, nnx.BatchStat)
    assert identical(arrays(module), before) == (not train or not jax.tree.leaves(statistics))
    nnx.update(module, nnx.state(build(make), nnx.BatchStat))
    assert identical(arrays(module), before)


@every_module
def test_modules_made_alike_share_one_compiled_program(make):
    """Their definitions are equal and have a hash."""
    traces = []

    @nnx.jit
    def call(module, x):
        traces.append(None)
        return module(x)

    for module in (build(make), build(make)):
        call(module, data())
    assert len(traces) == 1
    assert hash(nnx.graphdef(build(make))) == hash(nnx.graphdef(build(make)))


def test_groups_of_devices_may_be_lists():
    """A module's definition must have a hash, and lists have none."""
    as_lists, as_tuples = (
        build(AVERAGING["bcn"], axis_name="data", axis_index_groups=groups)
        for groups in ([[0, 1], [2, 3]], ((0, 1), (2, 3)))
    )
    assert hash(nnx.graphdef(as_lists)) == hash(nnx.graphdef(as_tuples))


COPIES = {
    "split and merge": lambda module: nnx.merge(*nnx.split(module), copy=True),
    "clone": nnx.clone,
    "clone of a tree": lambda module: nnx.clone(module, graph=False),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_module
def test_copies_go_on_alike(make, duplicate):
    module = build(make)
    module(data(1))
    duplicated = duplicate(module)
    assert nnx.graphdef(duplicated) == nnx.graphdef(module)
    np.testing.assert_array_equal(duplicated(data(2)), module(data(2)))
    assert identical(arrays(duplicated), arrays(module))


@every_module
def test_an_abstract_module_has_the_shapes_and_types_of_a_real_one(make):
    abstract, real = nnx.eval_shape(lambda: build(make)), build(make)
    assert nnx.graphdef(abstract) == nnx.graphdef(real)
    jax.tree.map(
        lambda a, r: (a.shape, a.dtype) == (r.shape, r.dtype) or pytest.fail(f"{a} is not {r}"),
        nnx.state(abstract),
        nnx.state(real),
    )


def make_training(key=0):
    conv = partial(WSConv, standardization=WS["nfnet"])
    norm = partial(BatchChannelNorm, num_groups=2)
    model = VGG(((4,),), conv=conv, norm=norm, rngs=nnx.Rngs(key))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x):
    y, gradients = nnx.value_and_grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    optimizer.update(model, gradients)
    return y


def test_training_goes_on_from_an_orbax_checkpoint(tmp_path):
    images = [data(seed)[..., :3] for seed in range(4)]
    model, optimizer = make_training()
    for x in images[:2]:
        train_step(model, optimizer, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
    expected = [train_step(model, optimizer, x) for x in images[2:]]

    restored = nnx.eval_shape(lambda: make_training(key=1))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(restored, checkpointer.restore(tmp_path / "state", nnx.state(restored)))
    assert [train_step(*restored, x) for x in images[2:]] == expected
    assert_identical(arrays(restored[0]), arrays(model))
    assert_identical(arrays(restored[1]), arrays(optimizer))


@every_standardizing
def test_an_optimizer_step_is_that_of_the_plain_layer_with_a_standardized_kernel(make):
    """The raw kernel is stored and trained, with the gradient through the standardization.

    A layer that wrote the standardized kernel back would begin the step from another place.
    """
    layer = build(make)
    plain_class = {WSConv: nnx.Conv, WSConvTranspose: nnx.ConvTranspose, WSDense: nnx.Linear}
    options = {k: v for k, v in make.keywords.items() if k != "standardization"}
    plain = plain_class[make.func](*make.args, **options, rngs=nnx.Rngs(0))
    gain = {} if layer.gain is None else {"gain": jnp.linspace(0.5, 2.0, 6)}
    nnx.update(layer, gain)
    parameters = arrays(layer, nnx.Param)
    mask = options.get("mask")
    axis = -2 if options.get("transpose_kernel") else -1
    weights = jnp.cos(jnp.arange(layer(data()).size, dtype=jnp.float32))

    def reference(parameters):
        kernel = standardize_kernel(
            parameters["kernel"],
            layer.standardization,
            gain=parameters.get("gain"),
            axis=axis,
            mask=None if mask is None else mask != 0,
        )
        model = nnx.clone(plain)
        nnx.update(model, {"kernel": kernel, "bias": parameters["bias"]})
        return jnp.sum(model(data()).ravel() * weights)

    loss, gradients = jax.value_and_grad(reference)(dict(parameters))
    sgd = optax.sgd(0.1)
    changes, _ = sgd.update(gradients, sgd.init(gradients))
    expected = optax.apply_updates(dict(parameters), changes)

    layer(data())
    assert_identical(arrays(layer, nnx.Param), parameters)
    optimizer = nnx.Optimizer(layer, sgd, wrt=nnx.Param)
    actual_loss, gradients = nnx.value_and_grad(
        lambda layer: jnp.sum(layer(data()).ravel() * weights)
    )(layer)
    assert_identical(arrays(layer, nnx.Param), parameters)
    optimizer.update(layer, gradients)
    np.testing.assert_array_equal(actual_loss, loss)
    assert_identical(dict(arrays(layer, nnx.Param)), expected)


@every_standardizing
def test_two_calls_agree(make):
    layer = build(make)
    np.testing.assert_array_equal(layer(data()), layer(data()))


@pytest.mark.parametrize("norm", [BatchChannelNorm, BatchNorm, nnx.BatchNorm, nnx.GroupNorm])
def test_networks_give_their_types_to_every_layer(norm):
    options = {"epsilon": 1e-2} | ({} if "BatchNorm" in norm.__name__ else {"num_groups": 2})
    model = build(
        partial(VGG, ((4,),), in_channels=2, num_classes=3),
        conv=partial(WSConv, standardization=Standardization(gamma=2.0)),
        norm=partial(norm, **options),
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
    )
    conv, layer, *_ = model.layers
    assert (conv.in_features, conv.standardization.gamma, conv.dtype) == (2, 2.0, jnp.bfloat16)
    assert (model.fc.out_features, model.fc.dtype) == (3, jnp.bfloat16)
    assert model.fc.param_dtype == conv.param_dtype == layer.param_dtype == jnp.float16
    assert type(layer) is norm
    assert layer.dtype == jnp.bfloat16
    parts = (layer.batch_norm, layer.channel_norm) if norm is BatchChannelNorm else (layer,)
    assert {part.epsilon for part in parts} == {1e-2}


def test_metadata_and_partitioning_reach_the_variables():
    partitioned = partial(nnx.with_partitioning, sharding=("model",))
    norm = build(
        AVERAGING["bcn"],
        scale_metadata={"role": "scale"},
        bias_metadata={"role": "bias"},
    )
    assert norm.batch_norm.scale.role == norm.channel_norm.scale.role == "scale"
    assert norm.batch_norm.bias.role == norm.channel_norm.bias.role == "bias"
    scale_init = partitioned(nnx.initializers.ones)
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        for make in (AVERAGING["batch_norm"], MODULES["channel_norm"]):
            assert nnx.get_partition_spec(nnx.state(build(make, scale_init=scale_init)))[
                "scale"
            ].get_value() == jax.P("model")
        conv = build(
            STANDARDIZING["conv"], kernel_metadata={"out_sharding": (None,) * 3 + ("model",)}
        )
        spec = nnx.get_partition_spec(nnx.state(conv))["kernel"].get_value()
        assert spec == jax.P(None, None, None, "model")
        assert jax.eval_shape(conv, data()).shape == (4, 6, 6, 6)


@every_standardizing
def test_a_custom_promotion_sees_the_standardized_kernel(make):
    seen = []

    def promote(values, **kwargs):
        seen.append(values[1])
        return dtypes.promote_dtype(values, **kwargs)

    layer = build(make, promote_dtype=promote)
    np.testing.assert_array_equal(layer(data()), build(make)(data()))
    axes = (
        (0, 1, 3) if getattr(layer, "transpose_kernel", False) else tuple(range(seen[0].ndim - 1))
    )
    assert len(seen) == 1
    assert np.abs(seen[0].mean(axes)).max() < 1e-5
    assert (seen[0] != layer.kernel[...]).any()
