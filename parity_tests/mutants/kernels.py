"""Defects in weight standardization."""

from parity_tests.mutants.mutant import Mutant

KERNELS = "bcn_flax/weight_standardization.py"

MUTANTS = (
    Mutant(
        "weights-along-the-wrong-axis",
        KERNELS,
        "axis % kernel.ndim + 1\n",
        "axis % kernel.ndim\n",
        "The weights of each input channel are standardized, not those of each output channel.",
        hint="WSDense: shifting the weights",
    ),
    Mutant(
        "weights-not-centered",
        KERNELS,
        "-m.mean * scale)",
        "m.origin * scale)",
        "Weights are scaled only, as in weight normalization.",
        hint="WSDense: shifting the weights",
    ),
    Mutant(
        "weights-gradient-rounded-apart",
        KERNELS,
        "m = moments(sample, axis, mask, wide)",
        "m = moments(sample, axis, mask)",
        "The two parts of the gradient of half-precision weights are rounded before they are "
        "added.",
        hint="gradients of weights in half precision",
    ),
    Mutant(
        "weights-biased",
        KERNELS,
        "var = unbiased(m) if how.unbiased else m.var",
        "var = m.var",
        "The biased variance by default, as in BiT and timm.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "weights-epsilon-outside-the-root",
        KERNELS,
        "inverse = inverse_root(s * (var + how.epsilon))",
        "inverse = 1 / (jnp.sqrt(s * var) + how.epsilon)",
        "The divisor is std + epsilon, as in the README of the authors.",
        hint="WSDense: scaling the weights",
    ),
    Mutant(
        "weights-without-epsilon",
        KERNELS,
        "inverse = inverse_root(s * (var + how.epsilon))",
        "inverse = inverse_root(s * var)",
        "Nothing keeps the root of a small variance away from 0.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "weights-epsilon-added-not-a-floor",
        KERNELS,
        "inverse_root(jnp.maximum(s * var, how.epsilon))",
        "inverse_root(s * var + how.epsilon)",
        "DeepMind's NFNets take the larger of variance and epsilon, not their sum.",
        hint="standardization=nfnet",
    ),
    Mutant(
        "weights-slope-of-the-root-underflows",
        KERNELS,
        "inverse = inverse_root(s * (var + how.epsilon))",
        "inverse = jax.lax.rsqrt(s * (var + how.epsilon))",
        "The derivative of rsqrt is 0 in float32 where the variance exceeds 1e26.",
        hint="float32: a kernel is precise",
    ),
    Mutant(
        "weights-that-overflow-have-a-derivative",
        KERNELS,
        "Affine(constant_where_infinite(scale, m.var), ",
        "Affine(scale, ",
        "The gradient of a scale of 0 is 0 times a sum that overflows.",
        hint="float32: a kernel is precise",
    ),
    Mutant(
        "constant-weights-have-no-gradient",
        KERNELS,
        "return jnp.where(positive, jnp.sqrt(jnp.where(positive, var, 1)), 0)",
        "return jnp.sqrt(var)",
        "The root of the variance of a constant kernel has the derivative NaN.",
        hint="constant weights leave all finite",
    ),
    Mutant(
        "fan-in-scaling-ignored",
        KERNELS,
        "s = jnp.maximum(m.weight, 1) if how.fan_in_scaling else 1",
        "s = 1",
        "Scaled weight standardization without its scale.",
        hint="standardization=timm_scaled",
    ),
    Mutant(
        "gamma-ignored",
        KERNELS,
        "return how.gamma * inverse",
        "return inverse",
        "The factor that makes up for the activation is forgotten.",
        hint="standardization=nfnet with gamma",
    ),
    Mutant(
        "gain-ignored",
        KERNELS,
        "scale = scale * widen(gain)[None]",
        "scale = jnp.asarray(scale)",
        "The learned gain changes nothing.",
        hint="standardization=timm_scaled",
    ),
)
