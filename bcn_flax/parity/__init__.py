"""Prove that a Flax and a PyTorch module compute the same, or find out where they part."""

from bcn_flax.parity.axes import AXES, CHANNELS, SAME, AxisOrder
from bcn_flax.parity.comparison import assert_parity, compare
from bcn_flax.parity.observations import Name, Observation, Side
from bcn_flax.parity.optimizers import Optimizer, adam, sgd
from bcn_flax.parity.report import Comparison
from bcn_flax.parity.rows import Row
from bcn_flax.parity.tolerances import Tolerance

__all__ = [
    "AXES",
    "CHANNELS",
    "SAME",
    "AxisOrder",
    "Comparison",
    "Name",
    "Observation",
    "Optimizer",
    "Row",
    "Side",
    "Tolerance",
    "adam",
    "assert_parity",
    "compare",
    "sgd",
]
