"""A run gives the same results on any number of devices and processes, but for rounding."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import train_cifar
from parity_tests.small_runs import small_networks
from train_cifar import Trainer
from training import TrainingError, data
from training.checkpoints import Checkpoints
from training.config import Config, resolve
from training.devices import Placement

ROOT = Path(train_cifar.__file__).parent
# Plain gradient descent keeps rounding errors small; Adam would turn them into steps.
OPTIONS = {"optimizer": "sgd", "learning_rate": 0.05, "epochs": 2, "batch_size": 32}


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def on_one(tmp_path_factory, compiled_once):
    """The folder of a run on one device."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with small_networks():
        train_cifar.main(Config(**OPTIONS, devices=1, output=folder))
    return folder


def outcome(folder, **options):
    """The losses of a run, and its last estimates and parameters."""
    config = Config(**OPTIONS, **options)
    like = Trainer(config, resolve(config), data.digits(), Placement(1, 32)).first_state
    with Checkpoints(Path(folder) / "checkpoints") as checkpoints:
        state = checkpoints.latest(like).state
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["train_loss"], row["test_loss"]) for row in rows]
    return jax.device_get((losses, state.batch_stats, state.params))


def assert_near(one, other):
    # 88 steps of float32, whose sums run over the devices in another order.
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, one, other)


def test_eight_devices_are_one(on_one):
    """The estimates are of the whole batch: statistics are summed over all devices."""
    train_cifar.main(Config(**OPTIONS, devices=8, output=Path("on-8")))
    assert_near(outcome("on-8"), outcome(on_one))


def test_a_run_is_resumed_on_other_devices(on_one):
    folder = Path(shutil.copytree(on_one, "here"))
    (folder / "metrics.jsonl").unlink()
    last = train_cifar.main(Config(**OPTIONS, devices=8, output=folder, resume=True))
    assert last["epoch"] == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_each_device_has_an_equal_part_of_a_batch():
    placement, batch = Placement(4, 16), np.arange(32.0).reshape(16, 2)
    for array, size in ((jax.jit(placement.split)(batch), 4), (placement.replicate(batch), 16)):
        assert [shard.data.shape for shard in array.addressable_shards] == 4 * [(size, 2)]
        np.testing.assert_array_equal(array, batch)


def test_several_processes_must_agree_on_a_folder(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(TrainingError, match="Several processes must all write to one folder"):
        train_cifar.main(Config(devices=1))


def test_processes_that_cannot_be_found_are_reported():
    with pytest.raises(TrainingError, match="Cannot join the other processes by the"):
        train_cifar.main(Config(distributed=True))


def test_each_process_is_told_where_it_belongs(monkeypatch):
    calls = []

    def initialize(*args):
        calls.append(args)
        raise RuntimeError("nobody there.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    config = Config(coordinator="10.0.0.1:1234", num_processes=3, process_id=2)
    with pytest.raises(TrainingError, match=r"by 10\.0\.0\.1:1234: nobody there\. Pass --coord"):
        train_cifar.main(config)
    assert calls == [("10.0.0.1:1234", 3, 2)]


PROCESS = """
import train_cifar
from parity_tests.small_runs import small_networks
with small_networks():
    train_cifar.command_line()
"""


@pytest.mark.slow
def test_two_processes_with_two_devices_each_are_one(tmp_path, on_one):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    words += [f"--output={tmp_path / 'on-4'}", f"--coordinator={coordinator}", "--num-processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *words, f"--process-id={number}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_DEFAULT_PRNG_IMPL": "rbg"},
        )
        for number in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "results in" in printed[0]
    assert "results in" not in printed[1]  # only the first prints
    assert_near(outcome(tmp_path / "on-4"), outcome(on_one))
