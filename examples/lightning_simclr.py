# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss, or with InfoNCE, as a LightningModule, on one device or several.

    python examples/lightning_simclr.py --data digits
    python examples/lightning_simclr.py --data cifar10 --root DIR --backbone resnet18 --epochs 200
    python examples/lightning_simclr.py --data digits --device cpu --devices 2
    python examples/lightning_simclr.py --resume runs/NAME

The loop, the log and the checkpoints are Lightning's. HEXCallback tells the loss the epoch and logs
the loss's threshold, the mean size of H and the share of H in the denominator. TensorBoard's log
and `result.json` are in the run's folder.

With several devices Lightning trains by DDP, in a process for each, and each process, a rank, has
its part of each batch of `--batch-size` images. With `gather_distributed=True` the loss and its
threshold are those of the whole batch. Rank 0 prints and evaluates. The training is that of
simclr_ddp.py, to the bit on the CPU.

On the CPU, a run that was stopped and resumed ends with the same bits as one that was never
stopped, but with `--workers`: Lightning begins to load before it tells the sampler the epoch.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import logging
import math
import os
import pickle
import sys
import time
import warnings
from pathlib import Path

import torch
from common import checkpoint, data, encoder, evaluate, training
from common.options import check, check_device, make_folder, make_parser, positive, threshold
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from hex import HEXLoss, InfoNCELoss
from hex.lightning import HEXCallback

LAST = "checkpoints/last.ckpt"  # in the run's folder
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
                options.temperature,
                threshold=threshold(options),
                variant=options.variant,
                gather_distributed=True,  # with one device it changes nothing
            )
        else:
            self.criterion = InfoNCELoss(options.temperature, gather_distributed=True)
        self.options, self.images = options, images
        self.seeded: int | None = None

    def train_dataloader(self) -> DataLoader:
        """An ordinary one, but for its items. With several devices Lightning gives it a
        DistributedSampler. The last batch of an epoch, which is not full, is left out: all ranks
        need batches of one size."""
        self.seed()
        return DataLoader(
            self.images.dataset(),
            self.options.batch_size // self.options.devices,
            shuffle=True,
            drop_last=True,
            **self.images.loading,
        )

    def on_train_epoch_start(self) -> None:
        self.seed()

    def seed(self) -> None:
        """Gives each epoch views of its own, on each rank others.

        Once, before the first batch of the epoch is begun: in the first epoch, and when a run is
        resumed, that is when the loader is made. Then `current_epoch` is not right yet.
        """
        epoch = self.trainer.fit_loop.epoch_progress.current.processed
        if self.seeded != epoch:
            training.seed_epoch(self.options.seed, epoch, self.global_rank)
            self.seeded = epoch

    def training_step(self, items: data.Batch, index: int) -> Tensor:
        views, _ = self.images.prepare(items)
        z0, z1 = self.projector(self.backbone(torch.cat(views))).chunk(2)
        loss = self.criterion(z0, z1)
        self.log("train/loss", loss, prog_bar=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.options.lr, weight_decay=1e-4)
        devices, size = self.options.devices, self.options.batch_size
        steps = math.ceil(len(self.images) / devices) // (size // devices)  # an epoch
        rule = training.schedule(optimizer, steps, self.options.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        options = vars(self.options).items()
        checkpoint["options"] = {k: v for k, v in options if k not in training.ONE_CALL}

    def features(self, test: data.Split) -> list[evaluate.Features]:
        """For rank 0 alone: of the backbone, without DDP, which would wait for the other ranks."""
        return [evaluate.features(self.backbone, part) for part in (self.images, test)]


class EndOfEpoch(Callback):
    """Stops a training that diverged, before Lightning overwrites the last good checkpoint. Tests
    by nearest neighbours, every `--knn-every` epochs.

    Rank 0 does both, and the others wait until it tells them what came out.
    """

    def __init__(self, options: argparse.Namespace, images: data.Split, test: data.Split) -> None:
        self.options, self.images, self.test = options, images, test

    def on_train_epoch_start(self, trainer, model) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, model, outputs, *_) -> None:
        self.losses.append(outputs["loss"].detach())

    def on_train_epoch_end(self, trainer, model) -> None:
        # Lightning saves its checkpoint after this.
        error, epoch, every = None, trainer.current_epoch, self.options.knn_every
        if trainer.is_global_zero:
            losses = torch.stack(self.losses).tolist()
            (optimizer,) = trainer.optimizers
            scaled = self.options.amp == "fp16"
            try:
                training.check_finite(model, optimizer, epoch, losses, self.images, scaled)
                if every and (epoch + 1) % every == 0:
                    accuracy = evaluate.knn_accuracy(*model.features(self.test))
                    trainer.logger.log_metrics({"test/knn": accuracy}, trainer.global_step)
                    training.console.print(f"epoch {epoch + 1:3}  k-NN {accuracy:.2%}")
            except evaluate.Diverged as diverged:
                error = str(diverged)
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise evaluate.Diverged(error)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Path | None, dict]:
    """The options, and the checkpoint to continue from with its contents, or None and {}."""
    script, method = "lightning_simclr", LightningSimCLR
    parser = make_parser(script, method.__doc__.partition("\n")[0], method.losses)
    parser.add_argument(
        "--devices", type=positive, default=1, help="how many GPUs, or processes on the CPU"
    )
    options, file, state = parser.parse_args(arguments), None, {}
    if options.resume is not None:
        file = options.resume / LAST if options.resume.is_dir() else options.resume
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            saved = state["options"]
        except FileNotFoundError:
            raise checkpoint.CheckpointError(f"{file}: there is no such checkpoint") from None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError):
            raise checkpoint.CheckpointError(f"{file}: not a checkpoint of {script}.py") from None
        options = training.resumed(parser, script, arguments, file, saved)
        options.out = str(file.parents[1])
    check(options)
    if options.batch_size % options.devices:
        raise ValueError(
            f"--batch-size: got {options.batch_size} for {options.devices} devices, wanted a "
            "multiple of their number"
        )
    return options, file, state


def main(arguments: list[str] | None = None) -> int:
    for name in ("pytorch", "fabric"):  # no advertisements
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")  # Lightning's own, torch 2.13
    # The loss is that of the whole batch: the ranks' mean of it would be the same.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log.'train/loss'")
    leader = rank_zero_only.rank == 0  # Lightning starts this script again for each other rank
    training.console.quiet = not leader
    try:
        options, file, state = parse(arguments)
        seed_everything(options.seed, verbose=False)
        if options.device == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # that "cuda" means
        kind = check_device(options.device).type
        images, test = training.load(options)
        model = LightningSimCLR(options, images)
        folder = make_folder(options) if leader else Path()
    except (data.DataError, checkpoint.CheckpointError, ValueError) as error:
        if leader:
            print(f"lightning_simclr.py: error: {error}", file=sys.stderr)
        return 2
    if options.data != "folder":  # images in memory have no use for workers
        warnings.filterwarnings("ignore", ".*does not have many workers")
    if file is not None:
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    several = options.devices > 1
    first = state["epoch"] + 1 if state else 0
    last = min(options.epochs, first + (options.stop_after or options.epochs))
    start = time.perf_counter()
    trainer = Trainer(
        accelerator={"cuda": "gpu"}.get(kind, options.device),
        devices=options.devices,
        strategy=DDPStrategy(process_group_backend="nccl" if kind == "cuda" else "gloo")
        if several
        else "auto",
        # Normalises by the whole batch. torch has it for CUDA only: on the CPU each rank normalises
        # by its own part.
        sync_batchnorm=several and kind == "cuda",
        precision=PRECISION[options.amp],
        max_epochs=last,
        logger=TensorBoardLogger(folder, name="", version="", purge_step=state.get("global_step")),
        log_every_n_steps=1,
        callbacks=[
            HEXCallback(),
            EndOfEpoch(options, images, test),
            ModelCheckpoint((folder / LAST).parent, filename="last", enable_version_counter=False),
        ],
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, ckpt_path=file, weights_only=True)
    except evaluate.Diverged as error:  # on all ranks
        if not leader:
            return 0  # otherwise Lightning would kill rank 0
        kept = folder / LAST
        kept = f"{kept} has the epoch before" if kept.exists() else "no epoch was saved"
        print(f"lightning_simclr.py: training diverged: {error}; {kept}", file=sys.stderr)
        return 1
    except data.DataError as error:
        print(f"lightning_simclr.py: error: {error}", file=sys.stderr)
        return 2
    if not leader:
        return 0
    seconds = time.perf_counter() - start if first == 0 else None
    logged = {name: float(x) for name, x in trainer.logged_metrics.items()}
    training.console.print(
        "last step:", *(f"{name} {x:.4f}" for name, x in logged.items()), soft_wrap=True
    )
    if last == options.epochs:
        model.to(options.device)  # Lightning leaves it on the CPU
        scores = evaluate.scores(*model.features(test))
        training.console.print(training.table_of(scores, len(test)))
        training.write_result(folder, LightningSimCLR, options, scores, seconds)
        training.console.print(f"result: {folder / 'result.json'}", soft_wrap=True)
    training.console.print(
        f"checkpoint: {folder / LAST}\nlog: tensorboard --logdir {folder}", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
