"""Compiled programs, kept from run to run in the user's cache folder.

JAX's persistent compilation cache finds them by their code and options, the version of jaxlib and
the features of the machine. But it writes them in place, and what a killed process has half written
stays and fails in every later run. So JAX is given a folder of the process, and what it holds is
kept under names that end in its SHA-256.
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import pooch
from jax.experimental.compilation_cache import compilation_cache

_KEPT = 16  # programs of a name
_HOUR = 3600  # longer than a compilation

_SETTINGS = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # Its folder would be part of what programs are found by.
    "jax_persistent_cache_enable_xla_caches": "none",
}


def compile_program(lowered: jax.stages.Lowered, *, cache: bool) -> jax.stages.Compiled:
    """Compile a program, or take it from the user's cache folder; without `cache`, leave it to JAX.

    A folder that cannot be used is as good as none. If the user has given JAX a folder, that is
    used; with several processes none is, since the compilers of their GPUs work together.
    """
    options = jax.config.values
    given = options["jax_compilation_cache_dir"] or not options["jax_enable_compilation_cache"]
    if not cache or given or jax.process_count() > 1:
        return lowered.compile()
    module: Any = lowered.compiler_ir("stablehlo")
    name = module.operation.attributes["sym_name"].value
    folder = Path(pooch.os_cache("batch-channel-norm")) / "programs" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("process-*"):  # by a killed process
            if time.time() - left.stat().st_mtime > _HOUR:
                shutil.rmtree(left, ignore_errors=True)
        own = TemporaryDirectory(prefix="process-", dir=folder, ignore_cleanup_errors=True)
        kept = _take_out(folder, Path(own.name))
    except OSError:
        return lowered.compile()
    with own:
        program, warned = _compile(lowered, Path(own.name))
        with suppress(OSError):
            if warned:
                for path in folder.glob("*-cache.*"):
                    path.unlink()
            else:
                _put_in(folder, Path(own.name), kept)
    return program


def _compile(lowered: jax.stages.Lowered, own: Path) -> tuple[jax.stages.Compiled, bool]:
    """Compile with JAX's cache in a folder; also whether JAX could not read or write there."""
    with cache_in(own), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = lowered.compile()
    of_cache = ["persistent compilation cache" in str(one.message) for one in caught]
    for one, known in zip(caught, of_cache, strict=True):
        if not known:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return program, any(of_cache)


def _put_in(folder: Path, own: Path, kept: set[str]) -> None:
    for path in own.glob("*-cache"):
        if path.name not in kept:
            content = path.read_bytes()
            (folder / f"{path.name}.{_sum(content)}").write_bytes(content)


def _take_out(folder: Path, own: Path) -> set[str]:
    """Copy the newest programs, and delete the others and those that are not as they were kept."""
    newest = sorted(folder.glob("*-cache.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    names = set()
    for i, path in enumerate(newest):
        content = path.read_bytes()
        name, _, expected = path.name.rpartition(".")
        if i < _KEPT and _sum(content) == expected:
            (own / name).write_bytes(content)
            names.add(name)
        else:
            path.unlink(missing_ok=True)
    return names


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Let JAX keep every program in a folder."""
    options = {"jax_compilation_cache_dir": str(folder), **_SETTINGS}
    before = {name: jax.config.values[name] for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
