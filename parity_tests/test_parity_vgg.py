"""The whole network, side by side: the same losses, logits and updated parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import bcn_torch
from bcn_flax.interop import state_dict_from_variables, variables_from_torch
from bcn_flax.models import VGG
from parity_tests import layout
from parity_tests.tolerances import assert_close

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("x64")]

STEPS = 5
PUBLISHED = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


def flax_trajectory(model, variables, batches, optimizer):
    """Loss, logits and all variables after each step."""
    state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, state, x, labels):
        def loss_of(params):
            logits, updates = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), (logits, updates)

        (loss, (logits, updates)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            variables["params"]
        )
        changes, state = optimizer.update(gradients, state)
        params = optax.apply_updates(variables["params"], changes)
        return {"params": params, **updates}, state, loss, logits

    for x, labels in batches:
        variables, state, loss, logits = step(variables, state, x, labels)
        yield loss, logits, variables


def torch_trajectory(module, like, batches, optimizer):
    for x, labels in batches:
        logits = module(layout.to_torch(x))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        variables = variables_from_torch(module.state_dict(), like)
        yield loss.item(), logits.detach().numpy(), variables


def run(blocks, size, batch_size, norm="bcn", ws=True, estimate=True, groups=32, adam=True):
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(size=(batch_size, size, size, 3)), rng.integers(0, 10, batch_size))
        for _ in range(STEPS)
    ]
    module = bcn_torch.VGG(blocks, norm=norm, ws=ws, estimate=estimate, groups=groups).double()
    model = VGG(
        blocks, norm=norm, ws=ws, estimate=estimate, num_groups=groups, param_dtype=jnp.float64
    )
    variables = jax.jit(lambda: model.init(jax.random.key(0), batches[0][0], train=False))()
    module.load_state_dict(state_dict_from_variables(variables, module.state_dict()))
    rate = 2.5e-4 if adam else 0.01
    optimizers = (
        (optax.adam(rate), torch.optim.Adam(module.parameters(), rate))
        if adam
        else (optax.sgd(rate, 0.9), torch.optim.SGD(module.parameters(), rate, momentum=0.9))
    )
    flax = flax_trajectory(model, variables, batches, optimizers[0])
    reference = torch_trajectory(module, variables, batches, optimizers[1])
    for number, (actual, expected) in enumerate(zip(flax, reference, strict=True)):
        for name, a, e in zip(("loss", "logits", "variables"), actual, expected, strict=True):
            for (path, leaf), (_, other) in zip(
                jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(e), strict=True
            ):
                # Adam divides by |gradient| + 1e-8, and so magnifies roundings of smaller ones.
                relative = 1e-8 if adam and name == "variables" else 1e-10
                scale = max(rate, np.abs(np.asarray(other)).max())
                place = f"step {number}, {name}{jax.tree_util.keystr(path)}"
                assert_close(
                    leaf, other, ulps=relative * 2**52, dtype=np.float64, scale=scale, name=place
                )


# Adam only where no gradient is 0 but for rounding: that of a bias is, ahead of a batch norm by the
# batch's own mean, and Adam would make a whole step of it.
@pytest.mark.parametrize(
    ("options", "adam"),
    [
        ({}, True),
        ({"norm": "gn"}, True),
        ({"estimate": False}, False),
        ({"norm": "bn", "ws": False}, False),
    ],
    ids=str,
)
def test_small_networks_train_alike(options, adam):
    run(((8, 8), (16,)), 9, 4, groups=4, adam=adam, **options)


@pytest.mark.slow
@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_the_published_network_trains_alike(adam):
    run(PUBLISHED, 32, 4, adam=adam)
