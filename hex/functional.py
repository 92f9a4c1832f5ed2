# SPDX-License-Identifier: MIT
"""The losses as functions, with the threshold given.

Each checks its arguments and lays them out as a problem (problem.py), before anything is computed,
and runs that. The modules, which have the threshold over training, are in loss.py.
"""

import math
from typing import Any

from torch import Tensor

from . import problem
from .checks import (
    Mode,
    Over,
    Positives,
    Reduction,
    Variant,
    check_base_temperature,
    check_eps,
    check_eps_or_groups,
    check_number,
    check_options,
    check_over,
    check_positives,
)
from .problem import Problem, Rule, eps_tensor, unknown_eps

__all__ = ["batch_threshold", "hex_cross_entropy", "hex_loss", "hex_sup_con", "info_nce"]


def hex_loss(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    eps: float | Tensor,
    temperature: float | Tensor = 0.1,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    mode: Mode = "ntxent",
    reduction: Reduction = "mean",
) -> Tensor:
    """The HEX loss of a batch at a given threshold, in nats.

    With c_ij the cosine of anchor i and candidate j, l = c / tau, p the positive of i::

        H(i) = { j : c_ij > eps },  G(i) the other negatives,  N_h = |H(i)|
        w_ij = exp(beta l_ij) / mean_{h in H(i)} exp(beta l_ih)
        R_i  = sum_{j in H(i)} w_ij exp(l_ij)
        Q_i  = max( (R_i - tau_plus N_h exp(l_ip)) / (1 - tau_plus),  N_h exp(-1/tau) )
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    H(i) empty (eps >= 1) is InfoNCE; eps < -1 is the hard-negative loss of Robinson et al., with
    beta = 0 the debiased loss of Chuang et al. No gradient flows through membership in H.

    Args:
        z0, z1: (B, D), two views; row i of one is the positive of row i of the other. float64,
            float32, bfloat16 or float16, each its own; any strides, any scale (rows are
            normalised here; a row of zeros has cosine 0 with all).
        negatives: None; or (K, D) shared by all anchors, any strides (a queue: `queue.T`); or
            (B, K, D), K for each anchor. With negatives only z0 are anchors, and the negatives
            are the only ones; `mode` is not looked at.
        eps: threshold, a cosine: a number, a 0-d tensor, or one value a row, (N,).
        temperature: tau > 0, a number or a tensor of one element, which may require grad. A tensor
            <= 0 gives NaN, for seeing it would wait for the device.
        beta: >= 0, how much more the closest members of H weigh.
        tau_plus: in [0, 1), the share of H expected to be false negatives.
        variant: "paper", the above; "released", what the authors' code computes (docs/math.md).
        mode: "ntxent", all of z0 and z1 are anchors and the other 2B - 2 rows negatives (SimCLR);
            "query", z0 against z1 (NNCLR, MoCo v3); "cross", z0 against z1 and back (CLIP).
        reduction: "mean", "sum", or "none".

    Returns:
        0-d, or (N,) for "none": N = 2B in "ntxent" and "cross" (z0's rows first), else B. float64
        if an input is, else float32, also under autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import batch_threshold, hex_loss
        >>> z0, z1 = torch.randn(2, 256, 128).requires_grad_()
        >>> eps = batch_threshold(z0, z1)
        >>> hex_loss(z0, z1, eps=eps).backward()

    Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
    Algorithms", WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """
    check_options(beta, tau_plus, variant, reduction)
    batch = problem.of_views(z0, z1, negatives, mode, temperature)
    rule = Rule(reduction, variant, float(beta), float(tau_plus))
    return _at(batch, eps, rule)


def info_nce(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    mode: Mode = "ntxent",
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE by the same kernels: `hex_loss` with H empty.

        L_i = -l_ip + log( exp(l_ip) + sum_{negatives j} exp(l_ij) ),    l = c / tau

    Arguments, result and errors are those of `hex_loss`.

    Example:
        >>> import torch
        >>> from hex import info_nce
        >>> query, key, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(128, 4096)
        >>> loss = info_nce(query, key, queue.T, temperature=0.07)  # MoCo

    Source: van den Oord et al. 2018 (arXiv 1807.03748); Chen et al. 2020 (arXiv 2002.05709).
    """
    return hex_loss(
        z0, z1, negatives, eps=math.inf, temperature=temperature, mode=mode, reduction=reduction
    )


def batch_threshold(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    mode: Mode = "ntxent",
    quantile: float = 0.99,
    over: Over = "negatives",
) -> Tensor:
    """The adaptive threshold of a batch: the mean over rows of a quantile of the row's cosines.

        eps = 1/N sum_i c_i[k],   c_i ascending,   k = round(quantile (n - 1)), half to even

    Exact, by selection; no gradient.

    Args:
        z0, z1, negatives, mode: as in `hex_loss`.
        quantile: in [0, 1].
        over: "negatives", the negatives alone, for any batch; or "all", the row whole: with the
            positive and, in "ntxent", the anchor itself (cosine 1), as the authors do. For 2B < 52
            that rank *is* the anchor, so eps = 1 and H is empty; up to 2B of about 150 it is
            mostly the positive.

    Returns:
        0-d float64, a cosine. NaN if the batch is empty or not finite.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import batch_threshold
        >>> eps = batch_threshold(*torch.randn(2, 256, 128), over="negatives")

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200), and its released code.
    """
    check_number("quantile", quantile, 0, 1)
    check_over("over", over)
    batch = problem.of_views(z0, z1, negatives, mode, 1.0)
    return batch.threshold(float(quantile), over)


def hex_sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float | Tensor | None = None,
    groups: Tensor | None = None,
    guide: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    positives: Positives = "outside",
    base_temperature: float | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The HEX loss of rows with several positives at a given threshold, in nats.

    With l = cosine / tau, P(i) the positives of row i, n_P of them, and all other rows but i
    itself split into H(i), above eps, and G(i)::

        E_i = sum_{p in P} exp(l_ip)
        Q_i = max( (R_i - tau_plus N_h E_i / n_P) / (1 - tau_plus),  N_h exp(-1/tau) )
        D_i = E_i + Q_i + sum_{j in G} exp(l_ij)
        L_i = mean_{p in P} -l_ip + log D_i        positives="outside" (SupCon's L_out)
        L_i = -log(E_i / D_i)                      positives="inside" (solo-learn)

    R_i is that of `hex_loss`. A row without positives gives 0 and counts in the mean.

    Args:
        features: (B, V, D), V views of B images; or (N, D) with labels or mask. Any further axes
            are flattened. dtypes, strides and scale as in `hex_loss`.
        labels: (B,), or (N,), integers: rows of one label are positives of each other. None: the
            views of an image are.
        mask: (B, B), or (N, N): positives of row i are the columns of 1, in all views; it may be
            asymmetric. bool, or a number type with values 0 and 1: others are refused; on another
            device than the CPU, of a subclass and in a compiled graph by a RuntimeError as it runs.
            Of a mask that vmap takes apart, what is not 0 counts as 1. With labels: ValueError.
        eps: threshold, a cosine: a number, 0-d, or (N,); not wanted with groups.
        groups: (B,), or (N,), integers: H(i) is given, the negatives of i's group.
        guide: of the shape of features but for D: H(i) is decided on its cosines.
        variant: "released" is the authors' form with P(i) for the positive: H(i) left out, the
            positives missing in the denominator (their code has no several positives):
            log sum_G exp(l) + |H and G| exp(-1/tau) - (mean_P l, or log E).
        positives: see above.
        base_temperature: None, or the loss is multiplied by temperature / base_temperature, as
            SupContrast does (by default 0.07 there).
        temperature, beta, tau_plus, reduction: as in `hex_loss`.

    Returns:
        0-d, or (N,) for "none": view-major, all rows of the first view first, N = V B.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import hex_sup_con
        >>> features, labels = torch.randn(64, 2, 128), torch.arange(64) % 10
        >>> loss = hex_sup_con(features, labels, eps=0.6)

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362), for
    the positives; Kokilepersaud et al., WACV 2025 (arXiv 2410.23200), for the negatives.
    """
    check_options(beta, tau_plus, variant, reduction)
    check_positives(positives)
    base = check_base_temperature(base_temperature)
    check_eps_or_groups(eps, groups)
    rows = problem.of_features(features, labels, mask, temperature, groups, guide)
    rule = Rule(reduction, variant, float(beta), float(tau_plus), positives, base)
    return _at(rows, eps, rule)


def hex_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    eps: float | Tensor,
    temperature: float | Tensor,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    """The HEX loss of rows of logits at a given threshold, in nats.

    With l the logits, p = target[i], the other columns of row i that are not -inf its negatives::

        H(i) = { j : tau l_ij > eps },  G(i) the other negatives
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    with Q_i of `hex_loss`. With H empty it is torch's cross-entropy. Half logits are rounded
    cosines: at tau = 0.07 a step of 5.5e-4 (float16) or 4.4e-3 (bfloat16) near 0.9, so eps is
    compared with no more than that.

    Args:
        logits: (N, C), cosine / temperature; float64, float32, bfloat16 or float16; -inf leaves a
            column out of its row.
        target: (N,) integers, the positive's column, in [0, C). Where that is -inf the loss is
            +inf, as torch's, and the gradient that of its limit: -1 there. Where nothing is left
            beside it (in the released form nothing outside H) both are NaN, as torch's.
        eps: threshold, a cosine: a number, 0-d or (N,).
        temperature: what the cosines were divided by. Only eps and the floor of Q know it: its own
            gradient is at constant logits, and a learned temperature learns through the logits.
        beta, tau_plus, variant, reduction: as in `hex_loss`.

    Returns:
        0-d, or (N,) for "none"; float64 if the logits are, else float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.
        RuntimeError: a target outside [0, C), on the CPU.

    Example:
        >>> import torch
        >>> from hex import hex_cross_entropy
        >>> logits, target = torch.rand(32, 4097) / 0.2, torch.zeros(32, dtype=torch.int64)
        >>> loss = hex_cross_entropy(logits, target, eps=0.8, temperature=0.2)  # MoCo

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """
    check_options(beta, tau_plus, variant, reduction)
    rows = problem.of_logits(logits, target, temperature)
    rule = Rule(reduction, variant, float(beta), float(tau_plus))
    return _at(rows, eps, rule)


def _at(batch: Problem, eps: Any, rule: Rule) -> Tensor:
    """The loss at a threshold, or where H is given by groups."""
    like = batch.inputs[0]
    if batch.h_is_given:
        return batch.loss(unknown_eps(like), rule)[0]
    check_eps(eps, batch.anchors)
    return batch.loss(eps_tensor(eps, like.device), rule)[0]
