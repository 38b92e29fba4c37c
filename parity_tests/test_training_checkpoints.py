"""A checkpoint is restored bit for bit, or reported as damaged."""

import json
import os
import random
import resource
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import training.checkpoints
from training import TrainingError
from training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]


@cache
def state_after(step):
    """A state with a leaf of each kind."""
    values = np.random.default_rng(step).standard_normal((8, 3), np.float32)
    params = {
        "dense": {"kernel": jnp.asarray(values), "bias": jnp.asarray(values[0], jnp.bfloat16)},
        "no parameters": {},
        "a/b.c['d']": jnp.asarray([True, False]),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, 100))
    _, opt_state = optimizer.update(params["dense"], optimizer.init(params["dense"]))
    return {
        "params": params,
        "optimizer": opt_state,
        "step": jnp.asarray(step, jnp.int32),
        "keys": (jax.random.key(step), jax.random.split(jax.random.key(step, impl="rbg"), 2)),
        "numpy": [np.asarray(step, np.uint8), np.asarray([np.nan, -0.0, 5e-324])],
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }


def metadata_after(step):
    return {"history": [{"epoch": step, "loss": 0.1 * step}], "9": 1, "10": None}


def save(checkpoints, step, score=None):
    checkpoints.save(step, state_after(step), metadata_after(step), score)


def saved(folder, steps=(1, 2), scores=None):
    """A folder of checkpoints, nobody at work in it."""
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            save(checkpoints, step, (scores or {}).get(step))
    return folder


def host(leaf):
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(one, np.ndarray) == isinstance(other, np.ndarray)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert host(one).tobytes() == host(other).tobytes()


def assert_is(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.metadata == metadata_after(step)
    assert_same_bits(checkpoint.state, state_after(step))


def steps_in(folder):
    """The steps that it holds, read with nothing but JSON."""
    records = folder.glob("save_*/record.json")
    return sorted(json.loads(record.read_text())["step"] for record in records)


def message(call, *args):
    with pytest.raises(TrainingError) as caught:
        call(*args)
    return str(caught.value)


def flip_bit(path, place=0.5, bit=0):
    values = bytearray(path.read_bytes())
    values[int(place * (len(values) - 1))] ^= 1 << bit
    path.write_bytes(values)


def files_in(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def contents(checkpoint):
    return {path.relative_to(checkpoint): path.read_bytes() for path in files_in(checkpoint)}


def damage_values(checkpoint):
    """Flip a bit of the largest file, where the values lie."""
    path = max(files_in(checkpoint / "state"), key=lambda path: path.stat().st_size)
    flip_bit(path)
    return path


def damage_record(checkpoint):
    path = checkpoint / "record.json"
    path.write_text(path.read_text().replace('"loss": 0.', '"loss": 7.'))


# Restoring


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "not" / "there") as checkpoints:
        assert checkpoints.latest(state_after(0)) is None
        assert checkpoints.best(state_after(0)) is None


def test_a_state_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 7, score=0.5)
        assert_is(checkpoints.latest(state_after(0)), 7)
        assert_is(checkpoints.best(state_after(0)), 7)
    with Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 7)
        assert_is(checkpoints.best(state_after(0)), 7)


def test_the_path_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints(Path("here")) as checkpoints:
        monkeypatch.chdir("/")
        save(checkpoints, 1)
    assert steps_in(tmp_path / "here") == [1]


def test_a_state_may_be_donated_before_another_is_read_like_it(tmp_path):
    state = {"x": jnp.arange(4.0), "key": jax.random.key(0), "empty": jnp.zeros(0)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        found = checkpoints.latest(state).state
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(found["x"])
    np.testing.assert_array_equal(after, np.arange(4.0) + 1)


def test_arrays_come_back_to_where_they_were(tmp_path):
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    everywhere, one = NamedSharding(mesh, PartitionSpec()), jax.devices()[3]
    split = NamedSharding(mesh, PartitionSpec("data"))
    state = {
        "replicated": jax.device_put(jnp.arange(6.0).reshape(2, 3), everywhere),
        "key": jax.device_put(jax.random.key(1), everywhere),
        "split": jax.device_put(jnp.arange(16), split),
        "committed": jax.device_put(jnp.ones(3), one),
        "free": jnp.ones(3),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        found = checkpoints.latest(state).state
    assert_same_bits(found, state)
    for name, leaf in state.items():
        assert found[name].sharding == leaf.sharding
        assert found[name].committed == leaf.committed


def test_a_state_comes_back_on_other_devices(tmp_path):
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(3)}, {})
        found = checkpoints.latest({"x": jax.device_put(jnp.zeros(3, int), everywhere)}).state["x"]
    assert found.sharding == everywhere
    np.testing.assert_array_equal(found, np.arange(3))


# Which checkpoints are kept


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.8, 5: 0.2}
    with Checkpoints(saved(tmp_path, range(1, 6), scores)) as checkpoints:
        assert steps_in(tmp_path) == [2, 4, 5]
        assert_is(checkpoints.latest(state_after(0)), 5)
        assert_is(checkpoints.best(state_after(0)), 2)
    assert sorted(path.name for path in tmp_path.glob("save_*")) == ["save_1", "save_3", "save_4"]


def test_what_is_best_is_known_after_a_new_start(tmp_path):
    saved(tmp_path, [1, 2], {1: 0.9, 2: 0.1})
    with Checkpoints(saved(tmp_path, [3, 4, 5])) as checkpoints:
        assert_is(checkpoints.best(state_after(0)), 1)
        save(checkpoints, 6, score=1.0)
        assert_is(checkpoints.best(state_after(0)), 6)
    assert steps_in(tmp_path) == [5, 6]


def test_of_equal_scores_the_later_is_the_best(tmp_path):
    scores = {1: 0.5, 2: 0.5, 3: 0.4, 4: 0.4, 5: 0.4}
    with Checkpoints(saved(tmp_path, range(1, 6), scores)) as checkpoints:
        assert_is(checkpoints.best(state_after(0)), 2)
    assert steps_in(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize("score", [None, float("nan"), np.float32("nan")])
def test_a_checkpoint_without_a_score_is_never_the_best(tmp_path, score):
    scores = dict.fromkeys(range(1, 8), score) | {2: np.float32(-5)}
    with Checkpoints(saved(tmp_path, range(1, 8), scores)) as checkpoints:
        assert_is(checkpoints.best(state_after(0)), 2)
    assert steps_in(tmp_path) == [2, 6, 7]


def test_without_scores_there_is_no_best(tmp_path):
    with Checkpoints(saved(tmp_path)) as checkpoints:
        assert checkpoints.best(state_after(0)) is None


def test_a_step_may_be_saved_again(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5)
        save(checkpoints, 5, score=1.0)
        assert_is(checkpoints.latest(state_after(0)), 5)
        assert_is(checkpoints.best(state_after(0)), 5)
        save(checkpoints, 4)
        assert_is(checkpoints.latest(state_after(0)), 4)


# Damage

WAYS = {
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": os.remove,
    "first bit": lambda path: flip_bit(path, 0),
    "some bit": lambda path: flip_bit(path, 0.4, 3),
    "last bit": lambda path: flip_bit(path, 1, 7),
}


def assert_detected(folder, capfd):
    """The newest checkpoint was that of step 2, the one before it that of step 1."""
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 1)
        assert_is(checkpoints.best(state_after(0)), 1)
    err = capfd.readouterr().err
    assert err.startswith(f"damaged checkpoint {folder}/save_1")
    assert err.count("\n") == 1


@pytest.mark.parametrize("way", WAYS)
def test_damage_of_any_file_is_detected(tmp_path, way, capfd):
    origin = saved(tmp_path / "origin", scores={1: 0.1, 2: 0.2})
    for file in files_in(origin / "save_1"):
        folder = Path(shutil.copytree(origin, tmp_path / "copy"))
        path = folder / file.relative_to(origin)
        WAYS[way](path)
        assert_detected(folder, capfd)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_flip_of_any_bit_is_detected(tmp_path, capfd):
    origin = saved(tmp_path / "origin", scores={1: 0.1, 2: 0.2})
    rng = random.Random(0)
    for file in files_in(origin / "save_1"):
        for place in range(0, file.stat().st_size, 1021):
            folder = Path(shutil.copytree(origin, tmp_path / "copy"))
            path = folder / file.relative_to(origin)
            values = bytearray(path.read_bytes())
            values[place] ^= 1 << rng.randrange(8)
            path.write_bytes(values)
            assert_detected(folder, capfd)
            shutil.rmtree(folder)


@pytest.mark.parametrize("part", [".", "state"])
def test_a_folder_without_files_is_damage(tmp_path, part, capfd):
    folder = saved(tmp_path)
    shutil.rmtree(folder / "save_1" / part)
    (folder / "save_1").mkdir(exist_ok=True)
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 1)
    assert f"damaged checkpoint {folder}/save_1" in capfd.readouterr().err


def test_damage_is_reported_and_moved_aside(tmp_path, capfd):
    folder = saved(tmp_path)
    path = damage_values(folder / "save_1")
    before = contents(folder / "save_1")
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 1)
        out, err = capfd.readouterr()
        assert out == ""
        assert err == (
            f"damaged checkpoint {folder}/save_1 (step 2): {path.relative_to(folder / 'save_1')} "
            f"is not as it was saved; moved to {folder}/damaged; using {folder}/save_0 (step 1) "
            "instead\n"
        )
        assert contents(folder / "damaged" / "save_1") == before

        save(checkpoints, 2)
        assert_is(checkpoints.latest(state_after(0)), 2)
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 2)
        save(checkpoints, 3)
    assert contents(folder / "damaged" / "save_1") == before
    assert capfd.readouterr().err == ""


def test_a_number_is_not_used_again_for_what_may_be_damaged_too(tmp_path):
    folder = saved(tmp_path)
    damage_values(folder / "save_1")
    with Checkpoints(folder) as checkpoints:
        checkpoints.latest(state_after(0))
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 2)
        damage_values(max(folder.glob("save_*")))
        assert_is(checkpoints.latest(state_after(0)), 1)
    assert len(list((folder / "damaged").iterdir())) == 2


def test_a_changed_record_is_reported(tmp_path, capfd):
    folder = saved(tmp_path)
    damage_record(folder / "save_1")
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 1)
    assert capfd.readouterr().err == (
        f"damaged checkpoint {folder}/save_1: record.json is not as it was saved; "
        f"moved to {folder}/damaged; using {folder}/save_0 instead\n"
    )


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path, capfd):
    folder = saved(tmp_path, [1, 2, 3], {1: 0.9, 2: 0.2, 3: 0.5})
    damage_values(folder / "save_0")
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.best(state_after(0)), 3)
        assert f"using {folder}/save_2 (step 3) instead" in capfd.readouterr().err
        damage_values(folder / "save_2")
        assert_is(checkpoints.best(state_after(0)), 2)
        damage_values(folder / "save_1")
        assert "is whole" not in capfd.readouterr().err


def test_a_damaged_best_among_what_has_no_score(tmp_path, capfd):
    folder = saved(tmp_path, [1, 2], {1: 0.9})
    damage_values(folder / "save_0")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.best(state_after(0)) is None
        assert capfd.readouterr().err.endswith("; there is no other\n")
        assert_is(checkpoints.latest(state_after(0)), 2)


@pytest.mark.parametrize("damage", [damage_values, damage_record])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path, damage, capfd):
    folder = saved(tmp_path, scores={1: 0.5})
    damage(folder / "save_0")
    damage(folder / "save_1")
    text = (
        f"All checkpoints in {folder} are damaged: save_0, save_1. They are kept in "
        f"{folder}/damaged. Move that folder away to start again, or choose another one."
    )
    for _ in range(2):
        with Checkpoints(folder) as checkpoints:
            assert message(checkpoints.latest, state_after(0)) == text
            assert message(checkpoints.best, state_after(0)) == text
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("; ")[-1].split(" (")[0] for line in lines] == [
        f"using {folder}/save_0 instead" if damage is damage_record else f"using {folder}/save_0",
        "there is no other",
    ]

    shutil.rmtree(folder / "damaged")
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest(state_after(0)) is None


# Other states


def other_state(**changes):
    return {**state_after(0), **changes}


def test_a_checkpoint_of_another_state_is_no_damage(tmp_path, capfd):
    folder = saved(tmp_path)
    like = other_state(
        step=jnp.zeros((), jnp.float32), empty=jnp.zeros((0, 4)), new=jnp.zeros(1), numpy=[]
    )
    with Checkpoints(folder) as checkpoints:
        assert message(checkpoints.latest, like) == (
            f"A checkpoint must hold the arrays of the run, but in {folder}/save_1 (step 2) these "
            "differ:\n"
            "  state['empty']: float32[0,3] saved, float32[0,4] expected\n"
            "  state['new']: nothing saved, float32[1] expected\n"
            "  state['numpy'][0]: uint8[] saved, nothing expected\n"
            "  and 2 more\n"
            "Use the settings that it was saved with, or choose another folder."
        )
        assert_is(checkpoints.latest(state_after(0)), 2)
    assert capfd.readouterr().err == ""


def test_a_single_difference_is_reported(tmp_path):
    folder = saved(tmp_path, scores={1: 1.0})
    with Checkpoints(folder) as checkpoints:
        text = message(checkpoints.best, other_state(step=jnp.zeros(2, jnp.int32)))
    assert text == (
        f"A checkpoint must hold the arrays of the run, but in {folder}/save_0 (step 1) these "
        "differ:\n"
        "  state['step']: int32[] saved, int32[2] expected\n"
        "Use the settings that it was saved with, or choose another folder."
    )


def test_a_key_of_another_kind_is_another_state(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0)}, {})
        text = message(checkpoints.latest, {"key": jax.random.key(0, impl="rbg")})
    assert "  state['key']: key<fry>[] saved, key<rbg>[] expected\n" in text


# Writing


@pytest.fixture
def full_disk():
    """Let no file grow beyond 300 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))

    def clear():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    yield fill, clear
    clear()


@pytest.mark.parametrize("saves", [0, 2])
def test_a_full_disk_costs_only_what_was_to_be_saved(tmp_path, full_disk, saves, capfd):
    fill, clear = full_disk
    small = {"x": jnp.zeros(3)}
    rng = np.random.default_rng(0)
    large = {name: rng.standard_normal(10**4) for name in "wxyz"}
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(saves):
            checkpoints.save(step, small, {}, score=step)
        fill()
        text = message(checkpoints.save, 9, large, {}, 9.0)
        clear()
        kept = f" The last good checkpoint is kept: {tmp_path}/save_1 (step 1)." if saves else ""
        assert text == (
            f"Cannot write checkpoints to {tmp_path}: [Errno 27] File too large.{kept} Check the "
            "free space and the permissions of the folder, then start again."
        )
        for find in (checkpoints.latest, checkpoints.best):
            assert (find(small).step if saves else find(small)) == (1 if saves else None)
        checkpoints.save(10, large, {})
        np.testing.assert_array_equal(checkpoints.latest(large).state["x"], large["x"])
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_fills_up_while_orbax_writes_is_reported_in_a_line(
    tmp_path, full_disk, monkeypatch, capfd
):
    fill, clear = full_disk
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # a failure leaves another

    def make_room(folder, size):
        folder.mkdir()
        fill()

    rng = np.random.default_rng(0)
    large = {f"x{number}": rng.standard_normal(10**5) for number in range(20)}
    with Checkpoints(saved(tmp_path)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(training.checkpoints, "_make_room", make_room)
            assert message(checkpoints.save, 3, large, {}) == (
                f"Cannot write checkpoints to {tmp_path}: File too large. The last good checkpoint "
                f"is kept: {tmp_path}/save_1 (step 2). Check the free space and the permissions of "
                "the folder, then start again."
            )
        clear()
        time.sleep(0.2)  # threads go on writing
        assert capfd.readouterr() == ("", "")
        assert_is(checkpoints.latest(state_after(0)), 2)
        save(checkpoints, 3)


def test_nothing_is_lost_if_orbax_cannot_write(tmp_path, monkeypatch):
    def fail(self, path, args):
        (path / "half of it").mkdir(parents=True)
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a long story")

    with Checkpoints(saved(tmp_path)) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "unraisablehook", sys.unraisablehook)
            patch.setattr(ocp.Checkpointer, "save", fail)
            assert message(save, checkpoints, 3) == (
                f"Cannot write checkpoints to {tmp_path}: RESOURCE_EXHAUSTED: No space left on "
                f"device. The last good checkpoint is kept: {tmp_path}/save_1 (step 2). Check the "
                "free space and the permissions of the folder, then start again."
            )
        assert_is(checkpoints.latest(state_after(0)), 2)
        save(checkpoints, 3)
        assert_is(checkpoints.latest(state_after(0)), 3)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "checkpoints"
    assert message(Checkpoints, folder) == (
        f"Cannot write checkpoints to {folder}: [Errno 20] Not a directory: '{folder}'. Check the "
        "free space and the permissions of the folder, then start again."
    )


def test_metadata_that_is_not_json_is_refused_before_writing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, state_after(1), {"x": object()})
        assert checkpoints.latest(state_after(0)) is None
