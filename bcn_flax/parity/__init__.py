"""Prove that a Flax and a PyTorch module compute the same, or find out where they part.

    from bcn_flax.parity import assert_parity

    def test_my_port():
        assert_parity(FlaxNet(), TorchNet(), images)

`images` lie as Flax wants them. The weights are PyTorch's, moved by `bcn_flax.interop`; or Flax's,
or each side's own, or random ones, which leave no two layers alike: `weights` says. What is
compared is all that can be seen: outputs, statistics, gradients of inputs and parameters, and the
parameters after each step of an optimizer; in evaluation, in training, and in evaluation again;
eager and jitted. `compare` does the same and returns the `Comparison`, which prints as a report.

How to read it: what differs first explains what differs later, and comes first. The table has the
largest error of each quantity, absolute, relative, in units in the last place, and as a share of
what is allowed, which follows from the dtype, the number of terms, and what the model makes of a
rounding (`bcn_flax.parity.tolerances`). Both modules run in float64, too. Where they agree there,
the report says which of them is farther from the truth in float32; where not, they compute
different things, and it says what it found: the first layer whose output differs, another epsilon,
another momentum, a biased variance here and an unbiased one there.

What the harness cannot know, say: `axes`, whether three axes have channels to move; `names`, which
module is which; `call`, how your module is told that it trains; `oracle`, where you have a truth of
your own; and `rules`, which variable is which tensor and how its axes lie. If Flax's kernel is
`(features, heads, size)` where PyTorch has `(heads * size, features)`:

    def of_heads(torch_shape, flax_shape, facts):
        if len(flax_shape) != 3:
            return kernel(torch_shape, flax_shape, facts)  # of bcn_flax.interop
        return [
            Layout(
                "transposed, heads apart",
                to_flax=lambda weight: weight.T.reshape(flax_shape),
                to_torch=lambda kernel: kernel.reshape(torch_shape[::-1]).T,
                torch_shape=lambda _: torch_shape,
            )
        ]

    rules = {**RULES, ("params", "kernel"): Rule(("weight",), of_heads)}

PyTorch is imported only by a comparison.
"""

from bcn_flax.parity.axes import AXES, CHANNELS, SAME, AxisOrder
from bcn_flax.parity.comparison import assert_parity, compare
from bcn_flax.parity.observations import Name, Observation, Side, observation
from bcn_flax.parity.optimizers import Optimizer, adam, sgd
from bcn_flax.parity.report import Comparison
from bcn_flax.parity.rows import Row
from bcn_flax.parity.sides import ORACLE, Oracle
from bcn_flax.parity.tolerances import Tolerance

__all__ = [
    "AXES",
    "CHANNELS",
    "ORACLE",
    "SAME",
    "AxisOrder",
    "Comparison",
    "Name",
    "Observation",
    "Optimizer",
    "Oracle",
    "Row",
    "Side",
    "Tolerance",
    "adam",
    "assert_parity",
    "compare",
    "observation",
    "sgd",
]
