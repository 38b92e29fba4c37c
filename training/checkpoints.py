"""Checkpoints of a run: written whole or not at all, and read only if every byte is as written.

Orbax writes and reads the arrays. Beside them, `record.json` holds the step, the score, the
metadata and the type of each array, and `SHA256SUMS` the SHA-256 of every file, as `sha256sum`
writes and checks them: Orbax leaves some bytes unchecked, and fails in many ways at others.

In the folder, `save_0`, `save_1`, ... count the saves, so that a step can be saved twice; `damaged`
holds damaged checkpoints; `saving` and `deleted` hold those being written and deleted.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from filelock import BaseFileLock, FileLock, Timeout
from jaxtyping import Array

from training import TrainingError
from training.devices import all_agree, on_first

T = TypeVar("T")

_PREFIX = "save_"
_RECORD, _SUMS = "record.json", "SHA256SUMS"
_KEPT = 2  # and the best
_SHOWN = 3  # differences
_BLOCK = bytes(2**18)


class Checkpoint(NamedTuple):
    """What was saved after a step."""

    step: int
    state: Any
    metadata: dict[str, Any]


class _Record(NamedTuple):
    """The description of a checkpoint, in its folder."""

    step: int
    score: float | None
    metadata: dict[str, Any]
    types: dict[str, str]  # by the paths of the arrays


class _DamagedError(Exception):
    """A file is not as it was saved."""


class Checkpoints:
    """The checkpoints in a folder: the newest two, and the one with the highest score.

    Whenever a process is killed, the checkpoints saved before stay whole. With several processes
    (`jax.distributed`), all must make the same calls, and share the folder.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the folder, and remove what a killed run left behind.

        Raises:
            TrainingError: another run uses the folder, or it cannot be written to.
        """
        self._folder = folder.absolute()
        _require_plain_path(self._folder)
        self._records: dict[int, _Record] = {}
        with self._writing():
            self._lock = on_first(partial(_lock, self._folder))
        self._checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        try:
            numbers = _numbers(self._folder)
            damaged = _numbers(self._folder / "damaged")
            self._next = 1 + max(numbers + damaged, default=-1)
            on_first(partial(_delete, self._folder / "saving", self._folder / "deleted"))
            self._read_records(sorted(numbers, reverse=True))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        """Start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the folder."""
        self._close()

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Save a state; it is on disk when this returns.

        Args:
            step: number of steps that led to the state.
            state: a pytree of JAX arrays, typed PRNG keys and NumPy arrays; each process holds all
                of the values.
            metadata: of types that JSON has.
            score: the best checkpoint has the highest; with None or NaN, it is never the best.

        Raises:
            TrainingError: it cannot be written; earlier checkpoints are kept.
        """
        score = None if score is None or math.isnan(score) else float(score)
        arrays = {path: _to_host(leaf) for path, leaf in _leaves(state).items()}
        record = _Record(step, score, json.loads(json.dumps(metadata)), _types(state))
        number, self._next = self._next, self._next + 1
        with self._writing():
            self._write(number, arrays, record)
            self._records[number] = record
            self._delete_old()

    def latest(self, like: Any) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None if nothing was saved.

        A damaged one is moved to `damaged`, and reported in a line on stderr.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings, with the same tree,
                dtypes and shapes; arrays are put on its devices.

        Raises:
            TrainingError: all are damaged, or the state is not like `like`.
        """
        return self._first_undamaged(sorted(self._records, reverse=True), like)

    def best(self, like: Any) -> Checkpoint | None:
        """The undamaged checkpoint with the highest score, of equal ones the last; see `latest`.

        None also if no undamaged checkpoint has a score.

        Args:
            like: a state, or its `jax.ShapeDtypeStruct`s with shardings, with the same tree,
                dtypes and shapes; arrays are put on its devices.

        Raises:
            TrainingError: all are damaged, or the state is not like `like`.
        """
        return self._first_undamaged(_best_first(self._records), like)

    def kept(self) -> str:
        """A sentence on the newest checkpoint and where it is, for errors; empty without one."""
        for number in sorted(self._records, reverse=True):
            with suppress(OSError, _DamagedError):
                _require_undamaged(self._path(number))
                return f" The last good checkpoint is kept: {self._describe(number)}."
        return ""

    def _write(self, number: int, arrays: Mapping[str, np.ndarray], record: _Record) -> None:
        saving = self._folder / "saving"
        on_first(partial(_make_room, saving, sum(array.nbytes for array in arrays.values())))
        # Orbax takes no empty arrays; their types say everything.
        filled = {path: array for path, array in arrays.items() if array.size}
        # If it fails, threads that are still writing report to a loop that is closed, even later.
        hook, sys.unraisablehook = sys.unraisablehook, _report_unless_loop_is_closed
        self._checkpointer.save(saving / "state", args=ocp.args.StandardSave(filled))
        sys.unraisablehook = hook
        on_first(partial(_commit, saving, self._path(number), record))

    def _delete_old(self) -> None:
        kept = {*sorted(self._records)[-_KEPT:], *_best_first(self._records)[:1]}
        for number in self._records.keys() - kept:
            # Files are deleted one by one: a half deleted checkpoint would look damaged.
            on_first(partial(_move, self._path(number), self._folder / "deleted"))
            del self._records[number]
        on_first(partial(_delete, self._folder / "deleted"))

    def _read_arrays(self, number: int, like: Any) -> dict[str, np.ndarray]:
        folder = self._path(number)
        _require_undamaged(folder)
        filled = self._checkpointer.restore(folder / "state")
        leaves = _leaves(like).items()
        return {path: filled[path] if leaf.size else _empty(leaf) for path, leaf in leaves}

    def _read_records(self, numbers: Sequence[int]) -> None:
        for i, number in enumerate(numbers):
            record, damage = _attempt(partial(_read_record, self._path(number)))
            if record is not None:
                self._records[number] = record
            else:
                self._move_to_damaged(number, damage, [*self._records, *numbers[i + 1 :]])

    def _first_undamaged(self, numbers: Sequence[int], like: Any) -> Checkpoint | None:
        for i, number in enumerate(numbers):
            record = self._records[number]
            _require_same_types(self._describe(number), record.types, _types(like))
            arrays, damage = _attempt(partial(self._read_arrays, number, like))
            if arrays is not None:
                return Checkpoint(record.step, _to_devices(arrays, like), record.metadata)
            self._move_to_damaged(number, damage, numbers[i + 1 :])
        if not self._records:
            _refuse_if_all_damaged(self._folder)
        return None

    def _move_to_damaged(self, number: int, damage: str, others: Sequence[int]) -> None:
        what, where = self._describe(number), self._folder / "damaged"
        with self._writing():
            on_first(partial(_move, self._path(number), where))
        self._records.pop(number, None)
        instead = f"using {self._describe(others[0])} instead" if others else "there is no other"
        if jax.process_index() == 0:
            report = f"damaged checkpoint {what}: {damage}; moved to {where}; {instead}"
            print(report, file=sys.stderr, flush=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        orbax = logging.getLogger("absl")  # reports with tracebacks what it raises too
        level = orbax.level
        try:
            orbax.setLevel(logging.CRITICAL + 1)
            yield
        except TrainingError:
            raise
        except Exception as error:  # Orbax documents none, and raises many types
            raise TrainingError(
                f"Cannot write checkpoints to {self._folder}: {_brief(error)}.{self.kept()} Check "
                "the free space and the permissions of the folder, then start again."
            ) from error
        finally:
            orbax.setLevel(level)

    def _close(self) -> None:
        self._checkpointer.close()
        if self._lock is not None:
            self._lock.release()

    def _path(self, number: int) -> Path:
        return self._folder / f"{_PREFIX}{number}"

    def _describe(self, number: int) -> str:
        step = f" (step {self._records[number].step})" if number in self._records else ""
        return f"{self._path(number)}{step}"


def _best_first(records: Mapping[int, _Record]) -> list[int]:
    scores = [(r.score, number) for number, r in records.items() if r.score is not None]
    return [number for _, number in sorted(scores, reverse=True)]


# Files


def _require_plain_path(folder: Path) -> None:
    """TensorStore would write to another folder, as it takes a backslash for a slash."""
    path = str(folder)
    if (os.sep == "/" and "\\" in path) or path != path.encode(errors="replace").decode():
        raise TrainingError(
            "The path of checkpoints must be Unicode without backslashes, but is "
            f"{path!a}. Choose another folder."
        )


def _lock(folder: Path) -> BaseFileLock:
    """Make a folder, and keep other runs out of it.

    The operating system keeps the lock, so it goes with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise TrainingError(
            f"Only one run at a time may use {folder}, but another one is using it. Wait until it "
            "ends, stop it, or choose another folder."
        ) from error
    return lock


def _numbers(folder: Path) -> list[int]:
    numbers = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")]
    return [int(number) for number in numbers if number.isdecimal()]


def _delete(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _make_room(folder: Path, size: int) -> None:
    """Make a folder and see that `size` bytes fit into it: Orbax would fail with many messages."""
    _delete(folder)
    folder.mkdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(0, size + len(_BLOCK), len(_BLOCK)):  # at least one more, for metadata
            file.write(_BLOCK)


def _move(path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)


def _commit(saving: Path, path: Path, record: _Record) -> None:
    """Complete a checkpoint, and rename it, which cannot be interrupted halfway."""
    (saving / _RECORD).write_text(json.dumps(record._asdict(), indent=2))
    sums = sorted(_sums(saving), key=lambda line: line.partition("  ")[2])
    (saving / _SUMS).write_text("\n".join(sums))
    saving.rename(path)


def _sum(folder: Path, path: Path) -> str:
    """A line with the SHA-256 and the name of a file."""
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}"


def _sums(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != _SUMS)
    return {_sum(folder, path) for path in files}


def _saved_sums(folder: Path) -> set[str]:
    return set((folder / _SUMS).read_bytes().decode().split("\n"))


def _read_record(folder: Path) -> _Record:
    record = folder / _RECORD
    if _sum(folder, record) not in _saved_sums(folder):
        raise _DamagedError(f"{_RECORD} is not as it was saved")
    return _Record(**json.loads(record.read_text()))


def _require_undamaged(folder: Path) -> None:
    if different := _sums(folder) ^ _saved_sums(folder):
        _, _, name = min(different).partition("  ")
        raise _DamagedError(f"{name or _SUMS} is not as it was saved")


# Arrays


def _leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}


def _types(tree: Any) -> dict[str, str]:
    """For example float32[3,4]."""
    leaves = _leaves(tree).items()
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _empty(leaf: Any) -> np.ndarray:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return np.empty(data.shape, data.dtype)


def _to_devices(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    leaves = [_to_device(arrays[path], leaf) for path, leaf in _leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _to_device(array: np.ndarray, like: Any) -> Any:
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array
    placed: Array
    if isinstance(like, jax.ShapeDtypeStruct) or like.committed:
        # Unlike `device_put`, it also fills arrays on the devices of several processes.
        placed = jax.make_array_from_callback(array.shape, like.sharding, array.__getitem__)
    else:
        placed = jnp.array(array)
    if _is_key(like):
        return jax.random.wrap_key_data(placed, impl=_key_impl(like))
    return placed


def _key_impl(like: Any) -> Any:
    found: list[Any] = []  # `key_impl` takes abstract keys only while JAX traces
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


# Failures


def _attempt(read: Callable[[], T]) -> tuple[T | None, str]:
    """What was read, or None and the reason; in all processes, if it fails in any."""
    result, damage = None, "another process cannot read it"
    try:
        result = read()
    except Exception as error:  # Orbax documents none, and raises many types
        damage = _brief(error)
    return (result if all_agree(result is not None) else None), damage


def _report_unless_loop_is_closed(report: "sys.UnraisableHookArgs") -> None:
    if str(report.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(report)


def _brief(error: Exception) -> str:
    text = str(error).strip()
    if number := re.search(r"os_error_code='(\d+)'", text):  # in a page of TensorStore's
        return os.strerror(int(number[1]))
    first = text.partition(" [tensorstore_spec")[0].partition("\n")[0]
    return first.rstrip(".") or type(error).__name__


def _require_same_types(
    checkpoint: str, saved: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    differences = [
        f"  {path}: {saved.get(path, 'nothing')} saved, {expected.get(path, 'nothing')} expected"
        for path in sorted(saved.keys() | expected.keys())
        if saved.get(path) != expected.get(path)
    ]
    if differences:
        more = len(differences) - _SHOWN
        shown = "\n".join(differences[:_SHOWN]) + (f"\n  and {more} more" if more > 0 else "")
        raise TrainingError(
            f"A checkpoint must hold the arrays of the run, but in {checkpoint} these differ:\n"
            f"{shown}\nUse the settings that it was saved with, or choose another folder."
        )


def _refuse_if_all_damaged(folder: Path) -> None:
    """A run whose checkpoints are lost does not silently start again."""
    where = folder / "damaged"
    if damaged := sorted(path.name for path in where.glob("*")):
        raise TrainingError(
            f"All checkpoints in {folder} are damaged: {', '.join(damaged)}. They are kept in "
            f"{where}. Move that folder away to start again, or choose another one."
        )
