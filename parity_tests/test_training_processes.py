"""Checkpoints survive killed processes, and several processes share them."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parity_tests.test_training_checkpoints import (
    assert_is,
    message,
    save,
    saved,
    state_after,
    steps_in,
)
from training.checkpoints import Checkpoints

ROOT = Path(__file__).parents[1]


CHILD = """
import sys
from pathlib import Path
from parity_tests.test_training_checkpoints import Checkpoints, save, state_after

folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with Checkpoints(folder) as checkpoints:
    for step in range(first, last):
        save(checkpoints, step, score=-step)
        print(step, flush=True)
    if checkpoints.latest(state_after(0)).step != last - 1:
        sys.exit("not found")
"""


def child(*args, code=CHILD):
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_program_that_saves_prints_nothing_and_ends(tmp_path):
    process = child(tmp_path, 0, 3)
    assert process.communicate(timeout=60) == ("0\n1\n2\n", "")
    assert process.returncode == 0


def test_one_folder_is_for_one_run(tmp_path):
    text = (
        f"Only one run at a time may use {tmp_path}, but another one is using it. Wait until it "
        "ends, stop it, or choose another folder."
    )
    with Checkpoints(tmp_path):
        assert message(Checkpoints, tmp_path) == text
        with Checkpoints(tmp_path / "another"):
            pass
    with Checkpoints(tmp_path):
        pass


def test_a_run_that_fails_lets_go_of_the_folder(tmp_path):
    with pytest.raises(RuntimeError), Checkpoints(tmp_path):
        raise RuntimeError
    with Checkpoints(tmp_path):
        pass


def kill_while_saving(folder, first, seconds):
    """The last step that was saved for sure."""
    process = child(folder, first, 10**6)
    line = process.stdout.readline()
    # Another process, too, must keep out meanwhile.
    assert "Only one run" in message(Checkpoints, folder)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    lines = [line, *process.stdout]
    process.communicate()
    return int(lines[-1])


def assert_consistent_after_a_kill(folder, first, last, capfd):
    leftovers = [path.name for path in folder.iterdir()]
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.latest(state_after(0))
        assert last <= found.step <= last + 1
        assert_is(found, found.step)
        assert_is(checkpoints.best(state_after(0)), first)
        save(checkpoints, found.step + 1)
    names = {path.name for path in folder.iterdir()} - {".lock"}
    expected = {first, found.step, found.step + 1}
    assert set(steps_in(folder)) == expected
    assert len(names) == len(expected), leftovers
    assert capfd.readouterr().err == ""
    return found.step + 2


def test_a_run_killed_while_saving_loses_nothing_and_blocks_nothing(tmp_path, capfd):
    last = kill_while_saving(tmp_path, 0, 0.5)
    assert_consistent_after_a_kill(tmp_path, 0, last, capfd)


@pytest.mark.slow
def test_runs_killed_at_any_moment_lose_nothing(tmp_path, capfd):
    rng = random.Random()
    step = 0
    for _ in range(5):
        last = kill_while_saving(tmp_path, step, rng.uniform(0, 0.4))
        step = assert_consistent_after_a_kill(tmp_path, 0, last, capfd)


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    folder = saved(tmp_path)
    for name in ("saving/state.orbax-checkpoint-tmp", "deleted/save_0"):
        shutil.copytree(folder / "save_1" / "state", folder / name)
    with Checkpoints(folder) as checkpoints:
        assert_is(checkpoints.latest(state_after(0)), 2)
    assert {path.name for path in folder.iterdir()} - {".lock"} == {"save_0", "save_1"}


TOGETHER = """
import sys
from pathlib import Path
import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from training import TrainingError
from training.checkpoints import Checkpoints
from parity_tests.test_training_checkpoints import assert_same_bits, damage_values

folder = Path(sys.argv[1])
everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec())


def state(step):
    data = jax.jit(lambda: jax.random.key_data(jax.random.key(step)), out_shardings=everywhere)()
    x = jax.make_array_from_callback((5,), everywhere, lambda i: (np.arange(5.0) + step)[i])
    return {"x": x, "key": jax.random.wrap_key_data(data), "n": np.full(3, step)}


def here(tree):
    return jax.tree.map(lambda leaf: leaf.addressable_data(1), (tree["x"], tree["key"]))


def check(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.state["x"].sharding == everywhere
    assert_same_bits(here(checkpoint.state), here(state(step)))
    assert (checkpoint.state["n"] == step).all()


with Checkpoints(folder) as checkpoints:
    for step in range(4):
        checkpoints.save(step, state(step), {"step": step}, score=-step)
    check(checkpoints.latest(state(9)), 3)
    check(checkpoints.best(state(9)), 0)
    try:
        Checkpoints(folder)
    except TrainingError as error:
        print(error)
if jax.process_index() == 0:
    damage_values(folder / "save_3")
with Checkpoints(folder) as checkpoints:
    check(checkpoints.latest(state(9)), 2)
    checkpoints.save(3, state(3), {})
    check(checkpoints.latest(state(9)), 3)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_processes_save_and_read_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [child(tmp_path, port, i, code=TOGETHER) for i in range(2)]
    (out, err), (other_out, other_err) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err + other_err
    assert f"Only one run at a time may use {tmp_path}" in out
    assert "The first process of this run failed: see its message.\n" in other_out
    assert err.count("damaged checkpoint") == 1
    assert "damaged" not in other_err
    assert steps_in(tmp_path) == [0, 2, 3]
