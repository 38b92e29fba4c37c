"""What reads the output of a layer, in graphs of four layers and norms without a model around them.

test_folding.py has some of the graphs for models, and tries what they compute.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bcn_flax.surgery import flow

# Layers `a` and `b`, norms `m` and `n`. Ensembles of 4 have the size of the other axes, so that no
# axis is told by its length.
SIZE = 4
STORED = {
    **{name: {"kernel": jnp.eye(SIZE), "bias": jnp.ones(SIZE)} for name in "ab"},
    **{name: {"mean": jnp.ones(SIZE), "var": jnp.ones(SIZE)} for name in "mn"},
}
STACKED = jax.tree.map(lambda value: jnp.stack([value] * SIZE), STORED)
X = jnp.ones((SIZE, SIZE))


class Model:
    """The layers and norms as functions, with the marks of a trace."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored
        self.a, self.b = (partial(self.layer, name) for name in "ab")
        self.m, self.n = (partial(self.norm, name) for name in "mn")

    def layer(self, name: str, x: Any, stored: Any = None) -> Any:
        weights = flow.weights(self.stored[name] if stored is None else stored)
        return flow.layer_output(name, x @ weights["kernel"] + weights["bias"].sum(), weights)

    def norm(self, name: str, x: Any, foldable: bool = True) -> Any:
        weights = flow.weights(self.stored[name])
        x = flow.norm_input(name, x, weights, foldable)
        return (x - weights["mean"].sum()) / weights["var"].sum()


class Row(NamedTuple):
    """A graph, and what is found in it.

    Attributes:
        call: returns the output of a model for an input; what `set_state` is given is its state.
        readers: the norms that alone read the output of a layer, as "an" for `n` after `a`.
        layers: those whose weights are their own.
        stored: the weights.
    """

    call: Callable[[Any, Any], Any]
    readers: str = ""
    layers: str = "a"
    stored: Any = STORED

    def check(self) -> None:
        def run(stored: Any) -> tuple[Any, Any]:
            model: Any = Model(stored)
            model.state = stored
            return self.call(model, X), model.state

        found = flow.trace(run, self.stored, self.stored.__getitem__)
        readers = {layer + norm.path for layer, norm in found.sole_readers().items()}
        assert readers == set(self.readers.split()), readers
        layers = found.foldable_layers()
        assert set(layers) == set(self.layers), layers
        assert {call.stacked for call in layers.values()} <= {self.stored["a"]["kernel"].ndim - 2}


def through(call):
    """The output of `a` goes through a nested call, and then to its norm."""
    return Row(lambda m, x: m.n(call(lambda y, x: y, m.a(x), x)), "an")


def unread(call):
    """A nested call is given the output of `a`, and does not read it."""
    return Row(lambda m, x: (lambda y: m.n(y) + call(lambda y, x: 2 * x, y, x))(m.a(x)), "an")


def read(call):
    """A nested call reads the output of `a`."""
    return Row(lambda m, x: (lambda y: m.n(y) + call(lambda y, x: y + x, y, x))(m.a(x)))


def within(call, readers=""):
    """Layer and norm are in the nested call."""
    return Row(lambda m, x: call(lambda x, _: m.n(m.a(x)), x, x), readers, "a" if readers else "")


def custom_jvp(f, *args):
    function = jax.custom_jvp(f)
    function.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return function(*args)


def custom_vjp(f, *args):
    function = jax.custom_vjp(f)
    function.defvjp(lambda *args: (f(*args), None), lambda _, cotangent: (cotangent, cotangent))
    return function(*args)


CALLS = {
    "jit": lambda f, *args: jax.jit(f)(*args),
    "remat": lambda f, *args: jax.checkpoint(f)(*args),
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "remat of jit": lambda f, *args: jax.checkpoint(jax.jit(f))(*args),
}
BODIES = {
    "scan": lambda f, y, x: lax.scan(lambda c, _: (f(c, x), None), y, None, length=2)[0],
    "cond": lambda f, y, x: lax.cond(x.sum() > 9, f, lambda y, x: 3 * x, y, x),
    "while": lambda f, y, x: lax.while_loop(lambda c: c.sum() < 9, lambda c: f(c, x), y),
}


def in_vmap(f, *args, axes=0):
    return jax.vmap(f, in_axes=axes)(*args)


def mapped(call, axes, names="abmn"):
    """`call(model, x)` for each part of these weights; `axes` are those of weights and input."""

    def each(m, *args):
        inner = {name: m.stored[name] for name in names}

        def one(inner, *args):
            return call(Model({**m.stored, **inner}), *args)

        return jax.vmap(one, in_axes=axes)(inner, *args)

    return each


def two_ensembles(axis):
    """Layers and norms are in two ensembles; the second maps its input along `axis`."""
    return Row(
        lambda m, x: mapped(lambda m, y: m.n(y), (0, axis))(
            m, mapped(lambda m, x: m.a(x), (0, None))(m, x)
        ),
        "an" if axis == 0 else "",
        "a",
        STACKED,
    )


def set_state(m, state, output):
    m.state = state
    return output


def changed(m, x):
    kernel = 2 * m.stored["a"]["kernel"]
    return m.n(m.layer("a", x, m.stored["a"] | {"kernel": kernel}))


DATA_FLOW: dict[str, Row] = {
    "one reader": Row(lambda m, x: m.n(m.a(x)), "an"),
    "a row": Row(lambda m, x: m.m(m.b(m.n(m.a(x)))), "an bm", "ab"),
    "two norms": Row(lambda m, x: (lambda y: m.n(y) + m.m(y))(m.a(x))),
    "one norm, twice": Row(lambda m, x: (lambda y: m.n(y) + m.n(y))(m.a(x))),
    "a layer twice": Row(lambda m, x: m.n(m.a(m.a(x)))),
    "a norm of two layers": Row(lambda m, x: m.n(m.a(x)) + m.n(m.b(x)), "", "ab"),
    "a norm twice": Row(lambda m, x: m.n(m.n(m.a(x)))),
    "a norm twice, once unlike": Row(lambda m, x: m.norm("n", m.n(m.a(x)), False)),
    "a norm that does not fold": Row(lambda m, x: m.norm("n", m.a(x), False)),
    "a layer of a layer": Row(lambda m, x: m.n(m.b(m.a(x))), "bn", "ab"),
    "something between": Row(lambda m, x: m.n(1 * m.a(x))),
    "an output": Row(lambda m, x: (lambda y: (m.n(y), y))(m.a(x))),
    "an output in an object": Row(
        lambda m, x: (lambda y: SimpleNamespace(n=m.n(y), y=[y]))(m.a(x))
    ),
    "other outputs": Row(lambda m, x: [None, "text", m.n(m.a(x)), SimpleNamespace(x=x)], "an"),
    "state": Row(lambda m, x: (lambda y: set_state(m, {"y": y}, m.n(y)))(m.a(x))),
    "a result that is not used": Row(lambda m, x: (lambda y: (m.n(y), y + 1)[0])(m.a(x))),
    "a derivative": Row(lambda m, x: jax.grad(lambda x: m.n(m.a(x)).sum())(x)),
    "a derivative elsewhere": Row(
        lambda m, x: (lambda y, dy: m.n(y) + dy)(*jax.jvp(m.a, (x,), (x,)))
    ),
    "a derivative by weights": Row(
        lambda m, x: jax.grad(lambda s: Model(s).n(Model(s).a(x)).sum())(m.stored)["n"]["mean"],
        layers="",
    ),
    "a weight that is read": Row(lambda m, x: m.n(m.a(x)) @ m.stored["a"]["kernel"], layers=""),
    "a weight that is returned": Row(lambda m, x: (m.n(m.a(x)), m.stored["a"]["bias"]), layers=""),
    "a statistic that is read": Row(lambda m, x: m.n(m.a(x)) + m.stored["n"]["mean"].sum()),
    "a weight that is changed": Row(changed, layers=""),
    "weights of another": Row(lambda m, x: m.n(m.layer("a", x, m.stored["b"])), layers=""),
    "weights that another uses": Row(
        lambda m, x: m.n(m.b(x)) + m.layer("a", x, m.stored["b"]), layers=""
    ),
    "vmap": Row(lambda m, x: in_vmap(lambda x: m.n(m.a(x)), x), "an"),
    "vmap of the layer": Row(lambda m, x: m.n(in_vmap(m.a, x))),
    "vmap in two": Row(lambda m, x: in_vmap(m.n, in_vmap(m.a, x)), "an"),
    "vmap in two, along other axes": Row(lambda m, x: in_vmap(m.n, in_vmap(m.a, x), axes=1)),
    "an ensemble": Row(mapped(lambda m, x: m.n(m.a(x)), (0, None)), "an", "a", STACKED),
    "an ensemble, jit": Row(
        mapped(jax.jit(lambda m, x: m.n(m.a(x)), static_argnums=0), (0, 0)), "an", "a", STACKED
    ),
    "an ensemble of layers": Row(
        lambda m, x: m.n(mapped(lambda m, x: m.a(x), (0, None), "a")(m, x)),
        "",
        "a",
        {**STORED, "a": STACKED["a"]},
    ),
    "two ensembles": two_ensembles(0),
    "two ensembles, along other axes": two_ensembles(1),
    "an ensemble along axis 1": Row(
        mapped(lambda m, x: m.n(m.a(x)), (1, None)), layers="", stored=STACKED
    ),
    **{f"through {name}": through(call) for name, call in CALLS.items()},
    **{f"unread in {name}": unread(call) for name, call in CALLS.items()},
    **{f"read in {name}": read(call) for name, call in (CALLS | BODIES).items()},
    **{f"through {name}": through(call)._replace(readers="") for name, call in BODIES.items()},
    **{f"within {name}": within(call, "an") for name, call in CALLS.items()},
    **{f"within {name}": within(call) for name, call in BODIES.items()},
}
