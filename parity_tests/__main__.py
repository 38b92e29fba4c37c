"""Run every check, print a table, and write `report.json` and `report.html`.

    python -m parity_tests                # everything: some minutes
    python -m parity_tests --no-mutants   # without breaking the code on purpose
    python -m parity_tests --golden       # Flax against files: needs no PyTorch

The exit status is 0 if all is well and 1 if not.
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
    """Verify Flax against the golden files alone, on whatever device JAX finds."""

    out: Path = Path()
    """The folder for report.json and report.html."""

    only: str = ""
    """Run only the checks whose names contain this."""

    steps: int = 200
    """Train the networks side by side for so many steps; 0 leaves it out."""

    mutants: bool = True
    """Break the code on purpose, in every known way, and see each caught."""


def main(config: Config) -> int:
    """Run what the configuration says; the result is the exit status."""
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
