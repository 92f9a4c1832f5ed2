# SPDX-License-Identifier: MIT
"""hex-ssl: the HEX contrastive loss (WACV 2025) for PyTorch, on kernels in C and CUDA.

Write `from hex import HEXLoss`, because a bare `import hex` hides the builtin function hex().
"""

from ._load import _C as _C
from .functional import batch_threshold, hex_cross_entropy, hex_loss, hex_sup_con, info_nce
from .loss import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss, InfoNCELoss, Statistics
from .threshold import ThresholdTracker

__version__ = "0.1.0"
__all__ = [
    "HEXCrossEntropyLoss",
    "HEXLoss",
    "HEXSupConLoss",
    "InfoNCELoss",
    "Statistics",
    "ThresholdTracker",
    "batch_threshold",
    "hex_cross_entropy",
    "hex_loss",
    "hex_sup_con",
    "info_nce",
]
