# SPDX-License-Identifier: MIT
"""What training.py and simclr_ddp.py share: the images, the schedule, what a run prints and writes.

None of it needs Lightning.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lightly.utils.scheduler import cosine_warmup_schedule
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from common import data, evaluate
from common.options import LAST, CheckpointError, check_device, kept, load_checkpoint

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


def restore(part: Any, state: dict[str, Any], name: str) -> None:
    """Gives a part of a run, such as its model, the state that a checkpoint holds of it.

    Raises:
        CheckpointError: they do not fit. The text is meant for the user.
    """
    try:
        part.load_state_dict(state[name])
    except (KeyError, ValueError, RuntimeError) as error:
        text = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"the checkpoint's {name} does not fit: {text}") from None


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


def greet(
    method: type, options: argparse.Namespace, images: data.Split, steps: int, done: int
) -> None:
    """Says what is trained."""
    console.print(
        f"{method.__name__}, --loss {options.loss} ({objective(method, options)}), on "
        f"{len(images)} images, {steps} steps an epoch, {done} of {options.epochs} epochs done",
        soft_wrap=True,
    )


def objective(method: type, options: argparse.Namespace) -> str:
    """What --loss means for this method, in words and with the value of alpha."""
    text = method.losses[options.loss]
    if (alpha := getattr(options, "alpha", None)) is not None:
        text = text.replace("(1 - alpha)", f"{1 - alpha:g}").replace("alpha", f"{alpha:g}")
    return text


def look(
    options: argparse.Namespace,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: tuple[data.Split, data.Split],
    epoch: int,
    losses: list[float],
) -> tuple[str, float | None]:
    """Checks what an epoch, counted from 0, has made, and tests it every `--knn-every` epochs.

    Args:
        parts: the training and the test images.
        losses: those of the epoch's steps.

    Returns:
        A line about the epoch, and the accuracy of nearest neighbours or None.

    Raises:
        Diverged: the training has reached numbers that are not finite.
    """
    evaluate.check_finite(model, optimizer, epoch, losses, parts[0], options.amp == "fp16")
    line, accuracy = f"epoch {epoch + 1:3}  loss {sum(losses) / len(losses):.4f}", None
    if options.loss == "hex":
        eps, hard, _ = map(float, model.criterion.last)
        line += f"  eps {eps:.3f}  mean |H| {hard:.2f}"  # of the last step
    if options.knn_every and (epoch + 1) % options.knn_every == 0:
        features = (evaluate.features(model.backbone, part) for part in parts)
        accuracy = evaluate.knn_accuracy(*features)
        line += f"  k-NN {accuracy:.2%}"
    return line, accuracy


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


def what_is_kept(folder: Path | str) -> str:
    """What a run that ended early has left in its checkpoint."""
    file = Path(folder, LAST)
    if not file.exists():
        return "no epoch was saved"
    epochs = load_checkpoint(file)["epoch"] + 1
    return f"{file} has the run as it was after {epochs} whole epochs"
