"""Defects in the layers of linen and NNX."""

from parity_tests.mutants.mutant import Mutant

LINEN = "bcn_flax/linen.py"
NNX = "bcn_flax/nnx.py"

MUTANTS = (
    Mutant(
        "linen-initialization-updates",
        LINEN,
        "if update_stats and not initializing:",
        "if update_stats:",
        "The example that `init` is given moves the running averages.",
        hint="contract of linen, start: BatchNorm",
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
        "followed_by(f, m, channel_norm.affine)",
        "followed_by(f, m, lambda _: channel_norm.affine(m))",
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
    Mutant(
        "linen-scale-init-of-both",
        LINEN,
        "scale_init=_with_metadata_of(self.scale_init, initializers.ones)",
        "scale_init=self.scale_init",
        "A zero scale of the batch norm stops its gradient: a residual block never learns.",
        hint="contract of linen, start: BatchChannelNorm with init",
    ),
    Mutant(
        "linen-bias-init-of-both",
        LINEN,
        "bias_init=_with_metadata_of(self.bias_init, initializers.zeros)",
        "bias_init=self.bias_init",
        "The batch norm's bias starts where the channel norm's should.",
        hint="contract of linen, start: BatchChannelNorm with init",
    ),
    Mutant(
        "linen-bias-learned-for-a-scale",
        LINEN,
        "if norm.use_scale else None",
        "if norm.use_bias else None",
        "A slip of copy and paste: without a bias there is no scale either.",
        hint="contract of linen, start: BatchNorm without",
    ),
    Mutant(
        "linen-statistics-of-the-parameters-type",
        LINEN,
        "dtype = promote(self.param_dtype, jnp.float32)",
        "dtype = self.param_dtype",
        "With parameters in bfloat16 the running averages are as narrow, and stop moving.",
        hint="contract of linen, start: BatchNorm in bfloat16",
    ),
    Mutant(
        "linen-mask-inverted",
        LINEN,
        "mask=None if mask is None else jnp.asarray(mask) != 0",
        "mask=None if mask is None else jnp.asarray(mask) == 0",
        "The weights that count are those that are masked.",
        hint="contract of linen, call: WSConv masked",
    ),
    Mutant(
        "linen-gain-from-0",
        LINEN,
        'super().param("gain", initializers.ones,',
        'super().param("gain", initializers.zeros,',
        "With a gain of 0 the layer starts as a constant, and its kernel has no gradient.",
        hint="contract of linen, start: WSDense, gain",
    ),
    Mutant(
        "nnx-statistics-not-written",
        NNX,
        "self.mean[...], self.var[...] = stats",
        "_ = stats",
        "The running averages are computed and not stored.",
        hint="NNX BatchChannelNorm: an nnx layer is linens",
    ),
    Mutant(
        "nnx-scale-init-of-both",
        NNX,
        'scale_init=_with_metadata_of("scale_init", scale_init, initializers.ones)',
        "scale_init=scale_init",
        "A zero scale of the batch norm stops its gradient: a residual block never learns.",
        hint="contract of NNX, start: BatchChannelNorm with init",
    ),
    Mutant(
        "nnx-axis-of-the-parts",
        NNX,
        '            "axis": axis,\n',
        "",
        "The norms inside of a batch-channel norm normalize along the last axis if called alone.",
        hint="contract of NNX, parts",
    ),
    Mutant(
        "nnx-group-size-ignored",
        NNX,
        "            num_groups,\n            group_size,\n",
        "            num_groups,\n",
        "BatchChannelNorm keeps its group size to itself.",
        hint="contract of NNX, start: BatchChannelNorm by size",
    ),
    Mutant(
        "nnx-statistics-of-the-parameters-type",
        NNX,
        "shape, stats_dtype = (num_features,), promote(param_dtype, jnp.float32)",
        "shape, stats_dtype = (num_features,), param_dtype",
        "With parameters in bfloat16 the running averages are as narrow, and stop moving.",
        hint="contract of NNX, start: BatchNorm in bfloat16",
    ),
    Mutant(
        "nnx-running-variance-ignored",
        NNX,
        "            running_variance=running_variance,\n            update_stats",
        "            update_stats",
        "BatchChannelNorm keeps its running variance to itself.",
        hint="contract of NNX, call: BatchChannelNorm unbiased",
    ),
    Mutant(
        "nnx-one-epsilon-for-the-channel-norm-too",
        NNX,
        "            epsilon=epsilon,\n            bias_init=bias_init,",
        "            epsilon=batch_epsilon or epsilon,\n            bias_init=bias_init,",
        "The channel norm takes the batch norm's epsilon.",
        hint="contract of NNX, call: BatchChannelNorm two epsilons",
    ),
    Mutant(
        "nnx-output-type-ignored",
        NNX,
        "        self.epsilon = _number(checks.require_epsilon(epsilon))\n"
        "        self.dtype = dtype\n"
        "        self.param_dtype = param_dtype\n"
        "        self.use_bias = use_bias\n"
        "        self.use_scale = use_scale\n"
        "        shape = (self.num_groups,)",
        "        self.epsilon = _number(checks.require_epsilon(epsilon))\n"
        "        self.dtype = None\n"
        "        self.param_dtype = param_dtype\n"
        "        self.use_bias = use_bias\n"
        "        self.use_scale = use_scale\n"
        "        shape = (self.num_groups,)",
        "ChannelNorm ignores its argument `dtype`.",
        hint="contract of NNX, type: ChannelNorm",
    ),
    Mutant(
        "nnx-mask-counts-as-a-bound",
        NNX,
        "mask=None if mask is None else jnp.asarray(mask) != 0",
        "mask=None if mask is None else jnp.asarray(mask) > 0.7",
        "Weights that the mask multiplies by less do not count in the variance.",
        hint="contract of NNX, call: WSConv masked",
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
        hint="NNX EstimatedBatchNorm",
    ),
    Mutant(
        "nnx-call-flag-ignored",
        NNX,
        "            type(self).__name__, self.use_running_average, use_running_average\n        )",
        "            type(self).__name__, self.use_running_average, None\n        )",
        "The call cannot say whether it evaluates.",
        hint="NNX BatchChannelNorm in evaluation: an nnx layer is linens",
    ),
    Mutant(
        "nnx-momentum-ignored",
        NNX,
        "            momentum=momentum,\n            epsilon=epsilon if",
        "            epsilon=epsilon if",
        "BatchChannelNorm keeps its momentum to itself, as the authors' PBCNorm does.",
        hint="NNX BatchChannelNorm: an nnx layer is linens",
    ),
    Mutant(
        "nnx-batch-epsilon-ignored",
        NNX,
        "epsilon=epsilon if batch_epsilon is None else batch_epsilon",
        "epsilon=epsilon",
        "One epsilon serves both norms.",
        hint="NNX BatchChannelNorm with all options",
    ),
    Mutant(
        "nnx-estimate-ignored",
        NNX,
        "(EstimatedBatchNorm if estimate else BatchNorm)(",
        "EstimatedBatchNorm(",
        "Estimated statistics always: a copy in cellseg_models ignores `estimate` too.",
        hint="NNX BatchChannelNorm of the batch: an nnx layer is linens",
    ),
    Mutant(
        "nnx-axis-name-ignored",
        NNX,
        "else batch_epsilon,\n            axis_name=axis_name,\n",
        "else batch_epsilon,\n",
        "BatchChannelNorm does not tell its batch norm of the other devices.",
        hint="NNX BatchChannelNorm: over devices too",
    ),
    Mutant(
        "nnx-channel-norm-of-the-input",
        NNX,
        "followed_by(f, m, self.channel_norm.affine)",
        "followed_by(f, m, lambda _: self.channel_norm.affine(m))",
        "The channel norm is measured on the input, not on what the batch norm makes of it.",
        hint="NNX BatchChannelNorm: an nnx layer is linens",
    ),
    Mutant(
        "nnx-transposed-kernel-axis",
        NNX,
        'return -2 if getattr(self, "transpose_kernel", False) else -1',
        "return -1",
        "A transposed convolution with exchanged axes is standardized along the wrong one.",
        hint="NNX WSConvTranspose: an nnx layer is linens",
    ),
    Mutant(
        "nnx-gain-ignored",
        NNX,
        "gain=None if self.gain is None else self.gain[...]",
        "gain=None",
        "There is a gain, and nothing is multiplied by it.",
        hint="NNX WSConv: an nnx layer is linens",
    ),
    Mutant(
        "nnx-weights-rounded-early",
        NNX,
        "            self.kernel[...],",
        "            self._promote_dtype(values, **kwargs)[1],",
        "Weights are cast to half precision first, and standardized then.",
        hint="NNX WSDense in half precision",
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
)
