"""Defects in the conversion of weights between PyTorch and Flax."""

from parity_tests.mutants.mutant import Mutant

LAYOUTS = "bcn_flax/interop/layouts.py"

MUTANTS = (
    Mutant(
        "kernel-not-transposed",
        LAYOUTS,
        "lambda weight: np.moveaxis(weight, (0, 1), (-1, -2))",
        "lambda weight: np.moveaxis(weight, (0, 1), (-2, -1))",
        "Input and output features of a kernel from PyTorch trade places.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "kernel-not-transposed-back",
        LAYOUTS,
        "lambda kernel: np.moveaxis(kernel, (-1, -2), (0, 1))",
        "lambda kernel: np.moveaxis(kernel, (-2, -1), (0, 1))",
        "Input and output features of a kernel from Flax trade places.",
        hint="WSDense linen float64",
    ),
    Mutant(
        "window-transposed",
        LAYOUTS,
        "lambda weight: np.moveaxis(weight, (0, 1), (-1, -2))",
        "lambda weight: weight.T",
        "All axes of a kernel from PyTorch are reversed, height and width among them.",
        hint="WSConv linen float64",
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
)
