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

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import linen as nn

import train_cifar
from bcn_flax import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import ResNet
from parity_tests.small_runs import small_networks
from parity_tests.test_training_data import message, write_cifar10
from train_cifar import State, Trainer
from training import TrainingError, data
from training import config as configuration
from training.config import Config, Recipe
from training.data import Split
from training.devices import Placement

ROOT = Path(train_cifar.__file__).parent
KEY = jax.random.key(0)
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, compiled_once):
    """Two runs alike: their folders, the metrics of their last epochs, how often each traced."""
    folder = tmp_path_factory.mktemp("runs")
    traces = []
    shift = data.random_shift
    with pytest.MonkeyPatch.context() as patch, small_networks():
        patch.chdir(folder)
        patch.setattr(data, "random_shift", lambda *args: traces.append(1) or shift(*args))
        metrics = [train_cifar.main(Config(devices=1)) for _ in range(2)]
    return folder / "runs", metrics, len(traces)


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
    folder, (last, _), _ = runs
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
    folder, (one, same), _ = runs
    assert all(one[name] == same[name] for name in one.keys() - TIMES)
    name = "digits-bcn-ws-batch32-seed0"
    assert sorted(path.name for path in folder.iterdir()) == [name, f"{name}-2"]


def test_the_step_is_traced_once_in_a_run(runs):
    _, metrics, traces = runs
    assert traces == len(metrics)


def test_cifar10_from_end_to_end(small, tmp_path, capsys):
    write_cifar10(tmp_path / "cifar", records=4)
    config = Config(
        dataset="cifar10", data_dir=tmp_path / "cifar", batch_size=8, epochs=1, devices=1
    )
    last = train_cifar.main(dataclasses.replace(config, output=Path("here")))
    assert math.isfinite(last["test_loss"])
    assert Path("here/metrics.jsonl").exists()
    printed = capsys.readouterr().out.splitlines()
    assert "20 training and 4 held-out images" in printed
    assert any(re.fullmatch(r"compiled 4 programs in [\d.]+ s", line) for line in printed)
    assert printed[-2].split()[0] == "1"
    assert re.fullmatch(
        r"[\d,]+ parameters, [\d,]+ images/s, [\d,]+ MiB of memory; results in here", printed[-1]
    )


@pytest.mark.parametrize(("dataset", "expected"), [("cifar10", 1), ("digits", 0)])
def test_photographs_are_mirrored_and_digits_are_not(small, monkeypatch, dataset, expected):
    flips = []
    flip = data.random_flip
    monkeypatch.setattr(data, "random_flip", lambda *args: flips.append(1) or flip(*args))
    train = Split(jnp.zeros((8, 8, 8, 3), jnp.uint8), jnp.zeros(8, jnp.int32))

    tiny = data.Dataset(train, train, tuple("0123456789"))
    trainer = trainer_of(tiny, dataset=dataset, batch_size=4)
    _ = trainer.step
    assert len(flips) == expected


# Reproducibility


def test_the_seed_decides_every_bit_of_the_state(small):
    (one, loss), (same, same_loss), (other, _) = (few_steps(trainer_of(seed=s)) for s in (0, 0, 1))
    assert loss == same_loss
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.params["fc"]["kernel"] != other.params["fc"]["kernel"]).all()
    assert (one.key != other.key).any()


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "bcn", "estimate": False},
        {"norm": "bn"},
        {"norm": "gn", "optimizer": "sgd", "schedule": "constant"},
        {"norm": "none", "ws": False},
        {"dtype": "bfloat16", "clip_norm": 1.0, "weight_decay": 0.1, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_every_norm_trains_on_single_images(small, options):
    state, loss = few_steps(trainer_of(batch_size=1, **options))
    assert math.isfinite(loss)
    assert state.step == 3
    assert bool(state.batch_stats) == (options.get("norm", "bcn") in ("bcn", "bn"))


# One epoch


class IndexModel:
    """Notes which images it is trained on: image `i` is a single pixel of value `i`."""

    def __init__(self):
        self.seen = []

    def apply(self, variables, x, train, mutable):
        pixels = jnp.round((x[:, 0, 0, 0] + 1) * 127.5).astype(jnp.int32)
        jax.debug.callback(lambda batch: self.seen.append(batch.tolist()), pixels, ordered=True)
        return variables["params"] * jnp.ones((len(x), 10)), {}


def test_an_epoch_takes_each_image_once_in_a_new_order_and_drops_the_rest():
    n, model = 23, IndexModel()
    config = Config(batch_size=4, optimizer="sgd", learning_rate=0.1, schedule="constant")
    recipe = dataclasses.replace(configuration.resolve(config), shift=0)
    optimizer = train_cifar.make_optimizer(config, recipe, 10)
    images = jnp.arange(n, dtype=jnp.uint8).reshape(n, 1, 1, 1)
    train = Split(images, jnp.zeros(n, jnp.int32))
    params, totals = jnp.ones((1, 1)), train_cifar.no_totals()
    step, order = jnp.zeros((), jnp.int32), jnp.arange(n)
    state = State(params, {}, optimizer.init(params), step, KEY, order, totals)
    step = jax.jit(train_cifar.make_step(model, optimizer, config, recipe, lambda batch: batch))
    for _ in range(2):
        state = train_cifar.begin_epoch(state)
        for _ in range(recipe.steps(n)):
            state = step(state, train)
    jax.effects_barrier()
    first, second = np.array(model.seen[:5]), np.array(model.seen[5:])
    assert first.shape == second.shape == (5, 4)
    for epoch in first, second:
        assert len(set(epoch.ravel())) == 20
    assert (first != second).any()
    assert set(first.ravel()) != set(second.ravel())
    assert (first.ravel() != np.sort(first.ravel())).any()


def test_micro_batches_are_one_step_of_their_average_gradient(small):
    """Without a norm by the batch, they compute what the batch does; estimates move with each."""
    options = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", "batch_size": 8}
    whole, _ = few_steps(trainer_of(norm="gn", **options), steps=1)
    trainer = trainer_of(norm="gn", micro_batch=2, **options)
    start = jax.device_get(trainer.first_state.params)
    before, _ = few_steps(trainer, steps=3)
    jax.tree.map(np.testing.assert_array_equal, before.params, start)
    after, _ = few_steps(trainer, steps=4)
    # Images are shifted by other random numbers, so that steps are alike and not the same.
    moved, expected = (
        np.concatenate([(x - y).ravel() for x, y in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((after.params, start), (whole.params, start))
    )
    assert np.corrcoef(moved, expected)[0, 1] > 0.9
    assert 0.8 < np.linalg.norm(moved) / np.linalg.norm(expected) < 1.25

    trainer = trainer_of(micro_batch=2, **options)
    estimates = [few_steps(trainer, n)[0].batch_stats for n in (1, 2)]
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, estimates), strict=True))


@pytest.mark.parametrize(("norm", "more"), [("bcn", ""), ("none", ", or use a norm")])
def test_a_loss_that_is_not_finite_stops_training_and_is_not_saved(small, norm, more):
    config = Config(norm=norm, ws=False, optimizer="sgd", learning_rate=1e38, devices=1)
    text = message(train_cifar.main, dataclasses.replace(config, output=Path("here")))
    assert re.fullmatch(
        r"Loss and weights must stay finite, but by step \d+ (the loss is (nan|inf)|some weights "
        rf"are not), so training stopped\. Lower the learning rate, which is 1e\+38{more}\. The "
        r"last good checkpoint is kept\.",
        text,
    )
    assert not (Path("here") / "metrics.jsonl").read_text()


def test_kernels_decay_and_scales_and_biases_do_not():
    config = Config(weight_decay=0.5, learning_rate=0.1, schedule="constant")
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    for optimizer in "adam", "sgd":
        chosen = dataclasses.replace(config, optimizer=optimizer)
        tx = train_cifar.make_optimizer(chosen, configuration.resolve(chosen), 4)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert (updates["bias"] == 0).all()
        assert (updates["kernel"] < -0.04).all()


def test_long_gradients_are_scaled_down():
    config = Config(clip_norm=1.0, optimizer="sgd", learning_rate=1.0, schedule="constant")
    tx = train_cifar.make_optimizer(config, configuration.resolve(config), 4)
    params = {"a": jnp.zeros(2)}
    updates, _ = tx.update({"a": jnp.array([3.0, 4.0])}, tx.init(params), params)
    # The first step of Nesterov's momentum is 1.9 gradients long.
    np.testing.assert_allclose(updates["a"], [-1.9 * 0.6, -1.9 * 0.8], rtol=1e-6)


def test_steps_fall_after_a_half_and_after_three_quarters():
    config = Config(schedule="step", learning_rate=0.5)
    rate = train_cifar.make_schedule(configuration.resolve(config), 100)
    np.testing.assert_allclose([rate(n) for n in (49, 51, 74, 76)], [0.5, 0.05, 0.05, 0.005])


def test_smoothed_labels_leave_a_loss_where_the_network_is_sure():
    logits, labels = jnp.array([[100.0, 0.0]]), jnp.array([0])
    assert train_cifar.cross_entropy(logits, labels)[0] == 0
    np.testing.assert_allclose(train_cifar.cross_entropy(logits, labels, 0.1), [5.0], rtol=1e-6)


def test_network_resnet_makes_a_resnet():
    config = Config(network="resnet", depth=32, norm="gn", dtype="bfloat16")
    recipe = configuration.resolve(config)
    model = train_cifar.make_model(config, recipe, 100)
    assert model.clone(norm=None) == ResNet(
        32, num_classes=100, conv=WSConv, norm=None, dtype=jnp.dtype("bfloat16")
    )
    assert model.norm.keywords["num_groups"] == 8
    folder = configuration.default_folder(config, recipe)
    assert folder == Path("runs/digits-resnet32-gn-ws-batch32-seed0")


@pytest.mark.parametrize(
    ("norm", "layer", "options"),
    [
        ("bcn", BatchChannelNorm, {"num_groups": 16, "estimate": False, "momentum": 0.5}),
        ("bn", BatchNorm, {"momentum": 0.5}),
        ("gn", nn.GroupNorm, {"num_groups": 16, "epsilon": 1e-5}),
    ],
)
@pytest.mark.parametrize(("ws", "conv"), [(True, WSConv), (False, nn.Conv)])
def test_the_network_has_the_layers_asked_for(norm, layer, options, ws, conv):
    config = Config(norm=norm, ws=ws, estimate=False, norm_momentum=0.5)
    model = train_cifar.make_model(config, configuration.resolve(config), 10)
    assert (model.norm.func, model.norm.keywords, model.conv) == (layer, options, conv)


# Evaluation


def test_evaluation_counts_each_held_out_image_once_and_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(train_cifar, "EVALUATION_BATCH", 100)  # does not divide 360
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
    np.testing.assert_allclose(loss, -log_probability[range(360), test.labels].mean(), rtol=1e-5)
    assert accuracy == (np.argmax(logits, -1) == test.labels).sum() / 360
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.batch_stats))


def test_a_cosine_ends_at_0_and_a_constant_rate_does_not():
    def last_update(schedule, optimizer):
        config = Config(schedule=schedule, optimizer=optimizer, learning_rate=0.5)
        tx = train_cifar.make_optimizer(config, configuration.resolve(config), 4)
        params = jnp.ones(())
        state = tx.init(params)
        for _ in range(5):  # the cosine has reached 0 after its 4 steps
            update, state = tx.update(jnp.ones(()), state, params)
        return float(update)

    for optimizer in "adam", "sgd":
        assert last_update("cosine", optimizer) == 0
        assert last_update("constant", optimizer) < -0.49


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
