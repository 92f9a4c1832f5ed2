# SPDX-License-Identifier: MIT
"""The oracle against what does not share its code.

That is vectors.json (losses and gradients of the originals), the formula of the paper written as
Python loops, closed-form gradients and finite differences. test_reference_cases.py holds the
identities and the table of special cases.
"""

import math

import pytest
import torch
from data import INF, KINDS, MODES, batch, f64, gradients, inputs, leaves, rows, vectors, views
from torch import Tensor

from hex import reference

# ---- the originals ----------------------------------------------------------------------------


def vector_eps(case, z0, z1) -> Tensor:
    """The threshold of a case, and the check that the adaptive rule is ours."""
    name = case["name"]
    if name == "solo_simclr":
        return f64(INF)
    if name == "hcl":
        return f64(-1.5)
    if name == "hex_released_fixed":
        low, high = reference.row_range(z0, z1, None, "ntxent")
        return low + case["threshold"] * (high - low)
    if name == "hex_paper_threshold":
        return f64(case["threshold"])
    if name != "hex_released_nnclr_warm":
        assert abs(reference.threshold(z0, z1, None, "ntxent", 0.99) - case["eps"]) < 1e-15
    return f64(case["eps"])


@pytest.mark.parametrize("name", sorted({case["name"] for case in vectors()}))
def test_losses_and_gradients_are_those_of_the_originals(name):
    for case in (case for case in vectors() if case["name"] == name):
        z = torch.from_numpy(inputs(case["kind"], case["B"], case["D"], case["seed"]))
        z.requires_grad_()
        z0, z1 = z.chunk(2)
        loss = rows(
            z0,
            z1,
            eps=vector_eps(case, z0, z1),
            tau=case["tau"],
            beta=case.get("beta", 1.0),
            tau_plus=case.get("tau_plus", 0.0),
            variant="released" if "released" in name else "paper",
        ).mean()
        (grad,) = gradients(loss, z)
        # The originals take log(p / (p + Q)): their losses near 0 are wrong by up to 2 ulp of 1,
        # and so, over tau, are their gradients.
        slack = 5e-16
        assert loss.item() == pytest.approx(case["loss"], rel=1e-12, abs=slack), case
        head = grad.flatten()[:8].tolist()
        slack = 1e-12 * case["grad_norm"] + slack / case["tau"]
        assert grad.norm().item() == pytest.approx(case["grad_norm"], rel=0, abs=slack), case
        assert head == pytest.approx(case["grad_head"], rel=0, abs=slack), case
        norms = grad[:8].norm(dim=1).tolist()
        assert norms == pytest.approx(case["grad_row_norms"], rel=0, abs=slack), case


# ---- the formula, as loops --------------------------------------------------------------------


def loop_cosine(a, b) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    length = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return dot / length if length else 0.0


def loop_row(c_p, others, eps, tau, beta, tau_plus, variant) -> float:
    """One row of the paper's formula, or of the released code's, letter by letter."""
    hard = [c for c in others if c > eps]
    rest = [c for c in others if c <= eps]
    total = math.fsum(math.exp(c / tau) for c in rest)
    if variant == "released":
        if not rest:
            return 0.0
        return -c_p / tau + math.log(total) + len(others) * math.exp(-1 / tau)
    local = 0.0
    if hard:
        mean = math.fsum(math.exp(beta * c / tau) for c in hard) / len(hard)
        weighted = math.fsum(math.exp(beta * c / tau) / mean * math.exp(c / tau) for c in hard)
        debiased = (weighted - tau_plus * len(hard) * math.exp(c_p / tau)) / (1 - tau_plus)
        local = max(debiased, len(hard) * math.exp(-1 / tau))
    return -c_p / tau + math.log(math.exp(c_p / tau) + local + total)


def loop_rows(z0, z1, negatives, mode):
    """Yields the positive's cosine, the negatives' cosines and the self cosine of each row."""
    z0, z1 = z0.tolist(), z1.tolist()
    both = z0 + z1
    B = len(z0)
    for i in range(2 * B if mode in ("ntxent", "cross") else B):
        anchor = both[i]
        j = i % B
        positive = z1[j] if i < B else z0[j]
        if mode == "ntxent":
            others = [z for k, z in enumerate(both) if k % B != j]
        elif mode in ("query", "cross"):
            others = [z for k, z in enumerate(z1 if i < B else z0) if k != j]
        else:
            others = (negatives if mode == "unpaired" else negatives[j]).tolist()
        itself = [float(any(anchor))] if mode == "ntxent" else []
        yield loop_cosine(anchor, positive), [loop_cosine(anchor, z) for z in others], itself


OPTIONS = [
    # tau, beta, tau_plus, variant
    (0.2, 1.0, 0.1, "paper"),
    (0.5, 2.0, 0.3, "paper"),
    (0.2, 1.0, 0.9, "paper"),  # mostly clamped
    (0.5, 0.0, 0.0, "paper"),
    (0.3, 1.0, 0.1, "released"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_the_formula_written_as_loops(mode, kind):
    z0, z1, negatives = batch(kind, 9, 5, mode)
    row_cosines = list(loop_rows(z0, z1, negatives, mode))
    for eps in (-1.5, 0.3, 0.9, 0.999999, 2.0):
        for tau, beta, tau_plus, variant in OPTIONS:
            wanted = [
                loop_row(c_p, others, eps, tau, beta, tau_plus, variant)
                for c_p, others, _ in row_cosines
            ]
            got = rows(
                z0, z1, negatives, eps, tau, mode, beta=beta, tau_plus=tau_plus, variant=variant
            )
            # r - tau_plus exp(l_p) cancels in the debiasing: its condition bounds the error
            rel = 1e-12 / (1 - tau_plus)
            assert got.tolist() == pytest.approx(wanted, rel=rel, abs=1e-14), (eps, tau, variant)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "collapsed"])
@pytest.mark.parametrize("mode", MODES)
def test_members_of_h_are_counted_and_share_is_their_part_of_the_denominator(mode, kind):
    z0, z1, negatives = batch(kind, 9, 5, mode)
    _, n_hard, share = reference.loss_rows(z0, z1, negatives, f64(0.3), f64(0.2), mode)
    loop = list(loop_rows(z0, z1, negatives, mode))
    assert n_hard.tolist() == [sum(c > 0.3 for c in others) for _, others, _ in loop]
    for i, (c_p, others, _) in enumerate(loop):
        rest = math.fsum(math.exp(c / 0.2) for c in others if c <= 0.3)
        # L = -l_p + log(denominator); what is neither the positive nor in G is the local term
        denominator = math.exp(loop_row(c_p, others, 0.3, 0.2, 1.0, 0.1, "paper") + c_p / 0.2)
        local = denominator - math.exp(c_p / 0.2) - rest
        assert share[i].item() == pytest.approx(local / denominator, abs=1e-12)


@pytest.mark.parametrize("over", ["all", "negatives"])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_threshold_is_the_mean_of_the_nearest_element_of_each_row(mode, quantile, over):
    z0, z1, negatives = batch("zero_rows", 9, 5, mode)
    picked = []
    for c_p, others, itself in loop_rows(z0, z1, negatives, mode):
        row = sorted(others if over == "negatives" else [*others, c_p, *itself])
        picked.append(row[round(quantile * (len(row) - 1))])  # round() is half to even
    wanted = math.fsum(picked) / len(picked)
    got = reference.threshold(z0, z1, negatives, mode, quantile, over)
    assert got.dtype == torch.float64 and got.shape == ()
    assert got.item() == pytest.approx(wanted, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("kind", ["gauss", "cluster", "collapsed"])
def test_threshold_agrees_with_torch_quantile_nearest(kind):
    for B in (2, 13, 26, 75, 150):
        z0, z1 = views(kind, B, 6)
        c, _, _ = reference.cosines(z0, z1, None, "ntxent")
        for quantile in (0.01, 0.5, 0.99):
            wanted = torch.quantile(c, quantile, dim=1, interpolation="nearest").mean()
            got = reference.threshold(z0, z1, None, "ntxent", quantile)
            assert abs(got - wanted) < 1e-15


@pytest.mark.parametrize("mode", MODES)
def test_row_range_spans_the_row_that_the_quantile_sees(mode):
    z0, z1, negatives = batch("zero_rows", 9, 5, mode)
    low, high = reference.row_range(z0, z1, negatives, mode)
    loop = [[c_p, *others, *itself] for c_p, others, itself in loop_rows(z0, z1, negatives, mode)]
    assert low.tolist() == pytest.approx([min(row) for row in loop], rel=1e-14, abs=1e-15)
    assert high.tolist() == pytest.approx([max(row) for row in loop], rel=1e-14, abs=1e-15)


# ---- derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("tau_plus, variant", [(0.1, "paper"), (0.95, "paper"), (0.1, "released")])
@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives_match_finite_differences(mode, tau_plus, variant):
    z0, z1, negatives = leaves(*batch("gauss", 4, 3, mode, K=5, seed=3))
    tau = f64(0.3).requires_grad_()

    def loss(z0, z1, negatives, tau):
        return rows(z0, z1, negatives, 0.2, tau, mode, tau_plus=tau_plus, variant=variant)

    arguments = (z0, z1, negatives, tau)
    assert torch.autograd.gradcheck(loss, arguments, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradgradcheck(loss, arguments, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "collapsed"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_the_closed_form_in_the_cosines(mode, kind):
    """dL/dc on G, on H where Q is free and where it is at its floor, and at the positive."""
    tau, beta, tau_plus, eps = 0.2, 1.5, 0.6, 0.25
    z0, z1, negatives = leaves(*batch(kind, 9, 5, mode))
    c, p, is_negative = reference.cosines(z0, z1, negatives, mode)
    dc, dp = torch.zeros_like(c), torch.zeros_like(p)
    for i in range(len(c)):
        negative = is_negative[i].nonzero().flatten().tolist()
        hard = [j for j in negative if c[i, j] > eps]
        d = {j: ((c[i, j] - p[i]) / tau).item() for j in negative}
        m = max(0.0, *d.values())
        e = {j: math.exp(d[j] - m) for j in negative}
        e0, n_h = math.exp(-m), len(hard)
        b = {j: math.exp(beta * d[j]) for j in hard}
        B = sum(b.values())
        r = sum(b[j] * e[j] for j in hard) / B if hard else 0.0
        q = n_h * (r - tau_plus * e0) / (1 - tau_plus)
        f = n_h * math.exp(-(1 + p[i].item()) / tau - m)
        S = max(q, f) + sum(e[j] for j in negative if j not in b)
        k = 1 / (tau * (e0 + S))
        for j in negative:
            if j not in b:
                dc[i, j] = k * e[j]
            elif q >= f:
                dc[i, j] = k * n_h / (1 - tau_plus) * b[j] / B * (e[j] + beta * (e[j] - r))
        dp[i] = -k * S - (k * n_h * tau_plus * e0 / (1 - tau_plus) if q >= f else 0.0)
    used = [z for z in (z0, z1, negatives) if z is not None]
    wanted = torch.autograd.grad([c, p], used, [dc, dp])
    options = {"beta": beta, "tau_plus": tau_plus}
    got = gradients(rows(z0, z1, negatives, eps, tau, mode, **options), *used)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("tau_plus", [0.1, 0.95])
def test_gradient_of_the_temperature_counts_the_floor(tau_plus):
    """dL/dtau = -(1/tau) sum_j c_j dL/dc_j, plus k f / tau where Q is at its floor."""
    z0, z1 = leaves(*views("clamped", 9, 5))
    tau = f64(0.2).requires_grad_()
    loss, _, share = reference.loss_rows(z0, z1, None, f64(-1.5), tau, 0, 1.0, tau_plus)
    (got,) = gradients(loss, tau)
    h = 1e-6
    above = rows(z0, z1, eps=-1.5, tau=0.2 + h, tau_plus=tau_plus).sum()
    below = rows(z0, z1, eps=-1.5, tau=0.2 - h, tau_plus=tau_plus).sum()
    assert got.item() == pytest.approx(((above - below) / (2 * h)).item(), rel=1e-8)
    if tau_plus == 0.95:  # all rows at the floor: L = log(1 + N_h exp(-(1 + c_p) / tau))
        _, p, _ = reference.cosines(z0, z1, None, "ntxent")
        by_hand = (share * (1 + p) / tau**2).sum()
        assert got.item() == pytest.approx(by_hand.item(), rel=1e-12, abs=0)


def test_vmap_and_func_grad_equal_a_loop():
    z0, z1 = views("gauss", 12, 5)
    z0, z1, eps = z0.reshape(3, 4, 5), z1.reshape(3, 4, 5), f64([0.1, 0.3, 2.0])

    def mean(z0, z1, eps):
        return rows(z0, z1, None, eps, f64(0.2)).mean()

    got = torch.func.vmap(torch.func.grad(mean))(z0, z1, eps)
    for k in range(3):
        leaf = z0[k].clone().requires_grad_()
        (wanted,) = gradients(mean(leaf, z1[k], eps[k]), leaf)
        torch.testing.assert_close(got[k], wanted, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("mode, backend", [("ntxent", "aot_eager"), ("paired", "eager")])
def test_compiles_as_one_graph_for_every_eps_and_tau(mode, backend):
    torch._dynamo.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def step(z0, z1, negatives, eps, tau):
        loss = reference.loss_rows(z0, z1, negatives, eps, tau, mode)
        seen = reference.threshold(z0, z1, negatives, mode, 0.9, "negatives")
        return *loss, seen, *reference.row_range(z0, z1, negatives, mode)

    z0, z1, negatives = leaves(*batch("gauss", 5, 3, mode))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(4):
            loss, *_ = step(z0, z1, negatives, f64(k / 4), f64(0.1 + k))
            assert torch.equal(loss, rows(z0, z1, negatives, k / 4, 0.1 + k, mode))
            gradients(loss, z0, z1)
