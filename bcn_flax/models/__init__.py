"""Networks that use the layers, in linen; the same in NNX are in `bcn_flax.models.nnx`.

`bcn_torch.VGG` is the VGG in PyTorch.
"""

from bcn_flax.models.linen import VGG, ResNet

__all__ = ["VGG", "ResNet"]
