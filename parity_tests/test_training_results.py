"""The output folder of a run, and what is printed while it trains."""

import errno
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import train_cifar
from parity_tests.test_training_data import message
from train_cifar import Trainer
from training.config import Config
from training.progress import ProgressBar
from training.results import Results, new_folder


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_second_run_has_a_second_folder():
    folders = [new_folder(None, Path("runs/name")) for _ in range(3)]
    assert folders == [Path("runs/name"), Path("runs/name-2"), Path("runs/name-3")]


def test_results_are_never_overwritten():
    here = Path("here")
    Results(new_folder(here, Path("unused")), {"seed": 0}, (), tensorboard=False)
    assert message(new_folder, here, Path("unused")) == (
        "The output folder must not hold results already, but here holds config.json, "
        "metrics.jsonl. Choose another folder, move that one away, or omit --output: then a new "
        "folder is made."
    )
    assert json.loads(Path("here/config.json").read_text()) == {"seed": 0}
    assert not Path("unused").exists()


def test_an_output_folder_may_hold_something_else():
    Path("here").mkdir()
    Path("here/notes.txt").write_text("mine")
    assert new_folder(Path("here"), Path("unused")) == Path("here")
    assert Path("here/notes.txt").read_text() == "mine"


def test_the_output_is_a_folder():
    Path("here").write_text("mine")
    assert message(new_folder, Path("here"), Path("unused")) == (
        "The output must be a folder, but here is a file. Choose another."
    )


@pytest.mark.parametrize("output", ["", "."])
def test_the_output_is_not_the_current_folder(output):
    assert message(train_cifar.main, Config(output=Path(output))) == (
        "The output must be a folder of its own, but it is the current folder or has an empty "
        "name. Choose another --output, or omit it: then a new folder is made."
    )
    assert list(Path().iterdir()) == []


def no_compilation(*args):
    pytest.fail("compiled")


def test_a_folder_that_cannot_be_made(monkeypatch):
    monkeypatch.setattr(Trainer, "step", property(no_compilation))
    Path("afile").write_text("mine")
    assert message(train_cifar.main, Config(output=Path("afile/sub"), devices=1)) == (
        "Cannot write to afile/sub: Not a directory. Choose another --output."
    )
    Path("runs").write_text("mine")
    assert message(train_cifar.main, Config()) == (
        "Cannot write to runs/digits-bcn-ws-batch32-seed0: File exists. Choose another --output."
    )


def test_a_folder_that_cannot_be_written_to_is_reported_before_compilation(monkeypatch):
    def refuse(path, text):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Trainer, "step", property(no_compilation))
    monkeypatch.setattr(Path, "write_text", refuse)  # the superuser may write everywhere
    assert message(train_cifar.main, Config(output=Path("here"), devices=1)) == (
        "Cannot write to here: Permission denied. Choose another --output."
    )


def metrics(epoch):
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "images_per_second")
    return {"epoch": epoch, **dict.fromkeys(names, 0.25)}


def test_a_disk_that_fills_up_in_training():
    results = Results(new_folder(Path("here"), Path("unused")), {}, (), tensorboard=False)
    Path("here/metrics.jsonl").unlink()
    Path("here/metrics.jsonl").symlink_to("/dev/full")
    kept = " The last good checkpoint is kept: there."
    assert message(results.add, metrics(1), lambda: kept) == (
        f"Cannot write to here: No space left on device.{kept} Check the free space and the "
        "permissions of the folder, then start again with --resume --output here"
    )


def test_a_compilation_that_fails_leaves_the_configuration(monkeypatch, small):
    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "step", property(fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        train_cifar.main(Config(output=Path("here"), devices=1))
    assert "config.json" in [path.name for path in Path("here").iterdir()]


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_run_cut_short_keeps_its_metrics(epochs):
    results = Results(new_folder(Path("here"), Path("unused")), {}, (), tensorboard=False)

    rows = [metrics(epoch) for epoch in range(1, epochs + 1)]

    def interrupted():
        with results:
            for row in rows:
                results.add(row)
                lines = Path("here/metrics.jsonl").read_text().splitlines()
                assert [json.loads(line) for line in lines] == rows[: len(lines)]
                assert len(lines) == row["epoch"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Path("here/curves.png").exists() == (epochs > 0)


def test_curves_that_cannot_be_drawn_do_not_hide_why_training_failed():
    def fail(*errors):
        with Results(new_folder(Path("here"), Path("unused")), {}, (), tensorboard=False) as run:
            Path("here/curves.png").symlink_to("/dev/full")
            run.history.append(metrics(1))
            for error in errors:
                raise error

    assert message(fail).startswith("Cannot write to here: No space left on device.")
    Path("here").rename("there")
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError)


def test_tensorboard_gets_the_same_numbers():
    with Results(new_folder(Path("here"), Path("unused")), {}, (), tensorboard=True) as results:
        results.add(metrics(1))
    (events,) = Path("here").glob("events.out.tfevents.*")
    assert b"train_loss" in events.read_bytes()
    assert np.float32(0.25).tobytes() in events.read_bytes()


def test_without_a_terminal_there_are_plain_lines_within_epochs(capsys):
    with ProgressBar(1500, 2, 4, line_interval=0) as progress:
        for step in 1234, 1500, 1501, 3000:
            progress.show(step, 1.23456e18, 0.125)
    assert [
        re.sub(r"[\d,]+ images", "N images", line) for line in capsys.readouterr().out.splitlines()
    ] == [
        "epoch 1: 1,234 of 1,500 steps, loss 1.235e+18, accuracy 12.50%, N images/s",
        "epoch 2: 1 of 1,500 steps, loss 1.235e+18, accuracy 12.50%, N images/s",
    ]


def test_there_are_few_plain_lines(capsys):
    with ProgressBar(1500, 1, 4, line_interval=math.inf) as progress:
        progress.show(1, 1.0, 0.125)
    assert capsys.readouterr().out == ""
