# SPDX-License-Identifier: MIT
"""`gather_distributed`: two processes under DDP train as one on the whole batch.

The processes are real (gloo, on the CPU); each test compares parameters' gradients, which DDP has
averaged, with those of one process. NCCL is the same code and was not tried.
"""

import warnings
from collections.abc import Callable

import pytest
import ranks
import torch
from data import f64
from ranks import RANKS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker

LOCAL = 100  # of 200 images: 400 rows, which go by tiles
NEGATIVES = {"threshold": ThresholdTracker.adaptive(quantile=0.9, over="negatives")}


def images() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(RANKS * LOCAL) % 7
    x = torch.randn(7, 12, generator=generator, dtype=torch.float64)[labels]
    views = [x + torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2)]
    return *views, labels


CASES = {
    "ntxent": lambda z0, z1, labels: HEXLoss(gather_distributed=True)(z0, z1),
    "query": lambda z0, z1, labels: HEXLoss(mode="query", gather_distributed=True)(z0, z1),
    "cross": lambda z0, z1, labels: InfoNCELoss(mode="cross", gather_distributed=True)(z0, z1),
    "sum": lambda z0, z1, labels: HEXLoss(reduction="sum", gather_distributed=True)(z0, z1),
    "groups": lambda z0, z1, labels: HEXLoss(gather_distributed=True)(z0, z1, groups=labels),
    "guide": lambda z0, z1, labels: HEXLoss(**NEGATIVES, gather_distributed=True)(
        z0, z1, guide=(z0**3, z1**3)
    ),
    "labels": lambda z0, z1, labels: HEXSupConLoss(gather_distributed=True)(
        torch.stack((z0, z1), 1), labels
    ),
    "views": lambda z0, z1, labels: HEXSupConLoss(gather_distributed=True)(
        torch.stack((z0, z1, z0 + z1), 1), guide=torch.stack((z1, z0, z0), 1)
    ),
}


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def step(model: nn.Module, part: slice, case: str) -> list[Tensor]:
    x0, x1, labels = (x[part] for x in images())
    loss = CASES[case](*model(torch.cat((x0, x1))).chunk(2), labels)
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def training(part: slice, gather: bool, counter: Callable | None) -> list[Tensor]:
    """Of two steps under DDP, compiled by the counter if there is one."""
    model = nn.parallel.DistributedDataParallel(encoder())
    tracker = ThresholdTracker.adaptive(0.9, over="negatives", momentum=0.5)
    criterion = HEXLoss(threshold=tracker, gather_distributed=gather)
    x0, x1, _ = (x[part] for x in images())

    def step() -> Tensor:
        return criterion(*model(torch.cat((x0, x1))).chunk(2))

    run = torch.compile(step, backend=counter) if counter else step
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = run()
        loss.backward()
        results += [loss.detach(), criterion.last.eps]
        results += [p.grad.clone() for p in model.parameters()]
    return results


def steps(rank: int):
    warnings.simplefilter("error", FutureWarning)  # torch's, of a name that it will drop
    model = nn.parallel.DistributedDataParallel(encoder())
    part = slice(rank * LOCAL, (rank + 1) * LOCAL)
    results = {case: step(model, part, case) for case in CASES}
    for gather in (False, True):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = training(part, gather, counter)
        results["compiled", gather] = compiled, training(part, gather, None), counter.frame_count
    return results


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return ranks.run(steps, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_and_gradients_of_one(case, seen):
    whole = step(encoder(), slice(None), case)
    for got in (rank[case] for rank in seen):
        assert torch.equal(got[0], seen[0][case][0])  # and so the threshold, to the bit
        for ours, wanted in zip(got, whole, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gather", (False, True), ids=("local", "gathered"))
def test_a_compiled_step_is_the_plain_one(gather, seen):
    for compiled, plain, graphs in (rank["compiled", gather] for rank in seen):
        assert graphs > 0
        assert all(x.abs().max() > 0 for x in plain)
        for ours, wanted in zip(compiled, plain, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-13)


def test_alone_it_changes_nothing():
    z0, z1 = images()[:2]
    assert torch.equal(HEXLoss(gather_distributed=True)(z0, z1), HEXLoss()(z0, z1))
    assert "gather_distributed=True" in repr(InfoNCELoss(gather_distributed=True))
    assert "gather" not in repr(HEXLoss())


def test_a_mask_and_what_is_no_bool_are_refused():
    z0 = images()[0]
    with pytest.raises(ValueError, match="gather_distributed: got True with a mask"):
        HEXSupConLoss(gather_distributed=True)(z0, mask=f64(1).bool().expand(200, 200))
    with pytest.raises(TypeError, match="gather_distributed: got int, wanted a bool"):
        InfoNCELoss(gather_distributed=1)
