"""Recipes, the command line and its help, and which values are refused."""

import dataclasses
import inspect
import math
import sys
from pathlib import Path

import pytest
import tyro

import train_cifar
from parity_tests import test_training_compilation as compilation
from parity_tests import test_training_devices as devices
from parity_tests import test_training_resume as resume
from parity_tests import test_training_script as script
from parity_tests import test_training_step as step
from parity_tests.test_training_data import message
from training import config as configuration
from training.config import RECIPES, Config, Recipe


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_cifar10_is_trained_as_published():
    recipe = configuration.resolve(Config(dataset="cifar10"))
    assert recipe == Recipe(
        blocks=((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
        shift=4,
        flip=True,
        groups=32,
        batch_size=64,
        micro_batch=64,
        epochs=10,
        schedule="constant",
        learning_rate=2.5e-4,
        norm_momentum=0.9,
    )
    assert Config().optimizer == "adam"


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_smaller_batches_take_smaller_steps_and_longer_averages(dataset):
    own = configuration.resolve(Config(dataset=dataset))
    one = configuration.resolve(Config(dataset=dataset, batch_size=1))
    assert one.learning_rate == pytest.approx(own.learning_rate / own.batch_size**0.5)
    assert one.norm_momentum**own.batch_size == pytest.approx(own.norm_momentum)
    sgd = Config(dataset=dataset, optimizer="sgd")
    rates = [
        configuration.resolve(dataclasses.replace(sgd, batch_size=n)).learning_rate for n in (1, 8)
    ]
    assert rates[1] == pytest.approx(8 * rates[0])


def test_averages_look_as_far_back_with_micro_batches():
    recipe = configuration.resolve(Config(micro_batch=4))
    assert recipe.norm_momentum**8 == pytest.approx(0.95)
    assert recipe.learning_rate == configuration.resolve(Config()).learning_rate
    assert (recipe.micro_batches, recipe.steps(100)) == (8, 24)


def test_the_command_line_wins():
    said = {
        "groups": 4,
        "norm_momentum": 0.0,
        "batch_size": 7,
        "epochs": 3,
        "learning_rate": 0.5,
        "schedule": "constant",
    }
    words = [w for name, v in said.items() for w in (f"--{name.replace('_', '-')}", str(v))]
    config = tyro.cli(Config, args=["--norm", "gn", "--no-ws", "--optimizer", "sgd", *words])
    assert (config.norm, config.ws, config.optimizer) == ("gn", False, "sgd")
    assert said.items() <= dataclasses.asdict(configuration.resolve(config)).items()


# The tests of the options that decide neither the network nor a step.
ELSEWHERE = {
    "data_dir": script.test_cifar10_from_end_to_end,
    "output": script.test_cifar10_from_end_to_end,
    "resume": resume.test_resuming_without_a_run_starts_one,
    "checkpoint_every": script.runs,
    "eval_only": resume.test_the_last_and_the_best_checkpoint_are_evaluated,
    "predict": resume.test_a_picture_is_classified_as_in_training,
    "distributed": devices.test_processes_that_cannot_be_found_are_reported,
    "coordinator": devices.test_each_process_is_told_where_it_belongs,
    "num_processes": devices.test_each_process_is_told_where_it_belongs,
    "process_id": devices.test_each_process_is_told_where_it_belongs,
    "compilation_cache": compilation.test_without_the_cache_nothing_is_kept,
    "tensorboard": script.test_cifar10_from_end_to_end,
}


def test_every_option_is_in_a_test():
    options = {field.name for field in dataclasses.fields(Config)}
    assert options == {*step.OPTIONS, *script.NETWORK_OPTIONS, *ELSEWHERE}
    for name, test in ELSEWHERE.items():
        assert f"{name}=" in inspect.getsource(test)


DEFAULT = "Omit it for the default."


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dataset": "mnist"},
            "dataset must be one of digits, cifar10, cifar100, but dataset='mnist'.",
        ),
        ({"network": "lenet"}, "network must be one of vgg, resnet, but network='lenet'."),
        (
            {"network": "resnet", "depth": 21},
            "depth must be 6 n + 2 for a whole n from 1 on, but depth=21. Published are 20, 32, "
            "44, 56 and 110.",
        ),
        (
            {"micro_batch": 5},
            "micro_batch must be a divisor of batch_size=32, but micro_batch=5.",
        ),
        (
            {"label_smoothing": 1.0},
            "label_smoothing must be at least 0 and less than 1, but label_smoothing=1.0.",
        ),
        (
            {"weight_decay": -1.0},
            "weight_decay must be at least 0 and finite, but weight_decay=-1.0.",
        ),
        (
            {"devices": 9},
            "devices must be from 1 to 8, the number that JAX sees, but devices=9.",
        ),
        (
            {"batch_size": 4},
            "Micro-batches must be a multiple of the devices, but they have 4 images and there are "
            "8 devices. Use fewer with --devices, or change --batch-size or --micro-batch.",
        ),
        (
            {"batch_size": 12},
            "Micro-batches must be a multiple of the devices, but they have 12 images and there "
            "are 8 devices. Use fewer with --devices, or change --batch-size or --micro-batch.",
        ),
        ({"norm": "ln"}, "norm must be one of bcn, bn, gn, none, but norm='ln'."),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, but optimizer='lion'."),
        (
            {"schedule": "linear"},
            "schedule must be one of constant, cosine, step, but schedule='linear'.",
        ),
        ({"seed": -1}, "seed must be from 0 to 4294967295, but seed=-1."),
        (
            {"batch_size": 0},
            "batch_size must be a whole number and at least 1, but batch_size=0. " + DEFAULT,
        ),
        (
            {"epochs": 0},
            "epochs must be a whole number and at least 1, but epochs=0. " + DEFAULT,
        ),
        (
            {"learning_rate": 0.0},
            "learning_rate must be positive and finite, but learning_rate=0.0. " + DEFAULT,
        ),
        (
            {"learning_rate": math.nan},
            "learning_rate must be positive and finite, but learning_rate=nan. " + DEFAULT,
        ),
        (
            {"norm_momentum": 1.0},
            "norm_momentum must be at least 0 and less than 1, but norm_momentum=1.0. It is the "
            "weight of the old running average: a PyTorch momentum m is 1 - m here.",
        ),
        (
            {"groups": 12},
            "groups must be a divisor of the channels of every layer, which are 32, 64, but "
            "groups=12. Use one of 1, 2, 4, 8, 16, 32.",
        ),
        (
            {"groups": 0, "norm": "gn"},
            "groups must be a whole number and at least 1, but groups=0. " + DEFAULT,
        ),
        (
            {"batch_size": 1440},
            "batch_size must be at most the number of training images, 1437, but batch_size=1440.",
        ),
    ],
    ids=str,
)
def test_bad_values(options, text):
    assert message(train_cifar.main, Config(**options)) == text
    assert not Path("runs").exists()


def test_groups_are_not_checked_for_norms_without_groups():
    assert configuration.resolve(Config(norm="bn", groups=12)).groups == 12


def help_text(capsys, monkeypatch):
    """What `--help` prints, without the frame, as one line."""
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        train_cifar.command_line()
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_has_every_option_and_the_examples(capsys, monkeypatch):
    text = help_text(capsys, monkeypatch)
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert 'pip install -e ".[train]" python train_cifar.py # 8x8 digits' in text
    assert "Held-out accuracy" not in text


def test_help_says_the_defaults_of_each_data_set(capsys, monkeypatch):
    text = help_text(capsys, monkeypatch)
    digits, cifar10 = (RECIPES[name] for name in ("digits", "cifar10"))
    for name in "groups", "batch_size", "epochs", "schedule":
        values = getattr(digits, name), getattr(cifar10, name)
        assert "by default {} for digits, {} for cifar10 and cifar100".format(*values) in text
    sizes = digits.batch_size, cifar10.batch_size
    for name in "norm_momentum", "learning_rate":
        for dataset, size in zip(("digits", "cifar10"), sizes, strict=True):
            value = getattr(RECIPES[dataset], name)
            both = dataset.replace("cifar10", "cifar10 and cifar100")
            assert f"{value} for {both} at {'batch size ' * (size == 32)}{size}" in text
    sgd = [
        configuration.resolve(Config(dataset=name, optimizer="sgd")).learning_rate
        for name in ("digits", "cifar10")
    ]
    assert f"with SGD, {sgd[0]} at batch size {sizes[0]}, {sgd[1]} at {sizes[1]}" in text
