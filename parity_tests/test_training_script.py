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

import train_cifar
from bcn_flax.training import data
from bcn_flax.training.checks import TrainingError
from bcn_flax.training.data import Split
from bcn_flax.training.progress import ProgressBar
from bcn_flax.training.results import Results, new_folder
from parity_tests.test_training_data import write_cifar10
from train_cifar import Config, Recipe, State, Totals

ROOT = Path(train_cifar.__file__).parent
KEY = jax.random.key(0)
TIMES = {"seconds", "images_per_second"}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def use_small_networks(patch):
    """Recipes with a network that compiles fast."""
    for name, recipe in train_cifar.RECIPES.items():
        recipe = dataclasses.replace(recipe, blocks=((8,),), groups=4, epochs=2)
        patch.setitem(train_cifar.RECIPES, name, recipe)


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
        metrics = [train_cifar.main(Config()) for _ in range(2)]
    return folder / "runs", metrics, len(traces)


def set_up(train=None, **options):
    """Model, step, and first state of a run with these options, and its training set."""
    config = Config(**options)
    recipe = train_cifar.resolve(config)
    model = train_cifar.make_model(config, recipe)
    optimizer = train_cifar.make_optimizer(config, recipe, 100)
    train = jax.device_put(train or data.digits().train)
    state = train_cifar.first_state(model, optimizer, train.images, config.seed)
    return model, train_cifar.make_step(model, optimizer, recipe), state, train


def few_steps(step, state, train, steps=3):
    """The state after a few steps, on the host, and their average loss."""
    state, order = train_cifar.shuffle(state, len(train.labels))
    totals = train_cifar.no_totals()
    for _ in range(steps):
        state, totals = step(state, totals, train, order)
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.device_get(state), totals.means()[0]


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
    assert config.keys() == {f.name for c in (Config, Recipe) for f in dataclasses.fields(c)}
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
    config = Config(dataset="cifar10", data_dir=tmp_path / "cifar", batch_size=8, epochs=1)
    last = train_cifar.main(dataclasses.replace(config, output=Path("here")))
    assert math.isfinite(last["test_loss"])
    assert Path("here/metrics.jsonl").exists()
    printed = capsys.readouterr().out.splitlines()
    assert "20 training and 4 held-out images" in printed
    assert any(line.startswith("compiled in ") for line in printed)
    assert printed[-2].split()[0] == "1"
    assert printed[-1] == "results in here"


@pytest.mark.parametrize(("dataset", "expected"), [("cifar10", 1), ("digits", 0)])
def test_photographs_are_mirrored_and_digits_are_not(small, monkeypatch, dataset, expected):
    flips = []
    flip = data.random_flip
    monkeypatch.setattr(data, "random_flip", lambda *args: flips.append(1) or flip(*args))
    train = Split(jnp.zeros((8, 8, 8, 3), jnp.uint8), jnp.zeros(8, jnp.int32))

    def trace():
        _, step, state, _ = set_up(train, dataset=dataset, batch_size=4)
        return step(state, train_cifar.no_totals(), train, jnp.arange(8))

    jax.eval_shape(trace)
    assert len(flips) == expected


# Reproducibility


def test_the_seed_decides_every_bit_of_the_state(small):
    runs = [set_up(seed=seed) for seed in (0, 0, 1)]
    step = jax.jit(runs[0][1], donate_argnums=(0, 1))
    (one, loss), (same, same_loss), (other, _) = (
        few_steps(step, state, train) for _, _, state, train in runs
    )
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
    ],
    ids=str,
)
def test_every_norm_trains_on_single_images(small, options):
    _, step, state, train = set_up(batch_size=1, **options)
    state, loss = few_steps(jax.jit(step, donate_argnums=(0, 1)), state, train)
    assert math.isfinite(loss)
    assert state.step == 3
    assert bool(state.batch_stats) == (options["norm"] in ("bcn", "bn"))


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
    recipe = dataclasses.replace(train_cifar.resolve(config), shift=0)
    optimizer = train_cifar.make_optimizer(config, recipe, 10)
    images = jnp.arange(n, dtype=jnp.uint8).reshape(n, 1, 1, 1)
    train = Split(images, jnp.zeros(n, jnp.int32))
    params = jnp.ones((1, 1))
    key = jax.random.key(0)
    state = State(params, {}, optimizer.init(params), jnp.zeros((), jnp.int32), key)
    step = jax.jit(train_cifar.make_step(model, optimizer, recipe))
    with ProgressBar(5, 2) as progress:
        for _ in range(2):
            state, _, _ = train_cifar.train_epoch(step, state, train, recipe, "bcn", progress)
    jax.effects_barrier()
    first, second = np.array(model.seen[:5]), np.array(model.seen[5:])
    assert first.shape == second.shape == (5, 4)
    for epoch in first, second:
        assert len(set(epoch.ravel())) == 20
    assert (first != second).any()
    assert set(first.ravel()) != set(second.ravel())
    assert (first.ravel() != np.sort(first.ravel())).any()


@pytest.mark.parametrize(("norm", "more"), [("bcn", ""), ("none", ", or use a norm")])
def test_a_loss_that_is_not_finite_stops_training(norm, more):
    def step(state, totals, train, order):
        bad = jnp.asarray(jnp.nan, jnp.float32)
        return state._replace(step=state.step + 1), Totals(bad, totals.correct, totals.images + 2)

    recipe = dataclasses.replace(train_cifar.RECIPES["digits"], batch_size=2, learning_rate=30.0)
    state = State({}, {}, (), jnp.zeros((), jnp.int32), jax.random.key(0))
    train = Split(jnp.zeros((6, 1, 1, 1), jnp.uint8), jnp.zeros(6, jnp.int32))
    with ProgressBar(3, 1, interval=math.inf) as progress:
        text = message(train_cifar.train_epoch, step, state, train, recipe, norm, progress)
    assert text == (
        "The loss must stay finite, but it was nan by step 3, so training stopped. "
        f"Lower the learning rate, which is 30{more}."
    )


def test_without_a_terminal_there_are_plain_lines_within_epochs(capsys):
    with ProgressBar(1500, 2, line_interval=0) as progress:
        for step in 1234, 1500, 1501, 3000:
            progress.show(step, 1.23456e18, 0.125)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1: 1,234 of 1,500 steps, loss 1.235e+18, accuracy 12.50%",
        "epoch 2: 1 of 1,500 steps, loss 1.235e+18, accuracy 12.50%",
    ]


def test_there_are_few_plain_lines(capsys):
    with ProgressBar(1500, 1, line_interval=math.inf) as progress:
        progress.show(1, 1.0, 0.125)
    assert capsys.readouterr().out == ""


# Evaluation


def test_evaluation_counts_each_held_out_image_once_and_changes_nothing(small):
    model, _, state, _ = set_up()
    test = data.digits().test
    before = jax.device_get((state.params, state.batch_stats))
    size = 100  # does not divide 360
    evaluate = jax.jit(train_cifar.make_evaluation(model, size), donate_argnums=1)
    padded = jax.device_put(data.pad(test, size))
    counted = []

    def counting(*args):
        totals = evaluate(*args)
        counted.append(int(totals.images))
        return totals

    loss, accuracy = train_cifar.test_epoch(counting, state, padded, size)
    assert counted == [100, 200, 300, 360]

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    apply = jax.jit(model.apply, static_argnames="train")
    logits = apply(variables, data.to_float(test.images), train=False)
    log_probability = np.asarray(jax.nn.log_softmax(logits), np.float64)
    np.testing.assert_allclose(loss, -log_probability[range(360), test.labels].mean(), rtol=1e-5)
    assert accuracy == (np.argmax(logits, -1) == test.labels).sum() / 360
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.batch_stats))


# Configuration


def test_cifar10_is_trained_as_published():
    recipe = train_cifar.resolve(Config(dataset="cifar10"))
    assert recipe == Recipe(
        blocks=((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
        shift=4,
        flip=True,
        groups=32,
        batch_size=64,
        epochs=10,
        schedule="constant",
        learning_rate=2.5e-4,
        norm_momentum=0.9,
    )
    assert Config().optimizer == "adam"


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_smaller_batches_take_smaller_steps_and_longer_averages(dataset):
    own = train_cifar.resolve(Config(dataset=dataset))
    one = train_cifar.resolve(Config(dataset=dataset, batch_size=1))
    assert one.learning_rate == pytest.approx(own.learning_rate / own.batch_size**0.5)
    assert one.norm_momentum**own.batch_size == pytest.approx(own.norm_momentum)
    sgd = Config(dataset=dataset, optimizer="sgd")
    rates = [
        train_cifar.resolve(dataclasses.replace(sgd, batch_size=n)).learning_rate for n in (1, 8)
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
    assert said.items() <= dataclasses.asdict(train_cifar.resolve(config)).items()


def test_a_cosine_ends_at_0_and_a_constant_rate_does_not():
    def last_update(schedule, optimizer):
        config = Config(schedule=schedule, optimizer=optimizer, learning_rate=0.5)
        tx = train_cifar.make_optimizer(config, train_cifar.resolve(config), 4)
        params = jnp.ones(())
        state = tx.init(params)
        for _ in range(5):  # the cosine has reached 0 after its 4 steps
            update, state = tx.update(jnp.ones(()), state, params)
        return float(update)

    for optimizer in "adam", "sgd":
        assert last_update("cosine", optimizer) == 0
        assert last_update("constant", optimizer) < -0.49


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dataset": "mnist"}, "dataset must be one of digits, cifar10, but dataset='mnist'."),
        ({"norm": "ln"}, "norm must be one of bcn, bn, gn, none, but norm='ln'."),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, but optimizer='lion'."),
        (
            {"schedule": "linear"},
            "schedule must be one of constant, cosine, but schedule='linear'.",
        ),
        ({"seed": -1}, "seed must be from 0 to 4294967295, but seed=-1."),
        (
            {"batch_size": 0},
            "batch_size must be a whole number and at least 1, but batch_size=0. Leave it out for "
            "the data set's own.",
        ),
        (
            {"epochs": 0},
            "epochs must be a whole number and at least 1, but epochs=0. Leave it out for the data "
            "set's own.",
        ),
        (
            {"learning_rate": 0.0},
            "learning_rate must be positive and finite, but learning_rate=0.0. Leave it out for "
            "the data set's own.",
        ),
        (
            {"learning_rate": math.nan},
            "learning_rate must be positive and finite, but learning_rate=nan. Leave it out for "
            "the data set's own.",
        ),
        (
            {"norm_momentum": 1.0},
            "norm_momentum is the weight of the old running average and must be at least 0 and "
            "less than 1, but norm_momentum=1.0. A PyTorch momentum m is 1 - m here.",
        ),
        (
            {"groups": 12},
            "groups must divide the channels of every layer, but groups=12 and the layers have 32, "
            "64 channels. Any of 1, 2, 4, 8, 16, 32 would do.",
        ),
        (
            {"groups": 0, "norm": "gn"},
            "groups must be a whole number and at least 1, but groups=0. Leave it out for the data "
            "set's own.",
        ),
        (
            {"batch_size": 1438},
            "batch_size must be at most the number of training images, but batch_size=1438 and "
            "there are 1437 of them. Use a smaller batch.",
        ),
    ],
    ids=str,
)
def test_bad_values(options, text):
    assert message(train_cifar.main, Config(**options)) == text
    assert not Path("runs").exists()


def test_groups_do_not_matter_where_there_are_none():
    assert train_cifar.resolve(Config(norm="bn", groups=12)).groups == 12


# The output folder


def test_a_second_run_has_a_second_folder():
    folders = [new_folder(None, Path("runs/name")) for _ in range(3)]
    assert folders == [Path("runs/name"), Path("runs/name-2"), Path("runs/name-3")]


def test_results_are_never_overwritten():
    here = Path("here")
    Results(new_folder(here, Path("unused")), {"seed": 0})
    assert message(new_folder, here, Path("unused")) == (
        "The output folder must not hold results already, but here holds config.json. Name another "
        "folder, move that one away, or leave --output out: a new folder is made then."
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
        "The output must be a folder, but here is a file. Name another one."
    )


@pytest.mark.parametrize("output", ["", "."])
def test_the_output_is_not_the_current_folder(output):
    assert message(train_cifar.main, Config(output=Path(output))) == (
        "The output must be a folder of its own, but it is the current folder or has an empty "
        "name. Name another --output, or leave it out: a new folder is made then."
    )
    assert list(Path().iterdir()) == []


def no_compilation(*args):
    pytest.fail("compiled")


def test_a_folder_that_cannot_be_made(monkeypatch):
    monkeypatch.setattr(train_cifar, "fit", no_compilation)
    Path("afile").write_text("mine")
    assert message(train_cifar.main, Config(output=Path("afile/sub"))) == (
        "Cannot write to afile/sub: Not a directory. Name another --output."
    )
    Path("runs").write_text("mine")
    assert message(train_cifar.main, Config()) == (
        "Cannot write to runs/digits-bcn-ws-batch32-seed0: File exists. Name another --output."
    )


def test_a_folder_that_takes_no_files_is_found_out_before_the_compilation(monkeypatch):
    def refuse(path, text):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(train_cifar, "fit", no_compilation)
    monkeypatch.setattr(Path, "write_text", refuse)  # the superuser may write everywhere
    assert message(train_cifar.main, Config(output=Path("here"))) == (
        "Cannot write to here: Permission denied. Name another --output."
    )


def test_a_disk_that_fills_up_in_training():
    results = Results(new_folder(Path("here"), Path("unused")), {})
    Path("here/metrics.jsonl").symlink_to("/dev/full")
    assert message(results.add, {"epoch": 1}) == (
        "Cannot write to here: No space left on device. Name another --output."
    )


def test_a_compilation_that_fails_leaves_the_configuration(monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train_cifar, "compiled", fail)
    monkeypatch.setattr(train_cifar, "first_state", lambda *args: State({}, {}, (), 0, KEY))
    with pytest.raises(RuntimeError, match="out of memory"):
        train_cifar.main(Config(output=Path("here")))
    assert [path.name for path in Path("here").iterdir()] == ["config.json"]


@pytest.mark.parametrize(("epochs", "said"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs")])
def test_a_run_cut_short_keeps_what_it_found_out(capsys, epochs, said):
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    rows = [{"epoch": n, **dict.fromkeys(names, 0.5)} for n in range(1, epochs + 1)]
    results = Results(new_folder(Path("here"), Path("unused")), {})

    def interrupted():
        with results:
            for row in rows:
                results.add(row)
                assert json.loads(Path("here/metrics.jsonl").read_text().splitlines()[-1]) == row
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Path("here/curves.png").exists() == (epochs > 0)
    assert capsys.readouterr().err == f"interrupted after {said}; what there is lies in here\n"


# The command line, in a process of its own


def command(*args):
    return subprocess.run(
        [sys.executable, "-W", "error", *args], capture_output=True, text=True, cwd=ROOT
    )


def test_a_complaint_is_a_message_and_not_a_traceback():
    done = command("train_cifar.py", "--batch-size", "0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "train_cifar.py: batch_size must be a whole number and at least 1, but batch_size=0. "
        "Leave it out for the data set's own.\n"
    )


INTERRUPTIBLE = """
import dataclasses, signal
import train_cifar
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is off
digits = train_cifar.RECIPES["digits"]
train_cifar.RECIPES["digits"] = dataclasses.replace(digits, blocks=((8,),), groups=4)
train_cifar.command_line()
"""


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    folder = tmp_path / "here"
    words = [sys.executable, "-c", INTERRUPTIBLE, "--epochs", "1000000", "--output", str(folder)]
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
            _, complaint = run.communicate(timeout=120)
        finally:
            run.kill()
    assert printed, complaint
    expected = rf"interrupted after \d+ epochs?; what there is lies in {re.escape(str(folder))}\n"
    assert re.fullmatch(expected, complaint)
    assert run.returncode == 130
    names = ["config.json", "curves.png", "metrics.jsonl"]
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
    digits, cifar10 = (train_cifar.RECIPES[name] for name in ("digits", "cifar10"))
    for name in "groups", "batch_size", "epochs", "schedule":
        values = getattr(digits, name), getattr(cifar10, name)
        assert "by default {} for digits, {} for cifar10".format(*values) in text
    sizes = digits.batch_size, cifar10.batch_size
    for name in "norm_momentum", "learning_rate":
        for dataset, size in zip(("digits", "cifar10"), sizes, strict=True):
            value = getattr(train_cifar.RECIPES[dataset], name)
            assert f"{value} for {dataset} at {'batch size ' * (size == 32)}{size}" in text
    sgd = [
        train_cifar.resolve(Config(optimizer="sgd", batch_size=size)).learning_rate
        for size in sizes
    ]
    assert f"with SGD, {sgd[0]} at batch size {sizes[0]}, {sgd[1]} at {sizes[1]}" in text


# What the script promises


@pytest.mark.slow
def test_digits_by_default():
    assert train_cifar.main(Config())["test_accuracy"] >= 0.985


@pytest.mark.slow
def test_digits_one_at_a_time():
    assert train_cifar.main(Config(batch_size=1))["test_accuracy"] >= 0.98
