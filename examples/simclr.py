# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss, or with InfoNCE: trains an encoder without labels, then tests it.

    python examples/simclr.py --data digits
    python examples/simclr.py --data cifar10 --root DIR --backbone resnet18 --epochs 200
    python examples/simclr.py --data folder --root DIR --backbone timm:resnet50 --workers 8
    python examples/simclr.py --data digits --device cpu --devices 2
    python examples/simclr.py --resume runs/NAME

The folder of a run holds Lightning's checkpoint of its last complete epoch, `last.ckpt`, the logs
and `result.json`. On the CPU, a run that was stopped and resumed ends with the same bits as one
that was never stopped.

With several devices Lightning trains by DDP, in a process for each. Each process, a rank, has its
part of each batch of `--batch-size` images. With `gather_distributed=True` the loss and its
threshold are those of the whole batch. Rank 0 prints and evaluates.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import sys

import torch
from common import data, encoder, training
from common.options import threshold
from torch import Tensor

from hex import HEXLoss, InfoNCELoss


class SimCLR(training.Method):
    """SimCLR: two views of an image attract each other, all other views of the batch repel."""

    losses = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}
    gathers = True

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        self.projector = encoder.projector(self.width, options.features)
        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature,
                threshold=threshold(options),
                variant=options.variant,
                gather_distributed=True,  # with one device it changes nothing
            )
        else:
            self.criterion = InfoNCELoss(options.temperature, gather_distributed=True)

    def embed(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z0, z1 = self.embed(torch.cat([view0, view1])).chunk(2)
        return self.criterion(z0, z1)


def main(arguments: list[str] | None = None) -> int:
    return training.main(SimCLR, arguments)


if __name__ == "__main__":
    sys.exit(main())
