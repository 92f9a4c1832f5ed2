# SPDX-License-Identifier: MIT
"""The losses as functions, to which the caller passes the threshold.

Each function checks its options. Then it turns its arguments into a problem, which checks them
(problem.py), and computes the loss of this problem. The modules in loss.py also choose the
threshold over training.
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
    check_eps,
    check_eps_or_groups,
    check_number,
    check_over,
)
from .problem import Problem, Rule, checked_rule, eps_tensor, unknown_eps

__all__ = ["batch_threshold", "hex_cross_entropy", "hex_loss", "hex_sup_con", "info_nce"]


def hex_loss(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    eps: float | Tensor,
    ignored: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    decoupled: bool = False,
    mode: Mode = "ntxent",
    reduction: Reduction = "mean",
    cache_bytes: int | None = None,
) -> Tensor:
    """The HEX loss of a batch at a given threshold, in nats.

    Let c_ij be the cosine of anchor i and candidate j, l = c / tau, and p the positive of i. Then::

        H(i) = { j : c_ij > eps },  G(i) the other negatives,  N_h = |H(i)|
        w_ij = exp(beta l_ij) / mean_{h in H(i)} exp(beta l_ih)
        R_i  = sum_{j in H(i)} w_ij exp(l_ij)
        Q_i  = max( (R_i - tau_plus N_h exp(l_ip)) / (1 - tau_plus),  N_h exp(-1/tau) )
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    If H(i) is empty (eps >= 1), L_i is InfoNCE. If H(i) has all negatives (eps < -1), L_i is the
    hard-negative loss of Robinson et al. and, with beta = 0, the debiased loss of Chuang et al.
    The gradient flows through all terms, but not through eps or the membership in H.

    Args:
        z0, z1: (B, D), two views. Row i of one is the positive of row i of the other. Each may be
            float64, float32, bfloat16 or float16 and have any strides. Rows may have any length,
            because they are normalised here. A row of zeros has cosine 0 with all others.
        negatives: None, (K, D) or (B, K, D). With None, the negatives are other rows of z0 and z1,
            depending on `mode`. (K, D) are negatives that all anchors share, such as a queue
            (`queue.T`), and may have any strides. (B, K, D) are K negatives for each anchor. With
            either of these, the anchors are the rows of z0, there are no other negatives, and
            `mode` has no effect.
        eps: the threshold, a cosine: a number, a 0-d tensor, or (N,), one value for each row.
        ignored: None, or a bool tensor that is True where a negative does not count: it is neither
            in H nor in G. Without negatives its shape is (B, B), by images: entry (i, j) is about
            the views of image i as anchors and all views of image j as candidates. Or it is
            (N, M), with a row for each anchor and a column for each candidate: (2B, 2B) in
            "ntxent", (2B, B) in "cross". For negatives (K, D) it is (B, K) or (K,), and for
            (B, K, D) it is (B, K), which serves as padding. An entry of the positive, or of the
            anchor itself, has no effect. Ignored negatives must still be finite, or gradients may
            be NaN. Only those of (B, K, D) may hold any numbers.
        temperature: tau > 0, a number or a tensor of one element, which may require grad. A tensor
            <= 0 gives NaN instead of an error, because checking it would wait for the device.
        beta: >= 0. The larger beta is, the more the closest members of H count.
        tau_plus: in [0, 1), the expected share of false negatives in H. A large one does not simply
            weaken the repulsion of H: see docs/guides/what_h_holds.md.
        variant: "paper" for the equations above, or "released" for what the authors' code computes
            (docs/released.md). In "excluded" H is left out of the loss: Q_i is 0. Use it if
            negatives above eps are taken for false ones.
        decoupled: whether the positive is left out of the denominator::

                L_i = -l_ip + log( Q_i + sum_{j in G(i)} exp(l_ij) )

            With H empty, this is decoupled contrastive learning. The loss can be negative. It is 0
            for a row that has nothing in the denominator. The released form has no positive there
            in either case, so this option changes it only where eps is +inf.
        mode: which rows are anchors and candidates.
            "ntxent" (SimCLR): all rows of z0 and z1 are anchors, and the other 2B - 2 rows are
            negatives. "query" (NNCLR, MoCo v3): z0 against z1. "cross" (CLIP): z0 against z1, and
            z1 against z0.
        reduction: "mean", "sum", or "none" for one value for each row.
        cache_bytes: on a CPU, the most bytes of cosines that the forward of a call may keep for its
            backward. If a batch has more, none are kept and the backward computes them again, which
            takes longer but needs no memory. None stands for HEX_CACHE_BYTES in the environment
            or, if that is not set, for 1 GiB. With 0 none are kept.

    Returns:
        0-d, or (N,) for "none". In "ntxent" and "cross", N = 2B and the rows of z0 come first.
        Otherwise N = B. The dtype is float64 if an input is float64, and otherwise float32, also
        under autocast.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex import batch_threshold, hex_loss
        >>> z0, z1 = torch.randn(2, 256, 128).requires_grad_()
        >>> eps = batch_threshold(z0, z1)
        >>> hex_loss(z0, z1, eps=eps).backward()

    Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
    Algorithms", WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX; for `decoupled`,
    Yeh et al., "Decoupled Contrastive Learning", ECCV 2022 (arXiv 2110.06848).
    """
    rule = checked_rule(
        reduction=reduction,
        variant=variant,
        beta=beta,
        tau_plus=tau_plus,
        decoupled=decoupled,
        cache_bytes=cache_bytes,
    )
    batch = problem.of_views(z0, z1, negatives, mode, temperature, ignored=ignored)
    return _at(batch, eps, rule)


def info_nce(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    ignored: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    decoupled: bool = False,
    mode: Mode = "ntxent",
    reduction: Reduction = "mean",
    cache_bytes: int | None = None,
) -> Tensor:
    """The InfoNCE loss of a batch, in nats. It is `hex_loss` with H empty, on the same kernels.

        L_i = -l_ip + log( exp(l_ip) + sum_{negatives j} exp(l_ij) ),    l = c / tau
        L_i = -l_ip + log( sum_{negatives j} exp(l_ij) )                 decoupled

    Args:
        decoupled: whether the positive is left out of the denominator, as in decoupled contrastive
            learning. The loss can then be negative. It is 0 for a row without negatives.
        z0, z1, negatives, ignored, temperature, mode, reduction, cache_bytes: as in `hex_loss`.

    Returns:
        As `hex_loss`: 0-d, or (N,) for reduction "none". It is float64 if an input is float64, and
        otherwise float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex import info_nce
        >>> query, key, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(128, 4096)
        >>> loss = info_nce(query, key, queue.T, temperature=0.07)  # MoCo

    Source: van den Oord et al. 2018 (arXiv 1807.03748); Chen et al. 2020 (arXiv 2002.05709); Yeh et
    al. 2022 (arXiv 2110.06848) for `decoupled`.
    """
    return hex_loss(
        z0, z1, negatives, eps=math.inf, ignored=ignored, temperature=temperature,
        decoupled=decoupled, mode=mode, reduction=reduction, cache_bytes=cache_bytes,
    )  # fmt: skip


def batch_threshold(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    ignored: Tensor | None = None,
    mode: Mode = "ntxent",
    quantile: float = 0.99,
    over: Over = "negatives",
) -> Tensor:
    """The adaptive threshold of a batch: a quantile of each row's cosines, averaged over the rows.

        eps = 1/N sum_i c_i[k],   c_i ascending,   k = round(quantile (n - 1)), half to even

    c_i are the n cosines of row i. The quantile is one of them, selected without interpolation. No
    gradient flows through the threshold.

    Args:
        z0, z1, negatives, ignored, mode: as in `hex_loss`. An ignored negative is in no c_i.
        quantile: in [0, 1].
        over: "negatives": c_i are the cosines of the negatives alone, which suits any batch size.
            "all": c_i is the whole row, as in the authors' code. It also contains the positive and,
            in "ntxent", the anchor itself (cosine 1). At the quantile 0.99, the selected element is
            then the anchor itself for 2B < 52, so that eps = 1 and H is empty. Up to 2B of about
            150, it is usually the positive.

    Returns:
        0-d float64, a cosine. It is NaN if the batch is empty or has values that are not finite.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex import batch_threshold
        >>> eps = batch_threshold(*torch.randn(2, 256, 128), over="negatives")

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200), and the released code,
    https://github.com/olivesgatech/HEX.
    """
    check_number("quantile", quantile, 0, 1)
    check_over("over", over)
    batch = problem.of_views(z0, z1, negatives, mode, 1.0, ignored=ignored)
    return batch.threshold(float(quantile), over)


def hex_sup_con(
    features: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float | Tensor | None = None,
    ignored: Tensor | None = None,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    groups: Tensor | tuple[Tensor, Tensor] | None = None,
    guide: Tensor | tuple[Tensor, Tensor] | None = None,
    temperature: float | Tensor = 0.1,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    decoupled: bool = False,
    positives: Positives = "outside",
    base_temperature: float | None = None,
    reduction: Reduction = "mean",
    cache_bytes: int | None = None,
) -> Tensor:
    """The HEX loss of rows with several positives at a given threshold, in nats.

    Let l = cosine / tau, and let P(i) be the n_P positives of row i. The negatives are all rows
    except i itself and its positives. H(i) has those above eps, and G(i) the rest. Then::

        E_i = sum_{p in P} exp(l_ip)
        Q_i = max( (R_i - tau_plus N_h E_i / n_P) / (1 - tau_plus),  N_h exp(-1/tau) )
        D_i = E_i + Q_i + sum_{j in G} exp(l_ij)
        L_i = mean_{p in P} -l_ip + log D_i        positives="outside" (SupCon's L_out)
        L_i = -log(E_i / D_i)                      positives="inside" (solo-learn)

    R_i and N_h are those of `hex_loss`. A row without positives has the loss 0, and it counts in
    the mean.

    Args:
        features: (B, V, D), V views of B images, or (N, D) with labels or a mask. Axes after the
            third are flattened into it. For dtypes, strides and lengths of rows, see `hex_loss`.
        labels: (B,), or (N,) for features (N, D), integers. Rows with the same label are positives
            of each other. With None, the views of the same image are positives of each other.
        mask: (B, B), or (N, N) for features (N, D). Row i marks the positives of image i, for all
            of its views. The mask may be asymmetric. Its dtype is bool or a number type, and its
            values are 0 and 1. Other values raise a ValueError. On another device than the CPU, for
            a tensor subclass, and in a compiled graph, they raise a RuntimeError when the graph
            runs. Under vmap over the mask, every value except 0 counts as 1. Give either a mask or
            labels, not both.
        eps: the threshold, a cosine: a number, a 0-d tensor, or (N,), one value for each row.
            Give either eps or groups, not both.
        candidates: None, or (M, D), reference embeddings such as those of a memory. M may be any
            number. All rows of features are then compared with the candidates alone, and not with
            each other: P(i) is the candidates with the label of i, and the negatives are the
            others. One that is a copy of row i counts as a positive of i, unless it is ignored.
            Candidates get a gradient if they require one.
        candidate_labels: (M,) integers, the labels of the candidates. `labels` are then wanted.
        ignored: None, or a bool tensor (B, B), or (N, N) for features (N, D). It is True where a
            negative does not count, for all views of both images. An entry of a positive, or of the
            row itself, has no effect. With candidates it is (B, M), or (N, M) for features (N, D),
            and what it marks does not count, even if it is a positive.
        groups: (B,), or (N,) for features (N, D), integers. H(i) is then the negatives in the group
            of i. With candidates it is a pair (groups, candidate_groups), and the second is (M,).
        guide: a tensor with the shape of features, except for D. Its cosines, instead of those of
            the features, decide which negatives are above eps. With candidates it is a pair
            (guide, candidate_guide), and the second is (M, any D).
        variant: "paper" for the equations above, or "released" for the authors' form. Their code
            does not handle several positives, so here P(i) takes the place of the positive. H(i) is
            left out, and the positives are missing in the denominator:
            log sum_G exp(l) + |H and G| exp(-1/tau) - (mean_P l, or log E). In "excluded" Q_i is 0.
        decoupled: whether the positives are left out of the denominator, D_i = Q_i + sum_G exp(l).
            L_i is then log D_i - mean_P l (outside) or log D_i - log E_i (inside). It is 0 for a
            row that has nothing in the denominator.
        positives: "outside" or "inside" the logarithm (see the equations).
        base_temperature: None, or a number > 0. The loss is then multiplied by temperature /
            base_temperature, as in SupContrast (where it is 0.07 by default).
        temperature, beta, tau_plus, reduction, cache_bytes: as in `hex_loss`.

    Returns:
        0-d, or (N,) for "none", where N = V B and all rows of the first view come first. It is
        float64 if the features are float64, and otherwise float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.
        RuntimeError: the mask has other values than 0 and 1, in the cases named above.

    Example:
        >>> import torch
        >>> from hex import hex_sup_con
        >>> features, labels = torch.randn(64, 2, 128), torch.arange(64) % 10
        >>> loss = hex_sup_con(features, labels, eps=0.6)
        >>> memory, memory_labels = torch.randn(1000, 128), torch.arange(1000) % 10
        >>> loss = hex_sup_con(
        ...     features, labels, candidates=memory, candidate_labels=memory_labels, eps=0.6
        ... )

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020 (arXiv 2004.11362), for
    the positives; Kokilepersaud et al., WACV 2025 (arXiv 2410.23200), for the negatives.
    """
    rule = checked_rule(
        reduction=reduction, variant=variant, beta=beta, tau_plus=tau_plus, decoupled=decoupled,
        positives=positives,
        base_temperature=base_temperature, cache_bytes=cache_bytes,
    )  # fmt: skip
    check_eps_or_groups(eps, groups)
    rows = problem.of_features(
        features, labels, mask, temperature, groups, guide,
        candidates=candidates, candidate_labels=candidate_labels, ignored=ignored,
    )  # fmt: skip
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
    decoupled: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """The HEX loss of rows of logits at a given threshold, in nats.

    Let l be the logits and p = target[i]. The negatives of row i are the other columns that are not
    -inf. Then::

        H(i) = { j : tau l_ij > eps },  G(i) the other negatives
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    where Q_i is that of `hex_loss`. If H is empty, the loss is torch's cross-entropy. Logits in
    half precision are rounded, and eps is compared with the rounded cosines. At tau = 0.07 and near
    0.9, neighbouring values of these are 5.5e-4 (float16) or 4.4e-3 (bfloat16) apart.

    Args:
        logits: (N, C), cosine / temperature, in float64, float32, bfloat16 or float16. A column
            that is -inf is left out of its row, so that no `ignored` is needed.
        target: (N,), integers in [0, C), the column of the positive. If the logit of that column is
            -inf, the loss is +inf, as torch's is. The gradient is then that of the limit, which is
            -1 in that column. If nothing else is in the denominator either, the loss and the
            gradient are NaN, as with torch.
        eps: the threshold, a cosine: a number, a 0-d tensor, or (N,), one value for each row.
        temperature: what the cosines were divided by. Only the comparison with eps and the floor of
            Q depend on this argument, so its own gradient is the one at constant logits. A learned
            temperature also gets a gradient through the logits.
        beta, tau_plus, variant, decoupled, reduction: as in `hex_loss`.

    Returns:
        0-d, or (N,) for "none". It is float64 if the logits are float64, and otherwise float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.
        RuntimeError: a target is outside [0, C), on the CPU. On a GPU, which is not waited for, the
            loss and the gradient of its row are NaN instead. There is no `ignore_index`.

    Example:
        >>> import torch
        >>> from hex import hex_cross_entropy
        >>> logits, target = torch.rand(32, 4097) / 0.2, torch.zeros(32, dtype=torch.int64)
        >>> loss = hex_cross_entropy(logits, target, eps=0.8, temperature=0.2)  # MoCo

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """
    rule = checked_rule(
        reduction=reduction, variant=variant, beta=beta, tau_plus=tau_plus, decoupled=decoupled
    )
    rows = problem.of_logits(logits, target, temperature)
    return _at(rows, eps, rule)


def _at(batch: Problem, eps: Any, rule: Rule) -> Tensor:
    """The loss of a problem at a threshold, which is not looked at if groups give H."""
    like = batch.inputs[0]
    if batch.h_is_given:
        return batch.loss(unknown_eps(like), rule)[0]
    check_eps(eps, batch.anchors)
    return batch.loss(eps_tensor(eps, like), rule)[0]
