# SPDX-License-Identifier: MIT
"""`gather_distributed` with candidates, which each rank has for itself: under DDP the loss is the
mean over the rows of all ranks, at a threshold that is measured on all of them.

One process has the same candidates for all rows. So one comparison is with it, where all ranks have
the same candidates; and one, where they have not, is with the rows of each rank by themselves, at
the threshold that all have together.
"""

import contextlib

import pytest
import ranks
import torch
from gathered import Batch, Encoder, Part, adaptive, plain_pytorch, statistics, total
from torch import Tensor, nn

from hex import HEXSupConLoss, ThresholdTracker, hex_sup_con

CUTS = {2: ((23, 23), (31, 9)), 3: ((1, 17, 20),)}
MOST = 23  # candidates of a rank: this many, and three fewer for each rank before it


def _by_range() -> ThresholdTracker:
    return ThresholdTracker.fixed(0.8, normalize_rows=True)


OPTIONS = {
    "adaptive": {"threshold": adaptive},
    "over all, inside": {"threshold": lambda: adaptive(0.8, over="all"), "positives": "inside"},
    "lagged": {"threshold": lambda: adaptive(lagged=True)},
    "at 0.3": {"threshold": lambda: 0.3},
    "by range": {"threshold": _by_range},
    "SupCon": {"threshold": lambda: None},
    "groups": {"threshold": adaptive},
    "guide": {"threshold": adaptive},
    "ignored": {"threshold": adaptive},
}
VIEWS = (1, 3)


def candidates(rank: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Of a rank, and their labels; or all have those of rank 0. Of 7 labels rank 1 lacks two."""
    rank = 0 if shared else rank
    generator = torch.Generator().manual_seed(100 + rank)
    number = MOST - 3 * rank
    x = torch.randn(number, 12, generator=generator, dtype=torch.float64)
    return x, torch.arange(number) % (7 if rank != 1 else 5)


def call(loss, model: nn.Module, name: str, part: Part, views: int, rank: int, shared: bool,
         rows: dict) -> Tensor:  # fmt: skip
    """The loss of a rank's rows; of three views with other views that follow from the two."""
    encoded = part.encoded(model)
    z = encoded.z0 if views == 1 else encoded.three_views()
    x, labels = candidates(rank, shared)
    (c, tau) = model(x)
    given = {}
    if name == "groups":
        given = {"groups": (encoded.labels % 2, labels % 2)}
    elif name == "guide":
        given = {"guide": (z.detach() ** 3, c.detach() ** 3)}
    elif name == "ignored":
        given = {"ignored": encoded.z0.detach() @ c.detach().T < 0}
    return loss(z, encoded.labels, candidates=c, candidate_labels=labels, temperature=tau,
                **given, **rows)  # fmt: skip


def step(
    model: nn.Module, name: str, part: Part, views: int, rank: int, rows: dict, **options
) -> dict[str, Tensor]:
    made = {k: v() if k == "threshold" else v for k, v in OPTIONS[name].items()}
    loss = HEXSupConLoss(**made, **options)
    model.zero_grad()
    value = call(loss, model, name, part, views, rank, True, rows)
    total(value).backward()
    grads = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}
    return {"value": value.detach(), **statistics(loss), **grads}


def ways(kernels=(True, False)):
    for name in OPTIONS:
        for views in VIEWS:
            for reduction in ("mean", "none"):
                for kernel in kernels:
                    yield name, views, reduction, kernel


def steps(rank: int, cuts):
    model = nn.parallel.DistributedDataParallel(Encoder())
    found = {}
    for cut in cuts:
        batch = Batch(cut)
        part, rows = batch.part(rank), batch.rows()
        for name, views, reduction, kernels in ways():
            with contextlib.nullcontext() if kernels else plain_pytorch():
                found[cut, name, views, reduction, kernels] = step(
                    model, name, part, views, rank, rows, reduction=reduction,
                    gather_distributed=True,
                )  # fmt: skip
        found[cut] = of_their_own(rank, model, part, rows)
    return found


def of_their_own(rank: int, model: nn.Module, part: Part, rows: dict) -> dict[str, Tensor]:
    """A step with candidates of the rank's own, and the rows at the threshold that it came to, by
    themselves."""
    loss = HEXSupConLoss(threshold=adaptive(), gather_distributed=True)
    model.zero_grad()
    value = call(loss, model, "", part, 1, rank, False, rows)
    value.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    alone = Encoder()
    eps = loss.last.eps

    def function(z, labels, **given):
        return hex_sup_con(z, labels, eps=eps, reduction="none", **given)

    own = call(function, alone, "", part, 1, rank, False, {})
    own.sum().backward()
    measured = HEXSupConLoss(threshold=adaptive())
    call(measured, alone, "", part, 1, rank, False, {})
    return {
        "value": value.detach(),
        "grads": grads,
        "eps": eps,
        "sum": own.detach().sum(),
        "rows": torch.tensor(len(own)),
        "grads of the sum": torch.cat([p.grad.flatten() for p in alone.parameters()]),
        "eps of its own": measured.last.eps,
    }


@pytest.fixture(scope="module", params=CUTS, ids="W{}".format)
def seen(request, tmp_path_factory):
    """The cuts, and what each rank found."""
    W = request.param
    return CUTS[W], ranks.run(steps, tmp_path_factory.mktemp("ranks"), CUTS[W], ranks=W)


@pytest.mark.parametrize("name", OPTIONS)
def test_with_the_same_candidates_on_all_ranks_it_is_the_loss_of_one_process(name, seen):
    cuts, found = seen
    for cut in cuts:
        for its, views, reduction, kernels in ways():
            if its != name:
                continue
            about = cut, name, views, reduction, kernels
            truth = step(Encoder(), name, Batch(cut).whole(), views, 0, {}, reduction=reduction)
            for of_rank in found:
                ours = of_rank[about]
                assert ours.keys() == truth.keys()
                for key, wanted in truth.items():
                    assert ours[key].shape == wanted.shape, (key, about)
                    if wanted.isnan().any():
                        assert key == "eps" and ours[key].isnan(), about
                        continue
                    error = torch.where(ours[key] == wanted, 0.0, (ours[key] - wanted).abs())
                    largest = wanted.abs()[wanted.isfinite()]
                    scale = largest.max() if largest.numel() else 0.0
                    assert error.max() <= 1e-11 * scale, (key, float(error.max()), about)


def test_with_candidates_of_their_own_it_is_the_mean_over_the_rows_of_all_ranks(seen):
    cuts, found = seen
    for cut in cuts:
        its = [of_rank[cut] for of_rank in found]
        rows = sum(x["rows"] for x in its)
        value = sum(x["sum"] for x in its) / rows
        grads = sum(x["grads of the sum"] for x in its) / rows
        eps = sum(x["eps of its own"] * x["rows"] for x in its) / rows
        assert len({float(x["eps of its own"]) for x in its}) == len(its)
        for x in its:
            torch.testing.assert_close(x["value"], value, rtol=1e-11, atol=0)
            torch.testing.assert_close(x["eps"], eps, rtol=1e-11, atol=0)
            torch.testing.assert_close(x["grads"], grads, rtol=0, atol=1e-11 * grads.abs().max())
        assert all(torch.equal(x["value"], its[0]["value"]) for x in its)


def compiled_steps(rank: int) -> list[Tensor]:
    """Of the eager module and of the compiled one: value, and gradient of the embeddings."""
    batch = Batch((9, 9))
    part = batch.part(rank)
    x, labels = candidates(rank, False)
    generator = torch.Generator().manual_seed(3)
    project = torch.randn(12, 10, generator=generator, dtype=torch.float64)
    loss = HEXSupConLoss(threshold=adaptive(), gather_distributed=True)
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        z, c = (t @ project for t in (part.inputs[0], x))
        z, c = z.requires_grad_(), c.requires_grad_()
        value = function(z, part.labels, candidates=c, candidate_labels=labels)
        found += [value.detach(), *torch.autograd.grad(value, (z, c))]
    return found


def test_it_compiles_as_one_graph(tmp_path):
    for found in ranks.run(compiled_steps, tmp_path):
        eager, graph = found[:3], found[3:]
        for a, b in zip(graph, eager, strict=True):
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
