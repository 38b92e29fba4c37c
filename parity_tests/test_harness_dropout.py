"""Dropout has the same masks on both sides, and everything else that is random is refused."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

from bcn_flax.parity import assert_parity, compare
from parity_tests.small_models import (
    EVALUATION,
    IMAGES,
    ONE_STEP,
    VECTORS,
)

pytestmark = pytest.mark.torch


class FlaxDropout(nn.Module):
    """A convolution, channels that are dropped, and values that are dropped."""

    rates: tuple[float, float] = (0.5, 0.25)

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), padding=1, name="conv")(x)
        x = nn.Dropout(self.rates[0], broadcast_dims=(1, 2))(x, deterministic=not train)
        x = nn.Dense(6, name="hidden")(jnp.tanh(x.mean((1, 2))))
        x = nn.Dropout(self.rates[1], deterministic=not train, name="drop")(x)
        return nn.Dense(3, name="out")(jnp.tanh(x))


class NnxDropout(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), padding=1, rngs=rngs)
        self.hidden, self.out = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.channels = nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.channels(self.conv(x)).mean((1, 2)))
        return self.out(jnp.tanh(self.drop(self.hidden(x))))


class TorchDropout(torch.nn.Module):
    def __init__(self, rates=(0.5, 0.25), function=torch.tanh):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.hidden, self.out = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)
        self.channels, self.drop = torch.nn.Dropout2d(rates[0]), torch.nn.Dropout(rates[1])
        self.function = function

    def forward(self, x):
        x = torch.tanh(self.channels(self.conv(x)).mean((2, 3)))
        return self.out(self.function(self.drop(self.hidden(x))))


@pytest.mark.parametrize(
    ("flax_module", "options"),
    [(FlaxDropout(), {"steps": [IMAGES, IMAGES[:1]]}), (NnxDropout(), ONE_STEP)],
    ids=["linen", "NNX"],
)
def test_dropout_gets_the_same_masks_on_both_sides(flax_module, options):
    assert_parity(flax_module, TorchDropout(), IMAGES, **options)


class ImageDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5)(x, deterministic=not train)


def test_dropout_of_images_drops_the_same_values():
    assert_parity(ImageDropout(), torch.nn.Dropout(0.5), IMAGES, **ONE_STEP)


def test_differences_after_dropout_are_found_in_training():
    after = TorchDropout(function=lambda x: torch.tanh(1.001 * x))
    after.function = lambda x: torch.tanh(1.001 * x) if after.training else torch.tanh(x)
    comparison = compare(FlaxDropout(), after, IMAGES, **ONE_STEP)
    assert "arises between the output of drop, which agrees, and the input" in comparison.hints[0]
    wrong_rate = TorchDropout(rates=(0.5, 0.3))
    comparison = compare(FlaxDropout(), wrong_rate, IMAGES, **ONE_STEP)
    assert {row.phase for row in comparison.rows if not row.passed} >= {"training step 1"}
    assert all(row.passed for row in comparison.rows if row.phase == "evaluation")
    assert "dropout: rate is 0.25 in Flax, and p 0.3 in PyTorch." in comparison.hints
    assert comparison.hints[0].startswith(
        "In training, the first module whose output differs is drop; its input agrees."
    )


def test_modules_that_drop_everything_agree():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(1.0)(x, deterministic=not train)

    comparison = assert_parity(Dropped(), torch.nn.Dropout(1.0), VECTORS, **ONE_STEP)
    output = next(r for r in comparison.rows if r.phase != "evaluation")
    assert (str(output.name), output.error.scale) == ("output", 0)


def test_modules_with_dropout_are_not_changed():
    flax_module, module = NnxDropout(), TorchDropout()
    before = nnx.state(flax_module, nnx.RngCount)
    compare(flax_module, module, IMAGES, **ONE_STEP)
    assert type(flax_module.drop) is nnx.Dropout
    assert "forward" not in vars(module.drop)
    assert not module.drop._forward_pre_hooks
    assert nnx.state(flax_module, nnx.RngCount) == before


@pytest.mark.parametrize("flax_module", [FlaxDropout(), NnxDropout()], ids=["linen", "NNX"])
def test_without_training_dropout_needs_no_counterpart(flax_module):
    assert_parity(flax_module, TorchDropout(rates=(0.0, 0.1)), IMAGES, **EVALUATION)
