# SPDX-License-Identifier: MIT
"""The command line of the method scripts, and the device, threshold and folder that it names.

With --resume, the options that are not on the command line come from the run's checkpoint.
"""

import argparse
import math
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from common import data
from hex import ThresholdTracker

# Rule, how many numbers it has.
RULES = ("adaptive", 0), ("fixed", 1), ("step", 3), ("cosine", 2), ("positive", 1)
NAMED = {-1: "cosine", 0: "cosine scaled by row"}  # by the least value there is
LAST = "last.ckpt"  # the checkpoint of a run's last complete epoch, in the run's folder
ONE_CALL = "resume", "stop_after"  # options that a resumed run does not take over
# Options that may be others in a resumed run.
CHANGEABLE = {"epochs", "device", "devices", "workers", "root", "out", "knn_every"}
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CheckpointError(Exception):
    """There is no checkpoint, or it is not one of ours. The text is meant for the user."""


def parse(
    method: type, script: str, arguments: list[str] | None, **defaults: object
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The options, and the contents of the checkpoint to continue from, or None.

    Args:
        method: has a docstring and `losses`, and may have `add_options`.
        script, defaults: as for `make_parser`.
        arguments: the command line, by default that of the process.

    Raises:
        CheckpointError, ValueError: there can be no such run. The text is meant for the user.
    """
    parser = parser_of(method, script, **defaults)
    options, state = parser.parse_args(arguments), None
    if options.resume is not None:
        if options.resume.is_dir():
            options.resume /= LAST
        file = options.resume
        state = load_checkpoint(file)
        saved = state["hyper_parameters"]
        if saved.get("script") != script:
            raise CheckpointError(f"{file}: wanted a run of {script}.py")
        # Options that are not on the command line are as they were when the run began.
        parser.set_defaults(**saved)
        options = parser.parse_args(arguments)
        options.resume, options.out = file, str(file.parent)
        for name in saved.keys() - CHANGEABLE:  # the checkpoint's state follows from these
            if (wanted := getattr(options, name, saved[name])) != saved[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {wanted} with --resume, of a run with "
                    f"{saved[name]}"
                )
        if options.epochs <= state["epoch"]:
            raise ValueError(
                f"--epochs: got {options.epochs} with --resume, of a run that has done "
                f"{state['epoch'] + 1}"
            )
    check(options)
    return options, state


def parser_of(method: type, script: str, **defaults: object) -> argparse.ArgumentParser:
    """The parser of a method's script. See `parse`."""
    description = method.__doc__.partition("\n")[0]
    parser = make_parser(script, description, method.losses, **defaults)
    if hasattr(method, "add_options"):
        method.add_options(parser.add_argument_group("method").add_argument)
    return parser


def load_checkpoint(file: Path) -> dict[str, Any]:
    """The contents of a checkpoint. Its options are under "hyper_parameters".

    Raises:
        CheckpointError: the file is missing or is no checkpoint of these scripts.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)  # runs no code from it
        if {"epoch", "hyper_parameters"} <= state.keys():
            return state
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError):
        pass
    raise CheckpointError(f"{file}: not a checkpoint of these examples")


def kept(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a checkpoint and a result hold."""
    return {name: value for name, value in vars(options).items() if name not in ONE_CALL}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of an option, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser(
    script: str, description: str, losses: dict[str, str], **defaults: object
) -> argparse.ArgumentParser:
    """All options of a method script.

    Args:
        script: the script's name, which becomes part of the name of a run's folder.
        description: what --help says first.
        losses: what --loss base and --loss hex mean for this method.
        defaults: the method's own defaults of options that all methods have.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=data.NAMES, default="digits", help="digits are part of scikit-learn")
    add(
        "--root",
        help="folder of the images, with CIFAR-10 in it, or with train/<class>/ and test/<class>/",
    )
    add(
        "--image-size",
        type=positive,
        default=224,
        help="side of a view in pixels, for --data folder",
    )
    add(
        "--workers",
        type=natural,
        default=0,
        help="how many processes read images, for --data folder",
    )

    add = parser.add_argument_group("loss").add_argument
    text = "; ".join(f"{name}: {what}" for name, what in losses.items())
    add("--loss", choices=tuple(losses), default="hex", help=text)
    add("--temperature", type=above_zero, default=0.1, help="temperature of the loss")
    add(
        "--variant",
        choices=("paper", "released"),
        default="paper",
        help="HEX of the paper, or of the authors' code",
    )
    add(
        "--threshold",
        default="adaptive",
        help="adaptive, a cosine such as 0.7, step:START,DROP,EVERY, cosine:START,END or "
        "positive:MARGIN, of each row the cosine with its positive less the margin",
    )
    add(
        "--quantile",
        type=fraction,
        default=0.99,
        help="with --threshold adaptive: the quantile of each row's cosines",
    )
    add(
        "--over",
        choices=("all", "negatives"),
        default="negatives",
        help="with --threshold adaptive: take the quantile of all cosines, or of the negatives'",
    )
    text = "with adaptive or positive: epochs of InfoNCE first"
    add("--warmup", type=natural, default=0, help=text)
    add(
        "--normalize-rows",
        action="store_true",
        help="with a cosine, step or cosine: scale each row's cosines to [0, 1]",
    )

    add = parser.add_argument_group("training").add_argument
    add("--backbone", default="small", help="small, a model of torchvision, or timm:NAME")
    add("--features", type=positive, default=128, help="size of the projection")
    add("--epochs", type=positive, default=40, help="epochs of the whole run")
    add(
        "--batch-size",
        type=positive,
        default=256,
        help="images in a step, over all devices; the loss sees two views of each",
    )
    add("--lr", type=above_zero, default=3e-3, help="peak learning rate of AdamW")
    add("--amp", choices=AMP, default="off", help="mixed precision")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where to train, as torch names it")
    add("--seed", type=natural, default=0, help="of the weights, batches and views")

    add = parser.add_argument_group("run").add_argument
    add("--out", help="the run's folder; by default runs/ and a name with the time")
    add(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue a run, given by its folder or checkpoint",
    )
    add(
        "--stop-after",
        type=positive,
        metavar="EPOCHS",
        help="stop after this many epochs; --resume continues",
    )
    add(
        "--knn-every",
        type=natural,
        default=10,
        help="epochs from one k-NN test to the next; 0: only at the end",
    )
    parser.set_defaults(script=script, **{"devices": 1, **defaults})
    return parser


def threshold(options: argparse.Namespace) -> ThresholdTracker:
    """The tracker that --threshold describes.

    Raises:
        ValueError: it describes none.
    """
    rows = options.normalize_rows
    match parse_threshold(options.threshold):
        case "adaptive", _:
            return ThresholdTracker.adaptive(
                options.quantile, over=options.over, warmup_epochs=options.warmup
            )
        case "positive", [margin]:
            return ThresholdTracker.by_positive(margin, warmup_epochs=options.warmup)
        case "step", [start, drop, every]:
            return ThresholdTracker.step(start, drop, int(every), normalize_rows=rows)
        case "cosine", [start, end]:
            return ThresholdTracker.cosine(start, end, options.epochs, normalize_rows=rows)
        case _, [t]:
            return ThresholdTracker.fixed(t, normalize_rows=rows)


def parse_threshold(text: str) -> tuple[str, list[float]]:
    """The rule in --threshold, and its numbers.

    Raises:
        ValueError: the rule is unknown, or does not have its numbers.
    """
    rule, colon, rest = text.partition(":")
    if not colon and rule != "adaptive":
        rule, rest = "fixed", text
    try:
        numbers = [float(x) for x in rest.split(",")] if rule != "adaptive" or colon else []
    except ValueError:
        numbers = [math.nan]
    if (rule, len(numbers)) not in RULES or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"--threshold: got {text!r}, wanted adaptive, a cosine, "
            "step:START,DROP,EVERY, cosine:START,END or positive:MARGIN"
        )
    if rule == "step" and not (numbers[2] >= 1 and numbers[2].is_integer()):
        raise ValueError(f"--threshold: got {text!r}, wanted whole epochs for EVERY, 1 or more")
    return rule, numbers


def check(options: argparse.Namespace) -> None:
    """Refuses a threshold with which a run would silently train another loss than HEX.

    Raises:
        ValueError: the threshold is no cosine in some epoch; or H would be empty, or hold all
            negatives, in every epoch; or there is an option that belongs to another threshold.
    """
    rule, numbers = parse_threshold(options.threshold)
    if rule in ("adaptive", "positive"):
        if options.normalize_rows:
            named = "an adaptive threshold" if rule == "adaptive" else "one by the positive"
            raise ValueError(
                f"--normalize-rows: got it with {named}, which needs no scaling; "
                "wanted it with a fixed one, step or cosine"
            )
        if rule == "positive" and options.script == "supcon":
            raise ValueError(
                f"--threshold: got {options.threshold!r} for classes, wanted another, for each row "
                "has several positives"
            )
        if options.warmup >= options.epochs:
            raise ValueError(
                f"--warmup: got {options.warmup} of {options.epochs} epochs, wanted fewer; H would "
                "be empty in all of them, and HEX would be InfoNCE"
            )
        return
    if options.warmup:
        raise ValueError(
            f"--warmup: got {options.warmup} with --threshold {options.threshold}, which has none; "
            "wanted it with adaptive or positive"
        )
    if rule == "step":
        start, drop, every = numbers
        numbers = [start, start - drop * ((options.epochs - 1) // every)]
    got = f"--threshold: got {options.threshold!r}"
    least = 0 if options.normalize_rows else -1  # the cosines are in [least, 1]
    if not all(least <= t <= 1 for t in numbers):
        among = f", {min(numbers):g} to {max(numbers):g}" if len(numbers) > 1 else ""
        raise ValueError(f"{got}{among}, wanted a {NAMED[least]}, from {least} to 1")
    if min(numbers) == 1:
        raise ValueError(f"{got}: no {NAMED[least]} is above 1, so HEX would be InfoNCE")
    if max(numbers) == least and options.variant == "released":
        raise ValueError(f"{got}: all negatives are in H, which --variant released leaves out")


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none, or it does not work.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None


def make_folder(options: argparse.Namespace) -> Path:
    """Makes the folder of a run.

    Raises:
        ValueError: there is a run in it already, which must not be overwritten.
    """
    if options.out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        options.out = f"runs/{options.script}-{options.data}-{options.loss}-{stamp}"
    out = Path(options.out)
    if options.resume is None and any((out / name).exists() for name in (LAST, "result.json")):
        raise ValueError(
            f"--out {out}: this folder already holds a run; --resume {out} continues it"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


def positive(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}, wanted at least 1")
    return number


def natural(text: str) -> int:
    """For argparse: an integer of at least 0."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"got {number}, wanted at least 0")
    return number


def above_zero(text: str) -> float:
    """For argparse: a finite number above 0."""
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"got {number}, wanted a finite number above 0")
    return number


def fraction(text: str) -> float:
    """For argparse: a number in [0, 1]."""
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"got {number}, wanted a number from 0 to 1")
    return number
