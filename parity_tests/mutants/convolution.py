"""Defects in the convolutions of small images."""

from functools import partial

from parity_tests.mutants.mutant import Mutant

CONVOLUTION = "bcn_flax/models/convolution.py"

convolution = partial(Mutant, file=CONVOLUTION, tests=("test_convolution.py",))

RESULTS = "results_and_gradients_are_those"
OTHERS = "other_cases_stay"

MUTANTS = (
    convolution(
        "image-as-large-as-the-window",
        old="math.prod(window) > math.prod(space)",
        new="math.prod(window) >= math.prod(space)",
        why="The fast form is taken for images that have as many pixels as the window.",
        hint=OTHERS,
    ),
    convolution(
        "longer-than-the-window",
        old="math.prod(window) > math.prod(space)",
        new="all(w > s for w, s in zip(window, space, strict=True))",
        why="An image that is longer than the window along one axis stays slow.",
        hint="one_matrix_product_for_each_pixel",
    ),
    convolution(
        "symbolic-sizes-compared",
        old="return all(isinstance(size, int) for size in space) and",
        new="return",
        why="A model with images of symbolic size cannot be exported.",
        hint="images_of_symbolic_size",
    ),
    convolution(
        "products-in-half-precision",
        old="dtype, x, kernel = x.dtype, widen(x), widen(kernel)",
        new="dtype = x.dtype",
        why="The parts of a gradient are rounded to half precision before they are added.",
        hint=RESULTS,
    ),
    convolution(
        "result-in-float32",
        old=".astype(dtype)",
        new="",
        why="A layer in bfloat16 returns float32.",
        hint=RESULTS,
    ),
    convolution(
        "precision-lost",
        old='precision=options.get("precision")',
        new="precision=None",
        why="The argument `precision` is ignored.",
        hint="the_products_have_the_given_precision",
    ),
    convolution(
        "strides-ignored",
        old="range(-low, size + high - width + 1, stride)",
        new="range(-low, size + high - width + 1)",
        why="The window moves by one pixel.",
        hint=RESULTS,
    ),
    convolution(
        "padding-even",
        old="range(-low, size + high - width + 1, stride)",
        new="range(-low, size + low - width + 1, stride)",
        why="There are as many zeros after the image as before it.",
        hint=RESULTS,
    ),
    convolution(
        "last-pixel-lost",
        old="range(-low, size + high - width + 1, stride)",
        new="range(-low, size + high - width, stride)",
        why="The last place of the window is forgotten.",
        hint=RESULTS,
    ),
    convolution(
        "long-programs",
        old="<= math.prod(window):",
        new="<= 2 * math.prod(window):",
        why="An output that is mostly padding has a product for each of its pixels.",
        hint=OTHERS,
    ),
    convolution(
        "as-many-outputs-as-weights",
        old="<= math.prod(window):",
        new="< math.prod(window):",
        why="An output with as many pixels as the window stays slow.",
        hint="one_matrix_product_for_each_pixel",
    ),
    convolution(
        "no-output",
        old="if not 0 < math.prod(map(len, starts)) <=",
        new="if not 0 <= math.prod(map(len, starts)) <=",
        why="Of no pixels, nothing can be stacked.",
        hint=OTHERS,
    ),
    convolution(
        "groups-ignored",
        old='        "feature_group_count": 1,\n',
        new="",
        why="A convolution in groups takes the form for one.",
        hint="layers_of_linen_and_nnx_give_the_same",
    ),
    convolution(
        "batch-groups-ignored",
        old='        "batch_group_count": 1,\n',
        new="",
        why="A convolution in groups of the batch takes the form for one.",
        hint=OTHERS,
    ),
    convolution(
        "dilated-images-ignored",
        old='        "lhs_dilation": ones,\n',
        new="",
        why="A transposed convolution takes the form for a plain one.",
        hint=OTHERS,
    ),
    convolution(
        "dilated-windows-ignored",
        old='        "rhs_dilation": ones,\n',
        new="",
        why="A dilated window is used as if it had no gaps.",
        hint=OTHERS,
    ),
    convolution(
        "type-of-sums-ignored",
        old='        "preferred_element_type": None,\n',
        new="",
        why="The argument `preferred_element_type` is ignored.",
        hint=OTHERS,
    ),
    convolution(
        "sharding-of-the-output-ignored",
        old='        "out_sharding": None,\n',
        new="",
        why="The argument `out_sharding` is ignored.",
        hint=OTHERS,
    ),
    convolution(
        "integers-in-float",
        old="return usual and jnp.issubdtype(x.dtype, jnp.floating)",
        new="return usual",
        why="Integers are summed in float32.",
        hint="integers_stay",
    ),
    convolution(
        "window-before-the-image",
        old="slice(max(a, 0), max(a + w, 0))",
        new="slice(max(a, 0), a + w)",
        why="A negative end counts from the other side.",
        hint=RESULTS,
    ),
    convolution(
        "weights-after-the-image",
        old="slice(max(-a, 0), max(s - a, 0))",
        new="slice(max(-a, 0), s - a)",
        why="A negative end counts from the other side.",
        hint=RESULTS,
    ),
    convolution(
        "fast-on-a-gpu",
        old="cpu=by_pixel, default=convolve",
        new="cpu=by_pixel, cuda=by_pixel, default=convolve",
        why="On a GPU the convolution is faster.",
        hint="on_other_platforms_it_stays",
    ),
    convolution(
        "pixels-in-another-order",
        old="pixel(start) for start in product(*starts)",
        new="pixel(start[::-1]) for start in product(*starts[::-1])",
        why="The pixels of the output are stacked along the other axis first.",
        hint=RESULTS,
    ),
    convolution(
        "layers-convolve-as-usual",
        old="    return conv_general_dilated\n",
        new="    return lax.conv_general_dilated\n",
        why="Layers of linen stay slow.",
        hint="a_layer_takes_any_number_of_batch_axes",
    ),
)
