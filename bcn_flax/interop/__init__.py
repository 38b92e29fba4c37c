"""Convert weights between Flax and PyTorch, in both directions; nothing is dropped silently.

`match` finds which tensor is which leaf. The `Match` that it returns converts values in both
directions and prints as a report. `variables_from_torch` and `state_dict_from_variables` match and
convert in one call. Flax's side is linen's variables or an NNX module, and `module_from_torch`
returns such a module. `load` and `save` read and write files.

Names and layouts correspond by these rules:

| Flax                                            | PyTorch                                      |
|-------------------------------------------------|----------------------------------------------|
| module path `layers_0/batch_norm`               | `layers.0.batch_norm`, or with `layers_0`    |
| `layers_0` of a Sequential                      | `0`                                          |
| any path                                        | the path for which `names` gives it          |
| `kernel` of a dense layer, `(in, out)`          | `weight`, `(out, in)`                        |
| the same after a flatten: pass `flattened`      | the same, inputs in another order            |
| `kernel` of a convolution, `(*window, in, out)` | `weight`, `(out, in, *window)`, any groups   |
| of a transposed one, `(*window, in, out)`       | `weight`, `(in, out, *window)`, flipped      |
| with `transpose_kernel`, `(*window, out, in)`   | `weight`, `(in, out, *window)`               |
| `scale`                                         | `scale` (`bcn_torch`), `weight` (`torch.nn`) |
| `bias`                                          | `shift` (norms of `bcn_torch`), `bias`       |
| `mean` in `batch_stats`                         | `exp_mean` or `running_mean`                 |
| `var` in `batch_stats`                          | `exp_var` or `running_var`                   |
| `embedding`                                     | `weight`                                     |
| `negative_slope`                                | `weight`                                     |
| any other, such as `gain`                       | the same name; axes of length 1 may differ   |
| `batch_norm/{scale,bias,mean,var}`              | authors' `bn.` or `pbn.` and PyTorch's names |
| `channel_norm/{scale,bias}` beside it           | authors' `weight`, `bias`, `(1, groups, 1)`  |
| nothing                                         | `num_batches_tracked`, `estbn_moving_speed`  |
| a layer of an LSTM or a GRU                     | `lstm.l0`, as if it were a module            |
| its `ii/kernel`, or of a simple cell            | part of `weight_ih`: `weight_ih_l0[0:4]`     |
| its `hn/kernel`                                 | part of `weight_hh`                          |
| its bias                                        | part of `bias_ih` and of `bias_hh`, added    |
| attention: `query/kernel`, `(in, heads, size)`  | `q_proj.weight` or `query.weight`            |
| the same, or that of `key` or `value`           | part of `in_proj_weight` or `qkv.weight`     |
| its `out/kernel`, `(heads, size, out)`          | `out_proj.weight` or `proj.weight`           |

Some facts are shown neither by names nor by shapes: which dense layers follow a flatten, and the
`transpose_kernel` of a transposed convolution with as many inputs as outputs. They must be given,
or the match is an error. In two cases an assumption is made, and the last lines of the report list
it:

- Between a `state_dict` and linen variables, a kernel with as many inputs as outputs is assumed to
  be that of an ordinary convolution unless `transposed` names it. If the model has transposed
  convolutions, it is an error until `transposed` gives its kind; `None` is an ordinary convolution.
  The PyTorch module itself, or an NNX module, declares the kind.
- A `.safetensors` file has lost the order of the layers. A dense layer with as many inputs as some
  layer has features is then assumed to follow that layer without a flatten, unless `flattened` says
  otherwise, although it may follow flattened images with the fewer channels of another layer.

Equal weights give equal outputs if the arguments of the layers correspond. Flax's own norms have an
`epsilon` of 1e-6 by default; here and in PyTorch it is 1e-5. `momentum` is the weight of the *old*
average in Flax and of the *new* value in PyTorch. In training, the running variance of
`torch.nn.BatchNorm` moves towards the unbiased variance of the batch, `n / (n - 1)` times the one
of Flax. A transposed convolution of PyTorch with a window of `k` and
`padding=p, output_padding=q, dilation=d` has in Flax the
`padding=[(d * (k - 1) - p, d * (k - 1) - p + q)]`; with `p = q = 0` and `stride <= k`, that is also
`"VALID"`.

PyTorch's LSTM and GRU add two biases where Flax has one. Their sum is converted, and returns as the
first one, the other being zero. In training, PyTorch's two move twice as fast as Flax's one, so
that `bcn_flax.parity` finds a difference unless one of them is not trained. `GRUCell` of NNX has no
bias for the last gate of the hidden state: leave `bias_hh`, of zeros, out of the `state_dict`.

For other names and layouts pass `rules` of your own. A parameter `w` that is the `weight` of
PyTorch, with the layouts of a kernel, is

    rules = {**RULES, ("params", "w"): Rule(("weight",), kernel)}

A key may have more of the path, and then names are seen from the module around. With `part`, a leaf
is only a part of the tensor. In GPT-2, one `Conv1D`, whose weight is `(in, out)`, makes queries,
keys and values, side by side along axis 1:

    >>> import numpy as np
    >>> parts = enumerate(["query", "key", "value"])
    >>> rules = {
    ...     **RULES,
    ...     **{
    ...         ("params", name, "kernel"): Rule(("c_attn.weight",), untransposed, part=n, axis=1)
    ...         for n, name in parts
    ...     },
    ... }
    >>> like = {name: {"kernel": np.ones((8, 2, 4))} for name in ("query", "key", "value")}
    >>> found = match({"c_attn.weight": np.ones((8, 24))}, {"params": like}, rules=rules)
    >>> print(found)
    c_attn.weight[:, 0:8]    (8, 8)  ->  params/query/kernel  (8, 2, 4)  reshaped
    c_attn.weight[:, 8:16]   (8, 8)  ->  params/key/kernel    (8, 2, 4)  reshaped
    c_attn.weight[:, 16:24]  (8, 8)  ->  params/value/kernel  (8, 2, 4)  reshaped

`bcn_flax.parity` shows a function with layouts of its own.

PyTorch is imported only to read and write its files: its tensors convert themselves.
"""

from typing import Any, TypeVar

from flax import nnx

from bcn_flax.interop.files import load, save
from bcn_flax.interop.layers import Flattened, Transposed
from bcn_flax.interop.layouts import (
    LayerFacts,
    Layout,
    embedding,
    from_heads,
    kernel,
    same_order,
    to_heads,
    untransposed,
    vector,
)
from bcn_flax.interop.matching import Match, match
from bcn_flax.interop.naming import Names
from bcn_flax.interop.pairs import Pair
from bcn_flax.interop.rules import RULES, Rule, Rules
from bcn_flax.interop.trees import Variables, module_with, require_nnx_module, variables_of

__all__ = [
    "RULES",
    "Flattened",
    "LayerFacts",
    "Layout",
    "Match",
    "Names",
    "Pair",
    "Rule",
    "Rules",
    "Transposed",
    "embedding",
    "from_heads",
    "kernel",
    "load",
    "match",
    "module_from_torch",
    "module_with",
    "same_order",
    "save",
    "state_dict_from_variables",
    "to_heads",
    "untransposed",
    "variables_from_torch",
    "variables_of",
    "vector",
]

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def variables_from_torch(
    source: Any,
    like: Variables | nnx.Module,
    *,
    names: Names | None = None,
    transposed: Transposed = (),
    flattened: Flattened | None = None,
    rules: Rules = RULES,
    strict: bool = True,
) -> dict[str, Any]:
    """Flax variables with the values of a PyTorch `state_dict`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.models import VGG
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> like = jax.eval_shape(lambda: VGG().init(jax.random.key(0), images, train=False))
        >>> variables = variables_from_torch(torch_model, like)  # doctest: +SKIP

    Args:
        source: a `state_dict` of PyTorch's tensors or NumPy's or JAX's arrays, or a PyTorch module.
        like: the linen variables to fill, arrays or shapes, or an NNX module; the result has their
            structure, shapes and dtypes.
        names: where in Flax a PyTorch module is; for this and the others see `match`.
        transposed: which convolutions are transposed.
        flattened: how many channels were flattened before a dense layer.
        rules: which leaf has which names and layouts.
        strict: whether `names` must hold no entries for modules that are not there.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or ambiguous; the message lists all
            of them.
    """
    return match(source, like, names, transposed, flattened, rules, strict).to_flax(source)


def module_from_torch(
    source: Any,
    like: ModuleT,
    *,
    names: Names | None = None,
    transposed: Transposed = (),
    flattened: Flattened | None = None,
    rules: Rules = RULES,
    strict: bool = True,
) -> ModuleT:
    """An NNX module with the values of a PyTorch `state_dict`.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> state_dict = {"weight": np.ones((2, 3)), "bias": np.zeros(2)}
        >>> module_from_torch(state_dict, layer)(np.ones((1, 3)))
        Array([[3., 3.]], dtype=float32)

    Args:
        source: a `state_dict` of PyTorch's tensors or NumPy's or JAX's arrays, or a PyTorch module.
        like: is copied, not changed; may be abstract, from `nnx.eval_shape`. Its variables other
            than parameters and statistics, such as random number generators, are copied too.
        names: where in Flax a PyTorch module is; for this and the others see `match`.
        transposed: which convolutions are transposed.
        flattened: how many channels were flattened before a dense layer.
        rules: which leaf has which names and layouts.
        strict: whether `names` must hold no entries for modules that are not there.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or ambiguous; the message lists all
            of them.
    """
    require_nnx_module("like", like, "For linen's variables there is variables_from_torch.")
    found = match(source, like, names, transposed, flattened, rules, strict)
    return module_with(like, found.to_flax(source))


def state_dict_from_variables(
    variables: Variables | nnx.Module,
    like: Any,
    *,
    names: Names | None = None,
    transposed: Transposed = (),
    flattened: Flattened | None = None,
    rules: Rules = RULES,
    strict: bool = True,
) -> dict[str, Any]:
    """A PyTorch `state_dict` with the values of Flax variables.

    Example:
        >>> torch_model.load_state_dict(
        ...     state_dict_from_variables(variables, torch_model)
        ... )  # doctest: +SKIP

    Args:
        variables: of linen, or an NNX module.
        like: the `state_dict` to imitate, of PyTorch's tensors or NumPy's or JAX's arrays, or the
            PyTorch module; the result has its keys, shapes, dtypes, devices and kind of array.
            Tensors that Flax does without, such as `num_batches_tracked`, are copied from here.
        names: where in Flax a PyTorch module is; for this and the others see `match`.
        transposed: which convolutions are transposed.
        flattened: how many channels were flattened before a dense layer.
        rules: which leaf has which names and layouts.
        strict: whether `names` must hold no entries for modules that are not there.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or ambiguous; the message lists all
            of them.
    """
    return match(like, variables, names, transposed, flattened, rules, strict).to_torch(variables)
