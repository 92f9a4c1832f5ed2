# SPDX-License-Identifier: MIT
"""Processes of torch.distributed (gloo, on the CPU), for tests of what ranks do together."""

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
# Processes are forked from one that has imported these, and nothing more.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch.nn.parallel", "hex"])
# A rank that waits for another in vain ends with an error, so that a test that hangs says where.
PATIENCE = datetime.timedelta(seconds=90)


def run(function: Callable[..., Any], folder: Path, *args: Any, ranks: int = RANKS) -> list[Any]:
    """What function(rank, *args) returns on each rank, tensors and numbers, in order."""
    torch.multiprocessing.start_processes(
        _one, (ranks, function, folder, args), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _one(
    rank: int, ranks: int, function: Callable[..., Any], folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    meet(rank, ranks, folder)
    try:
        torch.save(function(rank, *args), folder / f"{rank}.pt")
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def meet(rank: int, ranks: int, folder: Path) -> None:
    """Makes this process a rank of so many."""
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=PATIENCE
    )


def outcome(function: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or as text what it raises, so that the rank goes on."""
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
