# SPDX-License-Identifier: MIT
"""A block of anchors, rows [first, first + count) of a batch: its operators give for it what those
of the whole batch give for these rows. And the sums over the rows of all blocks."""

import math

import data
import labelled_problems
import operators
import pytest
import torch
from conftest import problem
from operators import KEEP

from hex import ops
from hex import state as states

HEX = torch.ops.hex
CUTS = ((0, 7, 13), (0, 1, 1, 13), (0, 13))  # blocks begin and end there; one is empty
STEP = (0.0, False, False, 0, math.inf)  # a tracker's rule, without memory
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def cases():
    """Name, arguments of forward: small problems, which go by blocks of rows as a whole, too."""
    for mode in ("ntxent", "query", "cross", "unpaired", "paired"):
        for dtype in (F64, F32, BF16):
            p = problem("cluster", 13, 7, mode, dtype=dtype, seed=3)
            yield f"{mode} {dtype}", operators.arguments("forward", *p.raw())
    for source in ("cosines", "groups", "guide"):
        for pairing in ("self", "pair", "queue"):
            p = labelled_problems.labelled(13, 7, pairing, source, M=13, labels=3, dtype=F32)
            yield str(p), p.forward()[1]
    p = labelled_problems.labelled(13, 7, masked=True, positives="inside")
    yield f"{p} mask", p.forward()[1]
    for pairing in (*data.MODES, "queue"):
        p = labelled_problems.coded(pairing, 13, 7, dtype=F32)
        yield str(p), p.forward()[1]
    yield "logits", labelled_problems.logits(13, 9).forward()[1]


CASES = dict(cases())
every = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES.keys())


def anchors_of(arguments, first, count):
    """The block's places among all anchors."""
    z0, z1, mode = *arguments[:2], arguments[9]
    rows = torch.arange(first, first + count)
    if mode in (ops.MODES["ntxent"], ops.MODES["cross"]) and z1.shape[0]:
        return torch.cat([rows, z0.shape[0] + rows])
    return rows


def backward_of(arguments, grad, stats, kept):
    *inputs, _, tau, mode, reduction, positives, beta, _, _, _, _, _ = arguments
    return grad, *inputs, tau, stats, kept, mode, reduction, positives, beta, False, 15


def forward_of(arguments, kept, keep=0):
    *inputs, eps, tau, mode, reduction, positives, beta, variant, tau_plus, decoupled, _, _ = (
        arguments
    )
    rule = mode, reduction, positives, beta, variant, tau_plus, decoupled
    return *inputs, eps, tau, kept, *rule, keep, False


def quantile_of(arguments, over_negatives, bounds):
    *inputs, _, tau, mode, _, positives, _, _, _, _, _, _ = arguments
    logits = mode == ops.MODES["logits"]
    return *inputs[:5], tau, mode, positives > 0, False, logits, 0.9, over_negatives, bounds


def kept_of(arguments, block, most=KEEP):
    """The cosines of a block that its quantiles leave; None where its rows are not among those of
    the whole, as of a guide's threshold."""
    return HEX.block_quantiles(*quantile_of(arguments, True, False), most, **block)[2]


def blocks(cut):
    return [(a, b - a) for a, b in zip(cut, cut[1:], strict=False)]


@every
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_rows_of_a_block_are_those_of_the_whole(arguments, cut):
    loss, stats, kept = HEX.forward(*arguments)
    grad = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss)
    whole = HEX.backward(*backward_of(arguments, grad, stats, kept))
    parts = []
    for first, count in blocks(cut):
        block = dict(first=first, count=count)
        at = anchors_of(arguments, first, count)
        none, its_cosines = stats.new_empty(0), kept_of(arguments, block)
        for given, keep in ((none, 0), (none, KEEP), (its_cosines, KEEP)):
            own, its, new = HEX.block_forward(*forward_of(arguments, given, keep), **block)
            assert torch.equal(own, loss[at])
            assert torch.equal(its.nan_to_num(7), stats[:, at].nan_to_num(7))
            if keep and given is none:
                of_forward = new
            else:
                assert new.numel() == 0
        part, *others = (  # there is room between the rows that are kept, with any numbers in it
            HEX.backward(*backward_of(arguments, grad, stats, kept), **block)
            for kept in (its_cosines, of_forward, none)
        )
        assert of_forward.shape == its_cosines.shape
        assert all(all(map(torch.equal, part, other)) for other in others)
        parts.append(part)
    for k, gradient in enumerate(whole[:3]):
        of_rows = k < 2 or gradient.dim() == 3
        got = [part[k] for part in parts]
        assert torch.equal(torch.cat(got) if of_rows else got[0], gradient)
    assert all(torch.equal(part[3], whole[3]) for part in parts)  # of all anchors, in every block


@every
def test_the_quantiles_of_a_block_are_those_of_its_rows(arguments):
    _, low, high = HEX.quantile(*quantile_of(arguments, False, True))
    for over_negatives in (False, True):
        mean, _, _ = HEX.quantile(*quantile_of(arguments, over_negatives, False))
        quantiles = torch.full_like(low, 7)
        for first, count in ((0, 7), (7, 0), (7, 6)):
            at = anchors_of(arguments, first, count)
            block = dict(first=first, count=count)
            *bounds, none = HEX.block_quantiles(*quantile_of(arguments, False, True), 0, **block)
            assert torch.equal(torch.stack(bounds), torch.stack([low[at], high[at]]))
            quantiles[at], high_of, kept = HEX.block_quantiles(
                *quantile_of(arguments, over_negatives, False), KEEP, **block
            )
            assert not none.numel() and not high_of.numel()
        eps, state = HEX.settle(quantiles, torch.zeros(11, dtype=F64), *STEP)
        assert eps == mean == state[states.CANDIDATE]  # the same sum


@pytest.mark.parametrize("mode", ["ntxent", "query", "cross", "unpaired"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_block_of_a_batch_that_goes_by_tiles(mode, dtype):
    """Its cosines and sums are made in another order there; the bits are equal among all cuts."""
    p = problem("cluster", 211, 9, mode, K=230, dtype=dtype)
    arguments = operators.arguments("forward", *p.raw())
    loss, stats, kept = HEX.forward(*arguments)
    grad = torch.ones_like(loss)
    whole = HEX.backward(*backward_of(arguments, grad, stats, kept))
    row_bits, gradient_bits = [], []
    for cut in ((0, 100, 211), (0, 3, 190, 211)):
        rows, gradients = torch.empty_like(loss), []
        for first, count in blocks(cut):
            block = dict(first=first, count=count)
            kept = stats.new_empty(0) if first == 3 else kept_of(arguments, block)
            own, _, _ = HEX.block_forward(*forward_of(arguments, kept), **block)
            rows[anchors_of(arguments, first, count)] = own
            gradients.append(HEX.backward(*backward_of(arguments, grad, stats, kept), **block))
        row_bits.append(rows)
        gradient_bits.append(torch.cat([g[0] for g in gradients]))
    assert torch.equal(*row_bits) and torch.equal(*gradient_bits)
    # Of a sum of some 400 terms of one sign, or of both in a gradient, each rounded a few times.
    unit = 400 * torch.finfo(dtype).eps / p.tau
    assert (row_bits[0] - loss).abs().max() < unit * loss.abs().max()
    assert (gradient_bits[0] - whole[0]).abs().max() < unit * whole[0].abs().max()


FAKES = "test_schema", "test_faketensor"  # the whole batch has the others, in the same graph


@every
def test_shapes_without_data(arguments):
    loss, stats, _ = HEX.forward(*arguments)
    for first, count in ((4, 8), (0, 13), (13, 0)):
        block = dict(first=first, count=count)
        kept = kept_of(arguments, block)
        for operator, given in (
            (HEX.block_quantiles, (*quantile_of(arguments, False, True), 0)),
            (HEX.block_quantiles, (*quantile_of(arguments, True, False), KEEP)),
            (HEX.block_forward, forward_of(arguments, kept, KEEP)),
            (HEX.block_forward, forward_of(arguments, kept[:0], KEEP)),
            (HEX.backward, backward_of(arguments, torch.ones_like(loss), stats, kept)),
        ):
            torch.library.opcheck(operator, given, block, test_utils=FAKES)


def test_cosines_that_are_too_many_are_not_kept():
    """Of more bytes than `keep` there are two numbers, and the operators compute again."""
    p = problem("cluster", 1500, 5, "ntxent", dtype=F32)
    arguments = operators.arguments("forward", *p.raw())
    block = dict(first=0, count=1000)
    none = torch.empty(0)
    computed, stats, _ = HEX.block_forward(*forward_of(arguments, none), **block)
    room = (2000 + 12) * (3008 + 16)  # whole register tiles and cache lines
    for most, numbers in ((4 * room - 1, 2), (4 * room, room)):
        kept = kept_of(arguments, block, most)
        assert kept.numel() == numbers
        taken, _, new = HEX.block_forward(*forward_of(arguments, kept, most), **block)
        assert torch.equal(computed, taken) and new.numel() == 0
        new = HEX.block_forward(*forward_of(arguments, none, most), **block)[2]
        assert new.numel() == numbers
        taken, *_ = HEX.block_forward(*forward_of(arguments, kept.fill_(0.5)), **block)
        assert torch.equal(computed, taken) == (numbers == 2)
    loss, stats, _ = HEX.forward(*arguments)
    gradients = (
        HEX.backward(*backward_of(arguments, torch.ones_like(loss), stats, kept), **block)
        for kept in (none, torch.full((2,), 7.0))
    )
    assert all(map(torch.equal, *gradients))


def test_sums_are_those_of_python_in_the_order_of_the_rows():
    x = torch.randn(3, 1001, dtype=F64, generator=torch.Generator().manual_seed(2))
    for rows in (x, x.T.contiguous().T, x[:, ::7], x.float(), x[:0], x[:, :0]):
        want = []
        for row in rows.tolist():
            total = 0.0
            for number in row:
                total += number
            want.append(total)
        got = HEX.total(rows)
        assert got.dtype == F64 and got.tolist() == want
        torch.library.opcheck(HEX.total, (rows,), test_utils=FAKES)


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("rows", [[0.5, 0.25], [0.5, math.inf, 0.75], [0.5, math.nan], [math.inf]])
def test_settle_is_a_step_of_the_tracker(rows, lagged):
    state = torch.zeros(11, dtype=F64)
    rule = (0.9, True, lagged, 0, math.inf)
    for dtype in (F32, F64):
        q = torch.tensor(rows, dtype=dtype)
        there = [x for x in rows if x != math.inf]
        mean = torch.tensor(sum(there) / len(there) if there else math.nan, dtype=F64)
        eps, new = HEX.settle(q, state, *rule)
        wanted, theirs = states.step(state, mean, len(rows), *rule)
        assert torch.equal(eps, wanted) and torch.equal(new, theirs)
        torch.library.opcheck(HEX.settle, (q, state, *rule), test_utils=FAKES)
        state = new


def test_the_block_of_a_compiled_graph_may_have_any_size():
    p = problem("cluster", 13, 7)
    z0, z1, *rest = operators.arguments("forward", *p.raw())
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def rows_of(z0, z1, own):
        count = own.shape[0]
        block = dict(first=z0.shape[0] - count, count=count)
        kept = kept_of((z0, z1, *rest), block)
        return HEX.block_forward(*forward_of((z0, z1, *rest), kept), **block)[0]

    loss, _, _ = HEX.forward(z0, z1, *rest)
    for count in (4, 6):
        at = anchors_of((z0, z1, *rest), 13 - count, count)
        assert torch.equal(rows_of(z0, z1, z0[:count]), loss[at])


@pytest.mark.parametrize(
    "block, error",
    [
        ((-1, 3), "first, count: expected a block of 13 rows, got -1, 3"),
        ((14, 0), "first, count: expected a block of 13 rows, got 14, 0"),
        ((0, 14), "first, count: expected a block of 13 rows, got 0, 14"),
        ((9, 5), "first, count: expected a block of 13 rows, got 9, 5"),
        ((0, -2), "first, count: expected a block of 13 rows, got 0, -2"),
        ((2**62, 2**62), "first, count: expected a block of 13 rows"),
    ],
    ids=str,
)
def test_a_block_outside_the_batch_is_refused(block, error):
    arguments = CASES["ntxent torch.float32"]
    _, stats, kept = HEX.forward(*arguments)
    grad = torch.ones(stats.shape[1])
    for operator, given in (
        (HEX.block_forward, forward_of(arguments, kept[:0])),
        (HEX.backward, backward_of(arguments, grad, stats, kept[:0])),
    ):
        with pytest.raises(RuntimeError, match=error):
            operator(*given, first=block[0], count=block[1])


def test_views_of_different_sizes_have_no_block():
    arguments = labelled_problems.labelled(13, 7, "pair", M=17).forward()[1]
    assert HEX.forward(*arguments)[0].shape == (13,)
    for count in (12, 13):  # whose rows of z1 nobody knows
        with pytest.raises(RuntimeError, match="first, count: expected none, for z1 has another"):
            HEX.block_forward(
                *forward_of(arguments, torch.empty(0, dtype=F64)), first=0, count=count
            )
