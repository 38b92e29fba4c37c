"""What goes wrong in a run ends it in a line, costs nothing that was saved, and is resumed."""

import dataclasses
import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure

import train_cifar
from parity_tests.test_training_data import message
from parity_tests.test_training_resume import assert_same, config, outcome, whole
from training import checkpoints, progress
from training.config import Config
from training.results import Results

__all__ = ["whole"]  # a fixture

pytestmark = pytest.mark.usefixtures("small")


def fill(monkeypatch, folder):
    """Let nothing more be written."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics = folder / "metrics.jsonl"
    before = metrics.read_bytes()
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    monkeypatch.setattr(checkpoints, "_make_room", full)
    monkeypatch.setattr(Figure, "savefig", full)
    return before


def in_epoch(number, monkeypatch, action):
    add = Results.add

    def add_and_act(self, row, *args):
        if row["epoch"] == number:
            action()
        add(self, row, *args)

    monkeypatch.setattr(Results, "add", add_and_act)


KEPT = "The last good checkpoint is kept: {folder}/checkpoints/save_{number} (step {step})."


@pytest.mark.parametrize("metrics", [True, False])
def test_a_run_on_a_disk_that_fills_up_is_resumed_bit_for_bit(
    monkeypatch, whole, capfd, tmp_path, metrics
):
    folder = Path("run")
    with monkeypatch.context() as patch:

        def act():
            fill(patch, folder)
            if not metrics:  # only a checkpoint is too large
                (folder / "metrics.jsonl").unlink()

        in_epoch(2, patch, act)
        text = message(train_cifar.main, config(folder))
    kept = KEPT.format(folder=tmp_path / folder, number=0, step=12)
    assert text == (
        f"Cannot write to run: No space left on device. {kept} Check the free space and the "
        "permissions of the folder, then start again with --resume --output run"
        if metrics
        else f"Cannot write checkpoints to {tmp_path}/run/checkpoints: [Errno 28] No space left on "
        f"device. {kept} Check the free space and the permissions of the folder, then start again."
    )
    assert capfd.readouterr().err == ""
    train_cifar.main(config(folder, resume=True))
    assert_same(outcome(folder), whole[1])


def test_a_folder_that_vanishes_is_reported_in_a_line(monkeypatch, capfd):
    in_epoch(2, monkeypatch, lambda: shutil.rmtree("run"))
    assert message(train_cifar.main, config("run")) == (
        "Cannot write to run: No such file or directory. Check the free space and the permissions "
        "of the folder, then start again with --resume --output run"
    )
    assert capfd.readouterr().err == ""


def test_checkpoints_that_vanish_are_not_called_kept(monkeypatch, capfd, tmp_path):
    in_epoch(2, monkeypatch, lambda: shutil.rmtree("run/checkpoints"))
    folder = tmp_path / "run" / "checkpoints"
    assert message(train_cifar.main, config("run")) == (
        f"Cannot write checkpoints to {folder}: [Errno 2] No such file or directory: "
        f"'{folder}/saving'. Check the free space and the permissions of the folder, then start "
        "again."
    )
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("1", "7"),
        lambda text: "[]\n{\n" + text,
        lambda text: "",
    ],
)
def test_edited_metrics_are_restored(whole, damage):
    folder = Path(shutil.copytree(whole[0], "run"))
    path = folder / "metrics.jsonl"
    path.write_text(damage(path.read_text()))
    train_cifar.main(config(folder, resume=True))
    assert_same(outcome(folder), whole[1])


EDITS = {
    "[]": "it must be an object, but is []",
    "3": "it must be an object, but is 3",
    "": "Expecting value: line 1 column 1 (char 0)",
    "[" * 100_000: "maximum recursion depth exceeded",
    '"seed": "one"': "seed is 'one'",
    '"seed": true': "seed is True",
    '"seed": -1': "seed must be from 0 to 4294967295, but seed=-1",
    '"norm": "bnn"': "norm is 'bnn'",
    '"norm": ["bn"]': "norm is ['bn']",
    '"ws": 1': "ws is 1",
    '"learning_rate": null': "learning_rate must be",
    '"learning_rate": NaN': "learning_rate must be positive and finite, but learning_rate=nan",
    '"batch_size": 0.5': "batch_size is 0.5",
    '"blocks": [[9]]': "blocks must be [[8]], but is [[9]]",
    '"images": [200, 9, 9, 1]': "images must be a number and (8, 8, 1), but is [200, 9, 9, 1]",
    '"classes": "0123456789"': "classes must be 10 names, but is '0123456789'",
    '"classes": ["0"]': "classes must be 10 names, but is ['0']",
    "-dtype": "dtype is 'absent'",
    "-shift": "shift must be 1, but is 'absent'",
    "-classes": "classes must be 10 names, but is 'absent'",
}


@pytest.mark.parametrize(("edit", "reason"), EDITS.items(), ids=[edit[:30] for edit in EDITS])
def test_an_edited_configuration_is_refused_by_its_field(whole, edit, reason):
    folder = Path("run")
    folder.mkdir()
    settings = json.loads((whole[0] / "config.json").read_text())
    if edit.startswith("-"):
        del settings[edit[1:]]
    elif edit.startswith('"'):
        settings |= json.loads(f"{{{edit}}}")
    (folder / "config.json").write_text(
        json.dumps(settings) if edit.startswith(('"', "-")) else edit
    )
    text = message(train_cifar.main, Config(output=folder, predict=Path("none.png")))
    assert text.startswith("Cannot read run/config.json, which holds the settings of the run: ")
    assert reason in text
    assert text.endswith(". Restore it, or start a new run with another --output.")
    assert "\n" not in text
    if edit != '"ws": 1':  # which is true
        assert "run" in message(train_cifar.main, config(folder, resume=True))


def test_a_run_killed_before_its_first_file_is_started_again():
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/.lock").touch()
    Path("run/config.json.draft").touch()
    one = dataclasses.replace(config("run"), epochs=1)
    assert train_cifar.main(dataclasses.replace(one, resume=True))["epoch"] == 1
    text = message(train_cifar.main, one)
    assert "holds config.json, metrics.jsonl, curves.png, checkpoints." in text


# Folders

NAMES = ("Zürich 中文 🙂 {0}", "- b#c%20d?e$f_{$", "n" * 255)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folder_may_have_any_name(name):
    folder = Path("link") / name
    Path("place").mkdir()
    Path("link").symlink_to("place")
    one = dataclasses.replace(config(folder), epochs=1)
    last = train_cifar.main(one)
    assert train_cifar.main(dataclasses.replace(one, resume=True)) == last
    names = {"checkpoints", "config.json", "curves.png", "metrics.jsonl"}
    assert {path.name for path in (Path("place") / name).iterdir()} == names


@pytest.mark.parametrize("name", ["a\\b", "\udcff"], ids=ascii)
def test_a_folder_that_tensorstore_would_confuse_with_another_is_refused(name):
    assert message(train_cifar.main, config(name)) == (
        "The path of checkpoints must be Unicode without backslashes, but is "
        f"{str(Path(name).absolute() / 'checkpoints')!a}. Choose another folder."
    )
    assert {path.name for path in Path().iterdir()} == {name}


def test_folders_that_cannot_be(monkeypatch):
    Path("nowhere").symlink_to("absent")
    Path("circle").symlink_to("circle")
    for name, reason in (
        ("n" * 256, "File name too long"),
        ("nowhere", "File exists"),
        ("circle", "File exists"),
    ):
        for options in {}, {"resume": True}:
            text = message(train_cifar.main, config(name, **options))
            assert text == f"Cannot write to {name}: {reason}. Choose another --output."
    text = message(train_cifar.main, config("n" * 256, eval_only=True))
    assert text == f"Cannot write to {'n' * 256}: File name too long. Choose another --output."


# Where the output goes


def printing(stream, monkeypatch, text="something"):
    """How a program ends that prints to this stream."""
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as caught, progress.plain_errors("name"):
        print(text)
    return caught.value.code


def test_printing_to_a_full_disk_ends_in_a_line(monkeypatch):
    with open("/dev/full", "w") as full:
        assert printing(full, monkeypatch) == (
            "name: Cannot print: No space left on device. Print to another file."
        )
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train_cifar.py", "--help"])
        patch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match=r"train_cifar\.py: Cannot print: No space left"):
            runpy.run_path(train_cifar.__file__, run_name="__main__")


def test_printing_to_a_program_that_has_ended_is_silent(monkeypatch):
    for text in "something", "something\n" * 100_000:
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "w") as pipe:
            assert printing(pipe, monkeypatch, text) == 128 + signal.SIGPIPE


def test_names_are_printed_in_any_encoding(monkeypatch):
    with open("out", "w", encoding="ascii") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        with progress.plain_errors("name"):
            print("Zürich \udcff")
        assert sys.stdout is out
    assert Path("out").read_text() == "Z\\xfcrich \\udcff\n"


def test_printing_to_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with progress.plain_errors("name"):
        print("something")
    sys.stdout.close()


def test_ctrl_c_in_the_first_seconds_ends_without_a_traceback():
    words = [sys.executable, "-X", "importtime", train_cifar.__file__, "--output", "run"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd="/") as run:
        for line in run.stderr:  # jax is imported long before the end
            if line.endswith(" jax.version\n"):
                run.send_signal(signal.SIGINT)
                break
        _, errors = run.communicate(timeout=60)
    assert run.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    assert all(line.startswith("import time:") for line in errors.splitlines())


# Devices and processes


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"process_id": 1},
            "num_processes and process_id need a coordinator, but there is none and process_id=1.",
        ),
        (
            {"process_id": 0, "num_processes": 2, "distributed": True},
            "num_processes and process_id need a coordinator, but there is none and "
            "num_processes=2, process_id=0.",
        ),
        ({"coordinator": "nonsense"}, "The coordinator must be HOST:PORT, but coordinator="),
        ({"coordinator": ""}, "The coordinator must be HOST:PORT, but coordinator=''."),
        ({"coordinator": ":1234"}, "The coordinator must be HOST:PORT, but coordinator=':1234'."),
        ({"coordinator": "here:http"}, "The coordinator must be HOST:PORT"),
        ({"coordinator": "here:65536"}, "The coordinator must be HOST:PORT"),
        ({"coordinator": "a..b:1"}, "The coordinator's host must be known, but a..b is not: "),
        ({"coordinator": "no.invalid:1"}, "The coordinator's host must be known, but no.invalid"),
        (
            {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 2},
            "process_id must be from 0 to num_processes - 1, but process_id=2 and num_processes=2.",
        ),
        (
            {"coordinator": "127.0.0.1:1", "num_processes": 0},
            "process_id must be from 0 to num_processes - 1, but process_id=None and num_proc",
        ),
    ],
    ids=str,
)
def test_processes_that_contradict_each_other_are_refused(monkeypatch, options, text):
    monkeypatch.setattr(jax.distributed, "initialize", partial(pytest.fail, "connected"))
    assert message(train_cifar.main, Config(**options)).startswith(text)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unknown backend 'x':\nno plugin. (see this)"), "Unknown backend 'x': no"),
        (AssertionError(), "none of the platforms is installed. Set"),
    ],
)
def test_a_platform_that_jax_does_not_know_is_reported_in_a_line(monkeypatch, error, reason):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    text = message(train_cifar.main, Config())
    assert text.startswith(f"JAX finds no devices: {reason}")
    assert text.endswith("to cpu, cuda or tpu, or unset it.")
