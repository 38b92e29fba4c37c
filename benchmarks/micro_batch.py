"""Held-out accuracy over the batch size: what batch-channel normalization is for, measured.

    python benchmarks/micro_batch.py
    taskset -c 1 nohup python benchmarks/micro_batch.py &  # leaves the other cores alone

Every norm at every batch size trains the small VGG of `train_cifar.py` on the 8x8 digits for the
same few epochs: with many, all norms reach the same accuracy, and nothing is left to compare. Each
pair of norm and batch size has a learning rate of its own, the best of a common grid on images and
seeds that are not reported: a quarter of the training images is held out for this choice. Only
then, after training on all of them with other seeds, the test images are looked at.

SGD with Nesterov momentum 0.9, and not Adam, because its learning rate has a plain rule: in
proportion to the batch size, under which the steps of an epoch add up to the same sum however many
they are. (Adam's rule, the root of the batch size, rests on the noise of the gradient, and that is
what the norms differ in.) It falls to 0 along half a cosine.

It takes half an hour on one core. Each run is a line in a file of the cache, so that a later call
goes on where this one stopped. Empty the cache when the layers have changed.
"""

from timing import RESULTS, cpu_name  # isort: skip  # sets up the environment, so it comes first

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import sklearn.model_selection
import tyro
from flax import linen as nn
from jaxtyping import Array, Float, Int

from bcn_flax import BatchChannelNorm, BatchNorm, WSConv
from bcn_flax.models import VGG

sys.path.insert(0, str(Path(__file__).parents[1]))
from training import data
from training.data import Split

BLOCKS = ((32, 32), (64, 64))
GROUPS = 16
NORMS: dict[str, Callable[..., Any]] = {
    "BN": BatchNorm,
    "GN": partial(nn.GroupNorm, num_groups=GROUPS, epsilon=1e-5),
    "BCN": partial(BatchChannelNorm, num_groups=GROUPS),
}
NETWORKS = ("BN", "GN", "GN + WS", "BCN", "BCN + WS")
OURS = "BCN + WS"
SGD_MOMENTUM = 0.9
NORM_MOMENTUM = 0.95  # at this batch size, as in train_cifar.py:
REFERENCE_BATCH = 32


@dataclass(frozen=True)
class Config:
    """How much to measure, and where to."""

    seeds: int = 20
    """Reported runs of each norm and batch size, with the seeds 0, 1, ...; at least 2."""
    epochs: int = 3
    """How often each run goes through the training images."""
    cache: Path = Path("runs/micro_batch")
    """The folder that keeps what was measured already."""
    quick: bool = False
    """Only try the program: 2 norms, 2 batch sizes, 2 rates, 2 seeds, 1 epoch. The table then goes
    into the cache."""


class Plan(NamedTuple):
    """What is measured."""

    networks: Sequence[str]
    batch_sizes: Sequence[int]
    rates: Sequence[float]  # at the reference batch size, and in proportion to it at others
    tuning_seeds: Sequence[int]
    seeds: Sequence[int]
    epochs: int


@dataclass(frozen=True)
class Run:
    """All that decides a run, and so its key in the cache."""

    network: str
    batch_size: int
    rate: float
    seed: int
    epochs: int
    images: str  # on which it is scored: "validation" or "test"


class Score(NamedTuple):
    """How well a run ended."""

    accuracy: float
    loss: float


class State(NamedTuple):
    """All that training carries from one step to the next."""

    params: Any
    batch_stats: Any
    velocity: optax.OptState


class Task(NamedTuple):
    """Some images to train on, by their indices, and others to score on."""

    train: Split
    indices: Int[np.ndarray, " m"]
    held_out: Split


optimizer = optax.trace(SGD_MOMENTUM, nesterov=True)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def make_plan(config: Config) -> Plan:
    if config.quick:
        return Plan(("BN", "BCN + WS"), (4, 32), (0.03, 0.1), (1000,), (0, 1), 1)
    return Plan(
        networks=NETWORKS,
        batch_sizes=(1, 2, 4, 8, 32),
        rates=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
        tuning_seeds=(1000, 1001, 1002),
        seeds=range(config.seeds),
        epochs=config.epochs,
    )


def make_model(network: str, batch_size: int) -> VGG:
    """The network; its running averages forget an image after the same number of later images."""
    name, _, standardized = network.partition(" + ")
    norm = NORMS[name]
    if name != "GN":  # which has no running averages
        norm = partial(norm, momentum=NORM_MOMENTUM ** (batch_size / REFERENCE_BATCH))
    return VGG(blocks=BLOCKS, conv=WSConv if standardized else nn.Conv, norm=norm)


@partial(jax.jit, static_argnums=0)
def first_state(network: str, seed: Int[Array, ""], image: Array) -> State:
    """The state before the first step."""
    model = make_model(network, 1)
    variables = model.init(jax.random.key(seed), data.to_float(image), train=False)
    params = variables["params"]
    return State(params, variables.get("batch_stats", {}), optimizer.init(params))


# Whatever differs from run to run is an argument, so each norm and batch size compiles once.
@partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(
    network: str, state: State, train: Split, batch: Int[Array, " n"], rate: Float[Array, ""]
) -> State:
    """One step of training."""
    model = make_model(network, len(batch))

    def mean_loss(params: Any) -> tuple[Array, Any]:
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            data.to_float(train.images[batch]),
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, train.labels[batch]).mean(), updates

    gradient, updates = jax.grad(mean_loss, has_aux=True)(state.params)
    direction, velocity = optimizer.update(gradient, state.velocity)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    return State(params, updates.get("batch_stats", {}), velocity)


@partial(jax.jit, static_argnums=0)
def evaluate(network: str, state: State, images: Split) -> tuple[Array, Array]:
    """Accuracy and loss on these images."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = make_model(network, 1).apply(variables, data.to_float(images.images), train=False)
    losses = cross_entropy(logits, images.labels)
    return (logits.argmax(-1) == images.labels).mean(), losses.mean()


def schedule(run: Run, indices: Int[np.ndarray, " m"]) -> Iterator[tuple[np.ndarray, np.float32]]:
    """The images of each step and its learning rate; the last images, too few, are left out."""
    rng = np.random.default_rng(run.seed)
    steps = len(indices) // run.batch_size
    rate = run.rate * run.batch_size / REFERENCE_BATCH
    for epoch in range(run.epochs):
        order = rng.permutation(indices).astype(np.int32)
        for i in range(steps):
            done = (epoch * steps + i) / (run.epochs * steps)
            batch = order[i * run.batch_size : (i + 1) * run.batch_size]
            yield batch, np.float32(rate * (1 + math.cos(math.pi * done)) / 2)


def train(run: Run, task: Task) -> Score:
    """Train a network, and score it on the images held out."""
    state = first_state(run.network, run.seed, task.train.images[:1])
    for batch, rate in schedule(run, task.indices):
        # Dispatch is asynchronous: the next step is on its way while this one is computed.
        state = step(run.network, state, task.train, batch, rate)
    accuracy, loss = map(float, evaluate(run.network, state, task.held_out))
    # A run that diverged ranks last.
    return Score(accuracy, loss) if math.isfinite(loss) else Score(accuracy, math.inf)


def make_tasks() -> dict[str, Task]:
    """Training images to choose the learning rate on, and all of them, with the test images."""
    digits = data.digits()
    everything = np.arange(len(digits.train.labels))
    # As many as there are test images, so that scoring compiles once.
    rest, validation = sklearn.model_selection.train_test_split(
        everything,
        test_size=len(digits.test.labels),
        random_state=0,
        stratify=digits.train.labels,
    )
    held_out = Split(digits.train.images[validation], digits.train.labels[validation])
    images, held_out, test = jax.device_put((digits.train, held_out, digits.test))
    return {"validation": Task(images, rest, held_out), "test": Task(images, everything, test)}


def device() -> str:
    device = jax.devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind


def versions() -> str:
    names = ("jax", "jaxlib", "flax", "optax", "scikit-learn")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"Python {platform.python_version()}, {packages}"


class Scores:
    """Scores by run: out of the cache, or measured and put there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "runs.jsonl"
        self._tasks = make_tasks()
        self._surroundings = {
            "network_settings": [BLOCKS, GROUPS, SGD_MOMENTUM, NORM_MOMENTUM, REFERENCE_BATCH],
            "device": device(),
            "versions": versions(),
        }
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._known = {row["key"]: Score(*row["score"]) for row in map(json.loads, lines)}

    def __call__(self, run: Run) -> Score:
        """The score of the run."""
        key = json.dumps({**asdict(run), **self._surroundings}, sort_keys=True)
        if key not in self._known:
            started = time.perf_counter()
            score = self._known[key] = train(run, self._tasks[run.images])
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "score": score}) + "\n")
            print(
                f"{run.network:>8}  batch {run.batch_size:>2}  rate {run.rate:<5g}  seed "
                f"{run.seed:>4}  {run.images:>10} accuracy {score.accuracy:7.2%}  loss "
                f"{score.loss:.4f}  {time.perf_counter() - started:5.1f} s",
                flush=True,
            )
        return self._known[key]


class Cell(NamedTuple):
    """A norm at a batch size: the chosen learning rate, and the test accuracies in %."""

    rate: float
    accuracies: Float[np.ndarray, " seeds"]


Cells = Mapping[tuple[str, int], Cell]


def choose_rate(scores: Scores, plan: Plan, network: str, batch_size: int) -> float:
    """The learning rate of the best validation accuracy; of equal ones, that of the lower loss."""

    def quality(rate: float) -> tuple[float, float]:
        found = [
            scores(Run(network, batch_size, rate, seed, plan.epochs, "validation"))
            for seed in plan.tuning_seeds
        ]
        accuracy, loss = np.mean(found, 0)
        return accuracy, -loss

    return max(plan.rates, key=quality)


def measure(scores: Scores, plan: Plan, network: str, batch_size: int) -> Cell:
    """Choose the learning rate, then train with it on all training images, seed by seed."""
    rate = choose_rate(scores, plan, network, batch_size)
    runs = [Run(network, batch_size, rate, seed, plan.epochs, "test") for seed in plan.seeds]
    return Cell(rate, np.array([100 * scores(run).accuracy for run in runs]))


class Difference(NamedTuple):
    """Between two means, in points of accuracy, with its standard error."""

    points: float
    error: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} ± {self.error:.2f}"

    @property
    def sign(self) -> int:
        """1 or -1, or 0 if chance may well have made it: within two standard errors."""
        return int(np.sign(self.points)) if abs(self.points) > 2 * self.error else 0


def difference(cell: Cell, other: Cell) -> Difference:
    """How far the cell is above the other one."""
    points = cell.accuracies.mean() - other.accuracies.mean()
    return Difference(points, math.hypot(standard_error(cell), standard_error(other)))


def standard_error(cell: Cell) -> float:
    """Of the mean."""
    return cell.accuracies.std(ddof=1) / math.sqrt(len(cell.accuracies))


def accuracy(cell: Cell) -> str:
    return f"{cell.accuracies.mean():.2f} ± {cell.accuracies.std(ddof=1):.2f}"


def table(cells: Cells, plan: Plan, text: Callable[[Cell], str]) -> str:
    """A text for each cell in Markdown: norms down, batch sizes across."""
    header = ["norm", *(f"batch size {n}" for n in plan.batch_sizes)]
    rows = [[norm, *(text(cells[norm, n]) for n in plan.batch_sizes)] for norm in plan.networks]
    lines = [" | ".join(line) for line in (header, ["---"] * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def reading(cells: Cells, plan: Plan) -> str:
    """What the numbers say to the paper's claim, part by part."""
    least, most = min(plan.batch_sizes), max(plan.batch_sizes)
    ours, others = OURS, [network for network in plan.networks if network != OURS]
    change = {n: difference(cells[n, least], cells[n, most]) for n in ("BN", ours)}
    lag = {n: difference(cells[n, least], cells[ours, least]) for n in others}

    parts = [
        (f"{ours} keeps its accuracy from batch size {most} to {least}", change[ours], (0, 1)),
        (f"BN falls from batch size {most} to {least}", change["BN"], (-1,)),
        *((f"{n} is behind {ours} at batch size {least}", lag[n], (-1,)) for n in others),
    ]
    lines = [
        f"- {part}: {'yes' if found.sign in wanted else 'no'}, {found}"
        for part, found, wanted in parts
    ]
    holds = (
        change[ours].sign >= 0
        and change["BN"].sign < 0
        and all(lag[n].sign < 0 for n in ("BN", "GN") if n in lag)
    )
    rivals = [n for n in others if lag[n].sign >= 0]
    support = "These numbers support" if holds else "These numbers do not support all of"
    no_lead = f" They do not show it ahead of {' and '.join(rivals)} there." if rivals else ""
    verdict = (
        f"{support} the paper's claim, that {ours} keeps its accuracy at batch size {least}, where "
        f"BN falls and GN lags.{no_lead} Part by part, in points with standard errors, of which a "
        "difference counts beyond two:"
    )
    return "\n".join([verdict, "", *lines])


def write_table(path: Path, cells: Cells, plan: Plan) -> None:
    """Write all numbers, and what they say, as Markdown."""
    grid = ", ".join(f"{rate:g}" for rate in plan.rates)
    path.write_text(
        f"""\
Held-out accuracy in % after {plan.epochs} {"epoch" if plan.epochs == 1 else "epochs"} of the 8x8 \
digits: mean ± standard deviation over {len(plan.seeds)} seeds

{device()}, {versions()}

{table(cells, plan, accuracy)}

One of the {len(data.digits().test.labels)} images is 0.28. Smaller batches also mean more steps, \
as the epochs are the same: compare norms at a batch size rather than batch sizes.

{reading(cells, plan)}

Learning rates chosen on validation images and other seeds, out of {grid}, as they would be at \
batch size {REFERENCE_BATCH}; at batch size n they are times n / {REFERENCE_BATCH}:

{table(cells, plan, lambda cell: f"{cell.rate:g}")}
""",
        encoding="utf-8",
    )


def main(config: Config) -> None:
    """Measure what the cache lacks, and write the table."""
    plan = make_plan(config)
    scores = Scores(config.cache)
    cells = {
        (network, batch_size): measure(scores, plan, network, batch_size)
        for batch_size in plan.batch_sizes
        for network in plan.networks
    }
    folder = config.cache if config.quick else RESULTS
    write_table(folder / "micro_batch.md", cells, plan)
    print((folder / "micro_batch.md").read_text(encoding="utf-8"))
    print(f"written to {folder / 'micro_batch.md'}, from which docs/figures.py draws the figure")


if __name__ == "__main__":
    main(tyro.cli(Config))
