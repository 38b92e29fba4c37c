"""Defects in how the harness finds the place of a difference, and in what it takes and refuses."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

COUNTERPARTS, DIAGNOSIS, DROPOUT, FIRST, FLAX, JUDGING, PAIR, PROTOCOL, REPORT, TORCH = (
    f"bcn_flax/parity/{name}.py"
    for name in (
        "counterparts",
        "diagnosis",
        "dropout",
        "first_difference",
        "flax_side",
        "judging",
        "pair",
        "protocol",
        "report",
        "torch_side",
    )
)

in_place = partial(
    Mutant, hint="test_the_right_module_is_named", tests=("test_harness_diagnosis.py",)
)
in_explanation = partial(
    Mutant,
    file=DIAGNOSIS,
    hint="test_the_same_difference_in_many_modules",
    tests=("test_harness_explanations.py",),
)
in_dropout = partial(
    Mutant,
    file=DROPOUT,
    hint="test_dropout_gets_the_same_masks",
    tests=("test_harness_dropout.py",),
)
in_refusal = partial(
    Mutant,
    hint="test_random_numbers_that_cannot_be_the_same",
    tests=("test_harness_refusals.py",),
)
in_inputs = partial(
    Mutant,
    file=PROTOCOL,
    hint="test_inputs_may_be_named_and_nested",
    tests=("test_harness_inputs.py",),
)

MUTANTS = (
    # The place of the first difference
    in_place(
        name="other-counts-by-position",
        file=COUNTERPARTS,
        old="if len(names) == len(ours.get(place, ()))\n"
        "        for name, path in zip(names, ours.get(place, ()), strict=True)",
        new="for name, path in zip(names, ours.get(place, ()), strict=False)",
        why="Modules without weights are paired though one side has more of them.",
    ),
    in_place(
        name="owners-unpaired",
        file=COUNTERPARTS,
        old="found[names.pop()] = paths.pop()",
        new="names.pop(), paths.pop()",
        why="The layers themselves have no counterparts, only what is around them.",
    ),
    in_place(
        name="innocent-blocks",
        file=FIRST,
        old="if self._is_made_up_for(i):",
        new="if False:",
        why="A block that leaves its activation to the caller is called different.",
    ),
    in_place(
        name="unlike-classes-forgotten",
        file=FIRST,
        old="unlike.add((self.classes[name], returned))",
        new="pass",
        why="The second block of a class is accused, though the first one was found to be unlike.",
    ),
    in_place(
        name="first-rounding",
        file=FIRST,
        old="source = (large or sources)[0]",
        new="source = sources[0]",
        why="A rounded constant is named in the place of the formula that differs.",
    ),
    in_place(
        name="nothing-below-float32",
        file=FIRST,
        old="source = (large or sources)[0]",
        new="source = large[0] if large else -1",
        why="The place of a difference as small as roundings of float32 is the last module.",
    ),
    in_place(
        name="last-of-another-branch",
        file=FIRST,
        old="next((j for j in last if i in self._moved_by(j)), last[0] if last else None)",
        new="next(iter(last), None)",
        why="The module before is the one that was called before, whatever depends on it.",
    ),
    in_place(
        name="order-of-values-ignored",
        file=FIRST,
        old="return None if sorted_apart < apart / _JUMP and apart > _ROUNDING else float(apart)",
        new="return float(min(apart, sorted_apart))",
        why="The same values in another order count as equal, and the next module is accused.",
    ),
    in_place(
        name="sizes-made-up-for-at-once",
        file=FIRST,
        old="comparable if self.apart[i] == np.inf else comparable[:1]",
        new="comparable[:0]",
        why="Padding outside of a block counts as a difference.",
    ),
    in_place(
        name="calls-unnumbered",
        file=FIRST,
        old="several = (name, 1) in self.places",
        new="several = False",
        why="Which call of a shared module differs is not said.",
        hint="test_an_injected_defect_is_located",
    ),
    in_place(
        name="inputs-unseen",
        file=TORCH,
        old="return record(name, calls[name] - 1, False, (args, kwargs))",
        new="record(name, calls[name] - 1, False, ((), {}))",
        why="What modules get is not compared, and a difference between two is that of the second.",
        hint="test_an_injected_defect_is_located",
    ),
    # Explanations
    in_explanation(
        name="settings-one-by-one",
        old="found.setdefault(sentence, []).append(module_name(path))",
        new="found.setdefault(f'{path} {sentence}', []).append(module_name(path))",
        why="The same momentum in 17 layers makes 17 sentences.",
    ),
    in_explanation(
        name="float32-as-float64",
        old="return 1e-3 if (x == x.astype(np.float32)).all() else 1e-6",
        new="return 1e-9",
        why="An unbiased variance is not recognized in values that were rounded to float32.",
        hint="test_a_biased_variance_is_recognized_in_float32",
    ),
    in_explanation(
        name="one-times",
        old=" or math.isclose(ratio, 1, rel_tol=near / 100):",
        new=":",
        why="A rounding converges to 1 times the value.",
        hint="test_a_biased_variance_is_recognized_in_float32",
    ),
    # Dropout and other random numbers
    in_dropout(
        name="dropout-unscaled",
        old="return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x)) if",
        new="return jnp.where(kept, x, jnp.zeros_like(x)) if",
        why="What Flax keeps is not divided by how much is kept.",
    ),
    in_dropout(
        name="mask-of-channels-last",
        old="np.moveaxis(_kept(number, _channels_last(shape), rate), -1, 1)",
        new="_kept(number, shape, rate)",
        why="PyTorch drops other values than Flax.",
        hint="test_dropout_of_images",
    ),
    in_dropout(
        name="masks-go-on",
        old="        self.torch = []\n\n    def flax_dropout",
        new="        pass\n\n    def flax_dropout",
        why="The masks of the second call follow those of the first one.",
    ),
    in_dropout(
        name="shared-masks-forgotten",
        old="shape = tuple(1 if i in shared else n for i, n in enumerate(x.shape))",
        new="shape = tuple(x.shape)",
        why="Dropout of channels drops single pixels.",
    ),
    in_refusal(
        name="either-order-of-channels",
        file=DROPOUT,
        old="return fitting[0] if len(fitting) == 1 else None",
        new="return fitting[0] if fitting else None",
        why="Masks are taken to be equal, though their shapes do not show the order of axes.",
    ),
    in_refusal(
        name="dropout-in-a-scan",
        file=DROPOUT,
        old="self._transformed |= current_trace() != self._trace",
        new="pass",
        why="All steps of a scan have one mask, and PyTorch's have their own.",
    ),
    in_refusal(
        name="streams-unnoticed",
        file=FLAX,
        old="        notice()\n",
        new="",
        why="An NNX module that draws random numbers is compared.",
    ),
    in_refusal(
        name="number-of-masks-ignored",
        file=DROPOUT,
        old="if len(flax) != len(torch) or None",
        new="if None",
        why="Flax has dropout where PyTorch has none.",
        hint="test_wrong_arguments_are_refused",
    ),
    # Inputs and outputs
    in_inputs(
        name="names-of-one-side",
        old="{self.torch_names.get(name, name): x for name, x in keywords.items()}",
        new="keywords",
        why="PyTorch gets keyword arguments by Flax's names.",
    ),
    in_inputs(
        name="nested-names-shortened",
        old='keystr(path[alone:], simple=True, separator="/")',
        new='keystr(path[-1:], simple=True, separator="/")',
        why="The inputs of two dictionaries have the same names.",
    ),
    in_inputs(
        name="dataclasses-unopened",
        old="    if dataclasses.is_dataclass(tree) and",
        new="    if False and",
        why="The outputs of a model that returns a dataclass are not seen.",
        hint="test_outputs_may_be_of_other_classes",
    ),
    in_inputs(
        name="mappings-unperturbed",
        file=TORCH,
        old="    if isinstance(outputs, MutableMapping):",
        new="    if False:",
        why="The error that is allowed does not see what goes through a mapping.",
        hint="test_a_mapping_that_another_module_returns_is_perturbed",
    ),
    in_inputs(
        name="gradients-of-other-shapes",
        file=TORCH,
        old=" if dy.shape == outputs[name].shape}",
        new="}",
        why="An output of another shape crashes PyTorch's backward.",
        hint="test_outputs_of_other_shapes",
    ),
    in_inputs(
        name="shapes-in-training-unseen",
        file=JUDGING,
        old="for phase, calls in probe.calls.items():",
        new="for phase, calls in list(probe.calls.items())[:1]:",
        why="Outputs that have another shape only in training are compared.",
        hint="test_outputs_of_other_shapes",
    ),
    in_inputs(
        name="infinite-json",
        file=REPORT,
        old="return float(x) if isfinite(x) else str(float(x))",
        new="return float(x)",
        why="A report with an infinite error is no JSON.",
        hint="test_a_comparison_is_written_as_json",
    ),
    Mutant(
        name="sums-rounded-in-float64",
        file=PAIR,
        old="        if self.same_weights:",
        new="        if False:",
        why="The sum of PyTorch's two biases is compared after it was rounded to float32.",
        hint="test_the_harness_adds_two_biases",
        tests=("test_interop_fused.py",),
    ),
)
