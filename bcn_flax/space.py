"""Numbers laid out along the space of an activation, and sums over it, as each platform wants them.

`spread` and `sums` are linear, and each is the transpose of the other. They are primitives because
compilers must be kept from writing arrays of the size of the activation to memory, and each
platform needs another means for that. The platform is the one that the program is lowered for.

- For a CPU the compiler computes the small numbers again for each value of the activation that they
  meet, unless it considers an operation expensive, such as a division. So each small number is
  divided by a 1 that the compiler cannot see.
- A GPU writes what two kernels share, such as `x - origin` in float32. So each use has a copy of
  the origin, behind an `optimization_barrier`. And it takes the sums that the backward pass needs
  in one kernel only if they are one reduction of several arrays.
- A TPU needs nothing: it takes all sums of one array in one pass.

On a mesh with explicit axes, where JAX asks how each result is to lie, both give what lies as `x`
or `origin` do; `placed_like` serves the numbers of which that cannot be told.
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


def spread(
    values: Sequence[Float[Array, "n c"]],
    x: Float[Array, "n *space c"],
    origin: Float[Array, "n c"],
    axis: int,
    copy: int = 0,
) -> list[Float[Array, "n *space c"]]:
    """Lay small numbers out: each as an array of the shape of `x` and the type of `origin`.

    Args:
        values: as `origin`.
        x: an activation, of which the shape and the place on devices count.
        origin: likewise, and its type.
        axis: the channel axis of `x`.
        copy: numbers laid out by calls with different ones are never merged by the compiler.
    """
    return _bind(spread_p, [*values, x, origin], (0, axis % x.ndim), copy)


def sums(
    values: Float[Array, "n *space c"],
    x: Float[Array, "n *space c"],
    origin: Float[Array, "n c"],
    axis: int,
) -> Float[Array, "n c"]:
    """Sum over all axes of `x` but those of samples and channels; arguments as of `spread`."""
    (total,) = _bind(sums_p, [values, x, origin], (0, axis % x.ndim))
    return total


def once(*constants: Float[Array, "*shape"]) -> list[Float[Array, "*shape"]]:
    """Numbers of one shape, without derivative, computed once for all who use them."""
    fixed = [lax.stop_gradient(v) for v in constants]
    return _bind(spread_p, [*fixed, fixed[0], fixed[0]], tuple(range(fixed[0].ndim)))


def _bind(
    primitive: Primitive, arrays: Sequence[Array], kept: tuple[int, ...], copy: int = 0
) -> list[Array]:
    """Apply a primitive. Inside of `shard_map` all arrays become numbers of each device.

    Where one of them differs between devices, the result does, and the gradients of those that are
    the same on all devices add up over these.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    axes = frozenset[str]().union(*varying)
    alike = [
        lax.pcast(a, tuple(axes - own), to="varying") if axes - own else a
        for a, own in zip(arrays, varying, strict=True)
    ]
    results: list[Array] = primitive.bind(*alike, kept=kept, copy=copy)
    return results


def explicit_sharding(values: Array) -> NamedSharding | None:
    """How an array lies on a mesh with explicit axes, if on any."""
    sharding = jax.typeof(values).sharding
    return sharding if any(axis is not None for axis in sharding.spec) else None


def placed_like(values: Array, like: Array) -> Array:
    """`values`, laid out as `like` over a mesh's explicit axes; unchanged without such axes."""
    sharding = explicit_sharding(like)
    return values if sharding is None else jax.sharding.reshard(values, sharding)


Lowering = Callable[..., Sequence[Array]]


def _divided(values: Sequence[Array], origin: Array, copy: int) -> list[Array]:
    # 1 for NaN too. The number makes the 1 of each copy another computation.
    one = ((origin == origin) | (origin != copy)).astype(origin.dtype)
    return [v / one for v in values]


def _behind_barrier(values: Sequence[Array], origin: Array, copy: int) -> Sequence[Array]:
    *behind, _ = lax.optimization_barrier((*values, jnp.asarray(copy)))
    return behind


def _spread(keep_apart: Callable[..., Sequence[Array]] | None = None) -> Lowering:
    def spread(*args: Array, kept: tuple[int, ...], copy: int) -> list[Array]:
        *values, x, origin = args
        apart = keep_apart(values, origin, copy) if keep_apart else values
        return [lax.broadcast_in_dim(v, x.shape, kept) for v in apart]

    return spread


def _each_sum(values: Sequence[Array], axes: Sequence[int]) -> list[Array]:
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


def _linear(name: str, shape_of: Callable[..., Any], lowerings: dict[str | None, Lowering]) -> Any:
    """A primitive, linear in all its arguments but the last two, which say what the results are.

    On a CPU the values of the last one serve too: see `_divided`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    compiled = jax.jit(primitive.bind, static_argnames=("kept", "copy"))

    def run(*args: Array, **params: Any) -> Any:
        with jax.disable_jit(False):  # it has no other way to run
            return compiled(*args, **params)

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda *args, **_: [shape_of(*args[-2:])] * (len(args) - 2))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
        dots = map(ad.instantiate_zeros, tangents[:-2])
        bind = partial(primitive.bind, **params)
        return bind(*primals), bind(*dots, *primals[-2:])

    def batch(args: Sequence[Any], dims: Sequence[Any], *, kept: Any, copy: int) -> Any:
        size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
        front = [batching.bdim_at_front(a, d, size) for a, d in zip(args, dims, strict=True)]
        out = primitive.bind(*front, kept=(0, *(k + 1 for k in kept)), copy=copy)
        return out, [0] * len(out)

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    for platform, lowering in lowerings.items():
        rule = mlir.lower_fun(lowering, multiple_results=True)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _transpose(primitive: Primitive, transposed: Primitive) -> None:
    def rule(cotangents: Sequence[Any], *args: Any, **params: Any) -> Any:
        result: list[Any] = [None] * len(args)
        asked = [
            i
            for i, cotangent in enumerate(cotangents)
            if ad.is_undefined_primal(args[i]) and type(cotangent) is not ad.Zero
        ]
        if asked:
            found = transposed.bind(*(cotangents[i] for i in asked), *args[-2:], **params)
            for i, cotangent in zip(asked, found, strict=True):
                result[i] = cotangent
        return result

    ad.primitive_transposes[primitive] = rule


spread_p = _linear(
    "spread_over_space",
    lambda x, origin: x.update(dtype=origin.dtype, weak_type=False),
    {None: _spread(), "cpu": _spread(_divided), "gpu": _spread(_behind_barrier)},
)
sums_p = _linear(
    "sum_over_space",
    lambda x, origin: origin,
    {
        None: _sums(_each_sum),
        "cpu": _sums(_each_sum, _divided),
        "gpu": _sums(_one_reduction, _behind_barrier),
    },
)
_transpose(spread_p, sums_p)
_transpose(sums_p, spread_p)
