# SPDX-License-Identifier: MIT
"""Two processes of torch.distributed (gloo, on the CPU), for tests of what ranks do together."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
# Processes are forked from one that has imported these, and nothing more.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "hex"])


def run(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What function(rank, *args) returns on each rank, tensors and numbers, in order."""
    torch.multiprocessing.start_processes(
        _one, (function, folder, args), nprocs=RANKS, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _one(rank: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        dist.barrier()  # neither leaves while the other still talks to it
    finally:
        dist.destroy_process_group()
