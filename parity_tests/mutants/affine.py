"""Defects in the algebra."""

from parity_tests.mutants.mutant import Mutant

AFFINE = "bcn_flax/affine.py"

MUTANTS = (
    Mutant(
        "one-pass-variance",
        AFFINE,
        "origin = checkpoint_name(_constant_origin(center), MOMENTS)",
        "origin = jnp.zeros_like(center)",
        "E[x^2] - E[x]^2 cancels where the mean is large: in Flax it is 25 % off at mean/std 1000.",
        hint="BatchNorm linen float32 data=mean 1e4",
    ),
    Mutant(
        "nan-in-the-origin",
        AFFINE,
        "_zero_if_huge(lax.stop_gradient(center))",
        "lax.stop_gradient(jnp.where(True, center, 0))",
        "A value that is not finite takes all others of its channel along.",
        hint="a value that is not finite is the only one",
    ),
    Mutant(
        "variance-not-clamped",
        AFFINE,
        "return var + lax.stop_gradient(jnp.maximum(-var, 0))",
        "return var",
        "Rounding can make the variance of a constant channel negative, as in the annotated "
        "implementation, and its root NaN.",
        hint="constants far from 0",
    ),
    Mutant(
        "variance-of-a-sample",
        AFFINE,
        "    mean, second = (s / divisor for s in sums)\n"
        "    return Moments(mean, _variance(mean, second), size, origin, counts)",
        "    mean, second = (s / divisor for s in sums)\n"
        "    var = _variance(mean, second) * divisor / jnp.maximum(divisor - 1, 1)\n"
        "    return Moments(mean, var, size, origin, counts)",
        "Each channel of each sample is measured with Bessel's correction, before any pooling.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "masked-values-in-the-count",
        AFFINE,
        "counts = jnp.sum(mask, space, dtype=widen(x).dtype)",
        "counts = jnp.sum(jnp.ones_like(mask), space, dtype=widen(x).dtype)",
        "Sums over what counts are divided by the number of all values.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "samples-weigh-the-same",
        AFFINE,
        "    mean, second = (s / divisor for s in sums)\n"
        "    return Moments(mean, _variance(mean, second), size, origin, counts)",
        "    mean, second = (s / divisor for s in sums)\n"
        "    return Moments(mean, _variance(mean, second), size, origin)",
        "Under a mask a sample weighs in the batch whatever part of it counts, be it nothing.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "groups-weigh-channels-the-same",
        AFFINE,
        "    pooled = _pool(jax.tree.map(split, m), total, channels // num_groups)",
        "    m = Moments(m.mean, m.var, m.size, m.origin)\n"
        "    pooled = _pool(jax.tree.map(split, m), total, channels // num_groups)",
        "A channel weighs in its group whatever part of it the mask leaves.",
        hint="a channel norm does not see",
    ),
    Mutant(
        "nothing-divided-by-nothing",
        AFFINE,
        "        divisor = jnp.maximum(counts, 1)",
        "        divisor = counts",
        "Where nothing counts the mean is 0 / 0: Flax's statistics stay NaN after an empty mask.",
        hint="BatchNorm: nothing moves where nothing counts",
    ),
    Mutant(
        "within-variance-only",
        AFFINE,
        "average(deviation, m.var + jnp.square(deviation))",
        "average(deviation, m.var)",
        "The law of total variance without the variance of the means.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "between-variance-only",
        AFFINE,
        "average(deviation, m.var + jnp.square(deviation))",
        "average(deviation, jnp.square(deviation))",
        "The law of total variance without the mean of the variances.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "devices-not-pooled",
        AFFINE,
        "        if axis_name is None:\n            return sums",
        "        return sums",
        "Each device normalizes by its own share of the batch: the psum is missing.",
        hint="BatchNorm: devices are pooled",
    ),
    Mutant(
        "devices-weigh-the-same",
        AFFINE,
        "    return _pool(m, total, m.mean.shape[0] * devices)",
        "    def of_samples(values: Sequence[Array]) -> list[Array]:\n"
        "        return [jnp.sum(v, axis=0, keepdims=True) for v in values]\n"
        "\n"
        "    own = _pool(m, of_samples, m.mean.shape[0])\n"
        "    own = Moments(own.mean, own.var, own.size, own.origin)\n"
        "    return own if axis_name is None else _pool(own, total, devices)",
        "A mean of the devices' means, as Flax takes it: wrong where their masks differ.",
        hint="BatchChannelNorm: devices weigh by",
    ),
    Mutant(
        "sizes-averaged-over-devices",
        AFFINE,
        "        return lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)\n"
        "\n"
        "    devices = (\n"
        "        1 if axis_name is None else lax.psum(1, axis_name, "
        "axis_index_groups=axis_index_groups)\n"
        "    )\n",
        "        return lax.pmean(sums, axis_name, axis_index_groups=axis_index_groups)\n"
        "\n"
        "    devices = 1\n",
        "Mean and variance survive a pmean of the sums, the size of the batch does not.",
        hint="BatchChannelNorm of the batch: groups of devices",
    ),
    Mutant(
        "groups-interleaved",
        AFFINE,
        "(n, num_groups, -1))",
        "(n, -1, num_groups)).swapaxes(1, 2)",
        "Channels are dealt out to the groups in turn, not in consecutive runs.",
        hint="ChannelNorm: channels of a group",
    ),
    Mutant(
        "groups-spread-interleaved",
        AFFINE,
        "lax.broadcast_in_dim(values, (n, groups, channels // groups), (0, 1))",
        "lax.broadcast_in_dim(values, (n, channels // groups, groups), (0, 2))",
        "The maps of the groups go to the channels in turn: tile for repeat.",
        hint="ChannelNorm: channels of a group",
    ),
    Mutant(
        "epsilon-outside-the-root",
        AFFINE,
        "scale = inverse_root(m.var + epsilon)",
        "scale = 1 / (jnp.sqrt(m.var) + epsilon)",
        "The divisor is std + epsilon, as in many codes for weights.",
        hint="is a group norm",
    ),
    Mutant(
        "epsilon-missing",
        AFFINE,
        "scale = inverse_root(m.var + epsilon)",
        "scale = inverse_root(m.var)",
        "Nothing keeps the root of a small variance away from 0.",
        hint="is a group norm",
    ),
    Mutant(
        "epsilon-as-a-floor",
        AFFINE,
        "scale = inverse_root(m.var + epsilon)",
        "scale = inverse_root(jnp.maximum(m.var, epsilon))",
        "Epsilon bounds the variance from below, as in NFNets, and is not added.",
        hint="is a group norm",
    ),
    Mutant(
        "mean-not-subtracted",
        AFFINE,
        "f = Affine(scale, ((origin - m.origin) - m.mean) * scale)",
        "f = Affine(scale, origin * scale)",
        "Divided by the standard deviation, and not centered.",
        hint="is a group norm",
    ),
    Mutant(
        "origins-taken-for-each-other",
        AFFINE,
        "((origin - m.origin) - m.mean) * scale",
        "-m.mean * scale",
        "The mean is measured from another origin than the values that it is subtracted from.",
        hint="a batch norm does not see",
    ),
    Mutant(
        "push-without-offset",
        AFFINE,
        "return Moments(f.scale * m.mean + f.offset, var",
        "return Moments(f.scale * m.mean, var",
        "The moments after a map forget its offset.",
        hint="BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "push-without-square",
        AFFINE,
        "jnp.square(f.scale) * jnp.minimum",
        "jnp.abs(f.scale) * jnp.minimum",
        "The variance after a map is scaled as a standard deviation is.",
        hint="BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "chain-in-the-wrong-order",
        AFFINE,
        "g.scale * f.offset + g.offset",
        "f.scale * g.offset + f.offset",
        "First the second map, then the first.",
        hint="is a group norm",
    ),
    Mutant(
        "origin-with-gradient",
        AFFINE,
        "return _zero_if_huge(lax.stop_gradient(center))",
        "return _zero_if_huge(center)",
        "The passes take the origin for a constant: a gradient through it is counted where it "
        "enters the maps, and not where it enters the sums.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "pooled-means-from-their-own-origins",
        AFFINE,
        "deviation = (m.origin - origin) + m.mean",
        "deviation = m.mean",
        "Means that are measured from different origins are pooled as if from one.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "pooled-size-of-one",
        AFFINE,
        "size, counts, divisor = number * m.size, None, number",
        "size, counts, divisor = m.size, None, number",
        "What is pooled has the size of one sample, so that Bessel's correction is too large.",
        hint="BatchNorm linen float64 running_variance=unbiased",
    ),
    Mutant(
        "devices-not-counted",
        AFFINE,
        "m.mean.shape[0] * devices)",
        "m.mean.shape[0])",
        "Sums over all devices are divided by the size of the batch on one.",
        hint="BatchNorm: devices are pooled",
    ),
    Mutant(
        "weight-without-the-mask",
        AFFINE,
        "return self.size if self.counts is None else self.counts",
        "return self.size",
        "Bessel's correction is that for all values, though a mask hides some.",
        hint="BatchNorm: the unbiased variance counts",
    ),
    Mutant(
        "masked-values-in-the-origin",
        AFFINE,
        "center = jnp.sum(widen(jnp.where(mask, x, 0)), space) / jnp.maximum(counts, 1)",
        "center = jnp.mean(widen(x), space)",
        "What is masked has a part in the origin, and takes the digits of what counts if it is "
        "large.",
        hint="what a mask hides may be huge",
    ),
    Mutant(
        "overflow-minus-overflow",
        AFFINE,
        "square = jnp.minimum(jnp.square(mean), jnp.finfo(mean.dtype).max)",
        "square = jnp.square(mean)",
        "Where both squares overflow the variance is NaN, and not infinite.",
        hint="squares overflow",
    ),
    Mutant(
        "an-origin-at-one-pixel",
        AFFINE,
        "center = jnp.mean(widen(_coarse_grid(x, space)), space)",
        "center = widen(lax.index_in_dim(x.reshape(x.shape[0], -1, x.shape[-1]), 0, 1, False))",
        "An outlier at that pixel takes the digits of all others.",
        hint="an outlier at any pixel",
    ),
    Mutant(
        "an-origin-at-the-edge-of-the-type",
        AFFINE,
        "jnp.abs(values) < float(info.max) * float(info.eps) / 4",
        "jnp.isfinite(values)",
        "A value of one sign minus an origin of the other overflows, and 0 times it is NaN.",
        hint="BatchNorm float32: overflowing squares",
    ),
    Mutant(
        "sums-of-values-that-overflow",
        AFFINE,
        "sums = checkpoint_name((_zero_if_huge(total), squares), MOMENTS)",
        "sums = checkpoint_name((total, squares), MOMENTS)",
        "The mean is infinite, and 0 times it NaN.",
        hint="BatchNorm float32: overflowing squares",
    ),
    Mutant(
        "a-scale-of-0-times-an-infinite-variance",
        AFFINE,
        "jnp.square(f.scale) * jnp.minimum(m.var, jnp.finfo(m.var.dtype).max)",
        "jnp.square(f.scale) * m.var",
        "After a batch norm whose variance overflows, the channel norm's is NaN.",
        hint="BCN of the batch float32: overflowing squares",
    ),
    Mutant(
        "an-infinite-variance-becomes-finite",
        AFFINE,
        "    var = var + lax.stop_gradient(infinite)\n",
        "",
        "The largest number stands for a variance that is larger, and the output is not the bias.",
        hint="BCN float32: overflowing squares",
    ),
    Mutant(
        "an-infinite-variance-with-a-derivative",
        AFFINE,
        "return jnp.where(jnp.isinf(var), lax.stop_gradient(scale), scale)",
        "return scale",
        "The gradient of a scale of 0 is 0 times a sum that overflows.",
        hint="BatchNorm float32: overflowing squares",
    ),
    Mutant(
        "two-norms-with-a-derivative-where-infinite",
        AFFINE,
        "    return both._replace(scale=constant_where_infinite(both.scale, m.var))\n",
        "    return both\n",
        "The gradient of the first norm's scale is 0 times a sum that overflows.",
        hint="BCN float32: overflowing squares",
    ),
    Mutant(
        "push-keeps-the-origin",
        AFFINE,
        "f.offset, var, m.size, counts=m.counts)",
        "f.offset, var, m.size, m.origin, m.counts)",
        "The mean after a map is one from 0, and no longer from the origin of the input.",
        hint="BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "push-forgets-the-mask",
        AFFINE,
        "f.offset, var, m.size, counts=m.counts)",
        "f.offset, var, m.size)",
        "After a map all channels weigh the same, whatever part of them the mask leaves.",
        hint="BatchChannelNorm: under a mask too",
    ),
    Mutant(
        "one-map-for-all-samples",
        AFFINE,
        "scale, offset = (v + 0 * origin for v in f)",
        "scale, offset = f",
        "A map that all samples share is not laid out for each of them, where its gradients add "
        "up.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "slope-of-the-root-with-its-sign-lost",
        AFFINE,
        "return root, -0.5 * root * (root * (root * tangents[0]))",
        "return root, 0.5 * root * (root * (root * tangents[0]))",
        "The inverse root falls where its argument rises.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "slope-of-the-root-with-a-power-too-few",
        AFFINE,
        "return root, -0.5 * root * (root * (root * tangents[0]))",
        "return root, -0.5 * root * (root * tangents[0])",
        "The derivative of x^(-1/2) goes with x^(-3/2), and not with 1/x.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "slope-of-the-root-underflows",
        AFFINE,
        "return root, -0.5 * root * (root * (root * tangents[0]))",
        "return root, -0.5 * (root * root * root) * tangents[0]",
        "The cube of an inverse root is 0 in float32 where values are of the size of 1e15.",
        hint="float32 num_groups=4 estimate=False data=1e15",
    ),
)

EQUIVALENT = (
    Mutant(
        "origin-from-the-edge",
        AFFINE,
        "starts[i] = min(strides[i] // 2, (length - 1) % strides[i])",
        "starts[i] = 0",
        "Another grid, another origin: on paper any gives the same moments, and one value in 64 "
        "bounds the loss of digits wherever the grid begins.",
        hint="float32 data=mean 1e4",
    ),
)
