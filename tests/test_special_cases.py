# SPDX-License-Identifier: MIT
"""Special cases: what is exact, zero or NaN, by definition and not by tolerance.

Each section is a row of the table of cases in docs/math.md: H empty, membership, the floor, a
threshold that is no number, rows of zeros, tiny and huge rows, rows that are not finite, no
negatives, G empty, one row or feature, dtypes. Empty batches are in test_empty.py.
"""

import math

import operators
import pytest
import torch
from conftest import DTYPES, Problem, at_the_floor, check, check_loss, problem
from data import FORMS, INF, MODES, NAN, f64, form, leaves

from hex import (
    HEXLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    hex_loss,
    info_nce,
    ops,
    reference,
)
from hex.state import CANDIDATE, SKIPPED

VARIANTS = FORMS


def results(p: Problem, reduction: str = "none"):
    """The loss and every gradient of its sum."""
    inputs, tau = leaves(*p.inputs), f64(p.tau).requires_grad_()
    loss = p.loss(*inputs, tau=tau, reduction=reduction)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), (*inputs, tau)))


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def arguments(p: Problem):
    """Of the functions: embeddings, negatives or none, and the mode for the case without."""
    return (*p.inputs, None)[:3], p.mode if len(p.inputs) == 2 else "ntxent"


# ---- H empty ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_with_h_empty_the_loss_is_infonce_bit_for_bit(mode, dtype):
    p = problem("cluster", 13, 7, mode, dtype=dtype)
    z, name = arguments(p)
    inputs = leaves(*z)
    infonce = info_nce(*inputs, temperature=p.tau, mode=name, reduction="none")
    grads = torch.autograd.grad(infonce.sum(), [x for x in inputs if x is not None])
    for eps in (f64(INF), f64(1.0), f64(7.0), torch.full((p.rows,), 1.0, dtype=torch.float64)):
        for beta, tau_plus in ((1.0, 0.1), (0.0, 0.9), (1.5, 0.0)):
            got = results(p.with_(eps=eps, beta=beta, tau_plus=tau_plus))
            assert torch.equal(got[0], infonce)
            assert same_bits(got[1:-1], grads)
    for module in (
        HEXLoss(p.tau, threshold=None, mode=name, reduction="none"),
        InfoNCELoss(p.tau, mode=name, reduction="none"),
        HEXLoss(p.tau, threshold=INF, mode=name, reduction="none"),
    ):
        assert torch.equal(module(*z), infonce)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_whose_h_is_empty_is_the_infonce_row_beside_rows_whose_h_is_not(mode):
    for dtype in (torch.float64, torch.float32):
        p = problem("cluster", 13, 7, mode, dtype=dtype)
        eps = torch.full((p.rows,), 0.2, dtype=torch.float64)
        eps[::2] = 1.0
        mixed = p.with_(eps=eps)
        infonce = p.with_(eps=f64(INF))
        a, b = mixed.loss(*p.inputs), infonce.loss(*p.inputs)
        assert torch.equal(a[::2], b[::2])
        assert not (a == b)[counts(mixed) > 0].any()
        assert (counts(mixed)[1::2] > 0).any()


@pytest.mark.parametrize("mode", MODES)
def test_without_weights_and_debiasing_every_threshold_is_infonce(mode):
    for dtype, ulps in ((torch.float64, 64), (torch.float32, 16)):
        p = problem("cluster", 13, 7, mode, dtype=dtype, beta=0.0, tau_plus=0.0)
        wanted = p.with_(eps=f64(INF)).loss(*p.inputs)
        for eps in (-1.5, -0.2, 0.1, 0.4, 0.8):
            got = p.with_(eps=f64(eps)).loss(*p.inputs)
            # max(q, floor) is q: a sum in another order, of a row whose floor is below its terms
            torch.testing.assert_close(got, wanted, rtol=ulps * torch.finfo(dtype).eps, atol=0)


# ---- membership ---------------------------------------------------------------------------------


def counts(p: Problem):
    return operators.forward(*p.raw())[1][ops.COUNT]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_cosine_that_rounding_carries_beyond_one_is_not_above_one(mode, dtype):
    p = problem("collapsed", 23, 65, mode, dtype=dtype)
    assert (counts(p.with_(eps=f64(1.0))) == 0).all()
    assert (counts(p.with_(eps=f64(0.99))) == counts(p.with_(eps=f64(-2.0)))).all()


@pytest.mark.parametrize("mode", MODES)
def test_below_minus_one_everything_is_in_h_and_the_positive_never(mode):
    B, K = 13, 11
    negatives = {"ntxent": 2 * B - 2, "query": B - 1, "cross": B - 1, "unpaired": K, "paired": K}
    for dtype in DTYPES:
        p = problem("gauss", B, 7, mode, K=K, dtype=dtype, eps=f64(-1.0001))
        assert (counts(p) == negatives[mode]).all()
        opposed = p.with_(
            inputs=(
                p.inputs[0][:1].expand(B, 7),
                *(-p.inputs[0][0].expand_as(z) for z in p.inputs[1:]),
            )
        )
        assert (counts(opposed) == negatives[mode]).all()


def test_a_cosine_equal_to_the_threshold_is_not_in_h():
    """Exact cosines 1/2 and 0: rows of 1 and -1 in four places."""
    z = torch.tensor([[1.0, 1, 1, 1]])
    negatives = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, -1]])  # cosines 0.5, 0
    for dtype in DTYPES:
        p = Problem((z.to(dtype), z.to(dtype), negatives.to(dtype)), "unpaired")
        for eps, inside in (
            (0.5, 0),
            (math.nextafter(0.5, 0), 1),
            (math.nextafter(0.5, 1), 0),
            (0.0, 1),
            (-1e-300, 2),
        ):
            assert counts(p.with_(eps=f64(eps))).item() == inside, eps
            assert counts(p.with_(eps=torch.tensor(0.5))).item() == 0


def test_duplicates_are_ordinary_negatives():
    z0, z1 = problem("gauss", 9, 5, dtype=torch.float32).inputs
    z0, z1 = z0.clone(), z1.clone()
    z0[1] = z0[0]
    z1[4] = z0[0]
    for eps in (0.3, 0.9999):
        p = Problem((z0, z1), eps=f64(eps))
        assert counts(p)[0] >= 2
        check(p)


# ---- the floor ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_floor_the_members_of_h_get_no_gradient_at_all(dtype):
    """With negatives of their own, whose gradient comes from one row each."""
    p = problem("clamped", 21, 10, "paired", K=15, tau_plus=0.9, dtype=dtype, eps=f64(0.1))
    clamped = at_the_floor(p)
    assert 5 < clamped.sum()
    _, _, _, dnegatives, _ = results(p)
    c, _, _ = cosines(p)
    hard = c[:, 1:] > 0.1
    assert hard[clamped].any()
    for i in clamped.nonzero().flatten().tolist():
        assert (dnegatives[i][hard[i]] == 0).all()
        if dtype != torch.float16:  # whose least number is above some of these
            assert (dnegatives[i][~hard[i]] != 0).any(1).all()


def cosines(p: Problem):
    return reference.cosines(*(*(z.double() for z in p.inputs), None)[:3], p.mode)


def test_a_tie_with_the_floor_takes_the_unclamped_branch():
    """c_p = 1 and c_j = -1 make r = exp(-2/tau) = the floor for tau_plus = 0, exactly."""
    for dtype in (torch.float64, torch.float32):
        z = torch.tensor([[1.0, 0.0]], dtype=dtype)
        negative = (-z + torch.tensor([[0.0, 1e-3]], dtype=dtype)).requires_grad_()
        # at the tie itself the direction of the gradient is the row's own: move one step off it
        loss = hex_loss(z, z, negative, eps=-1.5, tau_plus=0.0, temperature=0.5)
        (grad,) = torch.autograd.grad(loss, negative)
        assert grad.abs().max() > 0
        exact = Problem((z, z, -z), "unpaired", eps=f64(-1.5), tau=0.5, tau_plus=0.0)
        stats = operators.forward(*exact.raw())[1]
        assert stats[3].item() > 0  # hard_e, the coefficient that a clamped row has 0


# ---- a threshold or temperature that is no number -----------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_threshold_of_nan_gives_nan(mode, variant):
    for dtype in (torch.float64, torch.float32):
        p = problem("gauss", 7, 5, mode, dtype=dtype, variant=variant, eps=f64(NAN))
        assert all(r.isnan().all() for r in results(p))
        eps = torch.full((p.rows,), 0.3, dtype=torch.float64)
        eps[2] = NAN
        loss = p.with_(eps=eps).loss(*p.inputs)
        assert loss.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_temperature_that_is_not_positive_gives_nan(mode, variant):
    p = problem("gauss", 7, 5, mode, variant=variant)
    for tau in (0.0, -0.1, NAN):
        inputs, t = leaves(*p.inputs), f64(tau).requires_grad_()
        loss = p.loss(*inputs, tau=t)
        assert loss.isnan().all()
        assert all(g.isnan().all() for g in torch.autograd.grad(loss.sum(), (*inputs, t)))


@pytest.mark.parametrize("mode", MODES)
def test_the_limits_of_the_temperature_are_finite(mode):
    """log of the number of candidates where it is hot; the differences of cosines where cold."""
    for dtype in (torch.float64, torch.float32):
        p = problem("gauss", 7, 5, mode, K=6, dtype=dtype, tau_plus=0.0)
        M = {"ntxent": 12}.get(mode, 6)
        hot = p.loss(*p.inputs, tau=f64(1e6))
        torch.testing.assert_close(hot, torch.full_like(hot, math.log(1 + M)), rtol=1e-5, atol=0)
        cold = results(p.with_(tau=1e-3))
        assert all(r.isfinite().all() for r in cold)


# ---- rows of zeros ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_zeros_has_a_finite_loss_and_a_gradient_of_exactly_zero(mode, variant, dtype):
    p = problem("gauss", 9, 7, mode, dtype=dtype, variant=variant, eps=f64(0.05))
    inputs = [z.clone() for z in p.inputs]
    inputs[0][2] = 0
    inputs[1][5] = 0
    if len(inputs) == 3:
        inputs[2][..., 3, :] = 0
    p = p.with_(inputs=tuple(inputs))
    loss, *grads, dtau = results(p)
    assert loss.isfinite().all()
    assert dtau.isfinite()
    for z, grad in zip(inputs, grads, strict=True):
        assert grad.isfinite().all()
        assert (grad[(z == 0).all(-1)] == 0).all()
    check(p)
    for rows in (p.with_(eps=f64(-0.5)), p.with_(eps=f64(0.0))):  # its cosines 0: in H, then in G
        assert (counts(rows)[2] == 0) == (rows.eps == 0)


def test_a_batch_of_zeros_is_the_uniform_distribution():
    for dtype in DTYPES:
        z = torch.zeros(6, 3, dtype=dtype)
        loss, *grads, dtau = results(Problem((z, z)))
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(11)))
        assert all((g == 0).all() for g in grads)
        assert dtau == 0


# ---- tiny and huge rows -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_rows_by_powers_of_two_leaves_the_loss_and_scales_the_gradient_exactly(dtype, mode):
    p = problem("cluster", 9, 7, mode, dtype=torch.bfloat16)
    p = p.with_(inputs=tuple(z.to(dtype) for z in p.inputs))
    loss, *grads, dtau = results(p)
    exponents = {torch.float64: (-1000, 900), torch.float32: (-110, 100)}.get(dtype, (-6, 6))
    for exponent in exponents:
        factor = 2.0**exponent
        got = results(p.with_(inputs=tuple(z * factor for z in p.inputs)))
        assert torch.equal(got[0], loss)
        assert torch.equal(got[-1], dtau)
        for a, b in zip(got[1:-1], grads, strict=True):
            wanted = (b.double() / factor).to(dtype)
            regular = torch.minimum(wanted.abs(), b.abs()) >= torch.finfo(dtype).tiny
            assert regular.any()  # the others lose digits
            assert torch.equal(a[regular], wanted[regular])
            assert (a.isfinite() == wanted.isfinite()).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e20, 1e37])
def test_tiny_and_huge_rows_keep_their_direction_and_their_true_gradient(scale):
    for mode in MODES:
        p = problem("cluster", 9, 7, mode, dtype=torch.float32)
        small = p.with_(inputs=tuple(z * scale for z in p.inputs))
        check_loss(small)
        # rows scaled by a power of ten are rounded: compared with their own truth, at unit scale
        wide = [z.double() / scale for z in small.inputs]
        truth = results(p.with_(inputs=tuple(wide)))
        got = results(small)
        for a, b in zip(got[1:-1], truth[1:-1], strict=True):
            a = a.double() * scale
            least = torch.finfo(torch.float32).tiny * scale
            assert ((a - b).abs() <= 1e-5 * b.abs().max() + least).all()


def test_the_least_subnormal_row_has_a_direction():
    for dtype in DTYPES:
        least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        z = torch.eye(3, dtype=dtype)
        for mode in ("ntxent", "query", "cross"):
            a = hex_loss(z * least, z, eps=0.5, mode=mode)
            assert torch.equal(a, hex_loss(z, z, eps=0.5, mode=mode))
    largest = torch.full((3, 4), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert hex_loss(largest, largest, eps=2.0).item() == pytest.approx(math.log(5), rel=1e-14)


def test_rows_of_very_different_size_in_one_batch():
    p = problem("cluster", 9, 7)
    powers = torch.tensor([2.0**k for k in range(-400, 410, 90)], dtype=torch.float64)[:, None]
    loss, *grads, _ = results(p)
    got = results(p.with_(inputs=tuple(z * powers for z in p.inputs)))
    assert torch.equal(got[0], loss)
    assert same_bits([g * powers for g in got[1:-1]], grads)


# ---- rows that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_nan_or_infinity_gives_nan_in_every_row_that_sees_it_and_in_no_other(mode, variant):
    B, K = 9, 6
    everyone = set(range(2 * B if mode in ("ntxent", "cross") else B))
    # which rows see row 2 of z0, of z1, and (its row 2 of) the negatives
    seen = {
        "ntxent": (everyone, everyone),
        "query": ({2}, everyone),
        "cross": ({2} | set(range(B, 2 * B)), set(range(B)) | {B + 2}),
        "unpaired": ({2}, {2}, everyone),
        "paired": ({2}, {2}, {2}),
    }[mode]
    for dtype in DTYPES:
        for bad in (NAN, INF, -INF):
            for k, rows in enumerate(seen):
                p = problem("gauss", B, 5, mode, K=K, dtype=dtype, variant=variant)
                inputs = [z.clone() for z in p.inputs]
                inputs[k][2, ..., 3] = bad
                p = p.with_(inputs=tuple(inputs))
                loss = p.loss(*inputs)
                assert set(loss.isnan().nonzero().flatten().tolist()) == rows, (dtype, bad, k)
                assert p.loss(*inputs, reduction="mean").isnan()
                z, name = arguments(p)
                for over in ("all", "negatives"):
                    assert batch_threshold(*z, mode=name, over=over).isnan()
                low, high = operators.row_range(*p.raw()[:3], ops.MODES[mode])
                assert set(low.isnan().nonzero().flatten().tolist()) == rows
                assert torch.equal(low.isnan(), high.isnan())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_a_batch_with_nan_is_nan_where_the_loss_is(mode, variant):
    p = problem("gauss", 9, 5, mode, variant=variant)
    inputs = [z.clone() for z in p.inputs]
    inputs[1][2, 3] = NAN
    loss, dz0, dz1, *_ = results(p.with_(inputs=tuple(inputs)))
    assert dz1[2].isnan().all()
    assert dz0[loss[:9].isnan()].isnan().all()


def test_a_batch_that_is_not_finite_leaves_the_tracker_as_it_was():
    z0, z1 = problem("cluster", 91, 5).inputs
    criterion = HEXLoss(threshold=ThresholdTracker.adaptive(momentum=0.5))
    criterion(z0.requires_grad_(), z1)
    before = criterion.threshold.state.clone()
    for bad in (NAN, INF):
        broken = z1.clone()
        broken[3, 1] = bad
        assert criterion(z0, broken).isnan()
    before[SKIPPED] += 2
    before[CANDIDATE] = 2
    assert torch.equal(criterion.threshold.state, before)
    assert criterion(z0, z1).isfinite()


# ---- no negatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_negatives_loss_and_gradient_are_exactly_zero(variant, dtype):
    z0, z1 = problem("gauss", 5, 3, dtype=dtype).inputs
    single = [("ntxent", z0[:1], z1[:1]), ("query", z0[:1], z1[:1]), ("cross", z0[:1], z1[:1])]
    queues = [("unpaired", z0, z1, z0[:0]), ("paired", z0, z1, z0[:, None][:, :0])]
    for eps in (0.3, -2.0, 2.0, INF):
        for mode, *inputs in single + queues:
            p = Problem(tuple(inputs), mode, eps=f64(eps), variant=variant)
            loss, *grads = results(p)
            assert loss.shape == (p.rows,)
            assert all((r == 0).all() and not r.signbit().any() for r in [loss])
            assert all((g == 0).all() for g in grads)
            for reduction in ("mean", "sum"):
                assert results(p, reduction)[0].item() == 0


def test_without_negatives_nan_is_still_nan():
    z = torch.tensor([[1.0, NAN]])
    for variant in VARIANTS:
        for mode in ("ntxent", "query", "cross"):
            assert hex_loss(z, z, eps=0.3, mode=mode, **form(variant)).isnan()
        assert hex_loss(z, z, z[:0], eps=0.3, **form(variant)).isnan()


# ---- the released variant -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_released_rows_with_everything_in_h_have_loss_and_gradient_zero(mode, dtype):
    p = problem("gauss", 9, 5, mode, dtype=dtype, variant="released", eps=f64(-2.0))
    assert all((r == 0).all() for r in results(p))
    eps = torch.full((p.rows,), 0.1, dtype=torch.float64)
    eps[1] = -2.0
    loss = p.with_(eps=eps).loss(*p.inputs)
    assert loss[1] == 0
    assert (loss[2:] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_released_is_infonce_at_infinity_only(mode):
    p = problem("gauss", 9, 5, mode, variant="released", eps=f64(INF))
    infonce = p.with_(variant="paper")
    assert same_bits(results(p), results(infonce))
    c, positive, negative = cosines(p)
    outside = torch.logsumexp(torch.where(negative, c / p.tau, -INF), 1) - positive / p.tau
    constant = negative.sum(1).double() * math.exp(-1 / p.tau)
    for eps in (1.0, 1.5, 1e300):
        at = p.with_(eps=f64(eps))
        torch.testing.assert_close(at.loss(*p.inputs), outside + constant, rtol=1e-12, atol=1e-12)
        check(at)


@pytest.mark.parametrize("mode", MODES)
def test_released_ignores_beta_and_tau_plus_and_may_be_negative(mode):
    p = problem("clamped", 9, 9, mode, variant="released", eps=f64(0.1))
    others = p.with_(beta=3.0, tau_plus=0.7)
    assert same_bits(results(p), results(others))
    assert (p.loss(*p.inputs) < 0).any()
    paper = p.with_(variant="paper").loss(*p.inputs)
    assert (paper >= 0).all()


# ---- no features, one row, one feature ----------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_no_features_are_rows_of_zeros(mode):
    p = problem("gauss", 5, 3, mode, K=7)
    p = p.with_(inputs=tuple(z[..., :0] for z in p.inputs))
    M = {"ntxent": 8, "query": 4, "cross": 4}.get(mode, 7)
    loss = p.loss(*leaves(*p.inputs))
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(1 + M)))
    loss.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("B, D", [(1, 1), (1, 9), (2, 1), (2, 2), (3, 1)])
def test_the_smallest_batches_are_right(mode, B, D):
    for dtype in DTYPES:
        for variant in VARIANTS:
            for eps in (-0.5, 0.25):
                p = problem("gauss", B, D, mode, K=2, dtype=dtype, variant=variant, eps=f64(eps))
                check(p)


# ---- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_loss_is_float32_unless_an_input_is_float64_and_gradients_are_as_the_inputs(reduction):
    for d0 in DTYPES:
        for d1 in DTYPES:
            for d2 in (None, *DTYPES):
                z0, z1 = problem("gauss", 5, 3, dtype=(d0, d1)).inputs
                negatives = None if d2 is None else torch.eye(3, dtype=d2)
                inputs = leaves(z0, z1, negatives)
                loss = hex_loss(*inputs, eps=0.3, reduction=reduction)
                wide = torch.float64 in (d0, d1, d2)
                assert loss.dtype == (torch.float64 if wide else torch.float32)
                loss.sum().backward()
                assert all(z.grad.dtype == z.dtype for z in inputs if z is not None)


def test_statistics_are_at_least_float32():
    for dtype in DTYPES:
        z0, z1 = problem("cluster", 80, 5, dtype=dtype).inputs
        criterion = HEXLoss()
        criterion(z0, z1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert criterion.last.eps.dtype == torch.float64
        assert criterion.last.hard.dtype == criterion.last.share.dtype == wide
