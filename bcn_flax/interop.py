"""Move weights between Flax and PyTorch, in both directions, dropping nothing silently.

PyTorch's names and layouts follow from Flax's by rule:

| Flax                              | PyTorch                                         |
|-----------------------------------|-------------------------------------------------|
| module path `layers_0/batch_norm` | `layers.0.batch_norm`, or as it is              |
| `kernel`, `(*window, in, out)`    | `weight`, `(out, in, *window)`                  |
| `scale`                           | `scale` (`bcn_torch`), `weight` (`torch.nn`)    |
| `bias`                            | `shift` (norms of `bcn_torch`), `bias`          |
| `batch_stats`: `mean`, `var`      | `exp_mean`, `exp_var`                           |

Names do not tell a transposed convolution from another, nor a dense layer that follows a flatten of
several pixels: neither converts rightly by these rules. PyTorch itself is not imported: its tensors
convert themselves.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

_TORCH_NAMES = {
    ("params", "kernel"): ("weight",),
    ("params", "scale"): ("scale", "weight"),
    ("params", "bias"): ("shift", "bias"),
    ("batch_stats", "mean"): ("exp_mean",),
    ("batch_stats", "var"): ("exp_var",),
}

Path = tuple[str, ...]


def variables_from_torch(state_dict: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Flax variables with the values of a PyTorch `state_dict`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bcn_flax.models import VGG
        >>> images = jnp.ones((1, 32, 32, 3))
        >>> like = jax.eval_shape(lambda: VGG().init(jax.random.key(0), images, train=False))
        >>> variables = variables_from_torch(torch_model.state_dict(), like)  # doctest: +SKIP

    Args:
        state_dict: of `bcn_torch`'s layers and networks, or of modules made of them and of
            `torch.nn`'s `Conv`, `Linear` and `GroupNorm`.
        like: the Flax variables to fill, arrays or shapes; the result has their structure, shapes
            and dtypes.

    Raises:
        ValueError: a key is missing, unexpected or misshapen; the message lists all of them.
    """
    leaves = flatten_dict(meta.unbox(like))
    keys = _match(leaves, state_dict)
    return unflatten_dict(
        {
            path: jnp.asarray(_flax_layout(path, _to_numpy(state_dict[key])), leaves[path].dtype)
            for path, key in keys.items()
        }
    )


def state_dict_from_variables(
    variables: Mapping[str, Any], like: Mapping[str, Any]
) -> dict[str, Any]:
    """A PyTorch `state_dict` with the values of Flax variables.

    Example:
        >>> torch_model.load_state_dict(
        ...     state_dict_from_variables(variables, torch_model.state_dict())
        ... )  # doctest: +SKIP

    Args:
        variables: of the layers and networks of `bcn_flax`, or of modules made of them and of
            Flax's `Conv`, `Dense` and `GroupNorm`.
        like: the `state_dict` to imitate; the result has its keys, shapes, dtypes and devices.

    Raises:
        ValueError: a key is missing, unexpected or misshapen; the message lists all of them.
    """
    leaves = flatten_dict(meta.unbox(variables))
    keys = _match(leaves, like)
    return {
        key: like[key].new_tensor(_torch_layout(path, np.asarray(leaves[path], np.float64)))
        for path, key in keys.items()
    }


def _match(leaves: Mapping[Path, Any], state_dict: Mapping[str, Any]) -> dict[Path, str]:
    """The PyTorch key of each Flax leaf, or a complaint about all that do not match."""
    keys: dict[Path, str] = {}
    problems = []
    for path, leaf in leaves.items():
        names = _torch_keys(path)
        key = next((name for name in names if name in state_dict), None)
        if key is None:
            expected = " or ".join(names) or "any key"
            problems.append(f"missing: {expected}, for Flax's {'/'.join(path)}")
            continue
        keys[path] = key
        found, wanted = tuple(state_dict[key].shape), _torch_shape(path, leaf.shape)
        if found != wanted:
            problems.append(
                f"misshapen: {key} is {found}, but Flax's {'/'.join(path)} of shape "
                f"{tuple(leaf.shape)} needs {wanted}"
            )
    unexpected = sorted(set(state_dict) - set(keys.values()))
    problems += [f"unexpected: {key}, which has no counterpart in Flax" for key in unexpected]
    if problems:
        raise ValueError(
            "The state_dict and the Flax variables must match, tensor by tensor, but:\n  "
            + "\n  ".join(problems)
            + "\nBuild both models with the same configuration, or rename the keys."
        )
    return keys


def _torch_keys(path: Path) -> list[str]:
    """The names that PyTorch may have for a Flax leaf."""
    collection, *modules, leaf = path
    numbered = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    names = _TORCH_NAMES.get((collection, leaf), ())
    prefixes = [numbered] if numbered == modules else [numbered, modules]
    return [".".join([*prefix, name]) for prefix in prefixes for name in names]


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _torch_layout(path, np.broadcast_to(0.0, shape)).shape


def _torch_layout(path: Path, value: np.ndarray) -> np.ndarray:
    """A kernel's last two axes, in and out, come first and exchanged."""
    return np.moveaxis(value, (-1, -2), (0, 1)) if path[-1] == "kernel" else value


def _flax_layout(path: Path, value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, (0, 1), (-1, -2)) if path[-1] == "kernel" else value


def _to_numpy(tensor: Any) -> np.ndarray:
    # NumPy has no bfloat16; float64 holds every narrower type exactly.
    return tensor.detach().cpu().double().numpy()
