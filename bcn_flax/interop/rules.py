"""What the leaves of Flax's variables are in PyTorch, by name.

A rule of one leaf's name says this for all modules. A rule of a longer path, such as `ii/kernel`,
looks into the module around: there PyTorch may have fused the leaves of several modules of Flax
into one tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from bcn_flax.interop.layouts import (
    LayerFacts,
    Layout,
    Path,
    Shape,
    embedding,
    from_heads,
    hidden_kernel,
    kernel,
    same_order,
    to_heads,
    vector,
)


class Rule(NamedTuple):
    """What a leaf of Flax's variables is in PyTorch.

    Attributes:
        names: that PyTorch's tensor may have, seen from the module that the rule's key begins in;
            with a dot if it is in a module there, as in `"out_proj.weight"`.
        layouts: function of PyTorch's shape (of the part, if it is one), Flax's shape and the facts
            about the layer, which returns the layouts that are possible.
        part: the position of the leaf among those that are fused into the tensor. Their sizes
            follow from the leaves and need not be equal. `None` if the leaf is the whole tensor;
            a part that is alone is the whole tensor too.
        axis: along which the parts lie in PyTorch's tensor.
        added: the names of a second tensor, like the first, whose values are added in Flax. From
            Flax it gets zeros.
    """

    names: tuple[str, ...]
    layouts: Callable[[Shape, Shape, LayerFacts], list[Layout]]
    part: int | None = None
    axis: int = 0
    added: tuple[str, ...] = ()


# By collection and the end of the path in Flax. A leaf that is not listed has the same name in
# PyTorch.
Rules = Mapping[tuple[str, ...], Rule]


def _fused(
    modules: Sequence[str], leaf: str, rule: Rule, *, first: int = 0
) -> dict[tuple[str, ...], Rule]:
    """The rules of leaves that are the parts of one tensor, in this order."""
    return {
        ("params", module, leaf): rule._replace(part=n) for n, module in enumerate(modules, first)
    }


_INPUT = Rule(("weight_ih",), kernel)
_HIDDEN = Rule(("weight_hh",), hidden_kernel)
# PyTorch adds two biases to each gate. Flax has only the one that is enough.
_INPUT_BIAS = Rule(("bias_ih",), vector, added=("bias_hh",))
_HIDDEN_BIAS = Rule(("bias_hh",), vector, added=("bias_ih",))

_RECURRENT: Rules = {
    # LSTMCell, OptimizedLSTMCell; NNX writes `if_`.
    **_fused(["ii", "if", "ig", "io"], "kernel", _INPUT),
    **_fused(["if_"], "kernel", _INPUT, first=1),
    **_fused(["hi", "hf", "hg", "ho"], "kernel", _HIDDEN),
    **_fused(["hi", "hf", "hg", "ho"], "bias", _HIDDEN_BIAS),
    # GRUCell. In PyTorch and Flax, the reset gate multiplies the bias of `hn`.
    **_fused(["ir", "iz", "in"], "kernel", _INPUT),
    **_fused(["hr", "hz", "hn"], "kernel", _HIDDEN),
    **_fused(["ir", "iz"], "bias", _INPUT_BIAS),
    **_fused(["in"], "bias", _INPUT_BIAS._replace(added=()), first=2),
    **_fused(["hn"], "bias", _HIDDEN_BIAS._replace(added=()), first=2),
    # SimpleCell.
    ("params", "i", "kernel"): _INPUT,
    ("params", "h", "kernel"): _HIDDEN,
    ("params", "i", "bias"): _INPUT_BIAS,
    # NNX's OptimizedLSTMCell, and its GRUCell and SimpleCell, whose shapes do not show whether
    # `bias_hh` may be added: it may not to the last gate of a GRU.
    ("params", "dense_i", "kernel"): _INPUT,
    ("params", "dense_h", "kernel"): _HIDDEN,
    ("params", "dense_h", "bias"): _HIDDEN_BIAS,
    ("params", "dense_i", "bias"): _INPUT_BIAS._replace(added=()),
}


def _attention() -> Rules:
    """MultiHeadDotProductAttention and NNX's MultiHeadAttention; `qkv` is timm's."""
    rules: dict[tuple[str, ...], Rule] = {}
    for n, module in enumerate(("query", "key", "value")):
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            own = [f"{module[0]}_proj_{name}", f"{module[0]}_proj.{name}", f"{module}.{name}"]
            names = (f"in_proj_{name}", f"qkv.{name}", *own)
            rules["params", module, leaf] = Rule(names, to_heads, part=n)
    rules["params", "out", "kernel"] = Rule(
        ("out_proj.weight", "proj.weight", "out.weight"), from_heads
    )
    rules["params", "out", "bias"] = Rule(("out_proj.bias", "proj.bias", "out.bias"), vector)
    return rules


RULES: Rules = MappingProxyType(
    {
        ("params", "kernel"): Rule(("weight",), kernel),
        ("params", "embedding"): Rule(("weight",), embedding),
        ("params", "scale"): Rule(("scale", "weight"), vector),
        ("params", "bias"): Rule(("shift", "bias"), vector),
        ("params", "negative_slope"): Rule(("weight",), vector),
        ("batch_stats", "mean"): Rule(("exp_mean", "running_mean"), vector),
        ("batch_stats", "var"): Rule(("exp_var", "running_var"), vector),
        **_RECURRENT,
        **_attention(),
    }
)


def rules_for(rules: Rules, path: Path) -> list[tuple[Rule, Path]]:
    """The rules for a leaf of Flax's variables, the more special first.

    Returns:
        Each rule with the path of the module in which PyTorch's tensor has one of its names.

    Example:
        >>> for rule, module in rules_for(RULES, ("params", "cell", "i", "bias")):
        ...     print(rule.names, module)
        ('bias_ih',) ('cell',)
        ('shift', 'bias') ('cell', 'i')
    """
    found = [
        (rules[key], path[1 : len(path) - n])
        for n in range(len(path) - 1, 0, -1)
        if (key := (path[0], *path[-n:])) in rules
    ]
    if (path[0], path[-1]) not in rules:
        found.append((Rule((path[-1],), same_order), path[1:-1]))
    return found
