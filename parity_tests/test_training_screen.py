"""What a run shows: what differs from the defaults, what it is waiting for, and how far it is."""

import os
import pty
import re
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console

import train_cifar
from parity_tests.test_training_resume import SMALL, config, whole
from training import progress
from training.config import Config, describe, resolve
from training.progress import ProgressBar

__all__ = ["whole"]  # a fixture


def lines(**options):
    chosen = Config(**options)
    return [
        re.sub(r"and \d+ more", "and N more", line) for line in describe(chosen, resolve(chosen))
    ]


def test_what_differs_from_the_defaults_comes_first_and_the_rest_is_one_line():
    assert lines() == [
        "by default: dataset=digits, network=vgg, norm=bcn, ws=True, batch_size=32, epochs=15, "
        "optimizer=adam, learning_rate=0.002 and N more, all in config.json"
    ]
    assert lines(batch_size=8, ws=False) == [
        "                ws  False (default True)",
        "     norm_momentum  0.9873 (default 0.95)",
        "        batch_size  8 (default 32)",
        "       micro_batch  8 (default 32)",
        "     learning_rate  0.001 (default 0.002)",
        "by default: dataset=digits, network=vgg, norm=bcn, epochs=15, optimizer=adam and N more, "
        "all in config.json",
    ]


def test_the_defaults_are_those_of_the_data_set():
    assert lines(dataset="cifar10")[0] == "           dataset  cifar10 (default digits)"
    assert "batch_size=64, epochs=10" in lines(dataset="cifar10")[-1]
    assert len(lines(dataset="cifar10")) == 2
    # An option that says what is the default anyway is no difference.
    assert lines(batch_size=32, norm="bcn", learning_rate=0.002) == lines()


@pytest.mark.usefixtures("small")
def test_a_run_says_what_it_waits_for_and_a_finished_one_that_nothing_is_left(whole, capsys):
    options = {"epochs": 1, "devices": 1, "micro_batch": 16}
    assert vars(SMALL).items() >= {**options, "epochs": 3}.items()
    train_cifar.main(Config(**options))
    printed = capsys.readouterr().out.splitlines()
    first = printed.index("200 training and 200 held-out images")
    assert printed[first - 1].startswith("by default: ")
    assert printed[first + 1] == "compiling the training step and the evaluation ..."
    assert re.fullmatch(r"compiled 4 programs in [\d.]+ s", printed[first + 2])

    train_cifar.main(config(whole[0], resume=True))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"nothing is left to do: all 3 epochs of {whole[0]} are done"
    assert not [line for line in printed if line.startswith("compil")]


@contextmanager
def terminal(monkeypatch, kind, columns):
    """A terminal, and in the end what a program has sent to it."""
    ours, theirs = pty.openpty()
    shown = []
    with open(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setenv("TERM", kind)
        patch.setenv("COLUMNS", str(columns))
        patch.delenv("NO_COLOR", raising=False)
        yield shown
        stream.flush()
        received = b""
        while b"end" not in received:
            received += os.read(ours, 2**16)
        shown.append(received.decode())
    os.close(ours)


def show():
    with progress.status("compiling"):
        pass
    with ProgressBar(1500, 2, 4, line_interval=0) as bar:
        bar.show(1234, 1.5, 0.125)
    print("end", flush=True)


@pytest.mark.parametrize("columns", [20, 80, 300])
def test_a_terminal_shows_a_bar_that_fits(monkeypatch, columns):
    with terminal(monkeypatch, "xterm", columns) as shown:
        show()
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown[0])
    assert "compiling" in text
    assert "epoch 1:" not in text
    assert "end" in text
    assert max(map(len, re.split(r"[\r\n]+", text))) <= columns


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_without_control_codes_shows_lines(monkeypatch, kind):
    with terminal(monkeypatch, kind, 80) as shown:
        assert not Console().is_interactive
        show()
    assert "\x1b" not in shown[0]
    first, second, last = shown[0].splitlines()
    assert first == "compiling ..."
    assert second.startswith("epoch 1: 1,234 of 1,500 steps, loss 1.5, accuracy 12.50%, ")
    assert last == "end"
