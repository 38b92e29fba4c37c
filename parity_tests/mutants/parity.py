"""Defects in the harness: what it calls equal, and what it computes in float64."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

WIDENING = "bcn_flax/parity/widening.py"
TORCH_SIDE = "bcn_flax/parity/torch_side.py"
JUDGING = "bcn_flax/parity/judging.py"
REPORT = "bcn_flax/parity/report.py"

VERDICTS = ("test_harness_verdicts.py",)
in_widening = partial(
    Mutant,
    file=WIDENING,
    hint="test_a_function_that_narrows_is_computed_in_float64",
    tests=("test_widening.py",),
)
in_verdicts = partial(Mutant, tests=VERDICTS)

MUTANTS = (
    in_widening(
        "a-literal-stays-rounded",
        old="return np.float64(_meant(float(x.val), dtype)) if is_narrow(dtype) else x.val",
        new="return x.val",
        why="An epsilon of float32 is another one in float64: equal modules differ.",
    ),
    in_widening(
        "inner-programs-narrow",
        old="made = jax.make_jaxpr(partial(evaluate, x))(*_wide_inputs(x))",
        new="return x",
        why="The body of a loop is not computed in float64.",
    ),
    in_widening(
        "numbers-keep-their-dtype",
        old="return np.dtype(np.float64) if isinstance(x, np.dtype | type) and is_narrow(x) else x",
        new="return x",
        why="A cast narrows all the same.",
    ),
    in_widening(
        "digits-are-dropped",
        old='if primitive.name == "reduce_precision":',
        new='if primitive.name == "no such operation":',
        why="An operation that drops digits narrows all the same.",
    ),
    in_widening(
        "an-algorithm-for-float32",
        old="if isinstance(x, DotAlgorithm | DotAlgorithmPreset):",
        new="if isinstance(x, DotAlgorithm):",
        why="A product of matrices in a stated algorithm of float32 cannot be compiled.",
    ),
    in_widening(
        "a-constant-is-any-decimal",
        old='decimal = float(f"{value:.{digits}g}")',
        new='decimal = float(f"{value:.3g}")',
        why="An epsilon, or 0.044715, is taken for another number.",
        hint="test_a_constant_of_a_formula_is_not_rounded",
    ),
    in_widening(
        "a-constant-loses-its-sign",
        old="simple = float(np.copysign(_SIMPLE[np.abs(_SIMPLE - abs(value)).argmin()], value))",
        new="simple = float(_SIMPLE[np.abs(_SIMPLE - abs(value)).argmin()])",
        why="A negative constant stays rounded.",
        hint="test_a_constant_of_a_formula_is_not_rounded",
    ),
    in_widening(
        "half-precision-is-guessed",
        old="if np.dtype(dtype) != np.float32:",
        new="if False:",
        why="A constant of bfloat16 may stand for many numbers: equal modules differ.",
        hint="test_a_constant_of_half_precision_that_may_be_many_numbers_is_refused",
    ),
    in_widening(
        "bits-of-float64",
        old='    "bitcast_convert_type",\n',
        new="",
        why="The bits of a float64 are no number of 32 bits.",
        hint="test_what_depends_on_the_bits_is_computed_as_it_is_written",
    ),
    in_widening(
        "linen-keeps-its-dtype",
        old="        _widen_dtype(context.module)\n",
        new="",
        why="A linen module that narrows rounds the constants of what follows.",
        hint="test_the_dtypes_of_linen_are_replaced_and_the_module_is_left_alone",
    ),
    in_widening(
        "nnx-keeps-its-dtype",
        old="        _widen_dtype(part)\n",
        new="        pass\n",
        why="An NNX module that narrows rounds the constants of what follows.",
        hint="test_the_dtypes_of_nnx_are_replaced",
    ),
    in_verdicts(
        "pytorch-narrows",
        file=TORCH_SIDE,
        old="return torch.float64 if narrow else x",
        new="return x",
        why="PyTorch's module casts to float32 in the comparison in float64: equal modules differ.",
        hint="test_what_pytorch_narrows_is_computed_in_float64",
    ),
    in_verdicts(
        "the-default-dtype-stays-wide",
        file=TORCH_SIDE,
        old="        torch.set_default_dtype(default)\n",
        new="        pass\n",
        why="Whatever the user makes afterwards is of float64.",
        hint="test_what_pytorch_narrows_is_computed_in_float64",
    ),
    in_verdicts(
        "gradients-are-not-perturbed",
        file=TORCH_SIDE,
        old="        with perturbing:\n",
        new="        with nullcontext():\n",
        why="A gradient that is 0 but for rounding is measured by its own size: a false alarm.",
        hint="test_the_gradient_of_a_key_s_bias_is_0_but_for_roundings",
    ),
    in_verdicts(
        "equal-without-evidence",
        file=REPORT,
        old='return "inconclusive" if self.missing else "equal"',
        new='return "equal"',
        why="Modules that were not compared in float64 are called equal.",
        hint="test_without_float64",
    ),
    in_verdicts(
        "different-is-inconclusive",
        file="bcn_flax/parity/comparison.py",
        old='allow_inconclusive and comparison.verdict == "inconclusive"',
        new="allow_inconclusive",
        why="A test that allows inconclusive comparisons passes modules that differ.",
        hint="test_a_difference_is_never_allowed_as_inconclusive",
    ),
    in_verdicts(
        "everything-is-visible",
        file=JUDGING,
        old="row.tolerance is not None or not size or row.allowed <= _VISIBLE * size",
        new="True",
        why="An array of which anything is allowed counts as evidence.",
        hint="test_an_array_that_rounding_alone_decides",
    ),
    in_verdicts(
        "outputs-of-0-are-evidence",
        file=JUDGING,
        old="if outputs and not any(row.error.scale for row in outputs):",
        new="if not outputs:",
        why="Models with a head of zeros are called equal, whatever they compute.",
        hint="test_outputs_of_0_show_nothing",
    ),
    in_verdicts(
        "no-warning-near-the-limit",
        file=REPORT,
        old="_NEAR = 0.5",
        new="_NEAR = 5.0",
        why="A comparison that all but fails looks like any other.",
        hint="test_the_verdict_says_how_much",
    ),
)
