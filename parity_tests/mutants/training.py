"""Defects in the training script and in what it stands on."""

from parity_tests.mutants.mutant import Mutant

SCRIPT = "train_cifar.py"
CONFIG = "training/config.py"

MUTANTS = (
    Mutant(
        "batches-all-of-the-first-images",
        SCRIPT,
        "start = state.step % recipe.steps(len(state.order)) * recipe.micro_batch",
        "start = state.step % recipe.steps(len(state.order))",
        "The batches of an epoch overlap.",
        hint="training_is_what_the_help_says",
        tests=("test_training_step.py",),
    ),
    Mutant(
        "rate-by-micro-batch",
        CONFIG,
        "ratio = batch_size / recipe.batch_size",
        "ratio = micro_batch / recipe.batch_size",
        "The learning rate of Adam follows the micro-batch.",
        hint="averages_look_as_far_back_with_micro_batches",
        tests=("test_training_config.py",),
    ),
)
