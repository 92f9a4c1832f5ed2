# SPDX-License-Identifier: MIT
"""A block of anchors, rows [first, first + count) of a batch: the operators give for it what they
give for those rows of the whole."""

import labelled_problems
import operators
import pytest
import torch
from conftest import problem

from hex import ops

HEX = torch.ops.hex
CUTS = ((0, 7, 13), (0, 1, 1, 13), (0, 13))  # blocks begin and end there; one is empty
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
    *inputs, _, tau, mode, reduction, positives, beta, _, _, _, _ = arguments
    return grad, *inputs, tau, stats, kept, mode, reduction, positives, beta, False, 15


def quantile_of(arguments, over_negatives, bounds):
    *inputs, _, tau, mode, _, positives, _, _, _, _, _ = arguments
    logits = mode == ops.MODES["logits"]
    return *inputs[:5], tau, mode, positives > 0, False, logits, 0.9, over_negatives, bounds


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
        at = anchors_of(arguments, first, count)
        own, its, none = HEX.forward(*arguments, first=first, count=count)
        assert torch.equal(own, loss[at]) and not none.numel()
        assert torch.equal(its.nan_to_num(7), stats[:, at].nan_to_num(7))
        parts.append(
            HEX.backward(*backward_of(arguments, grad, stats, kept), first=first, count=count)
        )
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
        total, rows = 0.0, 0
        for first, count in ((0, 7), (7, 6)):
            at = anchors_of(arguments, first, count)
            block = dict(first=first, count=count)
            _, *bounds = HEX.quantile(*quantile_of(arguments, False, True), **block)
            assert torch.equal(torch.stack(bounds), torch.stack([low[at], high[at]]))
            part, _, _ = HEX.quantile(*quantile_of(arguments, over_negatives, False), **block)
            total, rows = total + part * len(at), rows + len(at)
        # sums of some tens of numbers up to 1 in another order
        assert abs(total / rows - mean) < 1e-14


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
            rows[anchors_of(arguments, first, count)] = HEX.forward(*arguments, **block)[0]
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
    loss, stats, kept = HEX.forward(*arguments)
    for block in (dict(first=4, count=8), dict(first=3), dict(first=13), dict(count=0)):
        for operator, given in (
            (HEX.forward, arguments),
            (HEX.backward, backward_of(arguments, torch.ones_like(loss), stats, kept)),
            (HEX.quantile, quantile_of(arguments, False, True)),
        ):
            torch.library.opcheck(operator, given, block, test_utils=FAKES)


def test_the_block_of_a_compiled_graph_may_have_any_size():
    p = problem("cluster", 13, 7)
    z0, z1, *rest = operators.arguments("forward", *p.raw())
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", dynamic=True, fullgraph=True)
    def rows_of(z0, z1, own):
        count = own.shape[0]
        return HEX.forward(z0, z1, *rest, first=z0.shape[0] - count, count=count)[0]

    for count in (4, 6):
        want = HEX.forward(z0, z1, *rest, first=13 - count, count=count)[0]
        assert torch.equal(rows_of(z0, z1, z0[:count]), want)


@pytest.mark.parametrize(
    "block, error",
    [
        ((-1, 3), "first, count: expected a block of 13 rows, got -1, 3"),
        ((14, -1), "first, count: expected a block of 13 rows, got 14, -1"),
        ((0, 14), "first, count: expected a block of 13 rows, got 0, 14"),
        ((9, 5), "first, count: expected a block of 13 rows, got 9, 5"),
        ((0, -2), "first, count: expected a block of 13 rows, got 0, -2"),
        ((2**62, 2**62), "first, count: expected a block of 13 rows"),
    ],
    ids=str,
)
def test_a_block_outside_the_batch_is_refused(block, error):
    arguments = CASES["ntxent torch.float32"]
    with pytest.raises(RuntimeError, match=error):
        HEX.forward(*arguments, first=block[0], count=block[1])


def test_views_of_different_sizes_have_no_block():
    arguments = labelled_problems.labelled(13, 7, "pair", M=17).forward()[1]
    assert HEX.forward(*arguments)[0].shape == (13,)
    for count in (12, 13):  # whose rows of z1 nobody knows
        with pytest.raises(RuntimeError, match="first, count: expected all rows of z0, for z1 has"):
            HEX.forward(*arguments, first=0, count=count)
