"""Defects in what the training script does with pictures, faults, and compiled programs."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

of_pictures = partial(
    Mutant,
    file="training/data.py",
    hint="a_picture_is_read_as_it_looks",
    tests=("test_training_pictures.py",),
)
of_programs = partial(
    Mutant,
    file="training/compilation.py",
    tests=("test_training_compilation.py",),
)
of_faults = partial(Mutant, tests=("test_training_faults.py",))
of_settings = partial(
    of_faults,
    file="training/config.py",
    hint="an_edited_configuration_is_refused_by_its_field",
)

MUTANTS = (
    of_pictures(
        name="transparent-pixels-visible",
        old='        return image\n    image = image.convert("RGBA")',
        new='        return image\n    return image.convert("RGB")',
        why="White strokes on transparent white are a white picture.",
    ),
    of_pictures(
        name="always-on-black",
        old='"black" if visible > 127 else "white"',
        new='"black"',
        why="Black strokes on a transparent ground vanish.",
    ),
    of_pictures(
        name="sixteen-bits-clipped",
        old="np.round(values * (255 / white)).astype(np.uint8)",
        new="np.clip(values, 0, 255).astype(np.uint8)",
        why="Pictures of 16 bits are white nearly everywhere.",
    ),
    of_pictures(
        name="depth-by-the-largest-value",
        old="        white = 2**16 - 1\n",
        new="        white = largest\n",
        why="A dark picture of 16 bits becomes a light one.",
    ),
    of_pictures(
        name="orientation-ignored",
        old="ImageOps.exif_transpose(image)",
        new="image.copy()",
        why="A picture by a turned camera lies on its side.",
    ),
    of_pictures(
        name="bombs-warned-about",
        old='            warnings.simplefilter("error", Image.DecompressionBombWarning)\n',
        new="",
        why="A picture of some hundred million pixels is unpacked.",
        hint="what_cannot_be_read_is_reported_in_a_line",
    ),
    of_pictures(
        name="pillow-raises-only-OSError",
        old="    except Exception as error:  # Pillow",
        new="    except OSError as error:  # Pillow",
        why="A bomb ends in a traceback.",
        hint="what_cannot_be_read_is_reported_in_a_line",
    ),
    of_pictures(
        name="ink-not-inverted",
        old="        return 255 - pixels\n",
        new="        return pixels\n",
        why="A digit in black ink is classified as it is.",
        hint="a_digit_in_dark_ink_is_inverted",
    ),
    of_programs(
        name="programs-not-checked",
        old="if i < _KEPT and _sum(content) == expected:",
        new="if i < _KEPT:",
        why="Half a program, which a killed process has written, is taken for a whole one.",
        hint="a_damaged_program_costs_no_other",
    ),
    of_programs(
        name="foreign-programs-kept",
        old="            if warned:\n",
        new="            if False:\n",
        why="A program that cannot be read fails in every run.",
        hint="a_damaged_program_is_compiled_again",
    ),
    of_programs(
        name="all-programs-kept",
        old="if i < _KEPT and",
        new="if i >= 0 and",
        why="The cache grows without limit.",
        hint="few_programs_are_kept",
    ),
    of_programs(
        name="option-ignored",
        old="    if not cache or given or",
        new="    if given or",
        why="--no-compilation-cache keeps programs too.",
        hint="without_the_cache_nothing_is_kept",
    ),
    of_programs(
        name="own-folder-before-the-users",
        old="    if not cache or given or",
        new="    if not cache or",
        why="The folder that the user has given JAX is not used.",
        hint="a_folder_that_the_user_has_given_jax_is_used_instead",
    ),
    of_faults(
        file="training/checkpoints.py",
        name="lost-checkpoints-called-kept",
        old="                _require_undamaged(self._path(number))\n                return",
        new="                return",
        why="A checkpoint that is no longer there is said to be kept.",
        hint="checkpoints_that_vanish_are_not_called_kept",
    ),
    of_faults(
        file="training/results.py",
        name="locks-taken-for-results",
        old='any(path.glob("[!.]*")) if path.is_dir() else path.exists()',
        new="path.exists()",
        why="A run that is killed at its start cannot be resumed.",
        hint="a_run_killed_before_its_first_file",
    ),
    of_faults(
        file="training/results.py",
        name="curves-reported-instead",
        old="suppress(TrainingError) if error else nullcontext()",
        new="nullcontext()",
        why="That no curves can be drawn hides why training failed.",
        hint="curves_that_cannot_be_drawn",
        tests=("test_training_results.py",),
    ),
    of_faults(
        file="training/checkpoints.py",
        name="backslashes-taken",
        old='if (os.sep == "/" and "\\\\" in path) or',
        new="if",
        why="TensorStore writes to another folder, and the run cannot be resumed.",
        hint="a_folder_that_tensorstore_would_confuse",
    ),
    of_faults(
        file="training/devices.py",
        name="processes-without-a-coordinator",
        old="    if coordinator is None:\n        given",
        new="    if coordinator is None:\n        return\n        given",
        why="Each process trains alone.",
        hint="processes_that_contradict_each_other",
    ),
    of_faults(
        file="training/progress.py",
        name="closed-pipes-in-a-line",
        old="if error.errno == errno.EPIPE:",
        new="if error.errno == errno.EIO:",
        why="`| head` ends in an error.",
        hint="printing_to_a_program_that_has_ended",
    ),
    of_settings(
        name="types-not-checked",
        old="if name not in run or not _has_type(run[name], kind):",
        new="if name not in run:",
        why="A setting of another type fails somewhere, or does not.",
    ),
    of_settings(
        name="recipe-not-checked",
        old="        if name not in FREE and not holds:",
        new="        if name in types and not holds:",
        why="An edited setting of the recipe is ignored.",
    ),
    of_settings(
        name="ones-are-true",
        old="        isinstance(value, bool) == (kind is bool)\n",
        new="        True\n",
        why="A seed may be true.",
    ),
)
