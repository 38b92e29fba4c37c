"""Compiled programs are kept from run to run, and nothing that is wrong with them stops a run."""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_cifar
from training import compilation, data
from training.compilation import compile_program
from training.config import Config, resolve
from training.devices import Placement


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """The user's cache folder, and JAX as it is outside of the tests."""
    before = jax.config.values["jax_enable_compilation_cache"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", True)
    yield tmp_path / "batch-channel-norm"
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture
def found():
    """The programs that were found in the cache."""
    names = []

    def listen(name, **_):
        if name == "/jax/compilation_cache/cache_hits":
            names.append(name)

    jax.monitoring.register_event_listener(listen)
    yield names
    jax.monitoring.unregister_event_listener(listen)


def compiled(factor=3, cache=True):
    """Compile and run a small program."""

    def program(x):
        return factor * x

    lowered = jax.jit(program).lower(jnp.ones(3))
    np.testing.assert_array_equal(
        compile_program(lowered, cache=cache)(jnp.ones(3)), np.full(3, factor)
    )


def kept(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_program_is_compiled_once(user_cache, found):
    compiled()
    (path,) = kept(user_cache)
    assert not found
    compiled()
    assert len(found) == 1
    assert kept(user_cache) == [path]
    compiled(4)
    assert len(found) == 1
    assert len(kept(user_cache)) == 2
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_without_the_cache_nothing_is_kept(user_cache):
    config = Config(compilation_cache=False, batch_size=8)
    recipe = resolve(config)
    trainer = train_cifar.Trainer(config, recipe, data.digits(), Placement(1, recipe.micro_batch))
    assert trainer.begin_epoch
    assert not user_cache.exists()
    compiled(cache=False)
    assert not user_cache.exists()


def test_a_folder_that_the_user_has_given_jax_is_used_instead(user_cache, tmp_path):
    with compilation.cache_in(tmp_path / "mine"):
        compiled()
    assert not user_cache.exists()
    assert kept(tmp_path / "mine")


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path):
    """A file that is as it was written, and no program: another version may have written it."""
    name = path.name.rpartition(".")[0]
    path.rename(path.with_name(f"{name}.{compilation._sum(b'nonsense')}")).write_bytes(b"nonsense")


@pytest.mark.parametrize("damage", [cut, flip, lambda path: os.truncate(path, 0), replace])
def test_a_damaged_program_is_compiled_again(user_cache, found, damage):
    compiled()
    (path,) = kept(user_cache)
    damage(path)
    compiled()
    assert not found
    compiled()
    compiled()
    assert found
    assert len(kept(user_cache)) == 1


def test_a_damaged_program_costs_no_other(user_cache, found):
    compiled()
    (path,) = kept(user_cache)
    compiled(4)
    cut(path)
    compiled()
    assert len(kept(user_cache)) == 2
    assert not found
    compiled(4)
    assert found


def test_what_a_killed_process_leaves_is_removed(user_cache):
    compiled()
    folders = [
        user_cache / "programs" / "jit_program" / f"process-{name}" for name in ("old", "new")
    ]
    for folder in folders:
        folder.mkdir()
        (folder / "half-cache").write_bytes(b"half")
    os.utime(folders[0], (0, time.time() - 4000))
    compiled()
    assert [folder.exists() for folder in folders] == [False, True]  # that one may be at work


def test_few_programs_are_kept(user_cache, monkeypatch):
    monkeypatch.setattr(compilation, "_KEPT", 2)
    for factor in 2, 3, 4, 5:
        compiled(factor)
    assert len(kept(user_cache)) <= 3


def test_a_folder_that_cannot_be_used_is_as_good_as_none(user_cache):
    user_cache.write_text("mine")
    compiled()
    assert Path(user_cache).read_text() == "mine"


def test_a_full_disk_is_as_good_as_none(user_cache, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    compiled()
    assert not kept(user_cache)
