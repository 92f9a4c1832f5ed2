# SPDX-License-Identifier: MIT
"""What tests/test_examples_distributed.py starts by torchrun: runs of both distributed examples,
whole and in parts. All are in the same processes, for imports take longer than the trainings.

    torchrun --nproc-per-node 2 tests/example_ranks.py FOLDER

On a few digits. Each run's folder is FOLDER/NAME. What each rank saw is in FOLDER/RANK.pt.
"""

import os
import sys
from pathlib import Path

import sklearn.datasets
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import clip  # noqa: E402
import simclr  # noqa: E402
import simclr_ddp  # noqa: E402
import supcon  # noqa: E402
from common import evaluate  # noqa: E402

IMAGES, BATCH, EPOCHS = 120, 50, 2  # to train on; a rank has 60, and 10 of them fill no batch
MODULES = {"ddp": simclr_ddp, "lightning": simclr}
OTHERS = {"supcon": supcon, "clip": clip}  # that take --devices
OPTIONS = ["--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--knn-every", "1"]


def few_digits() -> None:
    """500 of the digits are for testing. One draw a linear probe."""
    pixels, labels = (x[: IMAGES + 500] for x in sklearn.datasets.load_digits(return_X_y=True))
    sklearn.datasets.load_digits = lambda return_X_y: (pixels, labels)
    evaluate.linear_probe.__defaults__ = (None, 1)


def meet_once() -> None:
    """The process group is made once: the store of torchrun still holds what ranks of a group that
    was destroyed had told each other."""
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_, **__: None


class Seen:
    """What a rank saw of a run: the figures of each step and the sum of its views."""

    def __init__(self) -> None:
        self.figures: list[torch.Tensor] = []
        self.views: list[float] = []
        self.evaluations = 0

    def step(self, module, inputs, loss: torch.Tensor) -> None:
        self.figures.append(torch.stack([x.double() for x in (loss.detach(), *module.last)]))
        self.views.append(inputs[0].double().sum().item())


def main(folder: Path) -> None:
    few_digits()
    meet_once()
    torch.set_num_threads(1)
    results, features = {}, evaluate.features

    def run(name: str, out: str, *arguments: str) -> None:
        seen = Seen()

        def counted(*arguments, **options):
            seen.evaluations += 1
            return features(*arguments, **options)

        evaluate.features = counted
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (
                seen.step(module, inputs, output) if hasattr(module, "threshold") else None
            )
        )
        print(f"== {out}", flush=True)
        devices = ["--devices", "2"] if name != "ddp" else []
        try:
            status = (MODULES | OTHERS)[name].main([*arguments, *devices])
        except SystemExit as end:
            status = end.code
        hook.remove()
        results[out] = status, torch.stack(seen.figures), seen.views, seen.evaluations

    for name in MODULES:
        whole, parts, wild = (f"{name}-{what}" for what in ("whole", "parts", "wild"))
        run(name, whole, *OPTIONS, "--out", str(folder / whole))
        run(name, parts, *OPTIONS, "--out", str(folder / parts), "--stop-after", "1")
        torch.manual_seed(9)  # a new process would not have it either
        run(name, f"{parts}-resumed", "--resume", str(folder / parts))
        run(name, wild, *OPTIONS, "--lr", "1e9", "--out", str(folder / wild))
    for name in OTHERS:
        run(name, name, *OPTIONS, "--out", str(folder / name))
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
