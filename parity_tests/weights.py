"""Checks of the conversion of weights that the mutants run too."""

import ast

import jax
import numpy as np
import torch
from flax import linen as nn
from flax import nnx
from flax.traverse_util import unflatten_dict

from bcn_flax import interop
from bcn_flax.parity.errors import roundings
from parity_tests.conversion import assert_same_state, normal, shapes
from parity_tests.tolerances import assert_close


def assert_recurrent_converts(module, cell, added):
    """With a PyTorch layer's weights Flax computes the same, and the weights return exactly.

    Args:
        module: of PyTorch.
        cell: of linen or NNX.
        added: the bias whose values Flax adds to the other one's: it may return as zeros.
    """
    x = normal((2, 5, 3))
    is_nnx = isinstance(cell, nnx.Module)
    flax = nnx.RNN(cell, rngs=nnx.Rngs(0)) if is_nnx else nn.RNN(cell)
    match = interop.match(module.state_dict(), flax if is_nnx else shapes(flax, x), {"": "cell"})
    for second_bias in (True, False):
        with torch.no_grad():
            if not second_bias:
                bias = module.get_parameter(f"{added}_l0")
                # Of a GRU, the bias of the last gate is not added.
                bias[: 8 if isinstance(module, torch.nn.GRU) else None] = 0
        variables = match.to_flax(module)
        y = interop.module_with(flax, variables)(x) if is_nnx else flax.apply(variables, x)
        expected = module(torch.from_numpy(x))[0].detach().numpy()
        assert_close(y, expected, ulps=roundings(5 * 8), dtype=np.float32)
        returned = match.to_torch(variables)
        jax.tree.map(np.testing.assert_array_equal, match.to_flax(returned), variables)
    assert_same_state(returned, module.state_dict())


def assert_attention_converts(bias):
    x = normal((2, 5, 8))
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.rand_like(parameter) / 8
    flax = nn.MultiHeadDotProductAttention(2, deterministic=True, use_bias=bias)
    match = interop.match(module.state_dict(), shapes(flax, x))
    variables = match.to_flax(module)
    query = torch.from_numpy(x)
    expected = module(query, query, query)[0].detach().numpy()
    assert_close(flax.apply(variables, x), expected, ulps=8 * roundings(8 * 5), dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())


class Conv1D(torch.nn.Module):
    """A dense layer as GPT-2 has it, with the kernel `(in, out)`."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(inputs, outputs) / 4)
        self.bias = torch.nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class GPT2Attention(torch.nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.c_attn, self.c_proj = heads, Conv1D(8, 24), Conv1D(8, 8)

    def forward(self, x):
        parts = (part.unflatten(-1, (self.heads, -1)) for part in self.c_attn(x).split(8, -1))
        query, key, value = (part.transpose(1, 2) for part in parts)
        y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.c_proj(y.transpose(1, 2).flatten(2))


GPT2_RULES = {
    **interop.RULES,
    **{
        ("params", module, leaf): interop.Rule((f"c_attn.{name}",), layouts, part=n, axis=axis)
        for n, module in enumerate(("query", "key", "value"))
        for leaf, name, layouts, axis in [
            ("kernel", "weight", interop.untransposed, 1),
            ("bias", "bias", interop.to_heads, 0),
        ]
    },
    ("params", "out", "kernel"): interop.Rule(("c_proj.weight",), interop.untransposed),
    ("params", "out", "bias"): interop.Rule(("c_proj.bias",), interop.vector),
}


def assert_gpt2_converts():
    """The weight of `Conv1D` is not transposed, and its second axis holds query, key and value."""
    x, module = normal((2, 5, 8)), GPT2Attention(2)
    flax = nn.MultiHeadDotProductAttention(2, deterministic=True)
    match = interop.match(module.state_dict(), shapes(flax, x), rules=GPT2_RULES)
    variables = match.to_flax(module)
    expected = module(torch.from_numpy(x)).detach().numpy()
    assert_close(flax.apply(variables, x), expected, ulps=8 * roundings(8 * 5), dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())
    assert "c_attn.weight[:, 8:16]" in str(match)


def assert_gradients_convert():
    """That of a sum of two tensors is that of the first one."""
    module, x = torch.nn.LSTM(3, 4, batch_first=True), normal((2, 5, 3))
    rnn = nn.RNN(nn.OptimizedLSTMCell(4))
    match = interop.match(module, shapes(rnn, x), {"": "cell"})
    module(torch.from_numpy(x))[0].square().sum().backward()
    expected = jax.grad(lambda v: (rnn.apply(v, x) ** 2).sum())(match.to_flax(module))
    gradients = {name: p.grad for name, p in module.named_parameters()}
    converted = match.to_flax(gradients, partial=True, gradients=True)
    jax.tree.map(
        lambda a, b: assert_close(a, b, ulps=roundings(200), dtype=np.float32), converted, expected
    )
    assert_same_state(match.to_torch(converted, partial=True, gradients=True), gradients)


def message(*weights, **arguments):
    """The error of a match, or the report."""
    try:
        return str(interop.match(*weights, **arguments))
    except ValueError as error:
        return str(error)


def kernels(**weights):
    """Weights of PyTorch's shapes and the corresponding Flax variables."""
    state_dict = {f"{name}.weight": np.ones(w, np.float32) for name, w in weights.items()}
    like = {
        name: {"kernel": np.ones((*window, i, o), np.float32)}
        for name, (o, i, *window) in weights.items()
    }
    return state_dict, {"params": like}


def assert_names_are_proposed():
    numbers = {f"l{n}": f"block_{n}" for n in range(1, 13)}
    norms = {"a.bn1": "b/norm1", "a.bn2": "b/norm2", "a.downsample.1": "b/downsample_norm"}
    for names in (numbers, norms):
        state_dict = {f"{name}.weight": np.ones(4) for name in names}
        like = {place: {"scale": np.ones(4)} for place in sorted(names.values())}
        text = message(state_dict, {"params": unflatten_dict(like, sep="/")})
        assert ast.literal_eval(text.rpartition("names=")[2]) == names
        assert text.count("a guess") == len(names)


def assert_names_are_found():
    kernel = np.ones((2, 2))
    like = {"params": {"a": {"dense": {"kernel": kernel}, "top": {"kernel": kernel}}}}
    state_dict = {"net.fc.weight": kernel, "net.head.weight": kernel}
    names = {"net": "a", "net.fc": "a/dense", "net.head": "a/top"}
    pairs = interop.match(state_dict, like, {**names, "aux": "b"}, strict=False).pairs
    assert {pair.module: "/".join(pair.path[1:-1]) for pair in pairs} == {
        "net.fc": "a/dense",
        "net.head": "a/top",
    }
    assert "names: 'aux' is no module" in message(state_dict, like, {**names, "aux": "b"})


def assert_facts_are_asked_for():
    images = kernels(conv1=(8, 3, 3, 3), conv2=(4, 8, 3, 3), fc=(6, 72))
    images = dict(sorted(images[0].items())), images[1]
    assert "pass flattened={'fc': 4}; if none were" in message(*images)
    assert "from 8 channels first to last" in message(*images, flattened={"fc": 8})
    dense = kernels(conv=(4, 3, 3, 3), fc=(12, 5), head=(2, 24))
    assert "a multiple of the 4 features of 'conv'. If" in message(*dense)
    square = kernels(a=(4, 4, 3, 3))
    assert "transposed (O, I, *) -> (*, I, O)" in message(*square, transposed={"a": None})
    module = torch.nn.ModuleDict({"a": torch.nn.Conv2d(4, 4, 3, bias=False)})
    contradiction = "PyTorch's module says transposed=False, `transposed` says transposed=True"
    assert contradiction in message(module, square[1], transposed={"a": True})
    parts = {"query": {"kernel": np.ones((2, 2))}, "key": {"kernel": np.ones((2, 2))}}
    text = message({"in_proj_weight": np.ones((6, 2))}, {"params": parts})
    assert "its parts in Flax take 4 of 6 along axis 0" in text


CHECKS = {
    "weights of an LSTM": lambda: assert_recurrent_converts(
        torch.nn.LSTM(3, 4, batch_first=True), nn.OptimizedLSTMCell(4), "bias_ih"
    ),
    "weights of a GRU": lambda: assert_recurrent_converts(
        torch.nn.GRU(3, 4, batch_first=True), nn.GRUCell(4), "bias_hh"
    ),
    "weights of an attention": lambda: assert_attention_converts(bias=True),
    "weights of GPT-2": assert_gpt2_converts,
    "weights: gradients": assert_gradients_convert,
    "weights: proposed names": assert_names_are_proposed,
    "weights: given names": assert_names_are_found,
    "weights: facts": assert_facts_are_asked_for,
}
