"""Convolutions of small images on a CPU: which take the fast form, and that the others do not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bcn_flax
import bcn_flax.nnx
from bcn_flax import WSConv, models
from bcn_flax.models import nnx as nnx_models
from bcn_flax.models.convolution import conv_general_dilated, conv_general_dilated_cls
from parity_tests.environment import DEVICES
from parity_tests.tolerances import assert_close

C, FEATURES = 3, 4


def as_flax_calls(function, rank=2, strides=1, padding="SAME", **options):
    """A convolution with the arguments that Flax's layers pass, and these `options`."""
    ones = (1,) * rank
    axes = "DHW"[-rank:]
    layout = lax.conv_dimension_numbers(
        (0,) * (rank + 2), (0,) * (rank + 2), (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    )
    usual = {
        "lhs_dilation": ones,
        "rhs_dilation": ones,
        "dimension_numbers": layout,
        "feature_group_count": 1,
        "precision": None,
    }
    return lambda x, kernel: function(x, kernel, (strides,) * rank, padding, **usual | options)


small = partial(as_flax_calls, conv_general_dilated)
plain = partial(as_flax_calls, lax.conv_general_dilated)


def draw(space, window, dtype=np.float32, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, *space, C), (*window, C, FEATURES)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def lowered(function, *args, platform="cpu"):
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def convolutions(function, *args, platform="cpu"):
    return lowered(function, *args, platform=platform).count("stablehlo.convolution")


# Space, window, strides and padding.
SMALL = {
    "2x2": ((2, 2), (3, 3), 1, "SAME"),
    "1x1": ((1, 1), (3, 3), 1, [(1, 1), (1, 1)]),
    "one pixel less than the window": ((2, 4), (3, 3), 1, "SAME"),
    "longer than the window": ((1, 8), (3, 3), 1, [(1, 1), (1, 1)]),
    "5x5 window": ((3, 4), (5, 5), 1, "SAME"),
    "even window": ((3, 3), (4, 4), 1, "SAME"),
    "even window, the other way": ((3, 3), (4, 4), 1, "SAME_LOWER"),
    "oblong window": ((2, 3), (7, 1), 1, "SAME"),
    "strides": ((2, 2), (3, 3), 2, [(1, 1), (1, 1)]),
    "uneven padding": ((2, 2), (3, 3), 1, [(0, 2), (2, 1)]),
    "windows beside the image": ((2, 1), (3, 3), 2, [(4, 1), (0, 2)]),
    "windows after the image": ((2, 1), (3, 3), 2, [(1, 4), (0, 2)]),
    "as many outputs as weights": ((2, 2), (3, 3), 1, [(1, 2), (1, 2)]),
    "negative padding": ((1, 3), (2, 2), 1, [(1, 1), (-1, 0)]),
    "1-D": ((2,), (3,), 1, "SAME"),
    "3-D": ((2, 2, 1), (3, 3, 3), 1, "SAME"),
}


def results(function, x, kernel, dy):
    """The output, and the gradients of both operands."""
    y, pullback = jax.vjp(function, x, kernel)
    return y, *pullback(dy)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, jnp.float64) for case in SMALL), ("2x2", jnp.float32), ("2x2", jnp.bfloat16)],
)
@jax.enable_x64(True)
def test_results_and_gradients_are_those_of_the_convolution(case, dtype):
    space, window, strides, padding = SMALL[case]
    options = {"rank": len(space), "strides": strides, "padding": padding}
    x, kernel = draw(space, window, dtype)
    dy = jnp.sin(plain(**options)(x, kernel))
    run = jax.jit(results, static_argnums=0)
    wide = [a.astype(jnp.float64) for a in (x, kernel, dy)]
    sizes = run(plain(**options), *map(abs, wide))
    pairs = zip(run(small(**options), x, kernel, dy), run(plain(**options), *wide), strict=True)
    for (actual, expected), size, name in zip(pairs, sizes, ("y", "dx", "dkernel"), strict=True):
        assert actual.dtype == dtype
        # Some 50 products are summed in float32 or wider, and their errors mostly cancel. In half
        # precision only the result is rounded.
        assert_close(
            actual,
            expected,
            ulps=4,
            dtype=jnp.promote_types(dtype, jnp.float32),
            scale=size.max(),
            stored=dtype,
            name=name,
        )


@pytest.mark.parametrize("case", SMALL)
def test_on_a_cpu_it_is_one_matrix_product_for_each_pixel(case):
    space, window, strides, padding = SMALL[case]
    options = {"rank": len(space), "strides": strides, "padding": padding}
    x, kernel = draw(space, window)
    pixels = jax.eval_shape(plain(**options), x, kernel).shape[1:-1]
    text = lowered(small(**options), x, kernel)
    assert text.count("stablehlo.dot_general") == np.prod(pixels)
    assert "stablehlo.convolution" not in text
    gradient = jax.grad(lambda *args: small(**options)(*args).sum(), (0, 1))
    assert convolutions(gradient, x, kernel) == 0


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_on_other_platforms_it_stays_a_convolution(platform):
    x, kernel = draw((2, 2), (3, 3))

    def run(x, kernel):
        return results(small(), x, kernel, plain()(x, kernel))

    assert convolutions(run, x, kernel, platform=platform) == 4  # one of them to make dy
    assert "dot_general" not in lowered(run, x, kernel, platform=platform)


SHARDED = NamedSharding(Mesh(jax.devices()[:1], "devices", axis_types=(AxisType.Explicit,)), P())
OTHERS = {
    "image as large as the window": ((3, 3), (3, 3), {}),
    "image larger than the window": ((2, 5), (3, 3), {}),
    "no padding": ((1, 9), (3, 3), {"padding": [(1, 1), (0, 0)]}),
    "more output than window": ((1, 1), (2, 2), {"padding": [(2, 2), (1, 1)]}),
    "no output": ((2, 2), (3, 3), {"padding": "VALID"}),
    "dilated image": ((2, 2), (3, 3), {"lhs_dilation": (2, 1), "padding": [(1, 1), (1, 1)]}),
    "dilated window": ((2, 2), (3, 3), {"rhs_dilation": (1, 2)}),
    "groups of the batch": ((2, 2), (3, 3), {"batch_group_count": 2}),
    "sharded output": ((2, 2), (3, 3), {"out_sharding": SHARDED}),
    "type of the sums": ((2, 2), (3, 3), {"preferred_element_type": jnp.float32}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_cases_stay_a_convolution(case):
    space, window, options = OTHERS[case]
    x, kernel = draw(space, window)
    assert lowered(small(**options), x, kernel) == lowered(plain(**options), x, kernel)


def test_integers_stay_a_convolution():
    x, kernel = draw((2, 2), (3, 3), jnp.int32)
    assert convolutions(small(), x, kernel) == 1


def test_images_of_symbolic_size_stay_a_convolution_but_the_batch_size_may_be_symbolic():
    x, kernel = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw((2, 2), (3, 3)))

    def exported(shape):
        shape = export.symbolic_shape(shape)
        program = export.export(jax.jit(small()), platforms=["cpu"])
        return program(jax.ShapeDtypeStruct(shape, x.dtype), kernel)

    assert "stablehlo.convolution" in exported("2, h, w, 3").mlir_module()
    any_batch = exported("n, 2, 2, 3")
    assert "stablehlo.convolution" not in any_batch.mlir_module()
    for batch in (1, 5):
        args = draw((2, 2), (3, 3), batch=batch)
        np.testing.assert_allclose(any_batch.call(*args), plain()(*args), rtol=1e-5, atol=1e-5)


def test_a_program_for_several_platforms_holds_both_forms():
    args = draw((2, 2), (3, 3))
    program = export.export(jax.jit(small()), platforms=["cpu", "cuda"])(*args)
    assert "stablehlo.convolution" in program.mlir_module()
    assert "stablehlo.dot_general" in program.mlir_module()
    np.testing.assert_allclose(program.call(*args), plain()(*args), rtol=1e-5, atol=1e-5)


def test_the_products_have_the_given_precision():
    text = lowered(small(precision="highest"), *draw((2, 2), (3, 3)))
    assert text.count("precision = [HIGHEST, HIGHEST]") == 4


def test_a_batch_may_be_empty():
    assert small()(*draw((2, 2), (3, 3), batch=0)).shape == (0, 2, 2, FEATURES)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
@jax.enable_x64(True)
def test_vmap(axes):
    x, kernel = draw((2, 2), (3, 3), np.float64)
    x, kernel = (
        a if axis is None else jnp.stack([a, 2 * a, jnp.sin(a)])
        for a, axis in zip((x, kernel), axes, strict=True)
    )
    actual, expected = (jax.jit(jax.vmap(f, axes))(x, kernel) for f in (small(), plain()))
    # The numbers are about 10; they differ by some roundings.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


def test_a_sharded_batch():
    x, kernel = draw((2, 2), (3, 3), batch=DEVICES)
    mesh = Mesh(jax.devices()[:DEVICES], "devices", axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, P("devices")))
    actual = jax.jit(results, static_argnums=0)(small(), sharded, kernel, small()(x, kernel))
    expected = results(plain(), x, kernel, small()(x, kernel))
    assert actual[1].sharding.is_equivalent_to(sharded.sharding, x.ndim)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


# Layers

LAYERS = {
    "SAME": {},
    "1": {"padding": 1},
    "CIRCULAR": {"padding": "CIRCULAR"},
    "REFLECT": {"padding": "REFLECT"},
    "VALID": {"padding": "VALID"},
    "strides": {"strides": 2},
    "groups": {"feature_group_count": 3},
    "dilated": {"kernel_dilation": 2},
    "no bias": {"use_bias": False},
    "mask": {"mask": np.arange(3 * 3 * C * 6).reshape(3, 3, C, 6) % 2},
    "bfloat16": {"dtype": jnp.bfloat16},
}


def linen_pair(**options):
    """A layer with this form of convolution, and one without."""
    plain = WSConv(6, (3, 3), **options)
    return plain.clone(conv_general_dilated_cls=conv_general_dilated_cls), plain


def assert_same(actual, expected):
    assert actual.dtype == expected.dtype
    rounding = float(jnp.finfo(actual.dtype).eps)
    # Outputs are about 1.
    actual, expected = (np.asarray(y, np.float32) for y in (actual, expected))
    np.testing.assert_allclose(actual, expected, atol=8 * rounding)


@pytest.mark.parametrize("case", LAYERS)
def test_layers_of_linen_and_nnx_give_the_same_in_both_forms(case):
    x, _ = draw((2, 2), (3, 3))
    fast, plain = linen_pair(**LAYERS[case])
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    assert_same(*(jax.jit(layer.apply)(variables, x) for layer in (fast, plain)))
    make = partial(bcn_flax.nnx.WSConv, C, 6, (3, 3), **LAYERS[case])
    modules = (
        make(**function, rngs=nnx.Rngs(0))
        for function in ({"conv_general_dilated": conv_general_dilated}, {})
    )
    assert_same(*(nnx.jit(lambda layer, x: layer(x))(layer, x) for layer in modules))


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)], ids=str)
def test_a_layer_takes_any_number_of_batch_axes(batch):
    actual, expected = linen_pair()
    x = jnp.ones((*batch, 2, 2, C))
    variables = expected.init(jax.random.key(0), jnp.ones((2, 2, C)))
    assert convolutions(actual.apply, variables, x) == 0
    assert convolutions(expected.apply, variables, x) == 1
    a, e = (layer.apply(variables, x) for layer in (actual, expected))
    np.testing.assert_allclose(a, e, atol=1e-6)


def test_a_convolution_of_the_user_is_called():
    def twice(*args, **kwargs):
        return 2 * lax.conv_general_dilated(*args, **kwargs)

    x, _ = draw((2, 2), (3, 3))
    layer = WSConv(6, (3, 3), use_bias=False)
    own, variables = layer.init_with_output(jax.random.key(0), x)
    for options in ({"conv_general_dilated_cls": lambda: twice}, {"conv_general_dilated": twice}):
        y = WSConv(6, (3, 3), use_bias=False, **options).apply(variables, x)
        np.testing.assert_allclose(y, 2 * own, rtol=1e-5, atol=1e-5)


SHAPE = {"blocks": ((4,), (4,), (4,)), "num_classes": 2}


def linen_vgg(images, **layers):
    model = models.VGG(**SHAPE, **layers)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    return convolutions(partial(model.apply, train=False), variables, images)


def nnx_vgg(images, **layers):
    model = nnx_models.VGG(**SHAPE, **layers, in_channels=C, rngs=nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    return convolutions(lambda state, x: nnx.merge(graphdef, state)(x), state, images)


@pytest.mark.parametrize(
    ("vgg", "layers"),
    [
        (linen_vgg, {"norm": partial(bcn_flax.BatchChannelNorm, num_groups=2)}),
        (linen_vgg, {"conv": nn.Conv, "norm": None}),
        (nnx_vgg, {"norm": partial(bcn_flax.nnx.BatchChannelNorm, num_groups=2)}),
        (nnx_vgg, {"conv": nnx.Conv, "norm": None}),
    ],
    ids=["linen", "linen, plain", "nnx", "nnx, plain"],
)
def test_a_vgg_uses_it_for_small_images(vgg, layers):
    assert vgg(jnp.ones((2, 16, 16, C)), **layers) == 3  # of 16x16, 8x8 and 4x4 pixels
    assert vgg(jnp.ones((2, 8, 8, C)), **layers) == 2  # the last of 2x2


def test_a_resnet_uses_it_for_small_images():
    model, images = models.ResNet(depth=8), jnp.ones((2, 8, 8, C))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    # One of each two in the last stage takes 4x4 pixels to 2x2, the other stays there.
    assert convolutions(partial(model.apply, train=False), variables, images) == 7 - 1
