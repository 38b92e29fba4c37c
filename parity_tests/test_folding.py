"""What folds and what stays, in linen, NNX and PyTorch: one table of layers, one of graphs.

Everything is described once, in Flax's words, and built for each library. JAX compiles each
operation once for each shape, so nearly all of it has the same few shapes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import bcn_flax
import bcn_flax.nnx
from bcn_flax.surgery import linen as linen_surgery
from bcn_flax.surgery import nnx as nnx_surgery
from bcn_flax.variants import WS
from parity_tests.draws import random_variables
from parity_tests.tolerances import assert_close

CHANNELS = 4
IMAGES = (2, 5, 5, CHANNELS)


class Layer(NamedTuple):
    """A convolution, transposed convolution or dense layer of 4 channels.

    Attributes:
        kind: "Conv", "ConvTranspose" or "Dense".
        ws: the name of a variant of weight standardization; None for a plain layer.
        window: of a convolution.
        options: Flax's other arguments.
    """

    kind: str = "Conv"
    ws: str | None = "annotated"
    window: tuple[int, ...] = (3, 3)
    options: Mapping[str, Any] = {}

    @property
    def flax_arguments(self):
        ws = {} if self.ws is None else {"standardization": WS[self.ws]}
        return () if self.kind == "Dense" else (self.window,), {**ws, **self.options}


class Norm(NamedTuple):
    """A norm for 4 channels in 2 groups, with Flax's arguments; "Plain" is Flax's `BatchNorm`."""

    kind: str = "BatchChannelNorm"
    options: Mapping[str, Any] = {}

    @property
    def flax_options(self):
        bcn = self.kind == "BatchChannelNorm"
        return {**({"num_groups": 2} if bcn else {}), **self.options}


CONV, DENSE, BCN, BN = Layer(), Layer("Dense"), Norm(), Norm("BatchNorm")
NO_BIAS, NO_SCALE = {"use_bias": False}, {"use_scale": False, "use_bias": False}
ESTIMATED, PLAIN = Norm("EstimatedBatchNorm"), Norm("Plain")


def conv(**options):
    return CONV._replace(options=options)


class Graph(NamedTuple):
    """Some layers, how they are called, and which of the norms fold.

    Attributes:
        layers: by name.
        call: the output for an input, given the layers as attributes of the model.
        folds: the names of the norms that fold. Every kernel is plain afterwards.
        instead: another call of the same layers, by which to compare, if the outputs of `call` hide
            what they are computed from.
    """

    layers: Mapping[str, Layer | Norm]
    call: Callable[[Any, Any], Any]
    folds: str = ""
    instead: Callable[[Any, Any], Any] | None = None


# Each library: `build` a graph for an input, `fold` it on an example, and `left` with what.


class LinenModel(nn.Module):
    call: Callable[[Any, Any], Any]
    layers: tuple[tuple[str, Layer | Norm], ...]

    def setup(self):
        for name, layer in self.layers:
            if isinstance(layer, Norm):
                kind = nn.BatchNorm if layer.kind == "Plain" else getattr(bcn_flax, layer.kind)
                made = kind(True, **layer.flax_options)
            else:
                args, kwargs = layer.flax_arguments
                module, prefix = (nn, "") if layer.ws is None else (bcn_flax, "WS")
                made = getattr(module, prefix + layer.kind)(CHANNELS, *args, **kwargs)
            setattr(self, name, made)

    def __call__(self, x):
        return self.call(self, x)


class Linen:
    ulps = 256

    def __init__(self, graph, x):
        self.layers = graph.layers
        self.model = LinenModel(graph.call, tuple(graph.layers.items()))
        self.variables = random_variables(self.model, x, np.random.default_rng(1))
        self.before = jax.tree.map(np.array, self.variables)
        self.folded = linen_surgery.fold(self.model, self.variables, x)

    def unchanged(self):
        jax.tree.map(np.testing.assert_array_equal, self.variables, self.before)

    def left(self):
        """The norms and the layers that are as they were."""
        folded = {path[0] for path in (*self.folded.norms, *self.folded.convolutions)}
        stats = {path[1] for path in flatten_dict(self.folded.variables) if path[0] != "params"}
        left = {name for name in self.layers if name not in folded}
        assert stats == {name for name in left if isinstance(self.layers[name], Norm)}
        params = flatten_dict(self.folded.variables["params"])
        names = {path[1] for path in params if path[0] not in left}
        assert names <= {"kernel", "bias", "channel_norm"}
        return {x for x in left if getattr(self.layers[x], "ws", "norm") is not None}

    def outputs(self, call, x):
        model = self.model.clone(call=call)
        folded = dataclasses.replace(self.folded, model=model)
        return model.apply(self.variables, x), folded.apply(folded.variables, x)


class NNXModel(nnx.Module):
    def __init__(self, graph):
        self.call = graph.call
        rngs = nnx.Rngs(0)
        for name, layer in graph.layers.items():
            if isinstance(layer, Norm):
                plain = layer.kind == "Plain"
                kind = nnx.BatchNorm if plain else getattr(bcn_flax.nnx, layer.kind)
                made = kind(CHANNELS, **layer.flax_options, rngs=rngs)
            else:
                args, kwargs = layer.flax_arguments
                plain = {"Dense": "Linear"}.get(layer.kind, layer.kind)
                kind = (
                    getattr(nnx, plain)
                    if layer.ws is None
                    else getattr(bcn_flax.nnx, "WS" + layer.kind)
                )
                made = kind(CHANNELS, CHANNELS, *args, **kwargs, rngs=rngs)
            setattr(self, name, made)

    def __call__(self, x):
        return self.call(self, x)


class NNX:
    ulps = 256

    def __init__(self, graph, x):
        self.model = NNXModel(graph)
        rng = np.random.default_rng(1)
        state = nnx.state(self.model, nnx.Any(nnx.Param, nnx.BatchStat))
        drawn = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), state)
        nnx.update(self.model, drawn)
        self.before = jax.tree.map(np.array, nnx.state(self.model))
        self.folded = nnx_surgery.fold(self.model, x)

    def unchanged(self):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(self.model), self.before)

    def left(self):
        """The norms and the layers that are as they were."""
        ours = ("WSConv", "WSConvTranspose", "WSDense", "BatchChannelNorm", "BatchNorm")
        kinds = (nnx.BatchNorm, *(getattr(bcn_flax.nnx, name) for name in ours))
        return {name for name, m in vars(self.folded).items() if isinstance(m, kinds)}

    def outputs(self, call, x):
        self.model.eval()
        self.model.call = self.folded.call = call
        return self.model(x), self.folded(x)


TORCH_NAMES = {
    "use_bias": "bias",
    "feature_group_count": "groups",
    "kernel_dilation": "dilation",
    "strides": "stride",
    "epsilon": "eps",
    "batch_epsilon": "batch_eps",
}
TORCH_PADDING = {
    "SAME": {"padding": "same"},
    "VALID": {"padding": 0},
    "CIRCULAR": {"padding": "same", "padding_mode": "circular"},
}


def torch_layer(layer):
    import torch

    import bcn_torch
    from bcn_torch.variants import WS

    if isinstance(layer, Norm):
        affine = {} if layer.options.get("use_scale", True) else {"affine": False}
        options = {TORCH_NAMES[k]: v for k, v in layer.options.items() if not k.startswith("use")}
        groups = (2,) if layer.kind == "BatchChannelNorm" else ()
        return getattr(bcn_torch, layer.kind)(CHANNELS, *groups, **affine, **options)
    module, prefix = (torch.nn, "") if layer.ws is None else (bcn_torch, "WS")
    options = {TORCH_NAMES[k]: v for k, v in layer.options.items() if k != "padding"}
    if layer.ws is not None:
        options["standardization"] = WS[layer.ws]
    if layer.kind == "Dense":
        return getattr(module, prefix + "Linear")(CHANNELS, CHANNELS, **options)
    options |= TORCH_PADDING[layer.options.get("padding", "SAME")]
    kind = getattr(module, f"{prefix}Conv{len(layer.window)}d")
    return kind(CHANNELS, CHANNELS, layer.window, **options)


class Torch:
    ulps = 200

    def __init__(self, graph, x):
        import torch

        import bcn_torch

        class TorchModel(torch.nn.Module):
            def forward(self, x):
                return self.call(self, x)

        torch.manual_seed(0)
        self.model = TorchModel().double()
        self.model.call = graph.call
        for name, layer in graph.layers.items():
            setattr(self.model, name, torch_layer(layer).double())
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                tensor.uniform_(0.5, 1.5)
        self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
        state = torch.get_rng_state()
        self.folded = bcn_torch.fold(self.model, self.channels_first(x))
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(m.training for m in self.folded.modules())

    @staticmethod
    def channels_first(x):
        import torch

        return torch.tensor(np.moveaxis(np.asarray(x, np.float64), -1, 1))

    def unchanged(self):
        assert all(m.training for m in self.model.modules())
        for name, tensor in self.model.state_dict().items():
            np.testing.assert_array_equal(tensor, self.before[name])

    def left(self):
        """The norms and the layers that are as they were."""
        import bcn_torch

        ours = ("WSConv1d", "WSConv2d", "WSConv3d", "WSLinear", "BatchChannelNorm", "BatchNorm")
        kinds = tuple(getattr(bcn_torch, name) for name in ours)
        return {name for name, m in self.folded.named_children() if isinstance(m, kinds)}

    def outputs(self, call, x):
        x = self.channels_first(x)
        self.model.call = self.folded.call = call
        return (model(x).detach().numpy() for model in (self.model.eval(), self.folded))


LIBRARIES = {"linen": Linen, "nnx": NNX, "torch": Torch}
ALL, JAX = ("linen", "nnx", "torch"), ("linen", "nnx")


def tables(*pairs):
    """A test for each library and each row of its tables, from pairs of libraries and table."""
    return pytest.mark.parametrize(
        ("library", "row"),
        [
            pytest.param(
                library,
                row,
                id=f"{library}-{name}",
                marks=[pytest.mark.torch] if library == "torch" else [],
            )
            for libraries, table in pairs
            for name, row in table.items()
            for library in libraries
        ],
    )


def assert_folds(library, graph, example, x, ulps):
    """The norms that are to fold do, all kernels are plain, and the outputs are the same."""
    network = LIBRARIES[library](graph, jnp.asarray(example, jnp.float32))
    network.unchanged()
    norms = {name for name, layer in graph.layers.items() if isinstance(layer, Norm)}
    assert network.left() == norms - set(graph.folds.split())
    expected, actual = network.outputs(graph.instead or graph.call, jnp.asarray(x, jnp.float32))
    dtype = np.float64 if library == "torch" else np.float32
    assert_close(actual, expected, ulps=ulps, dtype=dtype)


# A layer, a norm after it, and the number of space axes.
ROWS = {
    "one space axis": (Layer(window=(3,), options={"strides": (2,), "padding": "VALID"}), BN, 1),
    "three space axes": (
        Layer(window=(3, 1, 3), options={"feature_group_count": 2}),
        ESTIMATED,
        3,
    ),
    "dilated": (
        conv(kernel_dilation=(2, 1), feature_group_count=2, padding="CIRCULAR"),
        BCN,
        2,
    ),
    "its own epsilon": (conv(**NO_BIAS), Norm(options={"epsilon": 1e-2, "batch_epsilon": 0.5}), 2),
    "no bias and no scale": (conv(**NO_BIAS), BN._replace(options=NO_SCALE), 2),
    "no scale": (CONV, BN._replace(options=NO_SCALE), 2),
    "gain": (Layer(ws="nfnet"), BCN, 2),
    "plain": (Layer(ws=None), BCN, 2),
    "plain, no bias": (Layer(ws=None, options=NO_BIAS), ESTIMATED, 2),
    "dense": (DENSE, BN, 0),
    "dense, no bias": (DENSE._replace(options=NO_BIAS), BN, 0),
    "plain dense": (DENSE._replace(ws=None), BN._replace(options=NO_SCALE), 0),
}
JAX_ROWS = {
    "transposed": (Layer("ConvTranspose", options={"strides": (2, 2)}), BCN, 2),
    "transposed kernel": (Layer("ConvTranspose", options={"transpose_kernel": True}), BCN, 2),
    "masked": (conv(mask=jnp.ones((3, 3, 4, 4)).at[1:].set(0)), BCN, 2),
    "no last scale": (CONV, Norm(options=NO_SCALE), 2),
    "plain norm": (CONV, PLAIN, 2),
    "plain norm, plain layer": (
        Layer(ws=None, options=NO_BIAS),
        PLAIN._replace(options={"epsilon": 0.1, "use_bias": False, "axis": 2}),
        1,
    ),
    "plain norm, dense": (DENSE, PLAIN._replace(options=NO_SCALE | {"axis": (-1,)}), 0),
    "group size": (CONV, Norm(options={"num_groups": None, "group_size": 2}), 2),
}


@tables((ALL, ROWS), (JAX, JAX_ROWS))
def test_every_norm_folds_into_every_layer(library, row):
    layer, norm, axes = row
    graph = Graph({"layer": layer, "norm": norm}, lambda m, x: m.norm(m.layer(x)), "norm")
    x = np.random.default_rng(0).normal(1, 2, (2, *[5] * axes, CHANNELS))
    assert_folds(library, graph, x, x, LIBRARIES[library].ulps)


ONE = {"conv": CONV, "norm": BCN}
TWO = {"a": CONV, "na": BCN, "b": CONV, "nb": BCN}
THREE = {**TWO, "c": CONV, "nc": BN}


def one(call, folds=""):
    """A graph in which `call(m, x, y)` uses the output `y` of the one convolution."""
    return Graph(ONE, lambda m, x: call(m, x, m.conv(x)), folds)


def result(last):
    """A graph that folds, whatever becomes of the output of the norm."""

    def row(m, x):
        return m.norm(m.conv(x))

    return Graph(ONE, lambda m, x: last(row(m, x)), "norm", row)


def fork(last):
    """A graph in which the output `y` of the first convolution is used elsewhere too.

    `last(rest, z, y)` is given the output `z` of its norm, and what is to follow: a convolution and
    a norm that fold.
    """

    def forked(last):
        def call(m, x):
            y = m.a(x)
            return last(lambda z: m.nb(m.b(z)), m.na(y), y)

        return call

    return Graph(TWO, forked(last), "nb", forked(lambda rest, z, y: rest(z + y)))


def middle_forks(m, x):
    y = m.b(m.na(m.a(x)))
    return m.nc(m.c(m.nb(y) + y))


GRAPHS = {
    "a row": Graph(TWO, lambda m, x: m.nb(m.b(m.na(m.a(x)))), "na nb"),
    "a residual": Graph(TWO, lambda m, x: m.nb(m.b(m.na(m.a(x)) + x)) + x, "na nb"),
    "no norm": Graph({"conv": CONV}, lambda m, x: abs(m.conv(x))),
    "keywords": Graph({"norm": BCN, "conv": CONV}, lambda m, x: m.norm(x=m.conv(x)), "norm"),
    "the shape is read": one(lambda m, x, y: m.norm(y).reshape(y.shape), "norm"),
    "argmax": result(lambda z: z.argmax(1)),
    "nan": result(lambda z: z * float("nan")),
    "nothing": result(lambda z: None),
    "output not used": one(lambda m, x, y: m.norm(x + 1)),
    # It is gone when the next array may get its id.
    "output gone": Graph(ONE, lambda m, x: m.norm(x + 1) if m.conv(x) is not None else None),
    "something between": one(lambda m, x, y: m.norm(y * 2)),
    "a sum between": one(lambda m, x, y: m.norm(y + x)),
    "a convolution twice": one(lambda m, x, y: m.conv(m.norm(y))),
    "a norm twice": Graph(
        {"a": CONV, "b": CONV, "norm": BCN}, lambda m, x: m.norm(m.b(m.norm(m.a(x))))
    ),
    "two norms": Graph({**ONE, "b": BCN}, lambda m, x: (lambda y: m.norm(y) + m.b(y))(m.conv(x))),
    "fork in the middle": Graph(THREE, middle_forks, "na nc"),
    "fork": fork(lambda rest, z, y: rest(z + y)),
    "fork, 1e-12": fork(lambda rest, z, y: rest(z + 1e-12 * y)),
    "fork, 0": fork(lambda rest, z, y: rest(z + 0 * y)),
    "fork, argmax": fork(lambda rest, z, y: rest(z + y).argmax(1)),
    "fork, argmax alone": fork(lambda rest, z, y: (rest(z), y.reshape(-1).argmax())),
    "fork, comparison": fork(lambda rest, z, y: rest(z * (y > 0))),
    # NaN does not show here: it is not larger either.
    "fork, never": fork(lambda rest, z, y: rest(z * (1 + (y > 1000)))),
    "fork, parts": fork(lambda rest, z, y: {"a": (rest(z), None), "b": [y]}),
}


def detections(m, x):
    """The first convolution is read where the score is high: not on an example without one."""
    score = scores(m, x)
    return jnp.where(score > 6, score, 0)


def scores(m, x):
    y = m.a(x)
    return m.nb(m.b(jax.nn.relu(m.na(y)) + y)).max(-1)


JAX_GRAPHS = {
    "detections": Graph(TWO, detections, "nb", scores),
    "a plain norm twice": Graph(
        {"conv": CONV, "norm": PLAIN}, lambda m, x: m.norm(m.norm(m.conv(x)))
    ),
    "all keywords": Graph(ONE, lambda m, x: m.norm(x=m.conv(inputs=x)), "norm"),
    "another axis too": Graph(
        {"fc": DENSE, "norm": BN._replace(options={"axis": 1})},
        lambda m, x: m.norm(m.norm(m.fc(x.mean((1, 2))))[..., None]),
    ),
}
NNX_GRAPHS = {
    "flags": one(lambda m, x, y: m.norm(y, use_running_average=True), "norm"),
    "positional flags": one(lambda m, x, y: m.norm(y, True, update_stats=False), "norm"),
    "plain flags": Graph(
        {"conv": CONV, "norm": PLAIN},
        lambda m, x: m.norm(m.conv(x), use_running_average=True, mask=None),
        "norm",
    ),
    "flags in another call": one(lambda m, x, y: m.norm(m.norm(y), use_running_average=True)),
}


def small(y):
    return y.abs().max() < 1000


def refuse_large(rest, z, y):
    assert small(y)
    return rest(z)


def clamp_large(rest, z, y):
    return rest(z if small(y) else z.clamp(-1, 1))


def detections(threshold):
    """What a detector returns: the scores above a threshold, of which the example has none."""

    def call(m, x):
        y = m.a(x)
        score = m.nb(m.b(abs(m.na(y)) + y)).amax(1)
        return score[score > threshold]

    return call


# A PyTorch model is any Python: it may look at values, and return anything.
TORCH_GRAPHS = {
    "detections": Graph(TWO, detections(1e9), "nb", detections(0)),
    "both twice": Graph(ONE, lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))), "norm"),
    "a norm twice, once of a sum": Graph(
        {**ONE, "b": CONV}, lambda m, x: m.b(m.norm(m.norm(m.conv(x)) + x))
    ),
    "a convolution twice, once alone": one(lambda m, x, y: m.norm(y) + m.conv(x + 1)),
    "changed in place": one(lambda m, x, y: m.norm(y.relu_())),
    "one norm or another": Graph(
        {**ONE, "b": BCN}, lambda m, x: (lambda y: (m.norm if small(y) else m.b)(y))(m.conv(x))
    ),
    "another axis": Graph(
        {"fc": DENSE, "norm": BCN}, lambda m, x: m.norm(m.fc(x.flatten(2)[..., :CHANNELS]))
    ),
    "no batch": Graph(ONE, lambda m, x: m.norm(m.conv(x[0][:, :CHANNELS]))),
    "integers": result(lambda z: z.int()),
    "a number": result(lambda z: (None, "text", 3, z.mean().item(), {1}, z.dtype)),
    "an array": result(lambda z: [z.detach().numpy()]),
    "an object": result(lambda z: SimpleNamespace(z=z, more=SimpleNamespace(nothing=None))),
    "nan as a number": result(lambda z: (z * np.nan).sum().item()),
    "infinity": result(lambda z: z * float("inf")),
    "empty": result(lambda z: z[:0]),
    "random": result(lambda z: z.abs().clamp(0, 1).bernoulli() + z.new_empty(1).uniform_()),
    "fork, integers": fork(lambda rest, z, y: rest(z + y).mul(100).int()),
    "fork, number": fork(lambda rest, z, y: (rest(z), y.mean().item())),
    "fork, array": fork(lambda rest, z, y: (rest(z), y.detach().numpy())),
    "fork, object": fork(lambda rest, z, y: SimpleNamespace(a=rest(z), b=SimpleNamespace(y=y))),
    "fork, length": fork(lambda rest, z, y: [rest(z)] * (1 + int(not small(y)))),
    "fork, size": fork(lambda rest, z, y: rest(z)[: 1 + int(small(y))] * 0),
    "fork, key": fork(lambda rest, z, y: {"z": rest(z)} | ({"y": 0} if small(y) else {})),
    "fork, text": fork(lambda rest, z, y: (rest(z), f"{y.mean():.9f}")),
    "fork, error": fork(refuse_large),
    "fork, path": fork(clamp_large),
}


@tables((ALL, GRAPHS), (JAX, JAX_GRAPHS), (["nnx"], NNX_GRAPHS), (["torch"], TORCH_GRAPHS))
def test_exactly_the_norms_fold_that_alone_read_the_output_of_a_layer(library, row):
    """However little the example shows of it: it is 0."""
    x = np.random.default_rng(0).normal(1, 2, IMAGES)
    assert_folds(library, row, np.zeros(IMAGES), x, 4 * LIBRARIES[library].ulps)


REFUSED = {
    "a norm alone": Graph({"norm": BCN}, lambda m, x: m.norm(x)),
    "a layer alone": Graph({"conv": Layer(ws=None)}, lambda m, x: m.conv(x)),
}


@tables((ALL, REFUSED))
def test_nothing_to_fold_is_refused(library, row):
    with pytest.raises(ValueError, match="must have something to fold"):
        LIBRARIES[library](row, jnp.zeros(IMAGES))
