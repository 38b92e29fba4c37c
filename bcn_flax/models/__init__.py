"""Networks that use the layers: those of linen. The VGG of NNX is in `bcn_flax.models.nnx`.

`bcn_torch.VGG` is the same one in PyTorch.
"""

from bcn_flax.models.linen import VGG
from bcn_flax.models.resnet import ResNet
from bcn_flax.models.vgg import Norm

__all__ = ["VGG", "Norm", "ResNet"]
