# SPDX-License-Identifier: MIT
"""SimCLR with the HEX loss, or with InfoNCE: train an encoder without labels, then test it.

    python examples/simclr.py --data digits
    python examples/simclr.py --data cifar10 --root DIR --backbone resnet18 --epochs 200
    python examples/simclr.py --data folder --root DIR --backbone timm:resnet50 --workers 8
    python examples/simclr.py --resume runs/NAME

A run's folder holds `last.pt`, the checkpoint of its last whole epoch, and TensorBoard's log. On
the CPU a resumed run ends with the very bits of one that was never stopped.

Needs hex-ssl[examples].
"""

import argparse
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from common import checkpoint, data, evaluate
from common.encoder import Encoder
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from hex import HEXLoss, InfoNCELoss, ThresholdTracker

ONE_CALL = "resume", "stop_after"  # options that a resumed run does not inherit
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
console = Console(highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """The script; its exit status: 2 for what the user must mend, 130 after Ctrl-C."""
    run = None
    try:
        try:
            run = Run(*parse(arguments))
        except ValueError as error:  # once training goes on, one is an error of the program
            raise UsageError(error) from None
        run.train()
    except (UsageError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"simclr.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print(
            "interrupted before training" if run is None else run.how_to_go_on(), soft_wrap=True
        )
        return 130
    return 0


class UsageError(Exception):
    """An option has a value that cannot be; the text is for the user."""


class Run:
    """A training run: all that its options ask for, and its folder.

    Args:
        options: the command line.
        state: None, or the checkpoint to go on from.

    Raises:
        DataError, CheckpointError, ValueError: before anything is trained; the text is for the
            user.
    """

    def __init__(self, options: argparse.Namespace, state: dict | None) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)
        random.seed(options.seed)
        device = check_device(options.device)
        with console.status("reading the images"):
            self.images, self.test = data.load(
                options.data,
                options.root and Path(options.root),
                device=device,
                size=options.image_size,
                workers=options.workers,
            )
        self.steps = len(self.images) // options.batch_size
        if self.steps == 0:
            raise ValueError(
                f"--batch-size {options.batch_size}: there are {len(self.images)} images only"
            )

        self.model = Encoder(options.backbone, self.images.size, options.features).to(device)
        if options.loss == "hex":
            criterion = HEXLoss(
                options.temperature, threshold=threshold(options), variant=options.variant
            )
        else:
            criterion = InfoNCELoss(options.temperature)
        self.criterion = criterion.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, weight_decay=1e-4)
        self.scheduler = schedule(self.optimizer, self.steps, options.epochs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self.first = 0  # epoch
        if state is not None:
            checkpoint.restore(state, self.parts)
            self.first = state["values"]["epoch"]
        self.last = min(options.epochs, self.first + (options.stop_after or options.epochs))

        self.folder = make_folder(options)
        self.file = self.folder / "last.pt"
        if state is None:
            self.save(0)

    @property
    def parts(self) -> dict:
        """All that has a state."""
        names = "model", "criterion", "optimizer", "scheduler", "scaler"
        return {name: getattr(self, name) for name in names}

    def save(self, epoch: int) -> None:
        options = {k: v for k, v in vars(self.options).items() if k not in ONE_CALL}
        checkpoint.save(self.file, self.parts, epoch=epoch, options=options)

    def train(self) -> None:
        options = self.options
        console.print(
            f"{options.loss} on {len(self.images)} images, {self.steps} steps an epoch, "
            f"{self.first} of {options.epochs} epochs done"
        )
        # TensorBoard drops what it has of steps that are taken again
        log = SummaryWriter(str(self.folder), purge_step=self.first * self.steps)
        with ctrl_c_held_back() as let_ctrl_c, log:
            log.add_text("options", repr(vars(options)))
            for epoch in range(self.first, self.last):
                line = self.epoch(epoch, log, let_ctrl_c)
                self.save(epoch + 1)
                console.print(line)  # what is printed is saved
                let_ctrl_c()
        if self.last == options.epochs:
            with console.status("evaluating"):
                console.print(results(*self.features()))
        console.print(f"checkpoint: {self.file}\nlog: tensorboard --logdir {self.folder}")

    def epoch(self, epoch: int, log: SummaryWriter, let_ctrl_c: Callable[[], None]) -> str:
        """Trains for an epoch, counted from 0, logs it, and tells of it in a line."""
        start = time.perf_counter()
        log.add_scalar("train/lr", self.scheduler.get_last_lr()[0], epoch * self.steps)
        self.criterion.set_epoch(epoch)
        rows = []  # loss, eps, mean |H|, share of each step; read when the epoch is over
        losses = train_epoch(
            self.model,
            self.criterion,
            self.images.views(self.options.batch_size),
            self.optimizer,
            self.scheduler,
            self.scaler,
            AMP[self.options.amp],
        )
        with progress() as bars:
            for loss in bars.track(losses, self.steps, description=f"epoch {epoch + 1}"):
                rows.append(torch.stack([x.double() for x in (loss, *self.criterion.last)]))
                let_ctrl_c()
        table = torch.stack(rows).cpu()
        for step, row in enumerate(table.tolist(), epoch * self.steps):
            for name, value in zip(("loss", "eps", "hard", "share"), row, strict=True):
                log.add_scalar(f"train/{name}", value, step)
        loss, eps, hard, _ = table.mean(0).tolist()
        line = f"epoch {epoch + 1:3}  loss {loss:.4f}"
        if math.isfinite(eps):
            line += f"  eps {eps:.3f}  mean |H| {hard:.2f}"
        line += f"  {time.perf_counter() - start:.1f} s"
        every = self.options.knn_every
        if every and (epoch + 1) % every == 0:
            accuracy = evaluate.knn_accuracy(*self.features())
            log.add_scalar("test/knn", accuracy, (epoch + 1) * self.steps)
            line += f"  k-NN {accuracy:.2%}"
        return line

    def features(self) -> tuple[evaluate.Features, evaluate.Features]:
        """Training and test: the backbone's output, without the projection."""
        backbone = self.model.backbone
        return evaluate.features(backbone, self.images), evaluate.features(backbone, self.test)

    def how_to_go_on(self) -> str:
        epochs = checkpoint.load(self.file)["values"]["epoch"]
        return (
            f"interrupted; {self.file} has the run as it was after {epochs} whole epochs, the "
            f"steps since then are lost.\nTo go on: python {sys.argv[0]} --resume {self.folder}"
        )


def train_epoch(
    model: nn.Module,
    criterion: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """One epoch, a step at a time; gives the loss of each step, detached."""
    model.train()
    criterion.train()
    for view0, view1 in batches:
        with torch.autocast(view0.device.type, dtype, enabled=dtype != torch.float32):
            z0, z1 = model(torch.cat([view0, view1])).chunk(2)
            loss = criterion(z0, z1)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        yield loss.detach()


def schedule(
    optimizer: torch.optim.Optimizer, steps: int, epochs: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate: up over the first twentieth, then a half cosine down to 0."""
    total = steps * epochs
    rise = max(1, total // 20)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def threshold(options: argparse.Namespace) -> ThresholdTracker:
    """The tracker that --threshold describes."""
    rule, _, rest = options.threshold.partition(":")
    rows = options.normalize_rows
    numbers = []
    try:
        numbers = [float(x) for x in rest.split(",") if x]
        if rule != "adaptive" and not numbers:
            rule, numbers = "fixed", [float(rule)]
    except ValueError:
        rule = "unknown"
    match rule, numbers:
        case "adaptive", []:
            return ThresholdTracker.adaptive(
                options.quantile, over=options.over, warmup_epochs=options.warmup
            )
        case "fixed", [t]:
            return ThresholdTracker.fixed(t, normalize_rows=rows)
        case "step", [start, drop, every]:
            return ThresholdTracker.step(start, drop, int(every), normalize_rows=rows)
        case "cosine", [start, end]:
            return ThresholdTracker.cosine(start, end, options.epochs, normalize_rows=rows)
    raise ValueError(
        f"--threshold: got {options.threshold!r}, wanted adaptive, a cosine, "
        "step:START,DROP,EVERY or cosine:START,END"
    )


def results(train: evaluate.Features, test: evaluate.Features) -> Table:
    table = Table(title=f"Accuracy on {len(test[1])} test images (%)")
    for name in ("k-NN", "linear, 1 label a class", "5 labels", "all labels"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * score:.2f}" for score in evaluate.scores(train, test)))
    return table


@contextmanager
def ctrl_c_held_back() -> Iterator[Callable[[], None]]:
    """Gives a function; Ctrl-C stops the program when it is called next.

    At another moment it might leave a lock of TensorBoard's taken, and closing the log would wait
    for ever. A second Ctrl-C is not held back.
    """
    pressed = False

    def remember(*_) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def let() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield let
    finally:
        signal.signal(signal.SIGINT, before)


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    quiet = not console.is_terminal  # a log file wants lines only
    return Progress(*columns, console=console, transient=True, disable=quiet)


def check_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None


def make_folder(options: argparse.Namespace) -> Path:
    """The run's folder; one that already has a run is not written over."""
    if options.out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        options.out = f"runs/simclr-{options.data}-{options.loss}-{stamp}"
    out = Path(options.out)
    if options.resume is None and (out / "last.pt").exists():
        raise ValueError(f"--out {out}: there is a run already; --resume {out} continues it")
    out.mkdir(parents=True, exist_ok=True)
    return out


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The options, and the checkpoint to go on from, if any."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.resume is None:
        return options, None
    file = options.resume / "last.pt" if options.resume.is_dir() else options.resume
    state = checkpoint.load(file)
    # what the command line does not say is as it was when the run began
    parser.set_defaults(**state["values"]["options"])
    options = parser.parse_args(arguments)
    options.out = str(file.parent)
    return options, state


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="SimCLR with the HEX loss or with InfoNCE, and tests of what it learned.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=data.NAMES, default="digits", help="digits come with scikit-learn")
    add("--root", help="folder of the images: CIFAR-10, or train/<class>/ and test/<class>/")
    add(
        "--image-size",
        type=positive,
        default=224,
        help="side of a view in pixels, for --data folder",
    )
    add("--workers", type=int, default=0, help="processes that read images, for --data folder")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=("hex", "infonce"), default="hex")
    add("--temperature", type=float, default=0.1)
    add("--variant", choices=("paper", "released"), default="paper")
    add(
        "--threshold",
        default="adaptive",
        help="adaptive, a cosine such as 0.7, step:START,DROP,EVERY or cosine:START,END",
    )
    add("--quantile", type=float, default=0.99, help="of a row's cosines, for adaptive")
    add("--over", choices=("all", "negatives"), default="all", help="the row for adaptive")
    add("--warmup", type=int, default=0, help="epochs of InfoNCE before adaptive")
    add("--normalize-rows", action="store_true", help="scale each row to [0, 1], for the others")

    add = parser.add_argument_group("training").add_argument
    add("--backbone", default="small", help="small, a model of torchvision, or timm:NAME")
    add("--features", type=positive, default=128, help="of the projection")
    add("--epochs", type=positive, default=100)
    add("--batch-size", type=positive, default=256, help="images; the loss sees two views of each")
    add("--lr", type=float, default=1e-3, help="greatest learning rate, of AdamW")
    add("--amp", choices=AMP, default="off", help="mixed precision")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder; by default runs/ and a name with the time")
    add("--resume", type=Path, metavar="RUN", help="go on with a run: its folder or checkpoint")
    add("--stop-after", type=positive, metavar="EPOCHS", help="leave the rest for --resume")
    add("--knn-every", type=int, default=10, help="epochs between k-NN tests; 0: at the end only")
    return parser


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}, wanted at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
