# SPDX-License-Identifier: MIT
"""What training.py and simclr_ddp.py share: the images, the schedule, what a run prints and writes.

None of it needs Lightning.
"""

import argparse
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from common import data, evaluate
from common.options import check_device, kept

console = Console(highlight=False)


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


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate: it rises over the first twentieth, then falls by a half cosine to 0.

    lightly's CosineWarmupScheduler does the same, but its state, which a checkpoint holds, has the
    number of steps in it, so that a resumed run could not be made longer.
    """
    rise = max(1, steps // 20)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_warmup_schedule(step, steps, 1.0, 0.0, rise, 0.0)
    )


def progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    quiet = not console.is_terminal  # bars would fill a log file
    return Progress(*columns, console=console, transient=True, disable=quiet)


def objective(method: type, options: argparse.Namespace) -> str:
    """What --loss means for this method, in words and with the value of alpha."""
    text = method.losses[options.loss]
    if (alpha := getattr(options, "alpha", None)) is not None:
        text = text.replace("(1 - alpha)", f"{1 - alpha:g}").replace("alpha", f"{alpha:g}")
    return text


def finish(
    method: type,
    options: argparse.Namespace,
    backbone: torch.nn.Module,
    parts: tuple[data.Split, data.Split],
    seconds: float | None,
) -> None:
    """Evaluates the features, prints the scores and writes result.json, which compare.py reads.

    Args:
        parts: the training and the test images.
        seconds: how long the training took, if it was not stopped and resumed.
    """
    with console.status("evaluating"):
        scores = evaluate.scores(*(evaluate.features(backbone, part) for part in parts))
    table = Table(title=f"Accuracy on {len(parts[1])} test images (%)")
    for name in ("k-NN", "linear, 1 label a class", "5 labels", "all labels"):
        table.add_column(name, justify="right")
    table.add_row(*(f"{100 * score:.2f}" for score in scores))
    console.print(table)
    result: dict[str, Any] = {"method": method.__name__, "objective": objective(method, options)}
    result |= zip(("knn", "linear_1", "linear_5", "linear"), scores, strict=True)
    result |= {"seconds": seconds, **kept(options)}
    file = Path(options.out) / "result.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"result: {file}", soft_wrap=True)


def what_is_kept(file: Path, epochs: int) -> str:
    """What a run that ended early has left in its checkpoint."""
    if not epochs:
        return "no epoch was saved"
    return f"{file} has the run as it was after {epochs} whole epochs"


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
