"""What `bcn_flax.parity` says of equal models and of models with a defect: found, named, seconds.

The equal models have random architectures; the defective ones are a small ViT, BERT and ResNet with
fresh weights, whose layers have the `dtype` of float32 that is their default in many Flax models.

python benchmarks/harness.py [--pairs 200]
"""

from timing import report  # isort: skip  # sets up the environment

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the models are those of the tests

from parity_tests.environment import QUICK_TO_COMPILE
from parity_tests.model_pairs import Pair, defective_pairs, random_pair

HEADER = ("models", "verdict", "named", "used of the allowed error", "seconds")


def row(pair: Pair) -> tuple[str, str, str, float, float]:
    """What the harness says of a pair, and how long it takes."""
    start = time.perf_counter()
    comparison = pair.compare()
    seconds = time.perf_counter() - start
    named = " ".join(comparison.hints[:2]) if comparison.verdict == "different" else ""
    used = max(row.worst.error for row in comparison.rows)
    return pair.name, comparison.verdict, named, used, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200, help="how many random equal pairs")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", QUICK_TO_COMPILE)  # many programs that run once
    defects = [*defective_pairs()]
    pairs = [*defects, *map(random_pair, range(arguments.pairs))]
    made = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for new in pool.map(row, pairs):
            print(*new, flush=True)
            made.append(new)
    defective, equal = made[: len(defects)], made[len(defects) :]
    found = sum(verdict == "different" for _, verdict, *_ in defective)
    passed = sum(verdict == "equal" for _, verdict, *_ in equal)
    report(
        "harness",
        f"{found} of {len(defective)} defects found; {passed} of {len(equal)} pairs called equal",
        HEADER,
        made,
    )


if __name__ == "__main__":
    main()
