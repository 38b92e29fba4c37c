"""Which norm alone reads the output of which layer, from the jaxpr of a model.

While a model is traced, primitives that compute the identity mark the weights of its layers and
norms, the outputs of its layers and the inputs of its norms. The jaxpr then shows what reads them.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import Array
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive
from jax.interpreters import ad, batching

Path = TypeVar("Path", bound=Hashable)

# Primitives that run one jaxpr once, whose inputs and outputs are their own.
_CALLS = {"jit", "remat2", "custom_jvp_call", "custom_vjp_call"}


class Level(NamedTuple):
    """One `vmap` around a call.

    Attributes:
        axis: along which the layer's output, or the norm's input, is mapped; None if it is not.
        stacked: whether the weights are mapped, along their axis 0.
    """

    axis: int | None
    stacked: bool


@dataclasses.dataclass(eq=False)
class Call(Generic[Path]):
    """A call of a layer or of a norm.

    Attributes:
        path: of the module.
        weights: which of the stored arrays it uses, by name; None if they are not all its own, such
            as a slice in a scan, or a normalized kernel.
        levels: the `vmap`s around it.
        foldable: false if the module is called in a way that a folded one could not be.
        readers: what reads the output of a layer: calls of norms, and None for anything else.
    """

    path: Path
    weights: dict[str, int] | None
    levels: tuple[Level, ...]
    foldable: bool
    readers: "list[Call[Path] | None]" = dataclasses.field(default_factory=list)

    @property
    def stacked(self) -> int:
        """How many leading axes of the weights are those of ensembles."""
        return sum(level.stacked for level in self.levels)


def weights(values: Mapping[str, Array]) -> dict[str, Array]:
    """Mark the weights of a layer or norm, for it to use in place of the stored ones."""
    return {name: _weight.bind(value, **_NO_LEVELS) for name, value in values.items()}


def layer_output(path: Path, y: Array, weights: Mapping[str, Array]) -> Array:
    """Mark the output of a layer that has used these marked weights."""
    return _bind(_layer_output, path, y, weights, True)


def norm_input(path: Path, x: Array, weights: Mapping[str, Array], foldable: bool) -> Array:
    """Mark the input of a norm that is to use these marked weights."""
    return _bind(_norm_input, path, x, weights, foldable)


def trace(
    run: Callable[[Any], tuple[Any, Any]], stored: Any, own: Callable[[Any], Mapping[str, Any]]
) -> "Flow[Any]":
    """The calls of layers and norms in a model, which is traced, not run.

    Args:
        run: calls the model with the weights of `stored`; returns its outputs and its new state.
        stored: the weights, a pytree of arrays.
        own: returns the weights of the module at a path, arrays of `stored`, by name.
    """
    outputs: list[Any] = []

    def forward(stored: Any) -> list[Any]:
        returned, state = run(stored)
        outputs.extend(_arrays(returned))
        return [*outputs, *_arrays(state)]

    jaxpr = jax.make_jaxpr(forward)(stored)
    flow: Flow[Any] = Flow(jax.tree.leaves(stored), own)
    sources = flow.follow(jaxpr.jaxpr, [_Weight(i) for i in range(len(flow.stored))])
    for i, source in enumerate(sources):
        # To return a stored weight as a part of the state is not to read it.
        if i < len(outputs) or isinstance(source, Call):
            flow.read(source)
    return flow


class _Weight(NamedTuple):
    """A weight by its number, and whether a layer or norm has marked it as its own."""

    number: int
    marked: bool = False


class Flow(Generic[Path]):
    """The calls of layers and norms, and what reads the outputs and weights of layers."""

    def __init__(self, stored: Sequence[Any], own: Callable[[Path], Mapping[str, Any]]) -> None:
        """Start with no calls, see `trace`."""
        self.stored = stored
        self._own = own
        self.layers: list[Call[Path]] = []
        self.norms: list[Call[Path]] = []
        self._read_elsewhere: set[int] = set()

    def weights(self, call: Call[Path]) -> dict[str, Any]:
        """The arrays that a foldable call uses, by name."""
        return {name: self.stored[i] for name, i in (call.weights or {}).items()}

    def pairs(self) -> list[tuple[Path, Path]]:
        """Each foldable call of a norm on the very output of a layer, as (layer, norm)."""
        return [
            (layer.path, norm.path)
            for layer in self.layers
            for norm in layer.readers
            if norm is not None and norm.foldable
        ]

    def foldable_layers(self) -> dict[Path, Call[Path]]:
        """A call of each layer whose weights are used by that layer alone, and as they are."""
        others = {call.path for call in self.layers if not self._is_foldable(call)}
        return {call.path: call for call in self.layers if call.path not in others}

    def sole_readers(self) -> dict[Path, Call[Path]]:
        """The norm after each layer, if nothing but that norm reads the layer's output."""
        count = Counter(call.path for call in (*self.layers, *self.norms))
        return {
            layer.path: norm
            for layer in self.layers
            for norm in layer.readers
            if len(layer.readers) == 1
            and norm is not None
            and count[layer.path] == count[norm.path] == 1
            and layer.levels == norm.levels
            and self._is_foldable(layer)
            and self._is_foldable(norm)
        }

    def _is_foldable(self, call: Call[Path]) -> bool:
        return (
            call.foldable
            and call.weights is not None
            and self._read_elsewhere.isdisjoint(call.weights.values())
        )

    def follow(self, jaxpr: Jaxpr, given: Iterable[Any]) -> list[Any]:
        """Read a jaxpr: the sources of its outputs, from those of its inputs.

        A source is a call of a layer, a weight, or None for anything else.
        """
        sources: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=False))

        def source(variable: Any) -> Any:
            return None if isinstance(variable, Literal) else sources.get(variable)

        for eqn in jaxpr.eqns:
            results = self._results(eqn, [source(variable) for variable in eqn.invars])
            sources.update(zip(eqn.outvars, results, strict=False))
        return [source(variable) for variable in jaxpr.outvars]

    def _results(self, eqn: JaxprEqn, operands: list[Any]) -> list[Any]:
        """The sources of an equation's results, if it has any."""
        if eqn.primitive is _weight and isinstance(operands[0], _Weight):
            return [operands[0]._replace(marked=True)]
        if eqn.primitive is _layer_output:
            self.read(operands[0])
            self.layers.append(self._call(eqn, operands[1:]))
            return [self.layers[-1]]
        if eqn.primitive is _norm_input:
            self.norms.append(self._call(eqn, operands[1:]))
            self.read(operands[0], self.norms[-1])
            return []
        jaxprs = list(_jaxprs(eqn.params))
        if eqn.primitive.name in _CALLS and len(jaxprs) == 1:
            return self.follow(jaxprs[0], operands)
        for operand in operands:
            self.read(operand)
        for jaxpr in jaxprs:
            for source in self.follow(jaxpr, []):
                self.read(source)
        return []

    def _call(self, eqn: JaxprEqn, weights: list[Any]) -> Call[Path]:
        path, names, levels, foldable = (
            eqn.params[name] for name in ("path", "names", "levels", "foldable")
        )
        numbers = {
            name: weight.number
            for name, weight in zip(names, weights, strict=True)
            if isinstance(weight, _Weight)
        }
        own = self._own(path)
        if all(name in numbers and self.stored[numbers[name]] is own.get(name) for name in names):
            return Call(path, numbers, levels, foldable)
        self._read_elsewhere.update(numbers.values())
        return Call(path, None, levels, foldable)

    def read(self, source: Any, reader: Call[Path] | None = None) -> None:
        """Take note that `reader` reads what comes from `source`."""
        if isinstance(source, Call):
            source.readers.append(reader)
        elif isinstance(source, _Weight) and not source.marked:
            self._read_elsewhere.add(source.number)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if isinstance(jaxpr, Jaxpr):
                yield jaxpr


def _arrays(tree: Any) -> list[Any]:
    """The arrays in `tree`, also in the attributes of objects that are no pytrees."""
    arrays: list[Any] = []
    objects: dict[int, Any] = {}

    def collect(tree: Any) -> None:
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, Array):
                arrays.append(leaf)
            elif hasattr(leaf, "__dict__") and id(leaf) not in objects:
                objects[id(leaf)] = leaf
                collect(dict(vars(leaf)))

    collect(tree)
    return arrays


_NO_LEVELS: dict[str, Any] = {"levels": (), "foldable": True}


def _bind(
    primitive: Any, path: Hashable, x: Array, weights: Mapping[str, Array], foldable: bool
) -> Any:
    return primitive.bind(
        x, *weights.values(), path=path, names=tuple(weights), levels=(), foldable=foldable
    )


def _identity(name: str) -> Any:
    """A primitive that returns its first argument; the others are weights."""
    primitive = Primitive(name)
    primitive.def_impl(lambda x, *_, **__: x)
    primitive.def_abstract_eval(lambda x, *_, **__: x)

    def batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        axis, *stacks = dims
        level = Level(axis, stacked=0 in stacks)
        foldable = params["foldable"] and len(set(stacks)) <= 1 and set(stacks) <= {0, None}
        params |= {"levels": (*params["levels"], level), "foldable": foldable}
        return primitive.bind(*args, **params), axis

    def jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        # A derivative is marked like the value, and thus counts as another call.
        tangent, *by_weights = tangents
        params["foldable"] &= all(isinstance(dot, ad.Zero) for dot in by_weights)
        if not isinstance(tangent, ad.Zero):
            tangent = primitive.bind(tangent, *primals[1:], **params)
        return primitive.bind(*primals, **params), tangent

    def transpose(cotangent: Any, *args: Any, **params: Any) -> list[Any]:
        if not isinstance(cotangent, ad.Zero):
            cotangent = primitive.bind(cotangent, *args[1:], **params)
        return [cotangent, *[None] * (len(args) - 1)]

    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    return primitive


_weight = _identity("weight")
_layer_output = _identity("layer_output")
_norm_input = _identity("norm_input")
