"""Training computes what the help says of each option, restated in NumPy, alone and in pairs.

The network is linear: a kernel of four axes and one of two, a scale and a bias. It centers by the
batch in training and by a running mean in evaluation, and keeps the images that it was given.
"""

import math
from itertools import combinations, product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import train_cifar
from train_cifar import Trainer
from training import data
from training.config import Config, resolve
from training.devices import Placement

OPTIONS = {
    "optimizer": ("adam", "sgd"),
    "schedule": (None, "constant", "cosine", "step"),
    "micro_batch": (None, 2),
    "clip_norm": (None, 0.1),
    "weight_decay": (0.0, 0.3),
    "label_smoothing": (0.0, 0.2),
    "learning_rate": (None, 0.01),
    "batch_size": (4, 8),
    "epochs": (2, 4),
    "dataset": ("digits", "cifar10"),
    "seed": (0, 5),
    "devices": (1, 2),
}
# These decide together what is added to the weights.
TOGETHER = ("optimizer", "micro_batch", "clip_norm", "weight_decay")
DEFAULTS = {"digits": (0.002, 32, "cosine"), "cifar10": (0.00025, 64, "constant")}
SHIFTS = {"digits": 1, "cifar10": 4}
TRAINING, HELD_OUT, SIZE, CHANNELS, CLASSES = 19, 7, 9, 2, 3
PIXELS = SIZE * SIZE * CHANNELS
SHAPES = {
    "mixing": (1, 1, CHANNELS, CHANNELS),
    "scale": (PIXELS,),
    "kernel": (PIXELS, CLASSES),
    "bias": (CLASSES,),
}
DECAY = {"mixing", "kernel"}


def in_pairs(options, together=()):
    """Few combinations in which any two values of two options occur, and any of some together."""
    left = [
        dict(zip(names, values, strict=True)).items()
        for names in [*filter(None, [together]), *combinations(options, 2)]
        for values in product(*(options[name] for name in names))
    ]
    cases = []
    while left:
        case = dict(left[0])
        for name in options:
            extended = [{**case, name: value} for value in options[name]]
            if name not in case:
                case = max(extended, key=lambda case: sum(pair <= case.items() for pair in left))
        left = [pair for pair in left if not pair <= case.items()]
        cases.append({name: case[name] for name in options})
    return cases


CASES = in_pairs(OPTIONS, TOGETHER)


def test_any_two_values_of_two_options_occur_together():
    for names in TOGETHER, *combinations(OPTIONS, 2):
        found = {tuple(case[name] for name in names) for case in CASES}
        assert found == set(product(*(OPTIONS[name] for name in names)))


# The run


class Linear(nn.Module):
    """The network described above."""

    micro_batch: int

    @nn.compact
    def __call__(self, x, train):
        rng, images = np.random.default_rng(1), (self.micro_batch, SIZE, SIZE, CHANNELS)
        mean = self.variable("batch_stats", "mean", jnp.zeros, CHANNELS)
        seen = self.variable("batch_stats", "seen", jnp.zeros, images)
        start = {name: 0.3 * rng.normal(size=shape) for name, shape in SHAPES.items()}
        mixing, scale, kernel, bias = (
            self.param(name, lambda _, value=value: jnp.asarray(value, jnp.float32))
            for name, value in start.items()
        )
        center = mean.value
        if train:
            center = x.mean((0, 1, 2))
            mean.value, seen.value = 0.5 * mean.value + 0.5 * center, x
        y = (x - center[None, None, None]) @ mixing
        return (y.reshape(len(x), -1) * scale[None]) @ kernel + bias[None]


def dataset():
    """Each image tells its index wherever it is shifted: one channel is the index, one noise."""
    rng = np.random.default_rng(0)

    def split(n):
        index = np.broadcast_to(1 + np.arange(n).reshape(n, 1, 1), (n, SIZE, SIZE))
        noise = rng.integers(1, 256, (n, SIZE, SIZE))
        images = np.stack([index, noise], -1).astype(np.uint8)
        return data.Split(images, rng.integers(0, CLASSES, n, np.int32))

    return data.Dataset(split(TRAINING), split(HELD_OUT), tuple("abc"))


DATA = dataset()


def run(config, monkeypatch):
    """The first parameters, the step, state and score of each save, and the metrics."""
    monkeypatch.setattr(train_cifar, "EVALUATION_BATCH", 4)  # does not divide the held-out images
    monkeypatch.setattr(train_cifar, "make_model", lambda *_: Linear(recipe.micro_batch))
    recipe, saves, history = resolve(config), [], []

    def save(step, state, metadata, score=None):
        assert metadata == {"history": history}
        saves.append((step, jax.device_get(state._replace(key=None)), score))

    with jax.default_prng_impl("rbg"):
        trainer = Trainer(config, recipe, DATA, Placement(config.devices, recipe.micro_batch))
        first = jax.device_get(trainer.first_state.params)
        trainer.fit(
            trainer.first_state,
            SimpleNamespace(save=save, kept=str),
            SimpleNamespace(history=history, add=lambda row, kept: history.append(row)),
            SimpleNamespace(noted=None),
            SimpleNamespace(is_due=lambda: False),
        )
    return first, saves, history


# What the help says


def centered(x, center):
    return np.asarray(x, np.float64) - center


def logits_of(params, x):
    """The logits of centered images, and the features that the kernel maps to them."""
    features = (x @ params["mixing"][0, 0]).reshape(len(x), -1)
    return features * params["scale"] @ params["kernel"] + params["bias"], features


def cross_entropy(logits, labels, smoothing):
    """The loss of each image and its gradient."""
    logits = logits - logits.max(1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = (1 - smoothing) * np.eye(CLASSES)[labels] + smoothing / CLASSES
    return -(targets * log_probabilities).sum(1), np.exp(log_probabilities) - targets


def gradient_of(params, x, features, by_logits):
    by_features = by_logits @ params["kernel"].T
    by_mixed = (by_features * params["scale"]).reshape(x.shape)
    return {
        "mixing": np.einsum("nhwc, nhwd -> cd", x, by_mixed)[None, None],
        "scale": (by_features * features).sum(0),
        "kernel": (features * params["scale"]).T @ by_logits,
        "bias": by_logits.sum(0),
    }


def rate_of(config, step, steps):
    """The learning rate of an optimizer step of so many."""
    rate, size, schedule = DEFAULTS[config.dataset]
    rate *= math.sqrt(config.batch_size / size)
    if config.optimizer == "sgd":
        rate = 0.05 * config.batch_size / 32
    rate = config.learning_rate or rate
    return {
        "constant": rate,
        "cosine": rate * (1 + math.cos(math.pi * step / steps)) / 2,
        "step": rate * 0.1 ** ((step >= steps / 2) + (step >= steps * 3 / 4)),
    }[config.schedule or schedule]


class Optimizer:
    """AdamW, or SGD with Nesterov momentum and L2, of clipped gradients."""

    def __init__(self, config, steps):
        self.config, self.steps, self.step = config, steps, 0
        self.first, self.second = (dict.fromkeys(SHAPES, 0.0) for _ in range(2))

    def update(self, params, gradient):
        config, rate = self.config, rate_of(self.config, self.step, self.steps)
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        shrink = min(1.0, (config.clip_norm or math.inf) / norm)
        self.step += 1
        return {
            name: params[name] - rate * self.direction(name, params[name], shrink * g)
            for name, g in gradient.items()
        }

    def direction(self, name, value, g):
        decayed = (name in DECAY) * self.config.weight_decay * value
        if self.config.optimizer == "sgd":
            g = g + decayed
            self.first[name] = 0.9 * self.first[name] + g
            return g + 0.9 * self.first[name]
        self.first[name] = 0.9 * self.first[name] + 0.1 * g
        self.second[name] = 0.999 * self.second[name] + 0.001 * g**2
        first = self.first[name] / (1 - 0.9**self.step)
        second = self.second[name] / (1 - 0.999**self.step)
        return first / (np.sqrt(second) + 1e-8) + decayed


def restated(config, params, batches):
    """The parameters and running means after each micro-batch, and the metrics of each epoch."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    micro_batches = config.batch_size // (config.micro_batch or config.batch_size)
    per_epoch = TRAINING // config.batch_size
    optimizer = Optimizer(config, config.epochs * per_epoch)
    mean, gradients, losses, correct = np.zeros(CHANNELS), [], [], []
    after, rows = [], []
    for images, labels in batches:
        x = centered(images, images.mean((0, 1, 2), np.float64))
        mean = (mean + images.mean((0, 1, 2), np.float64)) / 2
        logits, features = logits_of(params, x)
        loss, by_logits = cross_entropy(logits, labels, config.label_smoothing)
        losses, correct = [*losses, *loss], [*correct, *(logits.argmax(1) == labels)]
        gradients.append(gradient_of(params, x, features, by_logits / len(x)))
        if len(gradients) == micro_batches:
            average = {name: np.mean([g[name] for g in gradients], 0) for name in SHAPES}
            params, gradients = optimizer.update(params, average), []
        after.append({**params, "mean": mean})
        if not gradients and optimizer.step % per_epoch == 0:
            test = centered(DATA.test.images / 127.5 - 1, mean)
            logits, _ = logits_of(params, test)
            test_loss, _ = cross_entropy(logits, DATA.test.labels, 0.0)
            test_accuracy = np.mean(logits.argmax(1) == DATA.test.labels)
            rows.append((np.mean(losses), np.mean(correct), np.mean(test_loss), test_accuracy))
            losses, correct = [], []
    return after, rows


def origin(x, shift, flips):
    """The index of an image, how far it was shifted, and whether it was mirrored."""
    pixels = np.round((x + 1) * 127.5).astype(np.uint8)
    index = int(pixels[..., 0].max()) - 1
    padded = np.pad(DATA.train.images[index], [(shift, shift), (shift, shift), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIZE, SIZE), (0, 1))
    for mirrored in (False, True)[: 1 + flips]:
        wanted = np.moveaxis(pixels[:, ::-1] if mirrored else pixels, -1, 0)
        for found in np.argwhere((windows == wanted).all((2, 3, 4))):
            return index, (*found.tolist(), mirrored)
    raise AssertionError(f"It is not image {index}, shifted or mirrored.")


# Both


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_training_is_what_the_help_says(monkeypatch, options):
    config = Config(**options, checkpoint_every=1)
    first, saves, history = run(config, monkeypatch)
    batches_per_epoch = TRAINING // config.batch_size
    per_epoch = batches_per_epoch * config.batch_size // (config.micro_batch or config.batch_size)
    # After each epoch its last state is saved once more, with a score and the next order.
    states = [state for _, state, score in saves if score is None]
    assert [state.step for state in states] == [*range(1, per_epoch * config.epochs + 1)]
    assert [step for step, _, score in saves if score is None] == [state.step for state in states]
    scores = [(step, score) for step, _, score in saves if score is not None]
    assert scores == [(row["epoch"] * per_epoch, row["test_accuracy"]) for row in history]

    seen = [state.batch_stats["seen"] for state in states]
    shift, mirrors = SHIFTS[config.dataset], config.dataset == "cifar10"
    origins = [[origin(x, shift, mirrors) for x in batch] for batch in seen]
    assert_images_are_drawn_anew(origins, per_epoch, mirrors)
    labels = [DATA.train.labels[[index for index, _ in batch]] for batch in origins]

    after, rows = restated(config, first, zip(seen, labels, strict=True))
    # Adam makes a step of a gradient that is 0 but for rounding.
    atol = 1e-6 + 0.02 * rate_of(config, 0, 1) * (config.optimizer == "adam")
    for state, expected in zip(states, after, strict=True):
        actual = {**state.params, "mean": state.batch_stats["mean"]}
        for name, value in expected.items():
            where = f"{name} after step {state.step}"
            np.testing.assert_allclose(actual[name], value, 1e-6, atol, err_msg=where)
    names = "train_loss", "train_accuracy", "test_loss", "test_accuracy"
    metrics = [[row[name] for name in names] for row in history]
    np.testing.assert_allclose(metrics, rows, 1e-4)
    assert [row["epoch"] for row in history] == [*range(1, config.epochs + 1)]
    seconds, speeds = ([row[name] for row in history] for name in ("seconds", "images_per_second"))
    images = batches_per_epoch * config.batch_size
    np.testing.assert_allclose(np.multiply(speeds, seconds), images)


def assert_images_are_drawn_anew(origins, per_epoch, mirrors):
    """Each at most once in an epoch, in another order in the next, and changed on its own."""
    epochs = [origins[i : i + per_epoch] for i in range(0, len(origins), per_epoch)]
    orders = [tuple(index for batch in epoch for index, _ in batch) for epoch in epochs]
    assert all(len(set(order)) == len(order) for order in orders)
    assert len(set(orders)) == len(orders)
    assert all(order != tuple(sorted(order)) for order in orders)
    changes = [tuple(change for _, change in batch) for batch in origins]
    assert all(len(set(batch)) > 1 for batch in changes if len(batch) > 2)
    assert len(set(changes)) > 0.7 * len(changes)
    assert {mirrored for batch in changes for *_, mirrored in batch} == {False, mirrors}
