"""Where a dense layer may follow flattened images, which the two sides flatten in another order."""

from collections.abc import Collection, Iterable

from bcn_flax.interop.moving import Pair


def undeclared(pairs: Iterable[Pair], declared: Collection[str]) -> list[str]:
    """Complaints about dense layers whose inputs may be flattened images, where nobody said so.

    A dense layer is above suspicion if its inputs are as many as the features of the last
    convolution before it, or of a layer since. It is suspect if they are a multiple of one of these
    instead.

    Args:
        pairs: in the order of the `state_dict`, which is that of the layers. Where it is
            alphabetical, and so tells nothing, and for a dense layer that comes first, the features
            of all convolutions and norms count.
        declared: PyTorch's modules of which somebody said how many channels were flattened.
    """
    pairs = list(pairs)
    keys = [pair.key for pair in pairs]
    layers = [p for p in pairs if p.path[-1] in ("kernel", "scale", "embedding") and p.torch_shape]
    features = {_features(layer) for layer in layers if not _is_dense(layer)}
    problems = []
    for layer in layers:
        if _is_dense(layer) and layer.module not in declared:
            problems += _suspicion(layer, features)
        if len(layer.torch_shape) > 2 and keys != sorted(keys):
            features = set()
        features.add(_features(layer))
    return problems


def _suspicion(dense: Pair, features: Collection[int]) -> list[str]:
    inputs = dense.torch_shape[1]
    channels = [n for n in features if n > 1 and inputs % n == 0]
    if not channels or inputs in features:
        return []
    module, likely = dense.module, max(channels)
    return [
        f"ambiguous: {dense.key} has {inputs} inputs, a multiple of the {likely} features of a "
        f"layer before it. If images of {likely} channels were flattened, which PyTorch does in "
        f"another order than Flax, say flattened={{{module!r}: {likely}}}; if none were, "
        f"flattened={{{module!r}: {inputs}}}"
    ]


def _features(layer: Pair) -> int:
    return layer.torch_shape[layer.layout.features]


def _is_dense(pair: Pair) -> bool:
    return pair.path[-1] == "kernel" and len(pair.torch_shape) == 2
