# SPDX-License-Identifier: MIT
"""All4One with the HEX loss, or with InfoNCE: five neighbours, their centroids, and the features.

    python examples/all4one.py --data digits
    python examples/all4one.py --data cifar10 --root DIR --backbone resnet18 --epochs 1000 \\
        --features 256 --bank 98304 --temperature 0.2 --momentum 0.99

The second command has the authors' settings for CIFAR, except for the optimizer, the views and the
widths of the heads.

A bank holds past projections of a momentum encoder, and each projection of that
encoder has five nearest neighbours there. The loss is half the sum of three terms:

* Neighbours: the nearest neighbour of one view has to find the prediction from the other view, as
  in NNCLR.
* Centroids: a transformer makes one embedding, the centroid, of the five neighbours of one view. It
  makes a second one of another prediction and the four nearest neighbours of the other view. The
  first centroid has to find the second.
* Features: each feature has to agree with itself between the encoder and the momentum encoder, and
  with no other feature. This is close to Barlow Twins.

The first two terms are contrastive, in mode "query". HEX goes into both, with a threshold of its
own in each: the cosines of centroids are much larger than those of neighbours.

The authors' code exchanges positions and features in the positional encoding. Here the encoding is
the usual one.

All4One: Estepa et al. 2023, https://arxiv.org/abs/2303.09417. Needs hex-ssl[examples].
"""

import argparse
import copy
import sys
from collections.abc import Callable

import numpy as np
import torch
from common import data, training
from common.options import above_zero, fraction, positive, threshold
from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import (
    deactivate_requires_grad,
    get_1d_sine_cosine_positional_embedding_from_positions,
    update_momentum,
)
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn.functional import normalize

from hex import HEXLoss, InfoNCELoss

NEIGHBOURS, LAYERS, HEADS = 5, 3, 8  # the last two of the transformer


class All4One(training.Method):
    """All4One: a view attracts a neighbour, and a centroid of five, of the other view."""

    losses = {
        "hex": "HEX in place of InfoNCE, in both terms",
        "base": "InfoNCE of neighbours and of centroids, redundancy of features",
    }
    classes_known = False  # not of the neighbours in the bank

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        features, hidden = options.features, 2 * self.width
        if features % HEADS:
            raise ValueError(f"--features: got {features}, wanted a multiple of {HEADS}")
        if options.bank < NEIGHBOURS:
            raise ValueError(f"--bank: got {options.bank}, wanted at least {NEIGHBOURS}")
        projector = NNCLRProjectionHead(self.width, hidden, features)
        self.online = nn.Sequential(self.backbone, projector)
        self.slow = copy.deepcopy(self.online)
        deactivate_requires_grad(self.slow)
        self.momentum = options.momentum
        self.to_neighbour = NNCLRPredictionHead(features, hidden, features)
        self.to_centroid = NNCLRPredictionHead(features, hidden, features)

        layer = nn.TransformerEncoderLayer(features, HEADS, 2 * features, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, LAYERS)
        place = get_1d_sine_cosine_positional_embedding_from_positions(
            features, np.arange(NEIGHBOURS, dtype=np.float32)
        )
        self.register_buffer("place", torch.from_numpy(place), persistent=False)

        # lightly does not put the bank into checkpoints, so it is registered here.
        self.bank = MemoryBankModule((options.bank, features), feature_dim_first=False)
        for name in ("bank", "bank_ptr"):
            self.bank.register_buffer(name, getattr(self.bank, name))

        def criterion(temperature: float) -> nn.Module:
            if options.loss == "base":
                return InfoNCELoss(temperature, mode="query")
            return HEXLoss(
                temperature, mode="query", threshold=threshold(options), variant=options.variant
            )

        self.criterion = criterion(options.temperature)
        self.criterion_of_centroids = criterion(options.centroid_temperature)

    @classmethod
    def add_options(cls, add) -> None:
        add("--bank", type=positive, default=1024, help="how many past projections to search")
        add(
            "--centroid-temperature",
            type=above_zero,
            default=0.1,
            help="temperature of the loss of the centroids",
        )
        add(
            "--momentum",
            type=fraction,
            default=0.95,
            help="momentum of the moving average; rises to 1; use 0.99 for long runs",
        )

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        views = torch.cat([view0, view1])
        z = self.online(views)
        with torch.no_grad():
            k = normalize(self.slow(views).type_as(self.bank.bank))
            # the bank before it takes up the projections of view0
            _, bank = self.bank(k[: len(view0)], update=True)
            neighbours = bank[(k @ bank.T).topk(NEIGHBOURS).indices]  # (2B, 5, features)
        shifted = torch.cat([self.to_centroid(z)[:, None], neighbours[:, :-1]], dim=1)

        of_neighbours = across(self.criterion, neighbours[:, 0], self.to_neighbour(z))
        of_centroids = across(
            self.criterion_of_centroids, self.centroid(neighbours), self.centroid(shifted)
        )
        return (of_neighbours + of_centroids + redundancy(k, z)) / 2

    def centroid(self, sequence: Tensor) -> Tensor:
        """What the transformer makes of the first of (2B, 5, features)."""
        return self.transformer(sequence + self.place)[:, 0]

    def after_step(self, step: int, steps: int) -> None:
        momentum = cosine_schedule(step - 1, steps, self.momentum, 1.0)
        update_momentum(self.online, self.slow, momentum)


def across(criterion: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The mean loss of a's rows of each view against b's of the other. The views are halves."""
    (a0, a1), (b0, b1) = a.chunk(2), b.chunk(2)
    return (criterion(a0, b1) + criterion(a1, b0)) / 2


def redundancy(k: Tensor, z: Tensor) -> Tensor:
    """The feature term: 5 (sqrt(mean (1 - c_ii)^2) + sqrt(mean c_ij^2)), 0-d, i not j.

    c is the cosines of k's features in a batch with z's of the other view, one matrix for each
    direction, and the means are over both.
    """
    (k0, k1), (z0, z1) = ((normalize(x, dim=0) for x in both.chunk(2)) for both in (k, z))
    c = torch.stack([k0.T @ z1, k1.T @ z0])
    own = torch.eye(c.shape[-1], dtype=torch.bool, device=c.device)
    return 5 * ((1 - c[:, own]).square().mean().sqrt() + c[:, ~own].square().mean().sqrt())


def main(arguments: list[str] | None = None) -> int:
    return training.main(All4One, arguments)


if __name__ == "__main__":
    sys.exit(main())
