# SPDX-License-Identifier: MIT
"""The definition of the HEX loss in plain dense PyTorch: the oracle of every kernel.

A problem is first written out entry by entry (`Table`): of two views, of labelled rows, or of given
logits. From there on all is the same: the threshold, the range of a row, the loss of each row.
Differentiable twice in the embeddings, the logits and tau, at any of float16, bfloat16, float32 and
float64; works under torch.func and torch.compile. It also serves devices without kernels and the
second derivative. Speed and memory are left to csrc/, argument checks to hex/checks.py, the mean or
sum over rows to the caller.

    N rows (anchors), M columns (candidates of a row), D features
    tau temperature, eps threshold (a cosine)      l_ij a logit: cosine / tau, or given
    P(i) the positives of row i, n_P of them       the others are negatives, or left out
    H(i) the negatives with min(c_ij, 1) > eps_i, or those of i's group; N_h of them
    G(i) the other negatives

Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
Algorithms", WACV 2025 (arXiv 2410.23200); Khosla et al., NeurIPS 2020 (arXiv 2004.11362), for
several positives.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Table", "batch_table", "cosines", "decided_loss", "dots", "labelled_cosines",
           "labelled_rows", "labelled_table", "logits_cosines", "logits_rows", "logits_table",
           "loss_rows", "problem_rows", "problem_table", "quantile_of", "range_of", "reduce",
           "row_loss", "row_range", "threshold", "unit_rows"]  # fmt: skip

# The position of a name is the code that the operators take.
MODES = ("ntxent", "query", "cross", "shared", "own")
LOGITS = len(MODES)  # as a mode of the operators
PAIRINGS = ("self", "pair", "queue")
REDUCTIONS = ("none", "mean", "sum")
VARIANTS = ("paper", "released")
POSITIVES = ("outside", "inside")

Rows = tuple[Tensor, Tensor, Tensor]  # loss, |H| and share of each row


class Table(NamedTuple):
    """A problem, entry by entry: each (N, M)."""

    values: Tensor
    """Cosines, or given logits."""
    positive: Tensor
    negative: Tensor
    whole: Tensor
    """What a row has as a whole (over="all"): positives, negatives and, of rows among themselves,
    the anchor's own cosine."""


# ---- problems written out -----------------------------------------------------------------------


def batch_table(z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int) -> Table:
    """The cosine of each anchor with each of its candidates.

        c_ij = u_i . u_j,  u = z / |z|

    | mode       | rows                   | columns                  | negatives of a row |
    |------------|------------------------|--------------------------|--------------------|
    | 0 "ntxent" | [z0; z1]               | [z0; z1], self included  | 2B - 2             |
    | 1 "query"  | z0                     | z1                       | B - 1              |
    | 2 "cross"  | z0 to z1, then z1 to z0| z1, then z0              | B - 1              |
    | 3 "shared" | z0                     | own row of z1, negatives | K                  |
    | 4 "own"    | z0                     | own row of z1, own K     | K                  |

    Args:
        z0, z1: (B, D), any floating dtype each. Any scale: rows are normalised here.
        negatives: (K, D) for "shared", (B, K, D) for "own"; not looked at otherwise.
        mode: name or code from the table.

    Cosines are float64 if an input is, else float32. The self cosine of "ntxent" is exactly 1, or 0
    for a row of zeros. A row with NaN or an infinity has NaN cosines.

    Raises:
        ValueError: mode is not in the table.
    """
    code = _code(mode, MODES, "mode")
    used = [z0, z1, negatives] if code >= 3 and negatives is not None else [z0, z1]
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32
    u0, u1 = unit_rows(z0.to(dtype)), unit_rows(z1.to(dtype))  # (B, D)
    row = torch.arange(z0.shape[0], device=z0.device)
    if code >= 3:
        assert negatives is not None
        own = (u0 * u1).sum(-1, keepdim=True)  # (B, 1)
        un = unit_rows(negatives.to(dtype))  # (K, D) or (B, K, D)
        others = dots(u0, un) if code == 3 else dots(un, u0.unsqueeze(1)).squeeze(-1)  # (B, K)
        c = torch.cat([own, others], 1)  # (B, 1 + K)
        positive = (torch.arange(c.shape[1], device=c.device) == 0).expand(c.shape)
    elif code == 0:
        c = _cosines_among(torch.cat([u0, u1]))  # (2B, 2B)
        row = torch.arange(c.shape[0], device=c.device)
        positive = row == row.roll(z0.shape[0])[:, None]  # i + B modulo 2B
        negative = (row != row[:, None]) & ~positive
        return Table(c, positive, negative, torch.ones_like(positive))
    else:
        c = dots(u0, u1)  # (B, B)
        positive = row == row[:, None]
        if code == 2:
            c, positive = torch.cat([c, c.T]), torch.cat([positive, positive])  # (2B, B)
    return Table(c, positive, ~positive, torch.ones_like(positive))


def labelled_table(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, pairing: int
) -> Table:
    """The cosines of anchors x (N, D) with candidates y (M, D).

    | pairing   | candidates | left out                                                |
    |-----------|------------|---------------------------------------------------------|
    | 0 "self"  | x          | a row itself                                            |
    | 1 "pair"  | y          | none                                                    |
    | 2 "queue" | y          | of the first N of them all but the row's positive       |

    Positives have the anchor's id, or are marked in mask (b, b), repeated over the views.
    """
    c = labelled_cosines(x, y, pairing)
    row, column = (torch.arange(size, device=c.device) for size in c.shape)
    if mask.numel():
        views = c.shape[0] // mask.shape[0]
        positive = mask.repeat(views, views)
    else:
        positive = ids[:, None] == (ids if pairing == 0 else candidate_ids)
    whole = torch.ones_like(positive)
    seen = whole
    if pairing == PAIRINGS.index("self"):
        seen = row[:, None] != column
    elif pairing == PAIRINGS.index("queue"):
        whole = seen = positive | (column >= c.shape[0])
    return Table(c, positive & seen, seen & ~positive, whole)


def logits_table(logits: Tensor, target: Tensor) -> Table:
    """Logits (N, C): the target column is the positive, the others that are not -inf negatives."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    positive = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    negative = ~positive & (values.detach() != -math.inf)
    return Table(values, positive, negative, positive | negative)


def logits_cosines(logits: Tensor, target: Tensor, tau: Tensor, self_column: bool) -> Table:
    """The same as cosines, logits times tau; with a column of 1, the anchor's own, if wanted."""
    values, positive, negative, whole = logits_table(logits, target)
    c = torch.where(values < math.inf, values * tau.to(values), math.nan)
    if self_column:
        c, whole = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (c, whole))
        none = torch.zeros_like(positive[:, :1])
        positive, negative = (torch.cat([x, none], 1) for x in (positive, negative))
    return Table(c, positive, negative, whole)


def labelled_cosines(x: Tensor, y: Tensor, pairing: int) -> Tensor:
    """c (N, M) of anchors x (N, D) with candidates y (M, D), which are x itself in pairing "self".

    float64 if an input is, else float32; the self cosine is exactly 1, or 0 for a row of zeros.
    """
    among = pairing == PAIRINGS.index("self")
    wide = x.dtype == torch.float64 or (not among and y.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    u = unit_rows(x.to(dtype))  # (N, D)
    return _cosines_among(u) if among else dots(u, unit_rows(y.to(dtype)))


def cosines(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int
) -> tuple[Tensor, Tensor, Tensor]:
    """c (N, M), each row's cosine with its positive (N,), and which are negatives (N, M)."""
    c, positive, negative, _ = batch_table(z0, z1, negatives, mode)
    return c, torch.where(positive, c, 0.0).sum(1), negative


# ---- the threshold ------------------------------------------------------------------------------


def quantile_of(table: Table, quantile: float, over: str = "all") -> Tensor:
    """The mean over rows of the row's quantile of cosines, the adaptive eps. No gradient.

        eps = mean_i min(c_i[k], 1),  c_i ascending,  k = round half to even(quantile (n_i - 1))

    Args:
        quantile: in [0, 1].
        over: "all", each row whole, or "negatives"; n_i the number of them.

    Returns:
        0-d float64, in [-1, 1]. Rows without an element are passed over. NaN if a cosine of a row
        is NaN, its positives' too, or if no row has an element.

    Raises:
        ValueError: over is unknown.
    """
    _code(over, ("all", "negatives"), "over")
    c = table.values.detach()
    kept = table.negative if over == "negatives" else table.whole
    if c.numel() == 0:
        return torch.full((), math.nan, dtype=torch.float64, device=c.device)
    n = kept.sum(1)  # (N,)
    ascending = c.masked_fill(~kept, math.inf).sort(1).values  # (N, M), NaN last
    k = torch.round(quantile * (n - 1).clamp(min=0).to(torch.float64)).to(torch.int64)
    nearest = ascending.gather(1, k[:, None]).squeeze(1).clamp(-1, 1)  # (N,)
    holds_nan = (c.isnan() & table.whole).any(1)
    value = torch.where(holds_nan, math.nan, torch.where(n > 0, nearest, 0.0)).to(torch.float64)
    return value.sum() / ((n > 0) | holds_nan).sum()


def range_of(table: Table) -> tuple[Tensor, Tensor]:
    """The least and the greatest cosine of each row as a whole, (N,) each. No gradient.

    A threshold t on the cosines scaled to [0, 1] by row is eps_i = low_i + t (high_i - low_i).

    Returns: low, high, in [-1, 1]; NaN for a row that holds NaN, or nothing.
    """
    c, kept = table.values.detach(), table.whole
    if c.numel() == 0:
        none = torch.full_like(c.sum(1), math.nan)
        return none, none
    nan = (c.isnan() & kept).any(1) | ~kept.any(1)
    low = c.masked_fill(~kept, math.inf).amin(1).clamp(-1, 1)
    high = c.masked_fill(~kept, -math.inf).amax(1).clamp(-1, 1)
    return torch.where(nan, math.nan, low), torch.where(nan, math.nan, high)


def threshold(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int, quantile: float,
    over: str = "all",
) -> Tensor:  # fmt: skip
    """`quantile_of` a batch."""
    return quantile_of(batch_table(z0, z1, negatives, mode), quantile, over)


def row_range(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int
) -> tuple[Tensor, Tensor]:
    """`range_of` a batch."""
    return range_of(batch_table(z0, z1, negatives, mode))


# ---- the loss -----------------------------------------------------------------------------------


def row_loss(
    table: Table,
    hard: Tensor,
    tau: Tensor,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: str | int = "paper",
    positives: str | int = "outside",
    *,
    logits: bool = False,
    plain: Tensor | None = None,
) -> Rows:
    """The HEX loss of each row, in nats.

        L = log( 1 + S / E ),   S = Q + sum_G exp(l),   E = exp(l_p)            one positive
        L = log( E + S ) - mean_P l,   E = sum_P exp(l)                         positives "outside"
        L = log( E + S ) - log E                                                "inside"
        Q = max( (R - tau_plus N_h E / n_P) / (1 - tau_plus),  N_h exp(-1/tau) )
        R = N_h sum_H exp((1 + beta) l) / sum_H exp(beta l)

    evaluated on the differences d = l - centre with the centre mean_P l, or max_P l "inside", so
    that no exponential overflows and a small loss keeps its digits. variant "released" is what the
    authors' code computes,

        L = log sum_G exp(l) + (number of negatives) exp(-1/tau) - mean_P l  (or - log E)

    and 0 where G is empty.

    Args:
        table: of cosines, or of logits if `logits`: then only the floor of Q knows tau.
        hard: (N, M) bool, which negatives are in H.
        tau: 0-d, > 0; otherwise the loss is NaN.
        beta: >= 0, weight of the hardest. tau_plus: in [0, 1), share of false negatives.
        plain: (N,) bool, rows that are in the paper's form in either variant.

    Returns:
        loss, N_h, and share = Q / (E + S), 0 for "released"; (N,) each. The last two carry no
        gradient. A row without positives has loss and gradient 0, as has one with a single positive
        and no negatives. A row whose only positive is the logit -inf has loss +inf and the gradient
        of log S - l_p; NaN if S is 0. Where the loss is NaN the gradient has NaN in it.

    Raises:
        ValueError: variant or positives is unknown.
    """
    released = _code(variant, VARIANTS, "variant") == 1
    inside = _code(positives, POSITIVES, "positives") == 1
    v, positive, negative, _ = table
    seen = positive | negative
    hard, rest = negative & hard, negative & ~hard  # H and G
    n_p, n_h = positive.sum(1).to(v), hard.sum(1).to(v)  # (N,)
    tau = tau.to(v)
    tau = tau * torch.where(tau > 0, 1.0, math.nan)  # a factor: the gradient is NaN too
    among = torch.where(positive, v, 0.0).sum(1)  # (N,), sum_P v
    lost = among == -math.inf
    centre = _row_max(v, positive) if inside else among / n_p.clamp(min=1)
    centre = torch.where(lost, 0.0, centre)
    # d = l - centre, and the exponent of the floor, -1/tau - centre
    d = v - centre[:, None] if logits else (v - centre[:, None]) / tau
    floor = -1 / tau - centre if logits else -(1 + centre) / tau  # (N,)

    # m: the greatest exponent, which cancels in L and so carries no gradient. Masked places get
    # -inf before exp: value and every derivative are then exactly 0.
    m = _row_max(d, seen).clamp(min=0)
    m = torch.where(n_h > 0, torch.maximum(m, floor.detach()), m)  # (N,)
    # e = exp(d - m)
    e = torch.exp(torch.where(seen, d - m[:, None], -math.inf))  # (N, M)
    # E = sum_P e; where the centre is a single positive, exp(-m) and without gradient
    e_0 = torch.exp(-m)
    big_e = torch.where(positive, e, 0.0).sum(1)
    if not inside:
        big_e = torch.where((n_p == 1) & ~lost, e_0, big_e)
    # r = R / N_h = sum_H b e / sum_H b,  b = exp(beta d), any common scale
    h = _row_max(beta * d, hard)
    b = torch.exp(torch.where(hard, beta * d - h[:, None], -math.inf))  # (N, M)
    r = (b * e).sum(1) / torch.where(n_h > 0, b.sum(1), 1.0)
    # Q = max( N_h (r - tau_plus E / n_P) / (1 - tau_plus),  N_h exp(-1/tau) ), a tie to the first
    q = n_h * (r - tau_plus * big_e / n_p.clamp(min=1)) / (1 - tau_plus)
    f = n_h * torch.exp(torch.where(n_h > 0, floor - m, 0.0))
    local = torch.where(q >= f, q, f)
    # S = Q + sum_G e
    s = local + torch.where(rest, e, 0.0).sum(1)
    share = (local / (big_e + s)).detach()

    nothing = 0 * torch.where(seen, v, 0.0).sum(1) / tau + 0  # 0 in the graph, NaN for NaN
    log_e = torch.zeros_like(m)  # log E: 0 outside, where the centre is mean_P l
    if inside:
        # L = log(1 + exp(x)),  x = log S - log E
        held = positive | (n_p == 0)[:, None]  # a row without positives must not take log 0
        log_e = torch.logsumexp(torch.where(held, d, -math.inf), 1)
        x = m + torch.log(torch.where(s > 0, s, 1.0)) - log_e
        loss = torch.where(s > 0, -F.logsigmoid(-x), s + nothing)
    else:
        # L = log(E + S) + m = log(1 + exp(m) (S + E - e_0))
        loss = _log1p_scaled(s + torch.where(n_p > 1, big_e - e_0, 0.0), m)
    loss = torch.where(lost, m + torch.log(torch.where(lost, s, 1.0)), loss)
    if released:
        # L = log sum_G exp(d) + (number of negatives) exp(-1/tau), less log E inside
        g = _row_max(d, rest)
        total = torch.exp(torch.where(rest, d - g[:, None], -math.inf)).sum(1)  # 0 or >= 1
        some = rest.any(1)
        constant = negative.sum(1).to(v) * torch.exp(-1 / tau)
        form = g + torch.log(torch.where(some, total, 1.0)) + constant - log_e
        form = torch.where(some, form, nothing)
        kept = torch.zeros_like(some) if plain is None else plain
        loss, share = torch.where(kept, loss, form), torch.where(kept, share, 0.0)
    loss = loss - torch.where(positive & lost[:, None], v, 0.0).sum(1)
    loss = torch.where(n_p > 0, loss, nothing)
    known = torch.where(tau.isnan(), math.nan, 1.0).detach()
    loss = loss * torch.where(loss.isnan(), math.nan, known).detach()  # and so is the gradient
    return loss, n_h * known, torch.where(n_p > 0, share, 0.0) * known


def decided_loss(
    table: Table, score: Tensor, eps: Tensor, tau: Tensor, beta: float, tau_plus: float,
    variant: str | int, positives: str | int = "outside", *, logits: bool = False,
) -> Rows:  # fmt: skip
    """`row_loss` where a threshold decides: H is the negatives with min(score, 1) > eps.

    eps: 0-d or (N,), a cosine; nothing is in H where eps >= 1, and eps = +inf is InfoNCE in either
    variant. No gradient. NaN gives NaN in all three results, as does a score of a negative that is
    NaN where its value is not.
    """
    eps = eps.reshape(-1, 1)  # (N, 1) or (1, 1)
    wide = torch.promote_types(score.dtype, eps.dtype)  # float32 would round a float64 eps
    hard = score.detach().clamp(max=1).to(wide) > eps.to(wide)
    compared = table.negative & ~table.values.isnan()
    unknown = eps.isnan().squeeze(1) | (score.isnan() & compared).any(1)
    plain = (eps == math.inf).squeeze(1)
    rows = row_loss(
        table, hard, tau, beta, tau_plus, variant, positives, logits=logits, plain=plain
    )
    known = torch.where(unknown, math.nan, 1.0).to(table.values)
    loss, n_h, share = (x * known for x in rows)
    return loss, n_h, share


def loss_rows(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, eps: Tensor, tau: Tensor, mode: str | int,
    beta: float = 1.0, tau_plus: float = 0.1, variant: str | int = "paper",
) -> Rows:  # fmt: skip
    """Loss, |H| and share of each row of a batch; see `batch_table`, `decided_loss`, `row_loss`."""
    table = batch_table(z0, z1, negatives, mode)
    return decided_loss(table, table.values, eps, tau, beta, tau_plus, variant)


def labelled_rows(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, groups: Tensor,
    candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor, eps: Tensor, tau: Tensor,
    pairing: int, beta: float, tau_plus: float, variant: str | int, positives: str | int,
) -> Rows:  # fmt: skip
    """Loss, |H| and share of each row of x. H is of groups, of a guide's cosines, or of x's own."""
    table = labelled_table(x, y, ids, candidate_ids, mask, pairing)
    options = beta, tau_plus, variant, positives
    if groups.numel():
        hard = groups[:, None] == (groups if pairing == 0 else candidate_groups)
        return row_loss(table, hard, tau, *options)
    score = table.values
    if guide.numel():
        guide, candidate_guide = guide.detach().to(score), candidate_guide.detach().to(score)
        score = labelled_cosines(guide, candidate_guide, pairing)
    return decided_loss(table, score, eps, tau, *options)


def logits_rows(
    logits: Tensor, target: Tensor, score: Tensor, eps: Tensor, tau: Tensor, given: bool,
    beta: float, tau_plus: float, variant: str | int,
) -> Rows:  # fmt: skip
    """Loss, |H| and share of each row. H is what `score` marks if it is given, or else what has a
    score above eps, by default the cosine logit times tau."""
    table = logits_table(logits, target)
    options = beta, tau_plus, variant
    if given:
        return row_loss(table, score > 0.5, tau, *options, logits=True)
    values = table.values.detach()
    score = score.to(values) if score.numel() else values * tau.detach().to(values)
    return decided_loss(table, score, eps, tau, *options, logits=True)


def problem_rows(
    z0: Tensor, z1: Tensor, negatives: Tensor, ids: Tensor, mask: Tensor, groups: Tensor,
    guide: Tensor, eps: Tensor, tau: Tensor, mode: int, positives: int, beta: float,
    tau_plus: float, variant: int,
) -> Rows:  # fmt: skip
    """Loss, |H| and share of each row of a problem as the operators are given it (problem.py)."""
    if mode == LOGITS:
        return logits_rows(z0, ids, z0[:0], eps, tau, False, beta, tau_plus, variant)
    options: tuple[Any, ...] = (beta, tau_plus, variant, POSITIVES[max(positives - 1, 0)])
    if positives:
        x, y, own, candidates, pairing = _as_pairs(z0, z1, negatives, ids, mode)
        deciders = _halves(groups, x.shape[0]), _halves(guide, x.shape[0])
        given: Any = x, y, own, candidates, mask, *deciders[0], *deciders[1], eps, tau, pairing
        return labelled_rows(*(*given, *options))
    table = batch_table(z0, z1, negatives, mode)
    if groups.numel():
        return row_loss(table, _same_group(groups, z0, z1, negatives, mode), tau, *options)
    score = table.values
    if guide.numel():
        seen = guide.detach().to(score)
        g0, g1, others = _of_inputs(seen, z0, z1)
        score = batch_table(g0, g1, others.view(*negatives.shape[:-1], seen.shape[1]), mode).values
    return decided_loss(table, score, eps, tau, *options)


def problem_table(
    z0: Tensor, z1: Tensor, negatives: Tensor, ids: Tensor, mask: Tensor, tau: Tensor, mode: int,
    several: bool, self_column: bool,
) -> Table:  # fmt: skip
    """The cosines of a problem, for its threshold."""
    if mode == LOGITS:
        return logits_cosines(z0, ids, tau, self_column)
    if several:
        x, y, own, candidates, pairing = _as_pairs(z0, z1, negatives, ids, mode)
        return labelled_table(x, y, own, candidates, mask, pairing)
    return batch_table(z0, z1, negatives, mode)


def _as_pairs(
    z0: Tensor, z1: Tensor, negatives: Tensor, ids: Tensor, mode: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """x, y, their ids and the pairing of `labelled_table`."""
    if mode == MODES.index("ntxent"):
        return torch.cat([z0, z1]), z1[:0], ids, ids[:0], PAIRINGS.index("self")
    own, others = _halves(ids, z0.shape[0])
    if mode == MODES.index("query"):
        return z0, z1, own, others, PAIRINGS.index("pair")
    return z0, torch.cat([z1, negatives]), own, others, PAIRINGS.index("queue")


def _halves(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return x[:n], x[n:]


def _of_inputs(x: Tensor, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What belongs to the rows of z0, of z1 and of the negatives."""
    B, end = z0.shape[0], z0.shape[0] + z1.shape[0]
    return x[:B], x[B:end], x[end:]


def _same_group(groups: Tensor, z0: Tensor, z1: Tensor, negatives: Tensor, mode: int) -> Tensor:
    """Of the entries of `batch_table`, which are of the anchor's group."""
    own, its, others = _of_inputs(groups, z0, z1)
    if mode == MODES.index("ntxent"):
        return groups[:, None] == groups
    if mode >= MODES.index("shared"):
        others = others.view(negatives.shape[:-1]).expand(z0.shape[0], -1)
        return own[:, None] == torch.cat([its[:, None], others], 1)
    there = own[:, None] == its
    return torch.cat([there, there.T]) if mode == MODES.index("cross") else there


def reduce(rows: Tensor, reduction: int) -> Tensor:
    """The losses of the rows themselves, their mean (0 without rows) or sum."""
    if reduction == REDUCTIONS.index("none"):
        return rows
    total = rows.sum()
    mean = reduction == REDUCTIONS.index("mean") and rows.shape[0]
    return total / rows.shape[0] if mean else total


# ---- parts --------------------------------------------------------------------------------------


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| over the last axis; rows of zeros give 0, rows with NaN or an infinity all NaN.

    The row is first scaled by a power of two that brings its largest element to [1, 2): squares of
    1e-23 or 1e20 leave the range of float32. The scale is a constant, so the gradient is that of
    x / |x|; it is applied in two halves, since 2^149 itself is out of range.
    """
    if x.shape[-1] == 0:
        return x  # nothing to take a maximum of
    peak = x.detach().abs().amax(-1, keepdim=True)  # (..., 1)
    power = torch.where(peak == 0, 1.0, peak).log2().floor()
    half = (power / 2).floor()
    y = x * torch.exp2(-half) * torch.exp2(half - power)  # peak inf: half - power is NaN
    y = torch.where(peak == 0, 1.0, y)  # 1 in place of 0: sqrt has no derivative at 0
    return torch.where(peak == 0, 0.0, y / (y * y).sum(-1, keepdim=True).sqrt())


def dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of a with each of b, in their dtype under autocast as well."""
    if a.device.type == "meta":  # has none to switch off; asking torch does not trace in 2.10
        return a @ b.mT
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def _cosines_among(u: Tensor) -> Tensor:
    """(N, N) of unit rows; a row's own is exactly 1, or 0 of zeros, or NaN."""
    row = torch.arange(u.shape[0], device=u.device)
    own = (u * u).sum(-1, keepdim=True).detach().round()  # (N, 1)
    return torch.where(row[:, None] == row, own, dots(u, u))


def _row_max(x: Tensor, among: Tensor) -> Tensor:
    """Greatest of each row among a mask, 0 where the mask is empty, NaN if NaN; no gradient."""
    if x.shape[1] == 0:
        return torch.zeros_like(x.detach().sum(1))
    top = x.detach().masked_fill(~among, -math.inf).amax(1)
    return torch.where(among.any(1), top, 0.0)


def _log1p_scaled(s: Tensor, m: Tensor) -> Tensor:
    """log(1 + s exp(m)) = m + log(exp(-m) + s) for s, m >= 0, with all digits of a small loss.

    The first form is for m <= 30; above, s is not small: where the greatest exponent m is in H,
    Q >= 1 unless N_h > exp(30), and else s has a term 1. Each form sees only its own m, since an
    infinity in the branch not taken would turn into NaN in the gradient.
    """
    near = m <= 30
    first = torch.log1p(s * torch.exp(torch.where(near, m, 0.0)))
    second = m + torch.log(torch.where(near, 1.0, torch.exp(-m) + s))
    return torch.where(near, first, second)


def _code(name: str | int, names: tuple[str, ...], argument: str) -> int:
    code = names.index(name) if name in names else name
    if isinstance(code, str) or not 0 <= code < len(names):
        raise ValueError(f"{argument}: got {name!r}, wanted one of {names} or its position")
    return code
