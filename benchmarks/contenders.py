"""What `layer.py` and `scaling.py` time: normalization layers of this package and of Flax."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import bcn_flax.linen
import bcn_flax.nnx

Run = Callable[[], object]


class Setting(NamedTuple):
    """Input shape and options of a layer."""

    shape: tuple[int, ...]
    groups: int
    dtype: str = "float32"
    train: bool = True
    backward: bool = True


Make = Callable[[Setting, jax.Array, jax.Array], Run]
"""Makes a program from a setting, an input, and a gradient of the output."""


class FlaxPair(nn.Module):
    """Flax's `BatchNorm`, then its `GroupNorm`."""

    num_groups: int
    use_running_average: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(self.use_running_average, dtype=self.dtype)(x)
        return nn.GroupNorm(self.num_groups, dtype=self.dtype)(x)


def group_count(channels: int) -> int:
    """32 as elsewhere, but few enough that every group has at least 2 channels."""
    return min(32, channels // 2)


def data(setting: Setting) -> tuple[jax.Array, jax.Array]:
    """An input, and a gradient of the output."""
    keys = jax.random.split(jax.random.key(0))
    x, dy = (jax.random.normal(key, setting.shape, setting.dtype) for key in keys)
    return x, dy


def copy(setting: Setting, x: jax.Array, dy: jax.Array) -> Run:
    """Copy `x`: read and write it once."""
    program = jax.jit(jnp.copy)
    return lambda: program(x)


def ours(setting: Setting, layer: str = "BatchChannelNorm", **options: Any) -> nn.Module:
    """A layer of `bcn_flax.linen`."""
    if layer.endswith("ChannelNorm"):
        options["num_groups"] = setting.groups
    if layer != "ChannelNorm":
        options["use_running_average"] = not setting.train
    return getattr(bcn_flax.linen, layer)(dtype=setting.dtype, **options)


def flax_batch_norm(setting: Setting) -> nn.Module:
    return nn.BatchNorm(not setting.train, dtype=setting.dtype)


def flax_group_norm(setting: Setting) -> nn.Module:
    return nn.GroupNorm(setting.groups, dtype=setting.dtype)


def flax_pair(setting: Setting) -> nn.Module:
    return FlaxPair(setting.groups, not setting.train, setting.dtype)


def linen(make: Callable[[Setting], nn.Module]) -> Make:
    """A linen layer: output and new statistics; backward also the gradients."""

    def make_run(setting: Setting, x: jax.Array, dy: jax.Array) -> Run:
        layer = make(setting)
        variables = jax.jit(layer.init)(jax.random.key(0), x)

        def forward(params: Any, rest: Any, x: jax.Array) -> Any:
            return layer.apply({**rest, "params": params}, x, mutable=["batch_stats"])

        rest = {name: values for name, values in variables.items() if name != "params"}
        return compiled(forward, setting, variables["params"], rest, x, dy)

    return make_run


def in_nnx(setting: Setting, x: jax.Array, dy: jax.Array) -> Run:
    """`BatchChannelNorm` of `bcn_flax.nnx`, split once and merged in the step."""
    model = bcn_flax.nnx.BatchChannelNorm(
        setting.shape[-1], num_groups=setting.groups, dtype=setting.dtype, rngs=nnx.Rngs(0)
    )
    (model.train if setting.train else model.eval)()
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states

    def forward(params: Any, rest: Any, x: jax.Array) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    return compiled(forward, setting, params, rest, x, dy)


def of_few_pixels(make: Make) -> Make:
    """The same of next to no data: what it costs to start the program."""

    def make_run(setting: Setting, x: jax.Array, dy: jax.Array) -> Run:
        few = tuple(slice(2 if i else 1) for i in range(x.ndim - 1))
        return make(setting, x[few], dy[few])

    return make_run


def compiled(
    forward: Callable[..., Any], setting: Setting, params: Any, rest: Any, x: jax.Array, dy: Any
) -> Run:
    """The program, and its arguments."""
    if not setting.backward:
        return partial(jax.jit(forward), params, rest, x)

    @jax.jit
    def step(params: Any, rest: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, pullback, stats = jax.vjp(lambda p, x: forward(p, rest, x), params, x, has_aux=True)
        return y, pullback(dy), stats

    return partial(step, params, rest, x, dy)
