# SPDX-License-Identifier: MIT
"""hex-ssl: the HEX contrastive loss (WACV 2025) on kernels in C.

Write `from hex import HEXLoss`: a bare `import hex` hides the builtin function hex().
"""

from ._load import _C as _C
from .functional import batch_threshold, hex_loss, info_nce
from .logits import HEXCrossEntropyLoss, hex_cross_entropy
from .loss import HEXLoss, InfoNCELoss, Statistics
from .sup_con import HEXSupConLoss, hex_sup_con
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
