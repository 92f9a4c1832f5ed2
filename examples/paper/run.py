# SPDX-License-Identifier: MIT
"""Trains one of the authors' runs from its file of settings, and ends with a linear probe.

    python examples/paper/run.py examples/paper/cifar_simclr_hex.yaml --root DIR
    python examples/paper/run.py examples/paper/cifar_simclr_hex.yaml --root DIR --data cifar10 --backbone resnet18
    torchrun --nproc-per-node 8 examples/paper/run.py examples/paper/imagenet_simclr_hex.yaml --root DIR
    python examples/paper/run.py examples/paper/imagenet_simclr_hex.yaml --root DIR --tiny --device cpu

The same command with --resume RUN, the run's folder, continues it after its last whole epoch. Settings
other than those that the run began with are refused. The number of processes may change, because it does not change
the images of a step, the learning rate or the number of images that the loss sees together.

docs/paper_runs.md has the runs, what differs from the authors' setup, and what the runs cost. Needs
hex-ssl[examples].
"""  # noqa: E501

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import runs, training  # noqa: E402
from common.options import LAST, CheckpointError, load_checkpoint, natural, positive  # noqa: E402

from paper import settings as of  # noqa: E402
from paper.methods import METHODS  # noqa: E402

SCRIPT = "run"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Trains one of the authors' runs.")
    add = parser.add_argument
    add("file", type=Path, help="the settings, one of examples/paper/*.yaml")
    add("--root", required=True, help="the images: train/<class>/ and val/<class>/, or CIFAR")
    add("--data", help="another of the data sets that the file names")
    add("--backbone", help="another of the networks that the file names")
    add("--variant", choices=("paper", "released"), help="the form of HEX")
    add("--seed", type=natural, help="another seed than the file's")
    add("--workers", type=natural, default=8, help="processes that read images, for each device")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--tiny", action="store_true", help="a run of seconds, to see that it works")
    add("--out", help="the run's folder; by default runs/paper- and what the run is")
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    add("--stop-after", type=positive, metavar="EPOCHS", help="stop after so many epochs")
    return parser


def settings_of(arguments: argparse.Namespace) -> of.Settings:
    """What the file and the command line say together.

    Raises:
        ValueError: there is no such run. The text is meant for the user.
    """
    settings = of.read(arguments.file)
    for name in ("data", "backbone"):
        settings = of.chosen(settings, name, getattr(arguments, name))
    if settings["loss"] == "base" and arguments.variant is not None:
        raise ValueError(
            f"--variant: got {arguments.variant!r}, wanted none for a run of the method alone"
        )
    for name in ("variant", "seed"):
        if (value := getattr(arguments, name)) is not None:
            settings[name] = value
    settings["crop"] = of.CROP[settings["data"]]
    return of.tiny(settings) if arguments.tiny else settings


def options_of(arguments: argparse.Namespace, settings: of.Settings) -> argparse.Namespace:
    """What `training` wants to know. A checkpoint holds it, with the settings.

    Raises:
        ValueError: the steps cannot be divided among so many processes.
    """
    devices = int(os.environ.get("WORLD_SIZE", 1))
    size, _, _ = of.shared_out(settings, devices)
    name = arguments.file.stem
    what = [name, settings["data"], settings["backbone"], f"seed{settings['seed']}"]
    if settings["loss"] == "hex":
        what.append(settings["variant"])
    if arguments.tiny:
        what.append("tiny")
    # All processes have to know the folder, so there is no time in its name.
    out = arguments.resume or arguments.out or f"runs/paper-{'-'.join(what)}"
    half = settings["precision"] == "16-mixed" and torch.device(arguments.device).type != "cpu"
    return argparse.Namespace(
        script=SCRIPT,
        run=name,
        settings=settings,
        root=arguments.root,
        workers=arguments.workers,
        device=arguments.device,
        devices=devices,
        amp="fp16" if half else "off",
        out=str(out),
        resume=None,
        stop_after=arguments.stop_after,
        loss=settings["loss"],
        alpha=settings.get("alpha"),
        backbone=settings["backbone"],
        batch_size=size,
        epochs=settings["epochs"],
        seed=settings["seed"],
        knn_every=0,
    )


def checkpoint_of(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to continue from, and what it holds.

    Raises:
        CheckpointError, ValueError: there is none, or it is that of another run. The text is meant
            for the user.
    """
    file = Path(options.out) / LAST
    state = load_checkpoint(file)
    saved = state["hyper_parameters"]
    if saved.get("script") != SCRIPT or "settings" not in saved:
        raise CheckpointError(f"{file}: wanted a run of examples/paper/run.py")
    if text := of.differing(options.settings, saved["settings"]):
        raise ValueError(text)
    return file, state


def main(arguments: list[str] | None = None) -> int:
    """The exit status is as that of `training.main`."""
    parsed = parser().parse_args(arguments)

    def prepare() -> training.Begun:
        settings = settings_of(parsed)
        options, state = options_of(parsed, settings), None
        if parsed.resume:
            options.resume, state = checkpoint_of(options)
        begun = training.begin(METHODS[settings["method"]], options, state)
        runs.console.print(of.described(settings, options.devices), soft_wrap=True)
        return begun

    return training.run(SCRIPT, prepare, lambda folder: f"the same command with --resume {folder}")


if __name__ == "__main__":
    sys.exit(main())
