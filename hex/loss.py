# SPDX-License-Identifier: MIT
"""The losses as modules: which problem (problem.py) each of them is, and its options.

What they do with it, from the temperature to the statistics, is written once, in contrastive.py.
The mathematics is in functional.py's docstrings and docs/math.md.
"""

from typing import ClassVar

from torch import Tensor

from . import problem
from .checks import (
    Mode,
    Positives,
    Reduction,
    Variant,
    check_base_temperature,
    check_flag,
    check_mode,
    check_positives,
)
from .contrastive import ContrastiveLoss, Statistics, Threshold

__all__ = ["HEXCrossEntropyLoss", "HEXLoss", "HEXSupConLoss", "InfoNCELoss", "Statistics"]


class HEXLoss(ContrastiveLoss):
    """The HEX loss with a threshold that follows training: InfoNCE, its near negatives apart.

    With c_ij the cosine of anchor i and candidate j, l = c / tau, p the positive of i::

        H(i) = { j : c_ij > eps },   G(i) the other negatives
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    where Q_i is the weighted, debiased sum over H(i) (`hex_loss` has it in full) and eps, by
    default, is the mean over rows of the row's 0.99 quantile, fresh in every batch. As groups
    emerge in the embedding, eps falls.

    Args:
        temperature: tau > 0; a Parameter of one element is learned.
        threshold: "adaptive"; a `ThresholdTracker` (quantile, warm-up, momentum, schedules); a
            number, a fixed cosine; or None, InfoNCE.
        beta: >= 0, how much more the closest members of H weigh.
        tau_plus: in [0, 1), the share of H expected to be false negatives.
        variant: "paper", or "released" for what the authors' code computes (docs/math.md).
        mode: "ntxent" (SimCLR), "query" (NNCLR, MoCo v3) or "cross" (CLIP); see `hex_loss`.
        reduction: "mean", "sum" or "none".
        gather_distributed: with several ranks of torch.distributed, the batches of all are one:
            each rank computes the same loss and threshold of all rows, and gets the gradient that
            data-parallel training (DDP, FSDP) makes the whole batch's. Every rank has as many
            rows (`drop_last=True`). One process: no effect.

    Shape:
        z0, z1: (B, D) float64, float32, bfloat16 or float16; negatives: (K, D) or (B, K, D).
        Result: 0-d, or one value a row; float64 if an input is, else float32.

    Attributes:
        threshold: the `ThresholdTracker` in use, part of `state_dict`; None for InfoNCE.
        last, statistics(): eps, mean |H| and the local share of the last batch.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import HEXLoss
        >>> criterion = HEXLoss(temperature=0.1)
        >>> z0, z1 = torch.randn(2, 256, 128).requires_grad_()
        >>> criterion(z0, z1).backward()
        >>> criterion.statistics().keys()
        dict_keys(['eps', 'hard', 'share'])

    Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
    Algorithms", WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """

    shown: ClassVar[tuple[str, ...]] = (
        "temperature",
        "beta",
        "tau_plus",
        "variant",
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
        mode: Mode = "ntxent",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, threshold, beta, tau_plus, variant, reduction)
        check_mode(mode)
        self.mode: Mode = mode
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        negatives: Tensor | None = None,
        *,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
        guide: tuple[Tensor, ...] | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_loss`.

        Args:
            z0, z1: (B, D), two views.
            negatives: None, (K, D) or (B, K, D).
            groups: H(i) is given: the negatives of i's group. (B,) integers, one for each image;
                with negatives the pair (groups, negative_groups), the latter (K,) or (B, K). The
                threshold plays no part then: its statistic is NaN, the tracker is not touched.
            guide: (g0, g1), or (g0, g1, g_negatives) with negatives, of the embeddings' shapes but
                for the features: H(i) and eps come from its cosines, the loss from the embeddings'.
                No gradient flows to it. A backbone's features, say, which keep more of the image.
            temperature: overrides the module's for this call (CLIP: `1 / logit_scale.exp()`).

        Example:
            >>> import torch
            >>> from hex import HEXLoss
            >>> z0, z1 = torch.randn(2, 256, 128)
            >>> loss = HEXLoss()(z0, z1, groups=torch.arange(256) // 16)
            >>> loss = HEXLoss()(z0, z1, guide=tuple(torch.randn(2, 256, 512)))
        """
        tau = self.temperature if temperature is None else temperature
        return self.loss_of(
            problem.of_views(
                z0, z1, negatives, self.mode, tau, groups, guide, self.gather_distributed
            )
        )


class InfoNCELoss(ContrastiveLoss):
    """InfoNCE by the kernels of `HEXLoss`: the baseline to compare it with.

        L_i = -l_ip + log( exp(l_ip) + sum_{negatives j} exp(l_ij) ),    l = c / tau

    Args:
        temperature, mode, reduction, gather_distributed: as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import InfoNCELoss
        >>> loss = InfoNCELoss(0.1)(torch.randn(256, 128), torch.randn(256, 128))

    Source: van den Oord et al. 2018 (arXiv 1807.03748); Chen et al. 2020 (arXiv 2002.05709).
    """

    shown: ClassVar[tuple[str, ...]] = ("temperature", "mode", "reduction", "gather_distributed")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        mode: Mode = "ntxent",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, None, 1.0, 0.0, "paper", reduction)
        check_mode(mode)
        self.mode: Mode = mode
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        negatives: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_loss`.

        Args:
            z0, z1: (B, D), two views.
            negatives: None, (K, D) or (B, K, D).
            temperature: overrides the module's for this call (CLIP: `1 / logit_scale.exp()`).
        """
        tau = self.temperature if temperature is None else temperature
        return self.loss_of(
            problem.of_views(z0, z1, negatives, self.mode, tau, gathers=self.gather_distributed)
        )


class HEXSupConLoss(ContrastiveLoss):
    """The HEX loss for several positives: SupCon, more than two views, labels or ids.

    `hex_sup_con` has the equations; the threshold follows training as in `HEXLoss`. In place of
    SupContrast's `SupConLoss`, pytorch-metric-learning's `SupConLoss`, and solo-learn's
    `simclr_loss_func(z, indexes)` (`positives="inside"`). What differs: pytorch-metric-learning
    averages only the rows that have a positive, and its NTXentLoss leaves the other positives out
    of each denominator.

    Args:
        temperature, threshold, beta, tau_plus, variant, reduction, gather_distributed: as in
            `HEXLoss`; labels are gathered too, without them every image is its own class.
        positives: "outside" the logarithm, SupCon's L_out, or "inside" it.
        base_temperature: multiplies the loss by temperature / base_temperature (SupContrast: 0.07).

    Shape:
        features: (B, V, D), or (N, D) with labels or mask. Result: 0-d, or (N,), view-major.

    Attributes:
        threshold, last, statistics(), set_epoch(): as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import HEXSupConLoss
        >>> criterion = HEXSupConLoss(temperature=0.1)
        >>> features = torch.randn(128, 2, 64, requires_grad=True)
        >>> criterion(features, labels=torch.arange(128) % 10).backward()

    Source: Khosla et al. 2020 (arXiv 2004.11362); Kokilepersaud et al. 2025 (arXiv 2410.23200).
    """

    shown: ClassVar[tuple[str, ...]] = (
        "temperature", "beta", "tau_plus", "variant", "positives", "base_temperature", "reduction",
        "gather_distributed",
    )  # fmt: skip

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        threshold: Threshold = "adaptive",
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        positives: Positives = "outside",
        base_temperature: float | None = None,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, threshold, beta, tau_plus, variant, reduction)
        check_positives(positives)
        self.positives = positives
        self.base_temperature = check_base_temperature(base_temperature)
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        groups: Tensor | None = None,
        guide: Tensor | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_sup_con`."""
        tau = self.temperature if temperature is None else temperature
        return self.loss_of(
            problem.of_features(features, labels, mask, tau, groups, guide, self.gather_distributed)
        )


class HEXCrossEntropyLoss(ContrastiveLoss):
    """The HEX loss in place of `torch.nn.CrossEntropyLoss` on contrastive logits.

    For MoCo, sthalles/SimCLR, mmpretrain and others that build logits = cosines / temperature and a
    target. `hex_cross_entropy` has the equations; the threshold follows training as in `HEXLoss`.
    The logits exist already, so no memory is saved: where the embeddings are at hand, take
    `HEXLoss`.

    Args:
        temperature: what the cosines were divided by; the cosines are logits * temperature.
        self_column: logits do not say whether the anchor's similarity with itself, 1, was among
            its candidates. The authors' quantile counts it. False: the columns present, as in
            MoCo, which never had one. True: one cosine of 1 is added to each row for the quantile
            (over="all"), as in SimCLR, where the code has left out the diagonal or filled it with
            -inf.
        threshold, beta, tau_plus, variant, reduction: as in `HEXLoss`.

    Shape:
        logits: (N, C); target: (N,). Result: 0-d, or (N,).

    Attributes:
        threshold, last, statistics(), set_epoch(): as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

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
        "reduction",
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
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(temperature, threshold, beta, tau_plus, variant, reduction)
        self.self_column = check_flag("self_column", self_column)

    def forward(
        self, logits: Tensor, target: Tensor, *, temperature: float | Tensor | None = None
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_cross_entropy`."""
        tau = self.temperature if temperature is None else temperature
        return self.loss_of(problem.of_logits(logits, target, tau, self.self_column))
