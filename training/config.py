"""What decides a run: the command line, and the recipes that fill in what it leaves open."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bcn_flax.models import Norm
from bcn_flax.models.resnet import WIDTHS
from training import checks
from training.data import DatasetName

Network = Literal["vgg", "resnet"]
Optimizer = Literal["adam", "sgd"]
Schedule = Literal["constant", "cosine", "step"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Config:
    """What the command line says. Where it says None, the data set decides, by its recipe."""

    #: What to train on; digits needs no download, the others are downloaded if need be.
    dataset: DatasetName = "digits"
    #: The folder for CIFAR, downloaded or unpacked, or its archive.
    data_dir: Path = Path("data")
    #: The folder for the results; by default a new one in runs, named for what it holds.
    output: Path | None = None
    #: Go on with the run in the output folder, by default the last of its name; begin it if there
    #: is none.
    resume: bool = False
    #: Steps between two checkpoints within an epoch; there is one after each epoch, too.
    checkpoint_every: int = 1000
    #: Only evaluate the last and the best checkpoint of a run.
    eval_only: bool = False
    #: Only say what this picture shows, by the best checkpoint of a run.
    predict: Path | None = None
    #: Decides the first weights, the order of the images and their augmentation.
    seed: int = 0

    #: A VGG, or the ResNet for CIFAR.
    network: Network = "vgg"
    #: Layers of the ResNet: 20, 32, 44, 56, 110 and so on.
    depth: int = 20
    #: After each convolution: batch-channel, batch, group or no normalization.
    norm: Norm = "bcn"
    #: Whether to standardize the weights of the convolutions.
    ws: bool = True
    #: Whether bcn normalizes by running averages in training, as micro-batches need, or by the
    #: batch.
    estimate: bool = True
    #: Number of channel groups, of bcn and gn; by default 16 for digits, 32 for cifar10 and
    #: cifar100, and 8 in a ResNet.
    groups: int | None = None
    #: Weight of the old running average, of bcn and bn; by default 0.95 for digits at batch
    #: size 32, 0.9 for cifar10 and cifar100 at 64, and fitted to other batch sizes: averages
    #: over some 640 images.
    norm_momentum: float | None = None
    #: Of the computation; parameters and running averages are float32 in any case.
    dtype: Dtype = "float32"

    #: Images in a step of the optimizer, over all devices; by default 32 for digits, 64 for cifar10
    #: and cifar100.
    batch_size: int | None = None
    #: Images that pass the network together; by default the whole batch. Of smaller ones the
    #: gradients are averaged, and the running averages move with each.
    micro_batch: int | None = None
    #: How often to go through the training images; by default 15 for digits, 10 for cifar10 and
    #: cifar100.
    epochs: int | None = None
    #: Adam, or stochastic gradient descent with Nesterov momentum 0.9.
    optimizer: Optimizer = "adam"
    #: Of the first step; by default, with Adam, 0.002 for digits at batch size 32, 0.00025 for
    #: cifar10 and cifar100 at 64, and otherwise in proportion to the root of the batch size; with
    #: SGD, 0.05 at batch size 32, 0.1 at 64, and otherwise in proportion to the batch size.
    learning_rate: float | None = None
    #: Keep the learning rate constant, let it fall to 0 along half a cosine, or divide it by 10
    #: after a half and after three quarters of the steps; by default cosine for digits, constant
    #: for cifar10 and cifar100.
    schedule: Schedule | None = None
    #: Of kernels alone, not of norms and biases: decoupled with Adam (AdamW), L2 with SGD.
    weight_decay: float = 0.0
    #: The part of each label that goes to all classes alike.
    label_smoothing: float = 0.0
    #: Scale gradients down to this norm where theirs is larger.
    clip_norm: float | None = None

    #: Over how many to spread each micro-batch; by default all of them.
    devices: int | None = None
    #: Be one of several processes that train together, as Slurm, Open MPI, Kubernetes or a TPU pod
    #: started them.
    distributed: bool = False
    #: The same without these: host and port of the process 0, as in 10.0.0.1:1234, ...
    coordinator: str | None = None
    #: ... how many processes there are, ...
    num_processes: int | None = None
    #: ... and which one this is, from 0 on.
    process_id: int | None = None
    #: Whether to write files for TensorBoard, too; needs the extra of that name.
    tensorboard: bool = False


# What may change when a run goes on.
FREE = {
    *("data_dir", "output", "resume", "checkpoint_every", "eval_only", "predict", "tensorboard"),
    *("devices", "distributed", "coordinator", "num_processes", "process_id"),
}


@dataclass(frozen=True)
class Recipe:
    """What a data set asks for; what the command line says instead, wins."""

    blocks: tuple[tuple[int, ...], ...]  # features of the convolutions, block by block
    shift: int  # pixels by which images are moved at random
    flip: bool  # whether images are mirrored at random
    groups: int
    batch_size: int
    micro_batch: int
    epochs: int
    schedule: Schedule
    learning_rate: float  # Adam's, at this batch size
    norm_momentum: float  # at this micro-batch

    @property
    def micro_batches(self) -> int:
        """In each batch."""
        return self.batch_size // self.micro_batch

    def steps(self, images: int) -> int:
        """How many micro-batches there are in an epoch; the images too few for a batch are left."""
        return images // self.batch_size * self.micro_batches


# The annotated implementation's experiment, labml_nn/normalization/weight_standardization.
CIFAR = Recipe(
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
RECIPES: dict[DatasetName, Recipe] = {
    # Small enough for a CPU, and two blocks only: at 2x2 pixels XLA's convolutions are slow there.
    # Mirrored, most digits are none.
    "digits": Recipe(
        blocks=((32, 32), (64, 64)),
        shift=1,
        flip=False,
        groups=16,
        batch_size=32,
        micro_batch=32,
        epochs=15,
        schedule="cosine",
        learning_rate=2e-3,
        norm_momentum=0.95,  # 20 batches or 640 images back, as far as 0.9 looks with 64
    ),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
}
RESNET_GROUPS = 8  # of two channels in its first stage


def resolve(config: Config) -> Recipe:
    """The recipe of the data set, fitted to the batch size and overruled by the command line.

    Raises:
        TrainingError: a value is out of its range.
    """
    checks.known("dataset", config.dataset, get_args(DatasetName))
    checks.known("network", config.network, get_args(Network))
    checks.known("norm", config.norm, get_args(Norm))
    checks.known("optimizer", config.optimizer, get_args(Optimizer))
    checks.known("dtype", config.dtype, get_args(Dtype))
    checks.seed(config.seed)
    checks.at_least_one("checkpoint_every", config.checkpoint_every)
    checks.fraction("label_smoothing", config.label_smoothing)
    checks.not_negative("weight_decay", config.weight_decay)
    if config.clip_norm is not None:
        checks.positive("clip_norm", config.clip_norm)
    recipe = RECIPES[config.dataset]
    if config.network == "resnet":
        checks.depth(config.depth)
        recipe = dataclasses.replace(recipe, groups=RESNET_GROUPS, blocks=(WIDTHS,))
    batch_size = recipe.batch_size if config.batch_size is None else config.batch_size
    micro_batch = batch_size if config.micro_batch is None else config.micro_batch
    checks.at_least_one("batch_size", batch_size)
    checks.at_least_one("micro_batch", micro_batch)
    checks.micro_batch(micro_batch, batch_size)

    ratio = batch_size / recipe.batch_size
    fitted = dataclasses.replace(
        recipe,
        micro_batch=micro_batch,
        # Keep what an epoch does as batches shrink and steps multiply. SGD's steps add up to the
        # same sum if each is in proportion to its batch. Adam's have the same length however
        # noisy the gradient; n of them in random directions go sqrt(n) times as far as one.
        learning_rate={
            "adam": recipe.learning_rate * ratio**0.5,
            "sgd": 0.05 / 32 * batch_size,
        }[config.optimizer],
        # The running averages forget an image after the same number of later images.
        norm_momentum=recipe.norm_momentum ** (micro_batch / recipe.micro_batch),
    )
    names = {field.name for field in dataclasses.fields(Recipe)} & vars(config).keys()
    said = {name: value for name in names if (value := getattr(config, name)) is not None}
    recipe = dataclasses.replace(fitted, **said)

    checks.at_least_one("epochs", recipe.epochs)
    checks.known("schedule", recipe.schedule, get_args(Schedule))
    checks.positive("learning_rate", recipe.learning_rate)
    checks.norm_momentum(recipe.norm_momentum)
    if config.norm in ("bcn", "gn"):
        checks.groups(recipe.groups, recipe.blocks)
    return recipe


def default_folder(config: Config, recipe: Recipe) -> Path:
    """Where to, if nobody says: the name has the choices that matter most."""
    network = "" if config.network == "vgg" else f"-{config.network}{config.depth}"
    layers = config.norm + "-ws" * config.ws
    batch = f"batch{recipe.batch_size}"
    if recipe.micro_batches > 1:
        batch += f"x{recipe.micro_batch}"
    return Path("runs") / f"{config.dataset}{network}-{layers}-{batch}-seed{config.seed}"


def as_decided(config: Config, written: Mapping[str, Any]) -> Config:
    """A configuration with all that decided a run taken from what is written of it."""
    decided = {name: written[name] for name in vars(config).keys() & written.keys() - FREE}
    return dataclasses.replace(config, **decided)
