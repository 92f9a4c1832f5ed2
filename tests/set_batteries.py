# SPDX-License-Identifier: MIT
"""The same as batteries.py for labels, masks, groups, guides and logits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import labelled_problems
import torch
from batteries import BIN
from data import f64
from emulator import HEX
from labelled_problems import Call, coded, labelled, logits, viewed

from hex import ThresholdTracker, ops, reference


def check_call(p: Call) -> None:
    """Of a call in float32 or float64 labelled_problems.check; of one all of whose rows have 16
    bits loss and gradients as far as products of fp16 allow: see half_errors.

    The positives are such products too, which adds 1/tau to what the loss may err by, and to what
    an entry of the gradient is the difference of.
    """
    x, y, *_, guide, _, _, _ = p.tensors if p.name == "labelled" else (p.tensors[0].double(),) * 11
    narrow = all(z.element_size() == 2 for z in (x, y, guide) if z.numel())
    if not narrow or p.dtype == torch.float64 or p.pairing == "paired":
        labelled_problems.check(p)
        return
    inputs = [p.tensors[k] for k in p.places]
    rows, ours = p.values(p.rows, x.dtype)
    truth, exact = p.values(p.plain, torch.float64)
    delta = 2 * 2**-12 + 2**-24 * x.shape[-1] ** 0.5
    steep = (p.condition * (1 + p.beta) + 1) * delta / p.tau
    pairs = [("loss", rows, truth, 2 * steep)]
    for z, a, b in zip(inputs, ours, exact, strict=True):
        assert a.dtype == (z.dtype if z.dim() else torch.float64), p
        rounding = 2**-8 if a.dtype == torch.bfloat16 else 2**-11
        pairs.append((str(tuple(z.shape)), a, b, (4 * steep + 2**-10 + rounding) * b.abs().max()))
    for name, a, b, allowed in pairs:
        error = (a.double() - b.double()).abs().max().item()
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}, {p}"


QUANTILES = (("all", 0.9), ("negatives", 0.6))


def assert_measures_are_right(
    p: Call, quantiles: tuple[tuple[str, float], ...] = QUANTILES, self_column: bool = False
) -> None:
    """The adaptive threshold and the rows' bounds; NaN where the reference's are."""
    *z, ids, mask, tau, code, several, _ = p.measured()
    table = reference.problem_table(
        *(x.double() for x in z), ids, mask, tau, code, several, self_column
    )
    narrow = all(x.element_size() == 2 for x in z if x.numel()) and p.name == "labelled"
    cosine = 2 * 2**-11 if narrow else 1e-6
    for over, quantile in quantiles:
        op, measured = p.quantile(quantile, over == "negatives", False, self_column)
        got, want = op(*measured)[0], reference.quantile_of(table, quantile, over)
        assert torch.equal(got.isnan(), want.isnan()), (over, quantile, got, want, p)
        assert not abs(got - want) > BIN + cosine, (over, quantile, got, want, p)
    op, measured = p.quantile(bounds=True, self_column=self_column)
    for got, want in zip(op(*measured)[1:], reference.range_of(table), strict=True):
        assert torch.equal(got.isnan(), want.isnan()), p
        assert (got.double() - want).nan_to_num(0).abs().max() <= cosine, p


def assert_adaptive_is_two(p: Call, self_column: bool = False) -> None:
    """The loss with its threshold in one call: threshold, tracker and loss, to the bit."""
    *arguments, keep, tf32 = p.forward()[1]
    *inputs, _, tau = arguments[:9]
    for over in ("all", "negatives"):
        tracker = ThresholdTracker.adaptive(0.9, momentum=0.5, over=over).to(tau.device)
        tracker.update(f64(0.3).to(tau.device), store=True, anchors=p.grad_output().numel())
        tracker.state[:2] *= 0.5
        options = (*arguments[9:], keep, tf32)
        loss, stats, _, eps, state = HEX.adaptive(
            *inputs, tracker.state, tau, *options, self_column, *tracker.kernel_rule()
        )
        op, measured = p.quantile(0.9, over == "negatives", False, self_column)
        wanted = tracker.update(op(*measured)[0], store=True, anchors=p.grad_output().numel())
        apart = HEX.forward(*inputs, wanted, tau, *options)
        assert torch.equal(eps, wanted) and torch.equal(state, tracker.state), p
        assert torch.equal(loss, apart[0]) and torch.equal(stats, apart[1]), p


def assert_the_cut_changes_no_bit(p: Call, *cuts: tuple[int, ...]) -> None:
    """Of a call in blocks of anchors; which gives what the call gives as a whole."""
    of_blocks, *others = (p.in_blocks(cut) for cut in cuts)
    for other in others:
        for name, found in of_blocks.items():
            assert torch.equal(found.nan_to_num(7), other[name].nan_to_num(7)), (name, p)
    op, arguments = p.forward()
    loss, stats, _ = op(*arguments)
    dx, *gradients = HEX.backward(*p.backward()[1])
    whole = {"loss": loss, "dx": dx} | dict(
        zip(("dy", "dnegatives", "dtau"), gradients, strict=True)
    )
    assert torch.equal(of_blocks["stats"][ops.COUNT], stats[ops.COUNT]), p
    # Of rows' sums in other slices: some roundings of the terms.
    close = (1e-12 if p.dtype == torch.float64 else 1e-6) / p.tau
    for name, want in whole.items():
        if want.numel():
            error = (of_blocks[name].double() - want.double()).abs().max()
            rounding = 2**-7 if want.element_size() == 2 else 0
            assert error <= (close + rounding) * want.double().abs().max(), (name, p)
    for over in ("all", "negatives"):
        op, measured = p.quantile(0.9, over == "negatives")
        rows = of_blocks[over].double()
        torch.testing.assert_close(
            op(*measured)[0], rows[rows < math.inf].mean(), rtol=0, atol=2**-23
        )
    op, measured = p.quantile(bounds=True)
    for name, want in zip(("low", "high"), op(*measured)[1:], strict=True):
        assert torch.equal(of_blocks[name].nan_to_num(7), want.nan_to_num(7)), (name, p)


def changed(p: Call, place: int, *at_and_value: Any) -> Call:
    """The call with one element of a tensor set to a value."""
    *at, value = at_and_value
    tensors = list(p.tensors)
    tensors[place] = tensors[place].clone()
    tensors[place][tuple(at)] = value
    return dataclasses.replace(p, tensors=tuple(tensors))


def assert_not_finite_are_the_same_rows(p: Call) -> None:
    """A loss is NaN where the reference's is, and has a gradient of NaN; thresholds are."""
    rows, (dx, *_) = p.values(p.rows, p.tensors[0].dtype)
    truth = p.plain()[0]
    assert truth.isnan().any() and torch.equal(rows.isnan(), truth.isnan()), p
    assert dx[truth.isnan()].isnan().any(1).all(), p
    assert_measures_are_right(p)


def assert_a_target_that_is_no_column_spoils_its_row(p: Call, bad: int) -> None:
    """And no other; p is without it."""
    q = changed(p, 1, 4, bad)
    others = torch.arange(len(p.tensors[1]), device=p.tensors[1].device) != 4
    (loss, stats, _), (want, wanted, _) = (HEX.forward(*x.forward()[1]) for x in (q, p))
    assert loss[4].isnan() and stats[:, 4].isnan().all(), q
    assert torch.equal(loss[others], want[others]), q
    assert torch.equal(stats[:, others].nan_to_num(7), wanted[:, others].nan_to_num(7)), q
    ours, truth = (HEX.backward(*x.backward()[1]) for x in (q, p))
    seen = q.tensors[0][4] > -math.inf  # a column that is left out has no gradient
    assert torch.equal(ours[0][4].isnan(), seen) and ours[3].isnan(), q
    assert torch.equal(ours[0][others], truth[0][others]), q
    op, measured = q.quantile()
    assert op(*measured)[0].isnan(), q
    op, measured = q.quantile(bounds=True)
    assert torch.equal(op(*measured)[1].isnan(), ~others), q


def assert_padding_may_be_anything(p: Call) -> None:
    """In an anchor's own negatives that are left out; p is of such."""
    B, mask = len(p.tensors[0]), p.tensors[4]
    y = p.tensors[1].clone()
    K = (len(y) - B) // B
    out = (mask == 2).repeat(B // mask.shape[0], K // mask.shape[1]).flatten()
    y[B:][out] = math.nan
    q = dataclasses.replace(p, tensors=(p.tensors[0], y, *p.tensors[2:]))
    (ours, gradients), (wanted, of_p) = (x.values(x.rows, p.tensors[0].dtype) for x in (q, p))
    assert torch.equal(ours, wanted) and all(map(torch.equal, gradients, of_p)), p
    assert out.any() and not gradients[1][B:][out].any(), p
    assert_measures_are_right(q)


def every_second_without_hard(p: Call) -> Call:
    """With a threshold for each row."""
    rows = torch.arange(p.grad_output().numel())
    eps = torch.where(rows % 2 == 0, p.tensors[-2], math.inf)
    return dataclasses.replace(p, tensors=(*p.tensors[:-2], eps, p.tensors[-1]))


def far_groups(N: int, D: int, dtype: torch.dtype, seed: int = 0) -> Call:
    """Pairs of which an anchor's group are rows on the other side: H has the lowest cosines, which
    at tau = 0.01 are nothing beside the others'."""
    p = labelled(N, D, "pair", "groups", M=N + 9, dtype=dtype, tau=0.01, labels=7, seed=seed)
    x, y, *rest = p.tensors
    r = torch.Generator().manual_seed(seed)
    direction = torch.randn(D, generator=r, dtype=torch.float64)
    sides = [torch.randint(0, 2, (n,), generator=r) for n in (N, N + 9)]
    x, y = (
        (0.3 * z.double() + (2 * side[:, None] - 1) * direction).to(dtype)
        for z, side in zip((x, y), sides, strict=True)
    )
    tensors = (x, y, *rest[:3], sides[0], 1 - sides[1], *rest[5:])
    return dataclasses.replace(p, tensors=tensors, about=f"far groups, {N} x {D} {dtype}")


def battery_of_sets(device: str = "cpu") -> None:
    """A few problems that between them go through every line that labels, masks, groups, guides and
    logits have of their own."""
    single, double, half = torch.float32, torch.float64, torch.bfloat16
    inside = {"positives": "inside"}
    for p in (
        labelled(70, 130, dtype=single),  # tiles with and without an edge
        every_second_without_hard(labelled(70, 20, dtype=single)),
        labelled(40, 9, masked=True, dtype=single, **inside),  # of two views
        labelled(70, 20, "queue", "guide", M=90, dtype=single, beta=0.5),
        labelled(70, 66, "queue", M=90, dtype=single, variant="released"),
        labelled(20, 9, "queue", M=40, dtype=single, variant="excluded"),
        changed(labelled(20, 9, dtype=single, variant="excluded"), 9, -2.0),  # G is empty
        labelled(20, 9, dtype=single, labels=13, variant="paper decoupled"),
        labelled(13, 9, "pair", "guide", M=20, dtype=single, variant="paper decoupled", **inside),
        labelled(20, 9, dtype=single, labels=1, variant="paper decoupled"),
        labelled(33, 66, "pair", "guide", M=90, dtype=single, beta=2.0, **inside),
        changed(
            labelled(33, 9, "self", "groups", dtype=single, tau=0.02, variant="released", **inside),
            9,
            math.inf,
        ),  # fmt: skip
        labelled(20, 9, kind="clamped", dtype=single, tau=0.005, tau_plus=0.9, labels=13),
        labelled(20, 9, kind="zero_rows", dtype=single, labels=40),  # some without positives
        changed(far_groups(40, 20, single), 9, math.nan),  # eps plays no part
        labelled(20, 9, labels=1, dtype=single),  # none has a negative
        labelled(20, 9, "pair", M=1, labels=2, dtype=single),  # some have a negative, some have not
        labelled(20, 9, "pair", M=1, labels=2, dtype=double),
        labelled(136, 30, dtype=half, labels=40),
        labelled(40, 30, "queue", M=150, dtype=half),
        labelled(40, 20, "self", "guide", dtype=torch.float16),
        labelled(40, 20, "self", "guide", dtype=half, guide_dtype=single),
        labelled(13, 9, "queue", "guide", M=20, dtype=double),
        labelled(12, 9, masked=True, dtype=double, variant="released"),
        labelled(13, 9, "pair", "groups", M=20, dtype=double, **inside),
    ):
        check_call(p.to(device))
        assert_measures_are_right(p.to(device))
    for p in (
        coded("ntxent", 40, 9, dtype=single),
        coded("cross", 20, 9, dtype=single, seed=1),
        coded("unpaired", 20, 9, "guide", M=90, dtype=single),
        coded("queue", 20, 9, "groups", M=50, dtype=half),
        coded("pair", 33, 9, M=90, dtype=single, labels=False),
        coded("self", 12, 9, dtype=single, share=0.9),  # some have no negatives
        coded("query", 33, 9, dtype=single, variant="released", tau=0.5),
        coded("ntxent", 9, 9, dtype=double),
        coded("cross", 9, 9, dtype=double),
        coded("queue", 9, 9, M=11, dtype=double),
        coded("paired", 9, 9, "guide", dtype=single),
        coded("paired", 9, 9, dtype=double, seed=2),
    ):
        check_call(p.to(device))
        assert_measures_are_right(p.to(device))
    for dtype in (single, double):
        assert_padding_may_be_anything(coded("paired", 9, 9, dtype=dtype).to(device))
    for mode, source, dtype, K in (
        ("ntxent", "guide", single, 0),
        ("cross", "groups", half, 0),
        ("unpaired", "guide", single, 90),
        ("paired", "groups", single, 9),
        ("paired", "guide", double, 9),
        ("ntxent", "groups", double, 9),
    ):
        check_call(viewed(40 if K != 9 else 9, 20, mode, source, K=K, dtype=dtype).to(device))
    for dtype, variant in (
        (single, "paper"),
        (half, "released"),
        (double, "paper decoupled"),
        (single, "excluded decoupled"),
    ):
        p = logits(9, 700, dtype=dtype, variant=variant).to(device)
        check_call(p)
        of_infinity = changed(p, 0, 3, (p.tensors[1][3] + 1) % 700, math.inf)
        for eps in (0.3, 1.5):  # it has no cosine, and is in H for none
            assert_not_finite_are_the_same_rows(changed(of_infinity, 2, eps))
        for self_column in (False, True):
            assert_measures_are_right(p, QUANTILES, self_column)
            assert_adaptive_is_two(p, self_column)
        at = int(p.tensors[1][3])
        far = changed(p, 0, 3, (at + 1) % 700, 45.0)  # times tau no cosine
        for eps in (1.5, -3.0):
            check_call(changed(far, 2, eps))
        assert_a_target_that_is_no_column_spoils_its_row(p, 2**40)
        lost = changed(p, 0, 3, at, -math.inf)
        assert torch.equal(lost.rows().isposinf(), lost.plain()[0].isposinf())
        got, want = (
            z[1][0] for z in (lost.values(lost.rows, dtype), lost.values(lost.plain, double))
        )
        torch.testing.assert_close(
            got.double(), want, rtol=2**-7 if dtype == half else 1e-4, atol=1e-5
        )
        assert_measures_are_right(lost)
        assert_measures_are_right(changed(p, 0, 3, (at + 1) % 700, math.inf))
    near = logits(9, 40, dtype=single, variant="paper decoupled", tau_plus=0.0)
    near = changed(near, 0, 3, int(near.tensors[1][3]), 1000.0)  # exp(-m) overflows
    check_call(changed(near, 2, -300.0).to(device))  # all are in H
    for p in (
        labelled(40, 9, "pair", "guide", M=90, dtype=single),
        labelled(9, 9, "queue", "guide"),
    ):
        p = p.to(device)
        assert_not_finite_are_the_same_rows(changed(p, 1, 2, 5, math.nan))
        assert_not_finite_are_the_same_rows(changed(p, 7, 3, 5, math.nan))
    seen = changed(coded("query", 20, 9, dtype=single), 1, 2, 5, math.nan)
    assert_not_finite_are_the_same_rows(seen.to(device))
    alone = changed(coded("query", 20, 9, dtype=single), 4, slice(None), 2, 2)
    assert_not_finite_are_the_same_rows(changed(alone, 1, 2, 5, math.nan).to(device))
    assert_adaptive_is_two(labelled(40, 9, dtype=single, labels=40).to(device))
    assert_adaptive_is_two(labelled(9, 9, "queue", M=20, dtype=double).to(device))
    assert_adaptive_is_two(coded("ntxent", 20, 9, dtype=half).to(device))
    for p, cut in (
        (labelled(40, 9, dtype=single), (0, 7, 7, 40)),
        (labelled(13, 70, "queue", "guide", M=90, dtype=single), (0, 6, 13)),
        (viewed(20, 9, "query", "groups", dtype=single), (0, 6, 20)),
        (labelled(40, 20, "pair", "groups", M=40, dtype=half), (0, 5, 39, 40)),
        (coded("unpaired", 20, 9, M=90, dtype=single), (0, 6, 20)),
        (logits(9, 40, dtype=single), (0, 4, 9)),
        (labelled(9, 7, dtype=double), (0, 2, 9)),
    ):
        assert_the_cut_changes_no_bit(p.to(device), (0, cut[-1]), cut)
