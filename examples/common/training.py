# SPDX-License-Identifier: MIT
"""What all methods share: the loop, checkpoints, TensorBoard's log, evaluation and the result.

A script defines a `Method` and passes it to `main`. The folder of a run holds `last.pt`, which is
the checkpoint of its last complete epoch, TensorBoard's log and, when the run is over,
`result.json`. On the CPU, a run that was stopped and resumed ends with the same bits as one that
was never stopped.
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

ONE_CALL = "resume", "stop_after"  # options that a resumed run does not take over
console = Console(highlight=False)


class Method(nn.Module):
    """A self-supervised method: its networks, the loss of a batch, and what follows a step.

    A subclass must keep all state in modules and buffers, so that the checkpoint has it.

    Args:
        options: the command line.
        images: the images to train on.

    Raises:
        ValueError: an option has an impossible value. The text is meant for the user.
    """

    losses: ClassVar[dict[str, str]]  # what --loss base and --loss hex are, in a few words
    supervised: ClassVar[bool] = False  # whether the last argument of forward is the labels
    local_views: ClassVar[int] = 0  # how many small crops there are besides the two views

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__()
        self.backbone, self.width = encoder.backbone(options.backbone, images.size)
        self.criterion: nn.Module | None = None  # a loss of hex, with set_epoch and last

    @classmethod
    def add_options(cls, add: Callable[..., object]) -> None:
        """Adds the method's own options. `add` is argparse's add_argument."""

    def forward(self, *views: Tensor) -> Tensor:
        """The loss of a batch, 0-d, from views (B, 3, size, size) in [-1, 1]."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Called when an epoch, counted from 0, begins."""
        if self.criterion is not None:
            self.criterion.set_epoch(epoch)

    def after_step(self, step: int, steps: int) -> None:
        """Called after each step of the optimizer; `step` counts from 1 to `steps`."""


def main(method: type[Method], arguments: list[str] | None = None, **defaults: object) -> int:
    """Runs a script.

    Args:
        arguments: the command line, by default that of the process.
        defaults: the method's own defaults of options that all methods have.

    Returns:
        The exit status: 0, or 2 for an error that the user can correct, 1 for a training that
        diverged, 130 after Ctrl-C.
    """
    script = Path(sys.modules[method.__module__].__file__).stem
    run = None
    try:
        try:
            run = Run(method, *parse(method, script, arguments, defaults))
        except ValueError as error:  # a ValueError in training is a fault of the program
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
    """An option has an impossible value. The text is meant for the user."""


class Run:
    """A training run: everything that its options ask for, and its folder.

    Args:
        method: the class of the method.
        options: the command line.
        state: None, or the checkpoint to continue from.

    Raises:
        DataError, CheckpointError, ValueError: the run cannot begin. The text is meant for the
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
        self.first = 0  # the epoch to begin with; self.last is the one after the end
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
        """Everything that has a state, by name."""
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
        # TensorBoard drops its entries for steps that are repeated.
        log = SummaryWriter(str(self.folder), purge_step=self.first * self.steps)
        with ctrl_c_held_back() as let_ctrl_c, log:
            log.add_text("options", repr(vars(options)))
            for epoch in range(self.first, self.last):
                line = self.epoch(epoch, log, let_ctrl_c)
                self.save(epoch + 1)
                console.print(line)  # an epoch is printed only after it is saved
                let_ctrl_c()
        if self.last == options.epochs:
            whole = self.first == 0  # the seconds of a part of a run mean nothing
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
        """Trains for one epoch, counted from 0, and logs it. Returns a line about it."""
        start = time.perf_counter()
        log.add_scalar("train/lr", self.scheduler.get_last_lr()[0], epoch * self.steps)
        self.model.set_epoch(epoch)
        rows = []  # one for each step, read when the epoch is over, so that no step waits
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
                rows.append(figures(loss, self.model.criterion))
                let_ctrl_c()
        table = torch.stack(rows).cpu()
        line = log_epoch(log, epoch, table)
        scaled = self.scaler.is_enabled()
        check_finite(self.model, self.optimizer, epoch, table[:, 0].tolist(), self.images, scaled)
        line += f"  {time.perf_counter() - start:.1f} s"
        every = self.options.knn_every
        if every and (epoch + 1) % every == 0:
            accuracy = evaluate.knn_accuracy(*self.features())
            log.add_scalar("test/knn", accuracy, (epoch + 1) * self.steps)
            line += f"  k-NN {accuracy:.2%}"
        return line

    def features(self) -> tuple[evaluate.Features, evaluate.Features]:
        """The backbone's output, without the projection, for training and test images."""
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
        DataError, ValueError: they cannot be had. The text is meant for the user.
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
    """Trains for one epoch, one step for each item that is taken; an item is the detached loss.

    Args:
        steps: the number of steps in all epochs together, for `after_step`.
        dtype: of autocast; float32 turns it off.
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


FIGURES = "loss", "eps", "hard", "share"  # without a criterion there is the loss alone


def figures(loss: Tensor, criterion: nn.Module | None) -> Tensor:
    """FIGURES of a step, float64, on the device."""
    values = loss.detach(), *(() if criterion is None else criterion.last)
    return torch.stack([x.double() for x in values])


def log_epoch(log: SummaryWriter, epoch: int, table: Tensor) -> str:
    """Logs the figures of an epoch, (steps, 1 or 4). Returns a line with their means."""
    for step, row in enumerate(table.tolist(), epoch * len(table)):
        for name, value in zip(FIGURES, row, strict=False):
            log.add_scalar(f"train/{name}", value, step)
    means = dict(zip(FIGURES, table.mean(0).tolist(), strict=False))
    line = f"epoch {epoch + 1:3}  loss {means['loss']:.4f}"
    if math.isfinite(means.get("eps", math.inf)):
        line += f"  eps {means['eps']:.3f}  mean |H| {means['hard']:.2f}"
    return line


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seeds torch's generator for an epoch, so that each rank of a distributed run has other views.

    A resumed run then has the views that it would have had without the break, on every rank,
    although its checkpoint has the generator of one rank only.
    """
    mixed = np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


def check_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    losses: list[float],
    images: data.Split,
    scaled: bool = False,
) -> None:
    """Checks, after an epoch, everything from which the next epoch or a resumed run would start.

    Args:
        model: has a `backbone`.
        epoch: counted from 0.
        losses: those of the epoch's steps.
        images: one batch of these is passed through the backbone.
        scaled: whether a GradScaler is in use. It leaves out steps whose gradient is not finite, so
            that a loss that is not finite does no harm.

    Raises:
        Diverged: something is not finite.
    """
    for step, loss in enumerate(losses, 1):
        if not (math.isfinite(loss) or scaled):
            raise Diverged(f"the loss of step {step} of epoch {epoch + 1} is {loss}")
    state = [x for of in optimizer.state.values() for x in of.values() if isinstance(x, Tensor)]
    for module in model.modules():
        if not isinstance(module, ThresholdTracker):  # its eps may be infinite
            state += module.parameters(recurse=False)
            state += module.buffers(recurse=False)
    if not all(x.isfinite().all() for x in state):
        raise Diverged(f"after epoch {epoch + 1} not all weights and moments are finite")
    evaluate.features(model.backbone, images, batches=1)


def schedule(
    optimizer: torch.optim.Optimizer, steps: int, epochs: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate: it rises over the first twentieth, then falls by a half cosine to 0."""
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
    """What --loss means for this method, in words and with the value of alpha."""
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
    """Writes result.json: the options, and the accuracy of the features. compare.py reads it."""
    result: dict[str, Any] = {"method": method.__name__, "objective": objective(method, options)}
    result |= zip(("knn", "linear_1", "linear_5", "linear"), scores, strict=True)
    result["seconds"] = seconds
    result |= {k: v for k, v in vars(options).items() if k not in ONE_CALL}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def ctrl_c_held_back() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the function that it yields is called.

    At another moment the interrupt might leave a lock of TensorBoard taken, and closing the log
    would then wait for ever. A second Ctrl-C is not held back.
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
    quiet = not console.is_terminal  # bars would fill a log file
    return Progress(*columns, console=console, transient=True, disable=quiet)


def parser_of(method: type[Method], script: str, **defaults: object) -> argparse.ArgumentParser:
    description = method.__doc__.partition("\n")[0]
    parser = make_parser(script, description, method.losses, **defaults)
    method.add_options(parser.add_argument_group("method").add_argument)
    return parser


def parse(
    method: type[Method], script: str, arguments: list[str] | None, defaults: dict[str, object]
) -> tuple[argparse.Namespace, dict | None]:
    """The options, and the checkpoint to continue from, or None."""
    parser = parser_of(method, script, **defaults)
    options = parser.parse_args(arguments)
    if options.resume is None:
        check(options)
        return options, None
    file = options.resume / "last.pt" if options.resume.is_dir() else options.resume
    state = checkpoint.load(file)
    options = resumed(parser, script, arguments, file, state["values"]["options"])
    options.out = str(file.parent)
    return options, state


def resumed(
    parser: argparse.ArgumentParser,
    script: str,
    arguments: list[str] | None,
    file: Path,
    saved: dict[str, Any],
) -> argparse.Namespace:
    """The options of a run that goes on from a checkpoint, `file`, with options that were `saved`.

    Raises:
        CheckpointError, ValueError: it cannot go on with them. The text is meant for the user.
    """
    if saved.get("script") != script:
        raise checkpoint.CheckpointError(f"{file}: wanted a run of {script}.py")
    # Options that are not on the command line are as they were when the run began.
    parser.set_defaults(**saved)
    options = parser.parse_args(arguments)
    check(options)
    for name in ("lr", "seed"):  # the checkpoint's state follows from these
        if (wanted := getattr(options, name)) != saved[name]:
            raise ValueError(f"--{name}: got {wanted} with --resume, of a run with {saved[name]}")
    return options
