"""Short runs of the training script: few images, and networks that compile fast."""

import dataclasses
from contextlib import contextmanager
from functools import cache

import jax
import pytest


@cache
def all_digits():
    """The digits, also where `small_networks` has replaced them."""
    from training import data

    return data.digits()


@contextmanager
def small_networks(epochs=2, images=200, draw=False):
    """Let the recipes have one small convolution, the digits so few images, and no drawings."""
    from training import data, results  # not for every test: it imports much
    from training.config import RECIPES

    train, test, classes = all_digits()
    few = data.Dataset(*(data.Split(x[:images], y[:images]) for x, y in (train, test)), classes)

    # Initializers compile several times as fast with this generator.
    with pytest.MonkeyPatch.context() as patch, jax.default_prng_impl("rbg"):
        for name, recipe in list(RECIPES.items()):
            small = dataclasses.replace(recipe, blocks=((8,),), groups=4, epochs=epochs)
            patch.setitem(RECIPES, name, small)
        patch.setattr(data, "digits", lambda: few)
        if not draw:
            patch.setattr(results, "_save_curves", lambda path, *_: path.touch())
        yield


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Compile each program once in a process."""
    from training.compilation import cache_in

    with cache_in(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture
def small(tmp_path, monkeypatch, compiled_once):
    """Train small networks, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    with small_networks():
        yield
