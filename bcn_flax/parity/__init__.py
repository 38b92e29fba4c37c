"""Prove that a Flax and a PyTorch module compute the same, or find out where they differ.

    from bcn_flax.parity import assert_parity

    def test_my_port():
        assert_parity(FlaxNet(), TorchNet(), images)

`images` are in Flax's order of axes; several inputs are a tuple, or a dictionary of keyword
arguments. `weights` chooses the weights: PyTorch's, converted by
`bcn_flax.interop`; Flax's; each side's own; or random ones, so that no two layers are equal. All
that can be observed is compared: outputs, statistics, gradients of inputs and parameters, and the
parameters after each step of an optimizer; in evaluation, in training, and in evaluation again;
eager and jitted. Layers of dropout have the same masks on both sides. `compare` does the same and
returns the `Comparison`, which prints as a report, and as data with `to_json`.

There are three verdicts. "equal": no array differs by more than is allowed, in the modules' own
precision and in float64, which tells other formulas from roundings. "different": one does.
"inconclusive": none does, but a difference might not have been seen, because the modules cannot be
computed in float64, an allowed error is as large as the values, or every output is 0; the report
says what to do. In float64 both modules compute everything, whatever their `dtype`s and casts say
(`bcn_flax.parity.widening`), so that a difference is found that float32 or fresh weights hide.

How to read the report: the first difference comes first and explains the later ones. The table has
the largest error of each quantity: absolute, relative, in units in the last place, and as a share
of the allowed error. That follows from the dtype, the number of terms, and how the model amplifies
rounding errors (`bcn_flax.parity.errors`). Both modules also run in float64. If they agree there,
the report says which of them is less accurate in float32. If not, they compute different things,
and the report says what it found: the module whose input agrees and whose output does not, or the
two modules between which the difference arises; another epsilon, another momentum, a biased
variance in one and an unbiased one in the other.

Some arguments are for what the harness cannot find out: `axes`, the order of the axes of an array
with three of them; `names`, which module is which; `call`, the keywords that switch your module to
training; `oracle`, an independent implementation; and `rules`, which variable is which tensor and
how its axes are ordered. For example, if Flax's kernel is `(features, heads, size)` and PyTorch's
`(heads * size, features)`:

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

from bcn_flax.parity.comparison import assert_parity, compare
from bcn_flax.parity.errors import Accuracy, Row, Tolerance
from bcn_flax.parity.judging import ORACLE, Oracle
from bcn_flax.parity.protocol import (
    Implementation,
    Name,
    Observation,
    Optimizer,
    adam,
    observation,
    sgd,
)
from bcn_flax.parity.report import Comparison
from bcn_flax.parity.torch_side import AXES, CHANNELS, SAME, AxisOrder

__all__ = [
    "AXES",
    "CHANNELS",
    "ORACLE",
    "SAME",
    "Accuracy",
    "AxisOrder",
    "Comparison",
    "Implementation",
    "Name",
    "Observation",
    "Optimizer",
    "Oracle",
    "Row",
    "Tolerance",
    "adam",
    "assert_parity",
    "compare",
    "observation",
    "sgd",
]
