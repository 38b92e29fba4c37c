"""A ResNet written for `flax.linen.BatchNorm` trains with these layers and no other edit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bcn_flax import BatchChannelNorm, BatchNorm, EstimatedBatchNorm


class ResidualBlock(nn.Module):
    """As in Flax's ImageNet example: the last scale starts at zero, so the block as identity."""

    filters: int
    norm: Callable[..., Any]
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        y = conv(self.filters, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Written for `nn.BatchNorm`; only the class that `make_norm` names ever changes."""

    make_norm: Callable[..., Any]
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        norm = partial(
            self.make_norm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = nn.Conv(32, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for i, filters in enumerate((32, 64)):
            x = ResidualBlock(filters, norm, strides=i + 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def train(make_norm, batch_size, steps=12):
    """Fit a few fixed images; the losses and the final variables."""
    model = ResNet(make_norm)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch_size, 8, 8, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch_size))
    variables = model.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(variables, state):
        def loss_of(params):
            logits, updates = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradients, state)
        params = optax.apply_updates(variables["params"], change)
        return {"params": params, **updates}, state, loss

    state, losses = optimizer.init(variables["params"]), []
    for _ in range(steps):
        variables, state, loss = step(variables, state)
        losses.append(float(loss))
    evaluated = model.apply(variables, x, train=False)
    return losses, variables, evaluated


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("make_norm", [BatchChannelNorm, BatchNorm, EstimatedBatchNorm])
def test_trains_in_the_place_of_batch_norm(make_norm, batch_size):
    losses, variables, evaluated = train(make_norm, batch_size)
    assert np.isfinite(losses).all()
    assert np.isfinite(evaluated).all()
    assert losses[-1] < 0.7 * losses[0]
    names = set(variables["params"]["ResidualBlock_1"])
    layer = make_norm.__name__
    assert {f"{layer}_0", f"{layer}_1", "norm_proj", "conv_proj"} <= names


def test_batch_norm_is_flaxs_in_every_number():
    """Losses, parameters and statistics of 12 steps, where Flax's own moments are accurate."""
    losses, variables, evaluated = train(BatchNorm, 8)
    flax_losses, flax_variables, flax_evaluated = train(nn.BatchNorm, 8)

    # Both run in float32; 12 steps of training let roundings grow.
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    close(losses, flax_losses)
    close(evaluated, flax_evaluated)
    jax.tree.map(close, jax.tree.leaves(variables), jax.tree.leaves(flax_variables))


def test_the_last_scale_starts_at_zero():
    model = ResNet(BatchChannelNorm)
    params = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    last = params["ResidualBlock_0"]["BatchChannelNorm_1"]
    assert (last["channel_norm"]["scale"] == 0).all()
    assert (last["batch_norm"]["scale"] == 1).all()
