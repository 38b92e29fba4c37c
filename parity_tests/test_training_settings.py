"""A run is resumed with its own settings: an option may change only for a reason."""

import dataclasses
import json
from pathlib import Path

import pytest

import train_cifar
from parity_tests.small_runs import all_digits
from parity_tests.test_training_data import message
from train_cifar import Trainer
from training import data, results
from training.config import FREE, RECIPES, Config, Recipe, resolve, settings_of, with_settings_of

# Another value of each option.
REFUSED = {
    "dataset": "cifar10",
    "seed": 1,
    "network": "resnet",
    "depth": 32,
    "norm": "bn",
    "ws": False,
    "estimate": False,
    "groups": 8,
    "norm_momentum": 0.5,
    "dtype": "bfloat16",
    "batch_size": 16,
    "micro_batch": 8,
    "epochs": 3,
    "optimizer": "sgd",
    "learning_rate": 0.125,
    "schedule": "constant",
    "weight_decay": 0.25,
    "label_smoothing": 0.25,
    "clip_norm": 1.0,
}
ACCEPTED = {
    "data_dir": Path("elsewhere"),
    "output": Path("../here/run"),
    "resume": True,
    "checkpoint_every": 7,
    "eval_only": True,
    "predict": Path("digit.png"),
    "devices": 2,
    "distributed": True,
    "coordinator": "localhost:1",
    "num_processes": 2,
    "process_id": 1,
    "tensorboard": True,
    "compilation_cache": False,
}
# Settings of a recipe that no option changes.
OF_RECIPES = {"blocks": ((16,), (16,)), "shift": 2, "flip": True}
START = Config(output=Path("run"), devices=1)


class StartedError(Exception):
    """Training would begin now."""


def start(*_):
    raise StartedError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a run that has just begun; no program is compiled."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(data, "load", lambda *_: all_digits())
    monkeypatch.setattr(Trainer, "first_state", None)
    monkeypatch.setattr(Trainer, "step", property(start))
    with pytest.raises(StartedError):
        train_cifar.train(START)
    return Path("run")


def resume(**changes):
    train_cifar.train(dataclasses.replace(START, **{"resume": True, **changes}))


def refused(**changes):
    return message(lambda: resume(**changes))


def refusal(changed):
    return (
        f"A run must be resumed with its own settings, but of the run in run {changed}. Use the "
        "same settings, or start a new run with another --output."
    )


def names_of(kind):
    return {field.name for field in dataclasses.fields(kind)}


def test_each_option_may_change_for_a_reason_or_is_refused():
    assert FREE.keys() == ACCEPTED.keys()
    assert FREE.keys() | REFUSED.keys() == names_of(Config)
    assert not FREE.keys() & REFUSED.keys()
    assert all(FREE.values())


def test_a_changed_option_is_refused_unless_it_is_free(folder):
    old = json.loads((folder / "config.json").read_text())
    for name, value in REFUSED.items():
        # The batch size also decides the learning rate, for example, so that more is listed.
        assert f"{name} was {old[name]} and is {value}" in refused(**{name: value})
    for name, value in ACCEPTED.items():
        with pytest.raises(StartedError):
            resume(**{name: value})
        assert value != getattr(START, name)


@pytest.mark.parametrize("name", ["weight_decay", "label_smoothing", "clip_norm", "optimizer"])
def test_only_what_changed_is_listed(folder, name):
    old = json.loads((folder / "config.json").read_text())
    changes = {"learning_rate": 0.002} if name == "optimizer" else {}
    text = refused(**changes, **{name: REFUSED[name]})
    assert text == refusal(f"{name} was {old[name]} and is {REFUSED[name]}")


def test_a_default_given_in_full_is_no_change(folder):
    recipe = dataclasses.asdict(RECIPES["digits"])
    given = {name: recipe[name] for name in names_of(Recipe) & names_of(Config)}
    with pytest.raises(StartedError):
        resume(**given)


def test_a_changed_recipe_is_refused(folder, monkeypatch):
    assert OF_RECIPES.keys() == names_of(Recipe) - names_of(Config)
    for name, value in OF_RECIPES.items():
        changed = dataclasses.replace(RECIPES["digits"], **{name: value})
        with monkeypatch.context() as patch:
            patch.setitem(RECIPES, "digits", changed)
            assert f"of the run in run {name} was " in refused()


def test_changed_data_are_refused(folder, monkeypatch):
    train, test, classes = all_digits()
    for name, other in (
        ("images", data.Dataset(data.Split(*(x[1:] for x in train)), test, classes)),
        ("classes", data.Dataset(train, test, classes[::-1])),
    ):
        monkeypatch.setattr(data, "load", lambda *_, other=other: other)
        assert f"of the run in run {name} was [" in refused()


def test_a_setting_that_the_run_did_not_have_is_refused(folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    del settings["weight_decay"]
    path.write_text(json.dumps(settings))
    assert refused() == refusal("weight_decay was None and is 0.0")


def test_the_settings_of_a_run_but_those_that_are_free(tmp_path):
    config = Config(**REFUSED, **ACCEPTED)
    settings = settings_of(config, resolve(config))
    settings |= {"images": [9, 32, 32, 3], "classes": list("abcdefghij")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    assert with_settings_of(START, path) == (dataclasses.replace(START, **REFUSED), settings)


def test_the_last_of_several_runs_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default, settings = Path("runs/name"), {"seed": 0}
    for _ in range(3):
        made = results.new_folder(None, default)
        results.Results(made, settings, (), tensorboard=False)
    assert results.make_folder(None, default, settings, resume=True) == made
    assert made == Path("runs/name-3")
    assert results.find_run(None, default) == made
    assert results.make_folder(None, default, settings, resume=False) == Path("runs/name-4")
