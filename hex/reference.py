# SPDX-License-Identifier: MIT
"""The definition of the HEX loss in plain dense PyTorch: the oracle of every kernel.

Computes the cosines of a batch, the adaptive threshold, and the loss of each row, from unnormalised
embeddings. Differentiable twice in the embeddings and in tau, at any of float16, bfloat16, float32
and float64; works under torch.func and torch.compile. It also serves devices without kernels and
the second derivative. Speed and memory are left to csrc/, argument checks to hex/functional.py,
the mean or sum over rows to the caller.

    N rows (anchors), D features, M columns (candidates of a row)
    c_ij cosine, p_i cosine of the row with its positive, tau temperature, eps threshold (a cosine)
    H(i) = { negatives j of i : min(c_ij, 1) > eps_i },   G(i) = the other negatives

Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
Algorithms", WACV 2025 (arXiv 2410.23200).
"""

import math

import torch
from torch import Tensor

__all__ = ["cosines", "loss_rows", "row_range", "threshold"]

MODES = ("ntxent", "query", "cross", "shared", "own")  # position = the code of the raw ops
VARIANTS = ("paper", "released")


def cosines(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int
) -> tuple[Tensor, Tensor, Tensor]:
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

    Returns:
        c (N, M), p (N,), is_negative (N, M) bool. c and p are float64 if an input is, else
        float32. The self cosine of "ntxent" is exactly 1, or 0 for a row of zeros. A row with NaN
        or an infinity has NaN cosines.

    Raises:
        ValueError: mode is not in the table.
    """
    code = _code(mode, MODES, "mode")
    used = [z0, z1, negatives] if code >= 3 and negatives is not None else [z0, z1]
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32
    u0, u1 = _unit_rows(z0.to(dtype)), _unit_rows(z1.to(dtype))  # (B, D)
    batch = z0.shape[0]
    if code >= 3:
        assert negatives is not None
        own = (u0 * u1).sum(-1, keepdim=True)  # (B, 1)
        un = _unit_rows(negatives.to(dtype))  # (K, D) or (B, K, D)
        others = _dots(u0, un) if code == 3 else _dots(un, u0.unsqueeze(1)).squeeze(-1)  # (B, K)
        c = torch.cat([own, others], 1)  # (B, 1 + K)
        column = torch.arange(c.shape[1], device=c.device)
        return c, c[:, 0], (column > 0).expand(c.shape)
    if code == 0:
        u = torch.cat([u0, u1])  # (2B, D)
        row = torch.arange(2 * batch, device=u.device)
        own = (u * u).sum(-1, keepdim=True).detach().round()  # (2B, 1): 1, or 0 for zeros, or NaN
        c = torch.where(row[:, None] == row, own, _dots(u, u))  # (2B, 2B)
        partner = row.roll(batch)  # i + B modulo 2B
        is_negative = (row != row[:, None]) & (row != partner[:, None])  # (2B, 2B)
        return c, c.gather(1, partner[:, None]).squeeze(1), is_negative
    s = _dots(u0, u1)  # (B, B)
    c = s if code == 1 else torch.cat([s, s.T])  # (B, B) or (2B, B)
    column = torch.arange(batch, device=c.device)
    partner = column if code == 1 else torch.cat([column, column])
    return c, c.gather(1, partner[:, None]).squeeze(1), column != partner[:, None]


def threshold(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None,
    mode: str | int,
    quantile: float,
    over: str = "all",
) -> Tensor:
    """The mean over rows of the row's quantile of cosines, the adaptive eps. No gradient.

        eps = mean_i min(c_i[k], 1),  c_i ascending,  k = round half to even(quantile (n - 1))

    Args:
        z0, z1, negatives, mode: as in `cosines`.
        quantile: in [0, 1].
        over: "all", each row whole: n = M, self and positive included; or "negatives", n the
            number of negatives of a row.

    Returns:
        0-d float64, in [-1, 1]. NaN if any cosine is NaN, or if there is nothing to take.

    Raises:
        ValueError: mode or over is unknown.
    """
    c, p, is_negative = cosines(z0, z1, negatives, mode)
    _code(over, ("all", "negatives"), "over")
    n = c.shape[1] if over == "all" else _negatives_in_a_row(c, mode)
    if n <= 0 or c.shape[0] == 0:
        return torch.full((), math.nan, dtype=torch.float64, device=c.device)
    seen = c.detach() if over == "all" else c.detach().masked_fill(~is_negative, math.inf)  # (N, M)
    ascending = seen.sort(1).values  # (N, M), NaN last
    nearest = ascending[:, round(quantile * (n - 1))].clamp(-1, 1)  # (N,)
    holds_nan = c.isnan().any(1)  # (N,), the positive counts even where it is left out
    return torch.where(holds_nan, math.nan, nearest).to(torch.float64).mean()


def row_range(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str | int
) -> tuple[Tensor, Tensor]:
    """The least and the greatest cosine of each row, self and positive included. No gradient.

    A threshold t on the cosines scaled to [0, 1] by row is eps_i = low_i + t (high_i - low_i).

    Returns: low (N,), high (N,), in [-1, 1]; NaN for a row that holds NaN.
    """
    c, p, _ = cosines(z0, z1, negatives, mode)
    if c.shape[0] == 0:
        return p.detach(), p.detach()
    c = c.detach().clamp(-1, 1)  # (N, M)
    return c.amin(1), c.amax(1)


def loss_rows(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None,
    eps: Tensor,
    tau: Tensor,
    mode: str | int,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: str | int = "paper",
) -> tuple[Tensor, Tensor, Tensor]:
    """The HEX loss of each row, in nats.

        L_i = log( 1 + (Q_i + sum_{j in G} exp(l_ij)) / exp(l_ip) ),   l = c / tau
        Q_i = max( (R_i - tau_plus N_h exp(l_ip)) / (1 - tau_plus),  N_h exp(-1/tau) )
        R_i = N_h sum_{j in H} exp((1 + beta) l_ij) / sum_{j in H} exp(beta l_ij),   N_h = |H(i)|

    evaluated on the differences d_ij = (c_ij - p_i) / tau, so that no exponential overflows and a
    small loss keeps its digits. variant "released" is what the authors' code computes:

        L_i = -l_ip + log sum_{j in G} exp(l_ij) + (number of negatives) exp(-1/tau)

    and 0 where G is empty; at eps = +inf it too is InfoNCE.

    Args:
        z0, z1, negatives, mode: as in `cosines`.
        eps: 0-d or (N,), a cosine; nothing is in H where eps >= 1. NaN gives NaN. No gradient.
        tau: 0-d, > 0; otherwise the loss is NaN.
        beta: >= 0, weight of the hardest. tau_plus: in [0, 1), share of false negatives.

    Returns:
        loss (N,), n_hard (N,) = N_h, share (N,) = Q_i over the row's denominator (0 for
        "released", where H is not repelled). The last two carry no gradient; both are NaN where
        eps or tau gives NaN. A row without negatives has loss 0 and gradient 0.

    Raises:
        ValueError: mode or variant is unknown.
    """
    released = _code(variant, VARIANTS, "variant") == 1
    c, p, is_negative = cosines(z0, z1, negatives, mode)  # (N, M), (N,), (N, M)
    tau = tau.to(c)
    tau = tau * torch.where(tau > 0, 1.0, math.nan)  # a factor: the gradient is NaN too
    eps = eps.reshape(-1, 1)  # (N, 1) or (1, 1)
    known = torch.where(eps.isnan() | tau.isnan(), math.nan, 1.0).to(c).squeeze(1)  # (N,) or (1,)
    p = p * known  # (N,)
    if _negatives_in_a_row(c, mode) <= 0:
        none = torch.zeros_like(p) * known  # (N,)
        return 0 * p / tau + 0, none, none  # in the graph, NaN for NaN input, never -0

    wide = torch.promote_types(c.dtype, eps.dtype)  # float32 would round a float64 eps
    hard = is_negative & (c.detach().clamp(max=1).to(wide) > eps.to(wide))  # (N, M): H
    rest = is_negative & ~hard  # (N, M): G; a NaN cosine is here
    d = (c - p[:, None]) / tau  # (N, M)
    n_h = hard.sum(1).to(c)  # (N,)

    # Masked places get -inf before exp: value and every derivative are then exactly 0.
    m = _row_max(d, is_negative).clamp(min=0)  # (N,), cancels in L, so without gradient
    e = torch.exp(torch.where(is_negative, d - m[:, None], -math.inf))  # (N, M)
    e0 = torch.exp(-m)  # (N,), the positive
    h = _row_max(beta * d, hard)  # (N,), cancels in r
    b = torch.exp(torch.where(hard, beta * d - h[:, None], -math.inf))  # (N, M), weights of H
    r = (b * e).sum(1) / torch.where(n_h > 0, b.sum(1), 1.0)  # (N,), in [min e, max e]
    q = n_h * (r - tau_plus * e0) / (1 - tau_plus)  # (N,)
    f = n_h * torch.exp(-(1 + p) / tau - m)  # (N,), the floor
    local = torch.where(q >= f, q, f)  # (N,): Q; a tie keeps the gradient of q
    s = local + torch.where(rest, e, 0.0).sum(1)  # (N,): S
    loss = _log1p_scaled(s, m)  # (N,)
    share = (local / (e0 + s)).detach()  # (N,)

    if released:
        g = _row_max(d, rest)  # (N,)
        total = torch.exp(torch.where(rest, d - g[:, None], -math.inf)).sum(1)  # (N,), 0 or >= 1
        some = rest.any(1)  # (N,)
        constant = _negatives_in_a_row(c, mode) * torch.exp(-1 / tau)  # 0-d
        log_sum = g + torch.log(torch.where(some, total, 1.0)) + constant  # (N,)
        plain = (eps == math.inf).squeeze(1)  # (N,) or (1,): the warm-up of the authors is InfoNCE
        loss = torch.where(plain, loss, torch.where(some, log_sum, 0 * p / tau + 0))
        share = torch.where(plain, share, torch.zeros_like(n_h) * known)  # (N,)
    return loss, n_h * known, share


def _unit_rows(x: Tensor) -> Tensor:
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


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each row of a with each of b, in their dtype under autocast as well."""
    if a.device.type == "meta":  # has none to switch off; asking torch does not trace in 2.10
        return a @ b.mT
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


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


def _negatives_in_a_row(c: Tensor, mode: str | int) -> int:
    """Columns that are neither the positive nor, in "ntxent", the row itself."""
    return c.shape[1] - (2 if _code(mode, MODES, "mode") == 0 else 1)


def _code(name: str | int, names: tuple[str, ...], argument: str) -> int:
    code = names.index(name) if name in names else name
    if isinstance(code, str) or not 0 <= code < len(names):
        raise ValueError(f"{argument}: got {name!r}, wanted one of {names} or its position")
    return code
