# SPDX-License-Identifier: MIT
"""The HEX loss of some rows and its gradient by closed forms, in NumPy, as exact as the type given.

float64 is a truth for float32 and half precision, NumPy's longdouble (64 bits of mantissa on x86)
for float64. The formulas are those of docs/math.md, written here once more: neither PyTorch's
operators nor its derivatives are in them. What is measured with it is in accuracy.py.

    S rows (anchors), M columns (their candidates), d = (c - c_0) / tau or l - l_0
    c_0 the mean of the row's positives; H the negatives that are hard, G the others
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Rows(NamedTuple):
    loss: Array  # (S,)
    slopes: Array
    """(S, M), the derivatives of the loss in the values."""
    of_loss: Array
    of_slopes: Array
    """(S,), conditions: the terms of S, and of E + S, by which the slopes are divided, over that
    sum. They are 1 but for the debiasing, a difference."""


def rows(
    values: Array, positive: Array, negative: Array, hard: Array, tau: float, beta: float,
    tau_plus: float, logits: bool = False,
) -> Rows:  # fmt: skip
    """The loss of each row and its derivatives, in the dtype of the values.

    Args:
        values: (S, M) cosines, or logits, which are divided by no temperature.
        positive, negative, hard: (S, M) bool; a row has at least one positive, and its hard
            entries are negatives. With several positives their mean is outside the logarithm.
    """
    one = values.dtype.type(1)
    tau, some = one * tau, hard.any(1)
    n_p, n_h = positive.sum(1), hard.sum(1)
    centre = np.where(positive, values, 0).sum(1) / n_p
    unit = one if logits else tau  # of which the values are multiples
    d = (values - centre[:, None]) / unit
    floor = -1 / tau - centre if logits else -(1 + centre) / tau
    seen = positive | negative
    m = np.maximum(np.where(seen, d, -np.inf).max(1), 0)
    m = np.where(some, np.maximum(m, floor), m)

    e = np.where(seen, np.exp(np.where(seen, d - m[:, None], 0)), 0)
    e_0 = np.exp(-m)
    among = np.where(n_p == 1, e_0, np.where(positive, e, 0).sum(1))  # E
    top = np.where(some, np.where(hard, d, -np.inf).max(1), 0)
    b = np.where(hard, np.exp(beta * np.where(hard, d - top[:, None], 0)), 0)
    b = b / np.where(some, b.sum(1), 1)[:, None]
    r = (b * e).sum(1)
    q = n_h * (r - tau_plus * among / n_p) / (one - tau_plus)
    f = np.where(some, n_h * np.exp(np.where(some, floor - m, 0)), 0)
    above = some & (q >= f)
    s = np.where(above, q, f) + np.where(negative & ~hard, e, 0).sum(1)

    w = s + np.where(n_p > 1, among - e_0, 0)
    small = np.log1p(w * np.exp(np.minimum(m, 30)))
    loss = np.where(m <= 30, small, m + np.log(np.where(m <= 30, 1, e_0 + w)))

    k = 1 / (unit * (among + s))
    t = np.where(above, tau_plus * n_h / ((one - tau_plus) * n_p), 0)
    on_h = (k * n_h * above / (one - tau_plus))[:, None] * b * (e + beta * (e - r[:, None]))
    on_p = (k * (1 - t))[:, None] * (e - (among / n_p)[:, None])
    on_p = np.where((n_p == 1)[:, None], 0, on_p) - (k * (s + t * among) / n_p)[:, None]
    slopes = np.where(hard, on_h, np.where(negative, k[:, None] * e, 0))
    without = n_h * (r + tau_plus * among / n_p) / (one - tau_plus)  # q, added up
    excess = np.where(above, without - q, 0)
    of_loss = 1 + excess / np.where(w > 0, w, 1)
    return Rows(loss, np.where(positive, on_p, slopes), of_loss, 1 + excess / (among + s))


def unit_rows(z: Array) -> tuple[Array, Array]:
    """u = z / |z|, (N, D), and |z|, (N, 1); a row of zeros has u = 0."""
    peak = abs(z).max(1, keepdims=True)
    peak = np.where(peak == 0, 1, peak)
    length = peak * np.sqrt(((z / peak) ** 2).sum(1, keepdims=True))
    return z / np.where(length == 0, 1, length), length


def embedding_gradient(u: Array, length: Array, anchors: Array, slopes: Array) -> Array:
    """The gradient in all embeddings, (N, D), of sum_ij slopes_ij c_ij, whose i are anchors.

    dz = (du - (du . u) u) / |z|, and 0 for a row of zeros
    """
    du = slopes.T @ u[anchors]
    du[anchors] += slopes @ u
    return (du - (du * u).sum(1, keepdims=True) * u) / np.where(length == 0, np.inf, length)
