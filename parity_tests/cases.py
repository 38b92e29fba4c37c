"""The table of cases in which Flax, PyTorch and the oracle must show the same numbers.

A case is a layer with its options, its input data, and how it runs: see the table at the end.
PyTorch is imported only by what needs it, so that Flax can be verified against the oracle without
PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import bcn_flax.nnx
from bcn_flax.parity import AXES, CHANNELS, Comparison, Oracle, Tolerance, assert_parity
from bcn_flax.variants import WS
from parity_tests import oracle as exact
from parity_tests.oracle_side import Adam, OracleSide, Sgd

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A layer, its input, and how it runs.

    Attributes:
        layer: its name, the same in Flax and PyTorch.
        options: its arguments, in Flax's words.
        shape: of the input, channels last.
        data: which of `DATA`.
        dtype: of the input; the parameters are in float32 or wider.
        api: of Flax.
        masked: how many samples at the end of the batch are masked.
        optimizer: the same for all implementations.
        steps: of training.
        eager: whether to run Flax eagerly, too.
        tolerances: other than the usual.
        ill_conditioned: why not even float64 can be precise to 12 digits, if it cannot.
    """

    layer: str
    options: Options = field(default_factory=dict)
    shape: tuple[int, ...] = (3, 5, 7, 8)
    data: str = "normal"
    dtype: str = "float32"
    api: str = "linen"
    masked: int = 0
    optimizer: Sgd | Adam = Sgd()  # noqa: RUF009, a named tuple does not change
    steps: int = 3
    eager: bool = False
    tolerances: tuple[Tolerance, ...] = ()
    ill_conditioned: str = ""

    def __str__(self) -> str:
        """The layer, and everything that differs from an ordinary case."""
        plain, named = Case(self.layer), {"api", "dtype", "tolerances", "ill_conditioned"}
        special = {k: v for k, v in vars(self).items() if v != getattr(plain, k) and k not in named}
        special = {**special.pop("options", {}), **special}
        if "optimizer" in special:
            special["optimizer"] = type(self.optimizer).__name__
        return " ".join([self.layer, self.api, self.dtype, *map(_written, special.items())])

    def check(self, oracle: Oracle | None = None) -> Comparison:
        """Fail unless all implementations agree, by default with `oracle_side`."""
        rng = np.random.default_rng(0)
        first, *rest = (self.inputs(rng) for _ in range(self.steps))
        return assert_parity(
            self.flax(),
            self.torch(),
            first,
            weights="random",
            steps=[first, *rest],
            optimizer=self.optimizer.pair(),
            # The oracle has the default standardization only: the others are compared with PyTorch.
            oracle=None if "standardization" in self.options else oracle or self.oracle_side,
            eager=self.eager,
            # A layer for half precision computes in float32, and rounds what it returns.
            precision=np.float32 if self.half else None,
            axes={**AXES, 3: CHANNELS},
            tolerances=self.tolerances,
        )

    @property
    def half(self) -> bool:
        """Whether input and output are in half precision."""
        return self.dtype in ("bfloat16", "float16")

    @property
    def wrapped(self) -> bool:
        """Whether samples are masked, or PyTorch's memory layout is unusual."""
        return self.masked > 0 or self.data == "strided"

    @property
    def kept(self) -> int:
        """How many samples count."""
        return self.shape[0] - self.masked

    @property
    def param_dtype(self) -> str:
        """The dtype of the parameters."""
        return "float32" if self.half else self.dtype

    @property
    def arguments(self) -> dict[str, Any]:
        """The options, with the standardization that they name."""
        named = {k: STANDARDIZATIONS[v] for k, v in self.options.items() if k == "standardization"}
        return {**self.options, **named}

    def inputs(self, rng: np.random.Generator) -> np.ndarray:
        """An input, the same for all implementations."""
        dtype = jnp.dtype(self.dtype)
        x = DATA[self.data](rng.standard_normal(self.shape), dtype).astype(dtype)
        x[self.kept :] = np.nan  # what hides behind a mask may be anything
        return x

    def flax(self) -> nn.Module | nnx.Module:
        """The layer of linen or NNX."""
        shared = {**self.arguments, "param_dtype": self.param_dtype}
        shared |= {"dtype": self.dtype} if self.half else {}
        if self.api == "nnx":
            sizes = [self.shape[-1], *([shared.pop("features")] if "features" in shared else [])]
            with jax.enable_x64(self.dtype == "float64"):
                return getattr(bcn_flax.nnx, self.layer)(*sizes, **shared, rngs=nnx.Rngs(0))
        layer = getattr(bcn_flax, self.layer)(**shared)
        return Kept(layer, self.kept, self.layer != "ChannelNorm") if self.wrapped else layer

    def torch(self) -> Any:
        """The layer of PyTorch."""
        import torch

        from parity_tests.torch_layers import Kept, layer

        made = layer(self.layer, self.shape, self.arguments)
        made = Kept(made, self.kept) if self.wrapped else made
        return made.to(getattr(torch, self.param_dtype))

    def oracle_side(self, variables: Mapping[str, Any]) -> OracleSide:
        """The layer of the oracle, in training."""
        layer = ORACLES[self.layer](**self.options)
        return OracleSide(layer, variables, self.optimizer, self.kept)


STANDARDIZATIONS = {**WS, "nfnet with gamma": WS["nfnet"]._replace(gamma=1.7)}


class Kept(nn.Module):
    """A layer with all but the first samples masked."""

    layer: nn.Module
    kept: int
    has_modes: bool

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Normalize, and return the samples that are not masked."""
        mask = (jnp.arange(len(x)) < self.kept).reshape(-1, *(1,) * (x.ndim - 1))
        mode = {"use_running_average": use_running_average} if self.has_modes else {}
        return self.layer(x, **mode, mask=mask)[: self.kept]


def _written(option: tuple[str, Any]) -> str:
    name, value = option
    return f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"


def _one_nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[(0,) * (x.ndim - 1)][1] = np.nan
    return x


def _constant(x: np.ndarray) -> np.ndarray:
    """Data with a constant channel and a constant sample."""
    x = x + 1
    x[..., 0] = 1
    x[0] = 1
    return x


# Functions of an array of standard normal numbers, and of the dtype that it is to have.
DATA: Mapping[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "normal": lambda x, dtype: x + 1,
    "strided": lambda x, dtype: x + 1,
    "mean 1e4": lambda x, dtype: x + 1e4,
    "constant": lambda x, dtype: _constant(x),
    "denormal": lambda x, dtype: x * (float(jnp.finfo(dtype).smallest_normal) / 100),
    "1e15": lambda x, dtype: x * 1e15,
    "1e30": lambda x, dtype: x * 1e30,
    "one NaN": lambda x, dtype: _one_nan(x),
}


def _batch_norm(
    *, estimate: bool, momentum: float = 0.9, epsilon: float = 1e-5, **rest: Any
) -> Any:
    return exact.BatchNorm(estimate, momentum, epsilon, **rest)


def _batch_channel_norm(
    *, num_groups: int, estimate: bool = True, epsilon: float = 1e-5, **rest: Any
) -> Any:
    return exact.BatchChannelNorm(num_groups, estimate, eps=epsilon, **rest)


def _conv(*, kernel_size: tuple[int, ...], padding: int, strides: Any = 1, **_: Any) -> Any:
    return exact.WSConv(strides=strides, padding=((padding, padding),) * len(kernel_size))


ORACLES: Mapping[str, Callable[..., Any]] = {
    "BatchNorm": partial(_batch_norm, estimate=False),
    "EstimatedBatchNorm": partial(_batch_norm, estimate=True),
    "ChannelNorm": lambda num_groups, epsilon=1e-5: exact.ChannelNorm(num_groups, epsilon),
    "BatchChannelNorm": _batch_channel_norm,
    "WSConv": _conv,
    "WSDense": lambda features: exact.WSDense(),
}

BATCH_NORMS = ("BatchNorm", "EstimatedBatchNorm")
NORMS = (
    *(Case(name) for name in BATCH_NORMS),
    Case("ChannelNorm", {"num_groups": 4}),
    *(Case("BatchChannelNorm", {"num_groups": 4, "estimate": e}) for e in (True, False)),
)
BCN, BCN_BY_BATCH = NORMS[3:]
CONV = Case("WSConv", {"features": 6, "kernel_size": (3, 3), "padding": 1}, (2, 5, 6, 3))
DENSE = Case("WSDense", {"features": 6}, (5, 7))


def with_options(case: Case, **options: Any) -> Case:
    """The case with some options changed."""
    return replace(case, options={**case.options, **options})


def both_estimates(**changes: Any) -> list[Case]:
    """Batch-channel norm that normalizes by the estimates, and by the batch."""
    return [replace(case, **changes) for case in (BCN, BCN_BY_BATCH)]


SHAPES = ((6, 16), (3, 5, 8), (2, 3, 4, 5, 8), (1, 4, 4, 8), (5, 1, 1, 16))

OF_TWO_VALUES = Tolerance(
    "input gradient",
    100,
    "two standardized values are always -1 and 1, so their gradient is the difference of terms 100 "
    "times its size",
)

WITHOUT_DENORMALS = Tolerance(
    "gradient batch_norm/scale",
    1e4,
    "XLA flushes denormal numbers to 0, and so their part of the gradient of a scale",
)

INSTANCE_NORM = (
    "with one channel per group the channel norm undoes the batch norm, whose gradients are 0 but "
    "for rounding"
)
# The effect of options, tested in float64, whose rounding hides nothing.
FORMULAS = (
    *(with_options(case, num_groups=g) for case in both_estimates() for g in (1, 2)),
    *(with_options(case, num_groups=8) for case in both_estimates(ill_conditioned=INSTANCE_NORM)),
    *(case for shape in SHAPES for case in both_estimates(shape=shape)),
    *(with_options(BCN, momentum=m) for m in (0.0, 0.5, 0.99)),
    with_options(BCN, epsilon=1e-3),
    with_options(BCN, epsilon=1e-3, batch_epsilon=1e-2),
    *(
        with_options(case, running_variance=variance)
        for case in (NORMS[0], BCN)
        for variance in ("unbiased", "around_running_mean")
    ),
    replace(with_options(BCN, num_groups=3), shape=(2, 9, 9, 24)),
    # These layers are linen's to the last bit, as the laws demand.
    *(replace(case, api="nnx") for case in (BCN, DENSE)),
    with_options(CONV, strides=2),
    with_options(CONV, strides=(2, 1), padding=0, kernel_size=(2, 3)),
    replace(with_options(CONV, kernel_size=(3,)), shape=(2, 7, 3)),
    replace(with_options(CONV, kernel_size=(2, 2, 2), padding=0), shape=(2, 3, 4, 3, 2)),
    *both_estimates(data="1e30"),
    *(
        with_options(layer, standardization=name)
        for layer, names in (
            (CONV, ("timm_scaled", "nfnet", "nfnet with gamma")),
            (DENSE, ("authors_pytorch", "bit")),
            (replace(CONV, api="nnx"), ("nfnet",)),
        )
        for name in names
    ),
)

# Data that bring out the worst of the arithmetic, and all layers as they are used.
ARITHMETIC = (
    *NORMS,
    CONV,
    DENSE,
    *(replace(case, data="one NaN", steps=2) for case in NORMS),
    *(replace(case, shape=(5, 3, 3, 8), masked=2) for case in NORMS),
    *both_estimates(optimizer=Adam()),
    replace(
        BCN_BY_BATCH,
        shape=(1, 1, 2, 16),
        tolerances=(OF_TWO_VALUES,),
        ill_conditioned=OF_TWO_VALUES.reason,
    ),
)

# What only float32 finds hard.
HARD = (
    *(replace(case, data=data) for case in NORMS for data in ("mean 1e4", "constant")),
    *both_estimates(data="strided"),
    *both_estimates(data="1e15"),
    *both_estimates(data="denormal", tolerances=(WITHOUT_DENORMALS,)),
    *(replace(case, eager=True) for case in (BCN, BCN_BY_BATCH, CONV)),
    replace(BCN, steps=20),
)

HALF = tuple(
    replace(case, shape=(2, 6, 6, 16), dtype=dtype)
    for case in (NORMS[0], NORMS[2], BCN)
    for dtype in ("bfloat16", "float16")
)

CASES = (
    *(replace(case, dtype="float64") for case in (*FORMULAS, *ARITHMETIC)),
    *(replace(case, dtype="float32") for case in (*ARITHMETIC, *HARD)),
    *HALF,
)
