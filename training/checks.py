"""Every complaint of the training script: one function a rule.

Each message states the rule, the values seen and the way out.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class TrainingError(ValueError):
    """Something that the user can put right; the command line shows it without a traceback."""


def known(name: str, value: object, choices: Sequence[str]) -> None:
    """A choice is one of its choices."""
    if value not in choices:
        raise TrainingError(f"{name} must be one of {', '.join(choices)}, but {name}={value!r}.")


def at_least_one(name: str, value: int) -> None:
    """A count is a whole number from 1 on."""
    if not isinstance(value, int) or value < 1:
        raise TrainingError(
            f"{name} must be a whole number and at least 1, but {name}={value}. Leave it out for "
            "the data set's own."
        )


def positive(name: str, value: float) -> None:
    """A rate is positive and finite."""
    if not 0 < value < math.inf:
        raise TrainingError(
            f"{name} must be positive and finite, but {name}={value}. Leave it out for the data "
            "set's own."
        )


def norm_momentum(value: float) -> None:
    """A moving average that only ever keeps its old value would learn nothing."""
    if not 0 <= value < 1:
        raise TrainingError(
            "norm_momentum is the weight of the old running average and must be at least 0 and "
            f"less than 1, but norm_momentum={value}. A PyTorch momentum m is 1 - m here."
        )


def seed(value: int) -> None:
    """A seed fits into 32 bits, so that no two of them start the same run."""
    if not 0 <= value < 2**32:
        raise TrainingError(f"seed must be from 0 to {2**32 - 1}, but seed={value}.")


def groups(value: int, blocks: Sequence[Sequence[int]]) -> None:
    """Groups are equal parts of the channels of every layer."""
    at_least_one("groups", value)
    channels = sorted({features for block in blocks for features in block})
    common = math.gcd(*channels)
    if common % value:
        divisors = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise TrainingError(
            f"groups must divide the channels of every layer, but groups={value} and the layers "
            f"have {', '.join(map(str, channels))} channels. Any of {divisors} would do."
        )


def batch_size(value: int, training_images: int) -> None:
    """A batch is taken from the training set without repeating an image."""
    if value > training_images:
        raise TrainingError(
            f"batch_size must be at most the number of training images, but batch_size={value} "
            f"and there are {training_images} of them. Use a smaller batch."
        )


def no_results(folder: Path, found: Sequence[str]) -> None:
    """Results are never overwritten."""
    if found:
        raise TrainingError(
            f"The output folder must not hold results already, but {folder} holds "
            f"{', '.join(found)}. Name another folder, move that one away, or leave --output out: "
            "a new folder is made then."
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What is written can be written."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot write to {folder}: {error.strerror or error}. Name another --output."
        ) from error


def output_is_folder(path: Path) -> None:
    """Results go into a folder of their own. An empty name is that of the current folder."""
    if path == Path():
        raise TrainingError(
            "The output must be a folder of its own, but it is the current folder or has an empty "
            "name. Name another --output, or leave it out: a new folder is made then."
        )
    if path.exists() and not path.is_dir():
        raise TrainingError(f"The output must be a folder, but {path} is a file. Name another one.")


def not_finite(loss: float, step: int, learning_rate: float, norm: str) -> TrainingError:
    """Once the loss is not a number, no later step can mend it."""
    seen = f"the loss was {loss}" if not math.isfinite(loss) else "there were weights that are not"
    way_out = f"Lower the learning rate, which is {learning_rate:g}"
    if norm == "none":
        way_out += ", or use a norm"
    return TrainingError(
        f"Loss and weights must stay finite, but {seen} by step {step}, so training stopped. "
        f"{way_out}. The last good checkpoint is kept."
    )


def not_negative(name: str, value: float) -> None:
    """A strength is 0 or more, and finite."""
    if not 0 <= value < math.inf:
        raise TrainingError(f"{name} must be at least 0 and finite, but {name}={value}.")


def fraction(name: str, value: float) -> None:
    """A part of a whole that leaves something of it."""
    if not 0 <= value < 1:
        raise TrainingError(f"{name} must be at least 0 and less than 1, but {name}={value}.")


def depth(value: int) -> None:
    """A ResNet has a first and a last layer, and pairs of them in each of three stages."""
    if value < 8 or (value - 2) % 6:
        raise TrainingError(
            f"depth must be 6 n + 2 for a whole n from 1 on, but depth={value}. Published are 20, "
            "32, 44, 56 and 110."
        )


def micro_batch(value: int, batch_size: int) -> None:
    """A batch consists of equal micro-batches."""
    if batch_size % value:
        raise TrainingError(
            f"micro_batch must divide batch_size, but micro_batch={value} and "
            f"batch_size={batch_size}."
        )


def devices(count: int, available: int) -> None:
    """Devices are used that are there."""
    if not 1 <= count <= available:
        raise TrainingError(
            f"devices must be from 1 to {available}, which JAX sees here, but devices={count}."
        )


def spread(micro_batch: int, devices: int) -> None:
    """Each device gets an equal part of the images that pass the network together."""
    if micro_batch % devices:
        raise TrainingError(
            f"Micro-batches must be a multiple of the devices, but they have {micro_batch} images "
            f"and there are {devices} devices. Use fewer with --devices, or another --batch-size "
            "or --micro-batch."
        )


@contextmanager
def connecting(coordinator: str | None) -> Iterator[None]:
    """Processes that train together find each other."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        sought = (
            "what Slurm, Open MPI, Kubernetes or a TPU pod say"
            if coordinator is None
            else coordinator
        )
        raise TrainingError(
            f"Cannot join the other processes by {sought}: {error} Say --coordinator HOST:PORT, "
            "--num-processes and --process-id in each of them, or leave --distributed out to train "
            "in this one alone."
        ) from error


def output_is_said(output: Path | None) -> None:
    """Processes agree on a folder."""
    if output is None:
        raise TrainingError(
            "Of several processes all must write to one folder that all can reach, but none was "
            "said. Say --output FOLDER, the same for all."
        )


def no_run(output: Path | None) -> TrainingError:
    """There must be a run to look at."""
    where = "in runs for these arguments" if output is None else f"in {output}"
    return TrainingError(
        f"There must be a run with a checkpoint, but there is none {where}. Name its folder with "
        "--output, or train first."
    )


@contextmanager
def reading_config(path: Path) -> Iterator[None]:
    """What decided a run can be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"Cannot read {path}, which says what decided the run: {error}. Restore it, or begin a "
            "new run in another --output."
        ) from error


def same_run(
    folder: Path, then: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]
) -> None:
    """A run goes on as it began."""
    names = sorted((then.keys() | now.keys()) - set(free))
    changed = [
        f"{name} was {then.get(name)} and is {now.get(name)}"
        for name in names
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise TrainingError(
            f"A run goes on with the arguments that it began with, but of the one in {folder} "
            f"{'; '.join(changed)}. Say the same again, or begin another run in another --output."
        )


@contextmanager
def importing_tensorboard() -> Iterator[None]:
    """What writes its files is installed."""
    try:
        yield
    except ImportError as error:
        raise TrainingError(
            "TensorBoard's files need tensorboardX, which is not installed: pip install -e "
            '".[tensorboard]", or leave --tensorboard out.'
        ) from error


@contextmanager
def picture(path: Path) -> Iterator[None]:
    """A picture can be read."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot read {path} as a picture: {error.strerror or error}. Name a file that Pillow "
            "can read, such as a PNG."
        ) from error
