"""Train a VGG or a ResNet with weight standardization and batch-channel normalization.

    pip install -e ".[train]"
    python train_cifar.py                                    # 8x8 digits: nothing to download
    python train_cifar.py --batch-size 1                     # what BCN is for
    python train_cifar.py --batch-size 1 --norm bn           # what it is compared with
    python train_cifar.py --resume                           # resume the last run
    python train_cifar.py --predict digit.png                # classify a picture
    python train_cifar.py --dataset cifar10                  # the published configuration
    python train_cifar.py --help

Held-out accuracy in %, mean and standard deviation over the seeds 0 to 4 (`--seed`), on 2 CPU
cores. The first line is the default and takes some 20 s, 10 of them for compilation.

                                        (batch size 32)    --batch-size 1
                                          99.39 +- 0.23     99.50 +- 0.12
    --dtype bfloat16                      99.28 +- 0.32     99.72 +- 0.20
    --norm bn                             99.28 +- 0.15     97.67 +- 1.69
    --norm gn                             99.28 +- 0.32     99.67 +- 0.23

One image is 0.28 %. The digits are hard enough to show that batch norm suffers from batches of one
image, and too easy to tell the other norms apart. CIFAR has not been measured yet.

The whole data set is on each device. Shuffling, augmentation, forward pass, backward pass and
update are one compiled step, which the host calls in a loop. (A scan over the steps would save the
calls, but XLA on the CPU runs a convolution inside a loop 26 to 30 times slower.)

Each run has its own folder: `config.json` with all settings, `metrics.jsonl` with one line per
epoch, `curves.png` and `checkpoints`. On the same machine, the same seed gives the same result, bit
for bit, even if the run is killed and resumed.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports, which take long

import math
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int, Key

from bcn_flax import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import VGG, ResNet
from training import TrainingError, data, devices, progress, results
from training.checkpoints import Checkpoints
from training.compilation import compile_program
from training.config import Config, Recipe, default_folder, describe, resolve, settings_of
from training.data import Dataset, Split
from training.devices import Placement
from training.progress import ProgressBar, Signals, Stopped
from training.results import Results

# Evaluation keeps no activations for a backward pass, so its batches may be large.
EVALUATION_BATCH = 500


class Totals(NamedTuple):
    """Sums over the images seen, kept on the device: reading them waits for it."""

    loss: Float[Array, ""]
    correct: Int[Array, ""]
    images: Int[Array, ""]

    def means(self) -> tuple[float, float]:
        """The mean loss and the accuracy."""
        loss, correct, images = jax.device_get(self)
        return float(loss) / int(images), int(correct) / int(images)


def no_totals() -> Totals:
    """Zeros, in three arrays because each is donated."""
    return Totals(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def add(totals: Totals, losses: Array, logits: Array, labels: Array) -> Totals:
    """Add a batch; images of a class below 0 are padding."""
    real = labels >= 0
    return Totals(
        totals.loss + jnp.sum(jnp.where(real, losses, 0)),
        # The label of padding is not a class, so it is never predicted.
        totals.correct + jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32),
        totals.images + jnp.sum(real, dtype=jnp.int32),
    )


class State(NamedTuple):
    """Everything that one step of training passes to the next; the content of a checkpoint."""

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    step: Int[Array, ""]  # counts micro-batches
    key: Key[Array, ""]
    order: Int[Array, " images"]  # of the images in this epoch
    totals: Totals  # of this epoch so far


def make_model(config: Config, recipe: Recipe, classes: int) -> nn.Module:
    """The network."""
    groups, momentum = recipe.groups, recipe.norm_momentum
    norms = {
        "bcn": partial(
            BatchChannelNorm, num_groups=groups, estimate=config.estimate, momentum=momentum
        ),
        "bn": partial(BatchNorm, momentum=momentum),
        "gn": partial(nn.GroupNorm, num_groups=groups, epsilon=1e-5),
        "none": None,
    }
    shared: dict[str, Any] = {
        "num_classes": classes,
        "conv": WSConv if config.ws else nn.Conv,
        "norm": norms[config.norm],
        "dtype": jnp.dtype(config.dtype),
    }
    if config.network == "resnet":
        return ResNet(config.depth, **shared)
    return VGG(recipe.blocks, **shared)


def make_schedule(recipe: Recipe, steps: int) -> optax.Schedule:
    """The learning rate over a number of optimizer steps."""
    match recipe.schedule:
        case "constant":
            return optax.constant_schedule(recipe.learning_rate)
        case "cosine":
            return optax.cosine_decay_schedule(recipe.learning_rate, steps)
        case "step":
            drops = {steps // 2: 0.1, steps * 3 // 4: 0.1}
            return optax.piecewise_constant_schedule(recipe.learning_rate, drops)


def make_optimizer(config: Config, recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Adam or SGD for a number of steps, each of which takes all micro-batches of a batch."""
    rate = make_schedule(recipe, steps)
    decay = optax.add_decayed_weights(
        config.weight_decay,
        # Scales and biases have one axis.
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    if config.optimizer == "adam":
        chain = optax.chain(clip, optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))
    else:
        chain = optax.chain(clip, decay, optax.sgd(rate, 0.9, nesterov=True))
    if recipe.micro_batches == 1:
        return chain
    return optax.MultiSteps(chain, recipe.micro_batches).gradient_transformation()


def first_state(
    model: nn.Module, optimizer: optax.GradientTransformation, shape: tuple[int, ...], seed: int
) -> State:
    """The state before the first step, for training images of this shape."""
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros((1, *shape[1:])), train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    step, order = jnp.zeros((), jnp.int32), jnp.arange(shape[0])
    opt_state = optimizer.init(params)
    return begin_epoch(State(params, batch_stats, opt_state, step, key, order, no_totals()))


def begin_epoch(state: State) -> State:
    """Shuffle the images, and reset the totals."""
    key, order_key = jax.random.split(state.key)
    order = jax.random.permutation(order_key, len(state.order))
    return state._replace(key=key, order=order, totals=no_totals())


def cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, " n"], smoothing: float = 0.0
) -> Float[Array, " n"]:
    """The loss of each image, in float32 whatever the dtype of the network."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: Config,
    recipe: Recipe,
    split: Callable[[Any], Any],
) -> Callable[[State, Split], State]:
    """One step of training, from the images on the devices to the updated parameters.

    `split` puts an equal part of a batch on each device. The last images of an epoch, too few for a
    batch, are left out; they differ from epoch to epoch.
    """

    def step(state: State, train: Split) -> State:
        start = state.step % recipe.steps(len(state.order)) * recipe.micro_batch
        batch = lax.dynamic_slice(state.order, (start,), (recipe.micro_batch,))
        key, shift_key, flip_key = jax.random.split(state.key, 3)
        images = split(train.images[batch])
        images = data.random_shift(shift_key, images, recipe.shift)
        if recipe.flip:
            images = data.random_flip(flip_key, images)
        labels = split(train.labels[batch])

        def mean_loss(params: Any) -> tuple[Array, tuple[Array, Array, Any]]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                data.to_float(images),
                train=True,
                mutable=["batch_stats"],
            )
            losses = cross_entropy(logits, labels, config.label_smoothing)
            return losses.mean(), (losses, logits, updates.get("batch_stats", {}))

        gradient, (losses, logits, batch_stats) = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        totals = add(state.totals, losses, logits, labels)
        return State(params, batch_stats, opt_state, state.step + 1, key, state.order, totals)

    return step


def make_evaluation(
    model: nn.Module, size: int, split: Callable[[Any], Any]
) -> Callable[[State, Split, Any], Totals]:
    """Evaluate `size` held-out images, beginning at any of them."""

    def evaluate(state: State, test: Split, start: Array) -> Totals:
        images = lax.dynamic_slice_in_dim(test.images, start, size)
        labels = lax.dynamic_slice_in_dim(test.labels, start, size)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, data.to_float(split(images)), train=False)
        return add(no_totals(), cross_entropy(logits, labels), logits, labels)

    return evaluate


def is_finite(state: State) -> Array:
    """Whether the loss so far and the parameters are finite."""
    values = (state.totals.loss, *jax.tree.leaves(state.params))
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in values]))


class Trainer:
    """The data of a run on the devices, and its compiled programs."""

    def __init__(
        self, config: Config, recipe: Recipe, dataset: Dataset, placement: Placement
    ) -> None:
        """Put the data on the devices."""
        self.config, self.recipe, self._placement = config, recipe, placement
        self.steps = recipe.steps(len(dataset.train.labels))
        size = min(EVALUATION_BATCH, len(dataset.test.labels))
        self._size = -(-size // placement.count) * placement.count  # the same on each device
        padded = data.pad(dataset.test, self._size)
        self._train, self._test = placement.replicate((dataset.train, padded))
        self._model = make_model(config, recipe, len(dataset.classes))
        batches = recipe.epochs * self.steps // recipe.micro_batches
        self._optimizer = make_optimizer(config, recipe, batches)
        shape = dataset.train.images.shape
        self._make_state = partial(first_state, self._model, self._optimizer, shape, config.seed)

    def _compile(self, function: Callable[..., Any], *args: Any, donate: bool = False) -> Any:
        """Compile ahead of time, so that the speed of an epoch does not include it."""
        shardings, donated = self._placement.replicated, (0,) if donate else ()
        jitted = jax.jit(function, out_shardings=shardings, donate_argnums=donated)
        return compile_program(jitted.lower(*args), cache=self.config.compilation_cache)

    @cached_property
    def first_state(self) -> State:
        """See `first_state`."""
        state: State = self._compile(self._make_state)()
        return state

    @cached_property
    def like(self) -> State:
        """The types of a state, which take no compilation."""
        return self._placement.abstract(self._make_state)

    @cached_property
    def step(self) -> Callable[[State, Split], State]:
        """See `make_step`."""
        split = self._placement.split
        step = make_step(self._model, self._optimizer, self.config, self.recipe, split)
        return self._compile(step, self.like, self._train, donate=True)

    @cached_property
    def begin_epoch(self) -> Callable[[State], State]:
        """See `begin_epoch`."""
        return self._compile(begin_epoch, self.like, donate=True)

    @cached_property
    def evaluate(self) -> Callable[[State, Split, Any], Totals]:
        """See `make_evaluation`."""
        evaluate = make_evaluation(self._model, self._size, self._placement.split)
        return self._compile(evaluate, self.like, self._test, np.int32(0))

    @cached_property
    def is_finite(self) -> Callable[[State], Array]:
        """See `is_finite`."""
        return self._compile(is_finite, self.like)

    def fit(
        self,
        state: State,
        checkpoints: Checkpoints,
        results: Results,
        signals: Signals,
        bar: ProgressBar,
    ) -> None:
        """Train from a state to the last epoch. The metrics of each epoch are added to the results.

        Raises:
            TrainingError: the loss or a weight is not finite, or a file cannot be written.
            Stopped: a signal asked for it; the state is saved.
        """
        for epoch in range(len(results.history) + 1, self.recipe.epochs + 1):
            first, started = int(state.step), time.perf_counter()
            for done in range(first + 1, epoch * self.steps + 1):
                # Dispatch is asynchronous: the host queues the next step while this one runs.
                state = self.step(state, self._train)
                if bar.is_due():
                    bar.show(done, *state.totals.means())
                    if jax.process_count() == 1:  # several would check different steps
                        self._require_finite(state, checkpoints)
                if signals.noted or done % self.config.checkpoint_every == 0:
                    self._save(checkpoints, state, results)
                if signals.noted:
                    raise Stopped(signals.noted, epoch, results.folder)
            train_loss, train_accuracy = state.totals.means()
            seconds = time.perf_counter() - started
            self._require_finite(state, checkpoints)
            test_loss, test_accuracy = self.test(state)
            images = (epoch * self.steps - first) * self.recipe.micro_batch
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": seconds,
                "images_per_second": images / seconds,
            }
            results.add(row, checkpoints.kept)
            state = self.begin_epoch(state)
            self._save(checkpoints, state, results, score=test_accuracy)

    def test(self, state: State) -> tuple[float, float]:
        """Loss and accuracy over the held-out images."""
        starts = range(0, len(self._test.labels), self._size)
        parts = [self.evaluate(state, self._test, np.int32(start)) for start in starts]
        return jax.tree.map(lambda *values: sum(values), *jax.device_get(parts)).means()

    def _require_finite(self, state: State, checkpoints: Checkpoints) -> None:
        if self.is_finite(state):
            return
        loss, rate = float(state.totals.loss), self.recipe.learning_rate
        found = "some weights are not" if math.isfinite(loss) else f"the loss is {loss}"
        alternative = ", or use a norm" if self.config.norm == "none" else ""
        raise TrainingError(
            f"Loss and weights must stay finite, but by step {int(state.step)} {found}, so "
            f"training stopped. Lower the learning rate, which is {rate:g}{alternative}."
            f"{checkpoints.kept()}"
        )

    def _save(
        self, checkpoints: Checkpoints, state: State, results: Results, score: float | None = None
    ) -> None:
        self._require_finite(state, checkpoints)
        checkpoints.save(int(state.step), state, {"history": results.history}, score)


def train(config: Config) -> dict[str, float]:
    """Train, and return the metrics of the last epoch."""
    recipe = resolve(config)
    dataset = data.load(config.dataset, config.data_dir)
    shape, held_out = dataset.train.images.shape, len(dataset.test.labels)
    trainer = Trainer(config, recipe, dataset, Placement(config.devices, recipe.micro_batch))
    settings = settings_of(config, recipe, classes=dataset.classes, images=shape)
    default = default_folder(config, recipe)
    folder = results.make_folder(config.output, default, settings, resume=config.resume)
    devices.wait_for_all()

    with Checkpoints(folder / "checkpoints") as checkpoints:
        found = checkpoints.latest(trainer.like)
        history = [] if found is None else found.metadata["history"]
        # Before compilation, so that a folder that cannot be written to is reported at once.
        with Results(folder, settings, history, tensorboard=config.tensorboard) as written:
            print(*describe(config, recipe), sep="\n")
            print(f"{shape[0]:,} training and {held_out:,} held-out images")
            if len(history) == recipe.epochs:
                print(f"nothing is left to do: all {recipe.epochs} epochs of {folder} are done")
                return written.history[-1]
            if found is not None:
                print(f"resuming after step {found.step:,}")
            started = time.perf_counter()
            with progress.status("compiling the training step and the evaluation"):
                state = trainer.first_state if found is None else found.state
                programs = trainer.step, trainer.begin_epoch, trainer.evaluate, trainer.is_finite
            seconds = time.perf_counter() - started
            print(f"compiled {len(programs)} programs in {seconds:.1f} s")
            print(results.HEADER, flush=True)
            steps, done = trainer.steps, int(state.step)
            bar = ProgressBar(steps, recipe.epochs, recipe.micro_batch, done=done)
            with Signals() as signals, bar:
                trainer.fit(state, checkpoints, written, signals, bar)
    parameters = sum(p.size for p in jax.tree.leaves(trainer.like.params))
    print(f"{parameters:,} parameters, {written.speed():,.0f} images/s, ", end="")
    print(f"{devices.peak_memory()}; results in {folder}")
    return written.history[-1]


def evaluate(config: Config) -> dict[str, float]:
    """Evaluate the last and the best checkpoint of a run; return the metrics of the best one."""
    folder, config, _ = results.read_run(config)
    recipe, dataset = resolve(config), data.load(config.dataset, config.data_dir)
    trainer = Trainer(config, recipe, dataset, Placement(1, recipe.micro_batch))
    metrics: dict[str, float] = {}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for name, find in ("last", checkpoints.latest), ("best", checkpoints.best):
            if found := find(trainer.like):
                loss, accuracy = trainer.test(found.state)
                metrics = {"step": found.step, "test_loss": loss, "test_accuracy": accuracy}
                print(f"{name} (step {found.step:,}): loss {loss:.4g}, accuracy {accuracy:.2%}")
    if not metrics:
        raise TrainingError(f"There is no checkpoint in {folder} yet: train first.")
    return metrics


def predict(config: Config, picture: Path) -> dict[str, float]:
    """Classify a picture with the best checkpoint of a run; return a probability per class."""
    folder, config, settings = results.read_run(config)
    recipe, classes, shape = resolve(config), settings["classes"], tuple(settings["images"])
    image = data.read_picture(picture, shape[1:], light_on_dark=config.dataset == "digits")
    model = make_model(config, recipe, len(classes))
    optimizer = make_optimizer(config, recipe, 1)
    placement = Placement(1, recipe.micro_batch)
    like = placement.abstract(partial(first_state, model, optimizer, shape, config.seed))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        best = checkpoints.best(like) or checkpoints.latest(like)
    if best is None:
        raise TrainingError(f"There is no checkpoint in {folder} yet: train first.")
    variables = {"params": best.state.params, "batch_stats": best.state.batch_stats}

    @jax.jit
    def classify(variables: Any, image: Array) -> Array:
        logits: Any = model.apply(variables, data.to_float(image[None]), train=False)
        return jax.nn.softmax(logits[0].astype(jnp.float32))

    program = compile_program(classify.lower(variables, image), cache=config.compilation_cache)
    probabilities = dict(zip(classes, program(variables, image).tolist(), strict=True))
    first, *others = sorted(classes, key=probabilities.__getitem__, reverse=True)[:3]
    less = ", ".join(f"{name} {probabilities[name]:.1%}" for name in others)
    print(f"{picture} shows {first}: {probabilities[first]:.1%} ({less})")
    return probabilities


def main(config: Config) -> dict[str, float]:
    """Train, evaluate or predict, as the configuration says, and return the result.

    Raises:
        TrainingError: a value is out of range, data or checkpoints are absent or damaged, the
            output folder holds another run or cannot be written to, or the loss is not finite.
        Stopped: a signal ended training; its state is saved.
    """
    devices.connect(config.distributed, config.coordinator, config.num_processes, config.process_id)
    with progress.printing_in_first_process():
        if config.predict is not None:
            return predict(config, config.predict)
        return evaluate(config) if config.eval_only else train(config)


def command_line() -> None:
    """Run the command line; errors that the user can put right are shown without a traceback."""
    with progress.plain_errors("train_cifar.py"):
        # The first line and the examples; there is no docstring under `python -OO`.
        main(tyro.cli(Config, description="\n\n".join((__doc__ or "").split("\n\n")[:2])))


if __name__ == "__main__":
    command_line()
