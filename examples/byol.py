# SPDX-License-Identifier: MIT
"""BYOL, alone or with HEX added: a network predicts the output of its own slow average.

    python examples/byol.py --data digits
    python examples/byol.py --data cifar10 --root DIR --backbone resnet18 --epochs 200

BYOL has no negatives, and HEX gives it some: the loss is alpha HEX + (1 - alpha) BYOL, where HEX is
computed on the trained network's projections of the two views.

BYOL: Grill et al. 2020, https://arxiv.org/abs/2006.07733. Needs hex-ssl[examples].
"""

import argparse
import copy
import sys

import torch
from common import data, training
from common.options import fraction, threshold
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from hex import HEXLoss


class BYOL(training.Method):
    """BYOL: predicts from one view what a slow average of the network makes of the other."""

    losses = {"hex": "alpha HEX + (1 - alpha) base", "base": "negative cosine"}

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        features, hidden = options.features, 2 * self.width
        projector = BYOLProjectionHead(self.width, hidden, features)
        self.online = nn.Sequential(self.backbone, projector)
        self.predictor = BYOLPredictionHead(features, hidden, features)
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)
        self.momentum = options.momentum

        self.base = NegativeCosineSimilarity()
        self.alpha = options.alpha
        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )

    @classmethod
    def add_options(cls, add) -> None:
        add("--alpha", type=fraction, default=0.1, help="weight of HEX, from 0 to 1")
        add(
            "--momentum",
            type=fraction,
            default=0.95,
            help="momentum of the moving average; rises to 1; use 0.99 for long runs",
        )

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        views = torch.cat([view0, view1])
        z = self.online(views)
        p0, p1 = self.predictor(z).chunk(2)
        with torch.no_grad():
            target0, target1 = self.target(views).chunk(2)
        base = (self.base(p0, target1) + self.base(p1, target0)) / 2
        if self.criterion is None:
            return base
        return self.alpha * self.criterion(*z.chunk(2)) + (1 - self.alpha) * base

    def after_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step - 1, steps, self.momentum, 1.0)
        update_momentum(self.online, self.target, momentum)


def main(arguments: list[str] | None = None) -> int:
    return training.main(BYOL, arguments)


if __name__ == "__main__":
    sys.exit(main())
