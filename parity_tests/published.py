"""What each published code computes, by name, restated in float64 NumPy in its own form."""

import numpy as np

# Weight standardization: w is (out, fan_in), and so is every result.


def annotated(w, gain):
    n = w.shape[1]
    var = ((w - w.mean(1, keepdims=True)) ** 2).sum(1, keepdims=True) / (n - 1)
    return (w - w.mean(1, keepdims=True)) / np.sqrt(var + 1e-5)


def authors_pytorch(w, gain):
    w = w - w.mean(1, keepdims=True)
    std = w.std(1, ddof=1).reshape(-1, 1) + 1e-5
    return w / std


def authors_tensorflow(w, gain):
    kernel = w.T  # TensorFlow's kernels have the output channel last
    kernel = kernel - np.mean(kernel, axis=0, keepdims=True)
    return (kernel / (np.std(kernel, axis=0, keepdims=True) + 1e-5)).T


def bit(w, gain):
    m, v = w.mean(1, keepdims=True), w.var(1, keepdims=True)
    return (w - m) / np.sqrt(v + 1e-10)


def timm(w, gain):
    # As a batch norm in training, one sample of `out` channels.
    rows = w.reshape(1, len(w), -1)
    mean, var = rows.mean((0, 2), keepdims=True), rows.var((0, 2), keepdims=True)
    return ((rows - mean) * (1 / np.sqrt(var + 1e-6))).reshape(w.shape)


def hf_bit(w, gain):
    rows = w.reshape(1, len(w), -1)
    mean, var = rows.mean((0, 2), keepdims=True), rows.var((0, 2), keepdims=True)
    return ((rows - mean) * (1 / np.sqrt(var + 1e-8))).reshape(w.shape)


def tf_deeplab(w, gain):
    kernel = w.T
    mean, var = kernel.mean(0, keepdims=True), kernel.var(0, keepdims=True)
    return ((kernel - mean) / np.sqrt(var + 1e-5)).T


def timm_scaled(w, gain):
    scale = w.shape[1] ** -0.5
    mean, var = w.mean(1, keepdims=True), w.var(1, keepdims=True)
    return (w - mean) / np.sqrt(var + 1e-6) * (gain * scale).reshape(-1, 1)


def nfnet(w, gain):
    kernel, fan_in = w.T, w.shape[1]
    mean, var = kernel.mean(0), kernel.var(0)
    scale = 1 / np.sqrt(np.maximum(var * fan_in, 1e-4)) * gain
    shift = mean * scale
    return (kernel * scale - shift).T


WEIGHT_STANDARDIZATION = {
    f.__name__: f
    for f in (
        annotated,
        authors_pytorch,
        authors_tensorflow,
        bit,
        timm,
        hf_bit,
        tf_deeplab,
        timm_scaled,
        nfnet,
    )
}

# Standard deviations of the weights: from far above every eps to far below.
SPREADS = (1.0, 0.1, 3e-3, 1e-3, 1e-4, 1e-5)


def weights(fan_in=12):
    """A row for each spread, around a mean of its own, and a gain for each."""
    rng = np.random.default_rng(0)
    mean, spread = rng.normal(size=(len(SPREADS), 1)), np.reshape(SPREADS, (-1, 1))
    w = 0.1 * mean + spread * rng.normal(size=(len(SPREADS), fan_in))
    return w, rng.uniform(0.5, 2, len(SPREADS))


# Batch-channel normalization: x is (n, c, h, w).

C, G = 6, 3


class Annotated:
    """`labml_nn/normalization/batch_channel_norm`, with `estimate=True`."""

    rate, eps = 0.1, 1e-5

    def __init__(self, scale, shift, group_scale, group_shift):
        self.scale, self.shift = scale, shift
        self.group_scale, self.group_shift = group_scale, group_shift
        self.exp_mean, self.exp_var = np.zeros(C), np.ones(C)

    def __call__(self, x, training):
        shape, n = x.shape, len(x)
        x = x.reshape(n, C, -1)
        if training:
            mean = x.mean((0, 2))
            var = (x**2).mean((0, 2)) - mean**2
            self.exp_mean = (1 - self.rate) * self.exp_mean + self.rate * mean
            self.exp_var = (1 - self.rate) * self.exp_var + self.rate * var
        x = (x - self.exp_mean[None, :, None]) / np.sqrt(self.exp_var + self.eps)[None, :, None]
        x = self.scale[None, :, None] * x + self.shift[None, :, None]
        x = x.reshape(n, G, -1)
        mean = x.mean(-1, keepdims=True)
        var = (x**2).mean(-1, keepdims=True) - mean**2
        x = (x - mean) / np.sqrt(var + self.eps)
        x = self.group_scale[None, :, None] * x + self.group_shift[None, :, None]
        return x.reshape(shape)


class AuthorsReadme:
    """`BCNorm(estimate=True)` and its `EstBN`."""

    moving_speed = 0.0

    def __init__(self, scale, shift, group_scale, group_shift):
        self.weight, self.bias = scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
        self.group_weight, self.group_bias = (
            a.reshape(1, G, 1) for a in (group_scale, group_shift)
        )
        self.exp_mean, self.exp_var = np.zeros(C), np.ones(C)

    def __call__(self, x, training):
        if training:
            rows = np.swapaxes(x, 0, 1).reshape(C, -1)
            mean = rows.mean(1)
            rows = rows - self.exp_mean.reshape(-1, 1)
            var = (rows * rows).mean(1)
            self.exp_mean = self.exp_mean * (1 - self.moving_speed) + self.moving_speed * mean
            self.exp_var = self.exp_var * (1 - self.moving_speed) + self.moving_speed * var
        y = x - self.exp_mean.reshape(1, -1, 1, 1)
        y = y / np.sqrt(self.exp_var.reshape(1, -1, 1, 1) + 1e-5)
        y = self.weight * y + self.bias
        rows = y.reshape(1, len(x) * G, -1)
        mean, var = rows.mean((0, 2), keepdims=True), rows.var((0, 2), keepdims=True)
        y = ((rows - mean) / np.sqrt(var + 1e-5)).reshape(len(x), G, -1)
        return (y * self.group_weight + self.group_bias).reshape(x.shape)


class AuthorsReadmeWithARate(AuthorsReadme):
    """The buffer is set here, as everyone who trains with this code must do."""

    moving_speed = 0.2


class AuthorsLargeBatch:
    """`GN` of the ImageNet code: `nn.BatchNorm2d`, then a batch norm over (1, n * groups, -1)."""

    def __init__(self, scale, shift, group_scale, group_shift):
        self.weight, self.bias = scale, shift
        self.group_weight, self.group_bias = group_scale, group_shift
        self.exp_mean, self.exp_var = np.zeros(C), np.ones(C)

    def __call__(self, x, training):
        y = np.empty_like(x)
        for c in range(C):
            values = x[:, c]
            mean, var = self.exp_mean[c], self.exp_var[c]
            if training:
                mean, var = values.mean(), values.var()
                self.exp_mean[c] += 0.1 * (mean - self.exp_mean[c])
                self.exp_var[c] += 0.1 * (values.var(ddof=1) - self.exp_var[c])
            y[:, c] = self.weight[c] * (values - mean) / np.sqrt(var + 1e-5) + self.bias[c]
        for sample in y:
            for g in range(G):
                group = sample[g * C // G : (g + 1) * C // G]
                group[...] = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
                group[...] = self.group_weight[g] * group + self.group_bias[g]
        return y


BATCH_CHANNEL_NORM = {
    "annotated": Annotated,
    "authors_readme": AuthorsReadme,
    "authors_large_batch": AuthorsLargeBatch,
}
