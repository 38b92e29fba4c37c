"""Checkpoints of a run: written whole or not at all, and trusted only after a look at every byte.

Orbax writes and reads the arrays. Beside them lies a record of what was saved: the step, the score,
the metadata, each array's path and type and the SHA-256 of its values, the SHA-256 of each file,
and one of all this. Orbax itself leaves some bytes unchecked, and fails untidily at others.

In the folder, `save_0`, `save_1`, ... count the saves, so that a step can be saved twice; `damaged`
holds what was found damaged; `saving` and `deleted` are on their way in and out.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array

from training.checks import TrainingError
from training.locking import all_agree, lock, on_first

T = TypeVar("T")

_PREFIX = "save_"
_KEPT = 2  # and the best
_SHOWN = 3  # differences
_BLOCK = bytes(2**18)


class Checkpoint(NamedTuple):
    """What was saved after some step."""

    step: int
    state: Any
    metadata: dict[str, Any]


class _Record(NamedTuple):
    """What a checkpoint says of itself. Types and values go by the paths of the arrays."""

    step: int
    score: float | None
    metadata: dict[str, Any]
    types: dict[str, str]
    values: dict[str, str]  # digests
    files: dict[str, str]  # digests


class _DamagedError(Exception):
    """What was read is not what was saved."""


class Checkpoints:
    """The checkpoints in a folder: the newest two, and the one of the highest score.

    A process that dies, at whatever moment, leaves what was saved before whole. Where there are
    several processes (`jax.distributed`), all of them must make the same calls, and share the
    folder.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder, or make it, and clear away what a run that was killed left behind.

        Raises:
            TrainingError: another run uses the folder, or it cannot be written to.
        """
        self._folder = folder.absolute()
        self._records: dict[int, _Record] = {}
        with _writing(self._folder, None):
            self._lock = lock(self._folder)
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
        """Nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let others use the folder."""
        self._close()

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Save a state; when this returns, it is on disk.

        Args:
            step: after which the state is this one.
            state: a pytree of JAX arrays, typed PRNG keys and NumPy arrays; over several processes,
                each holds all of the values.
            metadata: of JSON's types.
            score: the best checkpoint has the highest; one of None or NaN is never the best.

        Raises:
            TrainingError: it cannot be written; what was saved before is kept.
        """
        score = None if score is None or math.isnan(score) else float(score)
        arrays = {path: _to_host(leaf) for path, leaf in _leaves(state).items()}
        values = {path: _digest(array) for path, array in arrays.items()}
        record = _Record(step, score, json.loads(json.dumps(metadata)), _types(state), values, {})
        number, self._next = self._next, self._next + 1
        last = self._describe(max(self._records)) if self._records else None
        with _writing(self._folder, last):
            self._write(number, arrays, record)
            self._records[number] = _read_record(self._path(number))
            self._delete_old()

    def latest(self, like: Any) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None where nothing was saved.

        One that is damaged is moved aside, and a line on stderr tells of it.

        Args:
            like: a state of the same tree, dtypes and shapes; the arrays are laid where its are.

        Raises:
            TrainingError: all are damaged, or hold a state that is not like `like`.
        """
        return self._first_whole(sorted(self._records, reverse=True), like)

    def best(self, like: Any) -> Checkpoint | None:
        """The checkpoint of the highest score that is whole, of equal ones the last.

        As `latest` otherwise; None also where nothing that is whole has a score.

        Args:
            like: a state of the same tree, dtypes and shapes; the arrays are laid where its are.

        Raises:
            TrainingError: all are damaged, or hold a state that is not like `like`.
        """
        return self._first_whole(_best_first(self._records), like)

    def _write(self, number: int, arrays: Mapping[str, np.ndarray], record: _Record) -> None:
        saving = self._folder / "saving"
        on_first(partial(_make_room, saving, sum(array.nbytes for array in arrays.values())))
        # Orbax takes no empty arrays; of those, their types say all.
        filled = {path: array for path, array in arrays.items() if array.size}
        self._checkpointer.save(saving / "state", args=ocp.args.StandardSave(filled))
        on_first(partial(_commit, saving, self._path(number), record))

    def _delete_old(self) -> None:
        kept = {*sorted(self._records)[-_KEPT:], *_best_first(self._records)[:1]}
        for number in self._records.keys() - kept:
            # Files go one by one: in its place, half a checkpoint would look like a damaged one.
            on_first(partial(_move, self._path(number), self._folder / "deleted"))
            del self._records[number]
        on_first(partial(_delete, self._folder / "deleted"))

    def _read_arrays(self, number: int, like: Any) -> dict[str, np.ndarray]:
        record = self._records[number]
        _check_files(self._path(number), record.files)
        filled = self._checkpointer.restore(self._path(number) / "state")
        arrays = {}
        for path, leaf in _leaves(like).items():
            arrays[path] = filled[path] if leaf.size else _empty(leaf)
            if _digest(arrays[path]) != record.values[path]:
                raise _DamagedError(f"the values of {path} are not those that were saved")
        return arrays

    def _read_records(self, numbers: Sequence[int]) -> None:
        for i, number in enumerate(numbers):
            record, damage = _attempt(partial(_read_record, self._path(number)))
            if record is not None:
                self._records[number] = record
            else:
                self._set_aside(number, damage, [*self._records, *numbers[i + 1 :]])

    def _first_whole(self, numbers: Sequence[int], like: Any) -> Checkpoint | None:
        for i, number in enumerate(numbers):
            record = self._records[number]
            _same_types(self._describe(number), record.types, _types(like))
            arrays, damage = _attempt(partial(self._read_arrays, number, like))
            if arrays is not None:
                return Checkpoint(record.step, _to_devices(arrays, like), record.metadata)
            self._set_aside(number, damage, numbers[i + 1 :])
        if not self._records:
            _not_all_damaged(self._folder)
        return None

    def _set_aside(self, number: int, damage: str, others: Sequence[int]) -> None:
        what, where = self._describe(number), self._folder / "damaged"
        with _writing(self._folder, None):
            on_first(partial(_move, self._path(number), where))
        self._records.pop(number, None)
        instead = f"using {self._describe(others[0])} instead" if others else "there is no other"
        if jax.process_index() == 0:
            print(
                f"damaged checkpoint {what}: {damage}; moved to {where}; {instead}",
                file=sys.stderr,
                flush=True,
            )

    def _close(self) -> None:
        self._checkpointer.close()
        if self._lock is not None:
            self._lock.release()

    def _path(self, number: int) -> Path:
        return self._folder / f"{_PREFIX}{number}"

    def _describe(self, number: int) -> str:
        record = self._records.get(number)
        return f"{self._path(number)}" + (f" (step {record.step})" if record else "")


def _best_first(records: Mapping[int, _Record]) -> list[int]:
    scores = [
        (record.score, number) for number, record in records.items() if record.score is not None
    ]
    return [number for _, number in sorted(scores, reverse=True)]


# Files


def _numbers(folder: Path) -> list[int]:
    numbers = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")]
    return [int(number) for number in numbers if number.isdecimal()]


def _delete(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _make_room(folder: Path, size: int) -> None:
    """Make a folder for so many bytes. Where they do not fit, Orbax would fail noisily."""
    _delete(folder)
    folder.mkdir()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(0, size + len(_BLOCK), len(_BLOCK)):  # at least one more, for metadata
            file.write(_BLOCK)


def _move(path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)


def _commit(saving: Path, path: Path, record: _Record) -> None:
    """Write the record, and make it a checkpoint, in one indivisible step."""
    files = [file for file in sorted(saving.rglob("*")) if file.is_file()]
    digests = {str(file.relative_to(saving)): _file_digest(file) for file in files}
    _write_record(saving, record._replace(files=digests))
    saving.rename(path)


def _check_files(folder: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        if _file_digest(folder / name) != digest:
            raise _DamagedError(f"{name} is not as it was saved")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Arrays


def _leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}


def _types(tree: Any) -> dict[str, str]:
    """Such as float32[3,4]."""
    return {
        path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in _leaves(tree).items()
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _empty(leaf: Any) -> np.ndarray:
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return np.empty(data.shape, data.dtype)


def _digest(array: np.ndarray) -> str:
    return _sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())


def _to_devices(arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    leaves = [_to_device(arrays[path], leaf) for path, leaf in _leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _to_device(array: np.ndarray, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return array
    placed: Array
    if like.committed:
        # Unlike `device_put`, it also fills arrays that lie on devices of several processes.
        placed = jax.make_array_from_callback(array.shape, like.sharding, array.__getitem__)
    else:
        placed = jnp.array(array)
    if _is_key(like):
        return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like))
    return placed


# Records


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_record(folder: Path, record: _Record) -> None:
    fields = record._asdict()
    sealed = {**fields, "sha256": _seal(fields)}
    (folder / "record.json").write_text(json.dumps(sealed, indent=2))


def _read_record(folder: Path) -> _Record:
    fields = json.loads((folder / "record.json").read_text())
    if fields.pop("sha256") != _seal(fields):
        raise _DamagedError("record.json is not as it was saved")
    return _Record(**fields)


def _seal(fields: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(fields).encode())


# Failures


def _attempt(read: Callable[[], T]) -> tuple[T | None, str]:
    """What was read, or None and why not, on all processes alike."""
    result, damage = None, "other processes cannot read it"
    try:
        result = read()
    except Exception as error:  # Orbax documents none, and raises many types
        damage = _brief(error)
    return (result if all_agree(result is not None) else None), damage


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


@contextmanager
def _writing(folder: Path, last: str | None) -> Iterator[None]:
    """What is saved can be written."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:  # Orbax documents none, and raises many types
        kept = f" The last good checkpoint is kept: {last}." if last else ""
        raise TrainingError(
            f"Checkpoints must be written to {folder}, but that failed: {_brief(error)}.{kept} See "
            "that there is room and that the folder may be written to, then start again."
        ) from error


def _same_types(checkpoint: str, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """A checkpoint holds the arrays of the state that it is to become."""
    differences = [
        f"  {path}: {saved.get(path, 'nothing')} saved, {wanted.get(path, 'nothing')} wanted"
        for path in sorted(saved.keys() | wanted.keys())
        if saved.get(path) != wanted.get(path)
    ]
    if differences:
        more = len(differences) - _SHOWN
        shown = "\n".join(differences[:_SHOWN]) + (f"\n  and {more} more" if more > 0 else "")
        raise TrainingError(
            f"The state in a checkpoint must be like that of the run, but in {checkpoint} these "
            f"arrays differ:\n{shown}\nRun with the settings that it was saved with, or name "
            "another folder."
        )


def _not_all_damaged(folder: Path) -> None:
    """Where something was saved, a run does not silently start anew."""
    where = folder / "damaged"
    damaged = sorted(path.name for path in where.glob("*"))
    if damaged:
        raise TrainingError(
            f"Of the checkpoints in {folder}, one must be whole, but all are damaged: "
            f"{', '.join(damaged)}. They are kept in {where}. Move that folder away to start anew, "
            "or name another one."
        )
