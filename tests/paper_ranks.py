# SPDX-License-Identifier: MIT
"""What the tests of examples/paper start by torchrun: tiny runs that are stopped and resumed. All
are in the same processes, for imports take longer than the trainings.

    torchrun --nproc-per-node 2 tests/paper_ranks.py ROOT FOLDER RUN,DATA,BACKBONE ...

ROOT has the images. With a + before it, a run is trained once without a break too. The folders of
the runs are "FOLDER/RUN,DATA,BACKBONE parts" and "... whole". Of their checkpoints only digests are
kept, in FOLDER/RANK.pt with what else each rank saw, except those of the first run.
"""

import hashlib
import os
import sys
from pathlib import Path
from shutil import rmtree

import torch
from example_ranks import meet_once

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from common import training  # noqa: E402
from common.options import LAST  # noqa: E402
from paper import run  # noqa: E402


def arguments_of(root: Path, what: str, out: Path) -> list[str]:
    """The command line of a tiny run on the CPU."""
    name, data, backbone = what.split(",")
    file = run.of.FOLDER / f"{name}.yaml"
    options = ["--data", data, "--backbone", backbone, "--root", str(root), "--out", str(out)]
    return [str(file), *options, "--tiny", "--workers", "0", "--device", "cpu"]


def digest(folder: Path) -> str:
    """Of the bits of a run's weights and moments."""
    state = torch.load(folder / LAST, weights_only=True)
    whole = hashlib.sha256()
    (optimizer,) = state["optimizer_states"]
    moments = optimizer["state"].items()
    for name, x in [*state["state_dict"].items(), *((k, v["momentum_buffer"]) for k, v in moments)]:
        whole.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        whole.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def drop(folder: Path) -> None:
    """Removes a run's checkpoints, which are large."""
    (folder / LAST).unlink()
    for probe in folder.glob("probe-*"):
        rmtree(probe)


def main(root: Path, folder: Path, runs: list[str]) -> None:
    meet_once()
    torch.set_num_threads(1)
    leader = os.environ["RANK"] == "0"
    losses: dict[str, list[torch.Tensor]] = {}
    statuses, digests = [], {}
    step = training.Method.training_step

    def trained(what: str, part: str, *more: str) -> None:
        seen = losses.setdefault(f"{what} {part}", [])

        def watched(*arguments: object) -> torch.Tensor:
            seen.append((loss := step(*arguments)).detach().double())
            return loss

        training.Method.training_step = watched
        statuses.append(run.main([*arguments_of(root, what, folder / f"{what} {part}"), *more]))

    for marked in runs:
        what = marked.removeprefix("+")
        parts = ["whole"] if marked != what else []
        for part in parts:
            trained(what, part)
        trained(what, "parts", "--stop-after", "1")
        torch.manual_seed(9)  # a new process would not have it either
        trained(what, "parts", "--resume", str(folder / f"{what} parts"))
        for part in [*parts, "parts"] if leader else ():
            digests[f"{what} {part}"] = digest(folder / f"{what} {part}")
            if marked != runs[0]:
                drop(folder / f"{what} {part}")
    saw = {"statuses": statuses, "digests": digests}
    saw["losses"] = {name: torch.stack(values) for name, values in losses.items()}
    torch.save(saw, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
