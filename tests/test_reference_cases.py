# SPDX-License-Identifier: MIT
"""Exact identities of the loss, and every special case of the numerical contract, on the oracle."""

import math

import pytest
import torch
from data import (
    INF,
    KINDS,
    MODES,
    NAN,
    batch,
    eps_in_a_gap,
    f64,
    gradients,
    inputs,
    leaves,
    rows,
    views,
)

from hex import reference

# ---- identities -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_without_hard_negative_are_infonce_bit_for_bit(mode, kind, dtype):
    z0, z1, negatives = leaves(*(z if z is None else z.to(dtype) for z in batch(kind, 9, 5, mode)))
    used = [z for z in (z0, z1, negatives) if z is not None]
    plain = rows(z0, z1, negatives, INF, 0.05, mode)
    wanted = gradients(plain, *used)
    for eps in (1.0, 1.5):
        ours = rows(z0, z1, negatives, eps, 0.05, mode, beta=2.0, tau_plus=0.7)
        assert torch.equal(ours, plain)
        for a, b in zip(gradients(ours, *used), wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_without_weights_and_debiasing_every_threshold_is_infonce(mode):
    z0, z1, negatives = batch("cluster", 17, 6, mode)
    plain = rows(z0, z1, negatives, INF, 0.1, mode)
    for eps in (-1.5, 0.0, 0.5, 0.9):
        ours = rows(z0, z1, negatives, eps, 0.1, mode, beta=0.0, tau_plus=0.0)
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-14)


def test_swapping_the_views_swaps_the_rows():
    z0, z1 = views("cluster", 17, 6)
    for mode in ("ntxent", "cross"):
        ours, swapped = rows(z0, z1, None, 0.5, mode=mode), rows(z1, z0, None, 0.5, mode=mode)
        torch.testing.assert_close(ours.roll(17), swapped, rtol=1e-12, atol=1e-14)


def test_scaling_by_a_power_of_two_leaves_the_loss_and_scales_the_gradient_exactly():
    z0, z1 = leaves(*views("gauss", 9, 5))
    loss = rows(z0, z1, None, 0.2)
    (grad,) = gradients(loss, z0)
    for power in (-900, -60, 1, 33, 900):
        scaled = (z0.detach() * 2.0**power).requires_grad_()
        ours = rows(scaled, z1, None, 0.2)
        assert torch.equal(ours, loss)
        assert torch.equal(gradients(ours, scaled)[0] * 2.0**power, grad)


def test_gradient_of_a_row_is_orthogonal_to_it():
    for kind in KINDS:
        z0, z1 = leaves(*views(kind, 9, 5))
        for z, grad in zip((z0, z1), gradients(rows(z0, z1, None, 0.5), z0, z1), strict=True):
            along = (z * grad).sum(1).abs()
            assert (along <= 1e-14 * z.norm(dim=1) * grad.norm(dim=1).clamp(min=1)).all()


def test_rotating_the_features_leaves_the_loss():
    z0, z1 = views("cluster", 17, 6)
    turn, _ = torch.linalg.qr(torch.from_numpy(inputs("gauss", 3, 6, 0)))
    ours, turned = rows(z0, z1, None, 0.5), rows(z0 @ turn, z1 @ turn, None, 0.5)
    torch.testing.assert_close(ours, turned, rtol=1e-11, atol=1e-13)


def test_a_hot_temperature_gives_the_logarithm_of_the_number_of_candidates():
    z0, z1 = views("gauss", 9, 5)
    for eps in (-1.5, 0.2, INF):
        hot = rows(z0, z1, None, eps, 1e12, tau_plus=0.0)
        torch.testing.assert_close(hot, torch.full_like(hot, math.log(17)), rtol=1e-10, atol=0.0)


def test_a_negative_orthogonal_to_all_adds_exactly_one_to_the_rest():
    z0, z1, negatives = (
        torch.cat([z, z.new_zeros(len(z), 1)], 1) for z in batch("gauss", 9, 5, "unpaired")
    )
    extra = torch.cat([negatives, torch.eye(6, dtype=torch.float64)[5:]])
    _, p, _ = reference.cosines(z0, z1, negatives, "unpaired")
    before = (rows(z0, z1, negatives, 0.2, 0.5, "unpaired") + p / 0.5).exp()  # the denominator
    after = (rows(z0, z1, extra, 0.2, 0.5, "unpaired") + p / 0.5).exp()
    torch.testing.assert_close(after - before, torch.ones_like(p), rtol=1e-13, atol=0.0)


def test_cross_is_query_both_ways_and_shared_negatives_are_equal_own_negatives():
    z0, z1, negatives = batch("cluster", 9, 5, "unpaired")
    both = torch.cat([rows(z0, z1, None, 0.5, mode="query"), rows(z1, z0, None, 0.5, mode="query")])
    torch.testing.assert_close(rows(z0, z1, None, 0.5, mode="cross"), both, rtol=1e-13, atol=0.0)
    own = negatives.expand(9, -1, -1)
    torch.testing.assert_close(
        rows(z0, z1, own, 0.5, mode="paired"),
        rows(z0, z1, negatives, 0.5, mode="unpaired"),
        rtol=1e-13,
        atol=0.0,
    )


# ---- the table of cases -----------------------------------------------------------------------


def test_membership_compares_in_float64_and_clips_the_cosine_at_one():
    z = torch.ones(3, 1)  # float32, every cosine exactly 1
    below = math.nextafter(1.0, 0.0)  # rounds to 1 in float32
    count = reference.loss_rows(z, z, None, f64(below), f64(0.1), "ntxent")[1]
    assert count.tolist() == [4.0] * 6
    # self-products of float32 unit rows exceed 1 by rounding; they are still not above eps = 1
    z = views("gauss", 65, 33)[0].float()
    c, _, _ = reference.cosines(z, z, None, "query")
    assert (c > 1).any()
    copies = torch.stack([z, z])  # candidates equal to the positive
    n_hard = reference.loss_rows(z, z, copies.transpose(0, 1), f64(1.0), f64(0.1), "paired")[1]
    assert (n_hard == 0).all()


def test_no_threshold_or_range_exceeds_one_and_the_self_cosine_is_exactly_one():
    z = views("gauss", 65, 33)[0].float()
    assert reference.cosines(z, z, None, "query")[0].max() > 1  # by rounding
    assert reference.threshold(z, z, None, "query", 1.0) <= 1
    assert reference.row_range(z, z, None, "query")[1].max() == 1
    assert (reference.cosines(z, z, None, "ntxent")[0].diag() == 1).all()


def test_eps_may_be_one_for_each_row():
    z0, z1 = views("cluster", 9, 5)
    eps = torch.linspace(-1.1, 1.1, 18, dtype=torch.float64)
    together = rows(z0, z1, None, eps)
    for i, one in enumerate(eps):
        assert together[i] == rows(z0, z1, None, one)[i]


def test_at_the_floor_the_local_term_has_no_gradient():
    """With everything in H and Q at its floor, no cosine but the positive's counts."""
    z0, z1, negatives = leaves(*batch("clamped", 9, 5, "paired"))
    loss = rows(z0, z1, negatives, -1.5, 0.2, "paired", tau_plus=0.95)
    assert (loss > 0).all()
    g0, g1, gn = gradients(loss, z0, z1, negatives)
    assert (gn == 0).all() and (g0 != 0).any() and (g1 != 0).any()


def test_a_tie_with_the_floor_takes_the_unclamped_branch():
    """Opposite positive and negative: c_p = 1, c = -1, tau_plus = 0, so q = f exactly."""
    z0, z1, negative = leaves(f64([[1.0, 0.0]]), f64([[2.0, 0.0]]), f64([[-1.0, 1e-200]]))
    c, p, _ = reference.cosines(z0, z1, negative, "unpaired")
    assert c.tolist() == [[1.0, -1.0]]
    turned = f64([[0.0, 1.0]])  # the gradient of the cosine vanishes here, its derivative does not
    loss = rows(z0, z1, negative, -1.5, 0.5, "unpaired", beta=0.0, tau_plus=0.0)
    (slope,) = torch.autograd.grad(loss.sum(), negative, create_graph=True)
    (curve,) = torch.autograd.grad((slope * turned).sum(), negative)
    plain = rows(z0, z1, negative, INF, 0.5, "unpaired")
    (slope,) = torch.autograd.grad(plain.sum(), negative, create_graph=True)
    (wanted,) = torch.autograd.grad((slope * turned).sum(), negative)
    assert curve[0, 1] != 0
    torch.testing.assert_close(curve, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_threshold_or_temperature_that_is_no_number_gives_nan(variant):
    z0, z1 = leaves(*views("gauss", 5, 3))
    for eps, tau in [(NAN, 0.1), (0.2, NAN), (0.2, 0.0), (0.2, -0.1)]:
        loss, n_hard, share = reference.loss_rows(
            z0, z1, None, f64(eps), f64(tau), "ntxent", variant=variant
        )
        assert loss.isnan().all() and n_hard.isnan().all() and share.isnan().all()
        assert all(grad.isnan().all() for grad in gradients(loss, z0, z1))
    eps = torch.full((10,), 0.2)
    eps[3] = NAN
    assert rows(z0, z1, None, eps, variant=variant).isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_zeros_has_cosine_zero_and_gradient_exactly_zero(mode, variant):
    z0, z1, negatives = leaves(*batch("zero_rows", 9, 5, mode, K=18))
    used = [z for z in (z0, z1, negatives) if z is not None]
    loss = rows(z0, z1, negatives, -0.5, 0.1, mode, variant=variant)
    grads = torch.autograd.grad(loss.sum(), used, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), used)
    assert loss.isfinite().all() and (z0[4] == 0).all() and (z1[3] == 0).all()
    for z, first, twice in zip(used, grads, second, strict=True):
        assert first.isfinite().all() and twice.isfinite().all()
        zero = (z == 0).all(-1)
        assert zero.any() and (first[zero] == 0).all() and (twice[zero] == 0).all()
    c, _, _ = reference.cosines(z0, z1, negatives, mode)
    assert (c[4] == 0).all()


@pytest.mark.parametrize(
    "dtype, scales",
    [
        (torch.float32, (1e-23, 1e-37, 1e20, 1e37)),
        (torch.float64, (1e-170, 1e-300, 1e160, 1e300)),
    ],
)
def test_tiny_and_huge_rows_keep_their_direction_and_true_gradient(dtype, scales):
    z0, z1 = leaves(*(z.to(dtype) for z in views("gauss", 9, 5)))
    loss = rows(z0, z1, None, 0.2)
    (grad,) = gradients(loss, z0)
    for scale in scales:
        scaled = (z0.detach() * scale).requires_grad_()
        ours = rows(scaled, z1, None, 0.2)
        torch.testing.assert_close(ours, loss)
        torch.testing.assert_close(gradients(ours, scaled)[0] * scale, grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_at_the_ends_of_the_range_of_their_type_keep_their_direction(dtype):
    info = torch.finfo(dtype)
    _, z1 = views("gauss", 3, 4)
    ones = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 0, 0, 1]], dtype=dtype)
    plain = rows(ones, z1.to(dtype), None, 0.2)
    for length in (2 / info.smallest_normal, info.smallest_normal, info.smallest_normal * info.eps):
        assert torch.equal(rows(ones * length, z1.to(dtype), None, 0.2), plain)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nan_reaches_every_row_that_sees_it_and_no_other(bad, variant):
    for mode, where, seen in [
        ("ntxent", 0, range(18)),
        ("query", 0, [4]),
        ("query", 1, range(9)),
        ("cross", 0, [4, *range(9, 18)]),
        ("unpaired", 0, [4]),
        ("unpaired", 1, [4]),
        ("unpaired", 2, range(9)),
        ("paired", 2, [4]),
    ]:
        tensors = list(batch("gauss", 9, 5, mode))
        clean = rows(*tensors, 0.2, 0.1, mode, variant=variant)
        tensors[where] = tensors[where].clone()
        tensors[where][4, ..., 2] = bad
        loss = rows(*tensors, 0.2, 0.1, mode, variant=variant)
        seen = torch.isin(torch.arange(len(loss)), torch.tensor(list(seen)))
        assert torch.equal(loss.isnan(), seen), (mode, where)
        assert torch.equal(loss[~seen], clean[~seen])
        assert reference.threshold(*tensors, mode, 0.5).isnan()
        assert reference.threshold(*tensors, mode, 0.5, "negatives").isnan()
        low, high = reference.row_range(*tensors, mode)
        assert torch.equal(low.isnan(), seen) and torch.equal(high.isnan(), seen)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("mode", MODES)
def test_without_negatives_loss_and_gradient_are_exactly_zero(mode, variant):
    B = 4 if mode in ("unpaired", "paired") else 1
    z0, z1, negatives = leaves(*batch("gauss", B, 5, mode, K=0))
    tau = f64(0.1).requires_grad_()
    for eps in (-1.5, 0.5, INF):
        loss, n_hard, share = reference.loss_rows(
            z0, z1, negatives, f64(eps), tau, mode, 1.0, 0.1, variant
        )
        assert (loss == 0).all() and (n_hard == 0).all() and (share == 0).all()
        opposite = rows(z0, -z1, negatives, eps, mode=mode, variant=variant)
        assert not loss.signbit().any() and not opposite.signbit().any()  # prints as 0, not -0
        assert all((grad == 0).all() for grad in gradients(loss, z0, z1, tau))
    assert rows(z0 * NAN, z1, negatives, 0.5, mode=mode).isnan().all()
    assert rows(z0, z1, negatives, NAN, mode=mode).isnan().all()
    assert rows(z0, z1, negatives, 0.5, 0.0, mode=mode).isnan().all()
    assert reference.threshold(z0, z1, negatives, mode, 0.5, "negatives").isnan()


def test_released_rows_with_everything_in_h_have_loss_and_gradient_zero():
    z0, z1 = leaves(*views("cluster", 9, 5))
    tau = f64(0.1).requires_grad_()
    loss = rows(z0, z1, None, -1.5, tau, variant="released")
    assert (loss == 0).all() and not loss.signbit().any()
    assert all((grad == 0).all() for grad in gradients(loss, z0, z1, tau))


def test_released_rows_report_no_share_of_the_denominator():
    z0, z1 = views("cluster", 9, 5)
    _, n_hard, share = reference.loss_rows(
        z0, z1, None, f64(0.5), f64(0.1), "ntxent", variant="released"
    )
    assert (n_hard > 0).any() and (share == 0).all()


def test_released_form_leaves_the_positive_out_unless_eps_is_infinite():
    z0, z1 = views("gauss", 9, 5)
    plain = rows(z0, z1, None, INF)
    assert torch.equal(rows(z0, z1, None, INF, variant="released"), plain)
    _, p, _ = reference.cosines(z0, z1, None, "ntxent")
    without = (plain.exp() - 1).log() + 16 * math.exp(-1 / 0.1)  # log(denominator - positive)
    torch.testing.assert_close(rows(z0, z1, None, 1.0, variant="released"), without)
    eps = torch.full((18,), 1.0)
    eps[5] = INF
    assert (rows(z0, z1, None, eps, variant="released") == plain).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_has_no_rows_and_stays_in_the_graph(mode):
    z0, z1, negatives = leaves(*batch("gauss", 0, 5, mode))
    loss = rows(z0, z1, negatives, 0.5, mode=mode)
    assert loss.shape == (0,)
    assert gradients(loss, z0)[0].shape == (0, 5)
    assert reference.threshold(z0, z1, negatives, mode, 0.5).isnan()
    assert [edge.shape for edge in reference.row_range(z0, z1, negatives, mode)] == [(0,), (0,)]


@pytest.mark.parametrize("tau", [1.0, 0.05, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_temperature_gives_finite_losses_and_derivatives(kind, tau):
    z0, z1 = leaves(*views(kind, 9, 5))
    for variant in ("paper", "released"):
        for eps, tau_plus in [(-1.5, 0.1), (0.5, 0.1), (0.5, 0.0), (INF, 0.0)]:
            loss = rows(z0, z1, None, eps, tau, tau_plus=tau_plus, variant=variant)
            (grad,) = torch.autograd.grad(loss.sum(), z0, create_graph=True)
            (second,) = gradients(grad.sum(), z0)
            assert loss.isfinite().all() and grad.isfinite().all() and second.isfinite().all()
            assert variant == "released" or (loss >= 0).all()


def test_small_losses_keep_their_digits():
    """One negative opposite to the anchor: L = log1p(exp(-2 / tau)), far below 1e-16 of 1."""
    z0, z1, negative = f64([[1.0, 0.0]]), f64([[3.0, 0.0]]), f64([[-2.0, 0.0]])
    for tau in (0.1, 0.02, 0.003):
        loss = rows(z0, z1, negative, INF, tau, "unpaired")
        assert loss.item() == pytest.approx(math.log1p(math.exp(-2 / tau)), rel=1e-12, abs=0)
        assert loss.item() > 0


@pytest.mark.parametrize("tau", [2.0, 0.07, 0.066, 0.02, 0.0024, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_losses_do_not_overflow(dtype, tau):
    """A positive opposite to the anchor and a negative equal to it: L = 2 / tau + a little."""
    z0, z1, negative = (torch.tensor([[s, 0.0]], dtype=dtype) for s in (1.0, -3.0, 2.0))
    (z0,) = leaves(z0)
    for eps in (0.5, INF):  # alone in H, the negative is as in G: q = (1 - tau_plus e0) / ...
        loss = rows(z0, z1, negative, eps, tau, "unpaired", tau_plus=0.0)
        wanted = 2 / tau + math.log1p(math.exp(-2 / tau))
        assert loss.item() == pytest.approx(wanted, rel=4 * torch.finfo(dtype).eps, abs=0)
        assert gradients(loss, z0)[0].isfinite().all()


def test_a_clamped_row_whose_hardest_member_passes_the_positive_keeps_its_digits():
    """m > 0 and S far below 1 at once: L = log1p(N_h exp(-(1 + c_p) / tau)) exactly."""
    angle = torch.tensor([0.3, *[1.5] * 9], dtype=torch.float64)  # one near, nine far
    negatives = torch.stack([angle.cos(), angle.sin()], 1)
    z0, z1 = f64([[1.0, 0.0]]), f64([[math.cos(0.301), math.sin(0.301)]])
    loss = rows(z0, z1, negatives, -1.5, 0.05, "unpaired", beta=0.0, tau_plus=0.9)
    wanted = math.log1p(10 * math.exp(-(1 + math.cos(0.301)) / 0.05))
    assert wanted < 1e-15 and loss.item() == pytest.approx(wanted, rel=1e-12, abs=0)


def test_half_inputs_are_computed_in_float32_and_float64_wins_a_mixture():
    z0, z1, negatives = batch("gauss", 9, 5, "unpaired")
    for dtype in (torch.float16, torch.bfloat16):
        half = [z.to(dtype) for z in (z0, z1, negatives)]
        loss = rows(*half, 0.2, 0.1, "unpaired")
        assert loss.dtype == torch.float32
        assert torch.equal(loss, rows(*(z.float() for z in half), 0.2, 0.1, "unpaired"))
        (leaf,) = leaves(half[0])
        assert gradients(rows(leaf, *half[1:], 0.2, 0.1, "unpaired"), leaf)[0].dtype == dtype
        assert rows(half[0], z1.float(), half[2], 0.2, 0.1, "unpaired").dtype == torch.float32
        assert rows(half[0], half[1], negatives, 0.2, 0.1, "unpaired").dtype == torch.float64
        assert rows(half[0], z1, None, 0.2).dtype == torch.float64


def test_autocast_changes_nothing():
    z0, z1, negatives = (z.float() for z in batch("gauss", 9, 5, "unpaired"))
    outside = rows(z0, z1, negatives, 0.2, 0.1, "unpaired")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rows(z0, z1, negatives, 0.2, 0.1, "unpaired"), outside)


def test_float32_agrees_with_float64_at_300_rows():
    for kind in ("gauss", "cluster"):
        z0, z1 = views(kind, 150, 24)
        c, _, _ = reference.cosines(z0, z1, None, "ntxent")
        eps = eps_in_a_gap(c, 0.3)
        wide = rows(z0, z1, None, eps)
        narrow = rows(z0.float(), z1.float(), None, eps)
        # A cosine of unit rows of D features errs by (D + 2) / 2 ulp at the most, whatever order
        # this machine's matrix product sums in; a loss moves by 2 / tau of that or so.
        bound = 2 / 0.1 * (24 + 2) / 2 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(narrow, wide.float(), rtol=0, atol=bound)


def test_unknown_names_are_refused_with_what_was_wanted():
    z0, z1 = views("gauss", 3, 2)
    with pytest.raises(ValueError, match=r"mode: got 'clip', wanted one of \('ntxent'"):
        rows(z0, z1, mode="clip")
    with pytest.raises(ValueError, match=r"mode: got 5, wanted"):
        rows(z0, z1, mode=5)
    with pytest.raises(ValueError, match=r"variant: got 'authors', wanted"):
        rows(z0, z1, variant="authors")
    with pytest.raises(ValueError, match=r"over: got 'rows', wanted"):
        reference.threshold(z0, z1, None, 0, 0.5, "rows")
