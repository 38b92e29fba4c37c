"""A network written for `flax.nnx.BatchNorm` trains with these layers and no other edit."""

from functools import partial

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from bcn_flax.nnx import BatchChannelNorm, BatchNorm, EstimatedBatchNorm


class Classifier(nnx.Module):
    """Written for `nnx.BatchNorm`; only the class `norm` changes."""

    def __init__(self, norm, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(32, use_running_average=False, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(nnx.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


@nnx.jit
def step(model, optimizer, x, labels):
    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


evaluate = nnx.jit(lambda model, x: model(x))


def train(norm, steps=60, batch_size=8):
    """The losses, the accuracy on images that were not trained on, and the model."""
    images, labels = load_digits(return_X_y=True)
    images = np.float32(images.reshape(-1, 8, 8, 1) / 16)
    model = Classifier(norm, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    losses = []
    model.train()
    for _ in range(steps):
        chosen = rng.choice(1500, batch_size, replace=False)
        losses.append(float(step(model, optimizer, images[chosen], labels[chosen])))
    model.eval()
    correct = evaluate(model, images[1500:]).argmax(-1) == labels[1500:]
    return losses, float(correct.mean()), model


def test_trains_in_the_place_of_batch_norm():
    losses, accuracy, model = train(BatchChannelNorm)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
    assert accuracy > 0.5  # of ten digits
    assert isinstance(model.norm, BatchChannelNorm)


def test_an_estimated_batch_norm_takes_the_same_arguments():
    """It trains inside of a batch-channel norm."""
    model = nnx.eval_shape(lambda: Classifier(EstimatedBatchNorm, rngs=nnx.Rngs(0)))
    assert isinstance(model.norm, EstimatedBatchNorm)


def test_batch_norm_is_flaxs_in_its_losses():
    losses, _, model = train(BatchNorm, steps=12)
    expected, _, flax_model = train(nnx.BatchNorm, steps=12)
    # Both run in float32; 12 steps of training let roundings grow.
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    close(losses, expected)
    close(model.norm.mean[...], flax_model.norm.mean[...])
    close(model.norm.var[...], flax_model.norm.var[...])
