"""A ResNet written for `flax.linen.BatchNorm` trains with these layers and no other edit."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from sklearn.datasets import load_digits

from bcn_flax import BatchChannelNorm, BatchNorm, EstimatedBatchNorm, WSConv


class ResidualBlock(nn.Module):
    """As in Flax's ImageNet example: the last scale starts at 0, so the block is the identity."""

    filters: int
    norm: Callable[..., Any]
    conv: Callable[..., Any]
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        conv = partial(self.conv, use_bias=False)
        y = conv(self.filters, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Written for `nn.BatchNorm` and `nn.Conv`; only these two classes change."""

    make_norm: Callable[..., Any] = nn.BatchNorm
    make_conv: Callable[..., Any] = nn.Conv
    width: int = 32
    stages: Sequence[int] = (1, 1)
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
        x = self.make_conv(self.width, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(self.width * 2**stage, norm, self.make_conv, strides)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def images(batch_size):
    """A batch of random images."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch_size, 8, 8, 3)), jnp.float32)
    return [(x, jnp.asarray(rng.integers(0, 10, batch_size)))]


def train(model, batches, steps=12):
    """Train on the batches in turn; return losses, final variables, and an evaluation."""
    key = jax.random.key(0, impl="rbg")  # initializers compile several times as fast
    variables = jax.jit(model.init)(key, batches[0][0])
    optimizer = optax.sgd(0.05, momentum=0.9)

    @jax.jit
    def step(variables, state, x, labels):
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
    for i in range(steps):
        variables, state, loss = step(variables, state, *batches[i % len(batches)])
        losses.append(float(loss))
    evaluate = jax.jit(partial(model.apply, train=False))
    return losses, variables, evaluate(variables, batches[0][0])


@cache
def trained(make_norm, batch_size):
    """What `train` gives for a small network, on a batch of random pixels."""
    return train(ResNet(make_norm), images(batch_size))


@pytest.mark.parametrize(("make_norm", "batch_size"), [(BatchChannelNorm, 1), (BatchNorm, 8)])
def test_trains_in_the_place_of_batch_norm(make_norm, batch_size):
    losses, variables, evaluated = trained(make_norm, batch_size)
    assert np.isfinite(losses).all()
    assert np.isfinite(evaluated).all()
    assert losses[-1] < 0.7 * losses[0]
    names = set(variables["params"]["ResidualBlock_1"])
    layer = make_norm.__name__
    assert {f"{layer}_0", f"{layer}_1", "norm_proj", "conv_proj"} <= names


def test_batch_norm_is_flaxs_in_every_number():
    """Losses, parameters and statistics of 12 steps, where Flax's own moments are accurate."""
    losses, variables, evaluated = trained(BatchNorm, 8)
    flax_losses, flax_variables, flax_evaluated = trained(nn.BatchNorm, 8)

    # Both run in float32; 12 steps of training let roundings grow.
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    close(losses, flax_losses)
    close(evaluated, flax_evaluated)
    jax.tree.map(close, jax.tree.leaves(variables), jax.tree.leaves(flax_variables))


def test_an_estimated_batch_norm_takes_the_same_arguments():
    """It trains inside of a batch-channel norm."""
    (x, _), *_ = images(1)
    shapes = jax.eval_shape(ResNet(EstimatedBatchNorm).init, jax.random.key(0), x)
    assert {"EstimatedBatchNorm_0", "norm_proj"} <= set(shapes["params"]["ResidualBlock_1"])


def test_the_last_scale_starts_at_zero():
    block = ResidualBlock(32, partial(BatchChannelNorm, use_running_average=True), nn.Conv)
    params = jax.jit(block.init)(jax.random.key(0), jnp.ones((1, 4, 4, 32)))["params"]
    last = params["BatchChannelNorm_1"]
    assert (last["channel_norm"]["scale"] == 0).all()
    assert (last["batch_norm"]["scale"] == 1).all()


@pytest.mark.slow
def test_a_resnet_18_trains_on_digits_in_batches_of_2():
    """The recipe for linen: the model takes its norm and its convolution as attributes."""
    model = ResNet(BatchChannelNorm, WSConv, width=64, stages=(2, 2, 2, 2))
    digits, labels = load_digits(return_X_y=True)
    x = jnp.asarray(digits[:16].reshape(8, 2, 8, 8, 1) / 16, jnp.float32)
    y = jnp.asarray(labels[:16].reshape(8, 2))
    losses, variables, evaluated = train(model, list(zip(x, y, strict=True)), steps=32)
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) > 11e6
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])
    assert np.isfinite(evaluated).all()
