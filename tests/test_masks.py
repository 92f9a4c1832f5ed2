# SPDX-License-Identifier: MIT
"""Masks of codes through torch.ops.hex, in every layout: values, gradients and thresholds against
reference.py, whose own masks are tested in test_reference_masks.py.

A mask of booleans is in test_labels.py, the CUDA kernels' are in test_cuda_masks.py, and what a
user passes is in test_ignored.py.
"""

import dataclasses
import itertools
import math

import pytest
import set_batteries
import torch
from conftest import DTYPES
from data import FORMS as OF_LOSS
from data import MODES
from labelled_problems import PAIRINGS, SOURCES, check, coded
from test_labels import FORMS, check_thresholds

from hex import ops, reference

HEX = torch.ops.hex
LAYOUTS = (*MODES, *PAIRINGS)
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def everywhere(dtype):
    """Every layout, source of H and size of mask once, and every form of the loss."""
    for k, (pairing, source) in enumerate(itertools.product(LAYOUTS, SOURCES)):
        N, D, M = ((2, 1, 1), (23, 7, 31), (67, 33, 41))[k // 3 % 3]
        variant, positives = FORMS[k % 4]
        options = {} if pairing in MODES else {"positives": positives, "labels": k % 2 == 0}
        yield coded(pairing, N, D, source, M=M, dtype=dtype, seed=k, variant=variant,
                    beta=(1.0, 0.0, 0.5)[k // 2 % 3], **options)  # fmt: skip


def check_half() -> int:
    """Of these, every second in float32 and the others in float64, for test_isa.py. How many."""
    half = [*everywhere(F32)][::2] + [*everywhere(F64)][1::2]
    for p in half:
        check(p)
    return len(half)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_compute_what_the_reference_computes(dtype):
    for p in everywhere(dtype):
        check(p)


@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
@pytest.mark.parametrize("pairing", ("ntxent", "query", "cross", "unpaired", "self", "pair"))
def test_so_do_enough_candidates_for_tiles_and_lists(pairing, dtype):
    """Without a mask they would go by tiles, and their quantiles by lists."""
    for seed in range(3):
        p = coded(pairing, 150, 9, M=600, dtype=dtype, seed=seed)
        check(p)
        check_thresholds(p)
    check_thresholds(coded("unpaired", 20, 9, M=4200, dtype=dtype))


@pytest.mark.parametrize("tau", (0.005, 0.03, 0.5))
@pytest.mark.parametrize("kind", ("gauss", "near_collapsed", "collapsed", "zero_rows", "clamped"))
def test_hard_batches_and_temperatures_are_as_exact(kind, tau):
    for pairing, dtype in itertools.product(LAYOUTS, DTYPES[:2]):
        source = "groups" if "collapsed" in kind else "cosines"  # there is no gap for eps
        tau_plus = 0.9 if kind == "clamped" else 0.1
        check(coded(pairing, 26, 17, source, kind=kind, tau=tau, dtype=dtype, tau_plus=tau_plus))


@pytest.mark.parametrize("variant", OF_LOSS)
@pytest.mark.parametrize("pairing", LAYOUTS)
def test_rows_without_a_negative_are_those_of_the_reference(pairing, variant):
    """All that can be left out is: of one positive the loss is 0 in every form."""
    for marked in (0.0, 0.3):
        p = coded(pairing, 12, 5, source="groups", share=1.0, marked=marked, variant=variant)
        check(p)
        set_batteries.assert_measures_are_right(p)
        if p.positives < 0 and not marked:
            assert not p.rows().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", LAYOUTS)
def test_quantiles_and_ranges_are_those_of_the_reference(pairing, dtype):
    for seed in range(3):
        p = coded(pairing, 23, 7, M=17, dtype=dtype, seed=seed)
        check_thresholds(p)
        set_batteries.assert_adaptive_is_two(p)


@pytest.mark.parametrize("pairing", LAYOUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_first_and_second_derivatives_are_those_of_finite_differences(pairing, source):
    p = coded(pairing, 5, 3, source, M=4, tau=0.3)
    inputs = [p.tensors[k].clone().requires_grad_() for k in p.places]
    assert torch.autograd.gradcheck(p.rows, inputs)
    assert torch.autograd.gradgradcheck(p.rows, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", (F64, F32), ids=str)
@pytest.mark.parametrize("pairing", LAYOUTS)
def test_results_are_the_same_bits_for_any_number_of_threads(pairing, dtype, threads):
    p = coded(pairing, 201, 40, M=60 if pairing == "paired" else 301)
    results = []
    for n in (1, 2, 5):
        threads(n)
        rows, gradients = p.values(p.rows, dtype)
        thresholds = [ops.quantile(*p.measured(), 0.9, over) for over in ("all", "negatives")]
        results.append([rows, *gradients, *thresholds, *ops.row_range(*p.measured())])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("pairing", ("query", "unpaired", "paired", "self", "pair", "queue"))
def test_the_cut_into_blocks_changes_no_bit(pairing):
    for dtype in (F64, F32, BF16):
        p = coded(pairing, 13, 7, M=13 if pairing == "pair" else 9, dtype=dtype)
        set_batteries.assert_the_cut_changes_no_bit(p, (0, 13), (0, 4, 4, 11, 13))


@pytest.mark.parametrize("pairing", LAYOUTS)
def test_a_mask_may_have_any_strides_and_repeats_itself(pairing):
    p = coded(pairing, 12, 5, M=10, size=(3, 2), share=0.5)
    whole = coded(pairing, 12, 5, M=10)
    mask, (rows, columns) = p.tensors[4], whole.tensors[4].shape
    repeated = mask.repeat(rows // 3, columns // 2)
    turned, apart = mask.T.contiguous().T, mask.repeat_interleave(3, 0).repeat_interleave(2, 1)
    expanded = mask[:1, :1].expand(rows, columns)
    for a, *same in ((mask, repeated, turned, apart[::3, ::2]), (mask[:1, :1], expanded)):
        results = []
        for m in (a, *same):
            q = dataclasses.replace(p, tensors=(*p.tensors[:4], m, *p.tensors[5:]))
            calls = q.forward(), q.backward(), q.quantile()
            results.append([x.nan_to_num(7) for op, arguments in calls for x in op(*arguments)])
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("pairing", LAYOUTS)
def test_other_codes_say_nothing(pairing):
    p = coded(pairing, 12, 5, marked=0.0)
    other = torch.where(p.tensors[4] == 2, 2, 3).to(torch.uint8)
    q = dataclasses.replace(p, tensors=(*p.tensors[:4], other, *p.tensors[5:]))
    assert torch.equal(p.rows(), q.rows())
    assert torch.equal(p.rows(), p.plain()[0]) or (p.rows() - p.plain()[0]).abs().max() < 1e-12
    none = dataclasses.replace(q, tensors=(*p.tensors[:4], other.bitwise_or(4), *p.tensors[5:]))
    without = dataclasses.replace(
        p, tensors=(*p.tensors[:4], p.tensors[4][:0, :0].bool(), *p.tensors[5:])
    )
    torch.testing.assert_close(none.rows(), without.rows(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value", (math.nan, math.inf, 1e30))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_padding_of_an_anchors_own_negatives_may_hold_any_numbers(source, dtype, value):
    p = coded("paired", 13, 7, source, dtype=dtype)
    B = len(p.tensors[0])
    out = reference._repeated(p.tensors[4], (B, 11)) == 2
    y = p.tensors[1].clone()
    y[B:][out.flatten()] = value
    q = dataclasses.replace(p, tensors=(p.tensors[0], y, *p.tensors[2:]))
    (rows, ours), (wanted, theirs) = (x.values(x.rows, dtype) for x in (q, p))
    assert torch.equal(rows, wanted)
    assert all(map(torch.equal, ours, theirs))
    assert not ours[1][B:][out.flatten()].any()
    assert torch.equal(ops.quantile(*q.measured(), 0.9, "all"),
                       ops.quantile(*p.measured(), 0.9, "all"))  # fmt: skip
    assert all(map(torch.equal, ops.row_range(*q.measured()), ops.row_range(*p.measured())))


@pytest.mark.parametrize("pairing", ("ntxent", "query", "cross", "unpaired", "self", "pair"))
def test_a_row_does_not_see_nan_in_a_candidate_that_it_leaves_out(pairing):
    p = coded(pairing, 12, 5, share=0.6)
    place = 0 if pairing in ("ntxent", "self") else 1
    rows = range(12 if pairing not in ("unpaired", "pair") else 11)
    for row in rows:
        q = set_batteries.changed(p, place, row + 12 * (pairing == "unpaired"), 2, math.nan)
        truth = q.plain()[0].isnan()
        assert torch.equal(q.rows().isnan(), truth)
        set_batteries.assert_measures_are_right(q)
    assert not truth.all()
