"""Operations on whole models: convert their norms, recalibrate their statistics, fold them.

`bcn_flax.surgery.linen` is for linen models and their variables, `bcn_flax.surgery.nnx` for NNX
models. `bcn_torch` has the same for PyTorch.
"""
