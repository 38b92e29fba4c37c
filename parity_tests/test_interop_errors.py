"""Errors list what does not match, with a way out; reports list what is assumed."""

import ast
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

from bcn_flax import interop

LEAVES = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
DENSE = {"params": LEAVES}
WEIGHTS = {"weight": np.arange(6.0).reshape(2, 3), "bias": np.array([np.nan, -np.inf])}


def at(*modules):
    return {f"{module}.{key}": x for module in modules for key, x in WEIGHTS.items()}


def variables(*modules):
    return {"params": unflatten_dict(dict.fromkeys(modules, LEAVES), sep="/")}


def layers(transposed=(), **weights):
    """Weights of PyTorch's shapes and the corresponding Flax variables."""
    state_dict = {f"{name}.weight": np.ones(shape, np.float32) for name, shape in weights.items()}
    kernels = {
        name: (*window, a, b) if name in transposed else (*window, b, a)
        for name, (a, b, *window) in weights.items()
    }
    return state_dict, {"params": {n: {"kernel": np.ones(k)} for n, k in kernels.items()}}


UP = layers(["up"], up=(4, 5, 3, 3))
GROUPED = UP[0] | {"up.weight": np.ones((8, 4, 3, 3))}, layers(up=(8, 8, 3, 3))[1]
BLOCK = {"params": {"block": {"0": LEAVES}}}
FLATTENED = layers(stem=(4, 3, 3, 3), fc=(5, 24))
# A square kernel, one that is transposed by its shape, and a square one of a single pixel.
DECODER = layers(["up"], square=(4, 4, 3, 3), up=(4, 5, 3, 3), mix=(4, 4, 1, 1))


def message(*arguments, **options):
    with pytest.raises(ValueError, match="tensor by tensor") as caught:
        interop.match(*arguments, **options)
    return str(caught.value)


# PyTorch's side, Flax's side, and the message: "..." stands for anything.
WRONG = [
    ({}, DENSE, "missing: shift or bias, for Flax's params/bias (2,); weight, for...kernel (3, 2)"),
    (WEIGHTS, {}, "unexpected: weight (2, 3), bias (2,), without a counterpart in Flax"),
    ({"params": LEAVES}, DENSE, "state_dict_from_variables makes a state_dict of Flax's variables"),
    ([1], DENSE, "a mapping from names to tensors, or a module, but it is of type list"),
    ({"epoch": 3}, DENSE, "'epoch' holds a int"),
    ({"model": WEIGHTS}, DENSE, "'model' holds a dict of 2 tensors"),
    (WEIGHTS, LEAVES, "there are also ['bias', 'kernel']...put them into"),
    (WEIGHTS, {**DENSE, "cache": {"i": jnp.ones(2)}}, "there are also ['cache']"),
    (WEIGHTS, {"params": {"kernel": 1.0}}, "params/kernel is of type float"),
    (WEIGHTS, [1], "linen variables, a mapping of collections, or an NNX module...type list"),
    ({**WEIGHTS, "bias": np.float32(1)}, DENSE, "misshapen: bias is ()...needs (2,)"),
    ({**WEIGHTS, "weight": np.ones((2, 3), int)}, DENSE, "of another kind: weight is int64"),
    ({**WEIGHTS, "scale": np.ones(2)}, DENSE, "unexpected: scale (2,)"),
    ({**WEIGHTS, "shift": np.ones(2)}, DENSE, "params/bias (2,) may be shift or bias"),
    (at("fc_1", "fc.1"), variables("fc_1"), "params/fc_1/bias (2,) may be fc_1.bias or fc.1.bias"),
    (at("fc.1"), variables("fc_1", "fc/1"), "ambiguous: fc.1.weight may be params/fc"),
    ({"fc/weight": WEIGHTS["weight"]}, DENSE, "with dots, not slashes"),
    (*UP, "misshapen: up.weight...if it is a transposed convolution, pass transposed=['up']"),
    (*DECODER, "square.weight has as many inputs as outputs...pass transposed={'square': None}"),
    (
        *FLATTENED,
        "If images of 4 channels were flattened...pass flattened={'fc': 4}; if none were, pass "
        "flattened={'fc': 24}",
    ),
]
WRONG_ARGUMENTS = [
    (
        at("fc"),
        BLOCK,
        {"names": {"fc": "block.0"}},
        "'block.0', for 'fc', has dots; paths of",
    ),
    (at("fc"), BLOCK, {"names": lambda _: "block.0"}, "as in 'block/0'"),
    (at("fc"), BLOCK, {"names": ["fc"]}, "or be a function, but it is ['fc']"),
    (at("fc"), BLOCK, {"names": {"x": "a"}}, "names: 'x' is no module of the state_dict"),
    (at("fc"), BLOCK, {"names": {"f": "a"}}, "names: 'f' is no module of the state_dict"),
    (at("fc"), BLOCK, {"names": {"fc": "c"}}, "unexpected: fc...at c, where `names` puts it"),
    (at("a", "b"), variables("c"), {"names": {"a": "c", "b": "c"}}, "may be a.bias or b.bias"),
    (at("fc"), BLOCK, {"transposed": "fc"}, "it is the string 'fc': pass ['fc']"),
    (at("fc"), BLOCK, {"flattened": ["fc"]}, "it is ['fc']: pass {path: channels}"),
    (*FLATTENED, {"transposed": ["fc"]}, "'fc' is no convolution of the state_dict"),
    (*FLATTENED, {"flattened": {"stem": 4}}, "'stem' is no dense layer of the state_dict"),
    (*FLATTENED, {"flattened": {"fc": 5}}, "'fc' has 24 inputs, which 5 does not divide"),
    (*FLATTENED, {"flattened": {"fc": 0}}, "'fc' has 24 inputs, which 0 does not divide"),
    (*DECODER, {"transposed": {"up": False}}, "square.weight has as many inputs as outputs"),
    (*GROUPED, {"transposed": ["up"]}, "needs (8, 8, 3, 3); Flax has no grouped transposed conv"),
]


@pytest.mark.parametrize(
    ("source", "like", "arguments", "text"),
    [(source, like, {}, text) for source, like, text in WRONG] + WRONG_ARGUMENTS,
)
def test_what_cannot_be_right_is_refused(source, like, arguments, text):
    pattern = ".*".join(map(re.escape, text.split("...")))
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        interop.match(source, like, **arguments)


def test_features_of_several_axes_are_misshapen():
    """`DenseGeneral`, attention and norms over images have in Flax axes that PyTorch never has."""
    state_dict = {
        "fc.weight": np.ones((8, 8)),
        "fc.bias": np.ones(8),
        "norm.weight": np.ones((2, 2)),
    }
    dense = {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
    text = message(state_dict, {"params": {"fc": dense, "norm": {"scale": jnp.ones((2, 2))}}})
    assert "misshapen: fc.weight is (8, 8), but Flax's params/fc/kernel" in text
    assert "misshapen: fc.bias is (8,), but Flax's params/fc/bias" in text
    assert "misshapen: norm.weight is (2, 2), but Flax's params/norm/scale" in text


def alphabetical(weights):
    state_dict, like = weights
    return dict(sorted(state_dict.items())), like


CHAIN = layers(stem=(64, 3, 3, 3), conv=(16, 64, 3, 3), fc=(5, 64))
POOLED = layers(conv=(8, 3, 3, 3), layer=(64, 8, 3, 3), fc=(5, 64), head=(3, 64), zoom=(3, 5))
HEADS = layers(conv=(8, 3, 3, 3), a=(6, 72), b=(9, 6), c=(6, 72), d=(9, 6))
WIDE = layers(stem=(16, 3, 3, 3), fc=(5, 64))


@pytest.mark.parametrize(
    ("weights", "arguments", "ambiguous"),
    [
        # Square kernels beside a transposed convolution, unless they are a single pixel.
        (DECODER, {"transposed": ["up"]}, ["square.weight"]),
        (DECODER, {"transposed": {"up": False, "square": None}}, []),
        # A dense layer after a convolution of fewer features, whatever the order of the tensors.
        (FLATTENED, {}, ["fc.weight"]),
        (alphabetical(FLATTENED), {}, ["fc.weight"]),
        (layers(head=(5, 24), conv=(4, 3, 3, 3)), {}, ["head.weight"]),
        (CHAIN, {}, ["fc.weight"]),
        (alphabetical(CHAIN), {}, []),
        # Every head on flattened images, but nothing after a head, and no head on pooled images.
        (HEADS, {}, ["a.weight", "c.weight"]),
        (POOLED, {}, []),
        (alphabetical(POOLED), {}, []),
    ],
)
def test_a_fact_that_nothing_shows_must_be_given(weights, arguments, ambiguous):
    text = (
        message(*weights, **arguments) if ambiguous else str(interop.match(*weights, **arguments))
    )
    assert re.findall(r"ambiguous: (\S+)", text) == ambiguous


NO_FLATTEN = "assumed to follow no flatten: {}, because the order of the layers is unknown; "
UNLIKELY = "flattened: 'fc' is given 32 channels, but no convolution or norm before it has "


@pytest.mark.parametrize(
    ("weights", "arguments", "note"),
    [
        (
            layers(a=(4, 4, 3, 3), b=(4, 4, 3, 3), c=(5, 4, 3, 3)),
            {},
            "assumed to be ordinary convolutions: a, b; otherwise pass transposed=['a']",
        ),
        (
            DECODER,
            {"transposed": {"up": False, "square": None}},
            "assumed to be ordinary convolutions: mix; otherwise pass transposed=['mix']",
        ),
        (
            alphabetical(CHAIN),
            {},
            NO_FLATTEN.format("fc") + "otherwise pass flattened={'fc': 16}",
        ),
        (alphabetical(CHAIN), {"flattened": {"fc": 64}}, ""),
        (POOLED, {}, ""),
        (layers(conv=(64, 3, 3, 3), small=(8, 64), head=(3, 64)), {}, ""),
        *(
            (order(WIDE), {"flattened": {"fc": channels}}, note)
            for order in (tuple, alphabetical)
            for channels, note in {
                16: "",
                64: "",
                32: f"{UNLIKELY}32 features; there are [16]",
            }.items()
        ),
    ],
)
def test_the_report_ends_with_what_is_assumed_or_unlikely(weights, arguments, note):
    match = interop.match(*weights, **arguments)
    assert "\n".join(str(match).splitlines()[len(match.pairs) :]) == note


@pytest.mark.parametrize(
    ("weights", "facts", "how"),
    [
        (DECODER, {"transposed": {"up": False, "square": None}}, "O, I, *) -> (*, I, O)"),
        (DECODER, {"transposed": {"up": False, "square": False}}, "flipped in space"),
        (DECODER, {"transposed": {"up": False, "square": True}}, "I, O, *) -> (*, O, I)"),
        (FLATTENED, {"flattened": {"fc": 4}}, "from 4 channels first to last"),
        (FLATTENED, {"flattened": {"fc": 24}}, "(O, I, *) -> (*, I, O)"),
    ],
)
def test_a_given_fact_decides_the_layout(weights, facts, how):
    pairs = interop.match(*weights, **facts).pairs
    assert next(p for p in pairs if p.module in ("square", "fc")).layout.how.endswith(how)


def test_the_error_begins_with_the_name_of_a_wrapper():
    like = {"params": {"fc": LEAVES, "head": LEAVES}}
    first, *_ = message(at("net.fc", "net.head"), like).splitlines()
    assert first == 'All names begin with "net.", which names={"net": ""} removes.'


def test_only_modules_of_the_same_leaves_and_shapes_are_proposed():
    other = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    text = message(at("a", "b"), {"params": {"c": other, "d": LEAVES}})
    assert text.endswith('names={\n    "a": "d",\n}')
    assert "unexpected: b.weight (2, 3), b.bias (2,), without a counterpart" in text
    assert "for Flax's params/c/bias (3,); c.weight, for Flax's params/c/kernel (3, 3)" in text
    assert "params/d" not in text


def test_a_module_with_more_tensors_is_not_proposed():
    text = message({**at("a"), "a.gain": np.ones(2), **at("b")}, variables("d"))
    assert text.endswith('names={\n    "b": "d",\n}')


def test_paths_may_contain_the_name_of_a_wrapper_or_not():
    like = {"params": {"head": LEAVES, "up": {"kernel": jnp.ones((3, 3, 4, 4))}}}
    state_dict = {**at("net.fc"), "net.up.weight": np.ones((4, 4, 3, 3))}
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


def test_names_of_modules_that_are_not_there_may_be_allowed():
    names = {"fc": "block/0", "aux": "block/1"}
    match = interop.match(at("fc"), BLOCK, names=names, strict=False)
    assert {pair.module for pair in match.pairs} == {"fc"}
    with pytest.raises(ValueError, match="'aux' is no module of the state_dict; strict=False"):
        interop.variables_from_torch(at("fc"), BLOCK, names=names)
    interop.variables_from_torch(at("fc"), BLOCK, names=names, strict=False)
    interop.state_dict_from_variables(BLOCK, at("fc"), names=names, strict=False)


def test_the_advice_names_the_layer_before_a_flatten():
    """Of several layers whose features divide the inputs, the nearest image before."""
    weights = layers(conv1=(8, 3, 3, 3), conv2=(4, 8, 3, 3), fc=(6, 72))
    text = message(*alphabetical(weights))
    assert "a multiple of the 4 features of 'conv2' or the 8 of 'conv1'" in text
    assert "pass flattened={'fc': 4}; if none were, pass flattened={'fc': 72}" in text
    # The features of a dense layer were never channels of images.
    chain = layers(conv=(4, 3, 3, 3), fc=(12, 5), head=(2, 24))
    assert "a multiple of the 4 features of 'conv'. If" in message(*chain)


def norms(*names):
    return {f"{name}.{leaf}": np.ones(4) for name in names for leaf in ("weight", "bias")}


def places(*names):
    leaves = {"scale": np.ones(4), "bias": np.ones(4)}
    return {"params": unflatten_dict(dict.fromkeys(sorted(names), leaves), sep="/")}


PROPOSED = {
    "10 comes after 2": ({f"l{n}": f"block_{n}" for n in range(1, 13)}),
    "three norms of a residual block": (
        {"a.bn1": "b/norm1", "a.bn2": "b/norm2", "a.downsample.1": "b/downsample_norm"}
    ),
    "the last norm, by its word": (
        {"f.0.norm": "stages_0/norm", "f.1.norm": "stages_1/norm", "classifier.0": "norm"}
    ),
    "the last norm, by its depth": (
        {"a.0.x": "stages_0/n", "a.1.x": "stages_1/n", "classifier.0": "norm"}
    ),
}


@pytest.mark.parametrize("names", PROPOSED.values(), ids=PROPOSED)
def test_names_are_proposed_by_blocks_words_and_natural_order(names):
    text = message(norms(*names), places(*names.values()))
    assert ast.literal_eval(text.rpartition("names=")[2]) == names
    assert text.count(f"# a guess: {len(names) - 1} more fit") == len(names)


def test_blocks_are_proposed_as_a_whole():
    """A norm of the blocks' shape is not one of theirs."""
    blocks = {"features.0": "stages_0", "features.1": "stages_1"}
    names = {
        f"{block}.{part}": f"{place}/{name}"
        for block, place in blocks.items()
        for part, name in (("0", "dense"), ("1", "norm"))
    }
    names["classifier.0"] = "norm"
    dense, norm = {"weight": np.ones((4, 4))}, {"weight": np.ones(4), "bias": np.ones(4)}
    state_dict = {
        f"{module}.{leaf}": x
        for module, place in names.items()
        for leaf, x in (dense if place.endswith("dense") else norm).items()
    }
    leaves = {"kernel": np.ones((4, 4))}, {"scale": np.ones(4), "bias": np.ones(4)}
    like = {place: leaves[place.endswith("norm")] for place in sorted(names.values())}
    text = message(state_dict, {"params": unflatten_dict(like, sep="/")})
    assert ast.literal_eval(text.rpartition("names=")[2]) == names


class Chain(nnx.Module):
    """Its norms are defined in another order than that of their names."""

    def __init__(self):
        for name in ("stem", "body", "head"):
            setattr(self, name, nnx.LayerNorm(4, rngs=nnx.Rngs(0)))


def test_the_order_of_definition_in_an_nnx_module_counts():
    text = message(norms("a", "b", "c"), Chain())
    expected = {"a": "stem", "b": "body", "c": "head"}
    assert ast.literal_eval(text.rpartition("names=")[2]) == expected


def test_one_candidate_is_no_guess():
    assert "guess" not in message(at("a"), variables("b"))
