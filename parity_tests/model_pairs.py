"""The same model in linen, NNX and PyTorch, from one description, with or without a defect.

A description is a tuple of layers. `vit`, `bert` and `resnet` are small models of these kinds, and
`random_pair` draws an architecture. PyTorch is imported only by what needs it.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import bcn_flax
import bcn_flax.nnx
from bcn_flax.parity import SAME, Comparison, compare


class Layer(NamedTuple):
    """A layer, in Flax's words.

    Attributes:
        kind: one of `LINEN`, `NNX` and `TORCH`, or "residual".
        name: of the module, if there is one.
        features: of its inputs, and of its outputs.
        options: its arguments.
        inner: of a residual, the layers of both ways.
    """

    kind: str
    name: str = ""
    features: tuple[int, int] = (0, 0)
    options: Mapping[str, Any] = {}
    inner: tuple[tuple["Layer", ...], ...] = ()


Layers = tuple[Layer, ...]


def flow(layers: Layers, x: Any, apply: Callable[[Layer, Any], Any]) -> Any:
    """The output of layers, each of which is applied by a function."""
    for layer in layers:
        if layer.kind == "residual":
            body, shortcut = (flow(inner, x, apply) for inner in layer.inner)
            x = body + shortcut
        else:
            x = apply(layer, x)
    return x


def all_layers(layers: Layers) -> Iterator[Layer]:
    """All layers, those of residuals included."""
    for layer in layers:
        yield layer
        for inner in layer.inner:
            yield from all_layers(inner)


def changed(layers: Layers, change: Callable[[Layer], Layer]) -> Layers:
    """The layers, each of which is changed by a function."""
    return tuple(
        change(layer)._replace(inner=tuple(changed(inner, change) for inner in layer.inner))
        for layer in layers
    )


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.2),
}

# From the input, what has no module.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "activation": lambda x, function: ACTIVATIONS[function](x),
    "tokens": lambda x: x.reshape(len(x), -1, x.shape[-1]),
    "mean": lambda x: x.mean(tuple(range(1, x.ndim - 1))),
    "max_pool": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "avg_pool": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "first": lambda x: x[:, 0],
}
TORCH_FUNCTIONS = {"max_pool": "max_pool2d", "avg_pool": "avg_pool2d"}


def _linen_conv(layer: Layer, **types: Any) -> nn.Module:
    options = dict(layer.options)
    size = options.pop("kernel_size")
    return nn.Conv(
        layer.features[1],
        (size, size),
        padding=options.pop("padding", 0),
        **options,
        **types,
    )


def _batch_norm(api: Any, *args: Any, layer: Layer, **types: Any) -> Any:
    return api.BatchNorm(
        *args, **{"running_variance": "unbiased", **layer.options}, param_dtype=jnp.float32, **types
    )


def linen_module(layer: Layer, train: bool, **types: Any) -> Callable[[Any], Any]:
    """The module of linen."""
    types["name"] = layer.name
    options, features = layer.options, layer.features[1]
    if layer.kind == "dense":
        return nn.Dense(features, **types)
    if layer.kind == "conv":
        return _linen_conv(layer, **types)
    if layer.kind == "embed":
        return nn.Embed(options["vocabulary"], features, **types)
    if layer.kind == "positions":
        return LinenPositions(options["length"], features, **types)
    if layer.kind == "attention":
        return nn.MultiHeadDotProductAttention(options["num_heads"], **types)
    if layer.kind == "batch_norm":
        types.pop("param_dtype")
        norm = _batch_norm(bcn_flax, layer=layer, **types)
        return partial(norm, use_running_average=not train)
    norms = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm, "group_norm": nn.GroupNorm}
    return norms[layer.kind](**options, **types)


class LinenPositions(nn.Module):
    """An embedding of each position."""

    length: int
    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = self.length, self.features
        return x + self.param("table", nn.initializers.normal(), shape, self.param_dtype)[None]


class LinenModel(nn.Module):
    """The model in linen; every layer has the `dtype`."""

    layers: Layers
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, train):
        def apply(layer: Layer, x: Any) -> Any:
            if layer.kind in FUNCTIONS:
                return FUNCTIONS[layer.kind](x, **layer.options)
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            return linen_module(layer, train, **types)(x)

        return flow(self.layers, x, apply)


class NnxPositions(nnx.Module):
    def __init__(self, length, features, param_dtype):
        self.table = nnx.Param(jnp.zeros((length, features), param_dtype))

    def __call__(self, x):
        return x + self.table[...][None]


def nnx_module(layer: Layer, dtype: Any, param_dtype: Any) -> nnx.Module:
    """The module of NNX."""
    types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)}
    options, (given, made) = dict(layer.options), layer.features
    if layer.kind == "dense":
        return nnx.Linear(given, made, **types)
    if layer.kind == "conv":
        size = options.pop("kernel_size")
        padding = options.pop("padding", 0)
        return nnx.Conv(given, made, (size, size), padding=padding, **options, **types)
    if layer.kind == "embed":
        return nnx.Embed(options["vocabulary"], made, **types)
    if layer.kind == "positions":
        return NnxPositions(options["length"], made, param_dtype)
    if layer.kind == "attention":
        return nnx.MultiHeadAttention(options["num_heads"], given, decode=False, **types)
    if layer.kind == "batch_norm":
        types.pop("param_dtype")
        return _batch_norm(bcn_flax.nnx, given, layer=layer, **types)
    norms = {"layer_norm": nnx.LayerNorm, "rms_norm": nnx.RMSNorm, "group_norm": nnx.GroupNorm}
    return norms[layer.kind](given, **options, **types)


class NnxModel(nnx.Module):
    """The model in NNX; every layer has the `dtype`."""

    def __init__(self, layers, dtype, param_dtype):
        self.layers = layers
        for layer in all_layers(layers):
            if layer.name:
                setattr(self, layer.name, nnx_module(layer, dtype, param_dtype))

    def __call__(self, x):
        def apply(layer: Layer, x: Any) -> Any:
            if layer.kind in FUNCTIONS:
                return FUNCTIONS[layer.kind](x, **layer.options)
            return getattr(self, layer.name)(x)

        return flow(self.layers, x, apply)


def torch_model(layers: Layers) -> Any:
    """The model in PyTorch."""
    import torch
    from torch.nn import functional

    class Positions(torch.nn.Module):
        def __init__(self, length: int, features: int) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(0.02 * torch.randn(length, features))

        def forward(self, x: Any) -> Any:
            return x + self.table

    class Attention(torch.nn.Module):
        def __init__(self, features: int, num_heads: int, softmax_axis: int = -1) -> None:
            super().__init__()
            self.num_heads, self.softmax_axis = num_heads, softmax_axis
            for name in ("query", "key", "value", "out"):
                setattr(self, name, torch.nn.Linear(features, features))

        def forward(self, x: Any) -> Any:
            q, k, v = (
                project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for project in (self.query, self.key, self.value)
            )
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            mixed = scores.softmax(self.softmax_axis) @ v
            return self.out(mixed.transpose(1, 2).flatten(-2))

    def module(layer: Layer) -> Any:
        options, (given, made) = dict(layer.options), layer.features
        if "epsilon" in options:
            options["eps"] = options.pop("epsilon")
        if layer.kind == "dense":
            return torch.nn.Linear(given, made)
        if layer.kind == "conv":
            names = {"strides": "stride", "feature_group_count": "groups"}
            named = {names.get(name, name): value for name, value in options.items()}
            return torch.nn.Conv2d(given, made, **{"bias": named.pop("use_bias", True), **named})
        if layer.kind == "embed":
            return torch.nn.Embedding(options["vocabulary"], made)
        if layer.kind == "positions":
            return Positions(options["length"], made)
        if layer.kind == "attention":
            return Attention(given, **options)
        if layer.kind == "batch_norm":
            return torch.nn.BatchNorm2d(given, options["eps"], 1 - options["momentum"])
        if layer.kind == "group_norm":
            return torch.nn.GroupNorm(options["num_groups"], given, options["eps"])
        norms = {"layer_norm": torch.nn.LayerNorm, "rms_norm": torch.nn.RMSNorm}
        return norms[layer.kind](given, **options)

    activations = {
        **{name: getattr(functional, name) for name in ACTIVATIONS if hasattr(functional, name)},
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "leaky_relu": partial(functional.leaky_relu, negative_slope=0.2),
        # By default PyTorch's is x from 20 on, which is off by 2e-9 there, as float64 shows.
        "softplus": partial(functional.softplus, threshold=40),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    functions: dict[str, Callable[..., Any]] = {
        "activation": lambda x, function: activations[function](x),
        "tokens": lambda x: x.flatten(2).transpose(1, 2),
        "mean": lambda x: x.mean(1) if x.dim() == 3 else x.mean((2, 3)),
        "max_pool": lambda x: functional.max_pool2d(x, 2),
        "avg_pool": lambda x: functional.avg_pool2d(x, 2),
        "first": lambda x: x[:, 0],
    }

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for layer in all_layers(layers):
                if layer.name:
                    setattr(self, layer.name, module(layer))

        def forward(self, x: Any) -> Any:
            def apply(layer: Layer, x: Any) -> Any:
                if layer.kind in functions:
                    return functions[layer.kind](x, **layer.options)
                return getattr(self, layer.name)(x)

            return flow(layers, x, apply)

    return Model()


class Pair(NamedTuple):
    """A model of Flax and one of PyTorch, and what they are given.

    Attributes:
        name: in a few words.
        flax: the description of Flax's.
        torch: the description of PyTorch's.
        inputs: in Flax's order of axes.
        api: "linen" or "nnx".
        dtype: of inputs and parameters.
        layer_dtype: the `dtype` of Flax's layers.
        options: of `compare`.
    """

    name: str
    flax: Layers
    torch: Layers
    inputs: np.ndarray
    api: str = "linen"
    dtype: str = "float32"
    layer_dtype: str | None = "float32"
    options: Mapping[str, Any] = {}

    def compare(self) -> Comparison:
        """Compare both models, with fresh weights of PyTorch unless `options` say otherwise."""
        import torch

        torch.manual_seed(0)
        types = self.layer_dtype and jnp.dtype(self.layer_dtype), jnp.dtype(self.dtype)
        model: Any = (LinenModel if self.api == "linen" else NnxModel)(self.flax, *types)
        module = torch_model(self.torch).to(getattr(torch, self.dtype))
        inputs = self.inputs
        if np.issubdtype(inputs.dtype, np.floating):
            inputs = inputs.astype(jnp.dtype(self.dtype))
        return compare(model, module, inputs, **{"axes": {3: SAME}, "eager": False, **self.options})

    def with_defect(self, name: str, change: Callable[[Layer], Layer]) -> "Pair":
        """The same pair with a defect in PyTorch's model."""
        return self._replace(name=f"{self.name}, {name}", torch=changed(self.torch, change))


class Names:
    """Names of layers: their kind, and a number."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, kind: str, given: int, made: int | None = None, **options: Any) -> Layer:
        self.count += 1
        features = given, given if made is None else made
        return Layer(kind, f"{kind}{self.count}", features, options)


def activation(function: str) -> Layer:
    return Layer("activation", options={"function": function})


def residual(*body: Layer, shortcut: Layers = ()) -> Layer:
    return Layer("residual", inner=(body, shortcut))


def transformer_block(
    new: Names, width: int, function: str, epsilon: float, *, heads: int = 2, post: bool = False
) -> Layers:
    """Attention and two dense layers, each with a residual and a norm before or after it."""
    norms = [new("layer_norm", width, epsilon=epsilon) for _ in range(2)]
    attention = new("attention", width, num_heads=heads)
    mlp = new("dense", width, 2 * width), activation(function), new("dense", 2 * width, width)
    if post:
        return residual(attention), norms[0], residual(*mlp), norms[1]
    return residual(norms[0], attention), residual(norms[1], *mlp)


def vit(api: str = "linen") -> Pair:
    """A small vision transformer: patches, positions, blocks with norms before them, a head."""
    new, width, epsilon = Names(), 16, 1e-6
    layers = (
        new("conv", 3, width, kernel_size=4, strides=4),
        Layer("tokens"),
        new("positions", width, length=4),
        *transformer_block(new, width, "gelu", epsilon),
        *transformer_block(new, width, "gelu", epsilon),
        new("layer_norm", width, epsilon=epsilon),
        Layer("mean"),
        new("dense", width, 5),
    )
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    return Pair(f"ViT, {api}", layers, layers, images, api)


def bert(api: str = "linen") -> Pair:
    """A small text encoder: tokens, positions, blocks with norms after them, a pooler, a head."""
    new, width, epsilon = Names(), 16, 1e-12
    layers = (
        new("embed", 0, width, vocabulary=11),
        new("positions", width, length=6),
        new("layer_norm", width, epsilon=epsilon),
        *transformer_block(new, width, "gelu", epsilon, post=True),
        *transformer_block(new, width, "gelu", epsilon, post=True),
        Layer("first"),
        new("dense", width, width),
        activation("tanh"),
        new("dense", width, 3),
    )
    words = np.random.default_rng(0).integers(0, 11, (3, 6))
    return Pair(f"BERT, {api}", layers, layers, words, api)


def resnet(api: str = "linen") -> Pair:
    """A small residual network: convolutions, batch norms, a projection, a head."""
    new, width = Names(), 8

    def conv(given: int, made: int, size: int = 3, strides: int = 1) -> Layers:
        padding = size // 2
        options = {"kernel_size": size, "strides": strides, "padding": padding, "use_bias": False}
        norm = new("batch_norm", made, epsilon=1e-5, momentum=0.9)
        return new("conv", given, made, **options), norm

    layers = (
        *conv(3, width),
        activation("relu"),
        residual(*conv(width, width), activation("relu"), *conv(width, width)),
        activation("relu"),
        residual(
            *conv(width, 2 * width, strides=2),
            activation("relu"),
            *conv(2 * width, 2 * width),
            shortcut=conv(width, 2 * width, 1, strides=2),
        ),
        activation("relu"),
        Layer("mean"),
        new("dense", 2 * width, 5),
    )
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
    return Pair(f"ResNet, {api}", layers, layers, images, api)


def _set(kinds: str | tuple[str, ...], **options: Any) -> Callable[[Layer], Layer]:
    """A change of the options of a kind of layers."""

    def change(layer: Layer) -> Layer:
        found = layer.kind in ((kinds,) if isinstance(kinds, str) else kinds)
        return layer._replace(options={**layer.options, **options}) if found else layer

    return change


def _other_gelu(layer: Layer) -> Layer:
    if layer.options.get("function") != "gelu":
        return layer
    return layer._replace(options={"function": "gelu_tanh"})


# By name, what is changed in PyTorch's model.
TRANSFORMER_DEFECTS = {
    "tanh GELU": _other_gelu,
    "epsilon 1e-5": _set("layer_norm", epsilon=1e-5),
    "epsilon 1e-6": _set("layer_norm", epsilon=1e-6),
    "epsilon 1e-12": _set("layer_norm", epsilon=1e-12),
    "softmax over queries": _set("attention", softmax_axis=-2),
}
RESNET_DEFECTS = {
    "epsilon 1e-3": _set("batch_norm", epsilon=1e-3),
    "epsilon 1e-6": _set("batch_norm", epsilon=1e-6),
    "epsilon 1e-12": _set("batch_norm", epsilon=1e-12),
    "momentum 0.99": _set("batch_norm", momentum=0.99),
    "momentum exchanged": _set("batch_norm", momentum=0.1),
}


def defective_pairs() -> Iterator[Pair]:
    """Pairs with a defect each, at Flax's default of float32 and with fresh weights."""
    for pair, defects in (
        (vit(), TRANSFORMER_DEFECTS),
        (vit("nnx"), TRANSFORMER_DEFECTS),
        (bert(), TRANSFORMER_DEFECTS),
        (bert("nnx"), TRANSFORMER_DEFECTS),
        (resnet(), RESNET_DEFECTS),
        (resnet("nnx"), RESNET_DEFECTS),
    ):
        for name, change in defects.items():
            made = pair.with_defect(name, change)
            if made.torch != pair.torch:
                yield made


def random_pair(seed: int) -> Pair:
    """A pair of equal models of a random architecture."""
    rng = np.random.default_rng(seed)
    new = Names()

    def choose(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    kind = choose("vectors", "images", "images", "sequences", "words")
    width = choose(4, 8, 12)
    depth = int(rng.integers(1, 3))

    def norm(features: int) -> Layers:
        epsilon = choose(1e-3, 1e-5, 1e-6)
        if kind == "images":
            return choose(
                (new("batch_norm", features, epsilon=epsilon, momentum=choose(0.9, 0.99)),),
                (new("group_norm", features, epsilon=epsilon, num_groups=choose(1, 2, 4)),),
                (),
            )
        name = choose("layer_norm", "rms_norm", "")
        return (new(name, features, epsilon=epsilon),) if name else ()

    def act() -> Layer:
        return activation(choose(*ACTIVATIONS))

    layers: list[Layer] = []
    if kind == "images":
        channels, size, batch = 3, 8, choose(1, 2, 3)
        shape: tuple[int, ...] = (batch, size, size, channels)
        for index in range(depth):
            window, strides = choose(1, 3), choose(1, 1, 2)
            conv = new(
                "conv",
                channels,
                width,
                kernel_size=window,
                strides=strides,
                padding=window // 2,
                use_bias=choose(True, False),
            )
            layers += [conv, *norm(width), act()]
            channels = width
            if choose(True, False):
                grouped = new(
                    "conv",
                    width,
                    width,
                    kernel_size=3,
                    padding=1,
                    feature_group_count=choose(1, 2, width),
                )
                layers.append(residual(grouped, *norm(width), act()))
            if index == 0 and strides == 1:
                layers += choose((Layer("max_pool"),), (Layer("avg_pool"),), ())
        layers.append(Layer("mean"))
    else:
        length = int(rng.integers(2, 6))
        batch = int(rng.integers(1, 5))
        shape = (batch, 6) if kind == "vectors" else (batch, length, 6)
        if kind == "words":
            shape = batch, length
            layers += [new("embed", 0, width, vocabulary=7), new("positions", width, length=length)]
        else:
            layers.append(new("dense", 6, width))
        for _ in range(depth):
            if kind != "vectors" and choose(True, False):
                layers += transformer_block(
                    new,
                    width,
                    choose(*ACTIVATIONS),
                    choose(1e-5, 1e-6, 1e-12),
                    heads=choose(1, 2),
                    post=choose(True, False),
                )
            else:
                body = (*norm(width), new("dense", width, width), act())
                layers += [residual(*body)] if choose(True, False) else body
        if kind != "vectors":
            layers.append(Layer(choose("mean", "first")))
    layers.append(new("dense", width, 3))
    dtype = choose("float32", "float32", "bfloat16")
    api, weights = choose("linen", "nnx"), choose("torch", "random")
    inputs: np.ndarray = choose(1.0, 1.0, 10.0) * rng.normal(size=shape)
    if kind == "words":
        inputs = rng.integers(0, 7, shape)
    layer_dtype = dtype if dtype == "bfloat16" else choose("float32", None)
    options = {"weights": weights, "steps": choose(0, 1, 1)}
    described = f"{seed}: {kind}, {len(list(all_layers(tuple(layers))))} layers, {api}, {dtype}"
    made = tuple(layers)
    return Pair(described, made, made, inputs, api, dtype, layer_dtype, options)
