"""Linen and NNX have one tree of variables, which moves without PyTorch too."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx

import bcn_flax
import bcn_flax.nnx
from bcn_flax import interop


class Linen(nn.Module):
    def setup(self):
        self.layers = [nn.Conv(4, (3, 3)), nn.BatchNorm(True), [nn.Dense(3)]]
        self.drop = nn.Dropout(0.5, deterministic=True)
        self.head = nn.Sequential([nn.Dense(2), nn.relu])

    def __call__(self, x):
        conv, norm, (dense,) = self.layers
        return self.head(self.drop(dense(norm(conv(x)))))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.layers = nnx.List([conv, norm, nnx.List([nnx.Linear(4, 3, rngs=rngs)])])
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), jax.nn.relu)

    def __call__(self, x):
        conv, norm, (dense,) = self.layers
        return self.head(self.drop(dense(norm(conv(x)))))


IMAGES = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)


def linen_variables():
    variables = Linen().init(jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), variables)


def test_models_of_the_same_names_have_the_same_tree_and_compute_the_same():
    variables = linen_variables()
    module = interop.module_with(Nnx(nnx.Rngs(0)), variables)
    returned = interop.variables_of(module)
    jax.tree.map(np.testing.assert_array_equal, returned, variables)
    np.testing.assert_allclose(module(IMAGES), Linen().apply(variables, IMAGES), rtol=1e-6)


def test_a_module_with_other_variables_is_a_copy_that_keeps_all_else():
    module = Nnx(nnx.Rngs(0))
    module.drop.rngs()  # so that its count is no longer that of a new module
    before = jax.tree.map(np.asarray, interop.variables_of(module))
    copy = interop.module_with(module, linen_variables())
    jax.tree.map(np.testing.assert_array_equal, interop.variables_of(module), before)
    assert copy.drop.rngs.count[...] == module.drop.rngs.count[...] == 1
    assert copy.drop.rngs.count is not module.drop.rngs.count


def test_an_abstract_module_is_filled():
    module = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    state_dict = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.ones(2)}
    moved = interop.module_from_torch(state_dict, module)
    np.testing.assert_array_equal(moved(jnp.eye(3)), state_dict["weight"].T + 1)
    assert isinstance(module.kernel.get_value(), jax.ShapeDtypeStruct)


def test_variables_must_be_those_of_the_module():
    variables = linen_variables()
    del variables["batch_stats"]
    variables["params"]["head"]["layers_0"] = {"kernel": jnp.ones((2, 2)), "gain": jnp.ones(2)}
    with pytest.raises(ValueError, match="must be those of the module") as caught:
        interop.module_with(Nnx(nnx.Rngs(0)), variables)
    assert set(str(caught.value).splitlines()[1:]) == {
        "  missing: batch_stats/layers_1/mean (4,)",
        "  missing: batch_stats/layers_1/var (4,)",
        "  missing: params/head/layers_0/bias (2,)",
        "  misshapen: params/head/layers_0/kernel is (2, 2) and must be (3, 2)",
        "  unexpected: params/head/layers_0/gain (2,)",
    }


def test_an_attribute_may_not_look_like_an_item_of_a_list():
    class Confusing(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs)])
            self.layers_0 = nnx.Linear(2, 2, rngs=rngs)

    with pytest.raises(ValueError, match="params/layers_0/kernel is the name of 2 variables"):
        interop.variables_of(Confusing(nnx.Rngs(0)))


LEAVES = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
DENSE = {"params": LEAVES}
WEIGHTS = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.array([np.nan, -np.inf])}


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_of_any_library_and_type_return_as_they_were(kind, dtype):
    state_dict = {key: kind(x.astype(dtype)) for key, x in WEIGHTS.items()}
    match = interop.match(state_dict, DENSE)
    returned = match.to_torch(match.to_flax(state_dict))
    for key, x in state_dict.items():
        assert type(returned[key]) is type(x)
        assert returned[key].dtype == dtype
        # NumPy takes two NaNs for the same in its own types only.
        wide = (np.asarray(a).astype(np.float64) for a in (returned[key], x))
        np.testing.assert_array_equal(*wide)


def test_float64_is_kept_in_float64(x64):
    state_dict = {key: x + 1e-12 for key, x in WEIGHTS.items()}
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, jnp.float64), DENSE)
    variables = interop.variables_from_torch(state_dict, like)
    np.testing.assert_array_equal(variables["params"]["kernel"], state_dict["weight"].T)


def test_a_value_too_large_for_its_new_type_is_refused_and_infinity_is_not():
    state_dict = {key: x + 1e5 for key, x in WEIGHTS.items()}
    like = jax.tree.map(lambda v: v.astype(jnp.float16), DENSE)
    with pytest.raises(ValueError, match="weight has values up to 100005, too large for float16"):
        interop.variables_from_torch(state_dict, like)
    large = jax.tree.map(lambda v: v + 1e5, DENSE)
    half = {key: x.astype(np.float16) for key, x in WEIGHTS.items()}
    with pytest.raises(ValueError, match="weight has values up to 100000"):
        interop.state_dict_from_variables(large, half)


@pytest.mark.parametrize(
    ("state_dict", "like", "complaint"),
    [
        ({}, DENSE, r"missing: .*; weight, for Flax's params/kernel \(3, 2\)"),
        (WEIGHTS, {}, r"unexpected: weight \(2, 3\), bias \(2,\), without a counterpart in "),
        (
            {"params": DENSE["params"]},
            DENSE,
            "state_dict_from_variables makes a state_dict of Flax",
        ),
        (WEIGHTS, LEAVES, r"there are also \['bias', 'kernel'\].*put them into"),
        (WEIGHTS, {**DENSE, "cache": {"i": jnp.ones(2)}}, r"there are also \['cache'\]"),
        (WEIGHTS, {"params": {"kernel": 1.0}}, "params/kernel is of type float"),
        (WEIGHTS, [1], "linen variables, a mapping of collections, or an NNX module.*type list"),
        ([1], DENSE, "a mapping from names to tensors, or a module.*type list"),
        ({"epoch": 3, "model": WEIGHTS}, DENSE, "'epoch' holds an? int"),
        ({"epoch": 3, "model": WEIGHTS}, DENSE, "'model' holds a dict of 2 tensors"),
        ({**WEIGHTS, "bias": np.float32(1)}, DENSE, r"misshapen: bias is \(\).* needs \(2,\)"),
        ({**WEIGHTS, "weight": np.ones((2, 3), int)}, DENSE, "another kind: weight is int64"),
        ({**WEIGHTS, "scale": np.ones(2)}, DENSE, r"unexpected: scale \(2,\)"),
        ({**WEIGHTS, "shift": np.ones(2)}, DENSE, r"params/bias \(2,\) may be shift or bias"),
        ({"fc/weight": WEIGHTS["weight"]}, DENSE, "with dots, not slashes"),
    ],
)
def test_what_cannot_be_right_is_refused(state_dict, like, complaint):
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        interop.variables_from_torch(state_dict, like)


def test_nothing_at_all_moves_as_nothing():
    assert interop.variables_from_torch({}, {"params": {}}) == {}
    assert str(interop.match({}, {})) == ""


def weights_at(*modules):
    return {f"{module}.{key}": x for module in modules for key, x in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("modules", "places", "names", "complaint"),
    [
        (["fc_1", "fc.1"], {"fc_1": LEAVES}, {}, "params/fc_1/bias (2,) may be fc_1.bias or fc.1."),
        (["fc.1"], {"fc_1": LEAVES, "fc": {"1": LEAVES}}, {}, "ambiguous: fc.1.weight may be par"),
        (["a", "b"], {"c": LEAVES}, {"a": "c", "b": "c"}, "params/c/bias (2,) may be a.bias or b."),
        (
            ["a"],
            {"b": LEAVES},
            {"a": "c"},
            "unexpected: a.weight (2, 3), a.bias (2,), without a counterpart in Flax at c, where",
        ),
        (["a"], {"b": LEAVES}, {"a": "c"}, "counterpart in Flax at c, where `names` puts it"),
        (["a"], {"a": LEAVES}, {"x": "a"}, "names: 'x' is no module of the state_dict"),
        (["ab"], {"ab": LEAVES}, {"a": "c"}, "names: 'a' is no module of the state_dict"),
    ],
)
def test_ambiguous_and_vain_names_are_refused(modules, places, names, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        interop.match(weights_at(*modules), {"params": places}, names=names)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"names": {"fc": "block.0"}}, "'block.0', for 'fc', has dots; paths of Flax take \"/\""),
        ({"names": lambda _: "block.0"}, "as in 'block/0'"),
        ({"names": ["fc"]}, "or be a function, but it is ['fc']"),
        ({"transposed": "fc"}, "it is the string 'fc': pass ['fc']"),
        ({"flattened": ["fc"]}, "it is ['fc']: pass {path: channels}"),
    ],
)
def test_arguments_that_look_like_another_kind_are_refused(arguments, complaint):
    like = {"params": {"block": {"0": LEAVES}}}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        interop.match(weights_at("fc"), like, **arguments)


def test_a_module_is_not_made_from_linen_variables():
    with pytest.raises(ValueError, match=r"type dict.*there is variables_from_torch"):
        interop.module_from_torch(WEIGHTS, DENSE)


def test_paths_may_leave_a_wrapper_s_name_out_or_have_it():
    like = {"params": {"head": LEAVES, "up": {"kernel": jnp.ones((3, 3, 4, 4))}}}
    state_dict = {**weights_at("net.fc"), "net.up.weight": np.ones((4, 4, 3, 3))}
    reports = {
        str(
            interop.match(
                state_dict,
                like,
                names={f"{prefix}fc": "head", "net": ""},
                transposed={f"{prefix}up": True},
                flattened={f"{prefix}fc": 1},
            )
        )
        for prefix in ("", "net.")
    }
    (report,) = reports
    assert "(I, O, *)" in report
    assert "from 1 channels" in report


def test_a_name_before_all_names_is_hinted_at_first():
    like = {"params": {"fc": LEAVES, "head": LEAVES}}
    with pytest.raises(ValueError, match="tensor by tensor") as caught:
        interop.match(weights_at("net.fc", "net.head"), like)
    first, *_ = str(caught.value).splitlines()
    assert first == 'All names begin with "net.", which names={"net": ""} removes.'


def test_only_modules_of_the_same_leaves_and_shapes_are_proposed():
    other = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="tensor by tensor") as caught:
        interop.match(weights_at("a", "b"), {"params": {"c": other, "d": LEAVES}})
    message = str(caught.value)
    assert message.endswith('names={\n    "a": "d",\n}')
    assert "unexpected: b.weight (2, 3), b.bias (2,), without a counterpart" in message
    assert "for Flax's params/c/bias (3,); c.weight, for Flax's params/c/kernel (3, 3)" in message
    assert "params/d" not in message


def test_features_of_several_axes_are_misshapen():
    """`DenseGeneral`, attention and norms over images lie in Flax as PyTorch never has them."""
    state_dict = {
        "query.weight": np.ones((8, 8)),
        "query.bias": np.ones(8),
        "norm.weight": np.ones((2, 2)),
    }
    like = {
        "params": {
            "query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))},
            "norm": {"scale": jnp.ones((2, 2))},
        }
    }
    with pytest.raises(ValueError, match="tensor by tensor") as caught:
        interop.match(state_dict, like)
    message = str(caught.value)
    assert "misshapen: query.weight is (8, 8), but Flax's params/query/kernel" in message
    assert "misshapen: query.bias is (8,), but Flax's params/query/bias" in message
    assert "misshapen: norm.weight is (2, 2), but Flax's params/norm/scale" in message


def test_a_rule_of_one_s_own_joins_the_others():
    rule = interop.Rule(("weight",), interop.RULES["params", "kernel"].layouts)
    rules = {**interop.RULES, ("params", "w"): rule}
    like = {"params": {"w": LEAVES["kernel"], "bias": LEAVES["bias"]}}
    variables = interop.variables_from_torch(WEIGHTS, like, rules=rules)
    np.testing.assert_array_equal(variables["params"]["w"], WEIGHTS["weight"].T)


def test_tensors_that_are_not_those_that_were_matched_are_refused():
    match = interop.match(WEIGHTS, DENSE)
    with pytest.raises(ValueError, match=r"misshapen: bias is \(3,\) and must be \(2,\)"):
        match.to_flax({"weight": WEIGHTS["weight"], "bias": np.ones(3)}, partial=True)
    with pytest.raises(ValueError, match=r"unexpected: gain \(2,\)"):
        match.to_flax({**WEIGHTS, "gain": np.ones(2)}, partial=True)
    with pytest.raises(ValueError, match=r"missing: params/bias \(2,\)"):
        match.to_torch({"params": {"kernel": jnp.ones((3, 2))}})


def test_a_safetensors_file_is_read_without_pytorch(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = {key: x.astype(ml_dtypes.bfloat16) for key, x in WEIGHTS.items()}
    safetensors.numpy.save_file(weights, path)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from bcn_flax import interop\n"
        "assert not {'safetensors', 'safetensors.numpy'} & set(sys.modules)\n"
        f"print({{k: (v.dtype.name, v.shape) for k, v in interop.load({str(path)!r}).items()}})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "{'bias': ('bfloat16', (2,)), 'weight': ('bfloat16', (2, 3))}"
    loaded = interop.load(path)
    np.testing.assert_array_equal(loaded["weight"], weights["weight"])


@pytest.mark.parametrize(
    ("linen", "module"),
    [
        (
            bcn_flax.BatchChannelNorm(num_groups=2, use_running_average=True),
            bcn_flax.nnx.BatchChannelNorm(
                4, num_groups=2, use_running_average=True, rngs=nnx.Rngs(0)
            ),
        ),
        (
            bcn_flax.WSConvTranspose(5, (3,), transpose_kernel=True),
            bcn_flax.nnx.WSConvTranspose(4, 5, (3,), transpose_kernel=True, rngs=nnx.Rngs(0)),
        ),
    ],
    ids=["BatchChannelNorm", "WSConvTranspose"],
)
def test_our_own_layers_have_the_same_tree_in_both_apis(linen, module):
    x = IMAGES[:, 0] @ np.ones((3, 4), np.float32)
    variables = jax.tree.map(lambda v: v + 0.5, linen.init(jax.random.key(0), x))
    y = interop.module_with(module, variables)(x)
    np.testing.assert_allclose(y, linen.apply(variables, x), rtol=1e-6)
