"""What the oracle expects, in files: to verify Flax where there is no PyTorch, as on a TPU.

A file has the inputs and the output gradients of each step of a case, the variables to begin with,
and of every number that the steps show what the oracle says and how far from it Flax may be.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table

from bcn_flax.parity.errors import eps, error
from bcn_flax.parity.flax_side import FlaxSide, forward_of
from bcn_flax.parity.observations import Observation, Side, Values
from parity_tests.cases import BCN, BCN_BY_BATCH, CONV, DENSE, NORMS, Case

FOLDER = Path(__file__).parent / "golden"

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


class _Recorder:
    """The judge, and what it was asked and said."""

    def __init__(self, case: Case) -> None:
        self.case, self.arrays, self.phases = case, {}, 0

    def __call__(self, variables: Mapping[str, Any]) -> Side:
        for path, leaf in flatten_dict(variables, sep="/").items():
            self.arrays[f"variables/{path}"] = np.asarray(leaf, self.case.param_dtype)
        judge = self.case.judge(variables)

        def side(inputs: Sequence[Values], dys: Sequence[Values], train: bool) -> Observation:
            seen = judge(inputs, dys, train)
            phase = f"phase {self.phases}"
            # Half precision has no place in such a file, and is exact in float32.
            given = {"input": inputs[0], "output gradient": dys[0]}
            self.arrays |= {f"{phase}/{k}": np.asarray(v, np.float32) for k, v in given.items()}
            self.arrays[f"{phase}/train"] = np.asarray(train)
            self.arrays |= {f"{phase}/{name}": value for name, value in seen.items()}
            self.phases += 1
            return seen

        return side


def write(name: str) -> None:
    """Write the file of a case, after all sides have agreed on it. Needs PyTorch."""
    recorder = _Recorder(CASES[name])
    comparison = CASES[name].check(recorder)
    order = list(dict.fromkeys(row.phase for row in comparison.rows))
    allowed = {
        f"phase {order.index(row.phase)}/{row.name}": row.allowed
        for row in comparison.rows
        if row.sides[0].startswith("Flax")
    }
    recorder.arrays["allowed"] = np.asarray(json.dumps(allowed))
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(path_of(name), **recorder.arrays)


def verify(name: str, api: str = "linen") -> float:
    """Compare Flax with the file of a case.

    Returns:
        The largest error, over what is allowed.

    Raises:
        AssertionError: Flax is too far from what the oracle expects.
    """
    case = replace(CASES[name], api=api)
    # Where products of float32 are rounded to less by default, as on a TPU, ask for all of it.
    with jax.default_matmul_precision("highest"):
        return max(_errors(case, read(name)))


def verify_all(console: Console) -> bool:
    """Verify every case, print a table, and say whether all is well."""
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
    """Those of Flax's APIs that have the case."""
    return ("linen",) if CASES[name].wrapped else ("linen", "nnx")


def _errors(case: Case, arrays: Mapping[str, np.ndarray]) -> Iterator[float]:
    side, allowed = _flax_side(case, arrays), json.loads(str(arrays["allowed"]))
    for phase in phases(arrays):
        dtype = jnp.dtype(case.dtype)
        x, dy = (arrays[f"{phase}/{k}"].astype(dtype) for k in ("input", "output gradient"))
        for name, actual in side([x], [dy], bool(arrays[f"{phase}/train"])).items():
            key = f"{phase}/{name}"
            yield _error(key, actual, arrays[key], allowed[key])


def _flax_side(case: Case, arrays: Mapping[str, np.ndarray]) -> FlaxSide:
    prefix = "variables/"
    variables = {
        tuple(key.removeprefix(prefix).split("/")): jnp.asarray(value)
        for key, value in arrays.items()
        if key.startswith(prefix)
    }
    return FlaxSide(
        forward_of(case.flax(), None),
        unflatten_dict(variables),
        case.optimizer.pair().flax,
        jit=True,
        precision=nullcontext,
    )


def _error(key: str, actual: Values, expected: Values, allowed: float) -> float:
    measured = error(actual, expected, actual.dtype)
    # What is stored in half precision may be off by that rounding, wherever the largest value is.
    last_rounding = eps(actual.dtype) / 2 * measured.scale if actual.dtype.itemsize < 4 else 0.0
    used = measured.absolute.error / (allowed + last_rounding)
    if used > 1 or measured.mismatch:
        raise AssertionError(
            f"{key} {measured.mismatch or f'is {measured.absolute.error:g} off, {used:.2g} times'}"
            f" what is allowed, at {measured.absolute.place}"
        )
    return used


def read(name: str) -> dict[str, np.ndarray]:
    """What the file of a case says."""
    with np.load(path_of(name)) as file:
        return dict(file)


def phases(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The steps of a file, in order."""
    return [f"phase {i}" for i in range(sum(key.endswith("/train") for key in arrays))]


def path_of(name: str) -> Path:
    """The file of a case."""
    return FOLDER / f"{name.replace(' ', '-').replace('=', '-')}.npz"
