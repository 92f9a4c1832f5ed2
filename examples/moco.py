# SPDX-License-Identifier: MIT
"""MoCo v2 with the HEX loss, or with InfoNCE: negatives from a queue, keys from a slow encoder.

    python examples/moco.py --data digits
    python examples/moco.py --data cifar10 --root DIR --backbone resnet18 --epochs 200 --queue 4096

The queue is lightly's memory bank, which HEX gets as `negatives`, (K, D). The candidates of a query
are its own key and the queue, so the keys in H(i) may come from batches long past.

MoCo v2: Chen et al. 2020, https://arxiv.org/abs/2003.04297. Needs hex-ssl[examples].
"""

import argparse
import copy
import sys

import torch
from common import data, training
from common.options import fraction, positive, threshold
from lightly.models.modules.heads import MoCoProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from hex import HEXLoss, InfoNCELoss


class MoCo(training.Method):
    """MoCo v2: a query attracts its key, and a queue of the keys of past batches repels it."""

    losses = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}
    classes_known = False  # not of the keys in the queue

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        projector = MoCoProjectionHead(self.width, self.width, options.features)
        self.queries = nn.Sequential(self.backbone, projector)
        self.keys = copy.deepcopy(self.queries)
        deactivate_requires_grad(self.keys)
        self.momentum = options.momentum

        # feature_dim_first=False makes the rows keys, as HEX takes them. lightly does not put the
        # queue into checkpoints, so it is registered here.
        self.queue = MemoryBankModule((options.queue, options.features), feature_dim_first=False)
        for name in ("bank", "bank_ptr"):
            self.queue.register_buffer(name, getattr(self.queue, name))

        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )
        else:
            self.criterion = InfoNCELoss(options.temperature)

    @classmethod
    def add_options(cls, add) -> None:
        add(
            "--queue",
            type=positive,
            default=768,
            help="number of keys; fewer than there are images",
        )
        add(
            "--momentum",
            type=fraction,
            default=0.98,
            help="momentum of the keys' encoder; use 0.999 for long runs",
        )

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        q = self.queries(view0)
        with torch.no_grad():
            k = nn.functional.normalize(self.keys(view1))
        k, queue = self.queue(k, update=True)  # the queue before it takes up k
        return self.criterion(q, k, queue)

    def after_step(self, step: int, steps: int) -> None:
        update_momentum(self.queries, self.keys, self.momentum)


def main(arguments: list[str] | None = None) -> int:
    return training.main(MoCo, arguments)


if __name__ == "__main__":
    sys.exit(main())
