# SPDX-License-Identifier: MIT
"""Corners of `gather_distributed`: ranks with next to nothing, calls without data, graphs of
torch.compile's own backend, and ranks whose group has no backend for tensors of the host."""

from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hex import HEXLoss, HEXSupConLoss, ThresholdTracker, distributed, ops

F64, BF16 = torch.float64, torch.bfloat16


def over_negatives() -> ThresholdTracker:
    return ThresholdTracker.adaptive(0.9, over="negatives")


def rows(n: int, D: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- next to nothing ----------------------------------------------------------------------------

FEW = ((1, 0), (0, 1), (0, 0), (2, 1))


def few(rank: int, gathers: bool, images: tuple[int, int]) -> list[Tensor]:
    """Values and gradients of a view in bfloat16 with five features, beside one in float64; and of
    labelled rows: nothing is where a float64 or an int64 may be. And of views without features."""
    first = rank * images[0]
    own = slice(first, first + images[rank]) if gathers else slice(None)
    more = {"rows": images} if gathers else {}
    found = []
    z0, z1 = rows(sum(images), 5, 0, BF16), rows(sum(images), 5, 1)
    z0, z1 = (z[own].clone().requires_grad_() for z in (z0, z1))
    value = HEXLoss(threshold=0.1, gather_distributed=gathers)(z0, z1, **more)
    value.backward()
    found += [value, z0.grad.double(), z1.grad]
    nothing = HEXLoss(threshold=0.1, gather_distributed=gathers)(z0[:, :0], z1[:, :0], **more)
    nothing.backward()
    found.append(nothing)
    x = rows(sum(images), 5, 2, BF16)[own].clone().requires_grad_()
    labels = torch.zeros(len(x), dtype=torch.int64)
    value = HEXSupConLoss(threshold=0.1, gather_distributed=gathers)(x, labels, **more)
    value.backward()
    return [t.detach() for t in (*found, value, x.grad.double())]


def empty_queue(rank: int) -> tuple[Tensor, ...]:
    """Of rank 1; by the kernels and by the formulas."""
    z0, z1 = rows(3, 8, rank), rows(3, 8, 2 + rank)
    queue = rows(0 if rank else 7, 8, 4)
    found = []
    for kernels in (ops._KERNELS, set()):
        with mock.patch.object(ops, "_KERNELS", kernels):
            loss = HEXLoss(threshold=over_negatives(), gather_distributed=True)
            value = loss(z0.requires_grad_(), z1, queue)
            found += [value.detach(), loss.last.eps, loss.threshold.state.clone()]
    return tuple(found)


# ---- no data, no backend ------------------------------------------------------------------------


def without_data(rank: int) -> tuple[str, list[str]]:
    """The shape of a loss of fake tensors, and the operators in a graph of make_fx."""
    with FakeTensorMode():
        loss = HEXLoss(threshold=over_negatives(), gather_distributed=True, reduction="none")
        shape = tuple(loss(torch.empty(3, 5), torch.empty(3, 5)).shape)
    loss = HEXLoss(threshold=over_negatives(), gather_distributed=True)
    graph = make_fx(loss)(rows(3, 5, rank), rows(3, 5, rank))
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return str(shape), [name for name in names if name.startswith("hex.")]


def on_the_host(rank: int) -> tuple[list[str], int]:
    """What ranks say whose group is for GPUs alone, and how many groups were made for it."""
    gpu = torch.device("cuda")
    group = dist.new_group([0, 1])
    with (
        mock.patch.object(dist, "get_backend_config", lambda group=None: "cuda:nccl"),
        mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group,
    ):
        said = []
        for of in (None, group):
            for images in (3, 3, 3 + rank):
                facts = [images, 1, 2, 3, 4, 5]
                said.append(str(ranks.outcome(distributed.agree, gpu, facts, None, of, None)))
    return said, new_group.call_count


def compiled(rank: int) -> list[bool]:
    """Whether the numbers of two steps compiled by torch's own backend are those of plain ones."""
    steps = []
    for own in (False, True):
        loss = HEXLoss(threshold=over_negatives(), gather_distributed=True)
        run = torch.compile(loss, fullgraph=True) if own else loss
        for n in (6, 6):
            z0, z1 = (rows(n, 4, seed + rank).requires_grad_() for seed in (5, 7))
            value = run(z0, z1)
            value.backward()
            steps.append((value.detach(), z0.grad, z1.grad, loss.last.eps))
    half = len(steps) // 2
    plain, made = steps[:half], steps[half:]
    return [torch.equal(a, b) for p, m in zip(plain, made, strict=True)
            for a, b in zip(p, m, strict=True)]  # fmt: skip


def everything(rank: int):
    torch.manual_seed(0)
    return {
        "few": {images: few(rank, True, images) for images in FEW},
        "empty queue": empty_queue(rank),
        "without data": without_data(rank),
        "on the host": on_the_host(rank),
        "compiled": compiled(rank),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return ranks.run(everything, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("images", FEW, ids=str)
def test_a_rank_with_nothing_and_a_batch_of_one_are_like_one_process(images, seen):
    whole = few(0, False, images)
    for rank, found in enumerate(result["few"][images] for result in seen):
        first = rank * images[0]
        own = slice(first, first + images[rank])
        for k, (got, want) in enumerate(zip(found, whole, strict=True)):
            want = 2 * want[own] if want.dim() else want
            half = k in (1, 4)  # gradients that are rounded to bfloat16
            torch.testing.assert_close(got, want, rtol=1e-2 if half else 1e-6, atol=1e-6)


def test_a_rank_with_an_empty_queue_has_no_part_in_the_threshold(seen):
    for value, eps, state, *formulas in (result["empty queue"] for result in seen):
        assert value.isfinite() and eps.isfinite()
        assert all(map(torch.equal, (value, eps, state), seen[0]["empty queue"][:3]))
        torch.testing.assert_close((value, eps, state), tuple(formulas))
    alone = HEXLoss(threshold=over_negatives())
    alone(rows(3, 8, 0), rows(3, 8, 2), rows(7, 8, 4))
    assert abs(alone.last.eps - seen[0]["empty queue"][1]) < 1e-12


def test_without_data_a_gathering_loss_has_its_shape_and_its_graph(seen):
    for shape, operators in (result["without data"] for result in seen):
        assert shape == "(12,)"
        assert [name.partition(".default")[0] for name in operators] == [
            "hex.agree", "hex.gather", "hex.block_quantiles", "hex.gather", "hex.settle",
            "hex.block_forward", "hex.gather", "hex.total",
        ]  # fmt: skip


def test_compiled_by_torchs_own_backend_it_has_the_same_bits(seen):
    assert all(result["compiled"] == [True] * 8 for result in seen)


def test_ranks_of_a_group_for_gpus_compare_on_the_host(seen):
    for said, made in (result["on the host"] for result in seen):
        error = (
            "ValueError: gather_distributed: got 3 and 4 rows on ranks 0 and 1, wanted the same "
            "number: use drop_last=True in the loader, or pass rows="
        )
        assert said == ["None", "None", error] * 2
        assert made == 2  # one for each group, at the first comparison
