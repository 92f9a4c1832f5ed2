# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss on several GPUs, or in several processes, by DDP and torchrun.

    torchrun --nproc-per-node 2 examples/simclr_ddp.py --data digits --device cpu
    torchrun --nproc-per-node 8 examples/simclr_ddp.py --data folder --root DIR --backbone resnet50
    torchrun --nproc-per-node 2 examples/simclr_ddp.py --resume runs/NAME
    python examples/simclr_ddp.py           # one process

Each process, a rank, trains on its part of each batch of `--batch-size` images. With
`gather_distributed=True` the loss and its threshold are those of the whole batch. All that a
training needs for several processes is in this file; the rest is in common/, as for simclr.py.

Rank 0 prints, logs, evaluates and saves. The folder of a run holds the same as that of simclr.py.
On the CPU, a run that was stopped and resumed ends with the same bits as one that was never
stopped.

SimCLR: Chen et al. 2020, https://arxiv.org/abs/2002.05709. Needs hex-ssl[examples].
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from common import checkpoint, data, encoder, evaluate, training
from common.options import AMP, check_device, make_folder, threshold
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from hex import HEXLoss, InfoNCELoss

# torchrun tells each process who it is. Without torchrun there is one.
RANK, LOCAL_RANK, RANKS = (
    int(os.environ.get(name, alone))
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
)
console = training.console


class DistributedSimCLR(training.Method):
    """SimCLR by DDP: two views of an image attract each other, all others of all ranks repel."""

    losses = {"hex": "HEX in place of InfoNCE", "base": "InfoNCE"}

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__(options, images)
        self.projector = encoder.projector(self.width, options.features)
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
    """A training, as each rank has it.

    Args:
        options: the command line.
        state: None, or the checkpoint to continue from.

    Raises:
        DataError, CheckpointError, ValueError: the run cannot begin. The text is meant for the
            user.
    """

    def __init__(self, options: argparse.Namespace, state: dict | None) -> None:
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
        self.images, self.test = training.load(options)
        # Each rank has its part of the images. What does not divide is left out of an epoch: images
        # too few for one each, and the short last batch. So all ranks have as many batches, of one
        # size, and no image is twice in a batch, where it would be its own false negative.
        dataset = self.images.dataset()
        self.sampler = DistributedSampler(dataset, RANKS, RANK, seed=options.seed, drop_last=True)
        self.loader = DataLoader(
            dataset,
            options.batch_size // RANKS,
            sampler=self.sampler,
            drop_last=True,
            **self.images.loading,
        )
        torch.manual_seed(options.seed)
        self.model = DistributedSimCLR(options, self.images).to(self.device)
        if self.device.type == "cuda" and RANKS > 1:
            # Normalises by the whole batch. torch has it for CUDA only: on the CPU each rank
            # normalises by its own part.
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, weight_decay=1e-4)
        self.scheduler = training.schedule(self.optimizer, len(self.loader), options.epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.first = 0  # the epoch to begin with; self.last is the one after the end
        if state is not None:  # every rank has read it
            checkpoint.restore(state, self.parts)
            self.first = state["values"]["epoch"]
        self.last = min(options.epochs, self.first + (options.stop_after or options.epochs))
        # DDP averages the gradients of the ranks in each backward. It gives all ranks the weights
        # of rank 0 now, and in each forward rank 0's buffers, which are those of a checkpoint.
        self.ddp = DistributedDataParallel(self.model)
        with others_wait(self.waiting):
            if RANK == 0:
                self.file = make_folder(options) / "last.pt"
                if state is None:
                    self.save(0)

    @property
    def parts(self) -> dict:
        """What a checkpoint holds. The model is there without DDP's wrapper, so that a run can go
        on with another number of processes."""
        names = "model", "optimizer", "scheduler", "scaler"
        return {name: getattr(self, name) for name in names}

    def save(self, epoch: int) -> None:
        options = {k: v for k, v in vars(self.options).items() if k not in training.ONE_CALL}
        checkpoint.save(self.file, self.parts, epoch=epoch, options=options)

    def train(self) -> None:
        options, steps, log = self.options, len(self.loader), None
        console.print(
            f"SimCLR, processes: {RANKS}, --loss {options.loss} "
            f"({training.objective(DistributedSimCLR, options)}), on {len(self.images)} images, "
            f"{steps} steps an epoch, {self.first} of {options.epochs} epochs done",
            soft_wrap=True,
        )
        start = time.perf_counter()
        if RANK == 0:  # TensorBoard drops its entries for steps that are repeated
            log = SummaryWriter(str(self.file.parent), purge_step=self.first * steps)
            log.add_text("options", repr(vars(options)))
        with training.ctrl_c_held_back() as let_ctrl_c, log or nullcontext():
            for epoch in range(self.first, self.last):
                epoch_start = time.perf_counter()
                table = self.epoch(epoch, let_ctrl_c)
                seconds = time.perf_counter() - epoch_start
                with others_wait(self.waiting):
                    if RANK == 0:
                        line = self.after(epoch, table, seconds, log)
                        self.save(epoch + 1)
                        console.print(line)  # an epoch is printed only after it is saved
                let_ctrl_c()
        with others_wait(self.waiting):
            if RANK == 0:
                if self.last == options.epochs:
                    whole = self.first == 0  # the seconds of a part of a run mean nothing
                    self.score(time.perf_counter() - start if whole else None)
                console.print(
                    f"checkpoint: {self.file}\nlog: tensorboard --logdir {self.file.parent}",
                    soft_wrap=True,
                )

    def epoch(self, epoch: int, let_ctrl_c: Callable[[], None]) -> Tensor:
        """Trains for one epoch. Returns the figures of each step, which all ranks have alike."""
        self.sampler.set_epoch(epoch)  # a new order, of which each rank has another part
        training.seed_epoch(self.options.seed, epoch, RANK)  # each rank has other views
        self.model.set_epoch(epoch)
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
            rows.append(training.figures(loss, self.model.criterion))
            let_ctrl_c()
        return torch.stack(rows).cpu()

    # The rest is done by rank 0 alone, with the model inside DDP's wrapper, for the wrapper would
    # wait for the other ranks.

    def after(self, epoch: int, table: Tensor, seconds: float, log: SummaryWriter) -> str:
        """Checks, logs and tests what an epoch has made. Returns a line about it."""
        line = f"{training.log_epoch(log, epoch, table)}  {seconds:.1f} s"
        losses, scaled = table[:, 0].tolist(), self.scaler.is_enabled()
        training.check_finite(self.model, self.optimizer, epoch, losses, self.images, scaled)
        every = self.options.knn_every
        if every and (epoch + 1) % every == 0:
            accuracy = evaluate.knn_accuracy(*self.features())
            log.add_scalar("test/knn", accuracy, (epoch + 1) * len(table))
            line += f"  k-NN {accuracy:.2%}"
        return line

    def score(self, seconds: float | None) -> None:
        with console.status("evaluating"):
            scores = evaluate.scores(*self.features())
        console.print(training.table_of(scores, len(self.test)))
        folder = self.file.parent
        training.write_result(folder, DistributedSimCLR, self.options, scores, seconds)
        console.print(f"result: {folder / 'result.json'}", soft_wrap=True)

    def features(self) -> tuple[evaluate.Features, evaluate.Features]:
        backbone = self.model.backbone
        return evaluate.features(backbone, self.images), evaluate.features(backbone, self.test)


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
        try:
            run = Run(*training.parse(DistributedSimCLR, "simclr_ddp", arguments, {}))
        except ValueError as error:  # a ValueError in training is a fault of the program
            raise training.UsageError(error) from None
        run.train()
    except (training.UsageError, data.DataError, checkpoint.CheckpointError) as error:
        if RANK == 0 or run is not None:  # what is wrong at the start is wrong on all ranks
            print(f"simclr_ddp.py: error: {error}", file=sys.stderr)
        return 2
    except evaluate.Diverged as error:  # on rank 0
        kept = f"{run.file} has the last good epoch"
        print(f"simclr_ddp.py: training diverged: {error}; {kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"--resume {run.file.parent} goes on" if RANK == 0 and run else "before training"
        console.print(f"interrupted; {kept}", soft_wrap=True)
        return 130
    finally:
        if dist.is_initialized():
            run = None  # DDP's hold on the group goes first, or gloo's threads may end the process
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
