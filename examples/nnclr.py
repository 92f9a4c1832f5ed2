# SPDX-License-Identifier: MIT
"""NNCLR with the HEX loss, or with InfoNCE: the positive is the nearest neighbour of a past view.

    python examples/nnclr.py --data digits
    python examples/nnclr.py --data cifar10 --root DIR --backbone resnet18 --epochs 200 --bank 16384

Each projection is replaced by its nearest neighbour in a bank of past projections (lightly's). The
prediction from the other view has to find that neighbour among those of the whole batch. This is
mode "query", once in each direction.

NNCLR: Dwibedi et al. 2021, https://arxiv.org/abs/2104.14548. Needs hex-ssl[examples].
"""

import argparse
import sys

import torch
from common import data, training
from common.options import positive, threshold
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule
from torch import Tensor

from hex import HEXLoss, InfoNCELoss


class NNCLR(training.Method):
    """NNCLR: a view attracts the nearest neighbour, in a bank of past views, of the other view."""

    losses = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}
    classes_known = False  # not of the neighbours in the bank

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        features, hidden = options.features, 2 * self.width
        self.projector = NNCLRProjectionHead(self.width, hidden, features)
        self.predictor = NNCLRPredictionHead(features, hidden, features)

        # lightly does not put the bank into checkpoints, so it is registered here.
        self.bank = NNMemoryBankModule((options.bank, features))
        for name in ("bank", "bank_ptr"):
            self.bank.register_buffer(name, getattr(self.bank, name))

        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature,
                mode="query",
                threshold=threshold(options),
                variant=options.variant,
            )
        else:
            self.criterion = InfoNCELoss(options.temperature, mode="query")

    @classmethod
    def add_options(cls, add) -> None:
        add("--bank", type=positive, default=1024, help="how many past projections to search")

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z = self.projector(self.backbone(torch.cat([view0, view1])))
        p0, p1 = self.predictor(z).chunk(2)
        z0, z1 = z.detach().float().chunk(2)
        neighbour0 = self.bank(z0, update=False)
        neighbour1 = self.bank(z1, update=True)
        return (self.criterion(neighbour0, p1) + self.criterion(neighbour1, p0)) / 2


def main(arguments: list[str] | None = None) -> int:
    return training.main(NNCLR, arguments)


if __name__ == "__main__":
    sys.exit(main())
