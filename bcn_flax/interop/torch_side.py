"""What PyTorch's side may be: a `state_dict`, or a module, known by its methods alone."""

from collections.abc import Mapping
from typing import Any

from bcn_flax.interop import arrays
from bcn_flax.interop.complaints import refuse
from bcn_flax.interop.layouts import Known

Tensors = Mapping[str, Any]

_FROM_FLAX = "Of Flax's variables or NNX modules, state_dict_from_variables makes a state_dict."


def tensors(source: Any) -> Tensors:
    """The `state_dict`.

    Raises:
        ValueError: it is none; the message says what was found.
    """
    found = source.state_dict() if _is_module(source) else source
    if not isinstance(found, Mapping):
        raise ValueError(
            "PyTorch's side must be a state_dict, a mapping from names to tensors, or a module, "
            f"but it is of type {type(found).__name__}. {_FROM_FLAX}"
        )
    refuse(
        "A state_dict must map names to tensors, but:",
        [f"{key!r} holds {_what(x)}" for key, x in found.items() if not arrays.is_array(x)],
        f"Of a checkpoint, give the part that holds the tensors. {_FROM_FLAX}",
    )
    return found


def convolutions(source: Any) -> dict[str, Known]:
    """Of each convolution in a module, by its name, whether it is transposed."""
    if not _is_module(source):
        return {}
    flags = {name: getattr(m, "transposed", None) for name, m in source.named_modules()}
    return {name: Known(flag) for name, flag in flags.items() if isinstance(flag, bool)}


def _is_module(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "named_modules")


def _what(x: Any) -> str:
    kind = f"a {type(x).__name__}"
    return f"{kind} of {len(x)} tensors" if is_state_dict(x) else kind


def is_state_dict(x: Any) -> bool:
    """Whether `x` maps names to tensors."""
    return isinstance(x, Mapping) and len(x) > 0 and all(map(arrays.is_array, x.values()))
