"""Every complaint of the training script: one function a rule.

Each message states the rule, the values seen and the way out.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SIZE = 170_052_171
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is read can be read."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"Cannot read {path}: {error.strerror or error}. Name another --data-dir."
        ) from error


def data_is_folder(path: Path) -> None:
    """Data come from a folder."""
    if path.exists() and not path.is_dir():
        raise TrainingError(
            f"The data must lie in a folder, but {path} is a file. Name the folder that holds "
            "cifar-10-batches-bin: --data-dir FOLDER. If that file is the archive, unpack it "
            f"first: mkdir -p data && tar -xzf {path} -C data"
        )


def cifar10_files(missing: Sequence[Path], data_dir: Path) -> None:
    """The data set has been downloaded and unpacked."""
    if missing:
        raise TrainingError(
            f"The files of CIFAR-10 must lie in {data_dir}, but these are missing: "
            f"{', '.join(map(str, missing))}. Either\n"
            f"  1. download the binary version, {_CIFAR10_URL}\n"
            f"     ({_CIFAR10_SIZE:,} bytes, sha256 {_CIFAR10_SHA256}),\n"
            f"     and unpack it there: mkdir -p {data_dir} && "
            f"tar -xzf cifar-10-binary.tar.gz -C {data_dir}\n"
            "  2. name the folder that holds it: --data-dir FOLDER\n"
            "  3. train on a data set that needs no download: --dataset digits"
        )


def whole_records(path: Path, size: int, record: int) -> None:
    """A file is cut off unless it ends where a record ends."""
    if size == 0 or size % record:
        raise TrainingError(
            f"{path} must hold whole records of {record} bytes, but its size is {size} bytes, "
            f"{size // record} records and {size % record} bytes. The file is cut off or of "
            "another format: unpack the binary version of the archive again."
        )


def labels(path: Path, values: Sequence[int], classes: int) -> None:
    """A label is the number of a class."""
    for record, label in enumerate(values):
        if label >= classes:
            raise TrainingError(
                f"The labels in {path} must be from 0 to {classes - 1}, but that of record "
                f"{record} is {label}. The file is damaged or of another format: unpack the "
                "binary version of the archive again."
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


def finite_loss(loss: float, step: int, learning_rate: float, norm: str) -> None:
    """Once the loss is not a number, no later step can mend it."""
    if not math.isfinite(loss):
        way_out = f"Lower the learning rate, which is {learning_rate:g}"
        if norm == "none":
            way_out += ", or use a norm"
        raise TrainingError(
            f"The loss must stay finite, but it was {loss} by step {step}, so training stopped. "
            f"{way_out}."
        )
