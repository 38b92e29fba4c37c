"""Fused tensors: one tensor of PyTorch is several leaves of Flax's variables."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

from bcn_flax import interop
from bcn_flax.interop import RULES, Rule
from bcn_flax.parity import SAME, Tolerance, assert_parity, compare
from bcn_flax.parity.errors import roundings
from parity_tests import weights
from parity_tests.conversion import assert_same_state, normal, randomize, shapes
from parity_tests.tolerances import assert_close

pytestmark = pytest.mark.torch

X = normal((2, 5, 3))
CELL = {"": "cell"}
LSTM_CELLS = [
    nn.OptimizedLSTMCell(4),
    nn.LSTMCell(4),
    *(kind(3, 4, rngs=nnx.Rngs(0)) for kind in (nnx.OptimizedLSTMCell, nnx.LSTMCell)),
]


@pytest.mark.parametrize("cell", LSTM_CELLS, ids=lambda cell: f"{type(cell).__module__}")
def test_an_lstm_computes_the_same_and_its_weights_return(cell):
    weights.assert_recurrent_converts(torch.nn.LSTM(3, 4, batch_first=True), cell, "bias_ih")


def test_a_gru_computes_the_same_and_its_weights_return():
    weights.assert_recurrent_converts(
        torch.nn.GRU(3, 4, batch_first=True), nn.GRUCell(4), "bias_hh"
    )


def test_a_simple_cell_computes_the_same_and_its_weights_return():
    module = torch.nn.RNN(3, 4, batch_first=True)
    weights.assert_recurrent_converts(module, nn.SimpleCell(4), "bias_hh")


def test_a_gru_of_nnx_has_no_second_bias():
    module = torch.nn.GRU(3, 4, batch_first=True)
    module.bias_hh_l0.data.zero_()
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    flax = nnx.RNN(cell, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"unexpected: bias_hh_l0 \(12,\), without a counterpart"):
        interop.match(module, flax, CELL)
    state_dict = {k: v for k, v in module.state_dict().items() if k != "bias_hh_l0"}
    y = interop.module_from_torch(state_dict, flax, names=CELL)(X)
    expected = module(torch.from_numpy(X))[0].detach().numpy()
    assert_close(y, expected, ulps=roundings(5 * 8), dtype=np.float32)


class TwoLayers(nn.Module):
    """Two layers, the first in both directions."""

    @nn.compact
    def __call__(self, x):
        def layer(name, **options):
            cell = nn.OptimizedLSTMCell(4, name=name)
            return nn.RNN(cell, **options)

        backwards = layer("backwards", reverse=True, keep_order=True)(x)
        x = jnp.concatenate([layer("forwards")(x), backwards], -1)
        backwards = layer("top_backwards", reverse=True, keep_order=True)(x)
        return jnp.concatenate([layer("top_forwards")(x), backwards], -1)


def test_each_layer_and_direction_of_an_lstm_has_a_name():
    module = randomize(torch.nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True))
    names = {
        "l0": "forwards",
        "l0_reverse": "backwards",
        "l1": "top_forwards",
        "l1_reverse": "top_backwards",
    }
    variables = interop.variables_from_torch(module, shapes(TwoLayers(), X), names=names)
    expected = module(torch.from_numpy(X))[0].detach().numpy()
    y = TwoLayers().apply(variables, X)
    assert_close(y, expected, ulps=2 * roundings(5 * 12), dtype=np.float32)


QUERY = normal((2, 5, 8))
CONTEXT = normal((2, 7, 6))


@pytest.mark.parametrize("bias", [True, False])
def test_an_attention_computes_the_same_and_its_weights_return(bias):
    weights.assert_attention_converts(bias=bias)


def test_an_attention_of_other_inputs_has_a_kernel_for_each():
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6)
    flax = nn.MultiHeadDotProductAttention(2, deterministic=True)
    match = interop.match(
        module, jax.eval_shape(lambda: flax.init(jax.random.key(0), QUERY, CONTEXT, CONTEXT))
    )
    variables = match.to_flax(module)
    query, context = torch.from_numpy(QUERY), torch.from_numpy(CONTEXT)
    expected = module(query, context, context)[0].detach().numpy()
    y = flax.apply(variables, QUERY, CONTEXT, CONTEXT)
    assert_close(y, expected, ulps=8 * roundings(8 * 7), dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())


def test_an_attention_of_nnx_and_of_timm_names():
    state_dict = torch.nn.MultiheadAttention(8, 2).state_dict()
    flax = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
    variables = interop.variables_from_torch(state_dict, flax)
    timm = {
        key.replace("in_proj_", "qkv.").replace("out_proj", "proj"): x
        for key, x in state_dict.items()
    }
    jax.tree.map(np.testing.assert_array_equal, variables, interop.variables_from_torch(timm, flax))


def test_parts_of_unequal_sizes():
    """Several queries share the heads of a key."""
    weight = normal((8, 3))
    kernels = {"query": (3, 4), "key": (3, 2), "value": (3, 2)}
    like = {
        "params": {name: {"kernel": np.ones(shape, np.float32)} for name, shape in kernels.items()}
    }
    params = interop.variables_from_torch({"in_proj_weight": weight}, like)["params"]
    for name, rows in {"query": weight[:4], "key": weight[4:6], "value": weight[6:]}.items():
        np.testing.assert_array_equal(params[name]["kernel"], rows.T)


def test_a_rule_of_the_users_own_for_gpt2():
    """The weight of `Conv1D` is (in, out); query, key and value lie along its second axis."""
    weights.assert_gpt2_converts()


REPORT = """\
in_proj_weight[0:4]   (4, 4)  ->  params/query/kernel  (4, 2, 2)  \
transposed (O, I, *) -> (*, I, O), heads (4, 4) -> (4, 2, 2)
in_proj_weight[4:8]   (4, 4)  ->  params/key/kernel    (4, 2, 2)  \
transposed (O, I, *) -> (*, I, O), heads (4, 4) -> (4, 2, 2)
in_proj_weight[8:12]  (4, 4)  ->  params/value/kernel  (4, 2, 2)  \
transposed (O, I, *) -> (*, I, O), heads (4, 4) -> (4, 2, 2)
out_proj.weight       (4, 4)  ->  params/out/kernel    (2, 2, 4)  \
transposed (O, I, *) -> (*, I, O), heads (4, 4) -> (2, 2, 4)"""


def small_attention():
    module = torch.nn.MultiheadAttention(4, 2, bias=False)
    heads = {"kernel": np.ones((4, 2, 2), np.float32)}
    out = {"kernel": np.ones((2, 2, 4), np.float32)}
    return module, {"params": {"query": heads, "key": heads, "value": heads, "out": out}}


def test_the_report_shows_the_parts():
    assert str(interop.match(*small_attention())) == REPORT


def test_the_report_shows_what_is_added():
    like = shapes(nn.RNN(nn.SimpleCell(4)), X)
    report = str(interop.match(torch.nn.RNN(3, 4), like, CELL))
    assert re.search(r"bias_hh_l0 +\(4,\) +-> +params/cell/i/bias +\(4,\) +copied, added", report)


def without(variables, name):
    params = {k: v for k, v in variables["params"].items() if k != name}
    return {"params": params}


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_missing_part_is_an_error(part):
    module, like = small_attention()
    expected = r"in_proj_weight is \(12, 4\), but its parts in Flax take 8 of 12 along axis 0: "
    with pytest.raises(ValueError, match=expected):
        interop.match(module, without(like, part))


def test_a_missing_tensor_is_named_beside_its_neighbors():
    state_dict = torch.nn.LSTM(3, 4).state_dict()
    del state_dict["weight_ih_l0"]
    expected = r"missing: weight_ih_l0, for Flax's params/cell/if/kernel \(3, 4\)"
    with pytest.raises(ValueError, match=expected):
        interop.match(state_dict, shapes(nn.RNN(nn.OptimizedLSTMCell(4)), X), CELL)


def test_parts_of_other_sizes_are_an_error():
    like = shapes(nn.RNN(nn.OptimizedLSTMCell(4)), X)
    with pytest.raises(ValueError, match=r"weight_ih_l0 is \(20, 3\).*take 16 of 20 along axis 0"):
        interop.match(torch.nn.LSTM(3, 5), like, CELL)
    kernels = {n: {"kernel": np.ones((2, 12))} for n in ("query", "key")}
    with pytest.raises(ValueError, match=r"\[0:4\] is \(4, 6\), but.*\(2, 12\) needs \(12, 2\)"):
        interop.match({"in_proj_weight": np.ones((8, 6))}, {"params": kernels})


def test_two_leaves_cannot_be_the_same_part():
    rule = Rule(("weight",), RULES["params", "kernel"].layouts, part=0)
    rules = {**RULES, ("params", "a", "w"): rule, ("params", "b", "w"): rule}
    like = {"params": {"a": {"w": np.ones((3, 2))}, "b": {"w": np.ones((3, 2))}}}
    with pytest.raises(ValueError, match="ambiguous: weight may be params/a/w or Flax's params/b"):
        interop.match({"weight": np.ones((4, 3))}, like, rules=rules)


def test_a_dense_layer_of_the_name_of_a_part_is_itself():
    names = ("query", "key", "value", "out", "proj")
    state_dict = {f"{name}.weight": np.full((2, 3), n, np.int32) for n, name in enumerate(names)}
    like = {"params": {name: {"kernel": np.ones((3, 2), np.int32)} for name in names}}
    params = interop.variables_from_torch(state_dict, like)["params"]
    assert [int(params[name]["kernel"][0, 0]) for name in names] == [0, 1, 2, 3, 4]


def lstm_match():
    module = torch.nn.LSTM(3, 4, batch_first=True)
    rnn = nn.RNN(nn.OptimizedLSTMCell(4))
    return module, rnn, interop.match(module, shapes(rnn, X), CELL)


@pytest.mark.parametrize("name", [name for name in weights.CHECKS if name.startswith("weights:")])
def test_a_check_of_the_mutants(name):
    weights.CHECKS[name]()


def test_partial_values_of_a_sum_must_be_declared():
    module, _, match = lstm_match()
    variables = match.to_flax(module)
    for convert, source in ((match.to_flax, module), (match.to_torch, variables)):
        with pytest.raises(ValueError, match=r"pass gradients=True if these are gradients"):
            convert(source, partial=True)
    assert_same_state(
        match.to_torch(variables, partial=True, gradients=False), match.to_torch(variables)
    )
    state_dict = module.state_dict()
    del state_dict["bias_ih_l0"]
    with pytest.raises(ValueError, match=r"bias_ih_l0\[0:4\] is missing, whose values are added"):
        match.to_flax(state_dict, partial=True, gradients=False)


def test_a_tensor_needs_the_values_of_all_its_parts():
    module, like = small_attention()
    match = interop.match(module, like)
    with pytest.raises(ValueError, match=r"in_proj_weight has no values for its parts params/key"):
        match.to_torch(without(like, "key"), partial=True)


def test_a_sum_that_is_too_large_is_refused():
    half = {"params": {"i": {"bias": jnp.ones(2, jnp.float16)}}}
    match = interop.match({"bias_ih": np.ones(2), "bias_hh": np.ones(2)}, half)
    with pytest.raises(ValueError, match=r"bias_ih \+ bias_hh has values up to 80000, too large"):
        match.to_flax({"bias_ih": np.full(2, 4e4), "bias_hh": np.full(2, 4e4)})
    infinite = match.to_torch({"params": {"i": {"bias": jnp.full(2, jnp.inf, jnp.float16)}}})
    np.testing.assert_array_equal(infinite["bias_hh"], [0, 0])


def test_inputs_of_a_recurrent_layer_may_be_flattened_images():
    like = shapes(nn.RNN(nn.OptimizedLSTMCell(4)), np.ones((1, 2, 12)))["params"]["cell"]
    like = {"params": {"conv": {"kernel": np.ones((3, 3, 3, 6), np.float32)}, "rnn": like}}
    conv = {"conv.weight": torch.ones(6, 3, 3, 3)}
    module = randomize(torch.nn.LSTM(12, 4))
    state_dict = conv | {f"rnn.{key}": x for key, x in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"ambiguous: rnn.weight_ih_l0") as caught:
        interop.match(state_dict, like)
    assert str(caught.value).count("ambiguous") == 1
    match = interop.match(state_dict, like, flattened={"rnn.l0": 6})
    kernel = match.to_flax(state_dict)["params"]["rnn"]["ii"]["kernel"]
    weight = module.weight_ih_l0[:4].detach().numpy()
    expected = weight.reshape(4, 6, 2).transpose(2, 1, 0).reshape(12, 4)
    np.testing.assert_array_equal(kernel, expected)
    returned = match.to_torch(match.to_flax(state_dict))["rnn.weight_ih_l0"]
    assert torch.equal(returned, module.weight_ih_l0)


class OneBias(torch.nn.LSTMCell):
    """An LSTM over time with the biases that Flax has: the other is zero and is not trained."""

    def __init__(self):
        super().__init__(3, 4)
        del self.bias_ih
        self.register_buffer("bias_ih", torch.zeros(16), persistent=False)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = super().forward(step, state)
        return state[0]


class LastState(nn.Module):
    """The state of an LSTM after the last step."""

    @nn.compact
    def __call__(self, x):
        cell, state = nn.OptimizedLSTMCell(4, name="cell"), (jnp.zeros((len(x), 4), x.dtype),) * 2
        for step in range(x.shape[1]):
            state, y = cell(state, x[:, step])
        return y


@pytest.mark.slow
def test_the_harness_compares_a_recurrent_cell():
    assert_parity(LastState(), OneBias(), X, names=CELL, axes={2: SAME, 3: SAME})


class TwoBiases(OneBias):
    """An LSTM as PyTorch has it."""

    def __init__(self):
        super().__init__()
        del self.bias_ih
        self.bias_ih = torch.nn.Parameter(torch.zeros(16))


@pytest.mark.slow
def test_the_harness_finds_that_two_biases_learn_twice_as_fast():
    comparison = compare(LastState(), TwoBiases(), X, names=CELL, axes={2: SAME, 3: SAME}, steps=1)
    failed = {str(row.name) for row in comparison.rows if not row.passed}
    assert {f"parameter cell/h{gate}/bias" for gate in "ifgo"} <= failed
    assert "The first phase with a difference is: training step 1" in str(comparison)


def test_the_harness_adds_two_biases_in_the_precision_in_which_it_compares():
    options = {"names": CELL, "axes": {2: SAME, 3: SAME}, "steps": 0, "eager": False}
    assert_parity(LastState(), randomize(TwoBiases()), X, **options)


class SelfAttention(torch.nn.MultiheadAttention):
    """Of a single input."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class FlaxSelfAttention(nn.Module):
    """Of a single input."""

    @nn.compact
    def __call__(self, x):
        layer = nn.MultiHeadDotProductAttention(2, deterministic=True, name="attention")
        return layer(x, x, x)


def test_the_harness_compares_an_attention():
    assert_parity(
        FlaxSelfAttention(),
        SelfAttention(8, 2, batch_first=True),
        QUERY,
        names={"": "attention"},
        axes={3: SAME},
        tolerances=[
            Tolerance(
                "* attention/key/bias", np.inf, "the softmax removes it, and its gradient is 0"
            )
        ],
    )
