"""A ResNet-50 and its training step: the largest batch that fits an accelerator's memory."""

import targets  # isort: skip  # sets up the environment, so it comes first

import argparse
import math
from bisect import bisect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from contenders import FlaxPair
from flax import linen as nn

from bcn_flax import MOMENTS, BatchChannelNorm, WSConv

Make = Callable[..., nn.Module]

DTYPE = jnp.bfloat16
SIDE, CLASSES = 224, 1000
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, and their inner channels
WIDER = 4  # a block's output has this many times its inner channels
KEPT = jax.checkpoint_policies.save_only_these_names(MOMENTS)
# The batch sizes to try; the compiler for TPUs takes minutes for each.
BATCHES = {"h100": range(1024, 3072, 64), "v5e": range(256, 1536, 128)}


class Unit(nn.Module):
    """Norm, ReLU and the next convolution, which are rematerialized together."""

    norm: Make
    conv: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv()(nn.relu(self.norm()(x)))


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, each with its norm, and a shortcut past them."""

    channels: int
    stride: int
    conv: Make
    norm: Make
    unit: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.channels * WIDER
        y = self.conv(self.channels, (1, 1))(x)
        strided = partial(self.conv, self.channels, (3, 3), strides=self.stride)
        y = self.unit(self.norm, strided)(y)
        y = self.unit(self.norm, partial(self.conv, wide, (1, 1)))(y)
        y = self.norm()(y)
        if x.shape != y.shape:
            x = self.norm()(self.conv(wide, (1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """He et al., arXiv 1512.03385, with the stride in the 3x3 convolutions."""

    conv: Make
    norm: Make
    unit: Any = Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(self.conv, use_bias=False, dtype=DTYPE)
        x = nn.relu(self.norm()(conv(64, (7, 7), strides=2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (blocks, channels) in enumerate(STAGES):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(channels, stride, conv, self.norm, self.unit)(x)
        return nn.Dense(CLASSES, dtype=DTYPE)(x.mean((1, 2)))


def networks() -> dict[str, nn.Module]:
    """The networks to compare, by name."""
    batch_norm = partial(nn.BatchNorm, use_running_average=False, dtype=DTYPE)
    group_norm = partial(nn.GroupNorm, num_groups=32, dtype=DTYPE)
    pair = partial(FlaxPair, 32, use_running_average=False, dtype=DTYPE)
    ours = partial(BatchChannelNorm, use_running_average=False, dtype=DTYPE)
    return {
        "Flax BatchNorm": ResNet50(nn.Conv, batch_norm),
        "Flax GroupNorm": ResNet50(nn.Conv, group_norm),
        "Flax BatchNorm + GroupNorm": ResNet50(nn.Conv, pair),
        "BatchChannelNorm": ResNet50(nn.Conv, ours),
        "BatchChannelNorm, WSConv": ResNet50(WSConv, ours),
        "BatchChannelNorm, WSConv, rematerialized": ResNet50(
            WSConv, ours, nn.remat(Unit, policy=KEPT)
        ),
    }


class State(NamedTuple):
    """What a step updates."""

    params: Any
    batch_stats: Any
    momentum: Any


OPTIMIZER = optax.sgd(0.1, 0.9)


def first_state(model: nn.Module) -> State:
    """The shapes and types of the first state, without values."""

    def first(images: jax.Array) -> State:
        variables = model.init(jax.random.key(0), images)
        params = variables["params"]
        return State(params, variables.get("batch_stats", {}), OPTIMIZER.init(params))

    return jax.eval_shape(first, jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), DTYPE))


def program(model: nn.Module, target: str, batch: int) -> jax.stages.Compiled:
    """A training step: gradients of the loss, and SGD with momentum; the state is donated."""

    def step(state: State, images: jax.Array, labels: jax.Array) -> State:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(variables, images, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return losses.mean(), updates.get("batch_stats", {})

        gradient, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        updates, momentum = OPTIMIZER.update(gradient, state.momentum)
        return State(optax.apply_updates(state.params, updates), batch_stats, momentum)

    images = jax.ShapeDtypeStruct((batch, SIDE, SIDE, 3), DTYPE)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    where = targets.one_device(target)
    return targets.compiled(where, step, first_state(model), images, labels, donate=[0])


def share(model: nn.Module, target: str, batch: int) -> float:
    """The fraction of the memory that a step needs; infinite if the compiler runs out of it."""
    try:
        return targets.all_memory(program(model, target, batch)) / targets.TARGETS[target].memory
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise


def fits(target: str, arguments: argparse.Namespace) -> None:
    """The last table, written again after each row."""
    limit = targets.TARGETS[target].memory / 2**30
    batches = BATCHES[target]
    rows: list[list[str | float]] = []
    base = 0
    for name, model in networks().items():
        used = cache(partial(share, model, target))
        # By bisection: the compiler rematerializes near the limit, so memory is not linear.
        fitting = bisect(batches, 1.0, key=used)
        if not 0 < fitting < len(batches):
            raise ValueError(
                f"{name}: {fitting} of {batches} fit, so the largest is not among them."
            )
        batch = batches[fitting - 1]
        base = base or batch
        rows.append([name, batch, batch / base, f"{used(batch):.1%}"])
        print(*rows[-1], flush=True)
        targets.tabulate(
            "fits",
            target,
            f"The largest batch, a multiple of {batches.step}, of which a training step of a "
            f"ResNet-50 fits into {limit:.2f} GiB: {SIDE}x{SIDE} images, bfloat16, float32 "
            "parameters, SGD with momentum",
            ["network", "batch", "times Flax BatchNorm", "of the memory"],
            rows,
        )
