"""All weights are converted between Flax and PyTorch, or none."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen as nn

import bcn_flax
import bcn_torch
from bcn_flax import interop
from bcn_flax.interop import state_dict_from_variables, variables_from_torch
from bcn_flax.models import VGG
from parity_tests.conversion import assert_converts, normal, randomize
from parity_tests.networks import vgg_pair

pytestmark = pytest.mark.torch

IMAGES = normal((2, 9, 8, 3))


@pytest.mark.parametrize("ws", [True, False])
@pytest.mark.parametrize("norm", ["bcn", "bn", "gn", "none"])
def test_both_networks_have_the_same_parameters(norm, ws):
    """Names and shapes agree, and so do the logits, in evaluation."""
    model, module = vgg_pair(((8, 8), (16,)), norm, ws=ws)
    # Three layers of 72 products.
    assert_converts(randomize(module), model, IMAGES, ulps=512, call={"train": False})


def test_the_published_networks_have_the_same_parameters():
    state_dict = bcn_torch.VGG().state_dict()
    images = jnp.ones((1, 32, 32, 3))
    like = jax.eval_shape(lambda: VGG().init(jax.random.key(0), images, train=False))
    variables = variables_from_torch(state_dict, like)
    returned = state_dict_from_variables(variables, state_dict)
    assert list(returned) != []
    for name, tensor in state_dict.items():
        assert torch.equal(returned[name], tensor), name


def dense(**options):
    """The variables of a layer of Flax that is `bcn_torch.WSLinear(8, 6)`."""
    return bcn_flax.WSDense(6, **options).init(jax.random.key(0), jnp.ones((1, 8)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_values_take_the_dtype_of_the_target(dtype):
    module = bcn_torch.WSLinear(8, 6).to(dtype)
    variables = variables_from_torch(module.state_dict(), jax.eval_shape(dense))
    assert variables["params"]["kernel"].dtype == jnp.float32
    returned = state_dict_from_variables(variables, module.state_dict())
    assert returned["weight"].dtype == dtype
    if dtype != torch.float64:  # which float32 rounded on the way
        assert torch.equal(returned["weight"], module.weight)


def test_bfloat16_parameters_are_converted_exactly():
    variables, module = dense(param_dtype=jnp.bfloat16), bcn_torch.WSLinear(8, 6)
    module.load_state_dict(state_dict_from_variables(variables, module.state_dict()))
    kernel = np.asarray(variables["params"]["kernel"]).astype(np.float32)
    assert variables["params"]["kernel"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(module.weight.detach().numpy().T, kernel)


def broken_state_dict():
    """Of a small network, with one key missing, one too many, and one of another shape."""
    state_dict = vgg_pair(((8,),))[1].state_dict()
    del state_dict["layers.1.channel_norm.scale"]
    state_dict["layers.7.weight"] = torch.ones(3)
    state_dict["fc.weight"] = torch.ones(8, 10)
    return state_dict


COMPLAINT = (
    "The state_dict and the Flax variables must match, tensor by tensor, but:\n"
    "  misshapen: fc.weight is (8, 10), but Flax's params/fc/kernel of shape (8, 10) needs "
    "(10, 8)\n"
    "  missing: layers.1.channel_norm.scale or layers.1.channel_norm.weight, for Flax's "
    "params/layers_1/channel_norm/scale (4,)\n"
    "  unexpected: layers.7.weight (3,), without a counterpart in Flax\n"
    "Build both models with the same configuration, or pass `names` to say where in Flax a module "
    "of PyTorch is."
)


@pytest.mark.parametrize(
    "convert",
    [
        lambda variables: variables_from_torch(broken_state_dict(), variables),
        lambda variables: state_dict_from_variables(variables, broken_state_dict()),
    ],
    ids=["from_torch", "to_torch"],
)
def test_the_error_lists_everything_that_does_not_match(convert):
    variables = vgg_pair(((8,),))[0].init(jax.random.key(0), IMAGES, train=False)
    with pytest.raises(ValueError, match="tensor by tensor") as caught:
        convert(variables)
    assert sorted(str(caught.value).splitlines()) == sorted(COMPLAINT.splitlines())


def test_a_module_name_that_ends_in_a_number_may_be_the_same_in_pytorch():
    like = {"params": {"fc_1": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}}
    module = torch.nn.ModuleDict({"fc_1": torch.nn.Linear(3, 2)})
    variables = variables_from_torch(module.state_dict(), like)
    np.testing.assert_array_equal(
        variables["params"]["fc_1"]["kernel"], module["fc_1"].weight.detach().numpy().T
    )


def test_partitioned_variables_are_converted_like_plain_ones():
    initializer = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    variables, module = dense(kernel_init=initializer), bcn_torch.WSLinear(8, 6)
    module.load_state_dict(state_dict_from_variables(variables, module.state_dict()))
    returned = variables_from_torch(module.state_dict(), variables)
    jax.tree.map(np.testing.assert_array_equal, returned, nn.meta.unbox(variables))


class TiedTorch(torch.nn.Module):
    """A decoder with the weights of its embedding."""

    def __init__(self, tied):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 3)
        self.head = torch.nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


EMBEDDING = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)
SHARED = {"params": {"embed": {"embedding": jnp.asarray(EMBEDDING)}}}


def test_a_tied_tensor_needs_no_leaf_of_its_own_and_stays_tied():
    module = TiedTorch(tied=True)
    match = interop.match(module, SHARED)
    assert str(match).splitlines()[-1] == "head.weight: tied to embed.weight"
    state_dict = match.to_torch(SHARED)
    for key in ("embed.weight", "head.weight"):
        np.testing.assert_array_equal(state_dict[key].numpy(), EMBEDDING)
    with pytest.raises(ValueError, match=r"head\.weight and embed\.weight were one tensor"):
        match.to_flax({**state_dict, "head.weight": state_dict["head.weight"] + 1})


def test_the_tensor_that_has_a_leaf_may_come_after_the_one_that_is_tied_to_it():
    state_dict = dict(reversed(TiedTorch(tied=True).state_dict().items()))
    assert interop.match(state_dict, SHARED).tied == {"head.weight": "embed.weight"}


def test_a_tensor_that_only_equals_another_is_unexpected():
    module = TiedTorch(tied=False)
    module.head.weight.data = module.embed.weight.data.clone()
    with pytest.raises(ValueError, match=r"unexpected: head\.weight"):
        interop.match(module, SHARED)


def test_one_tensor_cannot_take_two_values():
    module = TiedTorch(tied=True)
    match = interop.match(
        module, {"params": {**SHARED["params"], "head": {"kernel": jnp.ones((3, 7))}}}
    )
    variables = match.to_flax(module)
    assert torch.equal(match.to_torch(variables)["head.weight"], module.head.weight)
    variables["params"]["head"]["kernel"] += 1
    with pytest.raises(ValueError, match=r"head\.weight and embed\.weight are one tensor"):
        match.to_torch(variables)


def test_a_model_on_the_meta_device_can_be_imitated():
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    variables = {"params": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    state_dict = state_dict_from_variables(variables, module)
    assert torch.equal(state_dict["weight"], torch.ones(2, 3))
