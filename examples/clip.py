# SPDX-License-Identifier: MIT
"""CLIP with the HEX loss, or with InfoNCE: images and captions in one space.

    python examples/clip.py --data digits
    python examples/clip.py --data folder --root DIR --backbone resnet18 --epochs 50

The captions are made here, from the name of the class and the look of the view: "a bright seven, to
the left". So the labels are used, as words. HEX is used in mode "cross", which compares each image
with all captions and each caption with all images. CLIP's temperature is learned and is passed with
each call.

CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020. Needs hex-ssl[examples].
"""

import argparse
import math
import sys

import torch
from common import data, training
from common.options import threshold
from torch import Tensor, nn

from hex import HEXLoss, InfoNCELoss

LIGHT = "dark", "grey", "bright"
SIDE = "left", "middle", "right"


class CLIP(training.Method):
    """CLIP: images and captions attract their counterparts and repel all others of the batch."""

    losses = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}
    supervised = True
    gathers = True

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        self.image_head = nn.Linear(self.width, options.features)
        self.text = TextTower([*LIGHT, *SIDE, *images.classes], 64, options.features)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(options.temperature)))
        if options.loss == "hex":
            self.criterion = HEXLoss(
                mode="cross",
                threshold=threshold(options),
                variant=options.variant,
                gather_distributed=True,  # with one device it changes nothing
            )
        else:
            self.criterion = InfoNCELoss(mode="cross", gather_distributed=True)

    def forward(self, view0: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        image = self.image_head(self.backbone(view0))
        text = self.text(captions(view0, labels))
        scale = self.logit_scale.clamp(max=math.log(100)).exp()  # as CLIP's authors bound it
        return self.criterion(image, text, temperature=1 / scale)


class TextTower(nn.Module):
    """A transformer of one layer over a caption's words: (B, words) indices to (B, features)."""

    def __init__(self, words: list[str], width: int, features: int) -> None:
        super().__init__()
        self.words = words
        self.embedding = nn.Embedding(len(words), width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, features)

    def forward(self, captions: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(captions)).mean(1))


def captions(images: Tensor, labels: Tensor) -> Tensor:
    """Three words for each image, as indices (B, 3) into [*LIGHT, *SIDE, *classes].

    LIGHT tells in which third of the batch the image is by its mean brightness, and SIDE in which
    it is by the horizontal position of the centre of its brightness.
    """
    columns = (images.mean((1, 2)) + 1) / 2  # (B, W), the brightness of each column
    position = torch.linspace(-1, 1, columns.shape[1], device=images.device)
    light = columns.mean(1)
    side = (columns * position).sum(1) / columns.sum(1).clamp(min=1e-6)
    first = len(LIGHT) + len(SIDE)
    return torch.stack([thirds(light), len(LIGHT) + thirds(side), first + labels], dim=1)


def thirds(x: Tensor) -> Tensor:
    """For each number the third in which it is when all are in ascending order: 0, 1 or 2."""
    return x.argsort().argsort() * 3 // len(x)


def main(arguments: list[str] | None = None) -> int:
    return training.main(CLIP, arguments)


if __name__ == "__main__":
    sys.exit(main())
