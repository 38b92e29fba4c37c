"""The settings of a run: the command line, and the recipes that complete it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, get_args, get_origin, get_type_hints

from bcn_flax.models.architecture import WIDTHS
from training import TrainingError
from training.data import FORMATS, DatasetName

Network = Literal["vgg", "resnet"]
Norm = Literal["bcn", "bn", "gn", "none"]
Optimizer = Literal["adam", "sgd"]
Schedule = Literal["constant", "cosine", "step"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Config:
    """The command line. None means: as the recipe of the data set says."""

    #: Data set to train on. digits needs no download; CIFAR is downloaded if it is not there.
    dataset: DatasetName = "digits"
    #: Folder of the CIFAR archive or its files, and where it is downloaded to; or the archive.
    data_dir: Path = Path("data")
    #: Folder for the results; by default a new one in runs, named after the settings.
    output: Path | None = None
    #: Resume the run in the output folder, by default the last run of these settings; start it if
    #: there is none.
    resume: bool = False
    #: Number of steps between checkpoints within an epoch; another is saved after each epoch.
    checkpoint_every: int = 1000
    #: Only evaluate the last and the best checkpoint of a run.
    eval_only: bool = False
    #: Only classify this picture, with the best checkpoint of a run.
    predict: Path | None = None
    #: Seed of the initial weights, the order of the images and their augmentation.
    seed: int = 0

    #: VGG, or the ResNet for CIFAR.
    network: Network = "vgg"
    #: Depth of the ResNet: 20, 32, 44, 56, 110 and so on.
    depth: int = 20
    #: Normalization after each convolution: batch-channel, batch, group or none.
    norm: Norm = "bcn"
    #: Standardize the weights of the convolutions.
    ws: bool = True
    #: With bcn, normalize by the running averages in training, as micro-batches need, rather than
    #: by the batch.
    estimate: bool = True
    #: Number of channel groups of bcn and gn; by default 16 for digits, 32 for cifar10 and
    #: cifar100, and 8 in a ResNet.
    groups: int | None = None
    #: Weight of the old running average of bcn and bn; by default 0.95 for digits at batch
    #: size 32, 0.9 for cifar10 and cifar100 at 64, and adapted to other batch sizes: the average is
    #: over some 640 images.
    norm_momentum: float | None = None
    #: Dtype of the computation; parameters and running averages are always float32.
    dtype: Dtype = "float32"

    #: Number of images per optimizer step, over all devices; by default 32 for digits, 64 for
    #: cifar10 and cifar100.
    batch_size: int | None = None
    #: Number of images per forward and backward pass; by default the batch size. The gradients of
    #: the micro-batches of a batch are averaged; each updates the running averages.
    micro_batch: int | None = None
    #: Number of passes over the training images; by default 15 for digits, 10 for cifar10 and
    #: cifar100.
    epochs: int | None = None
    #: Adam, or stochastic gradient descent with Nesterov momentum 0.9.
    optimizer: Optimizer = "adam"
    #: Initial learning rate; by default, with Adam, 0.002 for digits at batch size 32, 0.00025 for
    #: cifar10 and cifar100 at 64, and otherwise in proportion to the root of the batch size; with
    #: SGD, 0.05 at batch size 32, 0.1 at 64, and otherwise in proportion to the batch size.
    learning_rate: float | None = None
    #: Learning rate schedule: constant, falling to 0 along half a cosine, or divided by 10 after
    #: a half and after three quarters of the steps; by default cosine for digits, constant for
    #: cifar10 and cifar100.
    schedule: Schedule | None = None
    #: Weight decay of kernels, not of norms and biases: decoupled with Adam (AdamW), L2 with SGD.
    weight_decay: float = 0.0
    #: Label smoothing: the part of each label that is spread equally over all classes.
    label_smoothing: float = 0.0
    #: Largest norm of the gradient; longer ones are scaled down to it.
    clip_norm: float | None = None

    #: Number of devices per micro-batch; by default all of them.
    devices: int | None = None
    #: Join the other processes of a run started by Slurm, Open MPI, Kubernetes or on a TPU pod.
    distributed: bool = False
    #: Instead of --distributed: host and port of process 0, for example 10.0.0.1:1234.
    coordinator: str | None = None
    #: With a coordinator: number of processes.
    num_processes: int | None = None
    #: With a coordinator: number of this process, from 0.
    process_id: int | None = None
    #: Also write files for TensorBoard; needs the extra of that name.
    tensorboard: bool = False
    #: Keep compiled programs in the user's cache folder: the next run starts in seconds.
    compilation_cache: bool = True


#: The settings that may change when a run is resumed, and why each may.
FREE: Mapping[str, str] = {
    "data_dir": "the data are the same wherever they are",
    "output": "it says which run is resumed, and the folder may have been moved",
    "resume": "it is not set in the first part of a run",
    "checkpoint_every": "saving a state does not change it",
    "eval_only": "it changes nothing in the run",
    "predict": "it changes nothing in the run",
    "devices": "the results are the same but for rounding",
    "distributed": "the results are the same but for rounding",
    "coordinator": "it may have another address",
    "num_processes": "the results are the same but for rounding",
    "process_id": "each process has its own",
    "tensorboard": "it only adds files",
    "compilation_cache": "the programs are the same",
}

# Settings that are worth a look even if they are the defaults.
_MAIN = ("dataset", "network", "norm", "ws", "batch_size", "epochs", "optimizer", "learning_rate")


@dataclass(frozen=True)
class Recipe:
    """The defaults of a data set; after `resolve`, the settings of a run."""

    blocks: tuple[tuple[int, ...], ...]  # features of the convolutions, block by block
    shift: int  # largest random shift of an image, in pixels
    flip: bool  # whether images are mirrored at random
    groups: int
    batch_size: int
    micro_batch: int
    epochs: int
    schedule: Schedule
    learning_rate: float  # of Adam, at this batch size
    norm_momentum: float  # at this micro-batch

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a batch."""
        return self.batch_size // self.micro_batch

    def steps(self, images: int) -> int:
        """The number of micro-batches in an epoch; images too few for a batch are left out.

        Raises:
            TrainingError: there are fewer images than a batch has.
        """
        rule = f"at most the number of training images, {images}"
        _require(self.batch_size <= images, "batch_size", self.batch_size, rule)
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
    # Small enough for a CPU, where XLA's convolutions of 2x2 pixels are slow: hence two blocks.
    # Most digits do not stay digits when mirrored.
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
        norm_momentum=0.95,  # an average over 20 batches or 640 images, as of 0.9 at 64
    ),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
}
RESNET_GROUPS = 8  # of two channels each in the first stage


def resolve(config: Config) -> Recipe:
    """The recipe of the data set, adapted to the batch size and overridden by the command line.

    Raises:
        TrainingError: a value is out of range.
    """
    _require_choices(config)
    _require(0 <= config.seed < 2**32, "seed", config.seed, f"from 0 to {2**32 - 1}")
    _require_count("checkpoint_every", config.checkpoint_every)
    smoothing, decay, clip_norm = config.label_smoothing, config.weight_decay, config.clip_norm
    _require(0 <= smoothing < 1, "label_smoothing", smoothing, "at least 0 and less than 1")
    _require(0 <= decay < math.inf, "weight_decay", decay, "at least 0 and finite")
    _require_positive("clip_norm", 1.0 if clip_norm is None else clip_norm)
    recipe = RECIPES[config.dataset]
    if config.network == "resnet":
        depth, published = config.depth, "Published are 20, 32, 44, 56 and 110."
        rule = "6 n + 2 for a whole n from 1 on"
        _require(depth >= 8 and depth % 6 == 2, "depth", depth, rule, published)
        recipe = dataclasses.replace(recipe, groups=RESNET_GROUPS, blocks=(WIDTHS,))
    recipe = _override(_adapt(recipe, config), config)
    _require_count("epochs", recipe.epochs)
    _require_positive("learning_rate", recipe.learning_rate)
    _require(
        0 <= recipe.norm_momentum < 1,
        "norm_momentum",
        recipe.norm_momentum,
        "at least 0 and less than 1",
        "It is the weight of the old running average: a PyTorch momentum m is 1 - m here.",
    )
    if config.norm in ("bcn", "gn"):
        _require_groups(recipe.groups, recipe.blocks)
    return recipe


def _adapt(recipe: Recipe, config: Config) -> Recipe:
    """Keep what an epoch does as batches shrink and steps multiply."""
    batch_size = recipe.batch_size if config.batch_size is None else config.batch_size
    micro_batch = batch_size if config.micro_batch is None else config.micro_batch
    _require_count("batch_size", batch_size)
    _require_count("micro_batch", micro_batch)
    divides = batch_size % micro_batch == 0
    _require(divides, "micro_batch", micro_batch, f"a divisor of batch_size={batch_size}")
    # The steps of SGD add up to the same sum if each is in proportion to its batch. Those of Adam
    # have the same length however noisy the gradient; n of them in random directions go sqrt(n)
    # times as far as one.
    ratio = batch_size / recipe.batch_size
    adam, sgd = recipe.learning_rate * ratio**0.5, 0.05 / 32 * batch_size
    return dataclasses.replace(
        recipe,
        batch_size=batch_size,
        micro_batch=micro_batch,
        learning_rate=adam if config.optimizer == "adam" else sgd,
        # An image fades from the running averages after the same number of later images.
        norm_momentum=recipe.norm_momentum ** (micro_batch / recipe.micro_batch),
    )


def _override(recipe: Recipe, config: Config) -> Recipe:
    names = {field.name for field in dataclasses.fields(Recipe)} & vars(config).keys()
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    return dataclasses.replace(recipe, **given)


def _require(holds: bool, name: str, value: object, rule: str, advice: str = "") -> None:
    if not holds:
        raise TrainingError(f"{name} must be {rule}, but {name}={value!r}. {advice}".rstrip())


CHOICES = {
    "dataset": DatasetName,
    "network": Network,
    "norm": Norm,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "dtype": Dtype,
}


def _require_choices(config: Config) -> None:
    for name, kind in CHOICES.items():
        value, choices = getattr(config, name), get_args(kind)
        _require(value is None or value in choices, name, value, f"one of {', '.join(choices)}")


def _require_count(name: str, value: int) -> None:
    holds = isinstance(value, int) and value >= 1
    _require(holds, name, value, "a whole number and at least 1", "Omit it for the default.")


def _require_positive(name: str, value: float) -> None:
    holds = 0 < value < math.inf
    _require(holds, name, value, "positive and finite", "Omit it for the default.")


def _require_groups(groups: int, blocks: Sequence[Sequence[int]]) -> None:
    _require_count("groups", groups)
    channels = sorted({features for block in blocks for features in block})
    common = math.gcd(*channels)
    _require(
        common % groups == 0,
        "groups",
        groups,
        f"a divisor of the channels of every layer, which are {', '.join(map(str, channels))}",
        f"Use one of {', '.join(str(n) for n in range(1, common + 1) if common % n == 0)}.",
    )


def default_folder(config: Config, recipe: Recipe) -> Path:
    """The default output folder, named after the settings that matter most."""
    network = "" if config.network == "vgg" else f"-{config.network}{config.depth}"
    layers = config.norm + "-ws" * config.ws
    batch = f"batch{recipe.batch_size}"
    if recipe.micro_batches > 1:
        batch += f"x{recipe.micro_batch}"
    return Path("runs") / f"{config.dataset}{network}-{layers}-{batch}-seed{config.seed}"


def settings_of(config: Config, recipe: Recipe, **of_data: Any) -> dict[str, Any]:
    """All settings of a run, as they come back from its file."""
    return as_json({**vars(config), **vars(recipe), **of_data})


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from their file."""
    return dict(json.loads(json.dumps(dict(settings), default=str)))


def describe(config: Config, recipe: Recipe) -> list[str]:
    """A line for each setting that is not the default of the data set, and one for the others."""
    settings = settings_of(config, recipe)
    default = resolve(Config(dataset=config.dataset))
    usual = settings_of(Config(), default)
    changed = [name for name in settings if settings[name] != usual[name]]
    main = [f"{name}={_short(settings[name])}" for name in _MAIN if name not in changed]
    hidden = len(settings) - len(changed) - len(main)
    lines = [
        f"{name:>18}  {_short(settings[name])} (default {_short(usual[name])})" for name in changed
    ]
    return [*lines, f"by default: {', '.join(main)} and {hidden} more, all in config.json"]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a run, from its file.

    Raises:
        TrainingError: the file is absent or cannot be read.
    """
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        _refuse_config(path, str(error))
    if not isinstance(settings, dict):
        _refuse_config(path, f"it must be an object, but is {settings!r:.40}")
    return settings


def with_settings_of(config: Config, path: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration with the settings of an earlier run, but those in `FREE`, and all of them.

    Raises:
        TrainingError: the file cannot be read, or a setting is not as a run writes it.
    """
    run = read_config(path)
    types = {name: kind for name, kind in get_type_hints(Config).items() if name not in FREE}
    for name, kind in types.items():
        if name not in run or not _has_type(run[name], kind):
            _refuse_config(path, f"{name} is {run.get(name, 'absent')!r:.40}")
    config = dataclasses.replace(config, **{name: run[name] for name in types})
    try:
        settings = settings_of(config, resolve(config))
    except TrainingError as error:
        _refuse_config(path, str(error).rstrip("."))
    shape, classes = FORMATS[config.dataset]
    names, images = run.get("classes"), run.get("images")
    for name, holds, rule in (
        *((name, run.get(name) == settings[name], settings[name]) for name in settings),
        ("classes", _is_list(names, str, classes), f"{classes} names"),
        ("images", _is_list(images, int, 4) and images[1:] == [*shape], f"a number and {shape}"),
    ):
        if name not in FREE and not holds:
            _refuse_config(path, f"{name} must be {rule}, but is {run.get(name, 'absent')!r:.40}")
    return config, run


def _has_type(value: object, kind: Any) -> bool:
    """Whether a value from a JSON file has the type of a setting."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if options := get_args(kind):
        return any(_has_type(value, option) for option in options)
    return isinstance(value, (int, float) if kind is float else kind) and (
        isinstance(value, bool) == (kind is bool)
    )


def _is_list(values: object, kind: type, length: int) -> TypeGuard[list[Any]]:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(_has_type(value, kind) for value in values)
    )


def _refuse_config(path: Path, reason: str) -> NoReturn:
    raise TrainingError(
        f"Cannot read {path}, which holds the settings of the run: {reason}. Restore it, or start "
        "a new run with another --output."
    )
