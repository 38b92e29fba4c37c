"""Recalibration of linen models, and folding beyond test_folding.py.

Both run eagerly for the most part, where each operation compiles once for each shape. So all tests
have the same few shapes: images of 4 channels, and layers of 6.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import export

from bcn_flax import (
    BatchChannelNorm,
    BatchNorm,
    WSConv,
)
from bcn_flax.models import VGG
from bcn_flax.surgery.linen import fold, recalibrate
from parity_tests.draws import random_variables
from parity_tests.tolerances import assert_close

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(1, 2, (4, 5, 5, 4)), jnp.float32)
NORM = partial(BatchChannelNorm, num_groups=2, use_running_average=True)


class Net(nn.Module):
    """Layers in a row, as they are given."""

    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def variables_of(model, x=IMAGES, **call):
    return random_variables(model, x, np.random.default_rng(1), **call)


def assert_folds(model, variables, x=IMAGES, ulps=256, **call):
    """The folded model gives the same output, to the roundings of a few sums of some 100 terms."""
    folded = fold(model, variables, x, **call)
    expected = model.apply(variables, x, **call)
    actual = folded.apply(folded.variables, x, **call)
    assert_close(actual, expected, ulps=ulps, dtype=expected.dtype)
    return folded


def names_of(variables):
    return {"/".join(path[1:]) for path in flatten_dict(variables)}


SMALL_VGG = VGG(((6, 6),), norm=partial(BatchChannelNorm, num_groups=2))


@pytest.mark.parametrize(
    "model", [SMALL_VGG, VGG(((6, 6),), conv=nn.Conv, norm=BatchNorm)], ids=["bcn", "bn"]
)
def test_a_vgg_folds(model):
    variables = variables_of(model, train=False)
    folded = assert_folds(model, variables, train=False)
    channel_norms = {
        f"layers_{i}/channel_norm/{leaf}"
        for i in ((1, 4) if model is SMALL_VGG else ())
        for leaf in ("scale", "bias")
    }
    dense = {
        f"{name}/{leaf}" for name in ("layers_0", "layers_3", "fc") for leaf in ("kernel", "bias")
    }
    assert names_of(folded.variables) == dense | channel_norms
    assert "batch_stats" not in folded.variables


def test_the_result_is_the_definition_in_float64():
    """Not a copy of what the layers do: the kernel and bias by NumPy."""
    model = Net((WSConv(6, (3, 3)), NORM()))
    variables = variables_of(model)
    folded = fold(model, variables, IMAGES)
    params, stats = (
        jax.tree.map(lambda v: np.asarray(v, np.float64), variables[name])
        for name in ("params", "batch_stats")
    )
    kernel = params["layers_0"]["kernel"]
    flat = kernel.reshape(-1, 6)
    kernel = (kernel - flat.mean(0)) / np.sqrt(flat.var(0, ddof=1) + 1e-5)
    norm, moments = params["layers_1"]["batch_norm"], stats["layers_1"]["batch_norm"]
    scale = norm["scale"] / np.sqrt(moments["var"] + 1e-5)
    bias = (params["layers_0"]["bias"] - moments["mean"]) * scale + norm["bias"]
    actual = folded.variables["params"]["layers_0"]
    assert_close(actual["kernel"], kernel * scale, ulps=2, dtype=np.float32)
    assert_close(actual["bias"], bias, ulps=2, dtype=np.float32)


def test_layers_under_scan_stay_as_they_are():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return BatchNorm(True)(WSConv(6, (3, 3))(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = NORM()(WSConv(6, (3, 3))(x))
            scan = nn.scan(
                Block,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scan()(x, None)[0]

    model = Deep()
    folded = assert_folds(model, variables_of(model), ulps=1024)
    assert set(folded.convolutions) == {("WSConv_0",)}


def test_layers_under_remat_fold():
    class Net2(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Net)((WSConv(6, (3, 3)), BatchNorm(True)))(x)

    model = Net2()
    folded = assert_folds(model, variables_of(model))
    assert len(folded.norms) == 1


def test_mixed_precision_folds_as_precisely():
    """Compared with float32, the folded network is about as accurate as the unfolded one."""

    def network(dtype):
        layers = ()
        for _ in range(3):
            layers += (WSConv(6, (3, 3), dtype=dtype), NORM(dtype=dtype), nn.relu)
        return Net((*layers, lambda x: x.astype(jnp.float32).mean((1, 2)), nn.Dense(5)))

    variables = variables_of(network(jnp.float32))
    exact = network(jnp.float32).apply(variables, IMAGES)
    folded = fold(network(jnp.bfloat16), variables, IMAGES)
    assert len(folded.norms) == 3
    size = np.abs(exact).max()
    errors = [
        np.abs(np.asarray(y) - exact).max() / size
        for y in (
            folded.apply(folded.variables, IMAGES),
            network(jnp.bfloat16).apply(variables, IMAGES),
        )
    ]
    assert max(errors) < 32 * 2**-8  # three layers, of 54 products each


@nn.jit
class Compiled(nn.Module):
    """Compiled once, for all that call it with variables of this structure."""

    @nn.compact
    def __call__(self, x):
        return NORM()(WSConv(6, (3, 3))(x)) + WSConv(6, (1, 1), name="alone")(x)


def test_modules_that_are_compiled_already_are_traced_again():
    """What was compiled for the folded network is not used for the other, or the reverse."""
    model = Net((Compiled(),))
    variables = variables_of(model)
    expected = model.apply(variables, IMAGES)
    recalibrated = []
    for _ in range(2):
        folded = fold(model, variables, IMAGES)
        assert len(folded.convolutions) == 2
        assert len(folded.norms) == 1
        actual = folded.apply(folded.variables, IMAGES)
        assert_close(actual, expected, ulps=256, dtype=np.float32)
        assert (model.apply(variables, IMAGES) == expected).all()
        recalibrated.append(recalibrate(model, variables, [IMAGES]))
    jax.tree.map(np.testing.assert_array_equal, *recalibrated)


def test_a_layer_alone_folds():
    layer = WSConv(6, (3, 3))
    assert_folds(layer, variables_of(layer))


def test_the_mask_still_masks_and_the_type_is_still_the_norms():
    class Masked(nn.Module):
        dtype: Any = jnp.float32

        @nn.compact
        def __call__(self, x, mask):
            x = WSConv(6, (3, 3), dtype=self.dtype)(x)
            x = NORM(dtype=jnp.float32)(x, mask=mask)
            return BatchNorm(True, dtype=jnp.float32)(nn.Conv(6, (3, 3), dtype=self.dtype)(x))

    mask = jnp.asarray(RNG.random((4, 5, 5, 1)) < 0.5)
    variables = variables_of(Masked(), mask=mask)
    folded = fold(Masked(), variables, IMAGES, mask)
    actual = folded.apply(folded.variables, IMAGES, mask)
    expected = Masked().apply(variables, IMAGES, mask)
    assert_close(actual, expected, ulps=1024, dtype=np.float32)
    narrow = fold(Masked(jnp.bfloat16), variables, IMAGES, mask)
    apply = partial(narrow.apply, narrow.variables)
    assert jax.eval_shape(lambda: apply(x=IMAGES, mask=mask)).dtype == jnp.float32


def test_a_norm_of_another_axis_stays():
    model = Net((WSConv(6, (3, 3)), BatchNorm(True, axis=1)))
    assert assert_folds(model, variables_of(model)).norms == frozenset()


def test_boxes_are_opened_and_other_collections_are_kept():
    init = nn.with_partitioning(nn.initializers.normal(), (None, None, None, "model"))
    model = Net((WSConv(6, (3, 3), kernel_init=init), NORM()))
    variables = {**variables_of(model), "other": {"a": jnp.ones(2)}}
    folded = fold(model, variables, IMAGES)
    assert isinstance(folded.variables["params"]["layers_0"]["kernel"], jax.Array)
    assert (folded.variables["other"]["a"] == 1).all()


def test_training_is_refused():
    model = Net((WSConv(6, (3, 3)), NORM(use_running_average=False)))
    with pytest.raises(ValueError, match="layers_1 was in training"):
        fold(model, variables_of(model), IMAGES)


def test_bfloat16_parameters_round_once():
    conv = WSConv(6, (3, 3), param_dtype=jnp.bfloat16)
    model = Net((conv, NORM(param_dtype=jnp.bfloat16)))
    x = IMAGES.astype(jnp.bfloat16)
    folded = assert_folds(model, variables_of(model, x), x, ulps=8)
    assert {v.dtype for v in jax.tree.leaves(folded.variables)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("form", ["unfolded", "folded"])
def test_it_exports(form):
    """Saved as StableHLO and loaded, both give what they give here; for any number of images."""
    model = SMALL_VGG
    variables = variables_of(model, train=False)
    if form == "folded":
        model = fold(model, variables, IMAGES, train=False)
        variables = model.variables
    forward = jax.jit(partial(model.apply, train=False))
    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *IMAGES.shape[1:]), jnp.float32)
    exported = export.export(forward)(jax.eval_shape(lambda: variables), images)
    loaded = export.deserialize(exported.serialize())
    np.testing.assert_allclose(
        loaded.call(variables, IMAGES), forward(variables, IMAGES), rtol=1e-5, atol=1e-5
    )


DEEP = Net((nn.Conv(6, (3, 3)), NORM(), nn.relu, nn.Conv(6, (3, 3)), BatchNorm(True), nn.relu))


@cache
def recalibrated():
    """The variables of `DEEP`, before and after."""
    variables = variables_of(DEEP)
    return variables, recalibrate(DEEP, variables, [IMAGES])


def inputs_of_norms(model, variables, x, **call):
    """What each batch norm measures in evaluation, by its path."""
    seen = {}

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, BatchNorm) and context.method_name == "affine":
            seen[context.module.path] = args[0]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(variables, x, **call)
    return seen


class TestRecalibration:
    def test_after_one_batch_the_input_of_every_norm_has_the_stored_moments(self):
        """In evaluation, on that batch."""
        _, variables = recalibrated()
        for path, m in inputs_of_norms(DEEP, variables, IMAGES).items():
            stats = variables["batch_stats"]
            for name in path:
                stats = stats[name]
            mean = m.mean_from_zero.mean(0)
            var = (m.var + (m.mean_from_zero - mean[None]) ** 2).mean(0)
            assert_close(stats["mean"], mean, ulps=64, dtype=np.float32, scale=1)
            assert_close(stats["var"], var, ulps=64, dtype=np.float32)

    @pytest.mark.parametrize("variance", ["biased", "unbiased", "around_running_mean"])
    def test_several_batches_average_by_their_samples(self, variance):
        layer = BatchNorm(True, running_variance=variance)
        x = np.asarray(RNG.normal(3, 2, (6, 5, 4)), np.float64)
        batches = [x[:1], x[1:3], x[3:]]
        variables = variables_of(layer, jnp.asarray(x, jnp.float32))
        stats = recalibrate(layer, variables, [jnp.asarray(b, jnp.float32) for b in batches])
        stats = stats["batch_stats"]
        expected = {
            "biased": sum(len(b) * b.var((0, 1)) for b in batches) / 6,
            "unbiased": sum(len(b) * b.reshape(-1, 4).var(0, ddof=1) for b in batches) / 6,
            "around_running_mean": x.var((0, 1)),
        }[variance]
        assert_close(stats["mean"], x.mean((0, 1)), ulps=16, dtype=np.float32)
        assert_close(stats["var"], expected, ulps=16, dtype=np.float32)

    def test_a_norm_that_is_called_twice_averages_over_both(self):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x):
                norm = BatchNorm(True, name="norm")
                return norm(x) + norm(3 * x)

        variables = recalibrate(Twice(), variables_of(Twice()), [IMAGES[:1], IMAGES[1:]])
        mean = variables["batch_stats"]["norm"]["mean"]
        assert_close(mean, 2 * IMAGES.mean((0, 1, 2)), ulps=16, dtype=np.float32)

    def test_layers_under_scan_each_have_their_own(self):
        """Where the statistics of many layers are stored as one."""

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(4)(BatchNorm(True)(x)), None

        scan = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )()
        x = IMAGES[:, 0]
        variables = recalibrate(scan, jax.jit(scan.init)(jax.random.key(0), x, None), [(x, None)])
        for i in range(3):
            layer = jax.tree.map(lambda v, i=i: v[i], variables)
            stats = layer["batch_stats"]["BatchNorm_0"]
            assert_close(stats["mean"], x.mean((0, 1)), ulps=64, dtype=np.float32, scale=1)
            assert_close(stats["var"], x.var((0, 1)), ulps=64, dtype=np.float32)
            x, _ = jax.jit(Block().apply)(layer, x, None)

    def test_arguments_that_are_not_arrays_are_passed_on(self):
        class Flagged(nn.Module):
            @nn.compact
            def __call__(self, x, train):
                return BatchNorm(not train)(x)

        variables = variables_of(Flagged(), train=False)
        stats = recalibrate(Flagged(), variables, [(IMAGES, False), (IMAGES, True)])
        mean = stats["batch_stats"]["BatchNorm_0"]["mean"]
        assert_close(mean, IMAGES.mean((0, 1, 2)), ulps=16, dtype=np.float32)

    def test_norms_that_are_not_called_and_norms_of_flax_keep_their_statistics(self):
        """Even NaN; and even if Flax's norm is in training."""

        class Mixed(nn.Module):
            @nn.compact
            def __call__(self, x, reach):
                x = nn.BatchNorm(use_running_average=False, name="foreign")(x)
                if reach:
                    x = BatchNorm(True, name="unused")(x)
                return BatchNorm(True, name="used")(x)

        variables = variables_of(Mixed(), reach=True)
        variables["batch_stats"]["unused"]["mean"] += jnp.nan
        stats = recalibrate(Mixed(), variables, [(IMAGES, False)])["batch_stats"]
        for name in ("foreign", "unused"):
            jax.tree.map(np.testing.assert_array_equal, stats[name], variables["batch_stats"][name])
        assert (stats["used"]["var"] != variables["batch_stats"]["used"]["var"]).all()

    def test_masked_values_do_not_count(self):
        class Masked(nn.Module):
            @nn.compact
            def __call__(self, x, mask):
                return BatchNorm(True)(x, mask=mask)

        mask = jnp.ones((4, 1, 1, 1), bool)
        variables = variables_of(Masked(), mask=mask)
        batches = [(IMAGES + 5, ~mask), (IMAGES, mask.at[0].set(False)), (IMAGES + 7, ~mask)]
        stats = recalibrate(Masked(), variables, batches)["batch_stats"]["BatchNorm_0"]
        assert_close(stats["mean"], IMAGES[1:].mean((0, 1, 2)), ulps=16, dtype=np.float32)
        assert_close(stats["var"], IMAGES[1:].var((0, 1, 2)), ulps=16, dtype=np.float32)

    def test_narrow_statistics_average_as_wide_ones(self):
        """In bfloat16 a count of 256 would stay there, and the average forget what was before."""
        layer = BatchNorm(True)
        x = np.arange(1024, dtype=np.float32).reshape(1024, 1)
        variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables_of(layer, x))
        stats = recalibrate(layer, variables, list(x.reshape(128, 8, 1)))["batch_stats"]
        assert stats["mean"].dtype == jnp.bfloat16
        assert_close(stats["mean"], x.mean(0), ulps=1, dtype=jnp.bfloat16)

    def test_old_statistics_are_discarded(self):
        """Even NaN."""
        variables, expected = recalibrated()
        with_nan = jax.tree.map(lambda s: jnp.full_like(s, jnp.nan), variables["batch_stats"])
        actual = recalibrate(DEEP, {**variables, "batch_stats": with_nan}, [IMAGES])
        jax.tree.map(np.testing.assert_array_equal, actual, expected)

    def test_only_the_statistics_change_and_in_a_copy(self):
        variables, after = recalibrated()
        before = variables_of(DEEP)
        jax.tree.map(np.testing.assert_array_equal, variables, before)
        jax.tree.map(np.testing.assert_array_equal, after["params"], before["params"])
        changed = jax.tree.map(
            lambda a, b: (a != b).any(), after["batch_stats"], before["batch_stats"]
        )
        assert all(jax.tree.leaves(changed))

    def test_a_model_takes_its_other_arguments(self):
        class Two(nn.Module):
            @nn.compact
            def __call__(self, x, y, train):
                return BatchChannelNorm(num_groups=2, use_running_average=not train)(x + y)

        model = Two()
        variables = variables_of(model, y=IMAGES, train=False)
        for train in (False, True):
            stats = recalibrate(model, variables, [(IMAGES, 2 * IMAGES)], train=train)
            mean = stats["batch_stats"]["BatchChannelNorm_0"]["batch_norm"]["mean"]
            assert_close(mean, 3 * IMAGES.mean((0, 1, 2)), ulps=16, dtype=np.float32)

    def test_a_network_trained_by_micro_batches_evaluates_better(self):
        """Recalibrated statistics fit the data, even from their initial values."""
        model = BatchChannelNorm(num_groups=1, use_running_average=True)
        x = RNG.normal(1, 2, (4, 8, 8, 3)) * [1, 10, 100] + 50
        x = x.astype(np.float32)
        variables = recalibrate(model, jax.jit(model.init)(jax.random.key(0), x), list(x[:, None]))
        y = np.asarray(jax.jit(model.apply)(variables, x))
        assert np.abs(y.mean((0, 1, 2))).max() < 0.05
        assert np.abs(y.std((0, 1, 2)) - 1).max() < 0.2

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_a_batch_that_is_not_finite_is_refused(self, bad):
        batches = [IMAGES, IMAGES.at[0, 0, 0, 0].set(bad)]
        with pytest.raises(ValueError, match="infinite or NaN"):
            recalibrate(DEEP, variables_of(DEEP), batches)

    @pytest.mark.parametrize("batches", [[], IMAGES])
    def test_no_batches_are_refused(self, batches):
        with pytest.raises(ValueError, match=r"at least one batch|one array of shape"):
            recalibrate(DEEP, variables_of(DEEP), batches)

    def test_a_model_without_such_norms_is_refused(self):
        model = Net((nn.Conv(4, (3, 3)),))
        with pytest.raises(ValueError, match="norms of this library"):
            recalibrate(model, variables_of(model), [IMAGES])
