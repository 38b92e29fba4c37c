"""Conversion and recalibration of NNX models, and folding beyond test_folding.py.

Here too all tests have the same few shapes, images of 4 channels and layers of 6, for which each
operation that runs eagerly compiles once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from sklearn.datasets import load_digits

from bcn_flax.linen import BatchChannelNorm as LinenBatchChannelNorm
from bcn_flax.nnx import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    WSConv,
)
from bcn_flax.surgery import linen
from bcn_flax.surgery.nnx import convert_batch_norm, fold, recalibrate
from parity_tests import surgery
from parity_tests.surgery import Network
from parity_tests.tolerances import assert_close

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(1, 2, (4, 5, 5, 4)), jnp.float32)
forward = nnx.jit(lambda model, x: model(x))


class CNN(nnx.Module):
    """Written for `nnx.BatchNorm`: a residual block, named so that order does not give it away."""

    def __init__(self, in_features=4, width=6, *, rngs):
        self.b_conv = nnx.Conv(in_features, width, (3, 3), rngs=rngs)
        self.a_norm = nnx.BatchNorm(width, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs),
                nnx.BatchNorm(width, momentum=0.8, epsilon=1e-3, rngs=rngs),
                nnx.Conv(width, width, (1, 1), rngs=rngs),
            ]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.a_norm(self.b_conv(x)))
        y = nnx.relu(self.layers[1](self.layers[0](x)))
        x = x + self.layers[2](y)
        return self.fc(self.dropout(x.mean((1, 2))))


def randomized(model):
    """With no parameter or statistic at its initial value."""
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    draw = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), state)
    nnx.update(model, draw)
    return model


def snapshot(model):
    return jax.tree.map(np.array, nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def assert_unchanged(model, before):
    jax.tree.map(np.testing.assert_array_equal, snapshot(model), before)


class TestConversion:
    def test_parameters_statistics_and_arguments_are_carried_over(self):
        model = randomized(CNN(rngs=nnx.Rngs(0)))
        before = snapshot(model)
        converted = convert_batch_norm(model, IMAGES, num_groups=2)
        assert_unchanged(model, before)
        kinds = [type(m) for m in (converted.b_conv, converted.a_norm, *converted.layers)]
        assert kinds == [WSConv, BatchChannelNorm, WSConv, BatchChannelNorm, nnx.Conv]
        for old, new in ((model.a_norm, converted.a_norm), (model.layers[1], converted.layers[1])):
            for name in ("scale", "bias", "mean", "var"):
                carried, original = getattr(new.batch_norm, name), getattr(old, name)
                assert type(carried) is type(original)
                np.testing.assert_array_equal(carried[...], original[...])
            assert new.batch_norm.momentum == old.momentum
            assert new.batch_norm.epsilon == new.channel_norm.epsilon == old.epsilon
            assert new.channel_norm.num_groups == 2
        assert not converted.layers[0].use_bias
        np.testing.assert_array_equal(converted.b_conv.kernel[...], model.b_conv.kernel[...])

    def test_the_copy_shares_nothing_with_the_original(self):
        model = CNN(rngs=nnx.Rngs(0))
        before = snapshot(model)
        converted = convert_batch_norm(model, IMAGES, num_groups=2)
        nnx.update(converted, jax.tree.map(jnp.zeros_like, nnx.state(converted, nnx.Param)))
        converted.train()
        forward(converted, IMAGES)
        assert_unchanged(model, before)

    def test_it_computes_what_its_parts_say(self):
        """Evaluation by hand, of a convolution and a norm."""
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Conv(4, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, rngs=rngs))
        randomized(model).eval()
        converted = convert_batch_norm(model, IMAGES, num_groups=2, ws=False)
        normalized = ChannelNorm(6, num_groups=2, rngs=rngs)(forward(model, IMAGES))
        assert_close(forward(converted, IMAGES), normalized, ulps=64, dtype=np.float32)

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_the_mode_is_kept(self, mode):
        model = CNN(rngs=nnx.Rngs(0))
        getattr(model, mode)()
        converted = convert_batch_norm(model, IMAGES, num_groups=2)
        assert converted.a_norm.use_running_average == (mode == "eval")

    def test_leave_leaves_modules_unchanged(self):
        converted = convert_batch_norm(
            CNN(rngs=nnx.Rngs(0)),
            IMAGES,
            num_groups=2,
            leave=lambda path, module: path in ("a_norm", "layers/0"),
        )
        kinds = [type(m) for m in (converted.b_conv, converted.a_norm, *converted.layers)]
        assert kinds == [nnx.Conv, nnx.BatchNorm, nnx.Conv, BatchChannelNorm, nnx.Conv]

    def test_groups_are_chosen_to_divide(self):
        norm = nnx.BatchNorm(24, rngs=nnx.Rngs(0))
        converted = convert_batch_norm(norm, num_groups=None, ws=False)
        assert converted.channel_norm.num_groups == 12  # of 2 channels

    def test_a_shared_norm_stays_shared(self):
        class Shared(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Conv(4, 6, (3, 3), rngs=rngs)
                self.second = nnx.Conv(6, 6, (3, 3), rngs=rngs)
                self.norm = nnx.BatchNorm(6, rngs=rngs)
                self.again = self.norm

            def __call__(self, x):
                return self.again(self.second(self.norm(self.first(x))))

        converted = convert_batch_norm(Shared(nnx.Rngs(0)), IMAGES, num_groups=2)
        assert isinstance(converted.norm, BatchChannelNorm)
        assert converted.norm is converted.again

    def test_a_norm_alone_is_converted(self):
        converted = convert_batch_norm(nnx.BatchNorm(6, rngs=nnx.Rngs(0)), num_groups=2, ws=False)
        assert isinstance(converted, BatchChannelNorm)

    def test_a_convolution_before_a_norm_of_another_axis_stays(self):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Conv(4, 6, (3, 3), rngs=rngs), nnx.BatchNorm(5, axis=1, rngs=rngs)
        )
        converted = convert_batch_norm(model, IMAGES, num_groups=None)
        assert [type(m) for m in converted.layers] == [nnx.Conv, BatchChannelNorm]

    def test_missing_scales_and_biases_are_added(self):
        bare = nnx.BatchNorm(6, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        converted = convert_batch_norm(bare, num_groups=2, ws=False)
        assert (converted.batch_norm.scale[...] == jnp.ones(6)).all()
        assert (converted.channel_norm.bias[...] == jnp.zeros(2)).all()

    def test_a_convolution_that_is_called_twice_is_converted_too(self):
        class Twice(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
                self.norm = nnx.BatchNorm(4, rngs=rngs)

            def __call__(self, x):
                return self.norm(self.conv(self.norm(self.conv(x))))

        converted = convert_batch_norm(Twice(nnx.Rngs(0)), IMAGES, num_groups=1)
        assert type(converted.conv) is WSConv

    def test_all_that_cannot_be_converted_is_listed_and_nothing_is(self):
        model = CNN(rngs=nnx.Rngs(0))
        before = snapshot(model)
        with pytest.raises(ValueError, match="Every module") as caught:
            convert_batch_norm(model, IMAGES, num_groups=4)
        complaint = (
            "num_groups must divide the number of channels into groups of two or more, because a "
            "channel norm of single channels undoes what the batch norm has learned, but "
            "num_groups=4 and there are 6 channels. Any of 1, 2, 3 would do, and num_groups=None "
            "chooses for each norm."
        )
        assert str(caught.value) == (
            "Every module that is to be converted must allow it, but:\n"
            f"  a_norm: {complaint}\n"
            f"  layers/1: {complaint}\n"
            "Give other arguments, or leave these modules as they are, with the argument leave."
        )
        assert_unchanged(model, before)

    def test_no_group_has_a_single_channel(self):
        norm = nnx.BatchNorm(32, rngs=nnx.Rngs(0))
        assert convert_batch_norm(norm, ws=False).channel_norm.num_groups == 16
        with pytest.raises(ValueError, match=r"num_groups=32 and there are 32 .*num_groups=None"):
            convert_batch_norm(norm, ws=False, num_groups=32)

    def test_subclasses_and_stacked_norms_are_refused(self):
        class WithActivation(nnx.BatchNorm):
            def __call__(self, x):
                return nnx.relu(super().__call__(x))

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.BatchNorm(6, rngs=rngs)

        for model, complaint in (
            (WithActivation(6, rngs=nnx.Rngs(0)), "whose code would be lost"),
            (make(nnx.Rngs(0)), "they have 2 axes"),
        ):
            with pytest.raises(ValueError, match=complaint):
                convert_batch_norm(model, num_groups=2, ws=False)

    def test_arguments_reach_the_norm_and_what_a_convolution_had_stays_its_own(self):
        def promote(values, **kwargs):
            return nnx.nn.dtypes.promote_dtype(values, **kwargs)

        rngs = nnx.Rngs(0)
        conv = nnx.Conv(
            4, 6, (3, 3), promote_dtype=promote, kernel_metadata={"note": "mine"}, rngs=rngs
        )
        model = nnx.Sequential(conv, nnx.BatchNorm(6, axis_name="devices", rngs=rngs))
        model.eval()
        converted = convert_batch_norm(model, IMAGES, num_groups=2, estimate=False, momentum=0.5)
        batch_norm = converted.layers[1].batch_norm
        assert type(batch_norm) is BatchNorm
        assert (batch_norm.momentum, batch_norm.axis_name) == (0.5, "devices")
        for network in (converted, fold(converted, IMAGES)):
            held = network.layers[0]
            assert held.kernel.get_metadata("note") == "mine"
            assert vars(held).get("promote_dtype", vars(held).get("_promote_dtype")) is promote

    def test_a_single_weight_cannot_be_standardized(self):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(
            nnx.Conv(4, 4, (1, 1), feature_group_count=4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        )
        with pytest.raises(ValueError, match=r"layers/0: .*at least 2 weights"):
            convert_batch_norm(model, IMAGES, num_groups=2)

    def test_a_convolution_inside_of_a_condition_is_standardized(self):
        def call(model, x):
            return nnx.cond(x.sum() > 0, lambda m, x: m.norm(m.conv(x)), lambda _, x: x, model, x)

        converted = convert_batch_norm(Network(call), surgery.IMAGES, num_groups=2)
        assert type(converted.conv) is WSConv

    def test_an_example_is_needed_to_see_what_comes_before(self):
        with pytest.raises(ValueError, match=r"example input is needed.*ws=False"):
            convert_batch_norm(CNN(rngs=nnx.Rngs(0)), num_groups=2)

    def test_a_model_without_batch_norms_is_refused(self):
        with pytest.raises(ValueError, match=r"must have an nnx\.BatchNorm"):
            convert_batch_norm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))

    def test_a_converted_network_trains(self):
        """On digits, in batches of 4, with falling loss."""
        model = CNN(1, 24, rngs=nnx.Rngs(0))
        digits, labels = load_digits(return_X_y=True)
        x = jnp.asarray(digits[:32].reshape(8, 4, 8, 8, 1) / 16, jnp.float32)
        y = jnp.asarray(labels[:32].reshape(8, 4))
        model = convert_batch_norm(model, x[0], num_groups=8)
        recalibrate(model, list(x))
        model.train()
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            def loss_of(model):
                logits = model(x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            loss, gradients = nnx.value_and_grad(loss_of)(model)
            optimizer.update(model, gradients)
            return loss

        losses = [step(model, optimizer, x[i % 8], y[i % 8]) for i in range(80)]
        assert np.mean(losses[-8:]) < 0.6 * np.mean(losses[:8])


def row(*layers):
    return nnx.Sequential(*layers)


def norm(rngs, **kwargs):
    return BatchChannelNorm(6, num_groups=2, rngs=rngs, **kwargs)


class TestFolding:
    def test_a_converted_network_folds_and_exports(self):
        model = convert_batch_norm(randomized(CNN(rngs=nnx.Rngs(0))), IMAGES, num_groups=2)
        model.eval()
        for form in (model, fold(model, IMAGES)):
            graphdef, state = nnx.split(form)
            evaluate = jax.jit(lambda state, x, g=graphdef: nnx.merge(g, state)(x))
            exported = export.export(evaluate)(state, IMAGES)
            expected = model(IMAGES)
            assert_close(exported.call(state, IMAGES), expected, ulps=1024, dtype=np.float32)

    def test_layers_that_are_stored_as_one_stay(self):
        class Deep(nnx.Module):
            def __init__(self, rngs):
                @nnx.split_rngs(splits=2)
                @nnx.vmap(in_axes=(0,), out_axes=0)
                def make(rngs):
                    return row(WSConv(4, 4, (3, 3), rngs=rngs), nnx.relu)

                self.stacked = make(rngs)
                self.conv, self.norm = WSConv(4, 6, (3, 3), rngs=rngs), norm(rngs)

            def __call__(self, x):
                @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
                def layers(layer, x):
                    return layer(x)

                return self.norm(self.conv(layers(self.stacked, x)))

        model = randomized(Deep(nnx.Rngs(0)))
        folded = fold(model, IMAGES)
        assert type(folded.stacked.layers[0]) is WSConv
        assert type(folded.norm) is ChannelNorm
        model.eval()
        assert_close(folded(IMAGES), model(IMAGES), ulps=1024, dtype=np.float32)

    def test_the_result_has_not_run(self):
        class Counting(nnx.Module):
            def __init__(self, rngs):
                self.conv, self.norm = WSConv(4, 6, (3, 3), rngs=rngs), norm(rngs)
                self.count = nnx.Variable(jnp.zeros(()))

            def __call__(self, x, evaluate):
                self.count[...] += 1
                return self.norm(self.conv(x)) if evaluate else x

        folded = fold(Counting(nnx.Rngs(0)), IMAGES, True)  # a flag is no array
        assert folded.count[...] == 0
        assert type(folded.norm) is ChannelNorm


class TestRecalibration:
    def test_it_is_that_of_linen(self):
        """Bit for bit, over batches of unequal size."""
        model = BatchChannelNorm(4, num_groups=2, rngs=nnx.Rngs(0))
        layer = LinenBatchChannelNorm(True, num_groups=2)
        batches = [IMAGES, 3 * IMAGES[:1]]
        recalibrate(model, batches)
        variables = jax.jit(layer.init)(jax.random.key(0), IMAGES)
        stats = linen.recalibrate(layer, variables, batches)["batch_stats"]["batch_norm"]
        np.testing.assert_array_equal(model.batch_norm.mean[...], stats["mean"])
        np.testing.assert_array_equal(model.batch_norm.var[...], stats["var"])

    def test_all_but_the_statistics_stays(self):
        """Parameters, mode, random state; dropout does not disturb."""
        model = convert_batch_norm(randomized(CNN(rngs=nnx.Rngs(0))), IMAGES, num_groups=2)
        graphdef, _, rest = nnx.split(model, nnx.BatchStat, ...)
        recalibrate(model, [IMAGES, IMAGES])
        after_graphdef, stats, after = nnx.split(model, nnx.BatchStat, ...)
        assert after_graphdef == graphdef
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(*map(_data, (a, b))), after, rest)
        recalibrate(model, [IMAGES])
        assert jax.tree.leaves(stats)
        jax.tree.map(
            lambda a, b: assert_close(a, b, ulps=16, dtype=np.float32),
            nnx.state(model, nnx.BatchStat),
            stats,
        )

    def test_a_norm_that_is_called_twice_averages_over_both(self):
        class Twice(nnx.Module):
            def __init__(self):
                self.norm = BatchNorm(4, rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.norm(x) + self.norm(3 * x)

        model = Twice()
        recalibrate(model, [IMAGES[:1], IMAGES[1:]])
        expected = 2 * IMAGES.mean((0, 1, 2))
        assert_close(model.norm.mean[...], expected, ulps=16, dtype=np.float32)

    @pytest.mark.parametrize("batches", [[], IMAGES, [IMAGES, IMAGES.at[0].set(jnp.nan)]])
    def test_after_an_error_nothing_has_changed(self, batches):
        model = randomized(BatchChannelNorm(4, num_groups=2, rngs=nnx.Rngs(0)))
        before = snapshot(model)
        with pytest.raises(
            ValueError, match=r"at least one batch|infinite or NaN|one array of shape"
        ):
            recalibrate(model, batches)
        assert_unchanged(model, before)

    def test_a_model_without_such_norms_is_refused(self):
        with pytest.raises(ValueError, match="must reach norms of this library"):
            recalibrate(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), [jnp.ones((1, 3))])


def _data(value):
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
