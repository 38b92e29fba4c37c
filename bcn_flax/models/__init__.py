"""Networks that use the layers: those of linen. Those of NNX are in `bcn_flax.models.nnx`.

`bcn_torch.VGG` is the same one in PyTorch.
"""

from bcn_flax.models.linen import VGG
from bcn_flax.models.vgg import Norm

__all__ = ["VGG", "Norm"]
