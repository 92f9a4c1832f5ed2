# SPDX-License-Identifier: MIT
"""Numbers that are hard to come by: every NaN, numbers below the smallest normal one, rows as wide
as their type, batches of nothing, logits of -inf. Through every loss, and in every path of its
kernels.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from class_problems import HEX
from data import f64

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    class_ops,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    ops,
    reference,
)
from hex import reference_classes as classes

# bits of the type, of its mantissa
LAYOUT = {
    torch.float64: (64, 52),
    torch.float32: (32, 23),
    torch.bfloat16: (16, 7),
    torch.float16: (16, 10),
}
DTYPES = list(LAYOUT)


def of_bits(bits, dtype):
    """The number of these bits, which Python's own floats would not carry."""
    size = LAYOUT[dtype][0]
    integer = {64: torch.int64, 32: torch.int32, 16: torch.int16}[size]
    signed = bits - (1 << size) if bits >> (size - 1) else bits
    return torch.tensor(signed, dtype=integer).view(dtype)


def nans(dtype):
    """NaNs with every single bit of the payload, with all, with the lowest ones; of both signs."""
    size, mantissa = LAYOUT[dtype]
    infinite = (1 << (size - 1)) - (1 << mantissa)
    payloads = {1 << k for k in range(mantissa)} | {(1 << k) - 1 for k in range(1, mantissa + 1)}
    payloads |= {1 << (mantissa - 1) | 1 << k for k in range(mantissa - 1)}
    for sign, payload in itertools.product((0, 1), sorted(payloads)):
        value = of_bits(sign << (size - 1) | infinite | payload, dtype)
        assert value.isnan()
        yield value


def batch(B, D, dtype, *others):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, D), (B, D), *others)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def with_nan(tensors, k, nan):
    """Copies, of which number k has the NaN in its row 3, as leaves."""
    copies = [z.clone() for z in tensors]
    place = copies[k][3] if copies[k].dim() == 2 else copies[k][3, 1]
    place[-1] = nan
    return [z.requires_grad_(z.is_floating_point()) for z in copies]


# ---- a NaN of any bits --------------------------------------------------------------------------

# rows; tiles; tiles and lists; per-anchor negatives; and each again for the backward
PATHS = {
    "ntxent, rows": ("ntxent", 8, ()),
    "ntxent, tiles": ("ntxent", 96, ()),
    "query, rows": ("query", 8, ()),
    "query, tiles": ("query", 192, ()),
    "cross, rows": ("cross", 8, ()),
    "cross, tiles": ("cross", 192, ()),
    "shared, rows": ("ntxent", 8, ((11, 6),)),
    "shared, tiles": ("ntxent", 16, ((200, 6),)),
    "own": ("ntxent", 8, ((8, 5, 6),)),
}


def rows_that_see_it(mode, inputs):
    if len(inputs) == 3:
        mode = "shared" if inputs[2].dim() == 2 else "own"
    c, p, negative = reference.cosines(*(*(z.double() for z in inputs), None)[:3], mode)
    return ((c.isnan() & negative).any(1) | p.isnan()).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_nan_of_any_bits_reaches_every_row_that_sees_it(path, dtype):
    mode, B, others = PATHS[path]
    tensors = batch(B, 6, dtype, *others)
    for nan, k in itertools.product(nans(dtype), range(len(tensors))):
        for eps in (math.inf, 0.1, -2.0):
            inputs = with_nan(tensors, k, nan)
            rows = hex_loss(*inputs, eps=eps, mode=mode, reduction="none")
            rows.sum().backward()
            wanted = rows_that_see_it(mode, inputs)
            assert rows.isnan().tolist() == wanted, (nan, k, eps)
            for i in (0, 3):
                assert inputs[0].grad[i].isnan().all() or not wanted[i], (nan, k, eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_of_any_bits_among_many_does_not_move_a_threshold(dtype):
    """In one call with the loss, by lists of each row and with them all at once."""
    criterion = HEXLoss(0.1, threshold=ThresholdTracker.adaptive(over="negatives"))
    tensors = batch(128, 6, dtype)
    for nan in nans(dtype):
        value = criterion(*with_nan(tensors, 1, nan))
        assert value.isnan(), nan
        assert criterion.threshold.state[2] == 0  # updates
        assert criterion.last.hard.isnan() or criterion.last.share.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_a_nan_of_any_bits_reaches_every_row_of_a_labelled_batch(positives, dtype):
    features, _ = batch(20, 6, dtype)
    labels = torch.arange(20) // 4  # several positives, and of row 3 too
    for nan in nans(dtype):
        (inputs,) = with_nan([features], 0, nan)
        rows = hex_sup_con(
            inputs, labels, eps=0.1, temperature=0.2, positives=positives, reduction="none"
        )
        rows.sum().backward()
        assert rows.isnan().all() and inputs.grad.isnan().all(), nan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 1, 40], ids=["target", "first", "last"])
def test_a_nan_of_any_bits_reaches_its_row_of_logits_and_no_other(column, dtype):
    logits = 3 * torch.randn(5, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.zeros(5, dtype=torch.int64)
    for nan, eps in itertools.product(nans(dtype), (math.inf, 0.1, -20.0)):
        x = logits.clone()
        x[3, column] = nan
        x.requires_grad_()
        rows = hex_cross_entropy(x, target, eps=eps, temperature=0.1, reduction="none")
        rows.sum().backward()
        assert rows.isnan().tolist() == [False, False, False, True, False], nan
        assert x.grad[3].isnan().all() and x.grad[[0, 1, 2, 4]].isfinite().all(), nan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_threshold_or_a_temperature_that_is_any_nan_gives_nan(dtype):
    z0, z1 = batch(8, 6, torch.float32)
    logits, target = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    for nan in nans(dtype):
        for eps, tau in ((nan, f64(0.1)), (f64(0.1), nan)):
            a = z0.clone().requires_grad_()
            hex_loss(a, z1, eps=eps, temperature=tau).backward()
            assert a.grad.isnan().all()
            x = logits.clone().requires_grad_()
            hex_cross_entropy(x, target, eps=eps, temperature=tau).backward()
            assert x.grad.isnan().all()


@pytest.mark.parametrize("mode", ["ntxent", "query", "cross"])
def test_a_nan_in_a_guide_reaches_the_rows_that_are_compared_with_it(mode):
    z0, z1, g0, g1 = batch(8, 6, torch.float32, (8, 3), (8, 3))
    whole = HEXLoss(0.1, threshold=0.1, mode=mode, reduction="none")
    for nan in nans(torch.float32):
        a, b = with_nan([z0, z1], 0, 1.0)
        (g,) = with_nan([g1], 0, nan)
        rows = whole(a, b, guide=(g0, g.detach()))
        rows.sum().backward()
        # row 3 of z1 is in every row, but as the positive of row 3 of z0 it is not compared
        wanted = [i != 3 for i in range(8)]
        if mode == "cross":
            wanted += [i == 3 for i in range(8)]
        elif mode == "ntxent":
            wanted += [True] * 8
        assert rows.isnan().tolist() == wanted, nan
        assert all(a.grad[i].isnan().all() for i in range(8) if wanted[i])


def test_a_nan_in_the_guide_of_an_anchors_own_negatives_reaches_that_row():
    z0, z1, n, g0, g1, gn = batch(8, 6, torch.float32, (8, 5, 6), (8, 3), (8, 3), (8, 5, 3))
    gn[3, 1, 0] = math.nan
    rows = HEXLoss(0.1, threshold=0.1, reduction="none")(z0, z1, n, guide=(g0, g1, gn))
    assert rows.isnan().tolist() == [i == 3 for i in range(8)]


def test_the_composed_formulas_agree_about_a_guide_that_is_nan(monkeypatch):
    z0, z1, g0, g1 = batch(8, 6, torch.float32, (8, 3), (8, 3))
    g1[3, 0] = math.nan
    ours = HEXLoss(0.1, threshold=0.1, reduction="none")
    rows = ours(z0, z1, guide=(g0, g1))
    without_kernels(monkeypatch)
    plain = ours(z0, z1, guide=(g0, g1))
    torch.testing.assert_close(rows, plain, equal_nan=True)
    assert rows.isnan().any() and not rows.isnan().all()


# ---- numbers below the smallest normal one ------------------------------------------------------


@pytest.fixture
def flush():
    """Has torch's calling thread, and that one alone, take such numbers for 0; or not."""
    assert torch.set_flush_denormal(True)
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


def small_inputs(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 64), (512, 64), (512, 96))
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


def results(z0, z1, logits):
    """Of every loss: values, gradients and a threshold."""
    labels = torch.arange(512) // 8
    adaptive = HEXLoss(0.1, threshold=ThresholdTracker.adaptive(over="negatives"))
    options = {"temperature": 0.1, "reduction": "none"}
    out = []
    for value, inputs in (
        (adaptive(z0, z1), (z0, z1)),
        (hex_loss(z0, z1, eps=0.0, **options), (z0, z1)),
        (hex_sup_con(z0, labels, eps=0.1, **options), (z0,)),
        (hex_cross_entropy(logits, labels, eps=0.0, **options), (logits,)),
    ):
        out += [value.detach(), *torch.autograd.grad(value.sum(), inputs)]
    return [*out, adaptive.threshold.state.clone()]


def same_bits(x, y):
    """Not torch.equal, for which a flushing thread's small numbers are all 0."""
    x, y = (z.reshape(-1).view(torch.uint8) for z in (x, y))
    return torch.equal(x, y)


# half's subnormals; those of float, in bfloat16 and float32, and rows whose squares are; double's
SMALL = [(torch.float16, 2e-5), (torch.bfloat16, 1e-39), (torch.float32, 1e-40),
         (torch.float32, 1e-21), (torch.float64, 1e-310), (torch.float64, 1.0)]  # fmt: skip


@pytest.mark.parametrize("dtype, scale", SMALL, ids=str)
def test_no_bit_depends_on_what_a_thread_does_with_small_numbers(dtype, scale, threads, flush):
    flush(False)
    threads(1)
    inputs = small_inputs(dtype, scale)
    wanted = results(*inputs)
    for count in (1, 2, 8):
        threads(count)
        torch.zeros(1 << 20).add_(1)  # starts the pool's threads, of which none flushes
        flush(True)
        got = results(*inputs)
        flush(False)
        assert all(same_bits(x, y) for x, y in zip(wanted, got, strict=True)), count


def test_the_calling_thread_flushes_afterwards_as_before(flush):
    flush(False)
    tiny = torch.tensor(1e-40)
    z0, z1 = batch(8, 6, torch.float32)
    for on in (True, False):
        flush(on)
        hex_loss(z0, z1, eps=0.1)
        with pytest.raises(RuntimeError, match="mode"):
            HEX.row_range(z0, z1, z0[:0], 7)
        assert (tiny * 1.0 == 0) == on


def test_every_half_is_the_float_that_it_is():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).reshape(-1, 1)  # a row each: one logit, and 0
    logits = torch.cat([halves, torch.zeros_like(halves)], 1)
    target = torch.zeros(len(logits), dtype=torch.int64)
    ours = hex_cross_entropy(logits, target, eps=2.0, temperature=1.0, reduction="none")
    same = hex_cross_entropy(logits.float(), target, eps=2.0, temperature=1.0, reduction="none")
    assert torch.equal(ours.isnan(), same.isnan())
    assert torch.equal(ours.nan_to_num(), same.nan_to_num())
    low, high = HEX.logits_row_range(logits, target, f64(1.0), False)
    finite = halves.squeeze(1).isfinite()
    assert torch.equal(
        torch.maximum(-low, high)[finite], halves.float().abs().clamp(max=1)[finite, 0]
    )


# ---- quantiles of logits ------------------------------------------------------------------------


def sorted_quantile(logits, tau, quantile):
    """By a sort in float64, of what the kernel has: products in its type, in [-1, 1]."""
    c = (logits.double() * tau).clamp(-1, 1).sort(1).values
    return c[:, round(quantile * (c.shape[1] - 1))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tau", [1.0, 0.0078125, 4.0])  # powers of two: products are exact
def test_the_quantile_of_any_finite_row_is_that_of_a_sort(tau, dtype):
    generator = torch.Generator().manual_seed(0)
    most = torch.finfo(dtype).max

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    for _ in range(40):
        n = 1 + int(40 * random())
        ordinary = (2 * random(n) - 1) / tau
        size = torch.exp((2 * random(n) - 1) * 80)  # of all sizes
        extreme = torch.tensor([most, -most, most / 2, -most / 2, 0.0, -0.0, 5e-324, 1.0])
        chosen = extreme.double()[(8 * random(n)).long()]
        kind = (3 * random(n)).long()
        row = torch.where(kind == 0, ordinary, torch.where(kind == 1, size * ordinary, chosen))
        row = row.clamp(-most, most).to(dtype)[None]
        for q in (0.0, 1.0, 0.5, random().item()):
            for target in (0, n - 1):
                got = HEX.logits_threshold(row, torch.tensor([target]), f64(tau), q, False, False)
                assert got == sorted_quantile(row, tau, q), (row, q)
        low, high = HEX.logits_row_range(row, torch.tensor([0]), f64(tau), False)
        assert low == sorted_quantile(row, tau, 0.0) and high == sorted_quantile(row, tau, 1.0)


def test_the_quantile_of_a_row_wider_than_the_largest_float():
    row = torch.tensor([[9, -3e38, -1, 0.25, 0.6, 3e38]])
    one = f64(1.0)
    assert HEX.logits_threshold(row, torch.tensor([0]), one, 0.4, False, False) == 0.25


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_columns_masked_with_the_lowest_number_are_cosines_of_minus_one(tau, monkeypatch):
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    logits[:, 4:7] = torch.finfo(torch.float32).min
    target = torch.arange(6) % 4
    criterion = HEXCrossEntropyLoss(tau, threshold=ThresholdTracker.adaptive(0.5))
    value = criterion(logits, target)
    eps = criterion.last.eps
    assert eps == pytest.approx(sorted_quantile(logits, tau, 0.5).mean().item())
    assert value.isfinite()
    without_kernels(monkeypatch)
    assert criterion(logits, target).item() == pytest.approx(value.item())
    torch.testing.assert_close(criterion.last.eps, eps)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_row_of_logits_that_is_not_finite_has_no_quantile(value, monkeypatch):
    logits, target = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    logits[1, 3] = value
    for kernels in (True, False):
        if not kernels:
            without_kernels(monkeypatch)
        for over in ("all", "negatives"):
            assert class_ops.logits_threshold(logits, target, f64(1.0), 0.5, over, False).isnan()
        low, high = class_ops.logits_row_range(logits, target, f64(1.0), False)
        assert low.isnan().tolist() == high.isnan().tolist() == [False, True, False]


# ---- a target of -inf ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_target_of_minus_infinity_has_torchs_loss_and_gradient(dtype, kernels, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    logits = torch.randn(7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.arange(7)
    logits[2, 2] = logits[5, 1] = logits[5, 5] = -math.inf
    logits[6] = -math.inf  # nothing is left: NaN
    x, y = (logits.to(dtype).requires_grad_() for _ in range(2))
    ours = hex_cross_entropy(x, target, eps=math.inf, temperature=0.1, reduction="none")
    torchs = F.cross_entropy(y.double(), target, reduction="none")
    slack = {"rtol": 8 * torch.finfo(ours.dtype).eps, "atol": 8 * torch.finfo(ours.dtype).eps}
    torch.testing.assert_close(ours.double(), torchs, equal_nan=True, **slack)
    assert ours[2] == ours[5] == math.inf
    (dx,) = torch.autograd.grad(ours[:6].sum(), x)
    (dy,) = torch.autograd.grad(torchs[:6].sum(), y)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(dx[:6].double(), dy[:6].double(), rtol=8 * unit, atol=8 * unit)
    assert dx[2, 2] == -1


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_gradient_of_a_target_of_minus_infinity_is_that_of_a_target_far_below(beta, variant):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.zeros(4, dtype=torch.int64)
    grads = []
    for lowest in (-math.inf, -1e3):  # exp(-1e3) is 0
        x = logits.clone()
        x[:, 0] = lowest
        for reference in (False, True):
            x = x.detach().requires_grad_()
            if reference:
                rows = classes.logits_rows(
                    x, target, x[:0], f64(0.05), f64(0.1), False, ops.VARIANTS[variant], beta, 0.1
                )[0]
            else:
                rows = hex_cross_entropy(x, target, eps=0.05, temperature=0.1, beta=beta,
                                         variant=variant, reduction="none")  # fmt: skip
            assert ((rows == math.inf) if lowest == -math.inf else rows.isfinite()).all()
            rows.sum().backward()
            grads.append(x.grad)
    for other in grads[:3]:
        torch.testing.assert_close(other, grads[3], rtol=1e-12, atol=1e-14)


# ---- batches of nothing -------------------------------------------------------------------------


def without_kernels(monkeypatch):
    monkeypatch.setattr(ops, "_KERNELS", {"meta"})
    monkeypatch.setattr(class_ops, "_KERNELS", {"meta"})
    monkeypatch.setattr(ops, "_warned", {"cpu"})
    monkeypatch.setattr(class_ops, "_warned", {"cpu"})


SCHEDULES = {
    "adaptive": lambda: ThresholdTracker.adaptive(over="negatives"),
    "whole": lambda: ThresholdTracker.adaptive(over="all"),
    "lagged": lambda: ThresholdTracker.adaptive(over="negatives", lagged=True, momentum=0.5),
    "warm-up": lambda: ThresholdTracker.adaptive(over="negatives", warmup_epochs=1),
    "fixed": lambda: ThresholdTracker.fixed(0.3),
    "rows": lambda: ThresholdTracker.fixed(0.3, normalize_rows=True),
    "none": lambda: None,
}


@pytest.fixture(params=[True, False], ids=["kernels", "composed"])
def kernels(request, monkeypatch):
    if not request.param:
        without_kernels(monkeypatch)


def leaf(*shape):
    return torch.zeros(shape, requires_grad=True)


def check_nothing(criterion, inputs, *args, **kwargs):
    """Loss 0 and gradients of 0, and a batch that comes after is none the worse for it."""
    for reduction in ("mean", "sum", "none"):
        criterion.reduction = reduction
        value = criterion(*inputs, *args, **kwargs)
        if reduction == "none":
            assert (value == 0).all()
        else:
            assert value == 0 and not torch.signbit(value)
        for grad in torch.autograd.grad(value.sum(), inputs, allow_unused=True):
            assert grad is None or (grad == 0).all()
        if criterion.threshold is not None and inputs[0].shape[0] == 0:
            assert criterion.threshold.state[2] == 0  # updates
        assert criterion.last.hard == 0 and criterion.last.share == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", ["ntxent", "query", "cross"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_an_empty_batch_of_views_has_loss_0(mode, variant, schedule, kernels):
    def criterion():
        return HEXLoss(0.1, threshold=SCHEDULES[schedule](), mode=mode, variant=variant)

    empty, nobody = leaf(0, 5), torch.zeros(0, dtype=torch.int64)
    others = torch.zeros(7, dtype=torch.int64)
    for D in (5, 0):
        z = leaf(0, D), leaf(0, D)
        check_nothing(criterion(), z)
        check_nothing(criterion(), (*z, leaf(7, D)))
        check_nothing(criterion(), (*z, leaf(0, D)))
        check_nothing(criterion(), (*z, leaf(0, 7, D)))
        check_nothing(criterion(), (*z, leaf(0, 0, D)))
        check_nothing(criterion(), z, groups=nobody)
        check_nothing(criterion(), z, guide=(empty, empty))
        check_nothing(criterion(), (*z, leaf(7, D)), groups=(nobody, others))
        check_nothing(criterion(), (*z, leaf(7, D)), guide=(empty, empty, leaf(7, 5)))
        check_nothing(criterion(), (*z, leaf(0, 7, D)), groups=(nobody, torch.zeros(0, 7).long()))
        check_nothing(criterion(), (*z, leaf(0, 7, D)), guide=(empty, empty, leaf(0, 7, 5)))
        # rows without negatives
        check_nothing(criterion(), (leaf(4, D), leaf(4, D), leaf(0, D)))
        check_nothing(criterion(), (leaf(4, D), leaf(4, D), leaf(4, 0, D)))
        check_nothing(criterion(), (leaf(1, D), leaf(1, D)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("positives", ["outside", "inside"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_an_empty_batch_of_labels_has_loss_0(positives, variant, schedule, kernels):
    def criterion():
        return HEXSupConLoss(
            0.1, threshold=SCHEDULES[schedule](), variant=variant, positives=positives
        )

    nobody = torch.zeros(0, dtype=torch.int64)
    for D in (5, 0):
        for shape in ((0, D), (0, 2, D)):
            check_nothing(criterion(), (leaf(*shape),), nobody)
            check_nothing(criterion(), (leaf(*shape),), nobody, groups=nobody)
        check_nothing(criterion(), (leaf(0, 2, D),))
        check_nothing(criterion(), (leaf(0, 2, D),), mask=torch.zeros(0, 0, dtype=torch.bool))
        check_nothing(criterion(), (leaf(1, D),), torch.zeros(1, dtype=torch.int64))
        check_nothing(criterion(), (leaf(3, D),), torch.arange(3))  # no positives


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("self_column", [False, True])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_an_empty_batch_of_logits_has_loss_0(variant, self_column, schedule, kernels):
    for C in (4, 1, 0):
        criterion = HEXCrossEntropyLoss(
            0.1, threshold=SCHEDULES[schedule](), self_column=self_column, variant=variant
        )
        check_nothing(criterion, (leaf(0, C),), torch.zeros(0, dtype=torch.int64))


def test_an_empty_batch_of_the_baseline_has_loss_0(kernels):
    check_nothing(InfoNCELoss(0.1), (leaf(0, 5), leaf(0, 5)))


@pytest.mark.parametrize("N, M, D", [(0, 0, 3), (0, 4, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_the_operators_of_pairs_take_sides_of_nothing(N, M, D, kernels):
    x, y = leaf(N, D), leaf(M, D)
    ids, others = torch.zeros(N).long(), torch.zeros(M).long()
    mask = torch.empty(0, 0, dtype=torch.bool)
    none = torch.empty(0).long()
    for pairing in (0, 1, 2):
        given = (y[:0], ids, none) if pairing == 0 else (y, ids, others)
        if pairing == 2 and M < N:
            continue
        for groups, guides in (
            ((none, none), (x[:0], y[:0])),
            ((ids, given[2]), (x[:0], y[:0])),
            ((none, none), (leaf(N, 2), leaf(0 if pairing == 0 else M, 2))),
        ):
            value, hard, share = class_ops.labelled_loss(
                x, *given, mask, *groups, *guides, f64(0.1), f64(0.1), pairing, 1, 0, 0, 1.0, 0.1
            )
            value.backward()
            assert value.isfinite() and hard.shape == share.shape == (N,)
        low, high = class_ops.labelled_row_range(x, *given, mask, pairing)
        assert low.shape == high.shape == (N,)
        for over in ("all", "negatives"):
            eps = class_ops.labelled_threshold(x, *given, mask, pairing, 0.5, over)
            assert eps.isnan() or N > 0


@pytest.mark.parametrize("mode", range(5))
def test_the_operators_of_views_take_batches_of_nothing(mode, kernels):
    for B, K, D in itertools.product((0, 1, 3), (0, 2), (0, 4)):
        shapes = (B, D), (B, D), (0, D) if mode < 3 else (K, D) if mode == 3 else (B, K, D)
        inputs = [leaf(*shape) for shape in shapes]
        value, hard, _ = ops.loss(*inputs, f64(0.1), f64(0.1), mode, 1, 0, 1.0, 0.1)
        value.backward()
        assert value.isfinite()
        low, high = ops.row_range(*inputs, mode)
        assert low.shape == high.shape == hard.shape
        for over in ("all", "negatives"):
            eps = ops.threshold(*inputs, mode, 0.5, over)
            assert eps.isnan() or B > 0


# ---- what the raw operators are given -----------------------------------------------------------


def raw_calls():
    z, n = torch.zeros(4, 3), torch.zeros(0, 3)
    one, ids, none = f64(0.1), torch.arange(4), torch.empty(0).long()
    logits, mask, no = torch.zeros(4, 6), torch.empty(0, 0, dtype=torch.bool), torch.empty(0, 0)
    state = torch.zeros(4, dtype=torch.int64)
    pairs = (z, z[:0], ids, none, mask)
    stats, class_stats = torch.zeros(9, 8), torch.zeros(12, 4)
    return {
        "forward": (z, z.clone(), n, one, one, 0, 1, 0, 1.0, 0.1, False),
        "adaptive": (z, z.clone(), n, state, one, 0, 1, 0, 1.0, 0.1, 0.5, True, 0.0, False, False,
                     0, 1.0, False),
        "backward": (one, z, z.clone(), n, one, stats, z.new_empty(0), 0, 1, 1.0, 15),
        "threshold": (z, z.clone(), n, 0, 0.5, True),
        "row_range": (z, z.clone(), n, 0),
        "labelled_forward": (*pairs, none, none, no, no, one, one, 0, 1, 0, 0, 1.0, 0.1),
        "labelled_backward": (one, *pairs, none, none, no, no, one, class_stats, 0, 1, 1.0, 7),
        "labelled_threshold": (*pairs, 0, 0.5, True),
        "labelled_row_range": (*pairs, 0),
        "logits_forward": (logits, ids, no, one, one, False, 1, 0, 1.0, 0.1),
        "logits_backward": (one, logits, ids, no, one, class_stats, 1, 1.0, 3),
        "logits_threshold": (logits, ids, one, 0.5, True, False),
        "logits_row_range": (logits, ids, one, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", raw_calls())
def test_one_meta_tensor_among_others_is_refused(name):
    args = raw_calls()[name]
    getattr(HEX, name)(*args)
    parameters = [a.name for a in getattr(HEX, name).default._schema.arguments]
    tensors = [k for k, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for k in tensors:
        mixed = [a.to("meta") if i == k else a for i, a in enumerate(args)]
        named = parameters[tensors[1] if k == tensors[0] else k]
        with pytest.raises(RuntimeError, match=rf"{named}: got device \w+, wanted that of"):
            getattr(HEX, name)(*mixed)


@pytest.mark.parametrize("name", raw_calls())
def test_tensors_that_claim_more_rows_than_there_can_be_are_refused_by_name(name):
    args = raw_calls()[name]
    parameters = [a.name for a in getattr(HEX, name).default._schema.arguments]
    for wide in ((1 << 60, 1), (1 << 27) + 1, (1, 1 << 60)):
        shape = wide if isinstance(wide, tuple) else (wide, 1)
        for k, name_k in enumerate(parameters):
            if name_k not in ("z0", "z1", "negatives", "x", "y", "guide", "logits", "score"):
                continue
            mixed = list(args)
            mixed[k] = torch.zeros(1, 1).expand(shape)
            if name_k == "z0":  # as many features in all
                mixed[k + 1] = torch.zeros(1, 1).expand(shape)
                mixed[k + 2] = torch.zeros(1, 1).expand(0, shape[1])
            elif name_k == "x":
                mixed[k + 1] = torch.zeros(1, 1).expand(0, shape[1])
            wanted = rf"{name_k}: expected (at most 134217728 rows|.*that fits|.*rows|.*features|.*none|as many|the shape)"
            with pytest.raises(RuntimeError, match=wanted):
                getattr(HEX, name)(*mixed)


def test_a_mask_is_true_where_its_byte_is_not_zero():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, generator=generator, requires_grad=True)
    truth = torch.rand(6, 6, generator=generator) < 0.4
    truth = truth | truth.T
    bytes_ = torch.where(truth, 2 + 50 * torch.arange(6, dtype=torch.int64)[:, None], 0)
    mask = bytes_.to(torch.uint8).view(torch.bool)
    none, no = torch.empty(0).long(), torch.empty(0, 0)

    def run(mask):
        args = (z, z[:0], none, none, mask, none, none, no, no, f64(0.1), f64(0.1))
        value, hard, _ = class_ops.labelled_loss(*args, 0, 0, 0, 0, 1.0, 0.1)
        return value.detach(), hard, *torch.autograd.grad(value.sum(), z)

    assert all(torch.equal(x, y) for x, y in zip(run(mask), run(truth), strict=True))


def test_targets_that_are_written_to_meanwhile_are_no_address():
    """Another thread writes columns that are none, which are refused or not yet there."""
    import threading

    logits, target = torch.zeros(4096, 8), torch.zeros(4096, dtype=torch.int64)
    running = True

    def write():
        while running:
            target.fill_(1 << 40)
            target.zero_()

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    for _ in range(200):
        try:
            hex_cross_entropy(logits, target, eps=2.0, temperature=0.1)
        except RuntimeError as error:
            assert "target: expected columns in" in str(error)
            refused += 1
    running = False
    writer.join()
    assert refused  # or the test has shown nothing
