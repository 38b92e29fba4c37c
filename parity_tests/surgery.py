"""Checks of surgery on Flax models: what reads the output of a layer, and what folding computes.

`SURGERY` has them all by name. The models here fold in part; their outputs stay as they are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.traverse_util import flatten_dict

import bcn_flax
import bcn_flax.nnx
from bcn_flax.surgery import linen
from bcn_flax.surgery import nnx as nnx_surgery
from bcn_flax.variants import WS
from parity_tests.data_flow import DATA_FLOW
from parity_tests.draws import random_variables
from parity_tests.tolerances import assert_close

SIZE = 4
IMAGES = jnp.asarray(np.random.default_rng(0).normal(1, 2, (2, 5, 5, SIZE)), jnp.float32)
WINDOW = (SIZE, (3, 3))
BCN = partial(bcn_flax.BatchChannelNorm, True, num_groups=2)


def model_of(call, **options):
    """A linen model of one compact method."""

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return call(self, x)

    return Compact(**options)


@nn.jit
class Compiled(nn.Module):
    """Compiled once for all instances, unless their variables differ."""

    @nn.compact
    def __call__(self, x):
        return bcn_flax.WSConv(*WINDOW)(x)


class Activated(bcn_flax.BatchNorm):
    """Its code would be lost."""

    def __call__(self, x):
        return nn.relu(super().__call__(x))


class Member(nn.Module):
    @nn.compact
    def __call__(self, x):
        return BCN()(bcn_flax.WSConv(*WINDOW, use_bias=False)(x))


def ensemble(axis, member=Member, statistics=0):
    return nn.vmap(
        member,
        variable_axes={"params": axis, "batch_stats": statistics},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )


def with_plain(call):
    """The output of `call`, after a layer that folds by itself."""
    return lambda m, x: call(m, bcn_flax.WSConv(*WINDOW, name="first")(x))


def tied(m, x):
    dense = nn.Dense(SIZE)
    return bcn_flax.BatchNorm(True)(dense(x)) @ dense.variables["params"]["kernel"]


def sown(m, x):
    y = nn.Conv(*WINDOW)(x)
    m.sow("intermediates", "y", y)
    return bcn_flax.BatchNorm(True)(y)


def borrowed(m, x):
    """A layer of the same path, in a model that is applied to other weights."""
    y = nn.Conv(*WINDOW, name="conv")(x)
    other = jax.tree.map(jnp.ones_like, m.variables["params"]["conv"])
    inner = model_of(lambda m, x: nn.Conv(*WINDOW, name="conv")(x))
    return nn.BatchNorm(True)(y) + inner.apply({"params": {"conv": other}}, x)


def applied(m, x):
    """A layer with the weights of another."""
    y = nn.BatchNorm(True)(nn.Conv(*WINDOW, name="conv")(x))
    return y + nn.Conv(*WINDOW).apply({"params": m.variables["params"]["conv"]}, x)


class Linen(NamedTuple):
    """A linen model, and what folds: the output stays as it is.

    Attributes:
        call: of the model, compact.
        folded: how many layers, and how many norms.
        options: of the call.
        dtype: of the variables.
    """

    call: Callable[[Any, Any], Any]
    folded: tuple[int, int]
    options: Mapping[str, Any] = MappingProxyType({})
    dtype: Any = jnp.float32

    def check(self) -> None:
        model: Any = model_of(self.call)
        variables = random_variables(model, IMAGES, np.random.default_rng(1))
        variables.pop("intermediates", None)
        variables = jax.tree.map(lambda value: value.astype(self.dtype), variables)
        x = IMAGES.astype(self.dtype)
        folded = linen.fold(model, variables, x, **self.options)
        assert (len(folded.convolutions), len(folded.norms)) == self.folded, folded
        params = flatten_dict(folded.variables["params"])
        names = {path[-1] for path in params if path[:-1] in folded.convolutions}
        assert names <= {"kernel", "bias"}, "a gain is a part of the kernel now"
        expected = model.apply(variables, x, **self.options)
        actual = folded.apply(folded.variables, x, **self.options)
        if self.options:
            expected, actual = ((y, state.get("intermediates")) for y, state in (expected, actual))
        for e, a in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            assert a.dtype == e.dtype, (a.dtype, e.dtype)
            assert_close(a, e, ulps=1024, dtype=e.dtype)


LINEN = {
    "a gain": Linen(
        lambda m, x: BCN()(bcn_flax.WSConv(*WINDOW, standardization=WS["nfnet"])(x)), (1, 1)
    ),
    "transposed": Linen(
        lambda m, x: BCN()(bcn_flax.WSConvTranspose(*WINDOW, transpose_kernel=True)(x)), (1, 1)
    ),
    "two epsilons": Linen(
        lambda m, x: BCN(epsilon=0.1, batch_epsilon=0.5)(nn.Conv(*WINDOW)(x)), (1, 1)
    ),
    "the type of the norm": Linen(
        lambda m, x: bcn_flax.BatchNorm(True, dtype=jnp.bfloat16)(nn.Conv(*WINDOW)(x)), (1, 1)
    ),
    "arguments": Linen(
        lambda m, x: BCN(use_bias=False)(
            bcn_flax.WSConv(*WINDOW, strides=2, padding="VALID", kernel_dilation=2)(x)
        ),
        (1, 1),
    ),
    "compiled, twice": Linen(lambda m, x: Compiled()(Compiled()(x)), (2, 0)),
    "an ensemble": Linen(lambda m, x: ensemble(0)()(x), (1, 1)),
    "an ensemble of ensembles": Linen(lambda m, x: ensemble(0, ensemble(0))()(x), (1, 1)),
    "an ensemble with common statistics": Linen(
        lambda m, x: ensemble(0, statistics=None)()(x), (1, 0)
    ),
    "an ensemble along axis 1": Linen(
        with_plain(lambda m, x: ensemble(1, statistics=1)()(x)), (1, 0)
    ),
    "weight norm": Linen(
        with_plain(lambda m, x: nn.BatchNorm(True)(nn.WeightNorm(nn.Conv(*WINDOW))(x))), (1, 0)
    ),
    "a tied kernel": Linen(with_plain(tied), (1, 0)),
    "a layer with scales for float8": Linen(
        with_plain(
            lambda m, x: nn.BatchNorm(True)(nn.Dense(SIZE, dot_general_cls=nn.Fp8DotGeneral)(x))
        ),
        (1, 0),
    ),
    "a subclass": Linen(with_plain(lambda m, x: Activated(True)(nn.Conv(*WINDOW)(x))), (1, 0)),
    "sown": Linen(with_plain(sown), (1, 0), {"mutable": ["intermediates"]}),
    "sown to nobody": Linen(with_plain(sown), (2, 1)),
    "captured": Linen(with_plain(sown), (1, 0), {"capture_intermediates": True}),
    "mutable statistics": Linen(with_plain(sown), (2, 1), {"mutable": ["batch_stats"]}),
    "a layer of the same path": Linen(with_plain(borrowed), (1, 0)),
    "weights of another layer": Linen(with_plain(applied), (1, 0)),
    "narrow variables": Linen(
        lambda m, x: nn.BatchNorm(True)(nn.Conv(*WINDOW)(x)), (1, 1), dtype=jnp.bfloat16
    ),
}


class Network(nnx.Module):
    """A convolution, a norm, dropout, and a layer that folds by itself."""

    def __init__(self, call: Any, conv: Any = nnx.Conv, norm: Any = nnx.BatchNorm) -> None:
        rngs = nnx.Rngs(0)
        self.call = call
        self.first = bcn_flax.nnx.WSConv(SIZE, *WINDOW, rngs=rngs)
        self.conv, self.norm = conv(SIZE, *WINDOW, rngs=rngs), norm(SIZE, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Variable(jnp.zeros((2, 5, 5, SIZE)))

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.call(self, self.first(x)))


class NormalizedKernel(nnx.Module):
    """A convolution in `nnx.WeightNorm`."""

    def __init__(self, *args: Any, rngs: nnx.Rngs) -> None:
        self.conv = nnx.WeightNorm(nnx.Conv(*args, rngs=rngs), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.conv(x)


def kept(m, y):
    """The value, and the model keeps it."""
    m.seen[...] = y
    return y


def in_transforms(m, x):
    y = nnx.remat(nnx.jit(lambda m, x: m.conv(x)))(m, x)
    return nnx.jit(lambda m, y: m.norm(y))(m, y)


def stacked(make):
    """A constructor of three layers that are stored as one."""

    def constructor(*args, rngs):
        return nnx.vmap(lambda key: make(*args, rngs=nnx.Rngs(key)))(jax.random.split(rngs(), 3))

    return constructor


def of_ensemble(m, x):
    return nnx.vmap(lambda conv, norm, x: norm(conv(x)), in_axes=(0, 0, None))(m.conv, m.norm, x)


def modes(model):
    names = ("deterministic", "use_running_average")
    return [getattr(m, n) for _, m in nnx.iter_modules(model) for n in names if hasattr(m, n)]


class NNX(NamedTuple):
    """An NNX model, and whether its norm folds into its convolution: the output stays as it is.

    Attributes:
        call: of the model, after its first layer, which folds in any case.
        folds: whether the norm does.
        layers: the classes of the convolution and the norm.
    """

    call: Callable[[Any, Any], Any]
    folds: bool = True
    layers: Mapping[str, Any] = MappingProxyType({})

    def check(self) -> None:
        model = Network(self.call, **self.layers)
        rng = np.random.default_rng(1)
        state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
        draw = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), state)
        nnx.update(model, draw)
        before = nnx.split(model)
        folded = nnx_surgery.fold(model, IMAGES)
        assert nnx.split(model)[0] == before[0]
        assert False in modes(model), "the model trains, as before"
        assert False not in modes(folded), "the folded model evaluates"
        assert type(folded.first) is nnx.Conv
        kinds = (nnx.BatchNorm, bcn_flax.nnx.BatchNorm, bcn_flax.nnx.BatchChannelNorm)
        assert isinstance(folded.norm, kinds) != self.folds, type(folded.norm)
        model.eval()
        expected, actual = model(IMAGES), folded(IMAGES)
        assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
        half = "conv" in self.layers and self.layers["conv"] is HALF
        ulps, dtype = (16, jnp.bfloat16) if half else (256, jnp.float32)
        assert_close(actual, expected, ulps=ulps, dtype=dtype)
        assert_close(folded.seen[...], model.seen[...], ulps=1024, dtype=jnp.float32)


BCN_IN_NNX = partial(bcn_flax.nnx.BatchChannelNorm, num_groups=2, batch_epsilon=0.5)
HALF = partial(nnx.Conv, dtype=jnp.bfloat16)
IN_NNX = {
    "a row": NNX(lambda m, x: m.norm(m.conv(x))),
    "a flag": NNX(lambda m, x: m.norm(m.conv(x), use_running_average=True)),
    "a flag of BCN": NNX(lambda m, x: m.norm(m.conv(x), True), layers={"norm": BCN_IN_NNX}),
    "in transforms": NNX(in_transforms),
    "an ensemble": NNX(
        of_ensemble, layers={"conv": stacked(nnx.Conv), "norm": stacked(BCN_IN_NNX)}
    ),
    "an output that is kept": NNX(lambda m, x: m.norm(kept(m, m.conv(x))), False),
    "another value that is kept": NNX(lambda m, x: kept(m, m.norm(m.conv(x)))),
    "a tied kernel": NNX(lambda m, x: m.norm(m.conv(x)) * m.conv.kernel[...].sum(), False),
    "weight norm": NNX(lambda m, x: m.norm(m.conv(x)), False, {"conv": NormalizedKernel}),
    "its own promotion": NNX(
        lambda m, x: m.norm(m.conv(x)),
        False,
        {
            "norm": partial(
                nnx.BatchNorm, promote_dtype=lambda *args, **kwargs: promote_dtype(*args, **kwargs)
            )
        },
    ),
    "bfloat16": NNX(
        lambda m, x: m.norm(m.conv(x)),
        layers={
            "conv": HALF,
            "norm": partial(bcn_flax.nnx.BatchNorm, use_scale=False, use_bias=False),
        },
    ),
    "bfloat16, a bias alone": NNX(
        lambda m, x: m.norm(m.conv(x)),
        layers={"conv": HALF, "norm": partial(bcn_flax.nnx.BatchNorm, use_scale=False)},
    ),
    "bfloat16, Flax's norm": NNX(
        lambda m, x: m.norm(m.conv(x)),
        layers={"norm": partial(nnx.BatchNorm, use_scale=False, use_bias=False), "conv": HALF},
    ),
}


SURGERY: dict[str, Callable[[], object]] = {
    **{f"data flow: {name}": row.check for name, row in DATA_FLOW.items()},
    **{f"fold linen: {name}": model.check for name, model in LINEN.items()},
    **{f"fold NNX: {name}": model.check for name, model in IN_NNX.items()},
}
