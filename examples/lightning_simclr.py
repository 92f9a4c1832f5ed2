# SPDX-License-Identifier: MIT
"""HEX in a LightningModule of your own: SimCLR on handwritten digits, with nothing around it.

    python examples/lightning_simclr.py
    python examples/lightning_simclr.py --epochs 5 --devices 2

The loss is an ordinary module. `HEXCallback` tells it the epoch and logs its threshold, the mean
size of H and the share of H in the denominator. With several devices, `gather_distributed=True`
makes the loss that of the whole batch. Checkpoints hold the state of the threshold, so Lightning
resumes a run as usual. simclr.py is the same method with other data and an evaluation.

Needs hex-ssl[examples].
"""

import argparse

import torch
from common import augment, encoder
from common.training import quiet
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hex import HEXLoss
from hex.lightning import HEXCallback


class Digits(LightningDataModule):
    """The digits of scikit-learn, as images (1, 8, 8) in [0, 1]."""

    def train_dataloader(self) -> DataLoader:
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        return DataLoader(TensorDataset(images), batch_size=128, shuffle=True, drop_last=True)


class SimCLR(LightningModule):
    """Two views of an image attract each other, and all other views of the batch repel."""

    def __init__(self) -> None:
        super().__init__()
        self.view = augment.digits()
        self.backbone, width = encoder.backbone("small")
        self.projector = encoder.projector(width, features=64)
        self.criterion = HEXLoss(temperature=0.1, gather_distributed=True)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (images,) = batch
        views = torch.cat([self.view(images), self.view(images)]).expand(-1, 3, -1, -1)
        loss = self.criterion(*self.projector(self.backbone(views)).chunk(2))
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", default="runs", help="folder of the log and the checkpoint")
    options = parser.parse_args(arguments)
    quiet()
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=options.devices,
        logger=CSVLogger(options.out, name="lightning_simclr"),
        callbacks=[HEXCallback()],
        log_every_n_steps=1,
    )
    trainer.fit(SimCLR(), Digits())
    print(*(f"{name} {float(x):.3f}" for name, x in trainer.logged_metrics.items()))


if __name__ == "__main__":
    main()
