# SPDX-License-Identifier: MIT
"""What happens around a method: the loop, checkpoints, TensorBoard's log, evaluation, the result.

A script defines a `Method` and hands it to `main`. A run's folder holds `last.pt`, the checkpoint
of its last whole epoch, TensorBoard's log and, once it is over, `result.json`. On the CPU a resumed
run ends with the very bits of one that was never stopped.
"""

import argparse
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from common import checkpoint, data, encoder, evaluate
from common.evaluate import Diverged
from common.options import AMP, check, check_device, make_folder, make_parser
from hex import ThresholdTracker

ONE_CALL = "resume", "stop_after"  # options that a resumed run does not inherit
console = Console(highlight=False)


class Method(nn.Module):
    """A self-supervised method: its networks, the loss of a batch, what follows a step.

    All its state is in modules and buffers: then the checkpoint has it.

    Args:
        options: the command line.
        images: those to train on.

    Raises:
        ValueError: an option cannot be; the text is for the user.
    """

    losses: ClassVar[dict[str, str]]  # what --loss base and --loss hex are, in a few words
    supervised: ClassVar[bool] = False  # whether forward gets the labels, last
    local_views: ClassVar[int] = 0  # small crops, besides the two views

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__()
        self.backbone, self.width = encoder.backbone(options.backbone, images.size)
        self.criterion: nn.Module | None = None  # has set_epoch and last: HEXLoss, InfoNCELoss

    @classmethod
    def add_options(cls, add: Callable[..., object]) -> None:
        """The method's own options; `add` is argparse's add_argument."""

    def forward(self, *views: Tensor) -> Tensor:
        """The loss of a batch, from views (B, 3, size, size) in [-1, 1]."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Says that an epoch, counted from 0, begins."""
        if self.criterion is not None:
            self.criterion.set_epoch(epoch)

    def after_step(self, step: int, steps: int) -> None:
        """Called after step number `step`, from 1 to `steps`, of the optimizer."""


def main(method: type[Method], arguments: list[str] | None = None, **defaults: object) -> int:
    """A script; its exit status: 2 for what the user must mend, 1 for a training that diverged,
    130 after Ctrl-C.

    Args:
        defaults: the method's, for options that all have.
    """
    script = Path(sys.modules[method.__module__].__file__).stem
    run = None
    try:
        try:
            run = Run(method, *parse(method, script, arguments, defaults))
        except ValueError as error:  # once training goes on, one is an error of the program
            raise UsageError(error) from None
        run.train()
    except (UsageError, data.DataError, checkpoint.CheckpointError) as error:
        print(f"{script}.py: error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"{script}.py: training diverged: {error}; {run.what_is_kept()}", file=sys.stderr)
        return 1
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
        method: the class.
        options: the command line.
        state: None, or the checkpoint to go on from.

    Raises:
        DataError, CheckpointError, ValueError: before anything is trained; the text is for the
            user.
    """

    def __init__(
        self, method: type[Method], options: argparse.Namespace, state: dict | None
    ) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)
        random.seed(options.seed)
        device = check_device(options.device)
        self.images, self.test = load(options, method.local_views)
        self.steps = len(self.images) // options.batch_size
        self.model = method(options, self.images).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=1e-4)
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
        names = "model", "optimizer", "scheduler", "scaler"
        return {name: getattr(self, name) for name in names}

    def save(self, epoch: int) -> None:
        options = {k: v for k, v in vars(self.options).items() if k not in ONE_CALL}
        checkpoint.save(self.file, self.parts, epoch=epoch, options=options)

    def train(self) -> None:
        options = self.options
        console.print(
            f"{type(self.model).__name__}, --loss {options.loss} "
            f"({objective(type(self.model), options)}), on {len(self.images)} images, {self.steps} "
            f"steps an epoch, {self.first} of {options.epochs} epochs done",
            soft_wrap=True,
        )
        start = time.perf_counter()
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
            whole = self.first == 0  # the seconds of a part tell nothing
            seconds = time.perf_counter() - start if whole else None
            with console.status("evaluating"):
                scores = evaluate.scores(*self.features())
            console.print(table_of(scores, len(self.test)))
            write_result(self.folder, type(self.model), options, scores, seconds)
            console.print(f"result: {self.folder / 'result.json'}", soft_wrap=True)
        console.print(
            f"checkpoint: {self.file}\nlog: tensorboard --logdir {self.folder}", soft_wrap=True
        )

    def epoch(self, epoch: int, log: SummaryWriter, let_ctrl_c: Callable[[], None]) -> str:
        """Trains for an epoch, counted from 0, logs it, and tells of it in a line."""
        start = time.perf_counter()
        log.add_scalar("train/lr", self.scheduler.get_last_lr()[0], epoch * self.steps)
        self.model.set_epoch(epoch)
        criterion = self.model.criterion
        names = "loss", "eps", "hard", "share"  # the last three only if there is a criterion
        rows = []  # of each step; read when the epoch is over
        losses = train_epoch(
            self.model,
            self.images.batches(self.options.batch_size),
            self.optimizer,
            self.scheduler,
            self.scaler,
            self.steps * self.options.epochs,
            AMP[self.options.amp],
        )
        with progress() as bars:
            for loss in bars.track(losses, self.steps, description=f"epoch {epoch + 1}"):
                values = loss, *(() if criterion is None else criterion.last)
                rows.append(torch.stack([x.double() for x in values]))
                let_ctrl_c()
        table = torch.stack(rows).cpu()
        for step, row in enumerate(table.tolist(), epoch * self.steps):
            for name, value in zip(names, row, strict=False):
                log.add_scalar(f"train/{name}", value, step)
        scaled = self.scaler.is_enabled()
        check_finite(self.model, self.optimizer, epoch, table[:, 0].tolist(), self.images, scaled)
        means = dict(zip(names, table.mean(0).tolist(), strict=False))
        line = f"epoch {epoch + 1:3}  loss {means['loss']:.4f}"
        if math.isfinite(means.get("eps", math.inf)):
            line += f"  eps {means['eps']:.3f}  mean |H| {means['hard']:.2f}"
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

    def what_is_kept(self) -> str:
        epochs = checkpoint.load(self.file)["values"]["epoch"]
        return f"{self.file} has the run as it was after {epochs} whole epochs"

    def how_to_go_on(self) -> str:
        return (
            f"interrupted; {self.what_is_kept()}, the "
            f"steps since then are lost.\nTo go on: python {sys.argv[0]} --resume {self.folder}"
        )


def load(options: argparse.Namespace, local_views: int = 0) -> tuple[data.Split, data.Split]:
    """The images to train on and those to test with.

    Raises:
        DataError, ValueError: the text is for the user.
    """
    with console.status("reading the images"):
        images, test = data.load(
            options.data,
            options.root and Path(options.root),
            device=check_device(options.device),
            size=options.image_size,
            workers=options.workers,
            local_views=local_views,
        )
    if len(images) < options.batch_size:
        raise ValueError(f"--batch-size {options.batch_size}: there are {len(images)} images only")
    return images, test


def train_epoch(
    method: Method,
    batches: Iterator[data.Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    steps: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """One epoch, a step at a time; gives the loss of each step, detached.

    Args:
        steps: of all epochs.
    """
    method.train()
    for views, labels in batches:
        with torch.autocast(views[0].device.type, dtype, enabled=dtype != torch.float32):
            loss = method(*views, labels) if method.supervised else method(*views)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        method.after_step(scheduler.last_epoch, steps)
        yield loss.detach()


def check_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    losses: list[float],
    images: data.Split,
    scaled: bool = False,
) -> None:
    """Looks, when an epoch is over, at all that the next one or a checkpoint would start from.

    Args:
        model: has a `backbone`. epoch: counted from 0. losses: of the epoch's steps.
        images: some of them are tried on the backbone.
        scaled: by a GradScaler, which leaves out a step whose gradient is not finite: then a loss
            that is not does no harm.

    Raises:
        Diverged: something there is not finite.
    """
    for step, loss in enumerate(losses, 1):
        if not (math.isfinite(loss) or scaled):
            raise Diverged(f"the loss of step {step} of epoch {epoch + 1} is {loss}")
    state = [x for of in optimizer.state.values() for x in of.values() if isinstance(x, Tensor)]
    for module in model.modules():
        if not isinstance(module, ThresholdTracker):  # whose eps may be infinite
            state += module.parameters(recurse=False)
            state += module.buffers(recurse=False)
    if not all(x.isfinite().all() for x in state):
        raise Diverged(f"after epoch {epoch + 1} not all weights and moments are finite")
    evaluate.features(model.backbone, images, batches=1)


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


def table_of(scores: list[float], test_images: int) -> Table:
    table = Table(title=f"Accuracy on {test_images} test images (%)")
    for name in ("k-NN", "linear, 1 label a class", "5 labels", "all labels"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * score:.2f}" for score in scores))
    return table


def objective(method: type, options: argparse.Namespace) -> str:
    """What --loss is for this method, with the number that alpha is."""
    text = method.losses[options.loss]
    if (alpha := getattr(options, "alpha", None)) is not None:
        text = text.replace("(1 - alpha)", f"{1 - alpha:g}").replace("alpha", f"{alpha:g}")
    return text


def write_result(
    folder: Path,
    method: type,
    options: argparse.Namespace,
    scores: list[float],
    seconds: float | None,
) -> None:
    """result.json: what ran, and what its features are worth; compare.py makes a table of many."""
    result: dict[str, Any] = {"method": method.__name__, "objective": objective(method, options)}
    result |= zip(("knn", "linear_1", "linear_5", "linear"), scores, strict=True)
    result["seconds"] = seconds
    result |= {k: v for k, v in vars(options).items() if k not in ONE_CALL}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


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


def parser_of(method: type[Method], script: str, **defaults: object) -> argparse.ArgumentParser:
    description = method.__doc__.partition("\n")[0]
    parser = make_parser(script, description, method.losses, **defaults)
    method.add_options(parser.add_argument_group("method").add_argument)
    return parser


def parse(
    method: type[Method], script: str, arguments: list[str] | None, defaults: dict[str, object]
) -> tuple[argparse.Namespace, dict | None]:
    """The options, and the checkpoint to go on from, if any."""
    parser = parser_of(method, script, **defaults)
    options = parser.parse_args(arguments)
    if options.resume is None:
        check(options)
        return options, None
    file = options.resume / "last.pt" if options.resume.is_dir() else options.resume
    state = checkpoint.load(file)
    saved = state["values"]["options"]
    if saved.get("script") != script:
        raise checkpoint.CheckpointError(f"{file}: wanted a run of {script}.py")
    # what the command line does not say is as it was when the run began
    parser.set_defaults(**saved)
    options = parser.parse_args(arguments)
    check(options)
    for name in ("lr", "seed"):  # the checkpoint has what became of them
        if (wanted := getattr(options, name)) != saved[name]:
            raise ValueError(f"--{name}: got {wanted} with --resume, of a run with {saved[name]}")
    options.out = str(file.parent)
    return options, state
