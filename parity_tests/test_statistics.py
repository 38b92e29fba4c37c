"""When the running estimates move, when they do not, and what type they have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export, lax

from bcn_flax import BatchChannelNorm, BatchNorm, ChannelNorm, EstimatedBatchNorm
from bcn_flax.affine import Moments
from bcn_flax.models import VGG
from bcn_flax.norms import moving_average
from parity_tests.tolerances import assert_close

LAYERS = [
    BatchNorm(use_running_average=False),
    EstimatedBatchNorm(use_running_average=False),
    BatchChannelNorm(num_groups=2, use_running_average=False),
    BatchChannelNorm(num_groups=2, use_running_average=False, estimate=False),
]


def data(shape=(4, 5, 3, 4)):
    return jnp.asarray(np.random.default_rng(0).normal(5, 2, shape), jnp.float32)


def stats_after(layer, variables, x, **kwargs):
    return layer.apply(variables, x, mutable=["batch_stats"], **kwargs)[1]["batch_stats"]


def moments_of(value, n=1):
    return Moments(jnp.full((1, 3), value), jnp.full((1, 3), 2 * value), jnp.full((1, 3), n))


def test_moving_average_weighs_the_old_value_by_momentum():
    updated = moving_average(moments_of(1.0), moments_of(2.0), 0.75)
    np.testing.assert_array_equal(updated.mean, np.full((1, 3), 1.25))
    np.testing.assert_array_equal(updated.var, np.full((1, 3), 2.5))


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 2.0), (1.0, 1.0)])
def test_moving_average_may_forget_all_or_nothing(momentum, expected):
    updated = moving_average(moments_of(1.0), moments_of(2.0), momentum)
    np.testing.assert_array_equal(updated.mean, np.full((1, 3), expected))


def test_moving_average_keeps_what_it_has_where_nothing_counts():
    batch = moments_of(2.0)._replace(size=jnp.asarray([[1.0, 0.0, 1.0]]))
    updated = moving_average(moments_of(1.0), batch, 0.5)
    np.testing.assert_array_equal(updated.mean, [[1.5, 1.0, 1.5]])


def test_moving_average_has_no_gradient():
    gradient = jax.grad(lambda v: moving_average(moments_of(1.0), moments_of(v), 0.5).var.sum())
    assert gradient(3.0) == 0


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
class TestWhenTheyMove:
    def test_in_training(self, layer):
        x = data()
        variables = layer.init(jax.random.key(0), x)
        stats = stats_after(layer, variables, x)
        stats = stats.get("batch_norm", stats)
        axes = (0, 1, 2)
        assert_close(stats["mean"], 0.1 * x.mean(axes), ulps=8, dtype=np.float32)
        assert_close(stats["var"], 0.9 + 0.1 * x.var(axes), ulps=8, dtype=np.float32)

    def test_not_while_initializing(self, layer):
        stats = layer.init(jax.random.key(0), data())["batch_stats"]
        stats = stats.get("batch_norm", stats)
        assert (stats["mean"] == 0).all()
        assert (stats["var"] == 1).all()

    def test_not_in_evaluation(self, layer):
        variables = layer.init(jax.random.key(0), data())
        after = stats_after(layer, variables, data(), use_running_average=True)
        jax.tree.map(np.testing.assert_array_equal, after, variables["batch_stats"])

    def test_not_when_everything_is_masked(self, layer):
        """Not even by NaN in what is masked; and the output stays finite where the input is."""
        variables = layer.init(jax.random.key(0), data())
        mask = jnp.zeros((4, 1, 1, 1), bool)
        after = stats_after(layer, variables, jnp.full_like(data(), jnp.nan), mask=mask)
        jax.tree.map(np.testing.assert_array_equal, after, variables["batch_stats"])
        y, _ = layer.apply(variables, data(), mask=mask, mutable=["batch_stats"])
        assert np.isfinite(y).all()

    def test_masked_samples_might_as_well_not_be_there(self, layer):
        x = data()
        variables = layer.init(jax.random.key(0), x)
        mask = jnp.asarray([True, False, True, True]).reshape(4, 1, 1, 1)
        x_nan = x.at[1].set(jnp.nan)
        y, updates = layer.apply(variables, x_nan, mask=mask, mutable=["batch_stats"])
        kept = x[jnp.asarray([0, 2, 3])]
        expected, expected_updates = layer.apply(variables, kept, mutable=["batch_stats"])
        # The pivot differs (all that counts, against a coarse grid of it): a few roundings.
        assert_close(y[jnp.asarray([0, 2, 3])], expected, ulps=16, dtype=np.float32)
        jax.tree.map(
            lambda a, e: assert_close(a, e, ulps=16, dtype=np.float32), updates, expected_updates
        )

    def test_the_gradient_ignores_what_is_masked(self, layer):
        """Whatever lies behind the mask, NaN too, the gradients are those without it."""
        x = data()
        variables = layer.init(jax.random.key(0), x)
        mask = jnp.asarray([True, False, True, True]).reshape(4, 1, 1, 1)

        def loss(params, x, **kwargs):
            now = {**variables, "params": params}
            y, _ = layer.apply(now, x, mutable=["batch_stats"], **kwargs)
            kept = jnp.where(mask, y, 0) if kwargs else y
            return jnp.sum(jnp.sin(kept))

        gradients = jax.grad(loss, argnums=(0, 1))
        kept = jnp.asarray([0, 2, 3])
        in_params, in_x = gradients(variables["params"], x.at[1].set(jnp.nan), mask=mask)
        expected = gradients(variables["params"], x[kept])
        # Sums of 60 terms of size 1 at the most.
        jax.tree.map(
            lambda a, e: assert_close(a, e, ulps=64, dtype=np.float32, scale=8),
            (in_params, in_x[kept]),
            expected,
        )

    def test_with_the_next_batch_the_output_follows(self, layer):
        """Evaluation uses exactly what training stored."""
        variables = layer.init(jax.random.key(0), data())
        y, updates = layer.apply(variables, data(), mutable=["batch_stats"])
        evaluated = layer.apply({**variables, **updates}, data(), use_running_average=True)
        estimated = isinstance(layer, EstimatedBatchNorm) or getattr(layer, "estimate", False)
        assert (y == evaluated).all() == estimated


@pytest.mark.parametrize(
    ("param_dtype", "stored"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_statistics_are_float32_or_wider(dtype, param_dtype, stored):
    layer = BatchChannelNorm(num_groups=2, param_dtype=param_dtype, use_running_average=False)
    x = data().astype(dtype)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    stats = stats_after(layer, variables, x)
    assert {s.dtype for s in jax.tree.leaves(stats)} == {jnp.dtype(stored)}
    assert {p.dtype for p in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
    assert y.dtype == jnp.promote_types(dtype, param_dtype)


def test_statistics_are_float64_where_the_parameters_are(x64):
    layer = BatchChannelNorm(num_groups=2, param_dtype=jnp.float64, use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.asarray(data(), jnp.float64))
    assert {s.dtype for s in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float64)}


def test_evaluation_in_bfloat16_does_not_round_the_statistics():
    """At mean 100 and deviation 0.1 a bfloat16 mean would be off by several deviations."""
    layer = BatchNorm(use_running_average=True, dtype=jnp.bfloat16)
    x = jnp.full((1, 4), 100.5, jnp.bfloat16)
    stats = {"mean": jnp.full(4, 100.3), "var": jnp.full(4, 0.01)}
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    y = layer.apply({"params": params, "batch_stats": stats}, x)
    expected = (100.5 - 100.3) / np.sqrt(0.01 + 1e-5)
    assert_close(y, np.full((1, 4), expected), ulps=1, dtype=jnp.bfloat16)


def test_scale_and_bias_can_be_left_out():
    layer = BatchChannelNorm(
        num_groups=2, use_running_average=False, use_scale=False, use_bias=False
    )
    full = BatchChannelNorm(num_groups=2, use_running_average=False)
    y, variables = layer.init_with_output(jax.random.key(0), data())
    assert "params" not in variables
    np.testing.assert_array_equal(y, full.init_with_output(jax.random.key(0), data())[0])


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("make", [nn.BatchNorm, BatchNorm])
def test_the_result_has_the_type_that_flax_gives_it(make, learned):
    layer = make(use_running_average=False, use_scale=learned, use_bias=learned)
    y, _ = layer.init_with_output(jax.random.key(0), data().astype(jnp.bfloat16))
    assert y.dtype == (jnp.float32 if learned else jnp.bfloat16)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [1, 2, -2])
@pytest.mark.parametrize("layer", [*LAYERS, ChannelNorm(2)], ids=lambda layer: type(layer).__name__)
def test_channels_may_lie_along_any_axis_but_the_first(layer, axis, masked):
    x = data((3, 4, 5, 6))
    mask = jnp.asarray(np.random.default_rng(0).random((3, 4, 5, 1)) < 0.7)
    moved = [jnp.moveaxis(a, -1, axis) for a in (x, mask)]
    variables = layer.init(jax.random.key(0), x)
    (expected, updates), (y, moved_updates) = (
        make.apply(variables, x, mask=mask if masked else None, mutable=["batch_stats"])
        for make, x, mask in [(layer, x, mask), (layer.clone(axis=axis), *moved)]
    )
    close = partial(assert_close, ulps=16, dtype=np.float32)
    close(jnp.moveaxis(y, axis, -1), expected)
    jax.tree.map(close, moved_updates, updates)


def test_the_last_initializers_are_the_channel_norms():
    layer = BatchChannelNorm(
        num_groups=2,
        use_running_average=False,
        scale_init=nn.initializers.constant(3.0),
        bias_init=nn.initializers.constant(5.0),
    )
    params = layer.init(jax.random.key(0), data())["params"]
    assert (params["channel_norm"]["scale"] == 3).all()
    assert (params["channel_norm"]["bias"] == 5).all()
    assert (params["batch_norm"]["scale"] == 1).all()
    assert (params["batch_norm"]["bias"] == 0).all()


def test_group_size_is_another_way_to_say_num_groups():
    x = data((2, 3, 3, 12))
    by_size = BatchChannelNorm(num_groups=None, group_size=4, use_running_average=False)
    by_number = BatchChannelNorm(num_groups=3, use_running_average=False)
    actual, expected = (
        layer.init_with_output(jax.random.key(0), x)[0] for layer in (by_size, by_number)
    )
    np.testing.assert_array_equal(actual, expected)


def test_the_call_wins_over_the_constructor():
    layer = BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), data())
    _, updates = layer.apply(variables, data(), use_running_average=False, mutable=["batch_stats"])
    assert (updates["batch_stats"]["mean"] != 0).all()


def test_x_is_read_once_for_its_moments_and_once_to_be_mapped():
    """Both moments come from the one deviation, which a compiler fuses into one pass."""
    x = data((4, 16, 16, 8))
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[0])(variables, x)

    def operations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in equation.params.values():
                yield from operations(inner.jaxpr) if hasattr(inner, "jaxpr") else ()

    reductions = [
        equation
        for equation in operations(jaxpr.jaxpr)
        if equation.primitive is lax.reduce_sum_p and equation.invars[0].aval.size >= x.size
    ]
    assert len(reductions) == 2, "the first and the second moment around the pivot"


def test_numpy_input_is_taken_as_jax_would_take_it():
    """In float64 too, which JAX makes float32 unless told otherwise."""
    x = np.asarray(data(), np.float64)
    layer = BatchChannelNorm(num_groups=2, use_running_average=False)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, layer.init_with_output(jax.random.key(0), data())[0])


@pytest.mark.parametrize("evaluate", [True, False])
def test_exports_for_any_batch_and_image_size(evaluate):
    layer = BatchChannelNorm(num_groups=2, use_running_average=evaluate)
    variables = layer.init(jax.random.key(0), data())

    def forward(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    n, h, w = export.symbolic_shape("n, h, w", constraints=["n >= 2"])
    shape = jax.ShapeDtypeStruct((n, h, w, 4), jnp.float32)
    exported = export.export(jax.jit(forward))(variables, shape)
    for sizes in [(2, 5, 3), (4, 9, 8)]:
        x = data((*sizes, 4))
        # Where the size is not known the pivot is the mean itself: a few roundings.
        jax.tree.map(
            partial(assert_close, ulps=16, dtype=np.float32),
            exported.call(variables, x),
            forward(variables, x),
        )


def test_networks_pass_their_options_on():
    x = data((2, 4, 4, 3))
    variables = VGG(((8,),), num_groups=4).init(jax.random.key(0), x, train=True)

    def mean_after(**options):
        model = VGG(((8,),), num_groups=4, **options)
        y, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, updates["batch_stats"]["layers_1"]["batch_norm"]["mean"]

    y, mean = mean_after()
    np.testing.assert_allclose(mean_after(momentum=0.5)[1], 5 * mean, rtol=1e-5)
    assert (mean_after(epsilon=1.0)[0] != y).any()
    assert mean_after(dtype=jnp.bfloat16)[0].dtype == jnp.bfloat16
    with pytest.raises(NameError, match="devices"):
        mean_after(axis_name="devices")
