"""Move weights between Flax and PyTorch, in both directions, dropping nothing silently.

`match` finds which tensor is which leaf; what it returns prints as a report, and moves values.
`variables_from_torch` and `state_dict_from_variables` do both at once; the Flax side is linen's
variables or an NNX module, and `module_from_torch` makes such a module. `load` and `save` are for
files.

Names and layouts correspond by these rules:

| Flax                                     | PyTorch                                            |
|------------------------------------------|----------------------------------------------------|
| module path `layers_0/batch_norm`        | `layers.0.batch_norm`, or with `layers_0`          |
| `layers_0` of a Sequential               | `0`                                                |
| any path                                 | the path for which `names` gives it                |
| `kernel` of a dense layer, `(in, out)`   | `weight`, `(out, in)`                              |
| - after a flatten: `flattened` says so   | the same, inputs in another order                  |
| `kernel` of a convolution,               | `weight`,                                          |
| `(*window, in, out)`                     | `(out, in, *window)`, any groups                   |
| `kernel` of a transposed convolution,    | `weight`,                                          |
| `(*window, in, out)`, or                 | `(in, out, *window)`, flipped, or                  |
| `(*window, out, in)`: `transpose_kernel` | `(in, out, *window)`                               |
| `scale`                                  | `scale` (`bcn_torch`), `weight` (`torch.nn`)       |
| `bias`                                   | `shift` (norms of `bcn_torch`), `bias`             |
| `batch_stats`: `mean`, `var`             | `exp_mean`, `exp_var` or `running_mean`, `_var`    |
| `embedding`                              | `weight`                                           |
| `negative_slope`                         | `weight`                                           |
| any other, such as `gain`                | the same name; axes of length 1 may differ         |
| `batch_norm/{scale,bias,mean,var}`       | the authors' `bn.` or `pbn.` and PyTorch's names   |
| `channel_norm/{scale,bias}` beside it    | the authors' `weight`, `bias`, `(1, groups, 1)`    |
| nothing                                  | `num_batches_tracked`, `estbn_moving_speed`        |

What no name and no shape tells must be said, or is refused: which dense layers follow a flatten,
and `transpose_kernel` where a transposed convolution has as many inputs as outputs. Two things
nobody can see, and the last lines of the report say where they were presumed:

- Between a `state_dict` and linen variables, the kernel of a convolution with as many inputs as
  outputs is taken for an ordinary one's unless `transposed` names it. If there are transposed
  convolutions, it is refused until `transposed` says what it is; `None` is an ordinary one. Give
  the PyTorch module itself, or an NNX module, and it is known.
- A `.safetensors` file has lost the order of the layers. A dense layer with as many inputs as some
  layer has features is then taken to follow that one without a flatten, unless `flattened` says
  otherwise, though it may follow flattened images of another layer's fewer channels.

Equal weights are equal outputs if the layers' arguments correspond: Flax's `epsilon` is 1e-6 by
default in its own norms and 1e-5 here and in PyTorch; `momentum` is the weight of the *old* average
in Flax and of the *new* value in PyTorch. In training `torch.nn.BatchNorm` moves its running
variance towards the unbiased variance of the batch, `n / (n - 1)` of what Flax takes. PyTorch's
`padding=p, output_padding=q, dilation=d` of a transposed convolution with a window of `k` is Flax's
`padding=[(d * (k - 1) - p, d * (k - 1) - p + q)]` and, with `q = 0` and `stride <= k`, for `p = 0`
also `"VALID"`.

Kernels of `DenseGeneral` and attention, whose features have several axes, are misshapen here.
PyTorch itself is not imported, except to read and write its files: its tensors convert themselves.
"""

from typing import Any, TypeVar

from flax import nnx

from bcn_flax.interop.files import load, save
from bcn_flax.interop.layouts import Known, Layout
from bcn_flax.interop.matching import match
from bcn_flax.interop.moving import Match, Pair
from bcn_flax.interop.naming import RULES, Rule
from bcn_flax.interop.trees import Variables, module_with, variables_of

__all__ = [
    "RULES",
    "Known",
    "Layout",
    "Match",
    "Pair",
    "Rule",
    "load",
    "match",
    "module_from_torch",
    "module_with",
    "save",
    "state_dict_from_variables",
    "variables_from_torch",
    "variables_of",
]

ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def variables_from_torch(
    source: Any, like: Variables | nnx.Module, **options: Any
) -> dict[str, Any]:
    """Flax variables with the values of a PyTorch `state_dict`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.models import VGG
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> like = jax.eval_shape(lambda: VGG().init(jax.random.key(0), images, train=False))
        >>> variables = variables_from_torch(torch_model, like)  # doctest: +SKIP

    Args:
        source: a `state_dict`, of PyTorch's tensors or NumPy's or JAX's arrays, or a PyTorch
            module.
        like: the linen variables to fill, arrays or shapes, or an NNX module; the result has their
            structure, shapes and dtypes.
        **options: `names`, `transposed`, `flattened`, `rules`: see `match`.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or ambiguous; the message lists all
            of them.
    """
    return match(source, like, **options).to_flax(source)


def module_from_torch(source: Any, like: ModuleT, **options: Any) -> ModuleT:
    """An NNX module with the values of a PyTorch `state_dict`.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> state_dict = {"weight": np.ones((2, 3)), "bias": np.zeros(2)}
        >>> module_from_torch(state_dict, layer)(np.ones((1, 3)))
        Array([[3., 3.]], dtype=float32)

    Args:
        source: a `state_dict`, of PyTorch's tensors or NumPy's or JAX's arrays, or a PyTorch
            module.
        like: is copied, not changed; may be abstract, from `nnx.eval_shape`. Its variables other
            than parameters and statistics, such as random number generators, are copied too.
        **options: `names`, `transposed`, `flattened`, `rules`: see `match`.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or ambiguous; the message lists all
            of them.
    """
    if not isinstance(like, nnx.Module):
        raise ValueError(
            f"`like` must be an NNX module, but it is of type {type(like).__name__}. For linen's "
            "variables there is variables_from_torch."
        )
    return module_with(like, variables_from_torch(source, like, **options))


def state_dict_from_variables(
    variables: Variables | nnx.Module, like: Any, **options: Any
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
            Tensors that Flax does without, as `num_batches_tracked`, are kept from here.
        **options: `names`, `transposed`, `flattened`, `rules`: see `match`.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or ambiguous; the message lists all
            of them.
    """
    return match(like, variables, **options).to_torch(variables)
