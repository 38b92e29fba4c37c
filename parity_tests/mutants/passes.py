"""Defects in the two passes over the input."""

from parity_tests.mutants.mutant import Mutant

PASSES = "bcn_flax/passes.py"
SPACE = "bcn_flax/space.py"

MUTANTS = (
    Mutant(
        "masked-values-in-the-variance",
        PASSES,
        "sums(_apply_mask(jnp.square(e), mask), x, origin, axis)",
        "sums(jnp.square(e), x, origin, axis)",
        "What is masked counts in the variance all the same, as far from the mean as it is.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "output-rounded-early",
        PASSES,
        "return (scale * (widen(x) - o) + offset).astype(dtype)",
        "return (scale * (widen(x) - o)).astype(dtype) + offset.astype(dtype)",
        "The product is rounded to half precision before the offset is added.",
        hint="ChannelNorm: half precision is widened first",
    ),
    Mutant(
        "half-precision-statistics",
        PASSES,
        "return x.astype(promote(x.dtype, jnp.float32))",
        "return x",
        "Half-precision input is summed in half precision.",
        hint="ChannelNorm: half precision is widened first",
    ),
    Mutant(
        "deviations-without-derivative",
        PASSES,
        "        d = widen(x) - o\n",
        "        d = jax.lax.stop_gradient(widen(x) - o)\n",
        "The derivative of `x - origin` is lost: the first derivatives have a rule of "
        "their own, and the second are wrong.",
        hint="curvatures are slopes",
    ),
    Mutant(
        "slope-of-a-square-without-its-2",
        PASSES,
        "2 * sums(_apply_mask(d * dot, mask), x, origin, axis)",
        "sums(_apply_mask(d * dot, mask), x, origin, axis)",
        "The derivative of x^2 is 2x.",
        hint="BatchChannelNorm of the batch: gradients are slopes",
    ),
    Mutant(
        "slope-of-a-square-from-0",
        PASSES,
        "        d = widen(x) - o\n",
        "        d = widen(x)\n",
        "The sum is one of squares of deviations, its derivative one of the squares of values.",
        hint="BatchChannelNorm of the batch: gradients are slopes",
    ),
    Mutant(
        "sum-pushed-forward-without-the-mask",
        PASSES,
        "sums(_apply_mask(dot, mask), x, origin, axis)",
        "sums(dot, x, origin, axis)",
        "What the mask hides has no part in the mean, but gets its gradient.",
        hint="what a mask hides may be huge",
    ),
    Mutant(
        "squares-pushed-forward-without-the-mask",
        PASSES,
        "_apply_mask(d * dot, mask)",
        "d * dot",
        "What the mask hides has no part in the variance, but gets its gradient.",
        hint="what a mask hides may be huge",
    ),
    Mutant(
        "sums-give-their-gradient-to-the-rounded",
        PASSES,
        "tangent(x, origin, mask, tangents[1])",
        "tangent(x, origin, mask, widen(tangents[0]))",
        "The gradient through the moments is rounded to half precision before it is added to the "
        "other.",
        hint="gradients in half precision",
    ),
    Mutant(
        "write-gives-its-gradient-to-the-rounded",
        PASSES,
        "dscale, doffset, _, dot, _ = tangents",
        "dscale, doffset, dot, _, _ = tangents",
        "The gradient through the values is rounded to half precision before it is added to the "
        "other.",
        hint="gradients in half precision",
    ),
    Mutant(
        "write-without-the-slope-of-the-scale",
        PASSES,
        "scale * dot + dscale * (widen(x) - o) + doffset",
        "scale * dot + doffset",
        "The scale has no gradient.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "write-without-the-slope-of-the-offset",
        PASSES,
        "scale * dot + dscale * (widen(x) - o) + doffset",
        "scale * dot + dscale * (widen(x) - o)",
        "The offset has no gradient.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "write-without-the-slope-of-the-values",
        PASSES,
        "scale * dot + dscale * (widen(x) - o) + doffset",
        "dscale * (widen(x) - o) + doffset",
        "The values have a gradient through their moments alone.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "slope-of-the-scale-from-0",
        PASSES,
        "dscale * (widen(x) - o)",
        "dscale * widen(x)",
        "The map is one of deviations, and the gradient of its scale one of values.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "sum-transposed-to-a-mean",
        SPACE,
        "            found = transposed.bind(*(cotangents[i] for i in linear), *args[-2:], "
        "**params)",
        "            found = transposed.bind(*(cotangents[i] for i in linear), *args[-2:], "
        "**params)\n"
        "            found = [v * (args[-1].size / args[-2].size) for v in found]",
        "The gradient of a sum is divided by the number of its terms, as if it were a mean.",
        hint="BatchChannelNorm of the batch: gradients are slopes",
    ),
    Mutant(
        "gradients-to-the-first",
        SPACE,
        "for i, cotangent in zip(linear, found, strict=True):",
        "for i, cotangent in zip(linear, found[:1] * len(found), strict=True):",
        "What is laid out together gets one gradient for all, that of the first.",
        hint="BatchChannelNorm of the batch: gradients are slopes",
    ),
    Mutant(
        "vmap-keeps-the-axes-of-before",
        SPACE,
        "kept=(0, *(k + 1 for k in kept))",
        "kept=(0, *kept)",
        "Under `vmap` the axes of samples and channels are not moved behind the new one.",
        hint="BatchChannelNorm of the batch: the parts of a vmap",
    ),
    Mutant(
        "vmap-along-the-first-axis-only",
        SPACE,
        "batching.bdim_at_front(a, d, size, mesh_axis)",
        "batching.bdim_at_front(a, d and 0, size, mesh_axis)",
        "Under `vmap` the first axis is taken for the new one, wherever that is.",
        hint="a vmap may run",
    ),
    Mutant(
        "one-that-is-0",
        SPACE,
        "((origin == origin) | (origin != copy))",
        "(origin != copy)",
        "Where the origin happens to be the number of the copy, numbers are divided by 0.",
        hint="BatchNorm: nothing moves where nothing counts",
    ),
    Mutant(
        "laid-out-along-the-last-axis",
        SPACE,
        "[*values, x, origin], (0, axis % x.ndim), copy)",
        "[*values, x, origin], (0, x.ndim - 1), copy)",
        "Numbers of the channels are laid out along the last axis, whichever that of the channels "
        "is.",
        hint="ChannelNorm: channels may lie",
    ),
)

EQUIVALENT = (
    Mutant(
        "origins-laid-out-as-one",
        PASSES,
        "for copy in (0, 1) for o",
        "for copy in (0, 0) for o",
        "Copies have the same numbers: apart, they only keep compilers from storing what two sums "
        "share.",
        hint="BatchChannelNorm of the batch: gradients are slopes",
    ),
    Mutant(
        "deviations-of-the-widened",
        PASSES,
        "return (scale * (widen(x) - o) + offset).astype(dtype)",
        "return (scale * (wide - o) + offset).astype(dtype)",
        "`wide` is `widen(x)`: where it is read in its place numbers stay, but it has to be "
        "stored.",
        hint="gradients in half precision",
    ),
)
