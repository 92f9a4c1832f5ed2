# SPDX-License-Identifier: MIT
"""The masks of reference.problem_table: each row alone, with the candidates in a list from which
those that are left out have been removed, gives the same loss, |H|, quantile and range.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from data import f64
from labelled_problems import coded
from torch import Tensor

from hex import ops, reference

LAYOUTS = ("ntxent", "query", "cross", "unpaired", "paired", "self", "pair", "queue")
TAU = 0.2


def candidates(p, i: int) -> tuple[Tensor, list[Tensor], list[int], int | None]:
    """The anchor of row i, all its candidates as a mask counts them, which of these are positives
    or stand where its only positive does, and which is the anchor itself."""
    z0, z1, negatives, ids, *_ = p.inputs(list(p.tensors))
    B, M = len(z0), len(z1)
    views, anchor = [*z0, *z1], (*z0, *z1)[i]
    if p.pairing == "ntxent":
        return anchor, views, [(i + B) % (2 * B)], i
    if p.pairing == "query":
        return anchor, list(z1), [i], None
    if p.pairing == "cross":
        return anchor, list(z1 if i < B else z0), [i % B], None
    if p.pairing in ("unpaired", "paired"):
        return anchor, list(negatives if p.pairing == "unpaired" else negatives[i]), [], None
    alike = (ids[i] == ids).tolist()
    if p.pairing == "self":
        return anchor, views, [j for j, same in enumerate(alike) if same and j != i], i
    of = [*z1, *negatives]
    positives = [j for j, same in enumerate(alike[B:]) if same]
    assert len(of) == M + len(negatives)
    return anchor, of, positives, None


def row(p, i: int) -> tuple[Tensor, Tensor]:
    """The cosines of the positives and of the negatives of row i, by removal."""
    z0, z1, negatives, _, mask, *_ = p.inputs(list(p.tensors))
    anchor, of, positives, self = candidates(p, i)
    c = [F.cosine_similarity(anchor, z, dim=0) for z in of]
    codes = [int(mask[i % mask.shape[0], j % mask.shape[1]]) for j in range(len(of))]
    if p.positives >= 0:
        positives = sorted({*positives, *(j for j, code in enumerate(codes) if code == 1)} - {self})
    rest = [j for j in range(len(of)) if j not in positives and j != self and codes[j] != 2]
    if p.pairing == "queue":
        rest = [j for j in rest if j >= len(z1)]
    own = [c[j] for j in positives]
    if p.pairing in ("unpaired", "paired"):
        own = [F.cosine_similarity(anchor, z1[i], dim=0)]
    empty = z0.new_empty(0)
    return (torch.stack(x) if x else empty for x in (own, [c[j] for j in rest]))


def rows_of(p) -> int:
    return len(p.grad_output())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pairing", LAYOUTS)
def test_a_row_is_that_of_the_candidates_that_remain(pairing, seed):
    p = coded(pairing, seed=seed)
    *inputs, eps, tau = p.forward()[1][:9]
    loss, hard, _ = reference.problem_rows(*inputs, f64(math.inf), tau, *p.plain_options())
    _, counts, _ = reference.problem_rows(*inputs, eps, tau, *p.plain_options())
    table = reference.problem_table(*p.measured())
    low, high = reference.range_of(table)
    quantiles = {over: reference.row_quantiles(table, 0.7, over) for over in ("all", "negatives")}
    assert not hard.any()
    for i in range(rows_of(p)):
        own, rest = row(p, i)
        exps = torch.exp(torch.cat([own, rest]) / p.tau).sum()
        expected = (torch.log(exps) - own / p.tau).mean() if len(own) else f64(0.0)
        torch.testing.assert_close(loss[i], expected, rtol=1e-12, atol=1e-13)
        assert counts[i] == (rest > eps).sum()
        self = [f64(1.0)[None]] * (pairing in ("ntxent", "self"))
        for over, elements in (("negatives", rest), ("all", torch.cat([own, rest, *self]))):
            n = len(elements)
            wanted = elements.sort().values[round(0.7 * (n - 1))] if n else f64(math.inf)
            torch.testing.assert_close(quantiles[over][i], wanted, rtol=1e-12, atol=1e-13)
        if n:
            torch.testing.assert_close(low[i], elements.min(), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(high[i], elements.max(), rtol=1e-12, atol=1e-13)
        else:
            assert low[i].isnan() and high[i].isnan()


@pytest.mark.parametrize("pairing", LAYOUTS)
def test_nothing_is_left_out_by_codes_of_zero(pairing):
    p = coded(pairing, share=0.0, marked=0.0)
    *z, ids, mask, tau, code, several, own = p.measured()
    assert mask.numel() and not mask.any()
    with_mask = reference.problem_table(*p.measured())
    without = reference.problem_table(*z, ids, mask[:0, :0].bool(), tau, code, several, own)
    for x, y in zip(with_mask, without, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("pairing", LAYOUTS)
def test_what_is_left_out_has_a_gradient_of_zero(pairing):
    """Of a negative that no anchor sees."""
    p = coded(pairing, share=1.0, marked=0.0)
    x, y = (t.clone().requires_grad_() for t in p.tensors[:2])
    loss = p.plain(*((x,) if pairing == "self" else (x, y)))[0]
    if p.positives < 0:
        assert not loss.any()  # the positive alone
    grads = torch.autograd.grad(loss.sum(), (x, y), allow_unused=True, materialize_grads=True)
    if pairing in ("unpaired", "paired", "queue"):
        assert not grads[1][len(x) :].any()
    if p.positives < 0:
        assert not grads[0].any() and not grads[1].any()


@pytest.mark.parametrize("value", (math.nan, math.inf, 1e30))
def test_padding_of_an_anchors_own_negatives_may_hold_any_numbers(value):
    p = coded("paired")
    mask = p.inputs(list(p.tensors))[4]
    out = reference._repeated(mask, (len(p.tensors[0]), 11)) == 2
    padded = p.tensors[1].clone()
    padded[len(p.tensors[0]) :][out.flatten()] = value
    (rows, ours), (wanted, theirs) = (_rows_and_gradients(p, y) for y in (padded, p.tensors[1]))
    assert torch.equal(rows, wanted)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_row_does_not_see_nan_in_a_candidate_that_it_leaves_out():
    p = coded("unpaired", share=0.5)
    mask, y = p.tensors[4], p.tensors[1].clone()
    B = len(p.tensors[0])
    out = reference._repeated(mask, (B, len(y) - B))[:, 3] == 2
    y[B + 3] = math.nan
    assert 0 < out.sum() < B
    loss = p.plain(p.tensors[0], y)[0]
    table = reference.problem_table(p.tensors[0], y[:B], y[B:], *p.measured()[3:])
    for values in (loss, reference.row_quantiles(table, 0.5), *reference.range_of(table)):
        assert torch.equal(values.isnan(), ~out)


def _rows_and_gradients(p, y):
    z = [t.clone().requires_grad_() for t in (p.tensors[0], y)]
    rows = p.plain(*z)[0]
    return rows.detach(), torch.autograd.grad(rows.sum(), z)


def test_booleans_mark_positives_and_codes_add_to_the_labels():
    p = coded("self", share=0.0, marked=0.3)
    *z, ids, mask, tau, code, several, own = p.measured()
    positive = reference.problem_table(*p.measured()).positive
    N = len(z[0])
    by_ids = ids[:, None] == ids
    by_mask = reference._repeated(mask, (N, N)) == 1
    other = ~torch.eye(N, dtype=torch.bool)
    assert torch.equal(positive, (by_ids | by_mask) & other)
    only = reference.problem_table(*z, ids, mask == 1, tau, code, several, own).positive
    assert torch.equal(only, by_mask & other)
    none = reference.problem_table(*z, ids[:0], mask, tau, code, several, own).positive
    assert torch.equal(none, by_mask & other)


def test_the_names_of_modes_are_those_of_the_operators():
    assert [ops.MODES[name] for name in LAYOUTS[:5]] == list(range(5))
