# SPDX-License-Identifier: MIT
"""The threshold of a batch and the range of each row, by the kernels.

    eps = mean over rows of c_i[k],  c_i ascending,  k = round half to even(quantile (n - 1))

Where the cosines are exact (rows of 1 and -1 in 64 places) they are compared with sorted rows bit
for bit, elsewhere with plain PyTorch. What is kept over training is in test_tracker.py.
"""

import math

import operators
import pytest
import torch
from conftest import DTYPES, Problem, assert_as_good_as_torch, problem
from data import KINDS, MODES, f64, leaves

from hex import batch_threshold, ops, reference
from hex.problem import of_views

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
OVER = ("all", "negatives")


def threshold(p: Problem, quantile: float, over: str = "all"):
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    return operators.threshold(z0, z1, negatives, mode, quantile, over == "negatives")


def row_range(p: Problem):
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    return operators.row_range(z0, z1, negatives, mode)


def exact(mode: str, B: int = 23, K: int = 37, dtype=torch.float32, flips: float = 0.3) -> Problem:
    """A batch whose cosines are multiples of 1/32, computed without rounding: with many ties."""
    generator = torch.Generator().manual_seed(B)

    def signs(*shape):
        return torch.where(torch.rand(*shape, 64, generator=generator) < flips, -1.0, 1.0).to(dtype)

    negatives = {"unpaired": (K,), "paired": (B, K)}.get(mode)
    return Problem((signs(B), signs(B), *([] if negatives is None else [signs(*negatives)])), mode)


def rows_of_cosines(p: Problem, over: str):
    """(N, n) in float64, one row of the table of modes each, the self cosine exactly 1."""
    c, _, negative = reference.cosines(*(*(z.double() for z in p.inputs), None)[:3], p.mode)
    return c if over == "all" else c[negative].reshape(c.shape[0], -1)


# ---- exactly ------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("mode", MODES)
def test_the_threshold_is_the_mean_of_the_elements_of_the_sorted_rows(mode, over):
    for dtype in DTYPES:
        for B in (3, 23):
            p = exact(mode, B, dtype=dtype)
            c = rows_of_cosines(p, over).sort(1).values
            for quantile in QUANTILES:
                k = round(quantile * (c.shape[1] - 1))
                # sums of multiples of 1/32 are exact; only the division by the rows rounds
                assert threshold(p, quantile, over).item() == c[:, k].sum().item() / len(c)


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_every_rank_of_a_row_can_be_taken(mode):
    """Of one anchor with 300 negatives: distinct cosines, ties, and all alike."""
    for flips in (0.5, 0.1, 0.0):
        p = exact(mode, 1, 300, flips=flips)
        for over in OVER:
            row = rows_of_cosines(p, over)[0].sort().values
            got = [threshold(p, k / (len(row) - 1), over).item() for k in range(len(row))]
            assert got == row.tolist()


def blocks_of_cosines(p: Problem, over: str):
    """The rows of `rows_of_cosines`, a side at a time, in float32: where cosines are exact. What is
    left out is infinite, so that it is behind every rank."""
    z0, z1, *negatives = (z / 8 for z in p.inputs)
    sides = [(z0, z1), (z1, z0)] if p.mode == "cross" else [(z0, z1)]
    if p.mode == "ntxent":
        sides = [(torch.cat([z0, z1]),) * 2]
    if p.mode == "unpaired":
        positive = (z0 * z1).sum(1, keepdim=True)
        yield torch.cat([positive, z0 @ negatives[0].T], 1)[:, over == "negatives" :]
        return
    for anchors, others in sides:
        c = anchors @ others.T
        if over == "negatives":
            c.fill_diagonal_(math.inf)
            if p.mode == "ntxent":
                for half in (c[: len(z0), len(z0) :], c[len(z0) :, : len(z0)]):
                    half.fill_diagonal_(math.inf)
        yield c


# whole lists; many ties; one row in ten, whose lists are too long; nothing but ties
LISTS = (
    ("negatives", 0.5, 0.99), ("all", 0.1, 0.9), ("all", 0.4, 0.99), ("negatives", 0.0, 0.99),
)  # fmt: skip


@pytest.mark.parametrize("mode, B, K, lists", [
    ("ntxent", 3100, 0, LISTS[:1]), ("ntxent", 3100, 0, LISTS[2:3]), ("query", 6150, 0, LISTS[1:2]),
    ("cross", 6150, 0, LISTS[:1]), ("unpaired", 50, 6200, LISTS),
], ids=str)  # fmt: skip
def test_rows_of_thousands_are_selected_from_exactly(mode, B, K, lists):
    """What is done with a row is the same in all modes, what is a row is not."""
    for over, flips, quantile in lists:
        p = exact(mode, B, K, flips=flips)
        if flips == 0.4:
            for z in p.inputs:
                z[::10] = z[0]
        total, rows = 0.0, 0
        for c in blocks_of_cosines(p, over):
            n = c.shape[1] - (over == "negatives") * {"ntxent": 2, "unpaired": 0}.get(mode, 1)
            k = round(quantile * (n - 1))
            total += c.kthvalue(k + 1).values.double().sum().item()
            rows += len(c)
        assert threshold(p, quantile, over).item() == total / rows, (over, flips)


def test_a_row_of_thousands_that_is_not_finite_is_nan():
    for bad in (math.nan, math.inf):
        p = exact("unpaired", 50, 6200)
        p.inputs[2][6199, 3] = bad
        assert threshold(p, 0.99).isnan()
        p = exact("unpaired", 50, 6200)
        p.inputs[1][49, 3] = bad
        assert threshold(p, 0.99, "negatives").isnan()


def test_a_rank_halfway_is_rounded_to_the_even_one():
    p = exact("paired", 1, 6)
    row = rows_of_cosines(p, "all")[0].sort().values  # 7 elements
    assert len(row.unique()) > 4
    for half, even in ((0.5, 0), (1.5, 2), (2.5, 2), (3.5, 4), (4.5, 4), (5.5, 6)):
        assert threshold(p, half / 6).item() == row[even].item()


def test_a_threshold_taken_as_eps_leaves_the_wanted_share_above():
    p = exact("paired", 1, 300, flips=0.5)
    eps = threshold(p, 0.75, "negatives")
    row = rows_of_cosines(p, "negatives")[0]
    count = operators.forward(*p.with_(eps=eps).raw())[1][ops.COUNT].item()
    assert count == (row > eps).sum().item()
    assert 0 < count <= 75


@pytest.mark.parametrize("mode", MODES)
def test_the_range_spans_the_whole_row(mode):
    for dtype in DTYPES:
        for B in (1, 23):
            p = exact(mode, B, dtype=dtype)
            c = rows_of_cosines(p, "all")
            low, high = row_range(p)
            assert low.dtype == high.dtype == p.dtype
            assert torch.equal(low.double(), c.amin(1))
            assert torch.equal(high.double(), c.amax(1))


def test_the_self_cosine_is_exactly_one_or_zero_for_a_row_of_zeros():
    for dtype in DTYPES:
        z0, z1 = problem("gauss", 20, 65, dtype=dtype).inputs
        assert threshold(Problem((z0, z1)), 1.0).item() == 1
        assert (row_range(Problem((z0, z1)))[1] == 1).all()
        z0 = z0.clone()
        z0[3] = 0
        high = row_range(Problem((z0, z1)))[1]
        assert high[3] == 0
        assert high[:3].eq(1).all()


# ---- against plain PyTorch ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_and_ranges_are_as_good_as_torch(kind, mode, dtype, device):
    """The sizes in turn."""
    turn = KINDS.index(kind) + MODES.index(mode) + DTYPES.index(dtype)
    B, D = ((2, 3), (13, 1), (33, 65))[turn % 3]
    p = problem(kind, B, D, mode, K=19, dtype=dtype, device=device)
    of = {t: (*(z.to(t) for z in p.inputs), None)[:3] for t in (p.dtype, torch.float64)}
    for over in OVER:
        for quantile in (0.0, 0.3, 0.9, 0.99):
            same, truth = (
                reference.threshold(*of[t], mode, quantile, over) for t in (p.dtype, torch.float64)
            )
            got = threshold(p, quantile, over)
            assert got.dtype == torch.float64
            assert got.shape == ()
            assert -1 <= got <= 1
            assert_as_good_as_torch(got, same, truth, tau=1.0, dtype=p.dtype, scale=1.0)
    same, truth = (reference.row_range(*of[t], mode) for t in (p.dtype, torch.float64))
    for got, a, b in zip(row_range(p), same, truth, strict=True):
        assert got.dtype == p.dtype
        assert got.abs().max() <= 1
        assert_as_good_as_torch(got, a, b, tau=1.0, dtype=p.dtype, scale=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_long_rows_are_selected_from_as_good_as_torch(mode, device):
    for kind in ("cluster", "near_collapsed", "collapsed"):
        p = problem(
            kind,
            9 if mode == "paired" else 299,
            17,
            mode,
            K=1030,
            dtype=torch.float32,
            device=device,
        )
        z = (*p.inputs, None)[:3]
        wide = (*(x.double() for x in p.inputs), None)[:3]
        for quantile, over in ((0.99, "all"), (0.5, "negatives")):
            same, truth = (reference.threshold(*x, mode, quantile, over) for x in (z, wide))
            got = threshold(p, quantile, over)
            assert_as_good_as_torch(got, same, truth, tau=1.0, dtype=p.dtype, scale=1.0)


@pytest.mark.parametrize("mode", MODES)
def test_every_layout_of_the_inputs_gives_the_same_bits(mode, device):
    for dtype in DTYPES:
        p = problem("cluster", 21, 9, mode, dtype=dtype, device=device)
        wanted = threshold(p, 0.8), *row_range(p)
        for layout in (
            lambda z: z.mT.contiguous().mT,
            lambda z: torch.stack([z, -z], -1).flatten(-2)[..., ::2],
            lambda z: torch._neg_view(-z),
        ):
            moved = p.with_(inputs=tuple(layout(z) for z in p.inputs))
            got = threshold(moved, 0.8), *row_range(moved)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# ---- special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_take_is_nan(mode):
    p = exact(mode, 3, 5)
    empty = p.with_(inputs=tuple(z[:0] for z in p.inputs))
    assert threshold(empty, 0.5).isnan()
    low, high = row_range(empty)
    assert low.shape == high.shape == (0,)
    if len(p.inputs) == 3:
        alone = p.with_(inputs=(*p.inputs[:2], p.inputs[2][..., :0, :]))
        positive = (p.inputs[0] * p.inputs[1]).sum(1).double() / 64
        assert threshold(alone, 0.5).item() == pytest.approx(positive.mean().item(), abs=1e-15)
        assert torch.equal(row_range(alone)[0].double(), positive)
    else:
        alone = p.with_(inputs=tuple(z[:1] for z in p.inputs))
        assert threshold(alone, 0.5).isfinite()
    assert threshold(alone, 0.5, "negatives").isnan()


@pytest.mark.parametrize("over", OVER)
def test_any_value_that_is_not_finite_is_nan(over):
    for mode in MODES:
        for k in range(len(exact(mode).inputs)):
            for bad in (math.nan, math.inf):
                p = exact(mode, 5, 7)
                inputs = [z.clone() for z in p.inputs]
                inputs[k][2, ..., 3] = bad
                assert threshold(p.with_(inputs=tuple(inputs)), 0.5, over).isnan(), (mode, k, bad)


def test_too_small_a_batch_takes_the_self_cosine_or_the_positive():
    """The 0.99 quantile of a row of n is its last element for n < 52 and the one before up to 150:
    where the positive is nearer than all negatives, those are the self cosine and the positive.
    """
    for rows, taken in ((50, -1), (52, -2), (150, -2), (152, -3)):
        z0, z1 = problem("clamped", rows // 2, 65).inputs
        c = reference.cosines(z0, z1, None, "ntxent")[0].sort(1).values
        wanted = c[:, taken].mean().item()
        assert batch_threshold(z0, z1, over="all").item() == pytest.approx(wanted, abs=1e-14)
        assert (wanted > 0.9) == (taken > -3)


def test_the_threshold_has_no_gradient_and_none_is_recorded():
    z0, z1 = leaves(*problem("cluster", 9, 5).inputs)
    assert not batch_threshold(z0, z1).requires_grad
    low, high = of_views(z0, z1, None, "ntxent", 0.1).row_range()
    assert not low.requires_grad
    assert not high.requires_grad


def test_the_function_passes_its_arguments_on():
    z0, z1, queue = problem("cluster", 20, 5, "unpaired", K=31).inputs
    own = queue.expand(20, 31, 5)
    for negatives, mode, name in (
        (None, "ntxent", "ntxent"),
        (None, "query", "query"),
        (None, "cross", "cross"),
        (queue, "ntxent", "unpaired"),
        (queue, "cross", "unpaired"),
        (own, "query", "paired"),
    ):
        for over in OVER:
            wanted = reference.threshold(z0, z1, negatives, name, 0.7, over)
            got = batch_threshold(z0, z1, negatives, mode=mode, quantile=0.7, over=over)
            assert got.item() == pytest.approx(wanted.item(), abs=1e-14)
    default = reference.threshold(z0, z1, None, "ntxent", 0.99, "negatives")
    assert batch_threshold(z0, z1).item() == pytest.approx(default.item(), abs=1e-14)
    assert f64(0).dtype == batch_threshold(z0.half(), z1.half()).dtype
