"""Read and write checkpoints: `.safetensors` files, and those of `torch.save`."""

import importlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from bcn_flax.interop.layouts import array_like, dtype, to_numpy
from bcn_flax.interop.trees import is_state_dict, refuse, torch_tensors

_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
# What NumPy's reader of .safetensors files knows; its writer knows more.
_IN_SAFETENSORS = (
    *("bool", "complex64", "bfloat16", "float16", "float32", "float64"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)


def load(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Any]:
    """The `state_dict` in a file.

    Example:
        >>> state_dict = load("model.safetensors")  # doctest: +SKIP
        >>> state_dict = load("checkpoint.pth", key="model")  # doctest: +SKIP

    Args:
        path: of a `.safetensors` file, which needs the package `safetensors` but not PyTorch and
            gives NumPy's arrays; or of a `.pt`, `.pth`, `.bin`, `.ckpt` or `.pth.tar` file of
            `torch.save`, which needs PyTorch, gives tensors on the CPU, and may hold nothing but
            data: no code is run.
        key: of the `state_dict` in a checkpoint that holds more, a dictionary with entries such as
            `"model"` or `"state_dict"`; `"net.model"` is the entry `"model"` of the entry `"net"`.

    Raises:
        ValueError: the file holds no `state_dict`, or objects other than data, or cannot be read,
            or its name has another ending; the message says what was found.
        ImportError: the package that reads such files is not installed.
    """
    path = _require_path(path)
    if not isinstance(key, str | None):
        raise ValueError(f"key must be the name of a part of the checkpoint, but key={key!r}.")
    if _require_format(path) == "safetensors":
        if key is not None:
            raise ValueError(
                f"A .safetensors file has tensors and no parts: leave key={key!r} out."
            )
        # Sorted, because the file has them in an order that means nothing.
        return dict(sorted(_read(path, _import_safetensors().load_file).items()))
    unpickle = partial(_import_torch().load, map_location="cpu", weights_only=True)
    return _require_state_dict(path, _read(path, unpickle), key)


def save(path: str | os.PathLike[str], state_dict: Mapping[str, Any]) -> None:
    """Write a `state_dict` to a file that `load`, or PyTorch, reads.

    Example:
        >>> save("model.safetensors", state_dict_from_variables(variables, like))  # doctest: +SKIP

    Args:
        path: of a `.safetensors` file, which needs the package `safetensors`; or of a `.pt`,
            `.pth`, `.bin`, `.ckpt` or `.pth.tar` file, which needs PyTorch. Tied tensors are
            written once for each name.
        state_dict: tensors of PyTorch, or arrays of NumPy or JAX.

    Raises:
        ValueError: it is not a `state_dict`, the format has no place for one of its dtypes, or the
            file's name has another ending.
        ImportError: the package that writes such files is not installed.
    """
    path = _require_path(path)
    tensors = torch_tensors(state_dict)
    if _require_format(path) == "safetensors":
        _require_dtypes(path, tensors, lambda name: name in _IN_SAFETENSORS)
        arrays = {key: np.array(to_numpy(x), order="C") for key, x in tensors.items()}
        # Other readers of such files ask for this note.
        _import_safetensors().save_file(arrays, path, metadata={"format": "pt"})
    else:
        torch = _import_torch()
        arrays = {key: x for key, x in tensors.items() if not hasattr(x, "detach")}
        # PyTorch has the names of small integers, but no values.
        small = re.compile("u?int[1-7]").fullmatch
        _require_dtypes(path, arrays, lambda name: hasattr(torch, name) and not small(name))
        torch.save({key: _as_tensor(torch, x) for key, x in tensors.items()}, path)


def _require_path(path: Any) -> Path:
    """A path must be a string or an object like `Path`."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path must be the name of a file, but path={path!r}.")
    return Path(path)


def _require_dtypes(path: Path, tensors: Mapping[str, Any], known: Callable[[str], bool]) -> None:
    """The format of the file must have a place for all dtypes."""
    dtypes = {key: str(x.dtype).removeprefix("torch.") for key, x in tensors.items()}
    refuse(
        f"What is written to {path.name} must be readable again, but its format has no place for:",
        [f"{key} of {dtype}" for key, dtype in dtypes.items() if not known(dtype)],
        "Convert these first. Files of torch.save hold the usual kinds of float8.",
    )


def _require_format(path: Path) -> Literal["safetensors", "torch"]:
    """The format of a file, by its name."""
    if not path.name.endswith((".safetensors", *_TORCH)):
        raise ValueError(
            f"A file's name shows its format and must end in .safetensors or one of {_TORCH}, but "
            f"it is {path.name}."
        )
    return "safetensors" if path.suffix == ".safetensors" else "torch"


def _import_safetensors() -> ModuleType:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError(
            ".safetensors files need the package safetensors: pip install safetensors"
        ) from error


def _import_torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            f"{', '.join(_TORCH)} files need PyTorch: "
            'pip install "batch-channel-norm[torch]". Or use .safetensors files.'
        ) from error


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file holds; an error that names the file and the reason if it cannot be read."""
    try:
        return read(path)
    except pickle.UnpicklingError as error:
        seen = re.search(r"GLOBAL ([\w.]+)", str(error))
        allow = seen and (
            f" It holds {seen[1]}. If that is only data, allow it: load within `with "
            f"torch.serialization.safe_globals([{seen[1]}]):`."
        )
        raise ValueError(
            f"{path} is refused: it is no file of torch.save, or holds objects other than data, "
            f"which run code when they are read.{allow or ''} If you trust the file, read it where "
            "that does no harm, with torch.load(path, weights_only=False), and save its state_dict "
            "alone."
        ) from error
    except Exception as error:  # The readers raise errors of many types for a broken file.
        if isinstance(error, OSError) and str(path) in str(error):
            raise
        reason = f"{type(error).__name__} {error}".split(". ")[0].strip(" .")
        raise ValueError(
            f"{path} cannot be read: {reason}. It may be empty, cut short, of another format, or "
            "hold a dtype that NumPy does not have. Of TorchScript, and of the tar files of old "
            "versions of PyTorch, save the state_dict alone, with torch.save."
        ) from error


def _require_state_dict(path: Path, found: Any, key: str | None) -> dict[str, Any]:
    """The `state_dict` in what a file holds, under a key or not."""
    parts = dict(_parts(found))
    state_dict: Any = found if key is None else parts.get(key)
    if is_state_dict(state_dict):
        return dict(state_dict)
    candidates = [name for name, part in parts.items() if is_state_dict(part)]
    top = [*found] if isinstance(found, Mapping) else []
    raise ValueError(
        f"{path} holds no state_dict{'' if key is None else f' under {key!r}'}, but a "
        f"{type(found).__name__} of {top}. "
        + (
            f"Choose a part: {' or '.join(f'key={name!r}' for name in candidates)}."
            if candidates
            else "No part of it is a state_dict."
        )
    )


def _parts(found: Any, levels: int = 32) -> Iterator[tuple[str, Any]]:
    """All entries of nested mappings, by their names, joined with dots."""
    # A malformed file may be nested more deeply than Python can follow.
    is_mapping = isinstance(found, Mapping) and levels > 0
    named = {k: x for k, x in found.items() if isinstance(k, str)} if is_mapping else {}
    for key, part in named.items():
        if not is_state_dict(part):
            yield from ((f"{key}.{inner}", x) for inner, x in _parts(part, levels - 1))
        yield key, part


def _as_tensor(torch: ModuleType, x: Any) -> Any:
    if hasattr(x, "detach"):
        return x.detach()
    return array_like(torch.empty(0, dtype=getattr(torch, str(dtype(x)))), to_numpy(x))
