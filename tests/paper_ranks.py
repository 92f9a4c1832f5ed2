# SPDX-License-Identifier: MIT
"""What the tests of examples/paper start by torchrun: tiny runs, whole and in parts. All are in the
same processes, for imports take longer than the trainings.

    torchrun --nproc-per-node 2 tests/paper_ranks.py ROOT FOLDER RUN,DATA,BACKBONE ...

ROOT has the images. Each run's folder is "FOLDER/RUN,DATA,BACKBONE whole" or "... parts". What each
rank saw is in FOLDER/RANK.pt.
"""

import os
import sys
from pathlib import Path

import torch
from example_ranks import meet_once

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from common import training  # noqa: E402
from paper import run  # noqa: E402


def arguments_of(root: Path, what: str, out: Path) -> list[str]:
    """The command line of a tiny run on the CPU."""
    name, data, backbone = what.split(",")
    file = run.of.FOLDER / f"{name}.yaml"
    options = ["--data", data, "--backbone", backbone, "--root", str(root), "--out", str(out)]
    return [str(file), *options, "--tiny", "--workers", "0", "--device", "cpu"]


def main(root: Path, folder: Path, runs: list[str]) -> None:
    meet_once()
    torch.set_num_threads(1)
    seen: dict[str, list[torch.Tensor]] = {}
    status = {}

    step = training.Method.training_step

    def trained(what: str, part: str, *more: str) -> None:
        losses = seen.setdefault(f"{what} {part}", [])

        def watched(*arguments: object) -> torch.Tensor:
            losses.append((loss := step(*arguments)).detach().double())
            return loss

        training.Method.training_step = watched
        out = folder / f"{what} {part.partition('-')[0]}"
        status[f"{what} {part}"] = run.main([*arguments_of(root, what, out), *more])

    for what in runs:
        trained(what, "whole")
        trained(what, "parts", "--stop-after", "1")
        torch.manual_seed(9)  # a new process would not have it either
        trained(what, "parts-resumed", "--resume")
    losses = {name: torch.stack(values) for name, values in seen.items()}
    torch.save({"status": status, "losses": losses}, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
