# SPDX-License-Identifier: MIT
"""DINO, alone or with HEX added: self-distillation with small crops and a centred teacher.

    python examples/dino.py --data digits
    python examples/dino.py --data folder --root DIR --backbone timm:vit_tiny_patch16_224

A student sees two views and small crops of an image. It has to reproduce the scores that the
teacher, its own slow average, gives the two views. HEX is added on the student's projected features
of the two views, those before the head's last layer: alpha HEX + (1 - alpha) DINO.

DINO: Caron et al. 2021, https://arxiv.org/abs/2104.14294. Needs hex-ssl[examples].
"""

import argparse
import copy
import sys
import warnings

import torch
from common import data, training
from common.options import fraction, positive, threshold
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from hex import HEXLoss


class DINO(training.Method):
    """DINO: a student with small crops learns the scores of its slow average, the teacher."""

    losses = {"hex": "alpha HEX + (1 - alpha) base", "base": "cross-entropy with the teacher"}
    local_views = 4

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        self.head, self.teacher_head = (
            head(self.width, options.features, options.prototypes) for _ in range(2)
        )
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.teacher = copy.deepcopy(self.backbone)
        deactivate_requires_grad(self.teacher)
        deactivate_requires_grad(self.teacher_head)
        self.momentum = options.momentum

        self.base = DINOLoss(options.prototypes)  # holds the centre of the teacher's scores
        self.alpha = options.alpha
        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )

    @classmethod
    def add_options(cls, add) -> None:
        add("--alpha", type=fraction, default=0.1, help="weight of HEX, from 0 to 1")
        add("--prototypes", type=positive, default=1024, help="how many scores a view gets")
        add(
            "--momentum",
            type=fraction,
            default=0.95,
            help="momentum of the teacher; rises to 1; use 0.996 for long runs",
        )

    def forward(self, view0: Tensor, view1: Tensor, *crops: Tensor) -> Tensor:
        views = torch.cat([view0, view1])
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher(views)).chunk(2)
        z = self.project(views)
        student = self.scores(z).chunk(2)
        small = self.scores(self.project(torch.cat(crops))).chunk(len(crops))
        base = self.base(list(teacher), [*student, *small])
        if self.criterion is None:
            return base
        return self.alpha * self.criterion(*z.chunk(2)) + (1 - self.alpha) * base

    def project(self, images: Tensor) -> Tensor:
        """The features before the head's last layer."""
        return self.head.layers(self.backbone(images))

    def scores(self, z: Tensor) -> Tensor:
        return self.head.last_layer(nn.functional.normalize(z))

    def after_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step - 1, steps, self.momentum, 1.0)
        update_momentum(self.backbone, self.teacher, momentum)
        update_momentum(self.head, self.teacher_head, momentum)


def head(width: int, features: int, prototypes: int) -> DINOProjectionHead:
    with warnings.catch_warnings():  # lightly uses the older weight_norm of torch
        warnings.simplefilter("ignore", FutureWarning)
        return DINOProjectionHead(width, 2 * width, features, prototypes, batch_norm=True)


def main(arguments: list[str] | None = None) -> int:
    return training.main(DINO, arguments)


if __name__ == "__main__":
    sys.exit(main())
