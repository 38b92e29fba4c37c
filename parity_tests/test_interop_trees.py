"""Linen and NNX have one tree of variables, which is converted without PyTorch, too."""

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


def test_a_module_with_other_variables_is_a_copy_that_keeps_everything_else():
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


def test_empty_variables_are_converted_to_empty_variables():
    assert interop.variables_from_torch({}, {"params": {}}) == {}
    assert str(interop.match({}, {})) == ""


def test_a_module_is_not_made_from_linen_variables():
    with pytest.raises(ValueError, match=r"type dict.*there is variables_from_torch"):
        interop.module_from_torch(WEIGHTS, DENSE)


def test_a_rule_can_be_added():
    rule = interop.Rule(("weight",), interop.RULES["params", "kernel"].layouts)
    rules = {**interop.RULES, ("params", "w"): rule}
    like = {"params": {"w": LEAVES["kernel"], "bias": LEAVES["bias"]}}
    variables = interop.variables_from_torch(WEIGHTS, like, rules=rules)
    np.testing.assert_array_equal(variables["params"]["w"], WEIGHTS["weight"].T)


def test_a_leaf_without_a_rule_may_have_axes_of_length_1_in_pytorch():
    state_dict = {"gain": np.arange(6.0).reshape(6, 1, 1, 1)}
    match = interop.match(state_dict, {"params": {"gain": jnp.ones(6)}})
    variables = match.to_flax(state_dict)
    np.testing.assert_array_equal(variables["params"]["gain"], np.arange(6.0))
    np.testing.assert_array_equal(match.to_torch(variables)["gain"], state_dict["gain"])


def test_other_tensors_than_those_that_were_matched_are_refused():
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
