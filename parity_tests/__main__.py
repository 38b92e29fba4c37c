"""Run every check, print a table, and write `report.json` and `report.html`.

    python -m parity_tests                # everything: some minutes
    python -m parity_tests --no-mutants   # without breaking the code on purpose
    python -m parity_tests --golden       # Flax against reference files: needs no PyTorch

The exit status is 0 if all checks pass, otherwise 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from parity_tests.environment import prepare


@dataclass(frozen=True)
class Config:
    """What to run."""

    golden: bool = False
    """Only compare Flax with the golden files, on the default device of JAX."""

    out: Path = Path()
    """Folder for report.json and report.html."""

    only: str = ""
    """Run only the cases and laws whose names contain this."""

    steps: int = 200
    """Number of steps to train a network in Flax and PyTorch; 0 leaves it out."""

    mutants: bool = True
    """Break the code on purpose, one defect at a time, and require a check to fail each time."""


def main(config: Config) -> int:
    """Run the checks that the configuration selects, and return the exit status."""
    prepare()
    console = Console()
    if config.golden:
        from parity_tests import golden

        return 0 if golden.verify_all(console) else 1
    from parity_tests import report

    found = report.gather(console, config.only, config.steps, config.mutants)
    report.write(found, config.out, console)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
