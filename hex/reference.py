# SPDX-License-Identifier: MIT
"""The definition of the HEX loss in plain, dense PyTorch: every kernel is tested against it.

A problem, as problem.py lays it out, is first written out entry by entry, as a `Table` of all
anchors against all their candidates. The threshold, the range of a row and the loss of a row are
then the same formulas for two views, for several positives and for given logits.

Every function is differentiable twice in the embeddings, the logits and tau, and works under
torch.func and torch.compile. The formulas also serve devices without kernels, and the second
derivative everywhere. Speed and memory are left to csrc/, checks of arguments to checks.py.

    N rows (anchors), M columns (the candidates of a row), D features
    tau temperature, eps threshold (a cosine), l_ij a logit: cosine / tau, or given
    P(i) the positives of row i, n_P of them
    H(i) the negatives with min(c_ij, 1) > eps_i, or those of the anchor's group; N_h of them
    G(i) the other negatives

Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
Algorithms", WACV 2025 (arXiv 2410.23200); Khosla et al., NeurIPS 2020 (arXiv 2004.11362), for
several positives.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Table", "cosines", "decided_loss", "logits_table", "loss_rows", "problem_cosines",
           "problem_rows", "problem_table", "quantile_of", "range_of", "reduce", "row_loss",
           "row_quantiles", "row_range", "threshold"]  # fmt: skip

# The position of a name is the code that the operators take.
MODES = ("ntxent", "query", "cross", "unpaired", "paired")
LOGITS = len(MODES)  # the code of the mode in which logits are given
REDUCTIONS = ("none", "mean", "sum")
VARIANTS = ("paper", "released", "excluded")
POSITIVES = ("outside", "inside")

Rows = tuple[Tensor, Tensor, Tensor]  # loss, |H| and share of each row


class Table(NamedTuple):
    """A problem entry by entry: each tensor is (N, M)."""

    values: Tensor
    """Cosines, or the given logits."""
    positive: Tensor
    """bool: the candidate is a positive of the anchor."""
    negative: Tensor
    """bool: the candidate is a negative of the anchor."""
    whole: Tensor
    """bool: the candidate is in the row that over="all" sees. These are the positives, the
    negatives and, where anchors are candidates themselves, the anchor's own cosine."""


# ---- problems written out -----------------------------------------------------------------------


def problem_cosines(z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, several: bool) -> Tensor:
    """The cosine c_ij = u_i . u_j, u = z / |z|, of each anchor with each of its candidates.

    | mode         | rows                    | columns                    |
    |--------------|-------------------------|----------------------------|
    | 0 "ntxent"   | z0, then z1             | z0, then z1, self included |
    | 1 "query"    | z0                      | z1                         |
    | 2 "cross"    | z0 to z1, then z1 to z0 | z1, then z0                |
    | 3 "unpaired" | z0                      | own row of z1, negatives   |
    | 4 "paired"   | z0                      | own row of z1, own K       |

    With several positives, in "unpaired", the columns are all rows of z1 and then the negatives.

    Args:
        z0, z1: (B, D), each of any floating dtype and any scale, as rows are normalised here.
        negatives: (K, D) in "unpaired", (B, K, D) in "paired"; the other modes do not look at it.

    Returns:
        (N, M), float64 if an input is, else float32. The self cosine of "ntxent" is exactly 1, or
        0 for a row of zeros. A row with NaN or an infinity has NaN cosines.
    """
    given = mode >= MODES.index("unpaired")
    used = (z0, z1, negatives) if given else (z0, z1)
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32
    u0, u1 = _unit_rows(z0.to(dtype)), _unit_rows(z1.to(dtype))  # (B, D)
    if mode == MODES.index("ntxent"):
        return _cosines_among(torch.cat([u0, u1]))  # (2B, 2B)
    if not given:
        c = _dots(u0, u1)  # (B, B)
        return torch.cat([c, c.T]) if mode == MODES.index("cross") else c
    un = _unit_rows(negatives.to(dtype))  # (K, D) or (B, K, D)
    if several:
        return _dots(u0, torch.cat([u1, un]))  # (B, B + K)
    own = (u0 * u1).sum(-1, keepdim=True)  # (B, 1)
    shared = mode == MODES.index("unpaired")
    others = _dots(u0, un) if shared else _dots(un, u0.unsqueeze(1)).squeeze(-1)  # (B, K)
    return torch.cat([own, others], 1)  # (B, 1 + K)


def problem_table(
    z0: Tensor, z1: Tensor, negatives: Tensor, ids: Tensor, mask: Tensor, tau: Tensor, mode: int,
    several: bool, self_column: bool,
) -> Table:  # fmt: skip
    """A problem as the operators get it (problem.py), with its cosines.

    With one positive that is the row of the same image in the other view. With several they are
    the candidates with the anchor's id, or those that the mask marks; and in "unpaired" the rows of
    z1 that are no positives are left out.

    A mask (rows, columns) says something of entry (i, j) in its entry (i % rows, j % columns). The
    column j counts the candidates of `problem_cosines`, without the own row of z1 of one positive
    in "unpaired" and "paired". A mask of booleans marks all positives. One of codes (uint8) marks
    further positives, where they may be several, with 1, and what is left out with 2, beside what
    the ids say. It leaves out neither a positive nor the anchor's own cosine.

    A candidate that is left out is in no set and not in the whole row, even if its cosine is NaN.
    In "paired", where only its anchor meets it, it is not looked at at all.
    """
    if mode == LOGITS:
        return _logits_cosines(z0, ids, tau, self_column)
    given = mask.numel() > 0
    if given and mode == MODES.index("paired"):  # 0 times NaN would be one in the gradient
        codes = _repeated(mask, negatives.shape[:2])
        negatives = torch.where((codes == 2)[..., None], 0.0, negatives)
    c = problem_cosines(z0, z1, negatives, mode, several)
    positive = torch.zeros_like(c, dtype=torch.bool)
    if not several:
        image = torch.arange(z0.shape[0], device=z0.device)
        none = image.new_full(negatives.shape[:-1], -1).flatten()
        images = torch.cat([image, image, none])
        positive = _is_alike(images, z0, z1, negatives, mode, several)
    elif ids.numel() and not (given and mask.dtype == torch.bool):
        positive = _is_alike(ids, z0, z1, negatives, mode, several)
    left_out = torch.zeros_like(positive)
    if given:
        apart = int(not several and mode >= MODES.index("unpaired"))
        codes = F.pad(_repeated(mask, (c.shape[0], c.shape[1] - apart)), (apart, 0))
        positive = positive | (codes == 1) if several else positive
        left_out = (codes == 2) & ~positive
    row, column = (torch.arange(size, device=c.device) for size in c.shape)
    whole = seen = torch.ones_like(positive)
    if mode == MODES.index("ntxent"):
        seen = row[:, None] != column
        left_out = left_out & seen
    elif several and mode == MODES.index("unpaired"):
        whole = seen = positive | (column >= z1.shape[0])
    return Table(c, positive & seen, seen & ~positive & ~left_out, whole & ~left_out)


def _repeated(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The codes of a mask for every row and column of a table of this shape."""
    codes = mask.to(torch.uint8)
    return codes.repeat(shape[0] // mask.shape[0], shape[1] // mask.shape[1])


def logits_table(logits: Tensor, target: Tensor) -> Table:
    """Logits (N, C): the target column is the positive, the others that are not -inf negatives."""
    values = logits if logits.dtype == torch.float64 else logits.float()
    positive = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    negative = ~positive & (values.detach() != -math.inf)
    return Table(values, positive, negative, positive | negative)


def _scaled(values: Tensor, tau: Tensor) -> Tensor:
    """The cosines of logits: NaN for +inf, which is none."""
    return torch.where(values < math.inf, values * tau.to(values), math.nan)


def _logits_cosines(logits: Tensor, target: Tensor, tau: Tensor, self_column: bool) -> Table:
    """`logits_table` with cosines, logits times tau. With `self_column` there is one more column:
    the anchor's own cosine, 1."""
    values, positive, negative, whole = logits_table(logits, target)
    c = _scaled(values, tau)
    if self_column:
        c, whole = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (c, whole))
        none = torch.zeros_like(positive[:, :1])
        positive, negative = (torch.cat([x, none], 1) for x in (positive, negative))
    return Table(c, positive, negative, whole)


def _is_alike(
    labels: Tensor, z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, several: bool
) -> Tensor:
    """For each entry of `problem_cosines`, whether anchor and candidate have the same label.

    `labels` are those of the rows of z0, then of z1, then of the negatives.
    """
    own, others = labels[: z0.shape[0]], labels[z0.shape[0] :]
    if mode == MODES.index("ntxent"):
        return labels[:, None] == labels
    if several:
        return own[:, None] == others
    of_z1, rest = others[: z1.shape[0]], others[z1.shape[0] :]
    if mode >= MODES.index("unpaired"):
        rest = rest.view(negatives.shape[:-1]).expand(z0.shape[0], -1)  # (B, K)
        return own[:, None] == torch.cat([of_z1[:, None], rest], 1)
    alike = own[:, None] == of_z1
    return torch.cat([alike, alike.T]) if mode == MODES.index("cross") else alike


def _table_of_views(z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int) -> Table:
    """`problem_table` for two views. mode is a name or its code; ValueError for any other."""
    code = _code(mode, MODES, "mode")
    if negatives is None or code < MODES.index("unpaired"):
        negatives = z0[:0]
    none = torch.empty(0, dtype=torch.bool)
    return problem_table(z0, z1, negatives, none, none, none, code, False, False)


def cosines(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int
) -> tuple[Tensor, Tensor, Tensor]:
    """c (N, M), each row's cosine with its positive (N,), and which are negatives (N, M)."""
    c, positive, negative, _ = _table_of_views(z0, z1, negatives, mode)
    return c, torch.where(positive, c, 0.0).sum(1), negative


# ---- the threshold ------------------------------------------------------------------------------


def quantile_of(table: Table, quantile: float, over: str = "all") -> Tensor:
    """The adaptive eps: a quantile of the cosines of each row, averaged over rows. No gradient.

        eps = mean_i min(c_i[k], 1),  c_i ascending,  k = round half to even(quantile (n_i - 1))

    Args:
        quantile: in [0, 1].
        over: c_i is the whole row ("all") or its negatives alone ("negatives"); n_i is its length.

    Returns:
        0-d float64, in [-1, 1]. A row of length 0 does not count in the mean. The result is NaN if
        any row has a NaN, be it of a positive, or if all rows have length 0.

    Raises:
        ValueError: over is unknown.
    """
    rows = row_quantiles(table, quantile, over).to(torch.float64)
    none = rows.isposinf()
    return torch.where(none, 0.0, rows).sum() / (~none).sum()


def row_quantiles(table: Table, quantile: float, over: str = "all") -> Tensor:
    """The quantile of each row, (N,), of which `quantile_of` is the mean: +inf for a row of length
    0, NaN for one that has a NaN."""
    _code(over, ("all", "negatives"), "over")
    c = table.values.detach()
    kept = table.negative if over == "negatives" else table.whole
    if c.numel() == 0:
        return torch.full_like(c.sum(1), math.inf)
    n = kept.sum(1)  # (N,)
    ascending = c.masked_fill(~kept, math.inf).sort(1).values  # (N, M), NaN last
    k = torch.round(quantile * (n - 1).clamp(min=0).to(torch.float64)).to(torch.int64)
    nearest = ascending.gather(1, k[:, None]).squeeze(1).clamp(-1, 1)  # (N,)
    holds_nan = (c.isnan() & table.whole).any(1)
    return torch.where(holds_nan, math.nan, torch.where(n > 0, nearest, math.inf))


def range_of(table: Table) -> tuple[Tensor, Tensor]:
    """The least and the greatest cosine of each whole row, (N,) each. No gradient.

    A threshold t on the cosines that are scaled to [0, 1] in each row is, on the cosines
    themselves, eps_i = low_i + t (high_i - low_i).

    Returns:
        low and high, in [-1, 1]. Both are NaN for a row that has a NaN or is empty.
    """
    c, kept = table.values.detach(), table.whole
    if c.numel() == 0:  # amin needs an element
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
    """`quantile_of` for two views."""
    return quantile_of(_table_of_views(z0, z1, negatives, mode), quantile, over)


def row_range(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int
) -> tuple[Tensor, Tensor]:
    """`range_of` for two views."""
    return range_of(_table_of_views(z0, z1, negatives, mode))


# ---- the loss -----------------------------------------------------------------------------------


def row_loss(
    table: Table, hard: Tensor, tau: Tensor, beta: float = 1.0, tau_plus: float = 0.1,
    variant: str | int = "paper", positives: str | int = "outside", decoupled: bool = False, *,
    logits: bool = False, plain: Tensor | None = None,
) -> Rows:  # fmt: skip
    """The HEX loss of each row, in nats.

        L = log( 1 + S / E ),   S = Q + sum_G exp(l),   E = exp(l_p)            one positive
        L = log( E + S ) - mean_P l,   E = sum_P exp(l)                         positives "outside"
        L = log( E + S ) - log E                                                "inside"
        Q = max( (R - tau_plus N_h E / n_P) / (1 - tau_plus),  N_h exp(-1/tau) )
        R = N_h sum_H exp((1 + beta) l) / sum_H exp(beta l)

    If `decoupled` is True, the denominator is S in place of E + S. In the variant "excluded" S is
    sum_G exp(l). The loss is evaluated on the differences d = l - centre, where the centre is
    mean_P l, or max_P l for "inside". So no exponential overflows, and a small loss keeps its
    digits. The variant "released" is what the authors' code computes. It is 0 where G is empty, and
    elsewhere

        L = log sum_G exp(l) + (number of negatives) exp(-1/tau) - mean_P l  (or - log E)

    Args:
        table: its values are cosines or, if `logits` is True, logits, for which tau occurs in the
            floor of Q alone.
        hard: (N, M) bool, which negatives are in H.
        tau: 0-d, > 0. With any other value the loss is NaN.
        beta: >= 0, how much more the closest members of H weigh.
        tau_plus: in [0, 1), the share of H expected to be false negatives.
        decoupled: whether the positives are left out of the denominator.
        plain: (N,) bool, the rows that get the paper's form in the variant "released".

    Returns:
        The loss, N_h and the share Q / (E + S) or Q / S, (N,) each. The share is 0 where there is
        no Q. Only the loss has a gradient. Loss and gradient are 0 for a row without positives, for
        a row whose denominator is empty, and for one whose denominator holds its single positive
        alone. A row whose only positive is the logit -inf has the loss +inf and the gradient of
        log S - l_p, or NaN if S is 0. Where the loss is NaN the gradient contains NaN.

    Raises:
        ValueError: variant or positives is unknown.
    """
    code = _code(variant, VARIANTS, "variant")
    released, excluded = code == 1, code == 2
    inside = _code(positives, POSITIVES, "positives") == 1
    v, positive, negative, _ = table
    hard, rest = negative & hard, negative & ~hard  # H and G
    local_term = torch.zeros_like(hard) if excluded else hard  # of the candidates that Q is of
    repelled, seen = local_term | rest, positive | negative
    n_p, n_h = positive.sum(1).to(v), hard.sum(1).to(v)  # (N,)
    n_q = local_term.sum(1).to(v)
    tau = tau.to(v)
    tau = tau * torch.where(tau > 0, 1.0, math.nan)  # as a factor, NaN reaches the gradient
    among = torch.where(positive, v, 0.0).sum(1)  # (N,), sum_P v
    lost = among == -math.inf  # the target's logit is -inf
    centre = _row_max(v, positive) if inside else among / n_p.clamp(min=1)
    centre = torch.where(lost, 0.0, centre)
    # d = l - centre, and the exponent of the floor of Q on the same scale, -1/tau - centre
    d = v - centre[:, None] if logits else (v - centre[:, None]) / tau
    floor = -1 / tau - centre if logits else -(1 + centre) / tau  # (N,)

    # m is the greatest exponent of the denominator, which cancels in L and so needs no gradient.
    # Masked entries are set to -inf before exp, so that their value and every derivative are
    # exactly 0.
    m = _row_max(d, repelled if decoupled else positive | repelled)
    m = m if decoupled else m.clamp(min=0)
    m = torch.where(n_q > 0, torch.maximum(m, floor.detach()), m)  # (N,)
    x, x_0 = torch.where(positive | repelled, d - m[:, None], -math.inf), -m
    if decoupled:  # of positives: so large an E makes q less than its floor, and larger ones do too
        limit = 70.0 if v.dtype == torch.float32 else 600.0
        x, x_0 = x.clamp(max=limit), x_0.clamp(max=limit)
    e = torch.exp(x)  # (N, M)
    # E = sum_P e. Where the centre is a single positive, E is exp(-m) and has no gradient.
    e_0 = torch.exp(x_0)
    big_e = torch.where(positive, e, 0.0).sum(1)
    if not inside:
        big_e = torch.where((n_p == 1) & ~lost, e_0, big_e)
    # r = R / N_h = sum_H b e / sum_H b,  b = exp(beta d) times any common factor
    h = _row_max(beta * d, local_term)
    b = torch.exp(torch.where(local_term, beta * d - h[:, None], -math.inf))  # (N, M)
    r = (b * e).sum(1) / torch.where(n_q > 0, b.sum(1), 1.0)
    # Q = max( N_h (r - tau_plus E / n_P) / (1 - tau_plus),  N_h exp(-1/tau) ), at a tie the first
    q = n_q * (r - tau_plus * big_e / n_p.clamp(min=1)) / (1 - tau_plus)
    f = n_q * torch.exp(torch.where(n_q > 0, floor - m, 0.0))
    local = torch.where(q >= f, q, f)
    # S = Q + sum_G e
    s = local + torch.where(rest, e, 0.0).sum(1)
    share = (local / (big_e + s)).detach()

    # 0 with a gradient of 0, and NaN where a value is NaN
    nothing = (0 * torch.where(seen, v, 0.0)).sum(1) / tau + 0
    log_e = torch.zeros_like(m)  # outside, mean_P l takes its place, which is 0 on this scale
    if inside:
        held = positive | (n_p == 0)[:, None]  # log 0, without positives, would make NaN
        log_e = torch.logsumexp(torch.where(held, d, -math.inf), 1)
    if decoupled or released:
        # log sum_G exp(d), by the largest of G: by that of H it may underflow
        some, g = rest.any(1), _row_max(d, rest)
        total = torch.exp(torch.where(rest, d - g[:, None], -math.inf)).sum(1)  # 0 or >= 1
        log_g = g + torch.log(torch.where(some, total, 1.0))
    if decoupled:
        # L = log S - log E, where log S is of log Q and of log sum_G
        above = (n_q > 0) & (q >= f) & (q > 0)  # f may have underflowed
        log_q = m + torch.log(torch.where(above, q, 1.0))
        log_q = torch.where(above, log_q, floor + torch.log(n_q.clamp(min=1)))
        log_q = torch.where(n_q > 0, log_q, 0.0)
        among_s = torch.stack([n_q > 0, some], 1)
        logs = torch.where(among_s, torch.stack([log_q, log_g], 1), -math.inf)
        top = _row_max(logs, among_s)
        s = torch.exp(logs - top[:, None]).sum(1)
        log_s = top + torch.log(torch.where(among_s.any(1), s, 1.0))
        share = torch.where(n_q > 0, torch.exp(log_q - log_s), 0.0).detach()
        loss = torch.where(among_s.any(1), log_s - log_e, nothing)
    elif inside:
        # L = log(1 + S / E)
        difference = m + torch.log(torch.where(s > 0, s, 1.0)) - log_e
        loss = torch.where(s > 0, -F.logsigmoid(-difference), s + nothing)
    else:
        # L = log(E + S) + m = log(1 + exp(m) (S + E - e_0))
        loss = _log1p_scaled(s + torch.where(n_p > 1, big_e - e_0, 0.0), m)
    if not decoupled:
        loss = torch.where(lost, m + torch.log(torch.where(lost, s, 1.0)), loss)
    if released:
        # L = log sum_G exp(d) + (number of negatives) exp(-1/tau) - log E
        constant = negative.sum(1).to(v) * torch.exp(-1 / tau)
        form = log_g + constant - log_e
        form = torch.where(some, form, nothing)
        kept = torch.zeros_like(some) if plain is None else plain
        loss, share = torch.where(kept, loss, form), torch.where(kept, share, 0.0)
    loss = loss - torch.where(positive & lost[:, None], v, 0.0).sum(1)
    loss = torch.where(n_p > 0, loss, nothing)
    known = torch.where(tau.isnan(), math.nan, 1.0).detach()
    loss = loss * torch.where(loss.isnan(), math.nan, known).detach()  # makes the gradient NaN too
    return loss, n_h * known, torch.where(n_p > 0, share, 0.0) * known


def decided_loss(
    table: Table, score: Tensor, eps: Tensor, tau: Tensor, beta: float, tau_plus: float,
    variant: str | int, positives: str | int = "outside", decoupled: bool = False, *,
    logits: bool = False,
) -> Rows:  # fmt: skip
    """`row_loss` where a threshold decides: H is the negatives with min(score, 1) > eps.

    Args:
        score: (N, M) cosines.
        eps: a cosine, 0-d or (N,), without gradient. H is empty where eps >= 1, and where it is
            +inf the loss is InfoNCE in either variant. Where eps is NaN, or the score of a negative
            is NaN and its value is not, all three results of the row are NaN.
    """
    eps = eps.reshape(-1, 1)  # (N, 1) or (1, 1)
    wide = torch.promote_types(score.dtype, eps.dtype)  # float32 would round a float64 eps
    hard = score.detach().clamp(max=1).to(wide) > eps.to(wide)
    compared = (table.whole if logits else table.negative) & ~table.values.isnan()
    unknown = eps.isnan().squeeze(1) | (score.isnan() & compared).any(1)
    plain = (eps == math.inf).squeeze(1)
    options = beta, tau_plus, variant, positives, decoupled
    rows = row_loss(table, hard, tau, *options, logits=logits, plain=plain)
    known = torch.where(unknown, math.nan, 1.0).to(table.values)
    loss, n_h, share = (x * known for x in rows)
    return loss, n_h, share


def loss_rows(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, eps: Tensor, tau: Tensor, mode: str | int,
    beta: float = 1.0, tau_plus: float = 0.1, variant: str | int = "paper", decoupled: bool = False,
) -> Rows:  # fmt: skip
    """Loss, |H| and share of each row of two views. eps is compared with the cosines."""
    table = _table_of_views(z0, z1, negatives, mode)
    options = beta, tau_plus, variant, "outside", decoupled
    return decided_loss(table, table.values, eps, tau, *options)


def problem_rows(
    z0: Tensor, z1: Tensor, negatives: Tensor, ids: Tensor, mask: Tensor, groups: Tensor,
    guide: Tensor, eps: Tensor, tau: Tensor, mode: int, positives: int, beta: float,
    variant: int, tau_plus: float, decoupled: bool = False,
) -> Rows:  # fmt: skip
    """Loss, |H| and share of each row of a problem as the operators get it (problem.py).

    H(i) is the negatives of the anchor's group if there are groups. Otherwise eps is compared with
    the cosines of the guide if there is one, else with those of the embeddings, or of logits with
    logits times tau.
    """
    if mode == LOGITS:
        table = logits_table(z0, ids)
        score = _scaled(table.values.detach(), tau.detach())
        options = beta, tau_plus, variant, "outside", decoupled
        return decided_loss(table, score, eps, tau, *options, logits=True)
    several = positives > 0
    table = problem_table(z0, z1, negatives, ids, mask, tau, mode, several, False)
    options = beta, tau_plus, variant, POSITIVES[max(positives - 1, 0)], decoupled
    if groups.numel():
        hard = _is_alike(groups, z0, z1, negatives, mode, several)
        return row_loss(table, hard, tau, *options)
    score = table.values
    if guide.numel():
        seen, B = guide.detach().to(score), z0.shape[0]
        g0, g1, rest = seen[:B], seen[B : B + z1.shape[0]], seen[B + z1.shape[0] :]
        rest = rest.view(*negatives.shape[:-1], seen.shape[1])
        score = problem_cosines(g0, g1, rest, mode, several)
    return decided_loss(table, score, eps, tau, *options)


def reduce(rows: Tensor, reduction: int) -> Tensor:
    """The losses of the rows as they are, their sum, or their mean, which is 0 without rows."""
    if reduction == REDUCTIONS.index("none"):
        return rows
    total = rows.sum()
    mean = reduction == REDUCTIONS.index("mean") and rows.shape[0]
    return total / rows.shape[0] if mean else total


# ---- parts --------------------------------------------------------------------------------------


def _unit_rows(x: Tensor) -> Tensor:
    """x / |x| over the last axis. A row of zeros gives zeros, one with NaN or an infinity all NaN.

    Each row is first scaled by the power of two that brings its largest element to [1, 2), because
    the squares of 1e-23 and of 1e20 are outside the range of float32. The scale is a constant, so
    the gradient is that of x / |x|. It is applied as two factors, because 2^149 is out of range.
    """
    if x.shape[-1] == 0:
        return x  # amax needs an element
    peak = x.detach().abs().amax(-1, keepdim=True)  # (..., 1)
    power = torch.where(peak == 0, 1.0, peak).log2().floor()
    half = (power / 2).floor()
    y = x * torch.exp2(-half) * torch.exp2(half - power)  # peak inf: half - power is NaN
    y = torch.where(peak == 0, 1.0, y)  # because sqrt has no derivative at 0
    return torch.where(peak == 0, 0.0, y / (y * y).sum(-1, keepdim=True).sqrt())


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of a with each row of b, in their dtype even under autocast."""
    if a.device.type == "meta":  # has no autocast, and torch 2.10 cannot trace the question
        return a @ b.mT
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def _cosines_among(u: Tensor) -> Tensor:
    """(N, N) cosines of unit rows. A row's own is exactly 1, 0 for a row of zeros, or NaN."""
    row = torch.arange(u.shape[0], device=u.device)
    own = (u * u).sum(-1, keepdim=True).detach().round()  # (N, 1)
    return torch.where(row[:, None] == row, own, _dots(u, u))


def _row_max(x: Tensor, among: Tensor) -> Tensor:
    """The greatest entry of each row in a mask, 0 where that is empty, NaN by NaN. No gradient."""
    if x.shape[1] == 0:
        return torch.zeros_like(x.detach().sum(1))
    top = x.detach().masked_fill(~among, -math.inf).amax(1)
    return torch.where(among.any(1), top, 0.0)


def _log1p_scaled(s: Tensor, m: Tensor) -> Tensor:
    """log(1 + s exp(m)) = m + log(exp(-m) + s) for s, m >= 0. A small loss keeps its digits.

    The first form is used for m <= 30. For a greater m the second loses no digits, because s is
    not small there: if the greatest exponent m is that of a member of H, then Q >= 1 (unless
    N_h > exp(30)), and otherwise s has a term 1. Each form is given only its own m, because an
    infinity in the branch that is not taken would make the gradient NaN.
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
