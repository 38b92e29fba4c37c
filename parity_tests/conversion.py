"""Hold weights that were converted to what they compute, and to their way back."""

import jax
import numpy as np
import torch
from flax import nnx

from bcn_flax import interop
from parity_tests import layout
from parity_tests.tolerances import assert_close


def randomize(module):
    """Give every number of a PyTorch module another value, and evaluate."""
    rng = np.random.default_rng(0)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tuple(tensor.shape))))
    return module.eval()


def shapes(layer, x, **call):
    return jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **call))


def assert_same_state(actual, expected):
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


def normal(shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def assert_converts(module, flax, x, ulps, *, call=None, **facts):
    """With a PyTorch module's weights Flax computes the same, and the weights return exactly.

    Args:
        module: of PyTorch.
        flax: a module of linen or NNX.
        x: the input, in Flax's order of axes.
        ulps: how many roundings the outputs may be apart.
        call: keyword arguments of a call of Flax's module.
        facts: arguments of `match`.
    """
    call = call or {}
    like = flax if isinstance(flax, nnx.Module) else shapes(flax, x, **call)
    match = interop.match(module.state_dict(), like, **facts)
    variables = match.to_flax(module)
    if isinstance(flax, nnx.Module):
        y = interop.module_with(flax, variables)(x, **call)
    else:
        y = flax.apply(variables, x, **call)
    assert_close(y, layout.to_flax(module(layout.to_torch(x))), ulps=ulps, dtype=np.float32)
    assert_same_state(match.to_torch(variables), module.state_dict())
