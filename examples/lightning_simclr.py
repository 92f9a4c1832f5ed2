# SPDX-License-Identifier: MIT
"""HEX in a LightningModule of your own: SimCLR on handwritten digits, with nothing around it.

    python examples/lightning_simclr.py
    python examples/lightning_simclr.py --epochs 5 --devices 2

The loss is an ordinary module. `HEXCallback` tells it the epoch and logs its threshold, the mean
size of H and the share of H in the denominator. With several devices `gather_distributed=True`
makes the loss that of the whole batch. Checkpoints hold the threshold's state, so Lightning resumes
a run as usual. simclr.py is the same method with a command line, evaluation and other data.

Needs hex-ssl[examples].
"""

import argparse

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hex import HEXLoss
from hex.lightning import HEXCallback


class SimCLR(LightningModule):
    """Two views of an image attract each other, and all other views of the batch repel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.projector = SimCLRProjectionHead(64 * 3 * 3, 128, 64)
        self.criterion = HEXLoss(temperature=0.1, gather_distributed=True)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (images,) = batch
        z0, z1 = (self.projector(self.backbone(view(images))) for _ in range(2))
        loss = self.criterion(z0, z1)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def view(images: Tensor) -> Tensor:
    """Moves each image by up to a pixel in both directions, and adds noise."""
    moved = torch.stack([
        image.roll((down, right), (1, 2))
        for image, (down, right) in zip(images, torch.randint(-1, 2, (len(images), 2)).tolist())
    ])  # fmt: skip
    return moved + 0.1 * torch.randn_like(moved)


class Digits(LightningDataModule):
    """The digits of scikit-learn, as images (1, 8, 8) in [0, 1]."""

    def train_dataloader(self) -> DataLoader:
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        return DataLoader(TensorDataset(images), batch_size=128, shuffle=True, drop_last=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", default="runs/lightning_simclr", help="folder of the log")
    options = parser.parse_args(arguments)
    seed_everything(0)
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=options.devices,
        logger=CSVLogger(options.out),
        callbacks=[HEXCallback()],
        log_every_n_steps=1,
    )
    trainer.fit(SimCLR(), Digits())
    figures = {name: f"{float(x):.3f}" for name, x in trainer.logged_metrics.items()}
    print("last step:", figures)


if __name__ == "__main__":
    main()
