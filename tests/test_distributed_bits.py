# SPDX-License-Identifier: MIT
"""`gather_distributed`: what has the same bits on every rank, and for every cut of a batch.

Value, rows, eps, statistics, the tracker's state and the temperature's gradient are equal on all
ranks, also where the ranks have other instruction sets. On the CPU they do not depend either on how
many ranks there are and on how many of the images each has.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from gathered import (
    CALLS,
    CASES,
    TAU,
    Batch,
    Encoded,
    Encoder,
    adaptive,
    assert_equal,
    leaves,
    plain_pytorch,
    statistics,
    total,
)
from torch import Tensor, nn

from hex import HEXLoss, HEXSupConLoss, ThresholdTracker, ops

SHORT = {  # of one batch of 24 images
    2: ((12, 12), (23, 1)),
    3: ((8, 8, 8), (1, 13, 10)),
    4: ((6, 6, 6, 6), (5, 1, 11, 7)),
}
LONG = {  # of one of 206, which go by tiles
    2: ((103, 103),),
    3: ((1, 129, 76),),
    4: ((70, 41, 62, 33),),
}
UNEVEN = tuple(cuts[1] for cuts in SHORT.values())
WAYS = ((torch.float64, "mean"), (torch.float32, "none"), (torch.bfloat16, "mean"))
TRACKERS = {
    "momentum": lambda: adaptive(momentum=0.9),
    "monotonic": lambda: adaptive(monotonic=True),
    "lagged": lambda: adaptive(lagged=True, momentum=0.5),
    "warm-up": lambda: adaptive(warmup_epochs=1, warmup_threshold=0.7, momentum=0.5),
    "fixed": lambda: ThresholdTracker.fixed(0.4),
    "step": lambda: ThresholdTracker.step(0.9, 0.2, 1),
    "cosine by range": lambda: ThresholdTracker.cosine(0.9, 0.1, 3, normalize_rows=True),
    "none": lambda: None,
}
TRACKED = (
    *((tracker, "ntxent") for tracker in TRACKERS),
    *itertools.product(("momentum", "lagged"), ("queue", "labels")),
)


def of_case(loss, call: str, encoded: Encoded, rows) -> dict[str, Tensor]:
    """The loss and what is the same on all ranks."""
    encoded.tau.grad = None
    value = CALLS[call](loss, encoded, temperature=encoded.tau, **rows)
    total(value).backward()
    return {"value": value.detach(), **statistics(loss), "dtau": encoded.tau.grad}


def all_of(rank: int, cuts):
    found = {}
    for cut in cuts:
        batch = Batch(cut, shared=True)
        rows = batch.rows()
        for dtype, reduction in WAYS[:2] if sum(cut) > 24 else WAYS if cut in UNEVEN else WAYS[:1]:
            encoded = leaves(batch.part(rank), dtype)
            for name, case in CASES.items():
                loss = case.make(reduction=reduction, gather_distributed=True)
                found[cut, name, dtype] = of_case(loss, case.call, encoded, rows)
        if cut in UNEVEN[:2]:
            for tracker, name in TRACKED:
                found[cut, name, tracker] = trajectory(cut, rank, name, tracker)
        if cut == UNEVEN[1]:
            encoded = leaves(batch.part(rank), torch.float64)
            with plain_pytorch():
                for name, case in CASES.items():
                    loss = case.make(gather_distributed=True)
                    found[cut, name, "formulas"] = of_case(loss, case.call, encoded, rows)
    return found


def trajectory(cut, rank: int, name: str, tracker: str) -> dict[str, Tensor]:
    """Of five steps in two epochs; in one of them rank 0 has a NaN."""
    make = HEXSupConLoss if name == "labels" else HEXLoss
    loss = make(threshold=TRACKERS[tracker](), gather_distributed=True)
    found = {}
    for step in range(5):
        if step in (0, 2):
            loss.set_epoch(step // 2)
        batch = Batch(cut, seed=step, shared=True)
        encoded = leaves(batch.part(rank), torch.float64)
        if step == 3 and rank == 0:
            with torch.no_grad():
                encoded.z0[0, 0] = torch.nan
        of_step = of_case(loss, CASES[name].call, encoded, batch.rows())
        found |= {f"{what} {step}": value for what, value in of_step.items()}
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank found, of each number of ranks."""
    return {
        W: ranks.run(all_of, tmp_path_factory.mktemp("ranks"), SHORT[W] + LONG[W], ranks=W)
        for W in SHORT
    }


@pytest.mark.parametrize("case", CASES)
def test_every_rank_of_every_cut_has_the_same_bits(case, seen):
    first = {}
    for W, found in seen.items():
        for rank, of_rank in enumerate(found):
            for (cut, name, way), got in of_rank.items():
                if name == case:
                    # Plain PyTorch's bits depend on how many rows there are.
                    key = sum(cut), way, cut if way == "formulas" else None
                    assert_equal(got, first.setdefault(key, got), (W, rank, cut, way))
    assert {24, 206} == {images for images, *_ in first}


@pytest.mark.parametrize("tracker, name", TRACKED)
def test_the_threshold_over_training_is_that_of_one_process(tracker, name, seen):
    wanted = trajectory((24,), 0, name, tracker)
    got = seen[3][1][UNEVEN[1], name, tracker]
    assert wanted["value 3"].isnan() and wanted["value 4"].isfinite()
    assert got.keys() == wanted.keys()
    for key, truth in wanted.items():
        torch.testing.assert_close(got[key], truth, rtol=1e-11, atol=1e-13, equal_nan=True)


# ---- trained ------------------------------------------------------------------------------------


class Learner(nn.Module):
    """An encoder under DDP, and a temperature of the loss's own that DDP does not know."""

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.encode = nn.parallel.DistributedDataParallel(Encoder())
        self.tau = nn.Parameter(torch.tensor(TAU, dtype=torch.float64))
        self.loss = HEXLoss(
            self.tau, threshold=adaptive(momentum=momentum), gather_distributed=True
        )


def trained(rank: int, dtype: torch.dtype = torch.float32, steps: int = 10) -> list[Tensor]:
    """Temperature, value, eps and state of each step."""
    learner, found = Learner(), []
    optimizer = torch.optim.SGD(learner.parameters(), 0.01)
    for step in range(steps):
        e = Batch((21, 21), seed=step).part(rank).encoded(learner.encode, lambda z: z.to(dtype))
        value = learner.loss(e.z0, e.z1)
        optimizer.zero_grad()
        (value + 0 * e.tau).backward()
        optimizer.step()
        assert learner.tau.grad != 0
        numbers = value.detach(), learner.loss.last.eps, learner.tau.detach(), learner.tau.grad
        found.append(torch.stack([x.reshape(()).double() for x in numbers]))
        found.append(learner.loss.threshold.state.clone())
    return found


def test_a_temperature_that_ddp_does_not_know_stays_the_same_on_all_ranks(tmp_path):
    one, two = ranks.run(trained, tmp_path)
    assert one[-2][2] != TAU
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_ranks_with_other_instruction_sets_have_the_same_thresholds(tmp_path):
    """Each is a program of its own: the instruction set is chosen when hex is imported."""
    import test_isa  # every rank imports this file: not all of that

    levels = "base", "avx2" if ops.isa() == "base" else ops.isa()
    for level in levels:
        test_isa.skip_unless_available(level)
    folder = Path(__file__).parent
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HEX_ISA": level},
            cwd=folder, stderr=subprocess.PIPE, text=True,
        )
        for rank, level in enumerate(levels)
    ]  # fmt: skip
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert (one["isa"], two["isa"]) == levels
    for dtype in (torch.float64, torch.float32):
        for a, b in zip(one[dtype], two[dtype], strict=True):
            assert torch.equal(a, b)
    # The instruction sets do give other numbers: of the same rows, by each rank alone.
    assert any(not torch.equal(a, b) for a, b in zip(one["alone"], two["alone"], strict=True))


def alone(rank: int) -> list[Tensor]:
    z0, z1 = (x.float() for x in Batch((21,)).x)
    return [HEXLoss(threshold=adaptive(), reduction="none")(z0, z1)]


if __name__ == "__main__":
    this_rank, this_folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks.meet(this_rank, 2, this_folder)
    results = {"isa": ops.isa(), "alone": alone(this_rank)}
    for each in (torch.float64, torch.float32):
        results[each] = trained(this_rank, each)
    torch.save(results, this_folder / f"{this_rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
