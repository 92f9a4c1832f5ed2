# SPDX-License-Identifier: MIT
"""The contrastive losses of other libraries on PyPI: modules that are called with two views.

An ImportError means that the library is not installed: the `test` extra of hex-ssl has all three.
solo-learn is not on PyPI.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn


def lightly(temperature: float) -> nn.Module:
    """Both views are anchors. Needs torchvision, whose import the examples know to repair."""
    examples = str(Path(__file__).resolve().parents[1] / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    from common.vision import torchvision  # noqa: F401
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=temperature)


def pytorch_metric_learning(temperature: float) -> nn.Module:
    """Both views are anchors; every pair of a positive and a negative pair is in memory, O(N^3)."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=temperature))


def info_nce_pytorch(temperature: float) -> nn.Module:
    """The first view's rows alone are anchors and the second's the candidates: B x B cosines."""
    from info_nce import InfoNCE

    return InfoNCE(temperature=temperature)
