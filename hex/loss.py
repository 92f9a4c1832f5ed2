# SPDX-License-Identifier: MIT
"""The losses as modules: the options of each, and how its arguments become a problem (problem.py).

contrastive.py turns a problem into a loss, with the threshold and the statistics, in the same way
for all of them. The mathematics is in the docstrings of functional.py and in docs/math.md.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from . import problem
from .checks import (
    Mode,
    Positives,
    Reduction,
    Variant,
    check_flag,
    check_mode,
    check_no_mask_to_gather,
)
from .contrastive import ContrastiveLoss, Statistics, Threshold

__all__ = ["HEXCrossEntropyLoss", "HEXLoss", "HEXSupConLoss", "InfoNCELoss", "Statistics"]


class HEXLoss(ContrastiveLoss):
    """The HEX loss, with a threshold that follows training.

    It is InfoNCE in which the negatives near the anchor have a term of their own. Let c_ij be the
    cosine of anchor i and candidate j, l = c / tau, and p the positive of i. Then::

        H(i) = { j : c_ij > eps },   G(i) the other negatives
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    Q_i is the weighted and debiased sum over H(i). `hex_loss` has its formula. By default, eps is
    measured on each batch: it is each anchor's 0.99 quantile of its cosines with its negatives,
    averaged over the anchors. It falls as the embeddings spread.

    Args:
        temperature: tau > 0, a number or a tensor of one element. A Parameter is learned.
        threshold: "adaptive"; a `ThresholdTracker`, for another quantile, a warm-up, a momentum, a
            schedule, or a threshold of each row by its positive; a number, which is a fixed cosine;
            or None for InfoNCE.
        beta: >= 0. The larger beta is, the more the closest members of H count.
        tau_plus: in [0, 1), the expected share of false negatives in H. A large one does not simply
            weaken the repulsion of H: see docs/guides/what_h_holds.md.
        variant: "paper", or "released" for what the authors' code computes (docs/released.md), or
            "excluded", which leaves H out: Q_i is 0.
        decoupled: whether the positive is left out of the denominator, as in decoupled contrastive
            learning (DCL). With threshold=None, the loss is DCL. The released form has no positive
            there in either case.
        mode: "ntxent" (SimCLR), "query" (NNCLR, MoCo v3) or "cross" (CLIP); see `hex_loss`.
        reduction: "mean", "sum" or "none".
        gather_distributed: whether the batches of all ranks of torch.distributed count as one
            batch. Each rank then computes its own anchors against all candidates, and the ranks
            exchange what they measured. So the threshold, the loss and the statistics are those of
            all rows, with the same bits on all ranks. Data-parallel training (DDP, FSDP) averages
            the gradients over ranks, and this average is the gradient of the whole batch. With
            `negatives`, the candidates remain the rank's own. In a single process this option
            changes no value, but without `negatives` it refuses `ignored` all the same. Every rank
            must call the loss equally often (docs/distributed.md).
        process_group: the data-parallel ranks, a torch.distributed.ProcessGroup, if these are not
            all ranks. deepcopy keeps it. It cannot be pickled.
        check_sizes: whether the ranks first compare, at each call, their numbers of rows, dtypes
            and options. This costs one small exchange on the host.
        cache_bytes: on a CPU, the most bytes of cosines that the forward of a call may keep for its
            backward. If a batch has more, none are kept and the backward computes them again, which
            takes longer but needs no memory. None stands for HEX_CACHE_BYTES in the environment
            or, if that is not set, for 1 GiB. With 0 none are kept.

    Shape:
        z0, z1: (B, D). negatives: (K, D) or (B, K, D). Each is float64, float32, bfloat16 or
            float16.
        Result: 0-d, or one value for each row with reduction "none". It is float64 if an input is
            float64, and otherwise float32.

    Attributes:
        threshold: the `ThresholdTracker` in use, which is part of `state_dict`, or None.
        last: the `Statistics` of the last batch as tensors (eps, mean |H| and mean share of the
            local term), or None before the first batch. `statistics()` gives them as numbers.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex import HEXLoss
        >>> criterion = HEXLoss(temperature=0.1)
        >>> z0, z1 = torch.randn(2, 256, 128).requires_grad_()
        >>> criterion(z0, z1).backward()
        >>> criterion.statistics().keys()
        dict_keys(['eps', 'hard', 'share'])

    Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
    Algorithms", WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX; for `decoupled`,
    Yeh et al., "Decoupled Contrastive Learning", ECCV 2022 (arXiv 2110.06848).
    """

    shown: ClassVar[tuple[str, ...]] = (
        "temperature",
        "beta",
        "tau_plus",
        "variant",
        "decoupled",
        "mode",
        "reduction",
        "gather_distributed",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        threshold: Threshold = "adaptive",
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        decoupled: bool = False,
        mode: Mode = "ntxent",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: Any = None,
        check_sizes: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__(
            temperature, threshold, beta=beta, tau_plus=tau_plus, variant=variant,
            decoupled=decoupled, reduction=reduction, gather_distributed=gather_distributed,
            process_group=process_group, check_sizes=check_sizes, cache_bytes=cache_bytes,
        )  # fmt: skip
        check_mode(mode)
        self.mode: Mode = mode

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        negatives: Tensor | None = None,
        *,
        ignored: Tensor | None = None,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
        guide: tuple[Tensor, ...] | None = None,
        temperature: float | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """The loss of a batch. Arguments, result and errors are those of `hex_loss`.

        Args:
            z0, z1: (B, D), two views.
            negatives: None, (K, D) or (B, K, D).
            ignored: None, or a bool tensor that is True where a negative does not count. It is
                (B, B) by images, or (N, M) by anchors and candidates; with negatives (K, D) it is
                (B, K) or (K,), and with (B, K, D) it is (B, K), which serves as padding. An ignored
                negative does not count for the threshold either. With `gather_distributed` it is
                for negatives only.
            groups: (B,) integers, one for each image. H(i) is then the negatives in the group of i.
                There is no threshold: the statistic eps is NaN, and the tracker does not change.
                With negatives, groups is a pair (groups, negative_groups), and the second of these
                is (K,) or (B, K). Give either groups or a guide, not both.
            guide: other features of the same images, for example those of a backbone, which keep
                more of the image than the embeddings do. H(i) and eps are then taken from the
                cosines of the guide, and the loss from the cosines of the embeddings. It is
                (g0, g1) or, with negatives, (g0, g1, g_negatives), with the shapes of the
                embeddings except for D. The guide gets no gradient.
            temperature: replaces the module's temperature for this call (CLIP: `1 /
                logit_scale.exp()`).
            rows: with `gather_distributed`, if the ranks have different numbers of images: the
                number of every rank, as a tuple of ints.

        Example:
            >>> import torch
            >>> from hex import HEXLoss
            >>> z0, z1 = torch.randn(2, 256, 128)
            >>> loss = HEXLoss()(z0, z1, groups=torch.arange(256) // 16)
            >>> loss = HEXLoss()(z0, z1, guide=tuple(torch.randn(2, 256, 512)))
        """
        tau = self.temperature if temperature is None else temperature
        if self.gather_distributed and negatives is None:
            check_no_mask_to_gather(None, ignored)
        meeting = self.meeting(rows)
        return self.loss_of(
            problem.of_views(z0, z1, negatives, self.mode, tau, groups, guide, meeting, ignored)
        )


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE on the kernels of `HEXLoss`: the baseline with which to compare HEX.

        L_i = -l_ip + log( exp(l_ip) + sum_{negatives j} exp(l_ij) ),    l = c / tau
        L_i = -l_ip + log( sum_{negatives j} exp(l_ij) )                 decoupled

    Args:
        decoupled: whether the positive is left out of the denominator. This is decoupled
            contrastive learning (DCL), with the value of lightly's `DCLLoss`. The loss can be
            negative. It is 0 for a row without negatives.
        temperature, mode, reduction, gather_distributed, process_group, check_sizes, cache_bytes:
            as in `HEXLoss`.

    Shape:
        z0, z1, negatives, result: as in `HEXLoss`.

    Attributes:
        threshold: None, because there is no H.
        last, statistics(): as in `HEXLoss`. eps is +inf, and the others are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex import InfoNCELoss
        >>> loss = InfoNCELoss(0.1)(torch.randn(256, 128), torch.randn(256, 128))

    Source: van den Oord et al. 2018 (arXiv 1807.03748); Chen et al. 2020 (arXiv 2002.05709); Yeh et
    al. 2022 (arXiv 2110.06848) for `decoupled`.
    """

    shown: ClassVar[tuple[str, ...]] = (
        "temperature",
        "decoupled",
        "mode",
        "reduction",
        "gather_distributed",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        decoupled: bool = False,
        mode: Mode = "ntxent",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: Any = None,
        check_sizes: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__(
            temperature, None, beta=1.0, tau_plus=0.0, variant="paper", decoupled=decoupled,
            reduction=reduction, gather_distributed=gather_distributed,
            process_group=process_group, check_sizes=check_sizes, cache_bytes=cache_bytes,
        )  # fmt: skip
        check_mode(mode)
        self.mode: Mode = mode

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        negatives: Tensor | None = None,
        *,
        ignored: Tensor | None = None,
        temperature: float | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """The loss of a batch. Arguments, result and errors are those of `info_nce`.

        Args:
            z0, z1: (B, D), two views.
            negatives: None, (K, D) or (B, K, D).
            ignored: as in `HEXLoss`.
            temperature: replaces the module's temperature for this call (CLIP: `1 /
                logit_scale.exp()`).
            rows: as in `HEXLoss`.
        """
        tau = self.temperature if temperature is None else temperature
        if self.gather_distributed and negatives is None:
            check_no_mask_to_gather(None, ignored)
        meeting = self.meeting(rows)
        return self.loss_of(
            problem.of_views(z0, z1, negatives, self.mode, tau, meeting=meeting, ignored=ignored)
        )


class HEXSupConLoss(ContrastiveLoss):
    """The HEX loss for several positives: more than two views, or classes by labels or by a mask.

    `hex_sup_con` has the equations. The threshold follows training as in `HEXLoss`. This loss can
    replace SupContrast's `SupConLoss`, pytorch-metric-learning's `SupConLoss`, and, with
    `positives="inside"`, solo-learn's `simclr_loss_func(z, indexes)`. With threshold=None it has
    the values of these losses, except that pytorch-metric-learning averages only over the rows that
    have a positive. (Its NTXentLoss leaves the other positives out of each denominator.)

    Args:
        temperature, threshold, beta, tau_plus, variant, decoupled, reduction: as in `HEXLoss`. A
            threshold of the rule by_positive is refused.
        positives: "outside" the logarithm, which is SupCon's L_out, or "inside" it.
        base_temperature: None, or a number > 0. The loss is then multiplied by temperature /
            base_temperature (SupContrast: 0.07).
        gather_distributed, process_group, check_sizes, cache_bytes: as in `HEXLoss`. Labels, groups
            and guides are gathered too. Without labels, every image of every rank is its own class.
            `mask` and `ignored` cannot be gathered and are refused. Candidates are not gathered:
            each rank compares its rows with its own, of which some may be ignored.

    Shape:
        features: (B, V, D), or (N, D) with labels or a mask. labels: (B,) or (N,) integers. mask:
            (B, B) or (N, N). candidates: (M, D). candidate_labels: (M,) integers.
        Result: 0-d, or (N,) with reduction "none", where N = V B and all rows of the first view
            come first. It is float64 if the features are float64, and otherwise float32.

    Attributes:
        threshold, last, statistics(), set_epoch(): as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex import HEXSupConLoss
        >>> criterion = HEXSupConLoss(temperature=0.1)
        >>> features = torch.randn(128, 2, 64, requires_grad=True)
        >>> criterion(features, labels=torch.arange(128) % 10).backward()
        >>> memory, memory_labels = torch.randn(1000, 64), torch.arange(1000) % 10
        >>> loss = criterion(
        ...     features, torch.arange(128) % 10, candidates=memory, candidate_labels=memory_labels
        ... )

    Source: Khosla et al. 2020 (arXiv 2004.11362); Kokilepersaud et al. 2025 (arXiv 2410.23200).
    """

    shown: ClassVar[tuple[str, ...]] = (
        "temperature", "beta", "tau_plus", "variant", "decoupled", "positives", "base_temperature",
        "reduction", "gather_distributed",
    )  # fmt: skip
    _several: ClassVar[bool] = True

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        threshold: Threshold = "adaptive",
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        decoupled: bool = False,
        positives: Positives = "outside",
        base_temperature: float | None = None,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: Any = None,
        check_sizes: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__(
            temperature, threshold, beta=beta, tau_plus=tau_plus, variant=variant,
            decoupled=decoupled, positives=positives, base_temperature=base_temperature,
            reduction=reduction, gather_distributed=gather_distributed,
            process_group=process_group, check_sizes=check_sizes, cache_bytes=cache_bytes,
        )  # fmt: skip

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        ignored: Tensor | None = None,
        candidates: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
        guide: Tensor | tuple[Tensor, Tensor] | None = None,
        temperature: float | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """The loss of a batch. Arguments, result and errors are those of `hex_sup_con`.

        Args:
            features: (B, V, D), or (N, D) with labels or a mask.
            labels: None, or (B,) or (N,) integers.
            mask: None, or (B, B) or (N, N), of bool or of 0 and 1.
            candidates: None, or (M, D), reference embeddings, with which alone the features are
                then compared. A copy of a row's own embedding counts, unless it is ignored.
            candidate_labels: (M,) integers, with candidates.
            ignored: None, or a bool tensor (B, B) or (N, N), True where a negative does not count;
                with candidates (B, M) or (N, M), True where a candidate does not count.
            groups: None, or (B,) or (N,) integers. H(i) is then the negatives in the group of i.
                There is no threshold: the statistic eps is NaN, and the tracker does not change.
                With candidates it is a pair (groups, candidate_groups).
            guide: None, or other features. H and eps are then taken from their cosines. With
                candidates it is a pair (guide, candidate_guide).
            temperature: replaces the module's temperature for this call.
            rows: as in `HEXLoss`.
        """
        tau = self.temperature if temperature is None else temperature
        if self.gather_distributed:
            check_no_mask_to_gather(mask, ignored if candidates is None else None)
        meeting = self.meeting(rows)
        batch = problem.of_features(
            features, labels, mask, tau, groups, guide, meeting,
            candidates=candidates, candidate_labels=candidate_labels, ignored=ignored,
        )  # fmt: skip
        return self.loss_of(batch)


class HEXCrossEntropyLoss(ContrastiveLoss):
    """The HEX loss in place of `torch.nn.CrossEntropyLoss` on contrastive logits.

    It is for code bases that compute logits = cosines / temperature and a target, such as MoCo,
    sthalles/SimCLR and mmpretrain. `hex_cross_entropy` has the equations. The threshold follows
    training as in `HEXLoss`. If you have the embeddings, use `HEXLoss` instead. It does not store
    the logits, and so it saves their memory.

    Args:
        temperature: what the cosines were divided by. The cosines are logits * temperature.
        self_column: whether the quantile with over="all" counts the anchor's similarity with itself
            as one more element of each row, a cosine of 1. The authors' quantile counts it, but the
            logits do not contain it. Use True for SimCLR, whose code has left out the diagonal or
            filled it with -inf. Use False for MoCo, whose rows never contained it.
        threshold, beta, tau_plus, variant, decoupled, reduction, process_group, check_sizes: as in
            `HEXLoss`.
        gather_distributed: as in `HEXLoss`. The loss is then the mean over the rows of all ranks,
            at a threshold that is measured on all of them. The columns remain the rank's own.

    Shape:
        logits: (N, C), float64, float32, bfloat16 or float16. target: (N,) integers in [0, C).
        Result: 0-d, or (N,) with reduction "none". It is float64 if the logits are float64, and
            otherwise float32.

    Attributes:
        threshold, last, statistics(), set_epoch(): as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.
        RuntimeError: a target is outside [0, C), on the CPU. On a GPU, which is not waited for, the
            loss and the gradient of its row are NaN instead. There is no `ignore_index`.

    Example:
        >>> import torch
        >>> from hex import HEXCrossEntropyLoss
        >>> criterion = HEXCrossEntropyLoss(temperature=0.2)
        >>> logits = (torch.rand(32, 4097) / 0.2).requires_grad_()
        >>> criterion(logits, torch.zeros(32, dtype=torch.int64)).backward()

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """

    shown: ClassVar[tuple[str, ...]] = (
        "temperature",
        "self_column",
        "beta",
        "tau_plus",
        "variant",
        "decoupled",
        "reduction",
        "gather_distributed",
    )

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        threshold: Threshold = "adaptive",
        self_column: bool = False,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        decoupled: bool = False,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
        process_group: Any = None,
        check_sizes: bool = True,
    ) -> None:
        super().__init__(
            temperature, threshold, beta=beta, tau_plus=tau_plus, variant=variant,
            decoupled=decoupled, reduction=reduction, gather_distributed=gather_distributed,
            process_group=process_group, check_sizes=check_sizes,
        )  # fmt: skip
        self.self_column = check_flag("self_column", self_column)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        temperature: float | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """The loss of a batch. Arguments, result and errors are those of `hex_cross_entropy`.

        Args:
            logits: (N, C), cosines / temperature. A column that is -inf is left out of its row, so
                that a negative can be ignored without a mask.
            target: (N,) integers, the column of each row's positive.
            temperature: replaces the module's temperature for this call.
            rows: as in `HEXLoss`.
        """
        tau = self.temperature if temperature is None else temperature
        meeting = self.meeting(rows)
        return self.loss_of(problem.of_logits(logits, target, tau, self.self_column, meeting))
