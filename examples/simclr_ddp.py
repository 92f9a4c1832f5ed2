# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss on several GPUs, or in several processes, by DDP and torchrun.

    torchrun --nproc-per-node 2 examples/simclr_ddp.py --data digits --device cpu
    torchrun --nproc-per-node 8 examples/simclr_ddp.py --data folder --root DIR --backbone resnet50
    torchrun --nproc-per-node 2 examples/simclr_ddp.py --resume runs/NAME
    python examples/simclr_ddp.py           # one process

All that a training needs for several processes is in this file. On the CPU it ends with the same
bits as `simclr.py --devices N`, which Lightning trains, and a run that was stopped and resumed ends
with the bits of one that was never stopped.

Each process, a rank, trains on its part of each batch of `--batch-size` images. With
`gather_distributed=True` the loss and its threshold are those of the whole batch. Rank 0 prints,
logs, evaluates and saves.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import data, encoder, evaluate, runs
from common.options import (
    AMP,
    LAST,
    CheckpointError,
    check_device,
    kept,
    make_folder,
    parse,
    threshold,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from hex import HEXLoss, InfoNCELoss

# torchrun tells each process who it is. Without torchrun there is one.
RANK, LOCAL_RANK, RANKS = (
    int(os.environ.get(name, alone))
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
SAVED = "model", "optimizer", "scheduler", "scaler"  # in a checkpoint
FIGURES = "train/loss", "hex/eps", "hex/hard", "hex/share"
console = runs.console


class SimCLR(nn.Module):
    """SimCLR by DDP: two views of an image attract each other, all others of all ranks repel."""

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
                gather_distributed=True,
            )
        else:
            self.criterion = InfoNCELoss(options.temperature, gather_distributed=True)

    def forward(self, view0: Tensor, view1: Tensor) -> Tensor:
        z0, z1 = self.projector(self.backbone(torch.cat([view0, view1]))).chunk(2)
        return self.criterion(z0, z1)


class Run:
    """A training run, as one rank sees it.

    Args:
        options: the command line.
        state: None, or the checkpoint to continue from, which every rank has read.

    Raises:
        DataError, CheckpointError, ValueError: the run cannot begin. The text is meant for the
            user.
    """

    def __init__(self, options: argparse.Namespace, state: dict[str, Any] | None) -> None:
        if options.batch_size % RANKS:
            raise ValueError(
                f"--batch-size: got {options.batch_size} for {RANKS} processes, wanted a multiple "
                "of their number"
            )
        if options.device == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(LOCAL_RANK)  # that "cuda" means
        self.options, self.device = options, check_device(options.device)
        self.parts = images, _ = runs.load(options)  # to train on, and to test with
        self.epoch = self.done = self.first = state["epoch"] + 1 if state else 0
        # Each rank has its part of the images, in an order that all know, and views of its own.
        self.loader = data.loader(
            images, options.batch_size, options.seed, lambda: self.epoch, RANK, RANKS
        )
        torch.manual_seed(options.seed)
        self.model = SimCLR(options, images).to(self.device)
        if self.device.type == "cuda" and RANKS > 1:
            # Normalises by the whole batch. torch has it for CUDA only: on the CPU each rank
            # normalises by its own part.
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, weight_decay=1e-4)
        self.scheduler = runs.schedule(self.optimizer, len(self.loader) * options.epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        for name in SAVED if state else ():
            runs.restore(getattr(self, name), state, name)
        if RANK == 0:
            make_folder(options)

    def train(self, let_ctrl_c: Callable[[], None]) -> None:
        """Trains and evaluates.

        Raises:
            Diverged: on all ranks.
        """
        options, steps = self.options, len(self.loader)
        console.print(
            f"SimCLR, processes: {RANKS}, --loss {options.loss} "
            f"({runs.objective(SimCLR, options)}), on {len(self.parts[0])} images, "
            f"{steps} steps an epoch, {self.first} of {options.epochs} epochs done",
            soft_wrap=True,
        )
        # DDP averages the gradients of the ranks in each backward. It gives all ranks the weights
        # of rank 0 now, and in each forward rank 0's buffers, which are those of a checkpoint.
        ddp = DistributedDataParallel(self.model)
        start, last = time.perf_counter(), self.first + (options.stop_after or options.epochs)
        # TensorBoard drops its entries for steps that are repeated.
        log = SummaryWriter(options.out, purge_step=self.first * steps) if RANK == 0 else None
        with log or nullcontext():
            for epoch in range(self.first, min(last, options.epochs)):
                self.epoch = epoch
                table = self.train_epoch(ddp, let_ctrl_c)
                error: list[str | None] = [None]
                if RANK == 0:
                    try:
                        self.after(table.tolist(), log)
                    except evaluate.Diverged as diverged:
                        error = [str(diverged)]
                dist.broadcast_object_list(error)  # the others wait for it
                if error[0] is not None:
                    raise evaluate.Diverged(error[0])
                self.done = epoch + 1
                let_ctrl_c()
        if RANK == 0 and self.done == options.epochs:
            seconds = time.perf_counter() - start if self.first == 0 else None
            runs.finish(SimCLR, options, self.model.backbone, self.parts, seconds)
        console.print(f"log: tensorboard --logdir {options.out}", soft_wrap=True)

    def train_epoch(self, ddp: DistributedDataParallel, let_ctrl_c: Callable[[], None]) -> Tensor:
        """Returns loss, eps, mean |H| and share of each step, which all ranks have alike."""
        self.model.criterion.set_epoch(self.epoch)
        ddp.train()
        dtype = AMP[self.options.amp]
        rows = []  # read when the epoch is over, so that no step waits
        for items in self.loader:
            views, _ = self.parts[0].prepare(items)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                loss = ddp(*views)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            figures = loss.detach(), *self.model.criterion.last
            rows.append(torch.stack([x.double() for x in figures]))
            let_ctrl_c()
        return torch.stack(rows).cpu()

    def after(self, table: list[list[float]], log: SummaryWriter) -> None:
        """Checks, tests, logs and saves what an epoch has made, on rank 0.

        With the model inside DDP's wrapper, for the wrapper would wait for the other ranks. The
        checkpoint has it without too, so that a run can go on with another number of processes.
        """
        options, losses = self.options, [row[0] for row in table]
        line, knn = runs.look(options, self.model, self.optimizer, self.parts, self.epoch, losses)
        for step, row in enumerate(table, self.epoch * len(table)):
            for name, value in zip(FIGURES, row, strict=True):
                log.add_scalar(name, value, step)
        if knn is not None:
            log.add_scalar("test/knn", knn, step)
        state = {name: getattr(self, name).state_dict() for name in SAVED}
        state |= {"epoch": self.epoch, "hyper_parameters": kept(options)}
        unfinished = Path(options.out, "unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, Path(options.out, LAST))  # which is whole at every moment
        console.print(line)  # an epoch is printed only after it is saved


def join() -> None:
    """Begins to talk with the other ranks: about tensors by gloo or NCCL, and about what rank 0 has
    found by gloo, so that no GPU is busy with waiting, and for as long as an evaluation takes."""
    alone = {} if RANKS > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(timeout=timedelta(days=1), **alone)


def main(arguments: list[str] | None = None) -> int:
    """The exit status is as that of `training.main`."""
    console.quiet = RANK > 0
    run = None
    try:
        with runs.ctrl_c_held_back() as let_ctrl_c:
            try:
                run = Run(*parse(SimCLR, "simclr_ddp", arguments))
            except (data.DataError, CheckpointError, ValueError) as error:
                if RANK == 0:  # what is wrong at the start is wrong on all ranks
                    print(f"simclr_ddp.py: error: {error}", file=sys.stderr)
                return 2
            join()
            run.train(let_ctrl_c)
    except data.DataError as error:
        print(f"simclr_ddp.py: error: {error}", file=sys.stderr)
        return 2
    except evaluate.Diverged as error:
        if RANK == 0:
            text = f"{error}; {runs.what_is_kept(run.options.out, run.done)}"
            print(f"simclr_ddp.py: training diverged: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        text = runs.what_is_kept(run.options.out, run.done) if run else "before training"
        console.print(f"interrupted; {text}", soft_wrap=True)
        return 130
    finally:
        if dist.is_initialized():
            run = None  # DDP's hold on the group goes first, or gloo's threads may end the process
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
