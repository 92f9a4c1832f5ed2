# SPDX-License-Identifier: MIT
"""Supervised contrastive learning with the HEX loss, or with SupCon: a class attracts itself.

    python examples/supcon.py --data digits
    python examples/supcon.py --data cifar10 --root DIR --backbone resnet18 --epochs 200

Here the labels are used: all views of the anchor's class attract it. H(i) are the nearest views of
other classes, with which the anchor could be confused. Without a threshold the loss is SupCon, with
the mean over positives outside the logarithm.

SupCon: Khosla et al. 2020, https://arxiv.org/abs/2004.11362. Needs hex-ssl[examples].
"""

import argparse
import sys

import torch
from common import data, encoder, training
from common.options import threshold
from torch import Tensor

from hex import HEXSupConLoss


class SupCon(training.Method):
    """SupCon: views of one class attract each other, those of other classes repel."""

    losses = {"hex": "HEX in place of SupCon", "base": "SupCon"}
    supervised = True
    gathers = True

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        self.projector = encoder.projector(self.width, options.features)
        if options.loss == "hex":
            self.criterion = HEXSupConLoss(
                options.temperature,
                threshold=threshold(options),
                variant=options.variant,
                gather_distributed=True,  # with one device it changes nothing
            )
        else:
            self.criterion = HEXSupConLoss(
                options.temperature, threshold=None, gather_distributed=True
            )

    def forward(self, view0: Tensor, view1: Tensor, labels: Tensor) -> Tensor:
        z0, z1 = self.projector(self.backbone(torch.cat([view0, view1]))).chunk(2)
        return self.criterion(torch.stack([z0, z1], dim=1), labels)  # (B, 2, D), (B,)


def main(arguments: list[str] | None = None) -> int:
    return training.main(SupCon, arguments)


if __name__ == "__main__":
    sys.exit(main())
