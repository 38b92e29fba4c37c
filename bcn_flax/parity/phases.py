"""What the modules are given, and when."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bcn_flax.interop import layouts
from bcn_flax.parity.observations import Values

Inputs = Any | tuple[Any, ...]


class Phase(NamedTuple):
    """One call of both modules.

    Attributes:
        name: as it is printed.
        inputs: in Flax's order of axes.
        train: whether it is a step of training.
        steps: of training so far, this one included; after it, one more.
    """

    name: str
    inputs: list[Values]
    train: bool
    steps: int


def phases(inputs: Inputs, steps: int | Sequence[Inputs]) -> list[Phase]:
    """Evaluation, training, and evaluation again.

    Raises:
        ValueError: something is no input, or no number of steps.
    """
    first = _as_arrays("inputs", inputs)
    batches = _batches(first, steps)
    last = Phase("evaluation after training", first, False, len(batches) + 1)
    return [
        Phase("evaluation", first, False, 1),
        *(Phase(f"training step {i}", batch, True, i) for i, batch in enumerate(batches, 1)),
        *([last] if batches else []),
    ]


def _batches(first: list[Values], steps: int | Sequence[Inputs]) -> list[list[Values]]:
    if isinstance(steps, int) and steps >= 0:
        return [first] * steps
    if not isinstance(steps, list | tuple):
        raise ValueError(
            "steps must be their number, or a list of the inputs of each, but it is "
            f"{steps if isinstance(steps, int) else f'of type {type(steps).__name__}'}."
        )
    batches = [_as_arrays(f"steps[{i}]", batch) for i, batch in enumerate(steps)]
    for i, batch in enumerate(batches):
        if len(batch) != len(first):
            raise ValueError(
                f"Each step must have as many inputs as there are in evaluation, {len(first)}, but "
                f"steps[{i}] has {len(batch)}. Several inputs of one step are a tuple in the list."
            )
    return batches


def _as_arrays(name: str, inputs: Inputs) -> list[Values]:
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    for x in inputs:
        if not layouts.is_array(x):
            raise ValueError(
                f"{name} must be an array, or a tuple of arrays if there are several, but there is "
                f"a {type(x).__name__}. Give np.asarray(x) if it is one input, tuple(x) if it "
                "holds all of them; for inputs that have names, put a small module around yours."
            )
    return [layouts.to_numpy(x) for x in inputs]
