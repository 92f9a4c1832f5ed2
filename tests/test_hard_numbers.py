# SPDX-License-Identifier: MIT
"""Numbers that are hard to come by: every NaN, numbers below the smallest normal one, rows as wide
as their type, logits of -inf. Through every loss, and in every path of its kernels.
"""

import itertools
import math

import operators
import pytest
import torch
import torch.nn.functional as F
from conftest import without_kernels
from data import FORMS, f64, form, nans

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    ThresholdTracker,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    reference,
)
from hex.problem import of_logits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    "paired": ("ntxent", 8, ((8, 5, 6),)),
}


def rows_that_see_it(mode, inputs):
    if len(inputs) == 3:
        mode = "unpaired" if inputs[2].dim() == 2 else "paired"
    c, p, negative = reference.cosines(*(*(z.double() for z in inputs), None)[:3], mode)
    return ((c.isnan() & negative).any(1) | p.isnan()).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_a_nan_of_any_bits_reaches_every_row_that_sees_it(path, dtype):
    mode, B, others = PATHS[path]
    tensors = batch(B, 6, dtype, *others)
    step = {torch.float64: 7, torch.float32: 3}.get(dtype, 1)
    seen = [rows_that_see_it(mode, with_nan(tensors, k, math.nan)) for k in range(len(tensors))]
    for n, nan in enumerate(nans(dtype, step)):
        for k in range(len(tensors)):
            inputs = with_nan(tensors, k, nan)
            eps = (math.inf, 0.1, -2.0)[n % 3]
            rows = hex_loss(*inputs, eps=eps, mode=mode, reduction="none")
            rows.sum().backward()
            wanted = seen[k]
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
            operators.row_range(z0, z1, z0[:0], 7)
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
    low, high = of_logits(logits, target, 1.0).row_range()
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
                got = of_logits(row, torch.tensor([target]), tau).threshold(q, "all")
                assert got == sorted_quantile(row, tau, q), (row, q)
        low, high = of_logits(row, torch.tensor([0]), tau).row_range()
        assert low == sorted_quantile(row, tau, 0.0) and high == sorted_quantile(row, tau, 1.0)


def test_the_quantile_of_a_row_wider_than_the_largest_float():
    row = torch.tensor([[9, -3e38, -1, 0.25, 0.6, 3e38]])
    assert of_logits(row, torch.tensor([0]), 1.0).threshold(0.4, "all") == 0.25


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_columns_masked_with_the_lowest_number_are_cosines_of_minus_one(tau, monkeypatch):
    logits = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    logits[:, 4:7] = torch.finfo(torch.float32).min
    target = torch.arange(6) % 4
    rule = ThresholdTracker.adaptive(0.5, over="all")
    criterion = HEXCrossEntropyLoss(tau, threshold=rule)
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
            assert of_logits(logits, target, 1.0).threshold(0.5, over).isnan()
        low, high = of_logits(logits, target, 1.0).row_range()
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


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_the_gradient_of_a_target_of_minus_infinity_is_that_of_a_target_far_below(beta, variant):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.zeros(4, dtype=torch.int64)
    grads = []
    for lowest in (-math.inf, -1e3):  # exp(-1e3) is 0
        x = logits.clone()
        x[:, 0] = lowest
        for composed in (False, True):
            x = x.detach().requires_grad_()
            if composed:
                p, options = of_logits(x, target, 0.1), form(variant)
                code = reference.VARIANTS.index(options["variant"])
                rows = reference.problem_rows(
                    *p.inputs, f64(0.05), p.tau, p.mode, 1, beta, code, 0.1, options["decoupled"]
                )[0]
            else:
                rows = hex_cross_entropy(x, target, eps=0.05, temperature=0.1, beta=beta,
                                         reduction="none", **form(variant))  # fmt: skip
            assert ((rows == math.inf) if lowest == -math.inf else rows.isfinite()).all()
            rows.sum().backward()
            grads.append(x.grad)
    for other in grads[:3]:
        torch.testing.assert_close(other, grads[3], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_debiased_sum_of_exactly_0_is_at_its_floor_though_that_underflows(kernels, monkeypatch):
    """q = r - tau_plus e_0 with r = 1 and e_0 = 2, and exp(-1/tau) is 0 in float64."""
    if not kernels:
        without_kernels(monkeypatch)
    logits = torch.tensor([[math.log(2), 0]], dtype=torch.float64, requires_grad=True)
    loss = hex_cross_entropy(
        logits, torch.tensor([0]), eps=-2.0, temperature=1e-3, tau_plus=0.5, decoupled=True
    )
    assert loss.item() == pytest.approx(-1000 - math.log(2), rel=1e-15)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[-1, 0]]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_a_positive_whose_exponential_overflows_beside_the_denominator_has_a_loss(
    positives, kernels, monkeypatch
):
    """Cosines of 1 with it and of 0 with the 6 negatives, all in H: Q = 6, or 6 exp(-1/tau)."""
    if not kernels:
        without_kernels(monkeypatch)
    z = torch.eye(4, 8, dtype=torch.float64)[:, None].repeat(1, 2, 1).requires_grad_()
    for tau_plus, wanted in ((0.0, math.log(6) - 2048), (0.1, math.log(6) - 4096)):
        loss = hex_sup_con(z, eps=-0.5, temperature=2**-11, tau_plus=tau_plus, decoupled=True,
                           positives=positives)  # fmt: skip
        assert loss.item() == pytest.approx(wanted, rel=1e-14)
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("variant", FORMS)
def test_a_target_of_minus_infinity_alone_in_the_denominator_is_nan_as_torchs(
    variant, kernels, monkeypatch
):
    if not kernels:
        without_kernels(monkeypatch)
    logits = torch.tensor([[1.0, 2, -math.inf, 4], [-math.inf] * 4, [1, 2, 3, 4]]).requires_grad_()
    target = torch.tensor([2, 2, 2])
    rows = hex_cross_entropy(
        logits, target, eps=-20.0, temperature=0.1, reduction="none", **form(variant)
    )
    (gradient,) = torch.autograd.grad(rows.sum(), logits)
    if not variant.startswith("paper"):  # all negatives are in H, which it leaves out
        assert rows.isnan().tolist() == [True, True, False]
        assert gradient[0, 2].isnan() and gradient[2].isfinite().all()
        assert (gradient[2] == 0).all()
    else:
        assert rows[0] == math.inf and rows.isnan().tolist() == [False, True, False]
        assert gradient[0, 2] == -1
    assert gradient[1, 2].isnan() and not gradient[2].isnan().any()
    assert F.cross_entropy(logits[1:2], target[1:2]).isnan()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("columns", [2, 700])
@pytest.mark.parametrize("column", [1, 0], ids=["target", "negative"])
def test_a_logit_of_infinity_is_nan_as_torchs(column, columns, variant, kernels, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    for dtype in DTYPES:
        logits = torch.linspace(-8, 8, 20 * columns).view(20, columns).to(dtype)
        logits[3, column] = math.inf
        target = torch.ones(20, dtype=torch.int64)
        logits.requires_grad_()
        wanted = F.cross_entropy(logits.float(), target, reduction="none").isnan()
        assert wanted.tolist() == [i == 3 for i in range(20)]
        options = dict(reduction="none", **form(variant))
        calls = [
            hex_cross_entropy(logits, target, eps=eps, temperature=0.1, **options)
            for eps in (math.inf, 2.0, 0.3, -2.0)
        ]
        for rows in (*calls, HEXCrossEntropyLoss(0.1, **options)(logits, target)):
            assert torch.equal(rows.isnan(), wanted)
            (gradient,) = torch.autograd.grad(rows.sum(), logits)
            assert gradient[3].isnan().any() and gradient[[0, 2, 4, 19]].isfinite().all()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("positives", ["inside", "outside"])
@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("eps", [math.inf, 0.3])
def test_a_nan_among_positives_alone_is_seen(eps, variant, positives, kernels, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        z[3, 1] = math.nan
    rows = hex_sup_con(
        z, torch.zeros(6).int(), eps=eps, positives=positives, reduction="none", **form(variant)
    )
    assert rows.isnan().all()
    assert torch.autograd.grad(rows.sum(), z)[0].isnan().all()


@pytest.mark.parametrize("kernels", [True, False])
def test_a_row_without_positives_that_holds_a_nan_has_a_gradient_of_nan(kernels, monkeypatch):
    if not kernels:
        without_kernels(monkeypatch)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        z[3, 1] = math.nan
    rows = hex_sup_con(z, torch.arange(6), eps=0.3, reduction="none")
    assert rows.isnan().all()
    for row in range(6):
        (gradient,) = torch.autograd.grad(rows[row], z, retain_graph=True)
        assert gradient[row].isnan().all()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_columns_leave_the_derivative_in_the_temperature_finite(dtype, kernels, monkeypatch):
    """Their sum is -inf, and 0 times that is not 0."""
    if not kernels:
        without_kernels(monkeypatch)
    least = torch.finfo(dtype).min
    logits = torch.tensor([[3, least, least, 5]], dtype=dtype)
    for variant in FORMS:
        tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        options = dict(eps=0.4, temperature=tau, **form(variant))
        hex_cross_entropy(logits, torch.tensor([0]), **options).backward()
        assert tau.grad.isfinite()
