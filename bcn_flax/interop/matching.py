"""Match the tensors of PyTorch with the leaves of Flax's variables, and convert their values."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from bcn_flax import checks
from bcn_flax.interop import layers, layouts, naming, proposal
from bcn_flax.interop.layers import Flattened, Transposed
from bcn_flax.interop.layouts import path_name, shape
from bcn_flax.interop.naming import Names, Renames, grouped, module_of
from bcn_flax.interop.pairs import Pair
from bcn_flax.interop.rules import RULES, Rule, Rules
from bcn_flax.interop.trees import (
    Leaves,
    Tensors,
    Variables,
    differences,
    flax_convolutions,
    flax_leaves,
    module_order,
    refuse,
    skipped_tensors,
    tied_tensors,
    torch_convolutions,
    torch_tensors,
)


@dataclass(frozen=True)
class Match:
    """Which tensor of PyTorch is which leaf of Flax's variables; printed, a report.

    Attributes:
        pairs: every leaf of Flax's variables, with its tensor.
        tied: tensors that share memory with another one: its key, by their keys.
        skipped: tensors that have no counterpart in Flax: why nothing is lost, by their keys.
        tensors: PyTorch's side as it was matched.
        notes: what was assumed, or is unlikely.
    """

    pairs: tuple[Pair, ...]
    tied: Mapping[str, str]
    skipped: Mapping[str, str]
    tensors: Tensors = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_flax(
        self, source: Any, *, partial: bool = False, gradients: bool | None = None
    ) -> dict[str, Any]:
        """Flax variables with the values of PyTorch's tensors.

        Args:
            source: a `state_dict` or module of the keys and shapes that were matched, or gradients
                under their parameters' names.
            partial: whether tensors may be missing, as statistics are among gradients. Their leaves
                are then missing in the result.
            gradients: whether the values are gradients. This matters for a leaf that is the sum of
                two tensors, whose gradient is that of the first one. It must be given if there is
                such a leaf and `partial`.

        Returns:
            Variables as linen has them, in the dtypes of the leaves that were matched.

        Raises:
            ValueError: a tensor is missing, unexpected or misshapen, a value is too large for its
                new dtype, or tied tensors differ; the message lists all of them.
        """
        self._require_kind(partial, gradients)
        tensors = torch_tensors(source)
        expected = {pair.key: shape(self.tensors[pair.key]) for pair in self.pairs}
        optional = (self.tied.keys() | self.skipped.keys()) - expected.keys()
        refuse(
            "The tensors must be those that were matched, but:",
            differences({key: shape(x) for key, x in tensors.items()}, expected, optional, partial),
        )
        pairs = [pair for pair in self.pairs if not (gradients and pair.added)]
        terms = grouped([pair for pair in pairs if pair.key in tensors], lambda pair: pair.path)
        values = {
            path: layouts.total(
                [p.layout.to_flax(p.part_of(layouts.to_numpy(tensors[p.key]))) for p in group]
            )
            for path, group in terms.items()
        }
        dtypes = {pair.path: pair.flax_dtype for pair in pairs}
        problems = [
            f"{' + '.join(p.name for p in terms[path])} {problem}"
            for path, x in values.items()
            for problem in layouts.overflow(x, dtypes[path])
        ]
        problems += [
            f"{pair.name} is missing, whose values are added to those of {terms[pair.path][0].name}"
            for pair in pairs
            if pair.key not in tensors and pair.path in terms
        ]
        problems += [
            f"{key} and {other} were one tensor and now differ"
            for key, other in self.tied.items()
            if key in tensors and other in tensors
            if not layouts.equal(tensors[key], tensors[other])
        ]
        refuse("The values must have a place in Flax, but:", problems)
        return unflatten_dict({path: layouts.to_jax(x, dtypes[path]) for path, x in values.items()})

    def to_torch(
        self,
        variables: Variables | nnx.Module,
        *,
        partial: bool = False,
        gradients: bool | None = None,
    ) -> dict[str, Any]:
        """A PyTorch `state_dict` with the values of Flax variables.

        Args:
            variables: linen variables or an NNX module, with the leaves and shapes that were
                matched, or gradients in the tree of the variables.
            partial: whether leaves may be missing. Their tensors are then missing in the result, as
                are those that have no counterpart in Flax.
            gradients: whether the values are gradients. This matters for a leaf that is the sum of
                two tensors: its values go to the first one, and zeros to the second; its gradient
                is that of both. It must be given if there is such a leaf and `partial`.

        Returns:
            Keys, dtypes, devices and kind of array (PyTorch's, NumPy's or JAX's) are those of the
            tensors that were matched; those in `skipped` are these tensors themselves.

        Raises:
            ValueError: a leaf is missing, unexpected or misshapen, a value is too large for its new
                dtype, or tied tensors would get different values; the message lists all of them.
        """
        self._require_kind(partial, gradients)
        leaves = flax_leaves(variables)
        refuse(
            "The variables must be those that were matched, but:",
            differences(
                {path_name(path): shape(x) for path, x in leaves.items()},
                {path_name(pair.path): pair.flax_shape for pair in self.pairs},
                partial=partial,
            ),
        )
        values, problems = {}, []
        for key, pairs in grouped(self.pairs, lambda pair: pair.key).items():
            present = [pair for pair in pairs if pair.path in leaves]
            flax = [layouts.to_numpy(leaves[pair.path]) for pair in present]
            parts = [
                pair.layout.to_torch(np.zeros_like(x) if pair.added and not gradients else x)
                for pair, x in zip(present, flax, strict=True)
            ]
            if len(present) == len(pairs):
                axis = pairs[0].part.axis if pairs[0].part else 0
                values[key] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
            elif present:
                absent = [path_name(pair.path) for pair in pairs if pair not in present]
                problems.append(f"{key} has no values for its parts {', '.join(absent)}")
        for key, other in self.tied.items():
            if other in values:
                values.setdefault(key, values[other])
        problems += [
            f"{key} {problem}"
            for key, x in values.items()
            for problem in layouts.overflow(x, layouts.dtype(self.tensors[key]))
        ]
        problems += [
            f"{key} and {other} are one tensor, for which Flax has different values"
            for key, other in self.tied.items()
            if key in values and other in values and not layouts.equal(values[key], values[other])
        ]
        refuse("The values must have a place in PyTorch, but:", problems)
        converted = {k: layouts.array_like(self.tensors[k], x) for k, x in values.items()}
        return {
            key: converted.get(key, tensor)
            for key, tensor in self.tensors.items()
            if key in converted or not partial
        }

    def _require_kind(self, partial: bool, gradients: bool | None) -> None:
        """Refuse to take gradients for values, or values for gradients."""
        sums = [f"{pair.name} to {path_name(pair.path)}" for pair in self.pairs if pair.added]
        if sums and partial and gradients is None:
            raise ValueError(
                f"The values of {', '.join(sums)} are added, but their gradients are not: with "
                "partial=True, pass gradients=True if these are gradients, and otherwise False."
            )

    def __str__(self) -> str:
        """A line for each tensor of PyTorch: where it goes and how, or why not; then the notes."""
        rows = [
            (
                p.name,
                f"{p.torch_shape}",
                "->",
                path_name(p.path),
                f"{p.flax_shape}",
                p.layout.how + (", added" if p.added else ""),
            )
            for p in self.pairs
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        paired = {pair.key for pair in self.pairs}
        lines += [f"{key}: tied to {o}" for key, o in self.tied.items() if key not in paired]
        lines += [f"{key}: skipped, since {why}" for key, why in self.skipped.items()]
        return "\n".join([*lines, *self.notes])


def match(
    source: Any,
    like: Variables | nnx.Module,
    names: Names | None = None,
    transposed: Transposed = (),
    flattened: Flattened | None = None,
    rules: Rules = RULES,
    strict: bool = True,
) -> Match:
    """Match each tensor of PyTorch with a leaf of Flax's variables.

    Example:
        >>> import numpy as np
        >>> from bcn_flax.interop import match
        >>> state_dict = {"fc.weight": np.ones((10, 8)), "fc.bias": np.zeros(10)}
        >>> like = {"params": {"head": {"kernel": np.ones((8, 10)), "bias": np.zeros(10)}}}
        >>> print(match(state_dict, like, names={"fc": "head"}))
        fc.weight  (10, 8)  ->  params/head/kernel  (8, 10)  transposed (O, I, *) -> (*, I, O)
        fc.bias    (10,)    ->  params/head/bias    (10,)    copied

    Args:
        source: a `state_dict` of PyTorch's tensors or NumPy's or JAX's arrays; or a PyTorch module,
            which also declares which convolutions are transposed.
        like: linen variables, arrays or shapes; or an NNX module, which declares the same.
        names: where in Flax a PyTorch module is, if not under its own name: from path to path, as
            in `{"layer1.0.downsample.0": "block_0/conv_proj"}`. A path stands for all modules in it
            that have no entry of their own. `{"module": ""}` removes a wrapper's name, which all
            other paths, in any argument, may then contain or not. Or a function of the full path of
            the module that holds a tensor, which returns `None` for its own name.
        transposed: the paths of PyTorch's transposed convolutions, if neither side is a module; or
            a mapping from these to Flax's `transpose_kernel`, if the shape does not show it, and to
            `None` from an ordinary convolution whose shape could be that of a transposed one.
        flattened: for each dense layer that follows a flatten, by its path in PyTorch, the number
            of channels that were flattened; its number of inputs, if there were no images.
        rules: which leaf has which names and layouts.
        strict: whether `names` must hold no entries for modules that are not there, as it would
            for several versions of a model.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen, of another kind of number, or
            ambiguous, or an argument names no module; the message lists all of them.
    """
    flattened = _require_argument_types(names, transposed, flattened, rules)
    strict = checks.require_flag("strict", strict)
    tensors, leaves = torch_tensors(source), flax_leaves(like)
    declared = torch_convolutions(source), flax_convolutions(like)
    _refuse_other_collections(leaves, rules)

    torch_shapes = {key: shape(x) for key, x in tensors.items()}
    flax_shapes = {path: shape(x) for path, x in leaves.items()}
    renames = Renames.of(names, dict.fromkeys(map(module_of, tensors)))
    found = naming.match_names(torch_shapes, flax_shapes, renames, rules)
    proposed = proposal.Proposal(found, {})
    if not callable(names):
        proposed = proposal.better_names(found, module_order(like))
    better = proposed.match
    tied = tied_tensors(tensors, better.keys)
    skipped = skipped_tensors(tensors, better.keys | tied.keys())

    table = layers.fact_table(found, *declared, transposed, flattened)
    pairs, errors, notes = layers.match_layers(found, table, tensors, leaves)
    refuse(
        proposal.name_hints(found, better)
        + "The state_dict and the Flax variables must match, tensor by tensor, but:",
        naming.name_errors(found, better, tied.keys() | skipped, strict) + errors,
        "Build both models with the same configuration, or pass `names` to say where in Flax a "
        "module of PyTorch is." + proposal.name_proposal(found, proposed),
    )
    return Match(pairs, tied, skipped, tensors, notes)


def _require_argument_types(
    names: Any, transposed: Any, flattened: Any, rules: Any
) -> dict[str, int]:
    """Refuse what Python would take for something else, or fail on later.

    Returns:
        The numbers of `flattened`.
    """
    if not (names is None or callable(names) or _maps_names(names, str)):
        raise ValueError(
            "names must map paths of PyTorch to paths of Flax, or be a function, but it is "
            f"{names!r}."
        )
    if isinstance(transposed, str):
        raise ValueError(
            "transposed must be a collection of paths, or map them to transpose_kernel, but it is "
            f"the string {transposed!r}: pass [{transposed!r}]."
        )
    is_array = hasattr(transposed, "shape")
    is_collection = isinstance(transposed, Collection) and not is_array
    paths = is_collection and all(isinstance(path, str) for path in transposed)
    if not paths or (isinstance(transposed, Mapping) and not _maps_names(transposed, bool | None)):
        raise ValueError(
            "transposed must be a collection of paths, or map them to transpose_kernel, False, "
            f"True or None, but it is {transposed!r}."
        )
    if not (flattened is None or _maps_names(flattened, object)):
        raise ValueError(
            "flattened must map paths of dense layers to numbers of channels, but it is "
            f"{flattened!r}: pass {{path: channels}}."
        )
    if not (isinstance(rules, Mapping) and all(isinstance(r, Rule) for r in rules.values())):
        raise ValueError(
            "rules must map ends of paths to Rule, as RULES does, but they are "
            f"{rules!r}: pass {{**RULES, path: Rule(...)}}."
        )
    return {p: checks.require_integer("flattened", n) for p, n in (flattened or {}).items()}


def _maps_names(value: Any, kind: Any) -> bool:
    """Whether it maps strings to values of a kind."""
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(x, kind) for k, x in value.items()
    )


def _refuse_other_collections(leaves: Leaves, rules: Rules) -> None:
    known = {path[0] for path in rules}
    others = sorted({path[0] for path in leaves} - known)
    if others:
        raise ValueError(
            f"Of Flax's variables, only the collections {sorted(known)} have counterparts in "
            f"PyTorch, but there are also {others}. Leave those out, or, if these are parameters, "
            'put them into {"params": ...}.'
        )
