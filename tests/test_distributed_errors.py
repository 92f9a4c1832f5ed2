# SPDX-License-Identifier: MIT
"""`gather_distributed`: how often the ranks talk to each other, and what is refused, and when.

What ranks bring is compared before anything is gathered, and refused on all of them alike, so that
none waits for one that has given up.
"""

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from gathered import CALLS, CASES, TAU, Batch, Encoded, adaptive, leaves, statistics
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss, InfoNCELoss

EVEN, UNEVEN, ONE = (20, 20), (22, 18), (1, 25)


class Collectives(TorchDispatchMode):
    """Notes the bytes that each collective gives a rank, and of those of int64 that they are."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []  # the exchange of a few int64, by which ranks compare
        self.data: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            out = args[0]
            assert isinstance(out, Tensor) and "allgather" in func.__name__, func
            to = self.sizes if out.dtype == torch.int64 else self.data
            to.append(out.numel() * out.element_size())
        return func(*args, **(kwargs or {}))


def good(loss, e: Encoded, **options: Any) -> Tensor:
    return loss(e.z0, e.z1, **options)


# ---- counted ------------------------------------------------------------------------------------


def counted(rank: int) -> dict[str, list[Any]]:
    """Of each case the collectives of a forward and of a backward, with the check and without."""
    found = {}
    for cut in (EVEN, UNEVEN):
        batch = Batch(cut)
        e, rows = leaves(batch.part(rank), torch.float32), batch.rows()
        for name, case in CASES.items():
            for checks in (True, False):
                loss = case.make(gather_distributed=True, check_sizes=checks)
                with Collectives() as forward:
                    value = CALLS[case.call](loss, e, temperature=e.tau, **rows)
                with Collectives() as backward:
                    value.backward()
                found[cut, name, checks] = [
                    forward.sizes, forward.data, backward.sizes + backward.data, value.detach(),
                ]  # fmt: skip
    return found


# ---- refused ------------------------------------------------------------------------------------


def first(e: Encoded, images: int) -> Encoded:
    return Encoded(*(x[:images] if x.dim() else x for x in e))


def hex_loss(**options: Any) -> HEXLoss:
    return HEXLoss(threshold=adaptive(), gather_distributed=True, **options)


SAME = ", wanted the same number: use drop_last=True in the loader, or pass rows="
SIZES = "ValueError: gather_distributed: got 22 and 18 rows on ranks 0 and 1" + SAME
DIFFERENT = "ValueError: gather_distributed: got different "
ROWS = "ValueError: rows: got "


def of_state(rank: int, e: Encoded) -> Tensor:
    loss = hex_loss()
    loss.threshold.update(torch.tensor(0.5 + 0.1 * rank), store=True)
    return good(loss, first(e, 18))


def wrong_dtype(rank: int, e: Encoded) -> Tensor:
    z0, z1, *_ = first(e, 18)
    return hex_loss()(*((z0, z1) if rank else (z0.double(), z1.double())))


def some_rows(rank: int, e: Encoded) -> Tensor:
    return good(hex_loss(), e, **({} if rank else {"rows": UNEVEN}))


COMPARED = {
    "sizes": (lambda rank, e: good(hex_loss(), e), SIZES),
    "sizes of a query": (lambda rank, e: good(hex_loss(mode="query"), e), SIZES),
    "sizes of labels": (
        lambda rank, e: HEXSupConLoss(gather_distributed=True)(e.z0, e.labels), SIZES
    ),
    "sizes of a queue": (lambda rank, e: hex_loss()(e.z0, e.z1, e.queue), SIZES),
    "sizes of logits": (
        lambda rank, e: HEXCrossEntropyLoss(TAU, gather_distributed=True)(
            e.logits, torch.zeros_like(e.labels)
        ),
        SIZES,
    ),
    "sizes at a number": (
        lambda rank, e: good(HEXLoss(threshold=0.3, gather_distributed=True), e), SIZES
    ),
    "features": (
        lambda rank, e: good(hex_loss(), Encoded(*(x[:18, : 7 + rank] for x in e[:2]), *e[2:])),
        DIFFERENT + "dtypes or shapes",
    ),
    "dtypes": (wrong_dtype, DIFFERENT + "dtypes or shapes"),
    "dtypes of queues": (
        lambda rank, e: hex_loss()(
            *first(e, 18)[:2], e.queue.float() if rank else e.queue.double()
        ),
        DIFFERENT + "dtypes or shapes",
    ),
    "a guide on one": (
        lambda rank, e: good(
            hex_loss(), first(e, 18), guide=first(e, 18).guide() if rank else None
        ),
        DIFFERENT + "dtypes or shapes",
    ),
    "modes": (
        lambda rank, e: good(hex_loss(mode=("query", "cross")[rank]), first(e, 18)),
        DIFFERENT + "options",
    ),
    "denominators": (
        lambda rank, e: good(hex_loss(decoupled=bool(rank)), first(e, 18)),
        DIFFERENT + "options",
    ),
    "thresholds": (
        lambda rank, e: good(
            HEXLoss(threshold=(0.3, 0.4)[rank], gather_distributed=True), first(e, 18)
        ),
        DIFFERENT + "options",
    ),
    "losses": (
        lambda rank, e: good(
            (hex_loss() if rank else InfoNCELoss(gather_distributed=True)), first(e, 18)
        ),
        DIFFERENT + "options",
    ),
    "temperatures": (
        lambda rank, e: good(hex_loss(), first(e, 18), temperature=torch.tensor(0.1 + 0.1 * rank)),
        "ValueError: temperature: got values from 0.1 to 0.2, wanted the same on all ranks",
    ),
    "training": (
        lambda rank, e: good(hex_loss().train(bool(rank)), first(e, 18)), DIFFERENT + "options"
    ),
    "gradients": (
        lambda rank, e: hex_loss()(
            *(z.detach().requires_grad_(bool(rank)) for z in first(e, 18)[:2])
        ),
        DIFFERENT + "options",
    ),
    "states": (of_state, DIFFERENT + "thresholds"),
    "rows of the ranks": (
        lambda rank, e: good(hex_loss(), e, rows=(22, 18 + (not rank))), ROWS + "different"
    ),
    "rows on one": (some_rows, ROWS + "different"),
}  # fmt: skip


def d_tensor(rank: int, e: Encoded) -> Tensor:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    z0 = DTensor.from_local(e.z0.detach()[:18], mesh, [Replicate()])
    return hex_loss()(z0, e.z1[:18])


def twice(rank: int, e: Encoded) -> Tensor:
    e = first(e, 18)
    (dz,) = torch.autograd.grad(good(hex_loss(), e), e.z0, create_graph=True)
    return torch.autograd.grad(dz.square().sum(), e.z0)[0]


def forward_mode(rank: int, e: Encoded) -> Tensor:
    z0 = first(e, 18).z0.detach()
    with forward_ad.dual_level():
        return hex_loss()(forward_ad.make_dual(z0, torch.ones_like(z0)), z0)


def under_func(transform: Callable[..., Any], of: Callable[[Encoded], Tensor]):
    def call(rank: int, e: Encoded) -> Tensor:
        e = first(e, 18)
        return transform(lambda z0: good(hex_loss(), e._replace(z0=z0)))(of(e))

    return call


OWN = {
    "rows of another type": (
        lambda rank, e: good(hex_loss(), e, rows=22), "TypeError: rows: got 22, wanted a tuple of i"
    ),
    "rows that are no integers": (
        lambda rank, e: good(hex_loss(), e, rows=(22.0, 18.0)), "TypeError: rows: got (22.0, 18.0)"
    ),
    "rows of three ranks": (
        lambda rank, e: good(hex_loss(), e, rows=(22, 18, 3)), "ValueError: rows: got (22, 18, 3), "
    ),
    "rows that neither has": (
        lambda rank, e: good(hex_loss(), e, rows=(18, 22)), "ValueError: rows: got "
    ),
    "rows without gathering": (
        lambda rank, e: good(HEXLoss(), e, rows=UNEVEN), "ValueError: rows: got "
    ),
    "a group without gathering": (
        lambda rank, e: InfoNCELoss(process_group=dist.group.WORLD), "ValueError: process_group: "
    ),
    "a DTensor": (
        d_tensor, "TypeError: z0: got a DTensor, wanted a plain tensor; call .to_local()"
    ),
    "torch.func.grad": (
        under_func(torch.func.grad, lambda e: e.z0.detach()),
        "NotImplementedError: gather_distributed: ",
    ),
    "vmap": (
        under_func(torch.func.vmap, lambda e: e.z0.detach()[None]),
        "NotImplementedError: gather_distributed: ",
    ),
    "a second derivative": (twice, "RuntimeError: "),
    "a forward-mode derivative": (
        forward_mode, "NotImplementedError: hex-ssl: a loss has no forward-mode derivative"
    ),
}  # fmt: skip


def refused(rank: int) -> dict[str, Any]:
    found = {}
    e = leaves(Batch(UNEVEN).part(rank), torch.float32)
    for name, (call, _) in (OWN | COMPARED).items():
        with Collectives() as seen:
            found[name] = ranks.outcome(call, rank, e), seen.data, seen.sizes
    return found


WITH_NAN = ("ntxent", "cross", "query", "queue", "labels")


def nan_on_one(rank: int) -> dict[str, dict[str, Tensor]]:
    """After a good step, one with a NaN in one row of rank 1; and a good one."""
    found = {}
    for name in WITH_NAN:
        loss = CASES[name].make(gather_distributed=True)
        for step in range(3):
            e = leaves(Batch(EVEN, seed=step).part(rank), torch.float32)
            if step == 1 and rank == 1:
                with torch.no_grad():
                    e.z0[3, 2] = torch.nan
            value = CALLS[CASES[name].call](loss, e)
            value.backward()
            found[name, step] = {"value": value.detach(), **statistics(loss)}
            found[name, step]["skipped"] = loss.threshold.skipped
            found[name, step]["threshold"] = loss.threshold.value
    return found


def at_last(rank: int) -> Tensor:
    """The group still works."""
    batch = Batch(ONE)
    return good(hex_loss(), leaves(batch.part(rank), torch.float64), **batch.rows()).detach()


def everything(rank: int):
    every = counted, nan_on_one, refused, at_last
    return {function.__name__: function(rank) for function in every}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return ranks.run(everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_so_many_collectives_in_the_forward_and_none_in_the_backward(case, seen):
    for rank in seen:
        for cut in (EVEN, UNEVEN):
            checked, unchecked = (rank["counted"][cut, case, checks] for checks in (True, False))
            assert [len(x) for x in checked[:3]] == [1, CASES[case].gathered, 0]
            assert [len(x) for x in unchecked[:3]] == [0, CASES[case].gathered, 0]
            assert checked[0][0] <= 2 * 8 * 8
            assert torch.equal(checked[3], unchecked[3])


@pytest.mark.parametrize("case, views", [("ntxent", 2), ("cross", 2), ("query", 1)])
def test_the_bytes_that_are_gathered_are_those_of_the_rows_and_44_a_row(case, views, seen):
    images, D = sum(EVEN), 12
    for rank in seen:
        _, data, *_ = rank["counted"][EVEN, case, True]
        N = views * images
        assert data == [2 * images * D * 4, N * 4, N * 40]


@pytest.mark.parametrize("name", COMPARED)
def test_what_does_not_fit_is_an_error_on_all_ranks_before_anything_is_gathered(name, seen):
    for rank in seen:
        raised, data, sizes = rank["refused"][name]
        assert str(raised).startswith(COMPARED[name][1])
        assert data == [] and len(sizes) == 1


def test_the_error_of_uneven_ranks_says_what_to_do(seen):
    for rank in seen:
        assert rank["refused"]["sizes"][0] == (
            "ValueError: gather_distributed: got 22 and 18 rows on ranks 0 and 1, wanted the same "
            "number: use drop_last=True in the loader, or pass rows="
        )


@pytest.mark.parametrize("name", OWN)
def test_what_cannot_be_gathered_is_refused_by_name(name, seen):
    for rank in seen:
        raised = rank["refused"][name][0]
        assert str(raised).startswith(OWN[name][1])
    if name == "a second derivative":
        assert "second derivative" in raised


@pytest.mark.parametrize("name", WITH_NAN)
def test_a_nan_on_one_rank_is_one_on_all_and_moves_no_threshold(name, seen):
    steps = [[rank["nan_on_one"][name, step] for rank in seen] for step in range(3)]
    for before, with_nan, after in zip(*steps, strict=True):
        assert before["value"].isfinite() and after["value"].isfinite()
        assert with_nan["value"].isnan()
        assert with_nan["threshold"] == before["threshold"] != after["threshold"]
        assert [int(x["skipped"]) for x in (before, with_nan, after)] == [0, 1, 1]


def test_after_every_error_the_group_still_works(seen):
    wanted = good(HEXLoss(threshold=adaptive()), leaves(Batch(ONE).whole(), torch.float64))
    for rank in seen:
        torch.testing.assert_close(rank["at_last"], wanted.detach(), rtol=1e-11, atol=0)


def rows_of_one(rank: int) -> tuple[str, Tensor]:
    """As where a loader does not drop the last batch, which is short on rank 1."""
    e = leaves(Batch(UNEVEN).part(rank), torch.float64)
    return ranks.outcome(lambda: good(hex_loss(), e, rows=(22, 22))), at_last(rank)


def test_rows_that_one_rank_has_not_are_an_error_on_all(tmp_path):
    one, two = ranks.run(rows_of_one, tmp_path)
    assert str(one[0]).startswith(ROWS) and str(two[0]).startswith(ROWS)
    assert torch.equal(one[1], two[1])


def test_a_mask_and_what_is_no_bool_are_refused():
    z0, mask = torch.randn(20, 6), torch.ones(20, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match="gather_distributed: got True with a mask"):
        HEXSupConLoss(gather_distributed=True)(z0, mask=mask)
    for make in (HEXLoss, InfoNCELoss, HEXSupConLoss, HEXCrossEntropyLoss):
        options = {"temperature": 0.1}
        with pytest.raises(TypeError, match="gather_distributed: got int, wanted a bool"):
            make(gather_distributed=1, **options)
        with pytest.raises(TypeError, match="check_sizes: got int, wanted a bool"):
            make(gather_distributed=True, check_sizes=0, **options)


def test_the_repr_says_that_it_gathers():
    for make in (HEXLoss, InfoNCELoss, HEXSupConLoss, HEXCrossEntropyLoss):
        assert "gather_distributed=True" in repr(make(0.1, gather_distributed=True))
        assert "gather" not in repr(make(0.1))
