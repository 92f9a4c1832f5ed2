# SPDX-License-Identifier: MIT
"""The methods of the authors' runs, with their heads, LARS and their learning rate.

Heads, memory bank, the loss of Barlow Twins and the schedule are lightly's, LARS is timm's, the
networks are torchvision's. The other examples have the same methods with settings of their own.
"""

import argparse
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import data, training
from common.options import check_device
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    NNCLRPredictionHead,
    NNCLRProjectionHead,
    NNMemoryBankModule,
)
from lightly.models.modules.heads import ProjectionHead
from lightly.utils.scheduler import cosine_warmup_schedule
from timm.optim import Lars
from torch import Tensor, nn

from hex import HEXLoss, InfoNCELoss
from hex.presets import authors_mix
from paper import images, probe
from paper.settings import Settings, learning_rate, shared_out, tracker


class Run(training.Method):
    """A run of the authors. `options.settings` is what its file says."""

    def __init__(self, options: argparse.Namespace, pictures: images.Pictures) -> None:
        super().__init__(options, pictures)
        self.settings: Settings = options.settings
        _, self.accumulate, self.split = shared_out(self.settings, options.devices)
        self.sync_batchnorm = self.split  # else each device has whole batches
        if pictures.size <= 64:
            self.backbone.conv1.padding = 2, 2  # as in the authors' code; SimCLR has 1
        self.build(self.settings, self.width)

    def build(self, settings: Settings, width: int) -> None:
        """Makes what belongs to the method."""
        raise NotImplementedError

    def hex_loss(self, settings: Settings) -> HEXLoss:
        return HEXLoss(
            settings["temperature"],
            threshold=tracker(settings),
            variant=settings["variant"],
            gather_distributed=self.split,
        )

    @classmethod
    def load(cls, options: argparse.Namespace) -> tuple[images.Pictures, images.Pictures]:
        device = check_device(options.device)
        train, test = images.load(Path(options.root), options.settings, options.workers, device)
        if len(train) < options.batch_size:
            raise ValueError(f"--root {options.root}: there are {len(train)} training images, "
                             f"wanted {options.batch_size} for a batch")  # fmt: skip
        return train, test

    def configure_optimizers(self) -> dict[str, Any]:
        settings, named = self.settings, [p for p in self.parameters() if p.requires_grad]
        lr, start = learning_rate(settings), settings["warmup_start"] * settings["accumulate"]
        optimizer = Lars(
            [
                {"params": [p for p in named if p.ndim > 1]},
                # Biases and BatchNorm: neither decayed nor adapted, which timm's LARS takes as one.
                {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr,
            momentum=settings["momentum"],
            weight_decay=settings["weight_decay"],
            trust_coeff=settings["trust"],
            trust_clip=True,
        )
        an_epoch = math.ceil(len(self.train_dataloader()) / self.accumulate)
        self.steps = an_epoch * settings["epochs"]
        rise = an_epoch * settings["warmup_epochs"]
        end = self.steps + 1  # of lightly's cosine, which is at 0 in its last step
        rule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: cosine_warmup_schedule(step, end, 1.0, 0.0, rise, start / lr),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}

    def finish(self, test: data.Split, seconds: float | None) -> None:
        probe.evaluate(self, test, seconds)


class SimCLR(Run):
    """SimCLR: two views of an image attract each other, all other views of the batch repel."""

    losses: ClassVar = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}

    def build(self, settings: Settings, width: int) -> None:
        hidden, features = settings["hidden"], settings["features"]
        self.projector = ProjectionHead([  # without BatchNorm
            (width, hidden, None, nn.ReLU()), (hidden, features, None, None),
        ])  # fmt: skip
        if settings["loss"] == "hex":
            self.criterion = self.hex_loss(settings)
        else:
            self.criterion = InfoNCELoss(settings["temperature"], gather_distributed=self.split)

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        # One after the other, as the authors have it: BatchNorm sees one view of each image.
        z0, z1 = (self.projector(self.backbone(view)) for view in (view0, view1))
        return self.criterion(z0, z1)


class NNCLR(Run):
    """NNCLR: a view attracts the nearest neighbour, in a bank of past views, of the other view.

    With HEX the rows are those of "ntxent" on neighbours and predictions, as in the authors' code.
    """

    losses: ClassVar = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}
    classes_known = False  # not of the neighbours in the bank

    def build(self, settings: Settings, width: int) -> None:
        features = settings["features"]
        self.projector = NNCLRProjectionHead(width, settings["hidden"], features)
        self.predictor = NNCLRPredictionHead(features, settings["predictor"], features)
        self.bank = NNMemoryBankModule((settings["queue"], features))
        self.bank.gather_distributed = True  # the past views of all devices
        for name in ("bank", "bank_ptr"):  # lightly does not put them into checkpoints
            self.bank.register_buffer(name, getattr(self.bank, name))
        if settings["loss"] == "hex":
            self.criterion = self.hex_loss(settings)
        else:
            self.criterion = InfoNCELoss(
                settings["temperature"], mode="query", gather_distributed=self.split
            )

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z0, z1 = (self.projector(self.backbone(view)) for view in (view0, view1))
        p0, p1 = self.predictor(z0), self.predictor(z1)
        neighbour1 = self.bank(z1.detach().float(), update=False)
        neighbour0 = self.bank(z0.detach().float(), update=True)  # after both were looked up
        return (self.criterion(neighbour0, p1) + self.criterion(neighbour1, p0)) / 2


class BarlowTwins(Run):
    """Barlow Twins: makes the correlation of the two views' features the identity."""

    losses: ClassVar = {"hex": "alpha HEX + (1 - alpha) base", "base": "cross-correlation"}

    def build(self, settings: Settings, width: int) -> None:
        features = settings["features"]
        self.projector = BarlowTwinsProjectionHead(width, settings["hidden"], features)
        self.base = BarlowTwinsLoss(settings["off_diagonal"], gather_distributed=self.split)
        if settings["loss"] == "hex":
            self.criterion = self.hex_loss(settings)

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z0, z1 = (self.projector(self.backbone(view)) for view in (view0, view1))
        with torch.autocast(z0.device.type, enabled=False):  # a sum over millions of squares
            base = self.settings["scale"] * self.base(z0.float(), z1.float())
        if self.criterion is None:
            return base
        return authors_mix("barlow", self.criterion(z0, z1), base, self.settings["alpha"])


METHODS: dict[str, type[Run]] = {"simclr": SimCLR, "nnclr": NNCLR, "barlow": BarlowTwins}
