"""The oracle's gradients, derived by hand, are the derivatives of its forward pass."""

import numpy as np
import pytest

from parity_tests import oracle
from parity_tests.tolerances import assert_close

# Layers, with the shapes of their inputs and parameters.
CASES = {
    "batch_norm": (oracle.BatchNorm(estimate=False), (4, 3, 2, 6), (6,)),
    "evaluation": (oracle.BatchNorm(estimate=True), (4, 3, 2, 6), (6,)),
    "channel_norm": (oracle.ChannelNorm(2), (4, 3, 2, 6), (2,)),
    "dense": (oracle.WSDense(), (3, 2, 4), (4, 5)),
    "conv_1d": (oracle.WSConv(strides=2), (2, 6, 4), (3, 4, 5)),
    "conv_2d": (
        oracle.WSConv(strides=(1, 2), padding=((2, 0), (1, 1))),
        (2, 5, 4, 4),
        (3, 2, 4, 5),
    ),
    "transpose": (oracle.WSConvTranspose(strides=(2, 3)), (2, 3, 2, 4), (3, 2, 4, 5)),
}
STEP = 1e-30  # its square is nothing beside 1


@pytest.mark.parametrize(("layer", "shape", "of_parameters"), CASES.values(), ids=CASES)
def test_gradients_are_derivatives(layer, shape, of_parameters):
    """Along a random direction, by a step into the complex plane, which cancels no digits."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=of_parameters) for name in layer.PARAMETERS}
    values["bias"] = rng.normal(size=of_parameters[-1])
    values["x"] = rng.normal(1, 2, shape)

    def forward(x, **parameters):
        vars(layer).update(parameters)
        return layer.forward(x, train=not getattr(layer, "estimate", False))

    dy = rng.normal(size=forward(**values).shape)
    gradients = {"x": layer.backward(dy)}
    gradients |= {name: getattr(layer, f"d_{name}") for name in layer.PARAMETERS}
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        moved = forward(**{**values, name: values[name] + 1j * STEP * direction})
        derivative = (moved.imag * dy).sum() / STEP
        scale = np.abs(gradient * direction).sum()
        assert_close(
            (gradient * direction).sum(), derivative, ulps=64, dtype=float, scale=scale, name=name
        )
