# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss, or with InfoNCE, as a LightningModule.

    python examples/lightning_simclr.py --data digits
    python examples/lightning_simclr.py --data cifar10 --root DIR --backbone resnet18 --epochs 200

The loop, the log and the checkpoints are Lightning's. HEXCallback tells the loss the epoch and logs
the loss's threshold, the mean size of H and the share of H in the denominator. TensorBoard's log
and `result.json` are in the run's folder.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from common import data, encoder, evaluate, training
from common.options import check, make_folder, make_parser, threshold
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from hex import HEXLoss, InfoNCELoss
from hex.lightning import HEXCallback

PRECISION = {"off": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class LightningSimCLR(LightningModule):
    """SimCLR in Lightning: two views of an image attract each other, all other views repel."""

    losses = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__()
        self.backbone, width = encoder.backbone(options.backbone, images.size)
        self.projector = encoder.projector(width, options.features)
        if options.loss == "hex":
            self.criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )
        else:
            self.criterion = InfoNCELoss(options.temperature)
        self.options = options
        self.steps = len(images) // options.batch_size

    def training_step(self, batch: data.Batch, index: int) -> Tensor:
        views, _ = batch
        z0, z1 = self.projector(self.backbone(torch.cat(views))).chunk(2)
        loss = self.criterion(z0, z1)
        self.log("train/loss", loss, prog_bar=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.options.lr, weight_decay=1e-4)
        rule = training.schedule(optimizer, self.steps, self.options.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}


class StopDiverged(Callback):
    """Stops a training that diverged, before Lightning overwrites the last good checkpoint."""

    def __init__(self, images: data.Split, scaled: bool) -> None:
        self.images, self.scaled = images, scaled

    def on_train_epoch_start(self, trainer, model) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, model, outputs, *_) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(
        self, trainer, model
    ) -> None:  # Lightning saves its checkpoint after this
        losses = torch.stack(self.losses).tolist()
        (optimizer,) = trainer.optimizers
        training.check_finite(
            model, optimizer, trainer.current_epoch, losses, self.images, self.scaled
        )


class Batches:
    """The batches of a split, for Lightning. Each iteration over it is one epoch."""

    def __init__(self, images: data.Split, size: int) -> None:
        self.images, self.size = images, size

    def __iter__(self) -> Iterator[data.Batch]:
        return self.images.batches(self.size)

    def __len__(self) -> int:
        return len(self.images) // self.size


def main(arguments: list[str] | None = None) -> int:
    method = LightningSimCLR
    description = method.__doc__.partition("\n")[0]
    parser = make_parser("lightning_simclr", description, method.losses, resumable=False)
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")  # Lightning's own, torch 2.13
    seed_everything(options.seed, verbose=False)
    try:
        check(options)
        images, test = training.load(options)
        model = method(options, images)
        folder = make_folder(options)
    except (data.DataError, ValueError) as error:
        print(f"lightning_simclr.py: error: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    trainer = Trainer(
        accelerator={"cuda": "gpu"}.get(torch.device(options.device).type, options.device),
        devices=1,
        precision=PRECISION[options.amp],
        max_epochs=options.epochs,
        logger=TensorBoardLogger(folder, name="", version=""),
        log_every_n_steps=1,
        callbacks=[HEXCallback(), StopDiverged(images, options.amp == "fp16")],
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, Batches(images, options.batch_size))
    except evaluate.Diverged as error:
        kept = [f"{file} has the epoch before" for file in folder.glob("checkpoints/*.ckpt")]
        text = f"training diverged: {error}; {', '.join(kept) or 'no epoch was saved'}"
        print(f"lightning_simclr.py: {text}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    logged = {name: float(x) for name, x in trainer.logged_metrics.items()}
    training.console.print(
        "last step:", *(f"{name} {x:.4f}" for name, x in logged.items()), soft_wrap=True
    )
    model.to(options.device)  # Lightning leaves it on the CPU
    scores = evaluate.scores(*(evaluate.features(model.backbone, part) for part in (images, test)))
    training.console.print(training.table_of(scores, len(test)))
    training.write_result(folder, method, options, scores, seconds)
    training.console.print(
        f"result: {folder / 'result.json'}\ncheckpoint: {folder / 'checkpoints'}\n"
        f"log: tensorboard --logdir {folder}",
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
