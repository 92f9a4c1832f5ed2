# SPDX-License-Identifier: MIT
"""Two processes of torch.distributed (gloo, on the CPU), for tests of what ranks do together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def run(function: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What function(rank, *args) returns on each rank, tensors and numbers, in order."""
    torch.multiprocessing.spawn(_one, (function, folder, args), nprocs=RANKS)
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
