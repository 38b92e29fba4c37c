"""Defects in the PyTorch reference."""

from parity_tests.mutants.mutant import Mutant

TORCH_NORMS = "bcn_torch/norms.py"
TORCH_WEIGHTS = "bcn_torch/weight_standardization.py"
TORCH_PRECISION = "bcn_torch/precision.py"

# Of EstimatedBatchNorm, in training
UPDATE = (
    "            mu, sigma2 = batch_moments(x.detach())\n"
    "            self._update(x, mu, sigma2)\n"
    "        return self._estimates(x)"
)

MUTANTS = (
    Mutant(
        "torch-epsilon-outside-the-root",
        TORCH_NORMS,
        "torch.sqrt(var + self.eps)",
        "(torch.sqrt(var) + self.eps)",
        "The divisor is std + eps.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-epsilon-missing",
        TORCH_NORMS,
        "torch.sqrt(var + self.eps)",
        "torch.sqrt(var)",
        "Nothing keeps the root of a small variance away from 0.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-shift-ignored",
        TORCH_NORMS,
        "_along_axis_1(scale, x) * x_hat + _along_axis_1(shift, x)",
        "_along_axis_1(scale, x) * x_hat",
        "The norms do not shift.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-unbiased-variance",
        TORCH_NORMS,
        "var = ((x - mean) ** 2).mean(axes, keepdim=True)",
        "var = x.var(axes, keepdim=True)",
        "`Tensor.var` is unbiased by default.",
        hint="ChannelNorm linen float64",
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
        hint="BatchNorm linen float64",
    ),
    Mutant(
        "torch-training-does-not-update",
        TORCH_NORMS,
        "        mean, var = batch_moments(x)\n        if self._updates():",
        "        mean, var = batch_moments(x)\n        if self.update_stats:",
        "By default the running estimates of BatchNorm never move.",
        hint="BatchNorm linen float64",
    ),
    Mutant(
        "torch-evaluation-updates",
        TORCH_NORMS,
        "return self.training if update_stats is None else update_stats",
        "return True if update_stats is None else update_stats",
        "By default the running estimates move in evaluation too.",
        hint="BatchNorm linen float64",
    ),
    Mutant(
        "torch-evaluation-by-the-batch",
        TORCH_NORMS,
        "mean, var = self._evaluation_moments(wide)",
        "mean, var = batch_moments(wide)",
        "Evaluation normalizes by whatever else is in the batch.",
        hint="BatchNorm linen float64",
    ),
    Mutant(
        "torch-update-with-gradient",
        TORCH_NORMS,
        "        with torch.no_grad():",
        "        with torch.enable_grad():",
        "The estimates keep the graph of every batch alive, as in the annotated implementation.",
        hint="BatchNorm linen float64",
    ),
    Mutant(
        "torch-momentum-swapped",
        TORCH_NORMS,
        "        mu_hat = (1 - r) * self.exp_mean + r * mu",
        "        mu_hat = r * self.exp_mean + (1 - r) * mu",
        "Flax's momentum in PyTorch's place, for the mean.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-running-variance-swapped",
        TORCH_NORMS,
        "        sigma2_hat = (1 - r) * self.exp_var + r * sigma2",
        "        sigma2_hat = r * self.exp_var + (1 - r) * sigma2",
        "Flax's momentum in PyTorch's place, for the variance.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-nan-enters-the-statistics",
        TORCH_NORMS,
        "finite = mu.isfinite() & sigma2.isfinite()",
        "finite = torch.ones_like(mu, dtype=torch.bool)",
        "One batch with a NaN, and the running estimates are NaN for ever, as in PyTorch's own.",
        hint="BatchNorm linen float64 data=one NaN",
    ),
    Mutant(
        "torch-running-variance-unbiased",
        TORCH_NORMS,
        "        return var\n\n    def reset_running_stats",
        "        return var * (x[:, :1].numel() / max(x[:, :1].numel() - 1, 1))\n\n"
        "    def reset_running_stats",
        "The running variance of PyTorch's own batch norm: off by n / (n - 1).",
        hint="EstimatedBatchNorm linen float64",
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
        UPDATE,
        "            before = [estimate.clone() for estimate in self._estimates(x)]\n"
        "            self._update(x, *batch_moments(x.detach()))\n"
        "            return before\n"
        "        return self._estimates(x)",
        "The batch is normalized by the estimates of the batches before it.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-gradient-through-the-estimates",
        TORCH_NORMS,
        UPDATE,
        "            mean, var = batch_moments(x)\n"
        "            self._update(x, mean, var)\n"
        "            mu_hat, sigma2_hat = self._estimates(x)\n"
        "            leak = [self.momentum * (v - v.detach()) for v in (mean, var)]\n"
        "            return mu_hat + leak[0], sigma2_hat + leak[1]\n"
        "        return self._estimates(x)",
        "Normalizing by the updated estimates lets a tenth of the batch's gradient through.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-statistics-of-the-output",
        TORCH_NORMS,
        UPDATE,
        "            mu_hat, sigma2_hat = self._estimates(x.detach())\n"
        "            x_hat = (x.detach() - mu_hat) / torch.sqrt(sigma2_hat + self.eps)\n"
        "            self._update(x_hat, *batch_moments(x_hat))\n"
        "        return self._estimates(x)",
        "The estimates move towards the moments of the normalized values, as in "
        "bonlime/pytorch-tools.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-estimate-normalizes-by-the-batch",
        TORCH_NORMS,
        UPDATE,
        "            self._update(x, *batch_moments(x))\n        return batch_moments(x)",
        "EstimatedBatchNorm is a plain batch norm in training.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-groups-interleaved",
        TORCH_NORMS,
        "grouped = widen(x).unflatten(1, [self.groups, -1])",
        "grouped = widen(x).unflatten(1, (-1, self.groups)).transpose(1, 2)",
        "Channels are dealt out to the groups in turn, and come out in another order.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-channel-norm-without-space",
        TORCH_NORMS,
        "axes=list(range(2, grouped.dim()))",
        "axes=[2]",
        "Each pixel by itself: a layer norm of the group.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-channel-norm-of-space-only",
        TORCH_NORMS,
        "axes=list(range(2, grouped.dim()))",
        "axes=list(range(3, grouped.dim()))",
        "Each channel by itself: an instance norm.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-channel-norm-of-the-batch",
        TORCH_NORMS,
        "axes=list(range(2, grouped.dim()))",
        "axes=[0, *range(2, grouped.dim())]",
        "The channel norm pools its samples, which must not see each other.",
        hint="ChannelNorm linen float64",
    ),
    Mutant(
        "torch-contiguous-only",
        TORCH_NORMS,
        "        grouped = widen(x).unflatten(1, [self.groups, -1])\n"
        "        mean, var = _moments(grouped, axes=list(range(2, grouped.dim())))\n"
        "        return self._normalize(grouped, mean, var).flatten(1, 2).to(x.dtype)",
        "        grouped = widen(x).view(len(x), self.groups, -1)\n"
        "        mean, var = _moments(grouped, axes=[2])\n"
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
        hint="BatchChannelNorm linen float64 num_groups=4 estimate=False",
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
        "torch-weights-biased",
        TORCH_WEIGHTS,
        "(n - int(standardization.unbiased))",
        "n",
        "The biased variance, as in BiT and timm.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "torch-weights-of-the-window",
        TORCH_WEIGHTS,
        "axes = list(range(1, w.dim()))",
        "axes = list(range(2, w.dim())) or [1]",
        "Each window by itself: input channels are not pooled.",
        hint="WSConv linen float64",
    ),
    Mutant(
        "torch-weights-of-input-channels",
        TORCH_WEIGHTS,
        "axes = list(range(1, w.dim()))",
        "axes = [0, *range(2, w.dim())]",
        "The weights of each input channel are standardized, not those of each output channel.",
        hint="WSConv linen float64",
    ),
    Mutant(
        "torch-weights-not-centered",
        TORCH_WEIGHTS,
        "standardization.gamma * (w - mean) /",
        "standardization.gamma * w /",
        "Weights are scaled only, as in weight normalization.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "torch-weights-epsilon-outside-the-root",
        TORCH_WEIGHTS,
        "return (s * (var + eps)).sqrt()",
        "return (s * var).sqrt() + eps",
        "The divisor is std + eps, as in the README of the authors.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "torch-gain-ignored",
        TORCH_WEIGHTS,
        "w_hat = w_hat * widen(gain).view([-1] + [1] * len(axes))",
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
        "torch-weights-rounded-to-the-input-first",
        TORCH_WEIGHTS,
        "return self._conv_forward(x, self._standardized_weight(), self.bias)",
        "weight = self.weight.to(x.dtype)\n"
        "        weight = standardize_weight(weight, self.standardization, self.gain)\n"
        "        return self._conv_forward(x, weight, self.bias)",
        "Under autocast, weights are rounded to the type of a bfloat16 input before they are "
        "standardized.",
        hint="standardized_before_it_is_rounded",
        tests=("test_torch_weight_standardization.py",),
    ),
    Mutant(
        "torch-gain-after-the-rounding",
        TORCH_WEIGHTS,
        "w_hat * widen(gain).view",
        "w_hat.to(weight.dtype) * gain.view",
        "Weights in half precision are rounded before they are multiplied by the gain.",
        hint="a_gain_in_half_precision",
        tests=("test_torch_weight_standardization.py",),
    ),
    Mutant(
        "torch-gain-reset-to-0",
        TORCH_WEIGHTS,
        "            nn.init.ones_(gain)",
        "            nn.init.zeros_(gain)",
        "A layer that is initialized again has a gain of 0: it is a constant.",
        hint="a_gain_starts_at_1",
        tests=("test_torch_weight_standardization.py",),
    ),
    Mutant(
        "torch-gain-always-in-float32",
        TORCH_WEIGHTS,
        "nn.Parameter(self.weight.new_ones(len(self.weight)))",
        "nn.Parameter(torch.ones(len(self.weight)))",
        "The gain has neither the type nor the device of the weight.",
        hint="a_gain_starts_at_1",
        tests=("test_torch_weight_standardization.py",),
    ),
    Mutant(
        "torch-one-image-warned-of",
        TORCH_NORMS,
        "math.prod(shape) == shape[1]",
        "shape[0] == 1",
        "A batch of one image has many values in each channel.",
        hint="one_image_is_no_single_value",
        tests=("test_torch_statistics.py",),
    ),
    Mutant(
        "torch-integers-widened",
        TORCH_NORMS,
        "            checks.require_floating_point(x)\n",
        "",
        "Integers become floats without a word, and the result is of integers.",
        hint="one_image_is_no_single_value",
        tests=("test_torch_statistics.py",),
    ),
    Mutant(
        "torch-types-mixed",
        TORCH_WEIGHTS,
        "return nn.functional.linear(x, self._standardized_weight(), self.bias)",
        "bias = None if self.bias is None else self.bias.to(x.dtype)\n"
        "        return nn.functional.linear(x, self._standardized_weight().to(x.dtype), bias)",
        "A bfloat16 input passes through a float32 layer, which PyTorch refuses.",
        hint="half_precision_input_and_types",
        tests=("test_torch_weight_standardization.py",),
    ),
    Mutant(
        "torch-weights-overwritten",
        TORCH_WEIGHTS,
        "        return standardize_weight(self.weight, self.standardization, self.gain)",
        "        standardized = standardize_weight(self.weight, self.standardization, self.gain)\n"
        "        self.weight.data = standardized.data\n"
        "        return self.weight",
        "The standardized weights are stored, and trained, as `nnx.WeightNorm` does.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "torch-half-precision-statistics",
        TORCH_PRECISION,
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x",
        "Half-precision input is summed in half precision.",
        hint="BatchNorm linen bfloat16",
    ),
)

EQUIVALENT = (
    Mutant(
        "torch-moments-not-detached",
        TORCH_NORMS,
        UPDATE,
        "            self._update(x, *batch_moments(x))\n        return self._estimates(x)",
        "`_update` records no gradient, whatever it is given; detached, the moments need no graph "
        "to begin with.",
        hint="EstimatedBatchNorm linen float64",
    ),
    Mutant(
        "torch-view-or-reshape",
        TORCH_NORMS,
        "return values.view(shape)",
        "return values.reshape(shape)",
        "A parameter or buffer is contiguous, and then `view` and `reshape` are the same.",
        hint="strided",
    ),
)
