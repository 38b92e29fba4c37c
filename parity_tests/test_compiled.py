"""What the compiler makes of the layers: how often it reads and writes, keeps, sends and compiles.

Not how long that takes, which `benchmarks/` measures: these numbers are the same on every machine.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bcn_flax.nnx
import train_cifar
from bcn_flax import MOMENTS, BatchChannelNorm, BatchNorm, ChannelNorm, EstimatedBatchNorm
from training.config import RECIPES, Config

SHAPE = (4, 64, 64, 128)
X = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
BYTES = math.prod(SHAPE) * 4
# Of 1 value in 64, to find the origin: read, written and read again.
GRID = 3 / 64
# Of (n, c) numbers, some dozens of arrays: each has 1 byte for 64 * 64 of `x`.
SMALL = 0.05


class Operation(NamedTuple):
    """A line of a compiled program: it makes one array out of others."""

    name: str
    size: int  # in elements
    opcode: str
    operands: list[str]
    body: str | None


def size_of(shape: str) -> int:
    dimensions = re.match(r"\w+\[([\d,]*)\]", shape)
    return math.prod(map(int, filter(None, dimensions[1].split(",")))) if dimensions else 0


def operations(text: str) -> Iterator[Operation]:
    line = re.compile(
        r"^\s+(?:ROOT )?%(\S+) = (\S+) ([\w-]+)\((.*?)\)(?:.*?calls=%(\S+?)[,\n])?", re.M
    )
    for name, shape, opcode, operands, body in line.findall(text):
        yield Operation(name, size_of(shape), opcode, re.findall(r"%([\w.-]+)", operands), body)


def passes(compiled, size: int) -> tuple[int, int]:
    """How many arrays of this size the steps of a program read and write, all in all."""
    text = compiled.as_text()
    steps = {step.name: step for step in operations(text[text.index("\nENTRY") :])}
    working = [s for s in steps.values() if s.opcode not in {"parameter", "tuple", "bitcast"}]
    reads = sum(steps[o].size == size for step in working for o in step.operands)
    return reads, sum(step.size == size for step in working)


def arithmetic(compiled, size: int) -> int:
    """The most operations that are done for each value written to an array of this size."""
    bodies = dict(re.findall(r"^%(\S+) \(.*?\n(.*?)^}", compiled.as_text(), re.M | re.S))
    text = compiled.as_text()
    writers = [
        step.body
        for step in operations(text[text.index("\nENTRY") :])
        if step.size == size and step.opcode == "fusion"
    ]
    free = {"parameter", "constant", "broadcast", "bitcast", "reshape", "copy"}
    return max(sum(o.opcode not in free for o in operations(bodies[w])) for w in writers)


def bytes_accessed(compiled) -> float:
    """In units of the size of `x`."""
    return compiled.cost_analysis()["bytes accessed"] / BYTES


@cache
def forward(name):
    layer = LAYERS[name]

    def call(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    return jax.jit(call).lower(variables, X).compile()


@cache
def forward_and_backward(name):
    layer = LAYERS[name]

    def step(variables, x, dy):
        def call(params, x):
            return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

        y, pullback, statistics = jax.vjp(call, variables["params"], x, has_aux=True)
        return y, pullback(dy), statistics

    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    return jax.jit(step).lower(variables, X, X).compile()


LAYERS = {
    "BCN": BatchChannelNorm(use_running_average=False),
    "BCN without estimate": BatchChannelNorm(use_running_average=False, estimate=False),
    "BCN in evaluation": BatchChannelNorm(use_running_average=True),
    "BN": BatchNorm(use_running_average=False),
    "BN by estimates": EstimatedBatchNorm(use_running_average=False),
    "BN in evaluation": BatchNorm(use_running_average=True),
    "CN": ChannelNorm(num_groups=32),
}


MEASURING = [name for name in LAYERS if name != "BN in evaluation"]


@pytest.mark.parametrize("name", MEASURING)
def test_forward_reads_x_three_times(name):
    """For two sums and to be mapped; and a part of it, the grid, for the origin."""
    compiled = forward(name)
    assert passes(compiled, math.prod(SHAPE)) == (4, 1)
    assert bytes_accessed(compiled) < 4 + GRID + SMALL


@pytest.mark.parametrize("name", MEASURING)
def test_backward_reads_x_two_times_and_dy_three_times(name):
    """For the sums of dy and of dy * x and to be mapped; through estimates x need not be mapped."""
    compiled = forward_and_backward(name)
    mapped = 0 if name == "BN by estimates" else 1
    assert passes(compiled, math.prod(SHAPE)) == (4 + 4 + mapped, 2)
    assert bytes_accessed(compiled) < 4 + 5 + mapped + GRID + SMALL


def test_evaluation_of_a_batch_norm_reads_x_once():
    compiled = forward("BN in evaluation")
    assert passes(compiled, math.prod(SHAPE)) == (2, 1)
    assert bytes_accessed(compiled) < 2 + GRID + SMALL


@pytest.mark.parametrize("name", MEASURING)
def test_for_each_value_only_the_affine_map_is_computed(name):
    """All the algebra is done once for (n, c) numbers: dx is `a * dy + b * (2 * (x - o)) + c`."""
    assert arithmetic(forward(name), math.prod(SHAPE)) == 3
    assert arithmetic(forward_and_backward(name), math.prod(SHAPE)) <= 8


class Block(nn.Module):
    """Norm, ReLU and convolution."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.norm()(x))
        return nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)


class Chain(nn.Module):
    """A convolution and many blocks."""

    norm: type[nn.Module]
    depth: int
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
        for i in range(self.depth):
            x = self.block(self.norm, name=f"block_{i}")(x)
        return x


BCN = partial(BatchChannelNorm, num_groups=4, use_running_average=False)
REMATERIALIZED = nn.remat(Block, policy=jax.checkpoint_policies.save_only_these_names(MOMENTS))


def loss_of(module, x):
    variables = module.init(jax.random.key(0), x)

    def loss(params, x):
        y, updates = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y), updates

    return loss, variables["params"]


def kept(module, x) -> float:
    """What is kept for the backward pass, in arrays of the size of `x`."""
    loss, params = loss_of(module, x)

    def residuals(params, x):
        _, pullback, _ = jax.vjp(loss, params, x, has_aux=True)
        return jax.tree.leaves(pullback)

    jaxpr = jax.make_jaxpr(residuals)(params, x).jaxpr
    outputs = {id(v): v.aval for v in jaxpr.outvars}
    return sum(aval.size * aval.dtype.itemsize for aval in outputs.values()) / x.nbytes


def per_block(measure, norm, block=Block):
    """What one more block adds."""
    x = jnp.ones((2, 32, 32, 16))
    return (measure(Chain(norm, 9, block), x) - measure(Chain(norm, 3, block), x)) / 6


def temporary(chain, x) -> float:
    """The temporary memory of a step of training, in arrays of the size of `x`."""
    loss, params = loss_of(chain, x)
    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / x.nbytes


class Pair(nn.Module):
    """What Flax offers."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.GroupNorm(4)(x)


@pytest.mark.parametrize("name", MEASURING)
def test_a_layer_keeps_only_its_input(name):
    """And (n, c) numbers, each a 1024th of it."""
    assert kept(LAYERS[name].clone(), jnp.ones((2, 32, 32, 32))) < 1.05


def test_a_block_keeps_two_activations_where_those_of_flax_keep_four():
    """The output of the convolution and of the ReLU, which is what the convolutions ask for."""
    assert per_block(temporary, BCN) < 2.1
    assert per_block(temporary, Pair) > 3.9


def test_a_rematerialized_block_keeps_one_activation():
    assert per_block(kept, BCN, REMATERIALIZED) < 1.2
    assert per_block(kept, BCN) > 2  # what is counted is worth counting


def test_a_rematerialized_block_computes_the_same():
    """And keeps the moments: they are not measured a second time."""
    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 16))
    plain, rematerialized = Chain(BCN, 2), Chain(BCN, 2, REMATERIALIZED)
    outcomes, sums = [], []
    for chain in plain, rematerialized:
        loss, params = loss_of(chain, x)
        outcomes.append(jax.grad(loss, has_aux=True)(params, x))
        program = str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, x))
        sums.append(len(re.findall(r"reduce_sum\[\s*axes=\(1, 2\)", program)))
    # Of sums over 2 * 16 * 16 * 16 values and 3 layers, in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-2), *outcomes)
    assert sums[0] == sums[1]


def test_devices_exchange_only_a_few_numbers_for_each_channel():
    """However large the images and the batch are."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    over = partial(NamedSharding, mesh)
    layer = BatchChannelNorm(num_groups=4, use_running_average=False)

    def exchanged(shape):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over(PartitionSpec("data")))
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)

        @partial(jax.jit, in_shardings=(over(PartitionSpec()), over(PartitionSpec("data"))))
        def step(variables, x):
            def loss(params):
                y, updates = layer.apply(
                    {**variables, "params": params}, x, mutable=["batch_stats"]
                )
                return jnp.sum(y**3), updates

            return jax.grad(loss, has_aux=True)(variables["params"])

        text = step.lower(variables, x).compile().as_text()
        collectives = re.findall(r" = (.*?) (all-\w+|reduce-scatter|collective-\w+)\(", text)
        return sum(map(size_of, re.findall(r"\w+\[[\d,]*\]", " ".join(s for s, _ in collectives))))

    few = exchanged((8, 8, 8, 16))
    # Forward a sum for the origin and two for the moments; backward the terms of scale and bias.
    assert 3 * 16 <= few <= 12 * 16
    assert exchanged((32, 16, 16, 16)) == few


@pytest.fixture
def compilations():
    """How many programs have been compiled so far."""
    seen = []

    def listen(event, _, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: len(seen)
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_a_second_step_compiles_nothing(api, compilations):
    x, other = jnp.ones((2, 4, 4, 8)), jnp.zeros((2, 4, 4, 8))
    if api == "linen":
        layer = BatchChannelNorm(num_groups=2, use_running_average=False)
        state = layer.init(jax.random.key(0), x)

        @jax.jit
        def step(state, x):
            def loss(params):
                y, updates = layer.apply({**state, "params": params}, x, mutable=["batch_stats"])
                return jnp.sum(y**3), updates

            gradient, updates = jax.grad(loss, has_aux=True)(state["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradient)
            return {"params": params, **updates}
    else:
        layer = bcn_flax.nnx.BatchChannelNorm(8, num_groups=2, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)

        @jax.jit
        def step(state, x):
            layer = nnx.merge(graph, state)
            gradient = nnx.grad(lambda layer: jnp.sum(layer(x) ** 3))(layer)
            params = nnx.state(layer, nnx.Param)
            nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
            return nnx.state(layer)

    before = compilations()
    state = step(state, x)
    assert compilations() == before + 1
    step(state, other)
    assert compilations() == before + 1


def test_training_longer_compiles_nothing_more(compilations, monkeypatch, tmp_path):
    digits = dataclasses.replace(RECIPES["digits"], blocks=((8,),), groups=4)
    monkeypatch.setitem(RECIPES, "digits", digits)
    counts = []
    for epochs in 1, 2:
        before = compilations()
        train_cifar.main(Config(epochs=epochs, devices=1, output=tmp_path / f"{epochs}"))
        counts.append(compilations() - before)
    assert counts[1] <= counts[0]  # of the first run's, some serve the second
