# SPDX-License-Identifier: MIT
"""VICReg, alone or with HEX added.

VICReg makes the views agree, the features vary, and no feature repeat another.

    python examples/vicreg.py --data digits
    python examples/vicreg.py --data cifar10 --root DIR --backbone resnet18 --epochs 200

HEX is added as in the HEX authors' code: alpha * 5 HEX + (1 - alpha) VICReg with alpha = 0.1, on
the projections. The 5 makes up for the weights of VICReg's terms, which are 25, 25 and 1.

VICReg: Bardes et al. 2022, https://arxiv.org/abs/2105.04906. Needs hex-ssl[examples].
"""

import argparse
import sys

import torch
from common import data, training
from common.options import fraction, threshold
from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor

from hex import HEXLoss


class VICReg(training.Method):
    """VICReg: invariance of the views, variance and decorrelation of the features."""

    losses = {"hex": "alpha * 5 HEX + (1 - alpha) base", "base": "invariance, variance, covariance"}

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        hidden = 2 * self.width
        self.projector = VICRegProjectionHead(self.width, hidden, options.features)
        self.base = VICRegLoss()
        self.alpha = options.alpha
        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )

    @classmethod
    def add_options(cls, add) -> None:
        add("--alpha", type=fraction, default=0.1, help="weight of 5 HEX")

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z0, z1 = self.projector(self.backbone(torch.cat([view0, view1]))).chunk(2)
        base = self.base(z0, z1)
        if self.criterion is None:
            return base
        return self.alpha * 5 * self.criterion(z0, z1) + (1 - self.alpha) * base


def main(arguments: list[str] | None = None) -> int:
    return training.main(VICReg, arguments, features=512)


if __name__ == "__main__":
    sys.exit(main())
