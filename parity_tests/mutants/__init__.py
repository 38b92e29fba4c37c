"""Break the code on purpose, one defect at a time, to see whether the checks notice.

A suite of tests that passes proves little unless it would have failed. A `Mutant` is a small edit
of one source file, such as a tired author makes: a momentum swapped, a gradient let through, a mask
forgotten. A mutant that no check catches is a gap in the suite, or it is no defect: those are in
`EQUIVALENT`, each with the reason. There is one table for the sources that belong together.
"""

from collections.abc import Iterator
from typing import Any

from parity_tests.mutants import (
    affine,
    arguments,
    conversion,
    convolution,
    diagnosis,
    interop,
    kernels,
    layers,
    models,
    norms,
    parity,
    passes,
    pytorch,
    surgery,
    torch_surgery,
    training,
    training_faults,
)
from parity_tests.mutants.mutant import Mutant, catch

MUTANTS: tuple[Mutant, ...] = (
    *affine.MUTANTS,
    *passes.MUTANTS,
    *norms.MUTANTS,
    *kernels.MUTANTS,
    *layers.MUTANTS,
    *interop.MUTANTS,
    *surgery.MUTANTS,
    *convolution.MUTANTS,
    *pytorch.MUTANTS,
    *conversion.MUTANTS,
    *torch_surgery.MUTANTS,
    *models.MUTANTS,
    *training.MUTANTS,
    *arguments.MUTANTS,
    *training_faults.MUTANTS,
    *parity.MUTANTS,
    *diagnosis.MUTANTS,
)
EQUIVALENT: tuple[Mutant, ...] = (
    *affine.EQUIVALENT,
    *passes.EQUIVALENT,
    *norms.EQUIVALENT,
    *pytorch.EQUIVALENT,
)


def records() -> Iterator[dict[str, Any]]:
    """What became of each mutant, as plain data for a report; one by one, for it takes minutes."""
    for mutant in MUTANTS:
        caught = catch(mutant)
        yield {
            "name": mutant.name,
            "side": mutant.side,
            "file": mutant.file,
            "defect": mutant.why,
            "old": mutant.old,
            "new": mutant.new,
            "caught_by": caught.check,
            "message": caught.message,
            "seconds": caught.seconds,
        }
