# SPDX-License-Identifier: MIT
"""The absolute accuracy that is promised, given the cosines, at every temperature from 0.001 on.

    float32: loss 1e-5 relative, gradient 5e-5 of the row's largest; from tau = 0.05 on 5e-6, 1e-5
    float64: 1e-12 of both

The cosines are given through the operator: rows of 64, 256 or 1024 features, each 1 or -1, have a
length that is a power of two, so that unit rows and dot products are exact in any dtype. Each
anchor has its own negatives, whose gradients are those of their cosines one by one,

    dL/dn_j = dL/dc_j (u - c_j n_j) / |n_j|,    n unit rows

and the truth is the closed form of the gradient in extended precision, written here once more.
A loss near 0 in float64 has all digits where nothing but its last steps rounds.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import operators
import pytest
import torch
from data import f64
from torch import Tensor

from hex import hex_cross_entropy, hex_loss, hex_sup_con, info_nce

LONG = np.longdouble
BETAS, TAU_PLUS = (0.0, 0.5, 1.0, 2.0), (0.0, 0.1, 0.9)
TAUS = (1.0, 0.2, 0.1, 0.07, 0.05, 0.02, 0.01, 0.003, 0.001)


def flipped(z, share, generator):
    """z with each sign changed with the probability `share`."""
    return z * np.where(generator.random(z.shape) < share, -1.0, 1.0)


class Batch(NamedTuple):
    """Inputs in float64; of each anchor, its positive and its negatives, in this order: the
    cosines (N, 1 + K), what a gradient in a cosine is multiplied by to be one in the input
    (N, 1 + K, D), and its length.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    c: np.ndarray
    directions: np.ndarray
    sizes: np.ndarray


@functools.cache
def batches(anchors=7, K=45):
    """Batches of many spreads of the cosines."""
    result = []
    for D, positive, near, far in (
        (64, 0.03, 0.1, 0.6),
        (256, 0.01, 0.01, 0.9),
        (64, 0.2, 0.1, 0.5),
        (1024, 0.0, 0.002, 0.04),
        (256, 0.001, 0.1, 0.5),
        (256, 0.05, 0.01, 0.01),
    ):
        generator = np.random.default_rng(D)
        z0 = flipped(np.ones((anchors, D)), 0.5, generator)
        z1 = flipped(z0, positive, generator)
        share = generator.uniform(near, far, (anchors, K, 1))
        negatives = flipped(z0[:, None] * np.ones((K, 1)), share, generator)
        u = z0 / math.sqrt(D)
        others = np.concatenate([z1[:, None], negatives], 1) / math.sqrt(D)
        c = (others * u[:, None]).sum(2)  # exact
        directions = (u[:, None] - c[:, :, None] * others) / math.sqrt(D)
        sizes = np.sqrt((directions**2).sum(2))
        assert (sizes > 0).mean() > 0.5  # the rest are along the row itself: nothing is seen
        inputs = tuple(torch.from_numpy(z) for z in (z0, z1, negatives))
        result.append(Batch(inputs, c, directions, sizes))
    return result


def closed_form(c, positive, eps, tau, beta, tau_plus, decoupled=False):
    """Of each row: loss (N,), dL/dc_p and dL/dc (N, 1 + K), whether Q is at its floor, and the
    condition of the debiasing; c (N, K), positive (N,).

    Decoupled, the condition is that of the whole denominator, of which Q may be a small part.
    """
    c, positive, tau = c.astype(LONG), positive.astype(LONG), LONG(tau)
    d = (c - positive[:, None]) / tau
    m = np.maximum(d.max(1), 0)
    e, e0 = np.exp(d - m[:, None]), np.exp(-m)
    hard = c > eps
    count, some = hard.sum(1), hard.any(1)
    top = np.where(hard, d, -np.inf).max(1, where=hard, initial=d.min())
    b = np.where(hard, np.exp(beta * (d - top[:, None])), 0)
    weight = b / np.where(some, b.sum(1), 1)[:, None]
    r = (weight * e).sum(1)
    q = count * (r - tau_plus * e0) / (1 - tau_plus)
    floor = count * np.exp(-(1 + positive) / tau - m)
    clamped = q < floor
    S = np.maximum(q, floor) + np.where(hard, 0, e).sum(1)
    k = 1 / (tau * (S if decoupled else e0 + S))
    free = k * count * ~clamped / (1 - tau_plus)
    dc = (free[:, None] * weight) * (e + beta * (e - r[:, None]))
    dc = np.where(hard, dc, k[:, None] * e)
    dp = -k * S - free * tau_plus * e0
    loss = np.where(m > 30, m + np.log(e0 + S), np.log1p(S / np.maximum(e0, np.exp(LONG(-40)))))
    debiased = some & ~clamped
    spread = np.where(debiased, abs(r - tau_plus * e0), 1)
    condition = np.where(debiased, (r + tau_plus * e0) / spread, 1)
    if decoupled:
        loss = m + np.log(S)
        terms = count * (r + tau_plus * e0) / (1 - tau_plus)
        condition = np.where(debiased, np.maximum(terms / S, 1), 1)
    return loss, np.concatenate([dp[:, None], dc], 1), clamped & some, condition


def errors(batch, eps, tau, beta, tau_plus, dtype, decoupled=False):
    """Of each row: that of the loss, relative (a decoupled loss of below 1, which is a difference:
    absolute); of the gradients, of the row's largest, both over the condition; the condition;
    whether Q is at its floor.
    """
    given = [z.to(dtype) for z in batch.inputs]
    loss, stats, kept = operators.forward(
        *given, f64(eps), f64(tau), 4, 0, 0, beta, tau_plus, decoupled, True
    )
    ones = torch.ones(len(given[0]), dtype=dtype)
    dz = operators.backward(ones, *given, f64(tau), stats, kept, 4, 0, beta, 6)
    ours = torch.cat([dz[1][:, None], dz[2]], 1).double().numpy()  # (N, 1 + K, D)

    c = batch.c
    rule = tau, beta, tau_plus, decoupled
    value, g, clamped, condition = closed_form(c[:, 1:], c[:, 0], eps, *rule)
    wrong = np.sqrt(((ours - g.astype(float)[:, :, None] * batch.directions) ** 2).sum(2))
    # No more digits are promised than the dtype has, and none below its least normal number.
    info = torch.finfo(dtype)
    tiny = info.tiny * math.sqrt(ours.shape[2]) / info.eps
    largest = abs(g).max(1) + tiny
    share = wrong / (np.where(batch.sizes > 0, batch.sizes, 1) * largest[:, None])
    size = np.maximum(abs(value), 1) if decoupled else value + tiny
    relative = abs(loss.double().numpy() - value) / size
    return relative / condition, share.max(1) / condition, condition, clamped


@pytest.mark.parametrize("decoupled", [False, True], ids=["", "decoupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tau", TAUS)
def test_loss_and_gradient_given_the_cosines(tau, dtype, decoupled):
    assert np.finfo(LONG).eps < 1e-18
    loss_bound, gradient_bound = 1e-12, 1e-12
    if dtype == torch.float32:
        loss_bound, gradient_bound = (5e-6, 1e-5) if tau >= 0.05 else (1e-5, 5e-5)
    results = []
    for k, batch in enumerate(batches()):
        for j, (beta, tau_plus) in enumerate((b, t) for b in BETAS for t in TAU_PLUS):
            eps = (-1.5, 0.3, 0.6, 0.9, 0.97, 2.0)[(k + j) % 6] + 1e-4  # no cosine
            loss, gradient, *rest = errors(batch, eps, tau, beta, tau_plus, dtype, decoupled)
            assert (loss <= loss_bound).all(), (loss.max(), k, eps, beta, tau_plus)
            assert (gradient <= gradient_bound).all(), (gradient.max(), k, eps, beta, tau_plus)
            results.append((loss, gradient, *rest))
    _, _, condition, clamped = np.concatenate(results, 1)
    assert (condition > 100).mean() < 0.02
    assert 0.05 < clamped.mean() < 0.5


@pytest.mark.parametrize("positives", ["one", "inside", "a logit"])
@pytest.mark.parametrize("power", [16, 32, 64])
def test_a_loss_near_0_has_all_its_digits_in_float64(power, positives):
    """K negatives of the cosine 0, each of n_P positives of 1: L = log(1 + K exp(-1/tau) / n_P).

    The cosines, 1/tau and so the sums are exact. An exponential, a quotient, a product and the
    logarithm are left, each right to about an ulp.
    """
    errors = []
    for n in range(3, 40):
        z = torch.eye(n, 41, dtype=torch.float64)
        options = {"temperature": 1 / power, "reduction": "none"}
        if positives == "one":
            rows, ratio = info_nce(z, z, **options), 2 * (n - 1)
        elif positives == "a logit":
            logits = torch.zeros(2, n, dtype=torch.float64)
            logits[:, 0] = power
            rows = hex_cross_entropy(logits, torch.zeros(2, dtype=torch.int64), eps=2, **options)
            ratio = n - 1
        else:
            labels = torch.arange(n).repeat(3)
            rows = hex_sup_con(z.repeat(3, 1), labels, eps=2, positives="inside", **options)
            ratio = 3 * (n - 1) / 2
        wanted = np.log1p(ratio * np.exp(-np.longdouble(power)))
        errors.append((abs(rows.numpy() - wanted) / wanted).max())
    assert max(errors) <= 4 * np.finfo(np.float64).eps


@pytest.mark.parametrize("anchors", [1, 20])  # row by row, and by tiles
@pytest.mark.parametrize(
    ("positive", "negative", "tau"),
    [(0.6, 0.2, 0.01), (0.3, -0.3, 0.02), (0.65, 0.5, 0.01), (0.5, -1, 0.006)],
)
def test_a_loss_near_0_keeps_its_digits_where_all_rows_share_a_shift(
    positive, negative, tau, anchors
):
    """With 1 for the largest cosine: (1 - c_p) / tau > 30, and the sum of the exponentials is far
    below 1. L = log(1 + K exp((c_n - c_p) / tau)). A rounding of a cosine is 1/tau of it in L."""
    K, at = 300, torch.arange(anchors)
    z0, z1 = (torch.zeros(anchors, 41, dtype=torch.float64) for _ in range(2))
    rest = torch.zeros(K, 41, dtype=torch.float64)
    z0[:, 0], z1[:, 0], z1[at, 2 + at], rest[:, 0], rest[:, 1] = (
        1, positive, (1 - positive**2) ** 0.5, negative, (1 - negative**2) ** 0.5
    )  # fmt: skip
    wanted = np.log1p(K * np.exp((np.longdouble(negative) - positive) / tau))
    options = dict(temperature=tau, reduction="none")
    for rows in (
        info_nce(z0, z1, negatives=rest, **options),
        hex_loss(z0, z1, negatives=rest, eps=2.0, **options),
    ):
        error = (abs(rows.numpy() - wanted) / wanted).max()
        assert error <= 4 * np.finfo(np.float64).eps / tau
        assert rows.max() < 1e-3


def test_a_base_temperature_scales_a_wide_loss_in_its_own_precision():
    """By a temperature that is narrower than the loss, whose ratio float32 would round."""
    tau = torch.tensor(0.02)
    features, labels = torch.eye(6, 5, dtype=torch.float64), torch.arange(6) % 2
    options = dict(eps=0.3, temperature=tau, reduction="none")
    plain = hex_sup_con(features, labels, **options)
    scaled = hex_sup_con(features, labels, base_temperature=0.07, **options)
    torch.testing.assert_close(scaled, plain * (tau.item() / 0.07), rtol=4e-16, atol=0)
