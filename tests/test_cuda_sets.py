# SPDX-License-Identifier: MIT
"""Labels, masks, groups, guides and logits on the CUDA core, run on the CPU (emulator.py), against
the reference: values, gradients, thresholds and bounds, as a whole and in blocks of anchors.
"""

import dataclasses
import itertools
import math

import emulator
import pytest
import set_batteries
import torch
from conftest import problem, without_kernels
from data import FORMS as OF_VIEWS
from data import KINDS, MODES, f64
from emulator import HEX, HOPPER, ROUNDED, TRUNCATED
from labelled_problems import PAIRINGS, SOURCES, Call, coded, labelled, logits, viewed
from set_batteries import (
    QUANTILES,
    assert_adaptive_is_two,
    assert_measures_are_right,
    assert_the_cut_changes_no_bit,
    changed,
    check_call,
)

from hex import HEXLoss, ThresholdTracker, ops

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FORMS = tuple(itertools.product(OF_VIEWS, ("outside", "inside")))
# Within a tile and of several; features and a guide's of one panel of 64 and of several.
SIZES = ((3, 7), (20, 64), (70, 130), (136, 9), (200, 300))
FEW = ((3, 7), (13, 70), (37, 5))  # for float64


@pytest.fixture(autouse=True)
def the_battery_alone_under_sanitizers(request):
    if emulator.SANITIZED and "battery" not in request.node.name:
        pytest.skip("AddressSanitizer has seen the battery, which goes through every line")


@pytest.mark.parametrize(
    "seed, device, extra_bits",
    tuple(zip(emulator.SEEDS, emulator.DEVICES, (ROUNDED, TRUNCATED, TRUNCATED), strict=True)),
)
def test_a_battery_of_sets_is_right_in_any_order_of_the_warps(kernels, seed, device, extra_bits):
    kernels.seed(seed)
    kernels.device(*device)
    kernels.truncate(extra_bits)
    before = kernels.conflicts
    set_batteries.battery_of_sets()
    assert kernels.conflicts == before


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_every_pairing_source_and_form_is_as_good_as_torch(mma, dtype, pairing, source):
    sizes = SIZES if dtype == F32 else FEW
    case = 3 * PAIRINGS.index(pairing) + SOURCES.index(source)
    for k, (N, D) in enumerate(sizes):
        variant, positives = FORMS[(case + 3 * k) % len(FORMS)]
        mma.device(*emulator.DEVICES[(case + k) % 3])
        options = {"variant": variant, "positives": positives, "beta": (1.0, 0.0, 2.5)[k % 3]}
        p = labelled(N, D, pairing, source, M=2 * N // 3, dtype=dtype, seed=k,
                     labels=(5, 40)[k % 2], **options)  # fmt: skip
        check_call(p)
        assert_measures_are_right(p)


@pytest.mark.parametrize("variant, positives", FORMS)
def test_a_mask_of_all_rows_or_of_images_is_right_in_either_direction(kernels, variant, positives):
    kernels.device(*emulator.DEVICES[FORMS.index((variant, positives)) % 3])
    options = {"masked": True, "variant": variant, "positives": positives}
    for N, dtype in ((77, F32), (78, F32), (150, F32), (9, F64), (12, F64)):
        p = labelled(N, 20, dtype=dtype, **options)
        assert p.tensors[4].shape[0] == (N if N % 2 else N // 2)
        check_call(p)
        assert_measures_are_right(p)
    turned = dataclasses.replace(p, tensors=(*p.tensors[:4], p.tensors[4].T, *p.tensors[5:]))
    check_call(turned)
    assert not torch.equal(turned.rows(), p.rows())


@pytest.mark.parametrize("pairing", (*MODES, *PAIRINGS))
def test_what_a_mask_leaves_out_is_left_out_in_every_layout(mma, pairing):
    sizes = ((77, 20, F32), (40, 9, BF16), (12, 7, F64))
    for k, ((N, D, dtype), source) in enumerate(itertools.product(sizes, SOURCES)):
        if pairing == "paired" or (dtype == BF16 and source == "guide"):
            N = min(N, 20)
        mma.device(*emulator.DEVICES[k % 3])
        p = coded(pairing, N, D, source, M=9 if pairing == "paired" else 100, dtype=dtype, seed=k,
                  share=(0.2, 0.9)[k % 2])  # fmt: skip
        check_call(p)
        assert_measures_are_right(p)
        if source == "cosines":
            with mma.brackets():  # which a mask has no use for
                assert_adaptive_is_two(p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", (1.0, 0.05, 0.01, 0.001))
def test_hard_batches_are_right_at_every_temperature(mma, kind, tau):
    source = "groups" if "collapsed" in kind else "cosines"  # there is no gap for eps
    for k, (pairing, positives) in enumerate(itertools.product(PAIRINGS, ("outside", "inside"))):
        p = labelled(26, 17, pairing, source, kind=kind, tau=tau, positives=positives, dtype=F32,
                     beta=(0.0, 1.0, 2.5)[k % 3], tau_plus=0.3, labels=13)  # fmt: skip
        check_call(p)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_16_bit_rows_err_no_more_than_fp16_products_do(kernels, pairing, dtype):
    for k, (source, (N, D)) in enumerate(itertools.product(SOURCES, ((20, 7), (136, 130)))):
        if source == "guide":  # among as many cosines none is alone
            N, D = min(N, 20), D // 2
        variant, positives = FORMS[(PAIRINGS.index(pairing) + 3 * k) % len(FORMS)]
        check_call(labelled(N, D, pairing, source, M=40, dtype=dtype, labels=40, variant=variant,
                            positives=positives))  # fmt: skip
    check_call(labelled(70, 30, pairing, "guide", M=40, dtype=dtype, guide_dtype=F32))
    wide = labelled(70, 30, pairing, "guide", M=40, dtype=F32, guide_dtype=dtype)
    check_call(wide)


@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=str)
def test_groups_may_be_far_from_their_anchors(kernels, dtype):
    for N in (20, 70) if dtype != F64 else (9,):
        check_call(set_batteries.far_groups(N, 20, dtype))


def test_a_long_row_is_as_good_as_torch_though_additions_are_cut_off(kernels):
    kernels.truncate(TRUNCATED)
    kernels.device(1, HOPPER[1])
    for source in SOURCES:
        check_call(labelled(4, 16, "queue", source, M=3000, dtype=F32))
    with kernels.weights(20):
        check_call(labelled(150, 140, "self", "guide", dtype=F32))  # bands, some columns at a time


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("source", ("groups", "guide"))
@pytest.mark.parametrize("mode", MODES)
def test_two_views_with_groups_or_a_guide(mma, mode, source, variant):
    K = 9 if mode == "paired" else 100
    for B, D, dtype in ((70, 66, F32), (13, 9, F64), (40, 20, BF16)):
        if (mode, dtype) == ("paired", F32):
            B = 9
        if dtype == BF16 and source == "guide":
            B, K = 13, 9
        p = viewed(B, D, mode, source, K=K, dtype=dtype, variant=variant)
        check_call(p)


@pytest.mark.parametrize("mode", MODES)
def test_the_module_with_groups_or_a_guide_is_the_formulas(mma, mode, monkeypatch):
    """And the threshold, or the rows' bounds, of the guide."""
    z, guide = (problem(kind, 17, 6, mode, dtype=F32).inputs for kind in ("cluster", "gauss"))
    groups = torch.arange(17) % 4
    if len(z) == 3:
        groups = (groups, torch.arange(z[2].shape[:-1].numel()).view(z[2].shape[:-1]) % 4)

    def results(**given):
        out = []
        for tracker in (ThresholdTracker.adaptive(0.9, over="negatives"),
                        ThresholdTracker.fixed(0.8, normalize_rows=True)):  # fmt: skip
            own = mode if mode in ("ntxent", "query", "cross") else "ntxent"
            leaves = [x.clone().requires_grad_() for x in z]
            loss = HEXLoss(0.2, mode=own, threshold=tracker, reduction="none")
            value = loss(*leaves, **given)
            out += [value, loss.last.hard, *torch.autograd.grad(value.sum(), leaves)]
        return out

    for given in ({"groups": groups}, {"guide": guide}):
        before = mma.launches
        ours = results(**given)
        assert mma.launches > before
        with monkeypatch.context() as patch:
            without_kernels(patch)
            plain = results(**given)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# ---- thresholds, and blocks of anchors ----------------------------------------------------------


@pytest.mark.parametrize("pairing", (*PAIRINGS, "mask", "logits"))
@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=str)
def test_thresholds_and_bounds_of_every_row(mma, pairing, dtype):
    """Of rows that have nothing: no negatives, where all is of one label, or no element at all."""
    rules = [(over, q) for over in ("all", "negatives") for q in (0.0, 0.5, 0.99, 1.0)]
    for N, kind, labels in ((3, "cluster", 1), (20, "zero_rows", 1), (90, "cluster", 40)):
        if pairing == "logits":
            p = logits(N, 3 * N, dtype=dtype, left_out=0.9)
        elif pairing == "mask":
            p = labelled(N, 9, masked=True, dtype=dtype, kind=kind)
        else:
            p = labelled(N, 9, pairing, M=2 * N // 3, dtype=dtype, kind=kind, labels=labels)
        for self_column in (False, True) if pairing == "logits" else (False,):
            assert_measures_are_right(p, rules, self_column)
            assert_adaptive_is_two(p, self_column)


def test_a_row_that_16_bits_cannot_count_has_its_threshold(mma):
    x, queue = problem("cluster", 2, 8, "unpaired", K=90, dtype=BF16).inputs[::2]
    y = torch.cat([x, queue[:1].expand(65560, 8), queue])  # a bin with more than 65535
    p = labelled(2, 8, "queue", M=1)
    ids = torch.full((len(y),), -1)
    ids[:2] = p.tensors[2]
    p = dataclasses.replace(p, tensors=(x, y, p.tensors[2], ids, *p.tensors[4:]))
    assert_measures_are_right(p, (("negatives", 0.9992), ("all", 0.5)))


CUT = tuple(itertools.product((*PAIRINGS, "mask"), SOURCES))


@pytest.mark.parametrize("pairing, source", (*CUT, ("query", "guide"), ("unpaired", "groups"),
                                             ("paired", "guide"), ("logits", "")))  # fmt: skip
def test_the_bits_of_a_row_depend_neither_on_the_cut_nor_on_the_device(mma, pairing, source):
    for N, dtype in ((72, F32), (40, BF16), (12, F64)):
        if pairing == "logits":
            p = logits(N, 300, dtype=dtype)
        elif pairing in MODES:
            p = viewed(N, 9, pairing, source, K=5 if pairing == "paired" else 150, dtype=dtype)
        else:
            masked, own = pairing == "mask", "self" if pairing == "mask" else pairing
            p = labelled(
                N, 9, own, source, M=150 if own == "queue" else N, masked=masked, dtype=dtype
            )
        assert_the_cut_changes_no_bit(p, (0, N), (0, 1, 1, 7, N // 2 + 2, N))
        one = p.in_blocks((0, N))
        mma.device(*emulator.ALONE)
        other = p.in_blocks((0, N // 3, N))
        mma.device(*HOPPER)
        assert all(torch.equal(one[k].nan_to_num(7), other[k].nan_to_num(7)) for k in one)


# ---- rows that are not as others ----------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", (F32, F64, BF16), ids=str)
def test_a_row_that_is_not_finite_reaches_who_sees_it(mma, dtype, pairing, source):
    p = labelled(23, 9, pairing, source, M=90, dtype=dtype)
    rows = [(0, 3)] + [(1, row) for row in (2, 50) if pairing != "self"]
    rows += [(7, 3), (8, 50)][: 2 if pairing != "self" else 1] if source == "guide" else []
    for place, row in rows:
        q = changed(p, place, row, 5, math.nan)
        ours, (dx, *_) = q.values(q.rows, p.tensors[0].dtype)
        truth, (wanted, *_) = q.values(q.plain, F64)
        assert torch.equal(ours.isnan(), truth.isnan()), (place, row)
        spoilt = dx.isnan().any(1)
        assert spoilt[truth.isnan()].all()
        if pairing != "queue":  # of which rows of z1 are seen by some
            assert torch.equal(spoilt, wanted.isnan().any(1)), (place, row)
        if place < 7:
            assert_measures_are_right(q)


def test_what_has_nothing_to_choose_from_is_as_on_the_cpu(libraries):
    calls = [labelled(N, 5, pairing, source, M=M, dtype=dtype, variant=variant)
             for N, M in ((1, 1), (2, 1), (5, 0)) for pairing in PAIRINGS for dtype in (F32, F64)
             for source, variant in (("cosines", "paper"), ("groups", "released"))
             if M > 0 or pairing != "pair"]  # fmt: skip
    calls += [labelled(4, 5, labels=n, dtype=F32, positives=how) for n in (1, 99)
              for how in ("inside", "outside")]  # fmt: skip
    calls += [logits(N, C, dtype=dtype, left_out=1.0) for N, C in ((1, 1), (4, 9))
              for dtype in (F32, F64)]  # fmt: skip

    def everything(p):
        loss, stats, _ = HEX.forward(*p.forward()[1])
        kinds = [ops.COUNT, ops.SHARE]
        return [loss, stats[kinds], *HEX.backward(*p.backward()[1]),
                *(HEX.quantile(*p.quantile(0.5, over, bounds)[1])[k] for k in range(3)
                  for over in (False, True) for bounds in (False, True))]  # fmt: skip

    for p in calls:
        want = everything(p)
        with libraries["mma"].in_use():
            got = everything(p)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=4e-5, equal_nan=True, msg=str(p))


# ---- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("dtype", (F64, F32, BF16, F16), ids=str)
def test_logits_of_any_dtype_and_strides(kernels, dtype, variant):
    for N, C, tau, beta in ((5, 3, 0.1, 1.0), (19, 700, 0.01, 0.0), (7, 257, 1.0, 2.5)):
        p = logits(N, C, dtype=dtype, variant=variant, tau=tau, beta=beta)
        check_call(p)
        values = p.tensors[0]
        want = p.rows()
        rows, columns = (values.repeat_interleave(2, k) for k in range(2))
        for x in (values.T.contiguous().T, values.repeat(1, 3)[:, C : 2 * C], rows[::2],
                  columns[:, 1::2]):  # fmt: skip
            q = dataclasses.replace(p, tensors=(x, *p.tensors[1:]))
            assert torch.equal(q.rows(), want)
            check_call(q)
            assert_measures_are_right(q)


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("dtype", (F64, F32, F16), ids=str)
def test_a_target_of_minus_infinity_loses_and_has_a_gradient(mma, dtype, variant):
    p = logits(19, 37, dtype=dtype, variant=variant)
    q = changed(p, 0, 3, p.tensors[1][3], -math.inf)
    rows, (ours, _) = q.values(q.rows, dtype)
    truth, (want, _) = q.values(q.plain, F64)
    assert rows[3] == math.inf and torch.equal(rows.isposinf(), truth.isposinf())
    torch.testing.assert_close(ours.double(), want, rtol=4e-3 if dtype == F16 else 1e-4, atol=1e-5)
    assert_measures_are_right(q)
    for of, value in ((1, math.nan), (1, math.inf), (0, math.inf)):  # a negative, and the target
        q = changed(p, 0, 3, (p.tensors[1][3] + of) % 37, value)
        for eps in (float(p.tensors[2]), -2.0, 1.5):
            q = changed(q, 2, eps)
            assert torch.equal(q.rows().isnan(), q.plain()[0].isnan())
            assert_measures_are_right(q)


@pytest.mark.parametrize("dtype", (F64, F32, BF16), ids=str)
@pytest.mark.parametrize("bad", (-1, 37, 2**40, -(2**62)))
def test_a_target_that_is_no_column_spoils_its_row_alone(mma, dtype, bad):
    set_batteries.assert_a_target_that_is_no_column_spoils_its_row(logits(19, 37, dtype=dtype), bad)


def test_more_columns_than_16_bits_count(mma):
    p = logits(2, 65537, dtype=F32, left_out=0.01)
    check_call(p)
    assert_measures_are_right(p, (*QUANTILES, ("all", 0.9999)), True)


def test_logits_that_a_finite_number_leaves_out_have_a_threshold(mma):
    """As some mask them: times tau they are no longer in a float's range."""
    p = logits(5, 40, dtype=F32, tau=2.0, left_out=0.0)
    for at in range(4):
        p = changed(p, 0, at, (p.tensors[1][at] + 3) % 40, torch.finfo(F32).min)
    check_call(p)
    assert_measures_are_right(p)


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("dtype", (F64, F32, BF16), ids=str)
def test_a_row_of_the_lowest_numbers_has_a_loss_and_a_gradient(mma, dtype, variant):
    """As of padding, which some mask with them whole."""
    lowest = torch.finfo(dtype).min
    for row in ([lowest] * 4, [2.0, *[lowest] * 3], [2.0, lowest / 2, lowest / 2]):
        p = logits(1, len(row), variant=variant)
        p = dataclasses.replace(p, tensors=(torch.tensor([row], dtype=dtype), p.tensors[1] * 0,
                                            f64(0.5), f64(1.0)))  # fmt: skip
        (loss, (ours, _)), (truth, (want, _)) = p.values(p.rows, dtype), p.values(p.plain, F64)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.double(), want, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_target_that_is_not_finite_has_no_finite_gradient(mma, value, variant):
    p = logits(5, 9, dtype=F32, variant=variant)
    p = changed(p, 0, 3, p.tensors[1][3], value)
    loss, (grad, _) = p.values(p.rows, F32)
    assert not loss[3].isfinite() and grad[3].isnan().any()
    assert grad[[0, 1, 2, 4]].isfinite().all()


# ---- work ---------------------------------------------------------------------------------------


def test_the_bits_are_the_same_on_every_run_and_in_any_order(kernels):
    calls = [labelled(70, 20, dtype=F32), labelled(70, 20, "queue", "guide", M=40, dtype=BF16),
             labelled(20, 7, masked=True, dtype=F64), logits(9, 300, dtype=F32)]  # fmt: skip
    for p in calls:
        seen = []
        for seed in (1, 1, 2, 3):
            kernels.seed(seed)
            seen.append(
                (p.rows(), *HEX.backward(*p.backward()[1]), p.quantile()[0](*p.quantile()[1])[0])
            )
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_what_says_who_is_alike_may_have_any_strides(mma):
    for p in (labelled(23, 7, "queue", "guide", dtype=F32), labelled(23, 7, "pair", "groups"),
              labelled(24, 7, masked=True, dtype=F32)):  # fmt: skip
        *z, ids, mask, groups, guide = p.inputs(list(p.tensors))
        apart = [t.repeat_interleave(2, 0)[::2] for t in (*z, ids, mask, groups, guide)]
        apart[4] = apart[4].repeat_interleave(3, 1)[:, ::3]
        apart[6] = guide.T.contiguous().T
        options = (*p.tensors[-2:], p.options(0))
        want, *_ = ops.loss((*z, ids, mask, groups, guide), *options)
        assert torch.equal(ops.loss(tuple(apart), *options)[0], want)


def launches(library, call):
    before = library.launches
    call()
    return library.launches - before


@pytest.mark.parametrize(
    "p, forward, threshold, backward",
    (
        (labelled(70, 9, dtype=F32), 3, 4, 5),
        (labelled(70, 9, "pair", "groups", dtype=F32), 3, 4, 5),
        (labelled(70, 9, "queue", "guide", dtype=F32), 4, 4, 12),  # three bands
        (viewed(70, 9, "cross", "guide", dtype=F32), 3, 3, 5),
        (labelled(9, 9, "queue", "guide", dtype=F64), 4, 3, 5),
        (logits(9, 40, dtype=F32), 1, 1, 1),
    ),
    ids=str,
)
def test_how_many_launches_a_call_takes(mma, p, forward, threshold, backward):
    stats, measured = HEX.forward(*p.forward()[1])[1], p.quantile()[1]
    assert stats.shape[0] == (12 if p.positives >= 0 else 9)
    assert launches(mma, lambda: HEX.forward(*p.forward()[1])) == forward
    assert launches(mma, lambda: HEX.quantile(*measured)) == threshold
    _, arguments = p.backward()
    assert launches(mma, lambda: HEX.backward(*arguments)) == backward


def of_zeros(N: int, M: int, dtype: torch.dtype, D: int = 128) -> Call:
    """Labelled rows, and a queue if M."""
    p = labelled(2, 2, "queue" if M else "self", M=1, dtype=dtype)
    x, y = torch.zeros(N, D, dtype=dtype), torch.zeros(N + M if M else 0, D, dtype=dtype)
    ids = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(y), dtype=torch.int64)
    return dataclasses.replace(p, tensors=(x, y, *ids, *p.tensors[4:]))


def work_of(p: Call):
    """Forward, threshold, adaptive and backward as calls."""
    *arguments, keep, tf32 = p.forward()[1]
    tracker, stats = ThresholdTracker.adaptive(), torch.zeros(12, len(p.tensors[0]))
    adaptive = (
        *arguments[:7],
        tracker.state,
        *arguments[8:],
        keep,
        tf32,
        False,
        *tracker.kernel_rule(),
    )
    options = (p.code, 0, 1 + p.positives, p.beta, False, 15)
    backward = (stats[0], *arguments[:7], f64(0.1), stats, torch.zeros(0), *options)
    return (lambda: HEX.forward(*arguments, keep, tf32), lambda: HEX.quantile(*p.quantile()[1]),
            lambda: HEX.adaptive(*adaptive), lambda: HEX.backward(*backward))  # fmt: skip


@pytest.mark.parametrize("N, M", ((40000, 0), (256, 65536), (4096, 65536)))
def test_the_launches_of_large_batches_fill_the_device(mma, N, M):
    processors = HOPPER[0]
    for call in work_of(of_zeros(N, M, BF16)):
        launched = mma.launches_of(call)
        assert all(blocks < 2**31 for _, blocks in launched)
        tiles = [x for x in launched if x[0] in ("forward", "threshold", "weights", "product")]
        few = [x for x in tiles if x[1] < 0.9 * processors]
        assert len(few) <= (2 if M == 65536 and N == 256 else 0), few  # of z1, which meets few


@pytest.mark.parametrize("dtype", (BF16, F32), ids=str)
def test_no_memory_grows_with_the_square_of_the_batch(mma, dtype):
    """The workspace, and the outputs: of every call as much for a row."""

    def largest(call):
        with torch.profiler.profile(profile_memory=True) as seen:
            mma.launches_of(call)
        return max(event.cpu_memory_usage for event in seen.events())

    for few, many in zip(*(work_of(of_zeros(N, 0, dtype)) for N in (1000, 2000)), strict=True):
        less, more = largest(few), largest(many)
        constant = 0 if few.__code__.co_names[-1] != "backward" else 2**25
        assert less < 1e4 * 1000 + constant and more < 2.1 * less + constant, (less, more)
    for call in work_of(of_zeros(40000, 0, dtype)):
        assert largest(call) < 40000 * 1e4 + 2**27  # where N^2 / 8 bytes are 200 MB
