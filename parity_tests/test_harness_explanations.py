"""Differences are found, and explained as far as the harness can."""

from collections import OrderedDict
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from bcn_flax.parity import Optimizer, assert_parity, compare, sgd
from bcn_flax.parity.diagnosis import different_settings, statistics_drift
from bcn_flax.parity.pair import module_pair
from parity_tests.small_models import (
    EVALUATION,
    IMAGES,
    ONE_STEP,
    VECTORS,
    Flax,
    FlaxWithModes,
    NnxBn,
    NnxMlp,
    Torch,
    doubled_gradient,
    failures,
    first_failures,
    flax_bn,
    flax_mlp,
    in_flax,
    in_torch,
    torch_bn,
    torch_mlp,
)

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seeded():
    """The same initial weights in every run."""
    torch.manual_seed(0)


def counted(self, x, train, *, by=1.0, of_gain=lambda gain: gain):
    count = self.variable("batch_stats", "mean", jnp.zeros, ())
    if train and not self.is_initializing():
        count.value = count.value + by
    return x * of_gain(self.param("gain", nn.initializers.ones, ()))


class TorchCounted(torch.nn.Module):
    def __init__(self, factors=(1, 1)):
        super().__init__()
        self.gain, self.factors = torch.nn.Parameter(torch.ones(())), factors
        self.register_buffer("running_mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.running_mean += 1
        return x * self.gain * self.factors[self.training]


def flax_layer_norm(_, x):
    return nn.Dense(3, name="out")(nn.LayerNorm(epsilon=1e-6, name="norm")(x))


def torch_layer_norm():
    return Torch(
        lambda self, x: self.out(self.norm(x)),
        norm=torch.nn.LayerNorm(5),
        out=torch.nn.Linear(5, 3),
    )


class FlaxCell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(x), None


def flax_scan(_, x):
    """The outputs of the cells have no values outside of the scan."""
    x, _ = nn.scan(FlaxCell, length=2)(name="cells")(x, None)
    return nn.Dense(3, name="out")(x)


class Difference(NamedTuple):
    """Two modules that differ, where they first do, and the beginnings of the hints."""

    flax: object
    module: object
    phase: str
    names: set[str]
    hints: list[str]
    options: dict[str, Any] = ONE_STEP


ADAMW = Optimizer(optax.adamw(0.1), lambda p: torch.optim.AdamW(p, 0.1))  # weight decay 1e-4, 1e-2
COUNTED = FlaxWithModes(counted)
OF_OUTPUT = {"output", "input gradient", "gradient gain"}
STATISTICS = {"statistic bn/mean", "statistic bn/var"}
FIRST_MODULE = (
    "In evaluation, the first difference arises between the output of hidden, which agrees, and "
    "the input of out, which does not."
)
MOMENTUM = (
    "bn: momentum is 0.99 in Flax and 0.1 in PyTorch, where it is the weight of the new value: 0.9 "
    "in Flax's words."
)
VARIANCE = (
    "bn/var converges to 1.2 times Flax's value in PyTorch, which is n / (n - 1) for n = 6 values: "
    "biased in Flax, unbiased in PyTorch."
)
OTHER_FORMULA = "They differ in float64 as well: the cause is not rounding, they compute different"
DIFFERENCES = {
    "only in evaluation": Difference(
        COUNTED, TorchCounted((2, 1)), "evaluation", OF_OUTPUT, ["In evaluation, the first module"]
    ),
    "only in training": Difference(
        COUNTED,
        TorchCounted((1, 2)),
        "training step 1",
        {*OF_OUTPUT, "parameter gain"},
        ["In training, the first module whose output differs is the module itself; its input"],
    ),
    "only in a statistic": Difference(
        FlaxWithModes(lambda self, x, train: counted(self, x, train, by=1.1)),
        TorchCounted(),
        "training step 1",
        {"statistic mean"},
        [],
    ),
    "only in an input's gradient": Difference(
        FlaxWithModes(lambda self, x, train: counted(self, doubled_gradient(x), train)),
        TorchCounted(),
        "evaluation",
        {"input gradient"},
        [],
    ),
    "only in a parameter's gradient": Difference(
        FlaxWithModes(lambda self, x, train: counted(self, x, train, of_gain=doubled_gradient)),
        TorchCounted(),
        "evaluation",
        {"gradient gain"},
        [],
    ),
    "only after the optimizer": Difference(
        COUNTED,
        TorchCounted(),
        "training step 1",
        {"parameter gain"},
        ["All gradients agree, and the parameters after the step do not: the two optimizers"],
        {**ONE_STEP, "optimizer": ADAMW},
    ),
    "training that diverges": Difference(
        COUNTED,
        TorchCounted((1, 2)),
        "training step 1",
        {*OF_OUTPUT, "parameter gain"},
        ["In training, the first", "Training diverges: gain grows to "],
        {**ONE_STEP, "optimizer": sgd(1e5)},
    ),
    "momentum and variance": Difference(
        flax_bn(), torch_bn(), "training step 1", STATISTICS, [MOMENTUM, VARIANCE]
    ),
    "momentum and variance of NNX": Difference(
        NnxBn(), torch_bn(), "training step 1", STATISTICS, [MOMENTUM, VARIANCE]
    ),
    "variance": Difference(
        flax_bn(momentum=0.9), torch_bn(), "training step 1", {"statistic bn/var"}, [VARIANCE]
    ),
    "epsilon": Difference(
        Flax(flax_layer_norm),
        torch_layer_norm(),
        "evaluation",
        {"output", "input gradient"},
        [
            "In evaluation, the first module whose output differs is norm; its input agrees.",
            "norm: epsilon is 1e-06 in Flax, and eps 1e-05 in PyTorch.",
        ],
        {**EVALUATION, "weights": "random"},
    ),
    "formula": Difference(
        flax_mlp(nn.gelu),
        torch_mlp(torch.nn.functional.gelu),
        "evaluation",
        {"output"},
        [FIRST_MODULE],
        EVALUATION,
    ),
    "formula after a scan": Difference(
        Flax(flax_scan),
        Torch(lambda self, x: self.out(torch.tanh(x)), out=torch.nn.Linear(5, 3)),
        "evaluation",
        {"output"},
        ["In evaluation, the first difference arises between the input of the module itself,"],
        EVALUATION,
    ),
    "formula of NNX": Difference(
        NnxMlp(), torch_mlp(torch.relu), "evaluation", {"output"}, [FIRST_MODULE], EVALUATION
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_found_and_explained(difference):
    flax, module, phase, names, hints, options = DIFFERENCES[difference]
    comparison = compare(flax, module, VECTORS, **options)
    first_phase, first_names = first_failures(comparison)
    assert first_phase == phase
    assert first_names == names if phase == "training step 1" else first_names >= names
    hints = [*hints, OTHER_FORMULA]
    assert len(comparison.hints) == len(hints), comparison.hints
    for actual, expected in zip(comparison.hints, hints, strict=True):
        assert actual.startswith(expected)


class RoundedNorm(torch.nn.BatchNorm1d):
    """A batch norm whose running averages are rounded to float32, in float64 too."""

    def __init__(self, features, correction):
        super().__init__(features)
        self.correction = correction

    def forward(self, x):
        if self.training:
            batch = {"running_mean": x.mean(0), "running_var": x.var(0, correction=self.correction)}
            for name, value in batch.items():
                new = 0.9 * getattr(self, name) + 0.1 * value.detach()
                rounded = new.numpy().astype(np.float32)
                setattr(self, name, torch.from_numpy(rounded).to(x.dtype))
            return torch.nn.functional.batch_norm(x, None, None, self.weight, self.bias, True)
        return super().forward(x)


@pytest.mark.parametrize(("correction", "limits"), [(1, [VARIANCE]), (0, [])])
def test_a_biased_variance_is_recognized_in_float32_too(correction, limits):
    module = torch_bn()
    module.bn = RoundedNorm(4, correction)
    comparison = compare(flax_bn(momentum=0.9), module, VECTORS, **ONE_STEP)
    assert [hint for hint in comparison.hints if "converge" in hint] == limits


def test_the_same_difference_in_many_modules_is_one_sentence():
    def forward(_, x, train):
        for i in range(5):
            x = nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name=f"bn{i}")(x)
        return x

    module = torch.nn.Sequential(OrderedDict((f"bn{i}", torch.nn.BatchNorm1d(5)) for i in range(5)))
    pair = module_pair(FlaxWithModes(forward), module, [VECTORS]).in_float64()
    probe = pair.probe([VECTORS])
    assert [*different_settings(probe)] == [
        "5 modules (bn0, bn1, bn2 and 2 more): momentum is 0.99 in Flax and 0.1 in PyTorch, where "
        "it is the weight of the new value: 0.9 in Flax's words.",
    ]
    drift = [*statistics_drift(pair, probe, rates=True)]
    assert [sentence[:63] for sentence in drift] == [
        "10 statistics (bn0/mean, bn0/var, bn1/mean and 7 more) move 0.0",
        "5 statistics (bn0/var, bn1/var, bn2/var and 2 more) converge to",
    ]


def test_settings_that_differ_without_a_difference_yet_are_named():
    def forward(_, x, train):
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x))

    module = Torch(
        lambda self, x: torch.relu(self.bn(self.conv(x))),
        conv=torch.nn.Conv2d(3, 4, 3, padding=1),
        bn=torch.nn.BatchNorm2d(4),
    )
    comparison = assert_parity(FlaxWithModes(forward), module, IMAGES, **EVALUATION)
    assert "They agree, but their settings differ:\n  - bn: momentum is 0.99" in str(comparison)


def test_a_constant_in_float32_is_told_from_another_formula():
    """Both multiply by 0.1, and only one rounds it, which only float64 shows."""
    flax = in_flax(lambda x: x * jnp.asarray(np.float32(0.1)))
    comparison = compare(flax, in_torch(lambda x: x * 0.1), VECTORS, **EVALUATION)
    assert {row.implementations[0] for row in failures(comparison)} == {"Flax in float64"}
    assert comparison.hints[-1].startswith(
        "They differ in float64 as well, but no more than by roundings of float32: a small constant"
    )
