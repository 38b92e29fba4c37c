"""Flax, PyTorch and the oracle show the same numbers after every step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import bcn_flax
import bcn_torch
from parity_tests import oracle
from parity_tests.draws import random_variables
from parity_tests.tolerances import assert_close, roundings
from parity_tests.twins import Adam, FlaxSide, OracleSide, Sgd, TorchSide

pytestmark = pytest.mark.torch

EPSILON = 1e-5
SGD = Sgd()


@dataclass(frozen=True)
class Case:
    """A layer, what it is given, and how."""

    layer: str = "BatchChannelNorm"
    shape: tuple[int, ...] = (3, 5, 7, 8)
    groups: int = 4
    estimate: bool = True
    train: bool = True
    momentum: float = 0.9
    epsilon: float = EPSILON
    mean: float = 1.0
    constant: bool = False
    masked: int = 0
    optimizer: Sgd | Adam = SGD
    steps: int = 3

    def __str__(self):
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case(), k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"

    def flax(self, dtype, param_dtype):
        make = getattr(bcn_flax, self.layer)
        shared = {"dtype": dtype, "param_dtype": param_dtype, "epsilon": self.epsilon}
        if self.layer == "ChannelNorm":
            return make(self.groups, **shared)
        shared |= {"momentum": self.momentum, "use_running_average": not self.train}
        if self.layer == "BatchChannelNorm":
            shared |= {"num_groups": self.groups, "estimate": self.estimate}
        return make(**shared)

    def torch(self):
        make = getattr(bcn_torch, self.layer)
        channels = self.shape[-1]
        if self.layer == "ChannelNorm":
            return make(channels, self.groups, eps=self.epsilon)
        rest = {"eps": self.epsilon, "momentum": 1 - self.momentum}
        if self.layer == "BatchChannelNorm":
            return make(channels, self.groups, estimate=self.estimate, **rest).train(self.train)
        return make(channels, **rest).train(self.train)

    def oracle(self):
        if self.layer == "ChannelNorm":
            return oracle.ChannelNorm(self.groups, self.epsilon)
        rest = {"momentum": self.momentum, "eps": self.epsilon}
        if self.layer == "BatchChannelNorm":
            return oracle.BatchChannelNorm(self.groups, self.estimate, **rest)
        return oracle.BatchNorm(self.layer == "EstimatedBatchNorm", **rest)

    def data(self, rng, dtype):
        """An input and an output gradient, the same for all sides, of standard deviation 1."""
        x = self.mean + rng.standard_normal(self.shape)
        if self.constant:
            x[..., 0] = self.mean
            x[0] = self.mean
        return x.astype(dtype), rng.standard_normal(self.shape).astype(dtype)


SHAPES = [(6, 16), (3, 5, 8), (2, 3, 4, 5, 8), (1, 4, 4, 8), (1, 1, 2, 16), (5, 1, 1, 16)]

CASES = [
    *(Case(estimate=estimate, groups=g) for estimate in (True, False) for g in (1, 2, 4, 8)),
    *(Case(estimate=estimate, shape=shape) for estimate in (True, False) for shape in SHAPES),
    *(Case(estimate=estimate, train=False) for estimate in (True, False)),
    *(Case(estimate=estimate, mean=1e4) for estimate in (True, False)),
    *(Case(estimate=estimate, constant=True) for estimate in (True, False)),
    *(Case(estimate=estimate, masked=2, shape=(5, 3, 3, 8)) for estimate in (True, False)),
    *(Case(estimate=estimate, optimizer=Adam()) for estimate in (True, False)),
    *(Case(momentum=momentum, steps=20) for momentum in (0.0, 0.5, 0.9, 0.99)),
    Case(epsilon=1e-3),
    Case(shape=(2, 9, 9, 24), groups=3),
    *(Case("BatchNorm", train=train) for train in (True, False)),
    *(Case("EstimatedBatchNorm", train=train) for train in (True, False)),
    Case("ChannelNorm"),
    Case("ChannelNorm", shape=(4, 8), groups=2),
    Case("BatchNorm", shape=(5, 3, 3, 8), masked=2),
    Case("ChannelNorm", shape=(5, 3, 3, 8), masked=2),
]


def reports(case, dtype, param_dtype):
    """What each side showed after each step."""
    rng = np.random.default_rng(0)
    layer = case.flax(dtype, param_dtype)
    kept = case.shape[0] - case.masked
    call = {}
    if case.masked:
        mask = (np.arange(case.shape[0]) < kept).reshape(-1, *(1,) * (len(case.shape) - 1))
        call = {"mask": jnp.asarray(mask)}
    variables = random_variables(layer, np.zeros(case.shape, dtype), rng)
    module = case.torch().to(getattr(torch, np.dtype(param_dtype).name))
    sides = {
        "flax": FlaxSide(layer, variables, case.optimizer, **call),
        "torch": TorchSide(module, variables, case.optimizer),
        "oracle": OracleSide(case.oracle(), variables, case.optimizer, case.train),
    }
    for _ in range(case.steps):
        x, dy = case.data(rng, dtype)
        dy[kept:] = 0
        step = {
            name: side.step(*((x, dy) if name == "flax" else (x[:kept], dy[:kept])))
            for name, side in sides.items()
        }
        flax = step["flax"]
        step["flax"] = flax._replace(
            output=flax.output[:kept], input_gradient=flax.input_gradient[:kept]
        )
        step["condition"] = (1 + case.mean) * sides["oracle"].magnification
        yield step


def assert_reports_agree(step, number, case, dtype):
    """Each side within its roundings of the oracle, and so of the other."""
    values = int(np.prod(case.shape))
    computed = np.float64 if dtype == np.float64 else np.float32
    allowed = roundings(values, steps=number + 1) * step["condition"]
    for name in ("flax", "torch"):
        for quantity, actual, expected in zip(
            step[name]._fields, step[name], step["oracle"], strict=True
        ):
            for (path, a), (other_path, e) in zip(
                jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected), strict=True
            ):
                assert path == other_path
                assert_close(
                    a,
                    e,
                    ulps=allowed,
                    dtype=computed,
                    stored=dtype if quantity in ("output", "input_gradient") else None,
                    # A gradient sums `values` terms of size 1, which may cancel.
                    scale=max(1.0, np.abs(e).max()),
                    name=f"step {number}, {name}, {quantity}{jax.tree_util.keystr(path)}",
                )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case, x64):
    for number, step in enumerate(reports(case, np.float64, np.float64)):
        assert_reports_agree(step, number, case, np.float64)


# Adam divides each gradient by its size, so that a gradient of 0 but for rounding decides nothing
# but its sign; float64 rounds far enough below Adam's epsilon, float32 does not.
WITHOUT_ADAM = [case for case in CASES if not isinstance(case.optimizer, Adam)]


@pytest.mark.parametrize("case", WITHOUT_ADAM, ids=str)
def test_float32(case):
    for number, step in enumerate(reports(case, np.float32, np.float32)):
        assert_reports_agree(step, number, case, np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("layer", ["BatchChannelNorm", "BatchNorm", "ChannelNorm"])
def test_half_precision_input_with_float32_parameters(layer, dtype):
    """Output and input gradient are rounded once; all the rest is as precise as in float32."""
    case = Case(layer, shape=(2, 6, 6, 16))
    for number, step in enumerate(reports(case, dtype, np.float32)):
        assert_reports_agree(step, number, case, dtype)
