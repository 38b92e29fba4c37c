"""What the layers move through the memory of a GPU and a TPU, by programs compiled for them.

    pytest -m accelerators

Needs no accelerator, but the compilers of both, in an environment of their own: `.ci/run` makes it,
`benchmarks/targets.py` says what it takes. The bounds are in sizes of the input, in its own type.
With forward and backward in one program the least is 7: x is read for the moments, x and dy for the
output and the sums of the backward pass, x and dy for dx; the output and dx are written.
"""

import math
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from bcn_flax import BatchChannelNorm, BatchNorm, ChannelNorm, EstimatedBatchNorm, WSConv

pytestmark = pytest.mark.accelerators

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import targets  # noqa: E402

LARGE, WIDE, MIDDLE, SMALL = (
    (2, 200, 304, 256),
    (32, 32, 32, 64),
    (16, 56, 56, 256),
    (64, 4, 4, 512),
)
LAYERS = {
    "BCN": partial(BatchChannelNorm, use_running_average=False),
    "BCN without estimate": partial(BatchChannelNorm, use_running_average=False, estimate=False),
    "BN": partial(BatchNorm, use_running_average=False),
    "BN by estimates": partial(EstimatedBatchNorm, use_running_average=False),
    "CN": ChannelNorm,
}


def both_passes(layer, variables, x, dy):
    """Output, gradients and new statistics."""

    def call(params, x):
        return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    y, pullback, stats = jax.vjp(call, variables["params"], x, has_aux=True)
    return y, pullback(dy), stats


@cache
def layer_program(name, target, shape, dtype):
    layer = LAYERS[name](dtype=dtype)
    x = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    where = targets.one_device(target)
    return targets.compiled(where, partial(both_passes, layer), variables, x, x)


def passes(program, shape, dtype) -> float:
    """What a program moves, in sizes of its input."""
    return targets.bytes_moved(program) / (math.prod(shape) * jnp.dtype(dtype).itemsize)


def widened(program, elements) -> list[str]:
    """The kernels that write an array of an activation's size in float32."""
    return [
        line.name
        for line in targets.instructions(program)
        if line.operation not in targets.FREE and (elements, 4) in targets.lengths(line.type)
    ]


@pytest.mark.parametrize(
    ("target", "shape", "dtype", "bound"),
    [
        ("h100", LARGE, "float32", 7.1),
        ("h100", LARGE, "bfloat16", 7.1),
        ("h100", LARGE, "float16", 7.1),
        ("h100", WIDE, "float32", 7.2),
        ("h100", WIDE, "bfloat16", 7.3),
        ("h100", MIDDLE, "float32", 7.1),
        ("h100", MIDDLE, "bfloat16", 7.1),
        ("h100", SMALL, "float32", 10.6),
        ("h100", SMALL, "bfloat16", 13.5),
        ("v5e", LARGE, "float32", 6.1),
        ("v5e", LARGE, "bfloat16", 9.1),
        ("v5e", SMALL, "float32", 20),
        ("v5e", SMALL, "bfloat16", 27),
    ],
)
def test_a_layer_moves_what_its_arithmetic_needs(target, shape, dtype, bound):
    """Where images are small and many, the (n, c) numbers are no longer small beside them."""
    assert passes(layer_program("BCN", target, shape, dtype), shape, dtype) <= bound


@pytest.mark.parametrize("target", ["h100", "v5e"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("BCN", shape) for shape in (LARGE, WIDE, MIDDLE, SMALL)),
        *((name, MIDDLE) for name in LAYERS if name != "BCN"),
    ],
)
def test_nothing_of_the_size_of_an_activation_is_stored_in_float32(name, target, shape):
    program = layer_program(name, target, shape, "bfloat16")
    assert widened(program, math.prod(shape)) == []
    # What is counted is worth counting.
    assert widened(layer_program(name, target, shape, "float32"), math.prod(shape)) != []


class Chain(nn.Module):
    """Convolution, norm and ReLU, three times."""

    norm: type[nn.Module]
    conv: type[nn.Module] = nn.Conv

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = self.conv(x.shape[-1], (3, 3), use_bias=False, dtype=x.dtype)(x)
            x = nn.relu(self.norm(dtype=x.dtype)(x))
        return x


class Pair(nn.Module):
    """What Flax offers."""

    dtype: str

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
        return nn.GroupNorm(32, dtype=self.dtype)(x)


@cache
def chain_program(target, norm, conv=nn.Conv):
    chain = Chain(norm, conv)
    x = jax.ShapeDtypeStruct(MIDDLE, jnp.bfloat16)
    variables = jax.eval_shape(chain.init, jax.random.key(0), x)

    def step(variables, x):
        def loss(params):
            y, stats = chain.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(y.astype(jnp.float32) ** 2), stats

        return jax.grad(loss, has_aux=True)(variables["params"])

    return targets.compiled(targets.one_device(target), step, variables, x)


BCN = LAYERS["BCN"]


@pytest.mark.parametrize(
    ("target", "bound", "pair"),
    # To compile the pair for the TPU takes half a minute, and gave 10.65 with jax 0.10.2.
    [("h100", 15.9, None), ("v5e", 10.2, 10.65)],
)
def test_a_layer_between_convolutions_moves_less_than_flaxs_pair(target, bound, pair):
    ours = passes(chain_program(target, BCN), MIDDLE, jnp.bfloat16) / 3
    pair = pair or passes(chain_program(target, Pair), MIDDLE, jnp.bfloat16) / 3
    assert ours <= bound
    assert ours < pair


@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_between_convolutions_too_nothing_is_stored_in_float32(target):
    assert widened(chain_program(target, BCN), math.prod(MIDDLE)) == []


@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_a_standardized_kernel_costs_a_few_passes_over_the_kernel(target):
    """Beside a float32 kernel of 3x3x256x256 for each layer: none of the activations' size."""
    plain, standardized = (
        targets.bytes_moved(chain_program(target, BCN, conv)) for conv in (nn.Conv, WSConv)
    )
    kernel = 3 * 3 * 256 * 256 * 4
    assert (standardized - plain) / (3 * kernel) < 12
