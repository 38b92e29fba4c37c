"""The training script does what its help says."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import tyro
from flax import linen as nn

import train_cifar
from bcn_flax import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import ResNet
from parity_tests.test_training_data import write_cifar10
from train_cifar import State, Trainer
from training import TrainingError, data
from training import config as configuration
from training.config import RECIPES, Config, Recipe
from training.data import Split
from training.devices import Placement
from training.progress import ProgressBar
from training.results import Results, new_folder

ROOT = Path(train_cifar.__file__).parent
KEY = jax.random.key(0)
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def use_small_networks(patch):
    """Recipes with a network that compiles fast."""
    for name, recipe in list(RECIPES.items()):
        recipe = dataclasses.replace(recipe, blocks=((8,),), groups=4, epochs=2)
        patch.setitem(RECIPES, name, recipe)


@pytest.fixture
def small(monkeypatch):
    use_small_networks(monkeypatch)
    with jax.default_prng_impl("rbg"):  # initializers compile several times as fast
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs alike: their folders, the metrics of their last epochs, how often each traced."""
    folder = tmp_path_factory.mktemp("runs")
    traces = []
    shift = data.random_shift
    with pytest.MonkeyPatch.context() as patch, jax.default_prng_impl("rbg"):
        use_small_networks(patch)
        patch.chdir(folder)
        patch.setattr(data, "random_shift", lambda *args: traces.append(1) or shift(*args))
        metrics = [train_cifar.main(Config(devices=1)) for _ in range(2)]
    return folder / "runs", metrics, len(traces)


def run_of(images=None, **options):
    """What trains with these options, on one device."""
    config = Config(**options)
    images = images or data.digits()
    return Trainer(config, configuration.resolve(config), images, Placement(1, 1))


def few_steps(trainer, steps=3):
    """The state after a few steps, on the host, and their average loss."""
    state = trainer.first_state
    train = jax.device_put(data.digits().train)
    for _ in range(steps):
        state = trainer.step(state, train)
    loss, _ = state.totals.means()
    return jax.device_get(state._replace(key=jax.random.key_data(state.key))), loss


def message(call, *args):
    with pytest.raises(TrainingError) as caught:
        call(*args)
    return str(caught.value)


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
    trainer = run_of(tiny, dataset=dataset, batch_size=4)
    _ = trainer.step
    assert len(flips) == expected


# Reproducibility


def test_the_seed_decides_every_bit_of_the_state(small):
    (one, loss), (same, same_loss), (other, _) = (few_steps(run_of(seed=s)) for s in (0, 0, 1))
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
    state, loss = few_steps(run_of(batch_size=1, **options))
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
    whole, _ = few_steps(run_of(norm="gn", **options), steps=1)
    trainer = run_of(norm="gn", **options, micro_batch=2)
    start = jax.device_get(trainer.first_state.params)
    before, _ = few_steps(trainer, steps=3)
    jax.tree.map(np.testing.assert_array_equal, before.params, start)
    after, _ = few_steps(run_of(norm="gn", **options, micro_batch=2), steps=4)
    # Images are shifted by other random numbers, so that steps are alike and not the same.
    moved, expected = (
        np.concatenate([(x - y).ravel() for x, y in zip(*map(jax.tree.leaves, pair), strict=True)])
        for pair in ((after.params, start), (whole.params, start))
    )
    assert np.corrcoef(moved, expected)[0, 1] > 0.9
    assert 0.8 < np.linalg.norm(moved) / np.linalg.norm(expected) < 1.25

    estimates = [few_steps(run_of(**options, micro_batch=2), n)[0].batch_stats for n in (1, 2)]
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, estimates), strict=True))


def test_averages_look_as_far_back_with_micro_batches():
    recipe = configuration.resolve(Config(micro_batch=4))
    assert recipe.norm_momentum**8 == pytest.approx(0.95)
    assert recipe.learning_rate == configuration.resolve(Config()).learning_rate
    assert (recipe.micro_batches, recipe.steps(100)) == (8, 24)


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


def test_a_resnet_is_trained_where_one_is_asked_for():
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


# Evaluation


def test_evaluation_counts_each_held_out_image_once_and_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(train_cifar, "EVALUATION_BATCH", 100)  # does not divide 360
    trainer, test = run_of(), data.digits().test
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


# Configuration


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


def test_groups_do_not_matter_where_there_are_none():
    assert configuration.resolve(Config(norm="bn", groups=12)).groups == 12


# The output folder


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


def test_a_folder_that_takes_no_files_is_found_out_before_the_compilation(monkeypatch):
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
    assert message(results.add, metrics(1)) == (
        "Cannot write to here: No space left on device. Choose another --output."
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

    def interrupted():
        with results:
            for row in map(metrics, range(1, epochs + 1)):
                results.add(row)
                assert json.loads(Path("here/metrics.jsonl").read_text().splitlines()[-1]) == row
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Path("here/curves.png").exists() == (epochs > 0)


def test_tensorboard_gets_the_same_numbers():
    with Results(new_folder(Path("here"), Path("unused")), {}, (), tensorboard=True) as results:
        results.add(metrics(1))
    (events,) = Path("here").glob("events.out.tfevents.*")
    assert b"train_loss" in events.read_bytes()
    assert np.float32(0.25).tobytes() in events.read_bytes()


# The command line, in a process of its own


def command(*args):
    return subprocess.run(
        [sys.executable, "-W", "error", *args], capture_output=True, text=True, cwd=ROOT
    )


def test_an_error_is_a_message_and_not_a_traceback():
    done = command("train_cifar.py", "--batch-size", "0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "train_cifar.py: batch_size must be a whole number and at least 1, but batch_size=0. "
        "Omit it for the default.\n"
    )


INTERRUPTIBLE = """
import dataclasses, signal
import train_cifar
from training.config import RECIPES
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is off
digits = RECIPES["digits"]
RECIPES["digits"] = dataclasses.replace(digits, blocks=((8,),), groups=4)
train_cifar.command_line()
"""


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    folder = tmp_path / "here"
    options = ["--epochs", "1000000", "--output", str(folder)]
    words = [sys.executable, "-c", INTERRUPTIBLE, *options]
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
        configuration.resolve(Config(optimizer="sgd", batch_size=size)).learning_rate
        for size in sizes
    ]
    assert f"with SGD, {sgd[0]} at batch size {sizes[0]}, {sgd[1]} at {sizes[1]}" in text


# What the script promises


@pytest.mark.slow
def test_digits_one_at_a_time():
    assert train_cifar.main(Config(batch_size=1, epochs=4, devices=1))["test_accuracy"] > 0.95
