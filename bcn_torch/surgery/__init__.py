"""Operations on whole models: convert their norms, recalibrate their statistics, fold them.

convert_batch_norm   replaces `torch.nn.BatchNorm2d` (1d, 3d, Sync) by BCN, with WS before it
recalibrate          replaces the running estimates by averages over given data
fold                 folds norms and standardized weights into plain weights, for inference
"""

from bcn_torch.surgery.conversion import convert_batch_norm
from bcn_torch.surgery.folding import fold
from bcn_torch.surgery.recalibration import recalibrate

__all__ = ["convert_batch_norm", "fold", "recalibrate"]
