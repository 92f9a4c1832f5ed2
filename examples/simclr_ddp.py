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
evaluates and saves.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import os
import sys
import time
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

from hex import HEXLoss, InfoNCELoss

# torchrun tells each process who it is. Without torchrun there is one.
RANK, LOCAL_RANK, RANKS = (
    int(os.environ.get(name, alone))
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
SAVED = "model", "optimizer", "scheduler", "scaler"  # in a checkpoint
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
        self.done = self.first = state["epoch"] + 1 if state else 0
        # Each rank has its part of the images, in an order that all know, and views of its own.
        self.loader = data.loader(
            images, options.batch_size, options.seed, lambda: self.done, RANK, RANKS
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

    def train(self) -> None:
        """Trains and evaluates.

        Raises:
            Diverged: on all ranks.
        """
        options, images = self.options, self.parts[0]
        runs.greet(SimCLR, options, images, len(self.loader), self.first)
        # DDP averages the gradients of the ranks in each backward. It gives all ranks the weights
        # of rank 0 now, and in each forward rank 0's buffers, which are those of a checkpoint.
        ddp = DistributedDataParallel(self.model)
        start, last = time.perf_counter(), self.first + (options.stop_after or options.epochs)
        while self.done < min(last, options.epochs):
            losses = self.train_epoch(ddp)
            error: list[str | None] = [None]
            if RANK == 0:
                try:
                    self.after(losses)
                except evaluate.Diverged as diverged:
                    error = [str(diverged)]
            dist.broadcast_object_list(error)  # the others wait for it
            if error[0] is not None:
                raise evaluate.Diverged(error[0])
            self.done += 1
        if RANK == 0 and self.done == options.epochs:
            seconds = time.perf_counter() - start if self.first == 0 else None
            runs.finish(SimCLR, options, self.model.backbone, self.parts, seconds)

    def train_epoch(self, ddp: DistributedDataParallel) -> list[float]:
        """Returns the loss of each step, which all ranks have alike."""
        self.model.criterion.set_epoch(self.done)
        ddp.train()
        dtype = AMP[self.options.amp]
        losses = []  # read when the epoch is over, so that no step waits
        for items in self.loader:
            views, _ = self.parts[0].prepare(items)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                loss = ddp(*views)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    def after(self, losses: list[float]) -> None:
        """Checks, tests, saves and prints what an epoch has made, on rank 0.

        With the model inside DDP's wrapper, for the wrapper would wait for the other ranks. The
        checkpoint has it without too, so that a run can go on with another number of processes.
        """
        options = self.options
        line, _ = runs.look(options, self.model, self.optimizer, self.parts, self.done, losses)
        state = {name: getattr(self, name).state_dict() for name in SAVED}
        state |= {"epoch": self.done, "hyper_parameters": kept(options)}
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
        try:
            run = Run(*parse(SimCLR, "simclr_ddp", arguments))
        except (data.DataError, CheckpointError, ValueError) as error:
            if RANK == 0:  # what is wrong at the start is wrong on all ranks
                print(f"simclr_ddp.py: error: {error}", file=sys.stderr)
            return 2
        join()
        run.train()
    except data.DataError as error:
        print(f"simclr_ddp.py: error: {error}", file=sys.stderr)
        return 2
    except evaluate.Diverged as error:
        if RANK == 0:
            text = f"{error}; {runs.what_is_kept(run.options.out)}"
            print(f"simclr_ddp.py: training diverged: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if RANK == 0 and run is not None:
            console.print(f"interrupted; {runs.what_is_kept(run.options.out)}")
        return 130
    finally:
        if dist.is_initialized():
            run = None  # DDP's hold on the group goes first, or gloo's threads may end the process
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
