"""Defects in the rules for arguments."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

CHECKS = "bcn_flax/checks.py"
mutant = partial(Mutant, tests=("test_arguments.py",))

MUTANTS = (
    mutant(
        "string-is-a-number",
        CHECKS,
        "    if not isinstance(number, Real) or isinstance(number, bool):\n",
        "    if isinstance(number, bool):\n",
        'A momentum of "0.9" is taken for 0.9.',
        hint="a_layer_is_not_made",
    ),
    mutant(
        "subnormal-epsilon",
        CHECKS,
        "not _SMALLEST <= epsilon",
        "not 0 < epsilon",
        "An epsilon that is flushed to 0 gives NaN on a constant channel.",
        hint="a_layer_is_not_made",
    ),
    mutant(
        "whole-float-is-an-integer",
        CHECKS,
        "    if not isinstance(integer, Integral) or isinstance(integer, bool):\n",
        "    if not isinstance(integer, Real) or isinstance(integer, bool):\n",
        "num_groups=4.0 passes in one library, and fails in the others.",
        hint="a_layer_is_not_made",
    ),
    mutant(
        "statistics-broadcast",
        "bcn_flax/norms.py",
        "    if values.shape != (size,) or not",
        "    if not",
        "A restored mean of shape (1,) is that of all channels.",
        hint="restored_statistics",
    ),
    mutant(
        "integer-kernel",
        "bcn_flax/weight_standardization.py",
        '    _require_real_floats("kernel", kernel)\n',
        "",
        "An integer kernel becomes zeros.",
        hint="a_kernel_is_not_standardized",
    ),
    mutant(
        "false-of-numpy",
        "bcn_torch/norms.py",
        "            value = checks.require_flag_or_none(name, value)\n",
        "            pass\n",
        "`update_stats is False` does not see the False of NumPy.",
        hint="any_false_freezes",
    ),
)
