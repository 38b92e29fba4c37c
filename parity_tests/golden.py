"""Reference numbers in files, to verify Flax on devices without PyTorch, such as a TPU.

A file holds one case: the initial variables, the inputs and output gradients of each phase, every
number that the oracle computes from them, and the error that Flax is allowed in it. A file is
written only if PyTorch agrees with the oracle.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

from bcn_flax.parity import Implementation, Observation
from bcn_flax.parity.errors import eps, error
from bcn_flax.parity.flax_side import FlaxSide, forward_of
from parity_tests.cases import BCN, BCN_BY_BATCH, CONV, DENSE, NORMS, Case

FOLDER = Path(__file__).parent / "golden"
Arrays = dict[str, np.ndarray]

_SMALL = {"shape": (2, 3, 3, 8), "steps": 2}

CASES: Mapping[str, Case] = {
    str(case): case
    for case in (
        *(replace(case, **_SMALL, data=data) for case in NORMS for data in ("normal", "mean 1e4")),
        *(replace(case, shape=(3, 2, 3, 8), steps=2, masked=1) for case in (BCN, BCN_BY_BATCH)),
        *(replace(case, steps=1) for case in (CONV, DENSE)),
        replace(BCN, **_SMALL, dtype="bfloat16"),
    )
}


def write(name: str) -> None:
    """Write the file of a case, if all implementations agree. Needs PyTorch."""
    case, arrays, phases = CASES[name], {}, 0

    def recorded_oracle(variables: Mapping[str, Any]) -> Implementation:
        oracle = case.oracle_side(variables)
        flat = flatten_dict(variables, sep="/").items()
        arrays.update({f"variables/{path}": np.asarray(x, case.param_dtype) for path, x in flat})

        def side(inputs: Any, output_gradients: Any, train: bool) -> Observation:
            nonlocal phases
            seen = oracle(inputs, output_gradients, train)
            # Half precision has no place in such a file, and is exact in float32.
            given = {"input": inputs[0], "output gradient": output_gradients[0]}
            given = {name: np.asarray(x, np.float32) for name, x in given.items()}
            numbers = {**given, "train": np.asarray(train), **seen}
            arrays.update({f"phase {phases}/{name}": x for name, x in numbers.items()})
            phases += 1
            return seen

        return side

    rows = case.check(recorded_oracle).rows
    order = list(dict.fromkeys(row.phase for row in rows))
    allowed = {
        f"phase {order.index(row.phase)}/{row.name}": row.allowed
        for row in rows
        if row.implementations[0].startswith("Flax")
    }
    arrays["allowed"] = np.asarray(json.dumps(allowed))
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(path_of(name), **arrays)


def verify(name: str, api: str = "linen") -> float:
    """Compare Flax with the file of a case.

    Returns:
        The largest error, as a fraction of what is allowed.

    Raises:
        AssertionError: an error is larger than allowed.
    """
    case, arrays = replace(CASES[name], api=api), read(name)
    flax = FlaxSide(
        forward_of(case.flax(), None),
        jax.tree.map(jnp.asarray, variables(arrays)),
        case.optimizer.pair().flax,
        jit=True,
    )
    allowed = json.loads(str(arrays["allowed"]))
    # On a TPU products of float32 are rounded to less by default: ask for full precision.
    with jax.default_matmul_precision("highest"):
        return max(
            _fraction_of_allowed(key, actual, arrays[key], allowed[key])
            for key, actual in replay(flax, arrays, jnp.dtype(case.dtype))
        )


def verify_all(console: Console) -> bool:
    """Verify every case, print a table, and return whether all passed."""
    device = jax.devices()[0]
    table = Table("case", "API", "largest error, of what is allowed", title=device.device_kind)
    passed = True
    for name in CASES:
        for api in apis(name):
            try:
                result = f"{verify(name, api):.1%}"
            except AssertionError as problem:
                passed, result = False, f"[red]{problem}"
            table.add_row(name, api, result)
    console.print(table)
    return passed


def apis(name: str) -> Sequence[str]:
    """The APIs of Flax that have the case."""
    return ("linen",) if CASES[name].wrapped else ("linen", "nnx")


def read(name: str) -> Arrays:
    """The arrays in the file of a case."""
    with np.load(path_of(name)) as file:
        return dict(file)


def path_of(name: str) -> Path:
    """The file of a case."""
    return FOLDER / f"{name.replace(' ', '-').replace('=', '-')}.npz"


def variables(arrays: Arrays) -> dict[str, Any]:
    """The initial variables in a file, as a tree."""
    parts = {tuple(key.split("/")): x for key, x in arrays.items()}
    return unflatten_dict({path[1:]: x for path, x in parts.items() if path[0] == "variables"})


def replay(side: Implementation, arrays: Arrays, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Run an implementation on the inputs in a file: each number with its key in the file."""
    for i in range(sum(key.endswith("/train") for key in arrays)):
        x, dy = (arrays[f"phase {i}/{key}"].astype(dtype) for key in ("input", "output gradient"))
        for name, value in side([x], [dy], bool(arrays[f"phase {i}/train"])).items():
            yield f"phase {i}/{name}", value


def _fraction_of_allowed(
    key: str, actual: np.ndarray, expected: np.ndarray, allowed: float
) -> float:
    measured = error(actual, expected, actual.dtype)
    # A number stored in half precision may differ by that rounding, at the size of the largest.
    last_rounding = eps(actual.dtype) / 2 * measured.scale if actual.dtype.itemsize < 4 else 0.0
    used = measured.absolute.error / (allowed + last_rounding)
    if used > 1 or measured.mismatch:
        raise AssertionError(
            f"{key} {measured.mismatch or f'is {measured.absolute.error:g} off, {used:.2g} times'}"
            f" what is allowed, at {measured.absolute.place}"
        )
    return used
