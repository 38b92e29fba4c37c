"""The training script does what its help says."""

import dataclasses
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import linen as nn

import train_cifar
from bcn_flax import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import VGG, ResNet
from parity_tests.small_runs import small_networks
from parity_tests.test_training_data import message, write_cifar10
from parity_tests.test_training_step import in_pairs
from train_cifar import State, Trainer
from training import TrainingError, data
from training import config as configuration
from training.checkpoints import Checkpoints
from training.config import Config, Recipe
from training.devices import Placement

ROOT = Path(train_cifar.__file__).parent
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compiled_once):
    """Two runs alike: their folder, the metrics of their last epochs, the traces, the saves."""
    folder = tmp_path_factory.mktemp("runs")
    traces, saves = [], []
    shift, save = data.random_shift, Checkpoints.save
    with pytest.MonkeyPatch.context() as patch, small_networks(draw=True):
        patch.chdir(folder)
        patch.setattr(data, "random_shift", lambda *args: traces.append(1) or shift(*args))
        patch.setattr(Checkpoints, "save", lambda *args: saves.append(args[1]) or save(*args))
        metrics = [
            train_cifar.main(Config(devices=1, checkpoint_every=steps)) for steps in (1000, 4)
        ]
    return folder / "runs", metrics, len(traces), saves


def trainer_of(images=None, **options):
    """The trainer for these options, on one device."""
    config = Config(**options)
    recipe = configuration.resolve(config)
    return Trainer(config, recipe, images or data.digits(), Placement(1, recipe.micro_batch))


def few_steps(trainer, steps=3):
    """The state after a few steps, on the host, and their average loss."""
    state = jax.tree.map(jnp.copy, trainer.first_state)  # each step donates its state
    train = jax.device_put(data.digits().train)
    for _ in range(steps):
        state = trainer.step(state, train)
    loss, _ = state.totals.means()
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), loss


# A run from end to end


def test_a_run_leaves_its_results(runs):
    folder, (last, _), *_ = runs
    folder = folder / "digits-bcn-ws-batch32-seed0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[-1] == last
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["test_loss"] < rows[0]["test_loss"]
    config = json.loads((folder / "config.json").read_text())
    assert config["batch_size"] == 32  # resolved: no None is left where a recipe decides
    assert config["blocks"] == [[8]]
    names = {f.name for c in (Config, Recipe) for f in dataclasses.fields(c)}
    assert config.keys() == names | {"classes", "images"}
    assert matplotlib.image.imread(folder / "curves.png").ndim == 3


def test_the_same_seed_gives_the_same_metrics_in_another_folder(runs):
    folder, (one, same), *_ = runs
    assert all(one[name] == same[name] for name in one.keys() - TIMES)
    name = "digits-bcn-ws-batch32-seed0"
    assert sorted(path.name for path in folder.iterdir()) == [name, f"{name}-2"]


def test_the_step_is_traced_once_in_a_run(runs):
    _, metrics, traces, _ = runs
    assert traces == len(metrics)


def test_checkpoints_are_saved_after_so_many_steps_and_after_each_epoch(runs):
    *_, saves = runs
    assert saves == [*(6, 12), *(4, 6, 8, 12, 12)]


def test_cifar10_from_end_to_end(small, tmp_path, capsys):
    write_cifar10(tmp_path / "cifar", records=4)
    config = Config(
        dataset="cifar10", data_dir=tmp_path / "cifar", batch_size=8, epochs=1, devices=1
    )
    config = dataclasses.replace(config, output=Path("here"), tensorboard=True)
    last = train_cifar.main(config)
    assert Path("here/metrics.jsonl").exists()
    assert len([*Path("here").glob("events.out.tfevents.*")]) == 1
    printed = capsys.readouterr().out.splitlines()
    again = train_cifar.main(dataclasses.replace(config, eval_only=True))
    assert again == {name: last[name] for name in ("test_loss", "test_accuracy")} | {"step": 2}
    assert "20 training and 4 held-out images" in printed
    assert any(re.fullmatch(r"compiled 4 programs in [\d.]+ s", line) for line in printed)
    assert printed[-2].split()[0] == "1"
    assert re.fullmatch(
        r"[\d,]+ parameters, [\d,]+ images/s, [\d,]+ MiB of memory; results in here", printed[-1]
    )


# Reproducibility


def test_the_seed_decides_every_bit_of_the_state(small):
    (one, loss), (same, same_loss), (other, _) = (few_steps(trainer_of(seed=s)) for s in (0, 0, 1))
    assert loss == same_loss
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.params["fc"]["kernel"] != other.params["fc"]["kernel"]).all()
    assert (one.key != other.key).any()


NOT_FINITE = (
    "Loss and weights must stay finite, but by step 7 {}, so training stopped. Lower the learning "
    "rate, which is 0.002{}. The last good checkpoint is kept: there."
)


@pytest.mark.parametrize(("norm", "more"), [("bcn", ""), ("none", ", or use a norm")])
@pytest.mark.parametrize(
    ("loss", "weight", "found"),
    [
        (1.0, 1.0, None),
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (1.0, math.nan, "some weights are not"),
        (1.0, -math.inf, "some weights are not"),
    ],
)
def test_what_is_not_finite_is_reported(norm, more, loss, weight, found):
    config = Config(norm=norm)
    params = {"first": jnp.ones(2), "last": jnp.array([1.0, weight])}
    totals = train_cifar.no_totals()._replace(loss=jnp.float32(loss))
    state = State(params, {}, (), step=7, key=None, order=None, totals=totals)
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.recipe = config, configuration.resolve(config)
    trainer.is_finite = train_cifar.is_finite
    checkpoints = SimpleNamespace(kept=lambda: " The last good checkpoint is kept: there.")
    if found is None:
        trainer._require_finite(state, checkpoints)
    else:
        assert message(trainer._require_finite, state, checkpoints) == NOT_FINITE.format(
            found, more
        )


def test_a_run_that_is_not_finite_stops_and_is_not_saved(small):
    config = Config(norm="none", ws=False, optimizer="sgd", learning_rate=1e38, devices=1)
    text = message(train_cifar.main, dataclasses.replace(config, output=Path("here")))
    assert text.startswith("Loss and weights must stay finite, but by step 6 ")
    assert not (Path("here") / "metrics.jsonl").read_text()
    assert not [*Path("here/checkpoints").glob("save_*")]


# The network

NETWORK_OPTIONS = {
    "norm": ("bcn", "bn", "gn", "none"),
    "network": ("vgg", "resnet"),
    "dataset": ("digits", "cifar10", "cifar100"),
    "depth": (20, 32),
    "ws": (True, False),
    "estimate": (True, False),
    "groups": (None, 4),
    "norm_momentum": (None, 0.5),
    "dtype": ("float32", "bfloat16"),
    "batch_size": (None, 16),
}
PUBLISHED = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


def norm_of(dataset, network, norm, estimate, groups, norm_momentum, batch_size):
    """The class and the arguments of the norm that the help promises."""
    digits = dataset == "digits"
    groups = groups or (8 if network == "resnet" else 16 if digits else 32)
    momentum, size = (0.95, 32) if digits else (0.9, 64)
    momentum = norm_momentum or momentum ** ((batch_size or size) / size)
    return {
        "bcn": (
            BatchChannelNorm,
            {"num_groups": groups, "estimate": estimate, "momentum": pytest.approx(momentum)},
        ),
        "bn": (BatchNorm, {"momentum": pytest.approx(momentum)}),
        "gn": (nn.GroupNorm, {"num_groups": groups, "epsilon": 1e-5}),
        "none": None,
    }[norm]


@pytest.mark.parametrize("options", in_pairs(NETWORK_OPTIONS), ids=str)
def test_the_network_has_the_layers_asked_for(options):
    config = Config(**options)
    model = train_cifar.make_model(config, configuration.resolve(config), 7)
    shared = {
        "num_classes": 7,
        "conv": WSConv if config.ws else nn.Conv,
        "norm": None,
        "dtype": jnp.dtype(config.dtype),
    }
    blocks = ((32, 32), (64, 64)) if config.dataset == "digits" else PUBLISHED
    resnet = config.network == "resnet"
    expected = ResNet(config.depth, **shared) if resnet else VGG(blocks, **shared)
    assert model.clone(norm=None) == expected
    names = "dataset", "network", "norm", "estimate", "groups", "norm_momentum", "batch_size"
    norm = model.norm and (model.norm.func, model.norm.keywords)
    assert norm == norm_of(**{name: options[name] for name in names})


def test_the_default_folder_is_named_after_the_network_and_the_batch():
    for options, name in (
        ({"network": "resnet", "depth": 32, "norm": "gn"}, "digits-resnet32-gn-ws-batch32-seed0"),
        ({"norm": "none", "ws": False, "micro_batch": 4, "seed": 7}, "digits-none-batch32x4-seed7"),
    ):
        config = Config(**options)
        folder = configuration.default_folder(config, configuration.resolve(config))
        assert folder == Path("runs") / name


# Evaluation


def test_evaluation_counts_each_held_out_image_once_and_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(train_cifar, "EVALUATION_BATCH", 64)  # does not divide 200
    trainer, test = trainer_of(), data.digits().test
    state = trainer.first_state
    before = jax.device_get((state.params, state.batch_stats))
    loss, accuracy = trainer.test(state)

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    config = Config()
    model = train_cifar.make_model(config, configuration.resolve(config), 10)
    apply = jax.jit(model.apply, static_argnames="train")
    logits = apply(variables, data.to_float(test.images), train=False)
    log_probability = np.asarray(jax.nn.log_softmax(logits), np.float64)
    np.testing.assert_allclose(loss, -log_probability[range(200), test.labels].mean(), rtol=1e-5)
    assert accuracy == (np.argmax(logits, -1) == test.labels).sum() / 200
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.batch_stats))


# The command line


def test_an_error_is_a_message_and_not_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", "--batch-size", "0"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(train_cifar.__file__, run_name="__main__")
    assert caught.value.code == (
        "train_cifar.py: batch_size must be a whole number and at least 1, but batch_size=0. "
        "Omit it for the default."
    )
    assert capsys.readouterr().out == ""


INTERRUPTIBLE = """
import dataclasses, runpy, signal
from training.config import RECIPES
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is off
digits = RECIPES["digits"]
RECIPES["digits"] = dataclasses.replace(digits, blocks=((8,),), groups=4)
runpy.run_path("train_cifar.py", run_name="__main__")
"""


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    folder = tmp_path / "here"
    options = ["--epochs", "1000000", "--output", str(folder)]
    words = [sys.executable, "-W", "error", "-c", INTERRUPTIBLE, *options]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_DEFAULT_PRNG_IMPL": "rbg"},
    ) as run:
        printed = next((line for line in run.stdout if line.startswith("    1  ")), None)
        run.send_signal(signal.SIGINT)
        try:
            _, errors = run.communicate(timeout=120)
        finally:
            run.kill()
    assert printed, errors
    assert re.fullmatch(
        r"train_cifar.py: stopped by SIGINT in epoch \d+\. Nothing is lost: resume with the same "
        rf"arguments and --resume --output {re.escape(str(folder))}\n",
        errors,
    )
    assert run.returncode == 130
    names = ["checkpoints", "config.json", "curves.png", "metrics.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError("Not so.")])
def test_how_the_command_ends(monkeypatch, error):
    def fail(config):
        raise error

    monkeypatch.setattr(train_cifar, "main", fail)
    monkeypatch.setattr(sys, "argv", ["train_cifar.py"])
    with pytest.raises(SystemExit) as caught:
        train_cifar.command_line()
    assert caught.value.code == (130 if error is KeyboardInterrupt else "train_cifar.py: Not so.")


# What the script promises


@pytest.mark.slow
def test_digits_one_at_a_time():
    assert train_cifar.main(Config(batch_size=1, epochs=4, devices=1))["test_accuracy"] > 0.95
