# SPDX-License-Identifier: MIT
"""The HEX loss of rows whose entries have classes, in plain dense PyTorch: labels, groups, logits.

The counterpart of reference.py for several positives, for H(i) from given groups or from a guide's
cosines, and for logits in place of embeddings: the oracle of csrc/cpu/classes.inc, what devices
without kernels run, and the second derivative. Differentiable twice in the embeddings, the logits
and tau; works under torch.func and torch.compile.

    l_ij logits: cosine / tau, or given       P(i) positives, n_P of them; no column of neither
    H(i), G(i) the negatives, hard and not    class is decided before; only l carries gradient
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import _dots, _log1p_scaled, _row_max, _unit_rows

__all__ = ["class_rows", "labelled_cosines", "labelled_rows", "logits_rows", "logits_sets",
           "quantile_of_rows", "range_of_rows", "sets"]  # fmt: skip

PAIRINGS = ("self", "pair", "queue")  # position = the code of the raw ops
POSITIVES = ("outside", "inside")


def labelled_cosines(x: Tensor, y: Tensor, pairing: int) -> Tensor:
    """c (N, M) of anchors x (N, D) with candidates y (M, D), which are x itself in pairing "self".

    float64 if an input is, else float32; the self cosine is exactly 1, or 0 for a row of zeros.
    """
    self_paired = pairing == PAIRINGS.index("self")
    wide = x.dtype == torch.float64 or (not self_paired and y.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    u = _unit_rows(x.to(dtype))  # (N, D)
    if not self_paired:
        return _dots(u, _unit_rows(y.to(dtype)))
    row = torch.arange(u.shape[0], device=u.device)
    own = (u * u).sum(-1, keepdim=True).detach().round()  # (N, 1): 1, or 0 for zeros, or NaN
    return torch.where(row[:, None] == row, own, _dots(u, u))


def sets(ids: Tensor, candidate_ids: Tensor, mask: Tensor, n: int, m: int, pairing: int
         ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which of the entries (N, M) are positives and which negatives, bool; the rest is left out.

    Positives have the anchor's id, or are marked in mask (b, b), repeated over the views. Left out
    are a row itself ("self"), and of the first N candidates all but the positive ("queue").
    """
    row, column = torch.arange(n, device=ids.device), torch.arange(m, device=ids.device)
    if mask.numel():
        views = n // mask.shape[0]
        positive = mask.repeat(views, views)
    else:
        other = ids if pairing == 0 else candidate_ids
        positive = ids[:, None] == other
    if pairing == PAIRINGS.index("self"):
        seen = row[:, None] != column
    elif pairing == PAIRINGS.index("queue"):
        seen = positive | (column >= n)
    else:
        seen = torch.ones_like(positive)
    return positive & seen, seen & ~positive


def class_rows(
    logits: Tensor,
    positive: Tensor,
    negative: Tensor,
    hard: Tensor,
    tau: Tensor,
    beta: float,
    tau_plus: float,
    variant: int,
    positives: int,
    plain: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row, in nats.

        E = sum_P exp(l),  N_h = |H|
        R = N_h sum_H exp((1 + beta) l) / sum_H exp(beta l)
        Q = max( (R - tau_plus N_h E / n_P) / (1 - tau_plus),  N_h exp(-1/tau) )
        D = E + Q + sum_G exp(l)
        L = log D - mean_P l    (positives 0, outside),    log D - log E    (1, inside)

    variant 1, released:  L = log sum_G exp(l) + |H and G| exp(-1/tau) - (mean_P l, or log E), and
    0 where G is empty; not in the rows (bool, (N,) or 0-d) that are `plain`.

    Args:
        logits: (N, M); -inf where an entry is of no class. positive, negative, hard: (N, M) bool,
            hard within negative. tau: 0-d, > 0 or the loss is NaN.

    Returns:
        loss (N,), n_hard (N,), share (N,) = Q / D; the last two carry no gradient. A row without
        positives has loss and gradient 0, as has one with a single positive and no negatives. A
        row whose only positive is -inf has loss +inf, and the gradient of log D - l; NaN if there
        is nothing else in D. Where the loss is NaN the gradient has NaN in it.
    """
    seen = positive | negative
    tau = tau.to(logits)
    tau = tau * torch.where(tau > 0, 1.0, math.nan)
    hard, rest = negative & hard, negative & ~hard
    l = torch.where(seen, logits, 0.0)  # noqa: E741
    n_p, n_h = positive.sum(1).to(l), hard.sum(1).to(l)  # (N,)
    some = n_p > 0
    held = positive | ~some[:, None]  # a row without positives must not divide by 0
    inside = positives == POSITIVES.index("inside")
    if inside:
        centre = _row_max(l, positive)  # (N,)
    else:
        centre = torch.where(positive, l, 0.0).sum(1) / n_p.clamp(min=1)
    lost = torch.where(positive, l, 0.0).sum(1) == -math.inf  # (N,)
    centre = torch.where(lost, 0.0, centre)
    d = l - centre[:, None]  # (N, M)
    lowest = -1 / tau - centre  # (N,), the floor's exponent
    m = _row_max(d, seen).clamp(min=0)
    m = torch.where(n_h > 0, torch.maximum(m, lowest.detach()), m)  # (N,), cancels in L

    e = torch.exp(torch.where(seen, d - m[:, None], -math.inf))  # (N, M)
    big_e = torch.where(positive, e, 0.0).sum(1)  # (N,)
    h = _row_max(beta * d, hard)
    b = torch.exp(torch.where(hard, beta * d - h[:, None], -math.inf))
    r = (b * e).sum(1) / torch.where(n_h > 0, b.sum(1), 1.0)
    q = n_h * (r - tau_plus * big_e / n_p.clamp(min=1)) / (1 - tau_plus)
    f = n_h * torch.exp(torch.where(n_h > 0, lowest - m, 0.0))
    local = torch.where(q >= f, q, f)
    s = local + torch.where(rest, e, 0.0).sum(1)  # (N,)
    share = (local / (big_e + s)).detach()

    nothing = 0 * torch.where(seen, l, 0.0).sum(1)  # (N,), NaN for NaN, in the graph
    log_e = torch.logsumexp(torch.where(held, d, -math.inf), 1)  # (N,)
    there = s > 0
    if inside:
        x = m + torch.log(torch.where(there, s, 1.0)) - log_e
        loss = torch.where(there, -F.logsigmoid(-x), s + nothing)
    else:
        loss = _log1p_scaled(s + torch.where(n_p > 1, big_e - torch.exp(-m), 0.0), m)
    loss = torch.where(lost, m + torch.log(torch.where(lost, s, 1.0)), loss)
    if variant == 1:
        g = _row_max(d, rest)
        total = torch.exp(torch.where(rest, d - g[:, None], -math.inf)).sum(1)
        any_rest = rest.any(1)
        constant = negative.sum(1).to(l) * torch.exp(-1 / tau)
        released = g + torch.log(torch.where(any_rest, total, 1.0)) + constant
        released = released - (log_e if inside else 0.0)
        released = torch.where(any_rest, released, nothing)
        loss = torch.where(plain, loss, released)
        share = torch.where(plain, share, 0.0)
    loss = loss - torch.where(positive & lost[:, None], l, 0.0).sum(1)
    loss = torch.where(some, loss, nothing)
    known = torch.where(tau.isnan(), math.nan, 1.0).detach()
    loss = loss * torch.where(loss.isnan(), math.nan, known).detach()  # and so is the gradient
    return loss, n_h * known, torch.where(some, share, 0.0) * known


def _membership(score: Tensor, eps: Tensor, compared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """min(score, 1) > eps (N, M), rows where eps is +inf, and 1, but NaN where eps or the score of
    an entry that is compared is NaN."""
    eps = eps.reshape(-1, 1)
    wide = torch.promote_types(score.dtype, eps.dtype)  # float32 would round a float64 eps
    hard = score.detach().clamp(max=1).to(wide) > eps.to(wide)
    unknown = eps.isnan().squeeze(1) | (score.isnan() & compared).any(1)
    known = torch.where(unknown, math.nan, 1.0)
    return hard, (eps == math.inf).squeeze(1), known


def labelled_rows(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, groups: Tensor,
    candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor, eps: Tensor, tau: Tensor,
    pairing: int, variant: int, positives: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, |H| and share of each row of x; arguments as of torch.ops.hex.labelled_forward."""
    c = labelled_cosines(x, y, pairing)
    n, m = c.shape
    positive, negative = sets(ids, candidate_ids, mask, n, m, pairing)
    if groups.numel():
        hard = groups[:, None] == (groups if pairing == 0 else candidate_groups)
        plain, known = hard.new_zeros(n), c.new_ones(n)
    else:
        score = c
        if guide.numel():
            dtype = c.dtype
            score = labelled_cosines(guide.detach().to(dtype), candidate_guide.detach().to(dtype),
                                     pairing)  # fmt: skip
        hard, plain, known = _membership(score, eps, negative & ~c.isnan())
    clean = tau.to(c)
    loss, n_h, share = class_rows(
        c / clean, positive, negative, hard, clean, beta, tau_plus, variant, positives, plain
    )
    known = known.to(c)
    return loss * known, n_h * known, share * known


def logits_sets(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target column, and the other columns that are not -inf; (N, C) bool."""
    positive = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    return positive, ~positive & (logits.detach() != -math.inf)


def logits_rows(
    logits: Tensor, target: Tensor, score: Tensor, eps: Tensor, tau: Tensor, given: bool,
    variant: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, |H| and share of each row; arguments as of torch.ops.hex.logits_forward."""
    l = logits if logits.dtype == torch.float64 else logits.float()  # noqa: E741
    positive, negative = logits_sets(l, target)
    if given:
        eps = torch.full_like(eps, 0.5)
    scores = score.to(l) if score.numel() else l.detach() * tau.detach().to(l)
    hard, plain, known = _membership(scores, eps, negative & ~l.isnan())
    loss, n_h, share = class_rows(
        l, positive, negative, hard, tau, beta, tau_plus, variant, 0, plain & (not given)
    )
    known = known.to(l)
    return loss * known, n_h * known, share * known


def quantile_of_rows(c: Tensor, kept: Tensor, seen: Tensor, quantile: float) -> Tensor:
    """The mean over rows of the quantile of their kept entries; 0-d float64, no gradient.

    k = round half to even(quantile (n_i - 1)) of n_i kept in ascending order. Rows that keep none
    are passed over; NaN if a seen entry is NaN, or if no row keeps any.
    """
    c = c.detach()
    n = kept.sum(1)  # (N,)
    if c.shape[0] == 0 or c.shape[1] == 0:
        return torch.full((), math.nan, dtype=torch.float64, device=c.device)
    ascending = c.masked_fill(~kept, math.inf).sort(1).values
    rank = torch.round(quantile * (n - 1).clamp(min=0).to(torch.float64)).to(torch.int64)
    nearest = ascending.gather(1, rank[:, None]).squeeze(1).clamp(-1, 1)  # (N,)
    holds_nan = (c.isnan() & seen).any(1)
    value = torch.where(holds_nan, math.nan, torch.where(n > 0, nearest, 0.0)).to(torch.float64)
    return value.sum() / ((n > 0) | holds_nan).sum()


def range_of_rows(c: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest kept entry of each row, in [-1, 1]; NaN if one is, or if none."""
    c, top = c.detach(), torch.full_like(c[:, :1].sum(1), math.nan).detach()
    if c.shape[1] == 0 or c.shape[0] == 0:
        return top, top
    nan = (c.isnan() & kept).any(1) | ~kept.any(1)
    low, high = c.masked_fill(~kept, math.inf).amin(1), c.masked_fill(~kept, -math.inf).amax(1)
    low, high = low.clamp(-1, 1), high.clamp(-1, 1)
    return torch.where(nan, math.nan, low), torch.where(nan, math.nan, high)
