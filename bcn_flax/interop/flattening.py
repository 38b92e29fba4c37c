"""Where a dense layer may follow flattened images, which the two sides flatten in another order."""

from collections.abc import Collection, Iterable, Mapping

from bcn_flax.interop.moving import Pair


def undeclared(pairs: Iterable[Pair], declared: Collection[str]) -> tuple[list[str], list[str]]:
    """Complaints, and notes for the report, about dense layers that may follow a flatten.

    A dense layer of which nobody said so is above suspicion if its inputs are as many as the
    features of the last convolution before it, or of a layer since. It is suspect if they are a
    multiple of one of these instead, and noted if they are both and the order is unknown.

    Args:
        pairs: in the order of the `state_dict`, which is that of the layers. Where it is
            alphabetical, and so tells nothing, and for a dense layer that comes first, the features
            of all convolutions and norms count.
        declared: PyTorch's modules of which somebody said how many channels were flattened.
    """
    pairs = list(pairs)
    layers, unordered = _layers(pairs), _unordered(pairs)
    features = {_features(layer) for layer in layers if not _is_dense(layer)}
    problems, presumed = [], {}
    for layer in layers:
        if _is_dense(layer) and layer.module not in declared:
            inputs = layer.torch_shape[1]
            channels = max((n for n in features if 1 < n < inputs and inputs % n == 0), default=0)
            if channels and inputs not in features:
                problems.append(_suspicion(layer, channels))
            elif channels and unordered:
                presumed[layer.module] = channels
        if len(layer.torch_shape) > 2 and not unordered:
            features = set()
        features.add(_features(layer))
    notes = [
        f"taken for no flatten: {', '.join(presumed)}: the order of the layers is unknown; "
        f"flattened={presumed} says otherwise"
    ]
    return problems, notes if presumed else []


def unlikely(pairs: Iterable[Pair], declared: Mapping[str, int]) -> list[str]:
    """Notes for the report about numbers of channels that no layer before has.

    Args:
        pairs: in the order of the `state_dict`; see `undeclared`.
        declared: by PyTorch's module, how many channels were flattened.
    """
    pairs = list(pairs)
    layers, unordered = _layers(pairs), _unordered(pairs)
    notes = []
    for n, layer in enumerate(layers):
        channels = declared.get(layer.module)
        images = [_features(other) for other in layers if not _is_dense(other)]
        before = [_features(other) for other in layers[:n] if not _is_dense(other)]
        there = sorted({*(images if unordered or not before else before)})
        if _is_dense(layer) and channels not in (None, layer.torch_shape[1], *there):
            notes.append(
                f"flattened: {layer.module!r} has {channels} channels, as said, but no convolution "
                f"or norm before it has {channels} features; there are {there}"
            )
    return notes


def _layers(pairs: list[Pair]) -> list[Pair]:
    return [p for p in pairs if p.path[-1] in ("kernel", "scale", "embedding") and p.torch_shape]


def _unordered(pairs: list[Pair]) -> bool:
    keys = [pair.key for pair in pairs]
    return keys == sorted(keys)


def _suspicion(dense: Pair, channels: int) -> str:
    module, inputs = dense.module, dense.torch_shape[1]
    return (
        f"ambiguous: {dense.key} has {inputs} inputs, a multiple of the {channels} features of a "
        f"layer before it. If images of {channels} channels were flattened, which PyTorch does in "
        f"another order than Flax, say flattened={{{module!r}: {channels}}}; if none were, "
        f"flattened={{{module!r}: {inputs}}}"
    )


def _features(layer: Pair) -> int:
    return layer.torch_shape[layer.layout.features]


def _is_dense(pair: Pair) -> bool:
    return pair.path[-1] == "kernel" and len(pair.torch_shape) == 2
