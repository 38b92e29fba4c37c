"""Broadcasting over the space axes of an activation, and sums over them, for each platform.

`broadcast` and `sums` are linear, and each is the transpose of the other. They are primitives,
because compilers would otherwise write arrays of the size of the activation to memory, and each
platform needs a different measure against that. The platform is the one of the lowering.

- On a CPU the compiler recomputes the small arrays for each value of the activation, unless an
  operation is expensive, such as a division. So each small array is divided by a 1 that the
  compiler does not recognize.
- On a GPU the compiler stores what two kernels share, such as `x - origin` in float32. So each use
  has its own copy of the origin, behind an `optimization_barrier`. The sums of the backward pass
  share one kernel only if they are one reduction of several arrays.
- On a TPU nothing is needed: the compiler takes all sums of an array in one pass.

On a mesh with explicit axes JAX needs the sharding of each result: it is that of `x` or `origin`.
Other small arrays are resharded with `reshard_like`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jaxtyping import Array, Float


def broadcast(
    values: Sequence[Float[Array, "n c"]],
    x: Float[Array, "n *space c"],
    origin: Float[Array, "n c"],
    axis: int,
    copy: int = 0,
) -> list[Float[Array, "n *space c"]]:
    """Broadcast small arrays to the shape and sharding of `x`, in the dtype of `origin`.

    Args:
        values: shaped as `origin`.
        x: an activation, whose values are not used.
        origin: one value for each channel of each sample.
        axis: the channel axis of `x`.
        copy: the compiler never merges calls with different numbers.
    """
    return _bind(broadcast_p, [*values, x, origin], (0, axis % x.ndim), copy)


def sums(
    values: Float[Array, "n *space c"],
    x: Float[Array, "n *space c"],
    origin: Float[Array, "n c"],
    axis: int,
) -> Float[Array, "n c"]:
    """Sum over the space axes of `x`; arguments as in `broadcast`."""
    (total,) = _bind(sums_p, [values, x, origin], (0, axis % x.ndim))
    return total


def compute_once(*constants: Float[Array, "*shape"]) -> list[Float[Array, "*shape"]]:
    """Arrays of one shape, without derivative, each computed once for all its uses."""
    fixed = [lax.stop_gradient(v) for v in constants]
    return _bind(broadcast_p, [*fixed, fixed[0], fixed[0]], tuple(range(fixed[0].ndim)))


def _bind(
    primitive: Primitive, arrays: Sequence[Array], kept: tuple[int, ...], copy: int = 0
) -> list[Array]:
    """Apply a primitive to arrays that vary over the same axes of a `shard_map`.

    If one array differs between devices, so does the result, and the gradients of the arrays that
    are the same on all devices are summed over the devices.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset[str]().union(*varying)
    same_axes = [
        lax.pcast(a, tuple(axes - own), to="varying") if axes - own else a
        for a, own in zip(arrays, varying, strict=True)
    ]
    results: list[Array] = primitive.bind(*same_axes, kept=kept, copy=copy)
    return results


def explicit_sharding(values: Array) -> NamedSharding | None:
    """The sharding of an array on a mesh with explicit axes; None without such axes."""
    sharding = jax.typeof(values).sharding
    return sharding if any(axis is not None for axis in sharding.spec) else None


def reshard_like(values: Array, like: Array) -> Array:
    """`values` with the sharding of `like` on a mesh with explicit axes; else unchanged."""
    sharding = explicit_sharding(like)
    return values if sharding is None else jax.sharding.reshard(values, sharding)


Lowering = Callable[..., Sequence[Array]]


def _divide_by_hidden_one(values: Sequence[Array], origin: Array, copy: int) -> list[Array]:
    # `one` is 1 for NaN too. `copy` makes it a different computation for each copy.
    one = ((origin == origin) | (origin != copy)).astype(origin.dtype)
    return [v / one for v in values]


def _behind_barrier(values: Sequence[Array], origin: Array, copy: int) -> Sequence[Array]:
    *behind, _ = lax.optimization_barrier((*values, jnp.asarray(copy)))
    return behind


def _broadcast(keep_apart: Callable[..., Sequence[Array]] | None = None) -> Lowering:
    def broadcast(*args: Array, kept: tuple[int, ...], copy: int) -> list[Array]:
        *values, x, origin = args
        apart = keep_apart(values, origin, copy) if keep_apart else values
        return [lax.broadcast_in_dim(v, x.shape, kept) for v in apart]

    return broadcast


def _separate_sums(values: Sequence[Array], axes: Sequence[int]) -> list[Array]:
    return [jnp.sum(v, axes) for v in values]


def _one_reduction(values: Sequence[Array], axes: Sequence[int]) -> Sequence[Array]:
    def add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    zeros = [jnp.zeros((), v.dtype) for v in values]
    return lax.reduce(values, zeros, add, axes)


def _sums(
    add_up: Callable[..., Sequence[Array]],
    keep_apart: Callable[..., Sequence[Array]] | None = None,
) -> Lowering:
    def sums(*args: Array, kept: tuple[int, ...], copy: int) -> Sequence[Array]:
        *values, x, origin = args
        totals = add_up(values, tuple(i for i in range(x.ndim) if i not in kept))
        return keep_apart(totals, origin, copy) if keep_apart else totals

    return sums


def _linear_primitive(
    name: str, shape_of: Callable[..., Any], lowerings: dict[str | None, Lowering]
) -> Any:
    """A primitive, linear in all arguments but the last two, which give the type of the results.

    On a CPU the values of the last one are used too: see `_divide_by_hidden_one`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(primitive.bind, static_argnames=("kept", "copy"))

    def run(*args: Array, **params: Any) -> Any:
        with jax.disable_jit(False):  # the primitive runs only compiled
            return compiled(*args, **params)

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda *args, **_: [shape_of(*args[-2:])] * (len(args) - 2))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        dots = map(ad.instantiate_zeros, tangents[:-2])
        bind = partial(primitive.bind, **params)
        return bind(*primals), bind(*dots, *primals[-2:])

    def batch(args: Sequence[Any], dims: Sequence[Any], *, kept: Any, copy: int) -> Any:
        mapped, dim = next((a, d) for a, d in zip(args, dims, strict=True) if d is not None)
        size, mesh_axis = mapped.shape[dim], jax.typeof(mapped).sharding.spec[dim]
        front = [
            batching.bdim_at_front(a, d, size, mesh_axis) for a, d in zip(args, dims, strict=True)
        ]
        out = primitive.bind(*front, kept=(0, *(k + 1 for k in kept)), copy=copy)
        return out, [0] * len(out)

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    for platform, lowering in lowerings.items():
        rule = mlir.lower_fun(lowering, multiple_results=True)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _register_transpose(primitive: Primitive, transposed: Primitive) -> None:
    def rule(cotangents: Sequence[Any], *args: Any, **params: Any) -> Any:
        result: list[Any] = [None] * len(args)
        linear = [
            i
            for i, cotangent in enumerate(cotangents)
            if ad.is_undefined_primal(args[i]) and type(cotangent) is not ad.Zero
        ]
        if linear:
            found = transposed.bind(*(cotangents[i] for i in linear), *args[-2:], **params)
            for i, cotangent in zip(linear, found, strict=True):
                result[i] = cotangent
        return result

    ad.primitive_transposes[primitive] = rule


broadcast_p = _linear_primitive(
    "broadcast_over_space",
    lambda x, origin: x.update(dtype=origin.dtype, weak_type=False),
    {
        None: _broadcast(),
        "cpu": _broadcast(_divide_by_hidden_one),
        "gpu": _broadcast(_behind_barrier),
    },
)
sums_p = _linear_primitive(
    "sum_over_space",
    lambda x, origin: origin,
    {
        None: _sums(_separate_sums),
        "cpu": _sums(_separate_sums, _divide_by_hidden_one),
        "gpu": _sums(_one_reduction, _behind_barrier),
    },
)
_register_transpose(broadcast_p, sums_p)
_register_transpose(sums_p, broadcast_p)
