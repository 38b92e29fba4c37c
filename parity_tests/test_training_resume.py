"""Nothing is lost: whatever ends a run, it goes on as if nothing had happened, bit for bit."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import train_cifar
from parity_tests.small_runs import small_networks
from parity_tests.test_training_checkpoints import steps_in
from train_cifar import Trainer
from training import TrainingError, data
from training.checkpoints import Checkpoints
from training.compilation import cache_in
from training.config import Config, resolve
from training.devices import Placement
from training.progress import NOTED, Signals, Stopped

TIMES = {"seconds", "images_per_second"}
SMALL = Config(epochs=3, devices=1, micro_batch=16)
ALL = 1437

# New processes are copies of one that has imported everything, which takes longer than to train.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


pytestmark = pytest.mark.usefixtures("small")


def config(folder, **options):
    return dataclasses.replace(SMALL, output=Path(folder), **options)


def outcome(folder):
    """The last state of a run and its metrics, but for what depends on the clock."""
    chosen = config(folder)
    like = Trainer(chosen, resolve(chosen), data.digits(), Placement(1, 16)).first_state
    with Checkpoints(Path(folder) / "checkpoints") as checkpoints:
        last = checkpoints.latest(like)
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    return jax.device_get(last.state._replace(key=jax.random.key_data(last.state.key))), rows


def assert_same(one, other):
    (state, rows), (expected, expected_rows) = one, other
    assert rows == expected_rows
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def uninterrupted(folder, **sizes):
    """The folder and the outcome of a run that nothing interrupts."""
    with small_networks(**sizes):
        train_cifar.main(config(folder))
        return folder, outcome(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
    return uninterrupted(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    ("number", "after", "saved"),
    [
        (signal.SIGTERM, 13, 13),  # 12 are an epoch
        (signal.SIGINT, 12, 12),
        (None, 15, 12),
    ],
)
def test_a_run_stopped_at_any_step_is_resumed_bit_for_bit(monkeypatch, whole, number, after, saved):
    """By a signal, which saves the state, or by an error, which does not."""
    calls = []
    program = Trainer.step.func

    def step(self):
        compiled = program(self)

        def counted(*args):
            calls.append(1)
            if len(calls) == after:
                if number is None:
                    raise MemoryError
                os.kill(os.getpid(), number)
            return compiled(*args)

        return counted

    with monkeypatch.context() as patch:
        counting = cached_property(step)
        counting.__set_name__(Trainer, "step")
        patch.setattr(Trainer, "step", counting)
        with pytest.raises(MemoryError if number is None else Stopped) as stopped:
            train_cifar.main(config("run"))
    if number is not None:
        assert stopped.value.number == number
        assert f"stopped by {number.name} in epoch {1 if after <= 12 else 2}. " in str(
            stopped.value
        )
    assert len(calls) == after
    assert max(steps_in(Path("run/checkpoints"))) == saved
    free = {"checkpoint_every": 5, "data_dir": Path("elsewhere")}
    train_cifar.main(config("run", resume=True, **free))
    assert_same(outcome("run"), whole[1])


def test_a_second_signal_takes_effect():
    handlers = [signal.getsignal(number) for number in NOTED]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.noted == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == handlers[1]
    finally:
        signal.signal(signal.SIGINT, handlers[0])


def test_resuming_a_finished_run_changes_nothing(whole, capsys):
    folder, expected = whole
    last = train_cifar.main(config(folder, resume=True))
    assert last["epoch"] == 3
    assert_same(outcome(folder), expected)
    assert f"nothing is left to do: all 3 epochs of {folder} are done" in capsys.readouterr().out


def test_resuming_without_a_run_starts_one():
    last = train_cifar.main(dataclasses.replace(SMALL, epochs=1, resume=True))
    assert last["epoch"] == 1
    (folder,) = Path("runs").iterdir()
    assert train_cifar.main(dataclasses.replace(SMALL, epochs=1, resume=True)) == last
    assert list(Path("runs").iterdir()) == [folder]


def test_a_run_with_other_settings_is_not_resumed(whole):
    folder, expected = whole
    with pytest.raises(TrainingError) as caught:
        train_cifar.main(config(folder, resume=True, seed=1, norm="bn"))
    assert str(caught.value) == (
        f"A run must be resumed with its own settings, but of the run in {folder} "
        "norm was bcn and is bn; seed was 0 and is 1. Use the same settings, or start a new run "
        "with another --output."
    )
    assert_same(outcome(folder), expected)


def test_the_last_and_the_best_checkpoint_are_evaluated(whole, capsys):
    folder, (_, rows) = whole
    best = train_cifar.main(Config(output=folder, eval_only=True))
    assert best["test_accuracy"] == max(row["test_accuracy"] for row in rows)
    last = rows[-1]["test_accuracy"]
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"last \(step 36\): loss [\d.]+, accuracy {last:.2%}", printed[0])
    assert printed[1].startswith("best (step ")


def test_a_picture_is_classified_as_in_training(whole, capsys):
    image = data.digits().test.images[:1]
    chosen = config(whole[0])
    recipe = resolve(chosen)
    like = Trainer(chosen, recipe, data.digits(), Placement(1, 16)).first_state
    folder = Path(shutil.copytree(whole[0], "here"))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        best = checkpoints.best(like).state
        worse = best._replace(params=jax.tree.map(jnp.zeros_like, best.params))
        checkpoints.save(99, worse, {}, score=0.0)
    variables = {"params": best.params, "batch_stats": best.batch_stats}
    model = train_cifar.make_model(chosen, recipe, 10)
    apply = jax.jit(model.apply, static_argnames="train")
    expected = jax.nn.softmax(apply(variables, data.to_float(image), train=False)[0])

    PIL.Image.fromarray(image[0, :, :, 0]).save("digit.png")
    seen = train_cifar.main(Config(output=folder, predict=Path("digit.png")))
    np.testing.assert_allclose(list(seen.values()), expected, rtol=1e-6)
    assert list(seen) == list("0123456789")
    first = max(seen, key=seen.__getitem__)
    assert f"digit.png shows {first}: {seen[first]:.1%} (" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "size"), [("RGB", (80, 80)), ("RGBA", (8, 20)), ("P", (8, 8))])
def test_pictures_of_any_mode_and_size_are_read(mode, size):
    PIL.Image.new(mode, size, "white" if mode != "P" else 1).save("picture.png")
    assert data.read_picture(Path("picture.png"), (8, 8, 1)).shape == (8, 8, 1)
    assert data.read_picture(Path("picture.png"), (32, 32, 3)).shape == (32, 32, 3)


def test_a_missing_picture_or_run_is_reported(whole):
    Path("text.png").write_text("no picture")
    for name, error in (
        ("text.png", "cannot identify image file '.*text.png'"),
        ("absent.png", "No such file or directory"),
    ):
        with pytest.raises(TrainingError, match=f"Cannot read {name} as a picture: {error}. Pass"):
            train_cifar.main(Config(output=whole[0], predict=Path(name)))
    for options in {"eval_only": True}, {"predict": Path("text.png")}:
        with pytest.raises(TrainingError, match="There must be a run with a checkpoint, but there"):
            train_cifar.main(Config(output=Path("nowhere"), **options))


def test_a_damaged_configuration_is_reported(whole):
    Path("run").mkdir()
    Path("run/config.json").write_text("{")
    with pytest.raises(TrainingError, match=r"Cannot read run/config\.json, which holds"):
        train_cifar.main(config("run", resume=True))


def train_killably(folder, output):
    """Train in this process, which reports to a pipe, and save often enough to be killed then."""
    os.dup2(output.fileno(), sys.stdout.fileno())
    with cache_in(folder.parent / "compiled"), small_networks(images=ALL):
        train_cifar.main(config(folder, resume=True, checkpoint_every=7))


@contextlib.contextmanager
def training(folder):
    """A process that trains, and what it prints."""
    reading, writing = processes.Pipe(duplex=False)
    run = processes.Process(target=train_killably, args=(folder, writing))
    run.start()
    writing.close()
    with open(os.dup(reading.fileno())) as printed:
        yield run, printed
        printed.read()
    run.join()


@pytest.mark.slow
def test_a_run_killed_at_20_random_moments_ends_as_if_never_killed(tmp_path):
    """From the first line of the table on: saves, evaluations and the ends of epochs included."""
    _, expected = uninterrupted(tmp_path / "whole", images=ALL)
    rng = random.Random(0)
    folder = tmp_path / "killed"
    for _ in range(20):
        with training(folder) as (run, printed):
            header = next((line for line in printed if line.startswith("epoch  ")), None)
            assert header, "the run did not come to train"
            # Long enough to come forward now and then, too short to end.
            run.join(rng.uniform(0, 0.25))
            run.kill()
        assert run.exitcode == -signal.SIGKILL
    with training(folder) as (run, _):
        pass
    assert run.exitcode == 0
    with small_networks(images=ALL):
        assert_same(outcome(folder), expected)
