# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss on several GPUs, or in several processes, by DDP and torchrun.

    torchrun --nproc-per-node 2 examples/simclr_ddp.py --data digits --device cpu
    torchrun --nproc-per-node 8 examples/simclr_ddp.py --data folder --root DIR --backbone resnet50
    torchrun --nproc-per-node 2 examples/simclr_ddp.py --resume runs/NAME
    python examples/simclr_ddp.py           # one process

This is the training of `simclr.py --devices N` without Lightning, and ends with the same bits on
the CPU. All that a training needs for several processes is in this file.

Each process, a rank, trains on its part of each batch of `--batch-size` images. With
`gather_distributed=True` the loss and its threshold are those of the whole batch. Rank 0 prints,
logs, evaluates and saves. On the CPU, a run that was stopped and resumed ends with the same bits as
one that was never stopped.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
        state: None, or the checkpoint to continue from.

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
        self.options = options
        if options.device == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(LOCAL_RANK)  # that "cuda" means
        self.device = check_device(options.device)
        self.waiting = join("nccl" if self.device.type == "cuda" else "gloo")
        self.parts = self.images, _ = runs.load(options)
        # Each rank has its part of the images in an order that all know, and other views.
        self.loader = data.loader(
            self.images, options.batch_size, options.seed, lambda: self.epoch, RANK, RANKS
        )
        torch.manual_seed(options.seed)
        self.model = SimCLR(options, self.images).to(self.device)
        if self.device.type == "cuda" and RANKS > 1:
            # Normalises by the whole batch. torch has it for CUDA only: on the CPU each rank
            # normalises by its own part.
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, weight_decay=1e-4)
        self.scheduler = runs.schedule(self.optimizer, len(self.loader) * options.epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        # What a checkpoint holds. The model is there without DDP's wrapper, so that a run can go on
        # with another number of processes.
        names = "model", "optimizer", "scheduler", "scaler"
        self.saved = {name: getattr(self, name) for name in names}
        self.first = 0  # the epoch to begin with; self.last is the one after the end
        if state is not None:  # every rank has read it
            self.first = state["epoch"] + 1
            for name, part in self.saved.items():
                try:
                    part.load_state_dict(state[name])
                except (KeyError, ValueError, RuntimeError) as error:
                    text = str(error).strip().splitlines()[-1].strip()
                    raise CheckpointError(f"the checkpoint's {name} does not fit: {text}") from None
        self.last = min(options.epochs, self.first + (options.stop_after or options.epochs))
        # DDP averages the gradients of the ranks in each backward. It gives all ranks the weights
        # of rank 0 now, and in each forward rank 0's buffers, which are those of a checkpoint.
        self.ddp = DistributedDataParallel(self.model)
        self.done = self.first
        with others_wait(self.waiting):
            if RANK == 0:
                make_folder(options)

    def train(self, let_ctrl_c: Callable[[], None]) -> None:
        options, steps, log = self.options, len(self.loader), None
        console.print(
            f"SimCLR, processes: {RANKS}, --loss {options.loss} "
            f"({runs.objective(SimCLR, options)}), on {len(self.images)} images, "
            f"{steps} steps an epoch, {self.first} of {options.epochs} epochs done",
            soft_wrap=True,
        )
        start = time.perf_counter()
        if RANK == 0:  # TensorBoard drops its entries for steps that are repeated
            log = SummaryWriter(options.out, purge_step=self.first * steps)
        with log or nullcontext():
            for epoch in range(self.first, self.last):
                self.epoch = epoch
                table = self.train_epoch(let_ctrl_c)
                with others_wait(self.waiting):
                    if RANK == 0:
                        self.after(table.tolist(), log)
                let_ctrl_c()
        with others_wait(self.waiting):
            if RANK == 0 and self.last == options.epochs:
                whole = self.first == 0  # the seconds of a part of a run mean nothing
                seconds = time.perf_counter() - start if whole else None
                runs.finish(SimCLR, options, self.model.backbone, self.parts, seconds)
        console.print(
            f"checkpoint: {Path(options.out) / LAST}\nlog: tensorboard --logdir {options.out}",
            soft_wrap=True,
        )

    def train_epoch(self, let_ctrl_c: Callable[[], None]) -> Tensor:
        """Returns loss, eps, mean |H| and share of each step, which all ranks have alike."""
        self.model.criterion.set_epoch(self.epoch)
        self.ddp.train()
        dtype = AMP[self.options.amp]
        rows = []  # read when the epoch is over, so that no step waits
        for items in self.loader:
            views, _ = self.images.prepare(items)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                loss = self.ddp(*views)
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
        """Checks, logs, saves and prints what an epoch has made.

        Rank 0 does so with the model inside DDP's wrapper, for the wrapper would wait for the
        other ranks.
        """
        done, losses, options = self.epoch + 1, [row[0] for row in table], self.options
        backbone, scaled = self.model.backbone, self.scaler.is_enabled()
        evaluate.check_finite(self.model, self.optimizer, self.epoch, losses, self.images, scaled)
        for step, row in enumerate(table, self.epoch * len(table)):
            for name, value in zip(("loss", "eps", "hard", "share"), row, strict=True):
                log.add_scalar(f"train/{name}", value, step)
        line = f"epoch {done:3}  loss {sum(losses) / len(losses):.4f}"
        if options.loss == "hex":  # of the last step
            line += f"  eps {table[-1][1]:.3f}  mean |H| {table[-1][2]:.2f}"
        if options.knn_every and done % options.knn_every == 0:
            features = (evaluate.features(backbone, part) for part in self.parts)
            accuracy = evaluate.knn_accuracy(*features)
            log.add_scalar("test/knn", accuracy, done * len(table) - 1)
            line += f"  k-NN {accuracy:.2%}"
        state = {name: part.state_dict() for name, part in self.saved.items()}
        state |= {"epoch": self.epoch, "hyper_parameters": kept(options)}
        unfinished = Path(options.out, "unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, Path(options.out, LAST))  # which is whole at every moment
        self.done = done
        console.print(line)  # an epoch is printed only after it is saved

    def what_is_kept(self) -> str:
        return runs.what_is_kept(Path(self.options.out, LAST), self.done)


def join(backend: str) -> dist.ProcessGroup:
    """Begins to talk with the other ranks. Returns the group in which they wait for rank 0."""
    alone = {} if RANKS > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    # On the host, so that no GPU is busy with waiting, and for as long as an evaluation takes.
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


@contextmanager
def others_wait(waiting: dist.ProcessGroup) -> Iterator[None]:
    """For what only rank 0 does. The others wait at its end, and end too if rank 0 has failed."""
    done = [True]
    try:
        yield
    except BaseException:
        done = [False]
        raise
    finally:
        dist.broadcast_object_list(done, src=0, group=waiting)
    if not done[0]:
        sys.exit(1)  # rank 0 says why


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
            run.train(let_ctrl_c)
    except data.DataError as error:
        print(f"simclr_ddp.py: error: {error}", file=sys.stderr)
        return 2
    except evaluate.Diverged as error:  # on rank 0
        print(f"simclr_ddp.py: training diverged: {error}; {run.what_is_kept()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        text = f"{run.what_is_kept()}; --resume goes on" if run else "before training"
        console.print(f"interrupted; {text}", soft_wrap=True)
        return 130
    finally:
        if dist.is_initialized():
            run = None  # DDP's hold on the group goes first, or gloo's threads may end the process
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
