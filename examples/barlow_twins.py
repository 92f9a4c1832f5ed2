# SPDX-License-Identifier: MIT
"""Barlow Twins, alone or with HEX added.

Barlow Twins makes each feature agree with itself between two views, and with no other feature.

    python examples/barlow_twins.py --data digits
    python examples/barlow_twins.py --data cifar10 --root DIR --backbone resnet18 --epochs 200

HEX is added as in the HEX paper: alpha HEX + (1 - alpha) Barlow Twins with alpha = 0.1, both on the
projections. The Barlow Twins loss is a sum over features, which the authors scale by 0.1, as is
done here.

Barlow Twins: Zbontar et al. 2021, https://arxiv.org/abs/2103.03230. Needs hex-ssl[examples].
"""

import argparse
import sys

import torch
from common import data, training
from common.options import above_zero, fraction, threshold
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import BarlowTwinsProjectionHead
from torch import Tensor

from hex import HEXLoss


class BarlowTwins(training.Method):
    """Barlow Twins: makes the correlation of the two views' features the identity."""

    losses = {"hex": "alpha HEX + (1 - alpha) base", "base": "cross-correlation"}

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        hidden = 2 * self.width
        self.projector = BarlowTwinsProjectionHead(self.width, hidden, options.features)
        self.base = BarlowTwinsLoss()
        self.scale = options.scale
        self.alpha = options.alpha
        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )

    @classmethod
    def add_options(cls, add) -> None:
        add("--alpha", type=fraction, default=0.1, help="weight of HEX, from 0 to 1")
        add("--scale", type=above_zero, default=0.1, help="factor of the Barlow Twins loss")

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z0, z1 = self.projector(self.backbone(torch.cat([view0, view1]))).chunk(2)
        base = self.scale * self.base(z0, z1)
        if self.criterion is None:
            return base
        return self.alpha * self.criterion(z0, z1) + (1 - self.alpha) * base


def main(arguments: list[str] | None = None) -> int:
    return training.main(BarlowTwins, arguments, features=512)


if __name__ == "__main__":
    sys.exit(main())
