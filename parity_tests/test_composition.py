"""Layers and networks in what users put around them: summaries, switches, wrappers, files."""

import copy
import dataclasses
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax import export
from jax.sharding import PartitionSpec as P

import bcn_flax.linen
import bcn_flax.models
import bcn_flax.models.nnx
import bcn_flax.nnx
from bcn_flax import affine
from bcn_flax.surgery.nnx import convert_batch_norm
from parity_tests.laws import assert_identical

GROUPS = {"num_groups": 2}
SMALL = {"blocks": ((4,),), "num_classes": 3}
LINEN = {
    "BatchNorm": partial(bcn_flax.linen.BatchNorm, use_running_average=False),
    "EstimatedBatchNorm": partial(bcn_flax.linen.EstimatedBatchNorm, use_running_average=False),
    "ChannelNorm": partial(bcn_flax.linen.ChannelNorm, **GROUPS),
    "BatchChannelNorm": partial(
        bcn_flax.linen.BatchChannelNorm, **GROUPS, use_running_average=False
    ),
    "WSConv": partial(bcn_flax.linen.WSConv, 4, (3, 3)),
    "WSConvTranspose": partial(bcn_flax.linen.WSConvTranspose, 4, (3, 3)),
    "WSDense": partial(bcn_flax.linen.WSDense, 4),
    "VGG": partial(
        bcn_flax.models.VGG, **SMALL, norm=partial(bcn_flax.linen.BatchChannelNorm, **GROUPS)
    ),
    "ResNet": partial(bcn_flax.models.ResNet, 8),
}
NNX = {
    "BatchNorm": partial(bcn_flax.nnx.BatchNorm, 4),
    "EstimatedBatchNorm": partial(bcn_flax.nnx.EstimatedBatchNorm, 4),
    "ChannelNorm": partial(bcn_flax.nnx.ChannelNorm, 4, 2),
    "BatchChannelNorm": partial(bcn_flax.nnx.BatchChannelNorm, 4, **GROUPS),
    "WSConv": partial(bcn_flax.nnx.WSConv, 4, 4, (3, 3)),
    "WSConvTranspose": partial(bcn_flax.nnx.WSConvTranspose, 4, 4, (3, 3)),
    "WSDense": partial(bcn_flax.nnx.WSDense, 4, 4),
    "VGG": partial(
        bcn_flax.models.nnx.VGG,
        **SMALL,
        in_channels=4,
        norm=partial(bcn_flax.nnx.BatchChannelNorm, **GROUPS),
    ),
    "ResNet": partial(bcn_flax.models.nnx.ResNet, 8, in_channels=4),
}
NORMS = ("BatchNorm", "EstimatedBatchNorm", "ChannelNorm", "BatchChannelNorm")
AVERAGING = ("BatchNorm", "EstimatedBatchNorm", "BatchChannelNorm")
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 4, 4, 4)), jnp.float32)

every_layer = pytest.mark.parametrize("name", LINEN)
every_norm = pytest.mark.parametrize("name", NORMS)


def build(name, **options):
    """A layer or network of NNX."""
    return NNX[name](**options, rngs=nnx.Rngs(0))


def call_options(name):
    """What the call of a linen module needs besides its input."""
    return {"train": True} if name in ("VGG", "ResNet") else {}


# --- Summaries ------------------------------------------------------------------------------------

WIDE = {"width": 400, "force_terminal": False}


@every_layer
def test_nnx_tabulates_and_the_layer_works_as_before(name):
    """`nnx.tabulate` replaces the methods of the classes while it runs."""
    table = nnx.tabulate(build(name), X, console_kwargs=WIDE)
    assert f"{name} Summary" in table
    assert "float32[2,4,4,4]" in table
    if name in ("VGG", "ResNet"):
        assert table.count(" BatchChannelNorm ") == {"VGG": 1, "ResNet": 7}[name]
        assert table.count(" WSConv ") == {"VGG": 1, "ResNet": 7}[name]
    assert nnx.eval_shape(lambda: build(name)(X)).shape[0] == 2
    if name != "ResNet":  # which takes long to compile
        assert "flops" in nnx.tabulate(build(name), X, compute_flops=True, console_kwargs=WIDE)


@every_layer
def test_nnx_displays(name, capsys):
    nnx.display(build(name))
    assert name in capsys.readouterr().out


@every_layer
def test_linen_tabulates(name, monkeypatch):
    # It puts descriptions in the place of arrays, which the tests' type checks would refuse.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    table = nn.tabulate(LINEN[name](), KEY, console_kwargs=WIDE)(X, **call_options(name))
    assert f"{name} Summary" in table
    variables = jax.eval_shape(partial(LINEN[name]().init, **call_options(name)), KEY, X)
    number = sum(np.prod(v.shape, dtype=int) for v in jax.tree.leaves(variables))
    assert f"Total Parameters: {number:,} " in table


# --- The graphdef of a mode -----------------------------------------------------------------------


def set_attributes(use_running_average):
    return lambda module: module.set_attributes(
        use_running_average=use_running_average, raise_if_not_found=False
    )


def view(use_running_average):
    return partial(nnx.view, use_running_average=use_running_average, raise_if_not_found=False)


TO_TRAINING = {
    "train": [nnx.Module.train],
    "eval, train": [nnx.Module.eval, nnx.Module.train],
    "set_attributes": [set_attributes(True), set_attributes(False)],
    "view": [view(True), view(False)],
    "eval, view": [nnx.Module.eval, view(False)],
    "copy": [nnx.Module.eval, copy.deepcopy, nnx.Module.train],
    "split, merge": [nnx.Module.eval, lambda m: nnx.merge(*nnx.split(m)), nnx.Module.train],
}


@pytest.mark.parametrize("switches", TO_TRAINING.values(), ids=TO_TRAINING)
@every_layer
def test_the_graphdef_of_a_mode_is_the_same_however_it_got_there(name, switches):
    fresh, module = build(name), build(name)
    for switch in switches:
        module = switch(module) or module
    assert nnx.graphdef(module) == nnx.graphdef(fresh)
    assert hash(nnx.graphdef(module)) == hash(nnx.graphdef(fresh))
    jax.tree.map(np.testing.assert_array_equal, module, fresh)
    for each in (fresh, module):
        each.eval()
    assert nnx.graphdef(module) == nnx.graphdef(fresh)


@pytest.mark.parametrize("name", [*AVERAGING, "VGG"])
def test_a_step_is_compiled_once_for_each_mode(name):
    modes = []

    @nnx.jit
    def call(module, x):
        modes.append(None)
        return module(x)

    module = build(name)
    for switch in (module.train, module.eval, module.train, module.eval, module.train):
        switch()
        call(module, X)
    assert len(modes) == 2


# --- Numbers as arguments -------------------------------------------------------------------------

NUMBERS = {
    "jax": jnp.float32,
    "jax_half": jnp.bfloat16,
    "numpy": np.float32,
    "numpy_double": np.float64,
    "numpy_array": np.asarray,
}
VALUES = {"momentum": 0.75, "epsilon": 0.5}  # exact in every type


def numbers(name, values):
    return {k: v for k, v in values.items() if k == "epsilon" or name != "ChannelNorm"}


def run_linen(name, values):
    """Initialize and train a step; return output and variables."""
    layer = LINEN[name](**values)
    variables = layer.init(KEY, X)
    return layer.apply(variables, X, mutable=["batch_stats"])


def run_nnx(name, values):
    layer = build(name, **values)
    y = layer(X)
    return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


every_api = pytest.mark.parametrize("run", [run_linen, run_nnx])


@pytest.mark.parametrize("kind", NUMBERS)
@every_norm
@every_api
def test_momentum_and_epsilon_may_be_scalars_of_any_kind(run, name, kind):
    """Concrete, outside of `jit` and inside, and traced, as of a schedule."""
    values = numbers(name, VALUES)
    expected = jax.jit(partial(run, name, values))()
    scalars = {k: NUMBERS[kind](v) for k, v in values.items()}
    with jax.numpy_dtype_promotion("strict"):
        assert_identical(jax.jit(partial(run, name, scalars))(), expected)
        traced = jax.jit(partial(run, name))(scalars)
    # The compiler does not know a traced number, and may round another way.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), traced, expected)
    assert jax.tree.map(jnp.result_type, traced) == jax.tree.map(jnp.result_type, expected)


@pytest.mark.parametrize("double", [jnp.float64, np.float64, np.asarray])
@every_api
def test_wide_numbers_widen_nothing(run, double, x64):
    scalars = {k: double(v) for k, v in VALUES.items()}
    shapes = jax.eval_shape(partial(run, "BatchChannelNorm"), scalars)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("scalar", [np.float32, jnp.float32])
@pytest.mark.parametrize(("argument", "value"), [("momentum", 1.5), ("epsilon", 0.0)])
@every_api
def test_a_concrete_number_is_checked_inside_of_jit_too(run, argument, value, scalar):
    values = {argument: scalar(value)}
    with pytest.raises(ValueError, match=f"but {argument}={value}"):
        jax.eval_shape(lambda: run("BatchChannelNorm", values))


def test_an_ensemble_may_have_a_momentum_for_each_member():
    momenta = jnp.array([0.0, 0.5, 1.0])
    _, stats = jax.vmap(lambda m: run_linen("BatchNorm", {"momentum": m}))(momenta)
    means = stats["batch_stats"]["mean"]
    np.testing.assert_allclose(means[1], means[0] / 2, rtol=1e-6)
    np.testing.assert_array_equal(means[2], 0)


def test_a_module_made_with_a_traced_number_may_be_returned():
    make = nnx.jit(lambda momentum: build("BatchChannelNorm", momentum=momentum))
    for momentum in (0.5, jnp.float32(0.5)):
        layer, expected = make(momentum), build("BatchChannelNorm", momentum=0.5)
        np.testing.assert_allclose(layer(X), expected(X), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.batch_norm.mean, expected.batch_norm.mean, rtol=1e-6)


@every_norm
@every_api
def test_axes_and_sizes_may_be_numpys_integers(run, name):
    ints = {"axis": 1, **({"num_groups": 2} if name.endswith("ChannelNorm") else {})}
    numpys = {k: np.int64(v) for k, v in ints.items()}
    if run is run_nnx and name == "ChannelNorm":
        ints, numpys = {"axis": 1}, {"axis": np.int64(1)}
    assert_identical(jax.jit(partial(run, name, numpys))(), jax.jit(partial(run, name, ints))())


# --- Metadata and groups of devices ---------------------------------------------------------------


def test_a_partitioning_reaches_both_norms_of_linen():
    """As tensor parallelism needs it: a drop-in replacement has no other argument for it."""
    layer = LINEN["BatchChannelNorm"](
        scale_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.constant(2.0), ("features",)),
    )
    variables = jax.jit(layer.init)(KEY, X)
    spec = {"scale": P("model"), "bias": P("features")}
    both = {"batch_norm": spec, "channel_norm": spec}
    assert nn.get_partition_spec(variables)["params"] == both
    assert jax.tree.map(np.unique, nn.unbox(variables)["params"]) == {
        "batch_norm": {"scale": 1, "bias": 0},
        "channel_norm": {"scale": 0, "bias": 2},
    }
    plain = LINEN["BatchChannelNorm"](scale_init=nn.initializers.zeros, bias_init=layer.bias_init)
    y, _ = layer.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, plain.apply(variables, X, mutable=["batch_stats"])[0])


@pytest.mark.parametrize(
    "options",
    [
        {"scale_metadata": {"out_sharding": ("model",)}},
        {"scale_init": nnx.with_partitioning(nnx.initializers.ones, ("model",))},
    ],
    ids=["metadata", "initializer"],
)
def test_a_partitioning_reaches_both_norms_of_nnx(options):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = build("BatchChannelNorm", **options)
        specs = nnx.get_partition_spec(nnx.state(layer, nnx.Param))
        for norm in ("batch_norm", "channel_norm"):
            assert specs[norm]["scale"].get_value() == P("model")
            assert specs[norm]["bias"].get_value() == P()
        assert (layer.batch_norm.scale[...] == 1).all()
        assert layer(X).shape == X.shape


DEVICE_GROUPS = {"axis_name": "data", "axis_index_groups": ((0, 1), (2, 3))}


@pytest.mark.parametrize("as_type", [tuple, list, np.array])
def test_a_converted_norm_keeps_its_axis_and_its_groups_of_devices(as_type):
    """Also in training, where there are no other devices to convert on."""
    groups = as_type([as_type(group) for group in DEVICE_GROUPS["axis_index_groups"]])
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(
        4, axis=np.int64(-1), axis_name="data", axis_index_groups=groups, rngs=rngs
    )
    conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
    conv, new = convert_batch_norm(nnx.Sequential(conv, norm), X, **GROUPS).layers
    assert isinstance(conv, bcn_flax.nnx.WSConv)
    assert new.axis == -1
    assert new.batch_norm.axis_name == "data"
    assert new.batch_norm.axis_index_groups == DEVICE_GROUPS["axis_index_groups"]


def test_the_bridges_keep_the_groups_of_devices():
    """Each pair of devices normalizes with its own statistics."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.concatenate([X, X * 2, X + 1, X * 3])

    def spread(call):
        each = jax.shard_map(
            call, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        )
        return jax.jit(each)(x)

    native = build("BatchChannelNorm", estimate=False, **DEVICE_GROUPS)
    linen = LINEN["BatchChannelNorm"](estimate=False, **DEVICE_GROUPS)
    to_nnx = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(X)
    to_nnx.to_nnx__rngs = None  # there are no more variables to make
    arguments = {"estimate": False, **GROUPS, **DEVICE_GROUPS, "update_stats": False}
    to_linen = nnx.bridge.ToLinen(bcn_flax.nnx.BatchChannelNorm, args=(4,), kwargs=arguments)
    variables = nnx.bridge.ToLinen(
        bcn_flax.nnx.BatchChannelNorm, args=(4,), kwargs=arguments | {"axis_name": None}
    ).init(KEY, X)
    expected = spread(lambda x: native(x, update_stats=False))
    apart = build("BatchChannelNorm", estimate=False)
    halves = [apart(half) for half in jnp.split(x, 2)]
    np.testing.assert_allclose(expected, jnp.concatenate(halves), atol=1e-5)
    for call in (lambda x: to_nnx(x, update_stats=False), partial(to_linen.apply, variables)):
        np.testing.assert_array_equal(spread(call), expected)


# --- Wrappers of linen ----------------------------------------------------------------------------


class Block(nn.Module):
    """A convolution and a norm; `wrap` transforms the class of the norm."""

    wrap: object = staticmethod(lambda norm: norm)
    evaluate: bool = False

    @nn.compact
    def __call__(self, x):
        x = LINEN["WSConv"](name="conv")(x)
        norm = self.wrap(bcn_flax.linen.BatchChannelNorm)
        return norm(**GROUPS, use_running_average=self.evaluate, name="norm")(x)


def step(module, variables):
    """Output, statistics and gradients of a step of training."""

    def loss(params):
        y, updates = module.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, updates)

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


WRAPPERS = {
    "jit": nn.jit,
    "remat": partial(nn.remat, policy=jax.checkpoint_policies.dots_saveable),
    "add_metadata_axis": partial(
        nn.add_metadata_axis, variable_axes={"params": None}, metadata_params={}
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_norm_trains_as_the_norm(wrap):
    variables = jax.jit(Block().init)(KEY, X)
    assert_identical(jax.jit(Block(wrap).init)(KEY, X), variables)
    expected = step(Block(), variables)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, step(Block(wrap), variables), expected)


def test_a_vmapped_ensemble_is_each_of_its_members():
    ensemble = nn.vmap(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )()
    variables = jax.jit(ensemble.init)(KEY, X)
    gradients, (y, updates) = step(ensemble, variables)
    for i in range(3):
        own = jax.tree.map(lambda v, i=i: v[i], (variables, gradients, y, updates))
        expected = step(Block(), own[0])
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, (own[1], own[2:]), expected)
    kernels = variables["params"]["conv"]["kernel"]
    assert (kernels[0] != kernels[1]).any(), "each member has its own random numbers"


def test_layers_are_composed_by_their_affine_maps():
    """The core of `BatchChannelNorm`, as a user writes it with layers of NNX."""
    layer, expected = build("BatchChannelNorm"), build("BatchChannelNorm")
    m = affine.moments(X)
    f = layer.batch_norm.affine(m, False, True)
    g = layer.channel_norm.affine(affine.push(f, m))
    y = affine.apply(affine.chain(f, g), X, origin=m.origin)
    np.testing.assert_allclose(y, expected(X), rtol=1e-5, atol=1e-5)
    same_map = expected.affine(m, use_running_average=True, update_stats=False)
    assert_identical(same_map, layer.affine(m, True, False))


# --- Copies and files -----------------------------------------------------------------------------

COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "clone": lambda module: module.clone(),
    "replace": dataclasses.replace,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_norm
def test_a_copied_module_of_linen_is_equal(name, duplicate):
    module = LINEN[name]()
    copied = duplicate(module)
    assert copied == module
    assert hash(copied) == hash(module)


def test_replaced_fields_are_those_of_the_call():
    layer = LINEN["BatchChannelNorm"]()
    variables = layer.init(KEY, X)
    for evaluating in (
        layer.clone(use_running_average=True),
        dataclasses.replace(layer, use_running_average=True),
    ):
        np.testing.assert_array_equal(
            evaluating.apply(variables, X), layer.apply(variables, X, use_running_average=True)
        )


def through_bytes(variables, empty, folder):
    del folder
    return serialization.from_bytes(empty, serialization.to_bytes(variables))


def through_a_state_dict(variables, empty, folder):
    del folder
    return serialization.from_state_dict(empty, serialization.to_state_dict(variables))


def through_orbax(variables, empty, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "variables", variables)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "variables", empty)


@pytest.mark.parametrize("restore", [through_bytes, through_a_state_dict, through_orbax])
def test_restored_variables_of_linen_are_identical(restore, tmp_path):
    layer = Block()
    variables = jax.jit(layer.init)(KEY, X)
    _, updates = layer.apply(variables, X, mutable=["batch_stats"])
    trained = {**variables, **updates}
    empty = jax.tree.map(jnp.zeros_like, trained)
    assert_identical(restore(trained, empty, tmp_path), trained)


def test_a_training_step_of_nnx_is_exported():
    graphdef, state = nnx.split(build("VGG"))
    leaves, structure = jax.tree.flatten(state)

    @jax.jit
    def call(leaves, x):
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        y = model(x)
        return y, jax.tree.leaves(nnx.state(model))

    exported = export.deserialize(export.export(call)(leaves, X).serialize())
    assert_identical(exported.call(leaves, X), call(leaves, X))
