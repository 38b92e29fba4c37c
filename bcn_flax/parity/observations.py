"""What a step shows: every number that a user could observe, by name."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax.traverse_util import flatten_dict

from bcn_flax.interop.trees import Variables

Values = np.ndarray[Any, Any]


class Name(NamedTuple):
    """Of a number: what it is, and whose.

    Attributes:
        quantity: "output", "input gradient", "gradient", "statistic" or "parameter".
        path: in Flax, such as `batch_norm/mean`; the number of an input or output, if several.
    """

    quantity: str
    path: str

    def __str__(self) -> str:
        """As it is printed, and as tolerances name it."""
        return f"{self.quantity} {self.path}".rstrip()


Observation = Mapping[Name, Values]

# In the order in which they come about: what differs first explains the rest.
QUANTITIES = ("output", "statistic", "input gradient", "gradient", "parameter")


class Side(Protocol):
    """A model in training: it keeps its parameters, statistics and optimizer between the calls."""

    def __call__(
        self, inputs: Sequence[Values], output_gradients: Sequence[Values], train: bool
    ) -> Observation:
        """Go forward and back, and in training take a step of the optimizer.

        Args:
            inputs: in Flax's order of axes.
            output_gradients: of each output, in Flax's order.
            train: whether this is training.

        Returns:
            The outputs, the gradients of the inputs and of the parameters, and the statistics and
            parameters as they are afterwards, under Flax's names and in Flax's layouts.
        """
        ...


def observation(
    outputs: Mapping[str, Values],
    input_gradients: Mapping[str, Values],
    gradients: Mapping[str, Any],
    variables: Variables,
) -> dict[Name, Values]:
    """Put together what a step showed.

    Args:
        outputs: by name.
        input_gradients: by name.
        gradients: in the tree of the parameters.
        variables: parameters and statistics after the step.
    """
    trees = {
        "statistic": variables.get("batch_stats", {}),
        "gradient": gradients,
        "parameter": variables.get("params", {}),
    }
    return {
        **{Name("output", name): y for name, y in outputs.items()},
        **{Name("input gradient", name): dx for name, dx in input_gradients.items()},
        **{
            Name(quantity, "/".join(path)): np.asarray(leaf)
            for quantity, tree in trees.items()
            for path, leaf in flatten_dict(tree).items()
        },
    }


def numbered(values: Sequence[Any]) -> dict[str, Any]:
    """Inputs or outputs by name: by number, if there are several."""
    return {str(i) if len(values) > 1 else "": value for i, value in enumerate(values)}
