"""Break the code on purpose, one defect at a time, to see whether the checks notice.

That a suite of tests passes says little unless it would have failed. A `Mutant` is a small edit of
one source file, such as a tired author makes: a momentum swapped, a gradient let through, a mask
forgotten. `catch` imports both packages afresh with that edit, in memory, and runs the checks of
`parity_tests.suite` until one of them fails. A mutant that none of them catches is a hole in the
suite, or it is no defect: those are in `EQUIVALENT`, each with the reason.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from textwrap import shorten
from types import CodeType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = {"bcn_flax", "bcn_torch", "parity_tests"}

AFFINE = "bcn_flax/affine.py"
NORMS = "bcn_flax/norms.py"
PASSES = "bcn_flax/passes.py"
SPACE = "bcn_flax/space.py"
KERNELS = "bcn_flax/weight_standardization.py"
LINEN = "bcn_flax/linen.py"
NNX = "bcn_flax/nnx.py"
LAYOUTS = "bcn_flax/interop/layouts.py"
TORCH_NORMS = "bcn_torch/norms.py"
TORCH_WEIGHTS = "bcn_torch/weight_standardization.py"
TORCH_PRECISION = "bcn_torch/precision.py"

Checks = Mapping[str, Callable[[], object]]


class Mutant(NamedTuple):
    """An edit of one source file.

    Attributes:
        name: of the defect, in a few words.
        file: the source, from the root of the repository.
        old: the text that goes; occurs exactly once, so that no edit can silently do nothing.
        new: the text that comes.
        why: what is wrong with it and who does it; of an equivalent one, why nothing is.
        hint: part of the names of the checks to try first. It saves time and decides nothing: all
            the others follow until one fails.
    """

    name: str
    file: str
    old: str
    new: str
    why: str
    hint: str = ""

    @property
    def module(self) -> str:
        """The module's name."""
        return self.file.removesuffix(".py").replace("/", ".")

    @property
    def side(self) -> str:
        """Which side of the comparison it breaks."""
        if "/interop/" in self.file:
            return "interop"
        return "PyTorch" if self.file.startswith("bcn_torch/") else "Flax"

    def apply(self, source: str) -> str:
        """The source with the edit.

        Raises:
            ValueError: the old text is not there, or not only once.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"Mutant {self.name!r}: the text to replace must occur once in {self.file}, it "
                f"occurs {count} times: bring the mutant up to date with the source.\n{self.old}"
            )
        return source.replace(self.old, self.new)


class Caught(NamedTuple):
    """Which check failed first, None if none did, and what it said."""

    check: str | None
    message: str
    seconds: float


def catch(mutant: Mutant | None, checks_of: Callable[[], Checks] | None = None) -> Caught:
    """Run the checks against a mutant until one of them fails.

    Args:
        mutant: None is the control, which nothing should catch.
        checks_of: gives the checks, called where imports find the mutant; by default those of
            `parity_tests.suite`.
    """
    start = time.perf_counter()
    check, message = None, ""
    with imported_afresh(mutant):
        checks = (checks_of or _suite)()
        for name in sorted(checks, key=lambda name: mutant is None or mutant.hint not in name):
            try:
                checks[name]()
            except Exception as error:
                check, message = name, _in_short(error)
                break
        if mutant and mutant.module not in sys.modules:
            raise ValueError(f"Mutant {mutant.name!r}: the checks never import {mutant.module}.")
    return Caught(check, message, time.perf_counter() - start)


@contextmanager
def imported_afresh(mutant: Mutant | None) -> Iterator[None]:
    """Import both packages and their tests anew, with the mutant; put the old ones back in the end.

    Of the mutant nothing is written, neither source nor bytecode. What JAX and Flax remember, they
    remember of functions and classes, and these are new as well. Other import hooks are passed by:
    the annotations that jaxtyping's checks must not catch what the checks of the suite let through.
    """
    originals = _forget()
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()
        sys.modules.update(originals)


def run_all() -> list[dict[str, Any]]:
    """What became of each mutant, as plain data for a report."""
    return list(records())


def records() -> Iterator[dict[str, Any]]:
    """The same one by one, for it takes minutes."""
    for mutant in MUTANTS:
        caught = catch(mutant)
        yield {
            "name": mutant.name,
            "side": mutant.side,
            "file": mutant.file,
            "defect": mutant.why,
            "old": mutant.old,
            "new": mutant.new,
            "caught_by": caught.check,
            "message": caught.message,
            "seconds": caught.seconds,
        }


class _Loader(SourceFileLoader):
    """Loads one module with its mutant."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        """Compile the source as edited: bytecode is neither read nor written."""
        source = self.mutant.apply(Path(self.path).read_text())
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds the packages' modules where Python finds them, all but one to load as they are."""

    def __init__(self, mutant: Mutant | None) -> None:
        self.mutant = mutant

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.origin and self.mutant and fullname == self.mutant.module:
            spec.loader = _Loader(fullname, spec.origin, self.mutant)
        return spec


def _forget() -> dict[str, Any]:
    """Take the packages out of memory."""
    ours = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in ours}


def _suite() -> Checks:
    return import_module("parity_tests.suite").checks()


def _in_short(error: Exception) -> str:
    """The beginning of what a check said; a crash is no comparison, and says which error it was."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return shorten(f"{kind}{error}", width=200, placeholder=" ...")


MUTANTS: tuple[Mutant, ...] = (
    # --- the algebra ------------------------------------------------------------------------------
    Mutant(
        "one-pass-variance",
        AFFINE,
        "origin = checkpoint_name(_constant(near), MOMENTS)",
        "origin = jnp.zeros_like(near)",
        "E[x^2] - E[x]^2 cancels where the mean is large: in Flax it is 25 % off at mean/std 1000.",
        hint="BatchNorm linen float32 data=mean 1e4",
    ),
    Mutant(
        "nan-in-the-origin",
        AFFINE,
        "jnp.where(jnp.isfinite(near), near, 0)",
        "near",
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
        "_not_negative(second - square), size, origin, counts)",
        "_not_negative(second - square) * divisor / jnp.maximum(divisor - 1, 1), size, origin, "
        "counts)",
        "Each channel of each sample is measured with Bessel's correction, before any pooling.",
        hint="BatchNorm: a batch norm does not see",
    ),
    Mutant(
        "masked-values-in-the-variance",
        PASSES,
        "sums(_counted(jnp.square(e), mask), x, origin, axis)",
        "sums(jnp.square(e), x, origin, axis)",
        "What is masked counts in the variance all the same, as far from the mean as it is.",
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
        "_not_negative(second - square), size, origin, counts)",
        "_not_negative(second - square), size, origin)",
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
        hint="EstimatedBatchNorm nnx",
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
        hint="NNX BatchChannelNorm of the batch: groups of devices",
    ),
    Mutant(
        "index-groups-ignored",
        NORMS,
        "groups = axis_index_groups and tuple(map(tuple, axis_index_groups))",
        "groups = None",
        "All devices pool together, though they were told to in groups.",
        hint="BatchChannelNorm: groups of devices",
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
        "scale = _inverse_root(m.var + epsilon)",
        "scale = 1 / (jnp.sqrt(m.var) + epsilon)",
        "The divisor is std + epsilon, as in many codes for weights.",
        hint="is a group norm",
    ),
    Mutant(
        "epsilon-missing",
        AFFINE,
        "scale = _inverse_root(m.var + epsilon)",
        "scale = _inverse_root(m.var)",
        "Nothing keeps the root of a small variance away from 0.",
        hint="is a group norm",
    ),
    Mutant(
        "epsilon-as-a-floor",
        AFFINE,
        "scale = _inverse_root(m.var + epsilon)",
        "scale = _inverse_root(jnp.maximum(m.var, epsilon))",
        "Epsilon bounds the variance from below, as in NFNets, and is not added.",
        hint="is a group norm",
    ),
    Mutant(
        "mean-not-subtracted",
        AFFINE,
        "return Affine(scale, ((origin - m.origin) - m.mean) * scale)",
        "return Affine(scale, origin * scale)",
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
        "mean, var = f.scale * m.mean + f.offset, ",
        "mean, var = f.scale * m.mean, ",
        "The moments after a map forget its offset.",
        hint="BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "push-without-square",
        AFFINE,
        "jnp.square(f.scale) * m.var",
        "jnp.abs(f.scale) * m.var",
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
        "origin-with-gradient",
        AFFINE,
        "return lax.stop_gradient(jnp.where(jnp.isfinite(near), near, 0))",
        "return jnp.where(jnp.isfinite(near), near, 0)",
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
        "near = jnp.sum(widen(jnp.where(mask, x, 0)), space) / jnp.maximum(counts, 1)",
        "near = jnp.mean(widen(x), space)",
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
        "push-keeps-the-origin",
        AFFINE,
        "return Moments(mean, var, m.size, counts=m.counts)",
        "return Moments(mean, var, m.size, m.origin, m.counts)",
        "The mean after a map is one from 0, and no longer from the origin of the input.",
        hint="BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "push-forgets-the-mask",
        AFFINE,
        "return Moments(mean, var, m.size, counts=m.counts)",
        "return Moments(mean, var, m.size)",
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
    # --- the two passes ---------------------------------------------------------------------------
    Mutant(
        "deviations-without-derivative",
        PASSES,
        "        d = widen(x) - o\n",
        "        d = jax.lax.stop_gradient(widen(x) - o)\n",
        "The derivative of `x - origin` goes to nobody: the first derivatives have a rule of "
        "their own, and the second are wrong.",
        hint="curvatures are slopes",
    ),
    Mutant(
        "slope-of-a-square-without-its-2",
        PASSES,
        "2 * sums(_counted(d * dot, mask), x, origin, axis)",
        "sums(_counted(d * dot, mask), x, origin, axis)",
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
        "sums(_counted(dot, mask), x, origin, axis)",
        "sums(dot, x, origin, axis)",
        "What the mask hides has no part in the mean, but gets its gradient.",
        hint="what a mask hides may be huge",
    ),
    Mutant(
        "squares-pushed-forward-without-the-mask",
        PASSES,
        "_counted(d * dot, mask)",
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
        "            found = transposed.bind(*(cotangents[i] for i in asked), *args[-2:], "
        "**params)",
        "            found = transposed.bind(*(cotangents[i] for i in asked), *args[-2:], "
        "**params)\n"
        "            found = [v * (args[-1].size / args[-2].size) for v in found]",
        "The gradient of a sum is divided by the number of its terms, as if it were a mean.",
        hint="BatchChannelNorm of the batch: gradients are slopes",
    ),
    Mutant(
        "gradients-to-the-first",
        SPACE,
        "for i, cotangent in zip(asked, found, strict=True):",
        "for i, cotangent in zip(asked, found[:1] * len(found), strict=True):",
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
        "batching.bdim_at_front(a, d, size)",
        "batching.bdim_at_front(a, d and 0, size)",
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
    # --- the layers as functions ------------------------------------------------------------------
    Mutant(
        "half-precision-gradient",
        NORMS,
        "m = moments(x, layer.axis, mask, wide)",
        "m = moments(x, layer.axis, mask)",
        "The two parts of the input gradient are rounded to half precision before they are added.",
        hint="gradients in half precision",
    ),
    Mutant(
        "mask-ignored",
        NORMS,
        "m = moments(x, layer.axis, mask, wide)",
        "m = moments(x, layer.axis, None, wide)",
        "Padding counts as data.",
        hint="BatchNorm: what a mask hides",
    ),
    Mutant(
        "masked-nan-kept",
        NORMS,
        "x = jnp.where(mask | jnp.isfinite(x), x, 0)",
        "x = jnp.where(mask, x, x)",
        "A NaN behind the mask reaches the gradients, for NaN times a gradient of 0 is NaN.",
        hint="BatchNorm: what a mask hides",
    ),
    Mutant(
        "masked-output-cleared",
        NORMS,
        "x = jnp.where(mask | jnp.isfinite(x), x, 0)",
        "x = jnp.where(mask, x, 0)",
        "What is masked should not count in the moments, but should be normalized all the same.",
        hint="BatchNorm: what a mask hides is normalized",
    ),
    Mutant(
        "momentum-swapped",
        NORMS,
        "mixed = momentum * widen(old) + rate * lax.stop_gradient(new)",
        "mixed = rate * widen(old) + momentum * lax.stop_gradient(new)",
        "PyTorch's momentum in Flax's place, as in bonlime/pytorch-tools (issue 97).",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "weights-do-not-add-up-to-1",
        NORMS,
        "_moving_average(running, batch, momentum, 1 - momentum, variance)",
        "_moving_average(running, batch, momentum, momentum, variance)",
        "Old and new estimates have the same weight: together 1.8, and the estimates grow.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "gradient-through-the-estimates",
        NORMS,
        "            standard = after if estimate else batch",
        "            standard = after if estimate else batch\n"
        "            if estimate:\n"
        "                passed = batch.mean_from_zero, batch.var\n"
        "                leak = [(1 - momentum) * (v - lax.stop_gradient(v)) for v in passed]\n"
        "                standard = Moments(after.mean + leak[0], after.var + leak[1])",
        "Normalizing by the updated estimates lets a tenth of the batch's gradient through.",
        hint="EstimatedBatchNorm: training by estimates",
    ),
    Mutant(
        "running-variance-unbiased",
        NORMS,
        '        case "biased":\n            var = batch.var',
        '        case "biased":\n            var = unbiased(batch)',
        "PyTorch's running variance in the place of Flax's: off by n / (n - 1).",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "running-variance-not-unbiased",
        NORMS,
        "var = unbiased(batch)",
        "var = batch.var",
        "Flax's running variance where PyTorch's is asked for.",
        hint="BatchNorm linen float64 running_variance=unbiased",
    ),
    Mutant(
        "running-variance-around-the-new-mean",
        NORMS,
        "jnp.square((batch.origin - running.mean) + batch.mean)",
        "jnp.square(momentum * (batch.origin - running.mean + batch.mean))",
        "The authors take the variance around the running mean before its update, not after.",
        hint="BatchNorm linen float64 running_variance=around",
    ),
    Mutant(
        "running-variance-of-the-mean",
        NORMS,
        "average(running.var, var)",
        "average(running.mean, var)",
        "The running variance continues the running mean: a slip of copy and paste.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "bessel-upside-down",
        NORMS,
        "m.var * (m.weight / jnp.maximum(m.weight - 1, 1))",
        "m.var * (jnp.maximum(m.weight - 1, 1) / m.weight)",
        "Bessel's correction makes a variance larger, not smaller.",
        hint="WSDense nnx",
    ),
    Mutant(
        "nan-poisons-the-statistics",
        NORMS,
        "usable = jnp.isfinite(mean) & jnp.isfinite(var)",
        "usable = jnp.ones_like(mean, dtype=bool)",
        "One batch with a NaN, and the running estimates are NaN for ever, as in Flax and PyTorch.",
        hint="EstimatedBatchNorm: a channel that is not finite",
    ),
    Mutant(
        "empty-batch-moves-the-statistics",
        NORMS,
        "    if batch.counts is not None:\n        usable &= batch.counts > 0\n",
        "",
        "A batch that is masked whole pulls the running estimates towards 0.",
        hint="BatchNorm: nothing moves where nothing counts",
    ),
    Mutant(
        "evaluation-by-the-batch",
        NORMS,
        "    standard = running\n",
        "    standard = pool_batch(m)\n",
        "Evaluation normalizes by whatever else is in the batch.",
        hint="BatchNorm in evaluation: a sample does not see",
    ),
    Mutant(
        "normalized-before-the-update",
        NORMS,
        "standard = after if estimate else batch",
        "standard = running if estimate else batch",
        "The batch is normalized by the estimates of the batches before it.",
        hint="EstimatedBatchNorm: training by estimates",
    ),
    Mutant(
        "estimate-normalizes-by-the-batch",
        NORMS,
        "standard = after if estimate else batch",
        "standard = batch",
        "Plain batch norm, whatever `estimate` says: a copy in cellseg_models ignores it too.",
        hint="EstimatedBatchNorm: training by estimates",
    ),
    Mutant(
        "batch-norm-normalizes-by-the-estimates",
        NORMS,
        "standard = after if estimate else batch",
        "standard = after",
        "Estimated statistics also where the batch's own were asked for.",
        hint="BatchNorm: a constant comes",
    ),
    Mutant(
        "batch-moments-without-gradient",
        NORMS,
        "standard = after if estimate else batch",
        "standard = after if estimate else lax.stop_gradient(batch)",
        "Batch norm without the gradient through the batch's mean and variance.",
        hint="BatchNorm: gradients are slopes",
    ),
    Mutant(
        "batch-norm-scale-and-bias-ignored",
        NORMS,
        "return chain(standardize(m, epsilon, origin), learned)",
        "return standardize(m, epsilon, origin)",
        "The batch norm learns nothing.",
        hint="BatchNorm: a constant comes",
    ),
    Mutant(
        "batch-norm-bias-ignored",
        NORMS,
        "    return chain(standardize(m, epsilon, origin), learned)",
        "    learned = learned._replace(offset=jnp.zeros_like(learned.offset))\n"
        "    return chain(standardize(m, epsilon, origin), learned)",
        "The batch norm does not shift.",
        hint="BatchNorm: a constant comes",
    ),
    Mutant(
        "pooled-origin-forgotten",
        NORMS,
        "m = Moments(widen(m.mean), widen(m.var), origin=m.origin)",
        "m = Moments(widen(m.mean), widen(m.var))",
        "The mean of the batch is measured from its origin, and subtracted as if from 0.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "channel-norm-scale-and-bias-ignored",
        NORMS,
        "    pooled = pool_groups(m, learned.scale.shape[1])",
        "    learned = Affine(jnp.ones_like(learned.scale), jnp.zeros_like(learned.offset))\n"
        "    pooled = pool_groups(m, learned.scale.shape[1])",
        "The channel norm learns nothing.",
        hint="ChannelNorm: a constant comes",
    ),
    Mutant(
        "channel-norm-of-single-channels",
        NORMS,
        "    pooled = pool_groups(m, learned.scale.shape[1])",
        "    learned = spread(learned, m.mean)\n"
        "    pooled = pool_groups(m, learned.scale.shape[1])",
        "Moments over space only: an instance norm.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "channel-norm-of-the-batch",
        NORMS,
        "pooled = pool_groups(m, learned.scale.shape[1])",
        "pooled = pool_groups(pool_batch(m), learned.scale.shape[1])",
        "The channel norm pools its samples, which must not see each other.",
        hint="ChannelNorm: a sample does not see",
    ),
    Mutant(
        "group-mapped-from-its-own-origin",
        NORMS,
        "    return Affine(f.scale, f.scale * (m.origin - spread(pooled.origin, m.mean)) + "
        "f.offset)",
        "    return f",
        "The map of a group is one of deviations from the group's origin; the values are measured "
        "from those of the channels.",
        hint="ChannelNorm nnx",
    ),
    # --- what linen and NNX share -----------------------------------------------------------------
    Mutant(
        "channels-always-last",
        NORMS,
        "    m = moments(x, layer.axis, mask, wide)\n"
        "    return apply(to_affine(m), x, layer.axis, ",
        "    m = moments(x, -1, mask, wide)\n    return apply(to_affine(m), x, -1, ",
        "The argument `axis` is ignored.",
        hint="ChannelNorm: channels may lie",
    ),
    Mutant(
        "output-type-ignored",
        NORMS,
        "    if layer.dtype is not None:\n        return layer.dtype\n",
        "",
        "The argument `dtype` is ignored.",
        hint="ChannelNorm: half precision is widened first",
    ),
    Mutant(
        "output-type-of-the-input",
        NORMS,
        "return promote(dtype, layer.param_dtype) if learns else dtype",
        "return dtype",
        "The result is of the input's type, and not of what input and parameters promote to.",
        hint="ChannelNorm: half precision is widened first",
    ),
    Mutant(
        "evaluation-updates",
        NORMS,
        "return not evaluate if flag is None else flag",
        "return True if flag is None else flag",
        "The running averages move in evaluation too.",
        hint="BatchNorm in evaluation: evaluation moves no",
    ),
    Mutant(
        "training-does-not-update",
        NORMS,
        "return not evaluate if flag is None else flag",
        "return False if flag is None else flag",
        "The running averages never move: the README of the authors never sets their rate.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "update-flag-ignored",
        NORMS,
        "return not evaluate if flag is None else flag",
        "return not evaluate",
        "Nothing can freeze the running averages, or recalibrate them.",
        hint="frozen it trains",
    ),
    # --- weight standardization -------------------------------------------------------------------
    Mutant(
        "weights-along-the-wrong-axis",
        KERNELS,
        "axis % kernel.ndim + 1,",
        "axis % kernel.ndim,",
        "The weights of each input channel are standardized, not those of each output channel.",
        hint="WSDense: shifting the weights",
    ),
    Mutant(
        "weights-not-centered",
        KERNELS,
        "f = Affine(scale, -m.mean * scale)",
        "f = Affine(scale, m.origin * scale)",
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
        hint="WSDense nnx",
    ),
    Mutant(
        "weights-epsilon-outside-the-root",
        KERNELS,
        "inverse = lax.rsqrt(s * (var + how.epsilon))",
        "inverse = 1 / (jnp.sqrt(s * var) + how.epsilon)",
        "The divisor is std + epsilon, as in the README of the authors.",
        hint="WSDense: scaling the weights",
    ),
    Mutant(
        "weights-without-epsilon",
        KERNELS,
        "inverse = lax.rsqrt(s * (var + how.epsilon))",
        "inverse = lax.rsqrt(s * var)",
        "Nothing keeps the root of a small variance away from 0.",
        hint="WSDense nnx",
    ),
    Mutant(
        "weights-epsilon-added-not-a-floor",
        KERNELS,
        "lax.rsqrt(jnp.maximum(s * var, how.epsilon))",
        "lax.rsqrt(s * var + how.epsilon)",
        "DeepMind's NFNets take the larger of variance and epsilon, not their sum.",
        hint="standardization=nfnet",
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
    # --- linen ------------------------------------------------------------------------------------
    Mutant(
        "linen-initialization-updates",
        LINEN,
        "if update_stats and not initializing:",
        "if update_stats:",
        "The example that `init` is given moves the running averages.",
        hint="BatchNorm: estimates start",
    ),
    Mutant(
        "linen-statistics-not-written",
        LINEN,
        "mean.value, var.value = stats",
        "_ = stats",
        "The running averages are computed and not stored.",
        hint="BatchNorm linen float64 running_variance=unbiased",
    ),
    Mutant(
        "linen-call-flag-ignored",
        LINEN,
        "self.use_running_average, use_running_average",
        "self.use_running_average, None",
        "The call cannot say whether it evaluates.",
        hint="BatchNorm in evaluation: evaluation moves no",
    ),
    Mutant(
        "linen-momentum-ignored",
        LINEN,
        "            momentum=self.momentum,\n"
        "            epsilon=self.epsilon if self.batch_epsilon",
        "            epsilon=self.epsilon if self.batch_epsilon",
        "BatchChannelNorm keeps its momentum to itself, as the authors' PBCNorm does.",
        hint="BatchChannelNorm linen float64 num_groups=4 estimate=True momentum=0.5",
    ),
    Mutant(
        "linen-batch-epsilon-ignored",
        LINEN,
        "epsilon=self.epsilon if self.batch_epsilon is None else self.batch_epsilon",
        "epsilon=self.epsilon",
        "One epsilon serves both norms.",
        hint="BatchChannelNorm: scaling the input",
    ),
    Mutant(
        "linen-batch-epsilon-fixed",
        LINEN,
        "epsilon=self.epsilon if self.batch_epsilon is None else self.batch_epsilon",
        "epsilon=1e-5",
        "The batch norm has an epsilon of its own, as in the README of the authors.",
        hint="BatchChannelNorm: scaling the input",
    ),
    Mutant(
        "linen-estimate-ignored",
        LINEN,
        "(EstimatedBatchNorm if self.estimate else BatchNorm)(",
        "EstimatedBatchNorm(",
        "Estimated statistics always: a copy in cellseg_models ignores `estimate` too.",
        hint="BatchChannelNorm of the batch: a channel norm follows",
    ),
    Mutant(
        "linen-axis-name-ignored",
        LINEN,
        "            axis_name=self.axis_name,\n"
        "            axis_index_groups=self.axis_index_groups,\n"
        "            running_variance",
        "            axis_index_groups=self.axis_index_groups,\n            running_variance",
        "BatchChannelNorm does not tell its batch norm of the other devices.",
        hint="BatchChannelNorm: devices weigh",
    ),
    Mutant(
        "linen-channel-norm-of-the-input",
        LINEN,
        "channel_norm.affine(push(f, m))",
        "channel_norm.affine(m)",
        "The channel norm is measured on the input, not on what the batch norm makes of it.",
        hint="BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "linen-transposed-kernel-axis",
        LINEN,
        'axis = -2 if getattr(self, "transpose_kernel", False) else -1',
        "axis = -1",
        "A transposed convolution with exchanged axes is standardized along the wrong one.",
        hint="WSConvTranspose: shifting the weights",
    ),
    Mutant(
        "linen-gain-ignored",
        LINEN,
        "            gain=gain,\n",
        "",
        "There is a gain, and nothing is multiplied by it.",
        hint="standardization=timm_scaled",
    ),
    Mutant(
        "linen-weights-rounded-early",
        LINEN,
        "            value,\n            self.standardization,",
        "            value.astype(self.dtype or value.dtype),\n            self.standardization,",
        "Weights are cast to half precision first, and standardized then.",
        hint="WSDense: weights are standardized before",
    ),
    # --- NNX --------------------------------------------------------------------------------------
    Mutant(
        "nnx-statistics-not-written",
        NNX,
        "self.mean[...], self.var[...] = stats",
        "_ = stats",
        "The running averages are computed and not stored.",
        hint="NNX BatchChannelNorm: training by",
    ),
    Mutant(
        "nnx-momentum-default",
        NNX,
        "        momentum: float = 0.9,\n"
        "        epsilon: float = 1e-5,\n"
        "        dtype: Dtype | None = None,",
        "        momentum: float = 0.99,\n"
        "        epsilon: float = 1e-5,\n"
        "        dtype: Dtype | None = None,",
        "BatchNorm has the default of `flax.nnx.BatchNorm`, not that of this library.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "nnx-call-flag-ignored",
        NNX,
        "            type(self).__name__, self.use_running_average, use_running_average\n        )",
        "            type(self).__name__, self.use_running_average, None\n        )",
        "The call cannot say whether it evaluates.",
        hint="NNX BatchChannelNorm in evaluation: evaluation",
    ),
    Mutant(
        "nnx-momentum-ignored",
        NNX,
        "            momentum=momentum,\n",
        "",
        "BatchChannelNorm keeps its momentum to itself, as the authors' PBCNorm does.",
        hint="NNX BatchChannelNorm of the batch: micro",
    ),
    Mutant(
        "nnx-batch-epsilon-ignored",
        NNX,
        "epsilon=epsilon if batch_epsilon is None else batch_epsilon",
        "epsilon=epsilon",
        "One epsilon serves both norms.",
        hint="NNX BatchChannelNorm of the batch: scaling the input",
    ),
    Mutant(
        "nnx-estimate-ignored",
        NNX,
        "(EstimatedBatchNorm if estimate else BatchNorm)(",
        "EstimatedBatchNorm(",
        "Estimated statistics always: a copy in cellseg_models ignores `estimate` too.",
        hint="NNX BatchChannelNorm of the batch: a channel norm follows",
    ),
    Mutant(
        "nnx-axis-name-ignored",
        NNX,
        "            axis_name=axis_name,\n",
        "",
        "BatchChannelNorm does not tell its batch norm of the other devices.",
        hint="NNX BatchChannelNorm of the batch: devices weigh",
    ),
    Mutant(
        "nnx-channel-norm-of-the-input",
        NNX,
        "self.channel_norm.affine(push(f, m))",
        "self.channel_norm.affine(m)",
        "The channel norm is measured on the input, not on what the batch norm makes of it.",
        hint="NNX BatchChannelNorm: a channel norm follows",
    ),
    Mutant(
        "nnx-transposed-kernel-axis",
        NNX,
        'return -2 if getattr(self, "transpose_kernel", False) else -1',
        "return -1",
        "A transposed convolution with exchanged axes is standardized along the wrong one.",
        hint="NNX WSConvTranspose: shifting the weights",
    ),
    Mutant(
        "nnx-gain-ignored",
        NNX,
        "gain=None if self.gain is None else self.gain[...]",
        "gain=None",
        "There is a gain, and nothing is multiplied by it.",
        hint="WSConv nnx float64 features=6 kernel_size=3x3 padding=1 standardization=nfnet",
    ),
    Mutant(
        "nnx-weights-rounded-early",
        NNX,
        "            self.kernel[...],",
        "            self._promote_dtype(values, **kwargs)[1],",
        "Weights are cast to half precision first, and standardized then.",
        hint="NNX WSDense: weights are standardized before",
    ),
    Mutant(
        "nnx-weights-overwritten",
        NNX,
        "        if mask is not None:\n            kernel *= mask",
        "        self.kernel[...] = kernel\n"
        "        if mask is not None:\n"
        "            kernel *= mask",
        "The standardized weights are stored, and trained: `nnx.WeightNorm` does so "
        "(google/flax 5576).",
        hint="NNX WSDense: a call changes",
    ),
    # --- interop ----------------------------------------------------------------------------------
    Mutant(
        "kernel-not-transposed",
        LAYOUTS,
        "lambda weight: np.moveaxis(weight, (0, 1), (-1, -2))",
        "lambda weight: np.moveaxis(weight, (0, 1), (-2, -1))",
        "Input and output features of a kernel from PyTorch trade places.",
        hint="WSDense nnx",
    ),
    Mutant(
        "kernel-not-transposed-back",
        LAYOUTS,
        "lambda kernel: np.moveaxis(kernel, (-1, -2), (0, 1))",
        "lambda kernel: np.moveaxis(kernel, (-2, -1), (0, 1))",
        "Input and output features of a kernel from Flax trade places.",
        hint="WSDense nnx",
    ),
    Mutant(
        "window-transposed",
        LAYOUTS,
        "lambda weight: np.moveaxis(weight, (0, 1), (-1, -2))",
        "lambda weight: weight.T",
        "All axes of a kernel from PyTorch are reversed, height and width among them.",
        hint="WSConv nnx",
    ),
    Mutant(
        "transposed-kernel-not-flipped",
        LAYOUTS,
        "np.moveaxis(_flip(weight, first=2), (0, 1), (-2, -1))",
        "np.moveaxis(weight, (0, 1), (-2, -1))",
        "Flax convolves where PyTorch correlates, so the window must be flipped.",
        hint="upsampler",
    ),
    Mutant(
        "transposed-kernels-mistaken",
        LAYOUTS,
        "by_flag = {False: FLIPPED, True: UNFLIPPED}",
        "by_flag = {False: UNFLIPPED, True: FLIPPED}",
        "The two forms of Flax's transposed convolution are taken for each other.",
        hint="square upsampler",
    ),
    Mutant(
        "flattened-pixels-first",
        LAYOUTS,
        "weight.reshape(len(weight), channels, -1).transpose(2, 1, 0).reshape(-1, len(weight))",
        "weight.T",
        "PyTorch flattens channels first, Flax channels last: the weights that follow must be "
        "reordered.",
        hint="upsampler",
    ),
    # --- PyTorch ----------------------------------------------------------------------------------
    Mutant(
        "torch-epsilon-outside-the-root",
        TORCH_NORMS,
        "torch.sqrt(var + self.eps)",
        "(torch.sqrt(var) + self.eps)",
        "The divisor is std + eps.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-epsilon-missing",
        TORCH_NORMS,
        "torch.sqrt(var + self.eps)",
        "torch.sqrt(var)",
        "Nothing keeps the root of a small variance away from 0.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-shift-ignored",
        TORCH_NORMS,
        "_along_axis_1(self.scale, x) * x_hat + _along_axis_1(self.shift, x)",
        "_along_axis_1(self.scale, x) * x_hat",
        "The norms do not shift.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-unbiased-variance",
        TORCH_NORMS,
        "var = ((x - mean) ** 2).mean(axes, keepdim=True)",
        "var = x.var(axes, keepdim=True)",
        "`Tensor.var` is unbiased by default.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-one-pass-variance",
        TORCH_NORMS,
        "var = ((x - mean) ** 2).mean(axes, keepdim=True)",
        "var = (x**2).mean(axes, keepdim=True) - mean**2",
        "E[x^2] - E[x]^2, as the annotated implementation has it, cancels where the mean is large.",
        hint="BatchNorm linen float32 data=mean 1e4",
    ),
    Mutant(
        "torch-batch-moments-without-gradient",
        TORCH_NORMS,
        "        mean, var = batch_moments(x)",
        "        mean, var = batch_moments(x.detach())",
        "Batch norm without the gradient through the batch's mean and variance.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "torch-training-does-not-update",
        TORCH_NORMS,
        "        mean, var = batch_moments(x)\n        if self.update_stats is not False:",
        "        mean, var = batch_moments(x)\n        if self.update_stats:",
        "By default the running estimates of BatchNorm never move.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "torch-evaluation-updates",
        TORCH_NORMS,
        "if not self.update_stats:",
        "if self.update_stats is False:",
        "By default the running estimates move in evaluation too.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "torch-evaluation-by-the-batch",
        TORCH_NORMS,
        "        if not self.update_stats:\n            return self._estimates(x)",
        "        if not self.update_stats:\n            return batch_moments(x)",
        "Evaluation normalizes by whatever else is in the batch.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "torch-update-with-gradient",
        TORCH_NORMS,
        "    @torch.no_grad()\n"
        "    def _update(self, x: Tensor, mean: Tensor, var: Tensor) -> None:",
        "    def _update(self, x: Tensor, mean: Tensor, var: Tensor) -> None:",
        "The estimates keep the graph of every batch alive, as in the annotated implementation.",
        hint="BatchNorm nnx",
    ),
    Mutant(
        "torch-momentum-swapped",
        TORCH_NORMS,
        "        mu_hat = (1 - r) * self.exp_mean + r * mu",
        "        mu_hat = r * self.exp_mean + (1 - r) * mu",
        "Flax's momentum in PyTorch's place, for the mean.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-running-variance-swapped",
        TORCH_NORMS,
        "        sigma2_hat = (1 - r) * self.exp_var + r * sigma2",
        "        sigma2_hat = r * self.exp_var + (1 - r) * sigma2",
        "Flax's momentum in PyTorch's place, for the variance.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-nan-poisons-the-statistics",
        TORCH_NORMS,
        "finite = mu.isfinite() & sigma2.isfinite()",
        "finite = torch.ones_like(mu, dtype=torch.bool)",
        "One batch with a NaN, and the running estimates are NaN for ever, as in PyTorch's own.",
        hint="BatchNorm linen float64 data=one NaN",
    ),
    Mutant(
        "torch-running-variance-unbiased",
        TORCH_NORMS,
        "        return var\n"
        "\n"
        "    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:",
        "        return var * (x[:, :1].numel() / max(x[:, :1].numel() - 1, 1))\n"
        "\n"
        "    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:",
        "The running variance of PyTorch's own batch norm: off by n / (n - 1).",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-running-variance-not-unbiased",
        TORCH_NORMS,
        "return var * (n / max(n - 1, 1))",
        "return var",
        "The biased running variance where the unbiased is asked for.",
        hint="BatchNorm linen float64 running_variance=unbiased",
    ),
    Mutant(
        "torch-statistics-in-half-precision",
        TORCH_NORMS,
        "            if widen(converted).dtype != converted.dtype:\n"
        "                setattr(self, name, original.to(converted.device))",
        "            setattr(self, name, converted)",
        "A module converted to half precision rounds its running estimates.",
        hint="estimates stay wide",
    ),
    Mutant(
        "torch-normalized-before-the-update",
        TORCH_NORMS,
        "            self._update(x, *batch_moments(x.detach()))\n"
        "        return self._estimates(x)",
        "            before = [estimate.clone() for estimate in self._estimates(x)]\n"
        "            self._update(x, *batch_moments(x.detach()))\n"
        "            return before\n"
        "        return self._estimates(x)",
        "The batch is normalized by the estimates of the batches before it.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-gradient-through-the-estimates",
        TORCH_NORMS,
        "            self._update(x, *batch_moments(x.detach()))\n"
        "        return self._estimates(x)",
        "            mean, var = batch_moments(x)\n"
        "            self._update(x, mean, var)\n"
        "            mu_hat, sigma2_hat = self._estimates(x)\n"
        "            leak = [self.momentum * (v - v.detach()) for v in (mean, var)]\n"
        "            return mu_hat + leak[0], sigma2_hat + leak[1]\n"
        "        return self._estimates(x)",
        "Normalizing by the updated estimates lets a tenth of the batch's gradient through.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-statistics-of-the-output",
        TORCH_NORMS,
        "            self._update(x, *batch_moments(x.detach()))\n"
        "        return self._estimates(x)",
        "            mu_hat, sigma2_hat = self._estimates(x.detach())\n"
        "            x_hat = (x.detach() - mu_hat) / torch.sqrt(sigma2_hat + self.eps)\n"
        "            self._update(x_hat, *batch_moments(x_hat))\n"
        "        return self._estimates(x)",
        "The estimates move towards the moments of the normalized values, as in "
        "bonlime/pytorch-tools.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-estimate-normalizes-by-the-batch",
        TORCH_NORMS,
        "            self._update(x, *batch_moments(x.detach()))\n"
        "        return self._estimates(x)",
        "            self._update(x, *batch_moments(x.detach()))\n        return batch_moments(x)",
        "EstimatedBatchNorm is a plain batch norm in training.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-groups-interleaved",
        TORCH_NORMS,
        "grouped = widen(x).unflatten(1, (self.groups, -1))",
        "grouped = widen(x).unflatten(1, (-1, self.groups)).transpose(1, 2)",
        "Channels are dealt out to the groups in turn, and come out in another order.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-channel-norm-without-space",
        TORCH_NORMS,
        "axes=range(2, grouped.dim())",
        "axes=(2,)",
        "Each pixel by itself: a layer norm of the group.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-channel-norm-of-space-only",
        TORCH_NORMS,
        "axes=range(2, grouped.dim())",
        "axes=range(3, grouped.dim())",
        "Each channel by itself: an instance norm.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-channel-norm-of-the-batch",
        TORCH_NORMS,
        "axes=range(2, grouped.dim())",
        "axes=(0, *range(2, grouped.dim()))",
        "The channel norm pools its samples, which must not see each other.",
        hint="ChannelNorm nnx",
    ),
    Mutant(
        "torch-contiguous-only",
        TORCH_NORMS,
        "        grouped = widen(x).unflatten(1, (self.groups, -1))\n"
        "        mean, var = _moments(grouped, axes=range(2, grouped.dim()))\n"
        "        return self._normalize(grouped, mean, var).flatten(1, 2).to(x.dtype)",
        "        grouped = widen(x).view(len(x), self.groups, -1)\n"
        "        mean, var = _moments(grouped, axes=(2,))\n"
        "        return self._normalize(grouped, mean, var).view(x.shape).to(x.dtype)",
        "`.view` wants contiguous memory, as the annotated implementation does.",
        hint="data=strided",
    ),
    Mutant(
        "torch-batch-epsilon-fixed",
        TORCH_NORMS,
        "eps=eps if batch_eps is None else batch_eps",
        "eps=1e-5",
        "The batch norm has an eps of its own, as in the README of the authors.",
        hint="epsilon=0.001",
    ),
    Mutant(
        "torch-batch-epsilon-ignored",
        TORCH_NORMS,
        "eps=eps if batch_eps is None else batch_eps",
        "eps=eps",
        "One eps serves both norms.",
        hint="batch_epsilon",
    ),
    Mutant(
        "torch-estimate-ignored",
        TORCH_NORMS,
        "batch_norm = EstimatedBatchNorm if estimate else BatchNorm",
        "batch_norm = EstimatedBatchNorm",
        "Estimated statistics always: a copy in cellseg_models ignores `estimate` too.",
        hint="BatchChannelNorm nnx float64 num_groups=4 estimate=False",
    ),
    Mutant(
        "torch-rounded-between-the-norms",
        TORCH_NORMS,
        "y = self.batch_norm(widen(x))",
        "y = self.batch_norm(x)",
        "Half-precision values are rounded between the two norms as well.",
        hint="BatchChannelNorm linen bfloat16",
    ),
    Mutant(
        "torch-half-precision-statistics",
        TORCH_PRECISION,
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        "Half-precision input is summed in half precision.",
        hint="BatchNorm linen bfloat16",
    ),
    Mutant(
        "torch-weights-biased",
        TORCH_WEIGHTS,
        "(n - standardization.unbiased)",
        "n",
        "The biased variance, as in BiT and timm.",
        hint="WSDense nnx",
    ),
    Mutant(
        "torch-weights-of-the-window",
        TORCH_WEIGHTS,
        "axes = tuple(range(1, w.dim()))",
        "axes = tuple(range(2, w.dim())) or (1,)",
        "Each window by itself: input channels are not pooled.",
        hint="WSConv nnx",
    ),
    Mutant(
        "torch-weights-of-input-channels",
        TORCH_WEIGHTS,
        "axes = tuple(range(1, w.dim()))",
        "axes = (0, *range(2, w.dim()))",
        "The weights of each input channel are standardized, not those of each output channel.",
        hint="WSConv nnx",
    ),
    Mutant(
        "torch-weights-not-centered",
        TORCH_WEIGHTS,
        "standardization.gamma * (w - mean) /",
        "standardization.gamma * w /",
        "Weights are scaled only, as in weight normalization.",
        hint="WSDense nnx",
    ),
    Mutant(
        "torch-weights-epsilon-outside-the-root",
        TORCH_WEIGHTS,
        "return (s * (var + eps)).sqrt()",
        "return (s * var).sqrt() + eps",
        "The divisor is std + eps, as in the README of the authors.",
        hint="WSDense nnx",
    ),
    Mutant(
        "torch-gain-ignored",
        TORCH_WEIGHTS,
        "w_hat = w_hat * widen(gain).view(-1, *(1,) * len(axes))",
        "pass",
        "The learned gain changes nothing.",
        hint="standardization=timm_scaled",
    ),
    Mutant(
        "torch-weights-in-half-precision",
        TORCH_WEIGHTS,
        "w = widen(weight)",
        "w = weight",
        "Half-precision weights are summed in half precision.",
        hint="weights are standardized wide",
    ),
    Mutant(
        "torch-weights-overwritten",
        TORCH_WEIGHTS,
        "        return standardize_weight(self.weight, self.standardization, self.gain)",
        "        standardized = standardize_weight(self.weight, self.standardization, self.gain)\n"
        "        self.weight.data = standardized.data\n"
        "        return self.weight",
        "The standardized weights are stored, and trained, as `nnx.WeightNorm` does.",
        hint="WSDense nnx",
    ),
)

EQUIVALENT: tuple[Mutant, ...] = (
    Mutant(
        "origin-from-the-edge",
        AFFINE,
        "starts[i] = min(strides[i] // 2, (length - 1) % strides[i])",
        "starts[i] = 0",
        "Another grid, another origin: on paper any gives the same moments, and one value in 64 "
        "bounds the loss of digits wherever the grid begins.",
        hint="float32 data=mean 1e4",
    ),
    Mutant(
        "evaluation-pools-too",
        NORMS,
        "if update_stats or not use_running_average:",
        "if True:",
        "What is pooled is not used: further down, evaluation standardizes by the estimates as "
        "they were.",
        hint="BatchNorm in evaluation: evaluation moves no",
    ),
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
    Mutant(
        "torch-moments-not-detached",
        TORCH_NORMS,
        "            self._update(x, *batch_moments(x.detach()))\n"
        "        return self._estimates(x)",
        "            self._update(x, *batch_moments(x))\n        return self._estimates(x)",
        "`_update` records no gradient, whatever it is given; detached, the moments need no graph "
        "to begin with.",
        hint="EstimatedBatchNorm nnx",
    ),
    Mutant(
        "torch-view-or-reshape",
        TORCH_NORMS,
        "return values.view(1, -1, *(1,) * (x.dim() - 2))",
        "return values.reshape(1, -1, *(1,) * (x.dim() - 2))",
        "A parameter or buffer is contiguous, and then `view` and `reshape` are the same.",
        hint="strided",
    ),
)
