# SPDX-License-Identifier: MIT
"""HEX with several positives: labels, a mask, or more than two views.

The function with eps given, the module, and the checks of their arguments. The mathematics is in
docs/math.md; the kernels behind ops.py.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import distributed, ops
from ._calls import is_transformed
from .functional import (
    Reduction,
    Variant,
    check_choice,
    check_embeddings,
    check_number,
    check_options,
    check_temperature,
    eps_tensor,
    has_shape,
    temperature_tensor,
)
from .loss import _Contrastive, _tracker
from .membership import check_labels, unknown_eps
from .threshold import ThresholdTracker

__all__ = ["HEXSupConLoss", "hex_sup_con"]

Positives = Literal["outside", "inside"]


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
    rows = check_rows(features, labels, mask, groups, guide)
    check_options(beta, tau_plus, variant, reduction)
    check_choice("positives", positives, get_args(Positives))
    check_base(base_temperature)
    if (eps is None) != (groups is not None):
        raise ValueError("eps: wanted a threshold, or groups in its place, and not both")
    given = unknown_eps(rows.x) if eps is None else eps_tensor(eps, rows.x.shape[0], rows.x.device)
    return _loss(
        rows, given, temperature_tensor(check_temperature(temperature), rows.x), reduction, variant,
        positives, float(beta), float(tau_plus), base_temperature,
    )[0]  # fmt: skip


class HEXSupConLoss(_Contrastive):
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

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        threshold: float | Literal["adaptive"] | ThresholdTracker | None = "adaptive",
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        positives: Positives = "outside",
        base_temperature: float | None = None,
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        check_choice("positives", positives, get_args(Positives))
        check_base(base_temperature)
        tracker = _tracker(threshold)
        super().__init__(
            temperature, tracker, beta, tau_plus, variant, "ntxent", reduction, gather_distributed
        )
        self.positives: Positives = positives
        self.base_temperature = None if base_temperature is None else float(base_temperature)

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
        rows = check_rows(features, labels, mask, groups, guide)
        if self.gather_distributed:
            if mask is not None:
                raise ValueError(
                    "gather_distributed: got True with a mask, which says nothing of the rows of "
                    "other ranks; wanted labels"
                )
            if distributed.is_distributed():
                rows = _gathered(features, labels, groups, guide)
        chosen = check_temperature(self.temperature if temperature is None else temperature)
        tau = temperature_tensor(chosen, rows.x)
        eps = unknown_eps(rows.x) if groups is not None else self._measured(rows, tau)
        value, hard, share = _loss(
            rows, eps, tau, self.reduction, self.variant, self.positives, self.beta, self.tau_plus,
            self.base_temperature,
        )  # fmt: skip
        shown = value
        if self.variant == "released" and groups is None:
            shown = torch.where(_any_positive(rows), value.detach(), math.nan)
        self._keep((rows.x, tau), shown, eps, hard, share, given=groups is not None)
        return value

    def _measured(self, rows: "Rows", tau: Tensor) -> Tensor:
        seen = rows.x if rows.guide is None else rows.guide
        pairs = seen, seen.new_empty((0, seen.shape[1])), rows.ids, rows.ids[:0], rows.mask, 0
        return self._threshold(
            seen.device,
            (rows.x, tau),
            seen.shape[0],
            seen.shape[0],
            True,
            lambda quantile, over: ops.labelled.threshold(*pairs, quantile, over),
            lambda: ops.labelled.row_range(*pairs),
        )

    def extra_repr(self) -> str:
        shown = [part for part in super().extra_repr().split(", ") if not part.startswith("mode=")]
        shown.insert(-1, f"positives={self.positives!r}")
        if self.base_temperature is not None:
            shown.insert(-1, f"base_temperature={self.base_temperature}")
        return ", ".join(shown)


def _gathered(
    features: Tensor, labels: Tensor | None, groups: Tensor | None, guide: Tensor | None
) -> "Rows":
    """The rows of all ranks; the arguments are checked."""
    constant = [
        None if x is None else distributed.gather_constant(x) for x in (labels, groups, guide)
    ]
    labels, groups, guide = constant
    return check_rows(distributed.gather(features), labels, None, groups, guide)


class Rows(NamedTuple):
    """Checked features: N rows, view-major, what makes them positives and what groups them."""

    x: Tensor
    ids: Tensor
    mask: Tensor
    groups: Tensor
    guide: Tensor | None


def check_rows(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    groups: Tensor | None,
    guide: Tensor | None,
) -> Rows:
    check_embeddings("features", features)
    if features.dim() < 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}, wanted (B, V, D) or (N, D)")
    if labels is not None and mask is not None:
        raise ValueError("labels, mask: got both, wanted one of them")
    if groups is not None and guide is not None:
        raise ValueError("groups, guide: got both, wanted one of them")
    images, views = features.shape[0], features.shape[1] if features.dim() > 2 else 1
    device = features.device
    if features.dim() == 2 and labels is None and mask is None:
        raise ValueError(
            "labels: got None, wanted labels or a mask for features (N, D); (B, V, D) go without"
        )
    if labels is None:
        ids = torch.arange(images, device=device)
    else:
        ids = check_labels("labels", labels, (images,), device)
    positive = torch.empty((0, 0), dtype=torch.bool, device=device)
    if mask is not None:
        positive = _check_mask(mask, images, device)
    if groups is None:
        grouped = ids[:0]
    else:
        grouped = check_labels("groups", groups, (images,), device).repeat(views)
    guiding = None
    if guide is not None:
        check_embeddings("guide", guide)
        leading = min(features.dim() - 1, 2)  # images, and views
        wanted = *features.shape[:leading], *guide.shape[leading:]
        if guide.dim() != features.dim() or not has_shape(guide, wanted):
            raise ValueError(
                f"guide: got shape {tuple(guide.shape)}, wanted that of features but for the last "
                f"axis, {tuple(features.shape)}"
            )
        if guide.device != device:
            raise ValueError(f"guide: got device {guide.device}, wanted that of features, {device}")
        guiding = _view_major(guide.detach())
    return Rows(_view_major(features), ids.repeat(views), positive, grouped, guiding)


def _any_positive(rows: Rows) -> Tensor:
    """Whether any row has a positive; 0-d, on the device."""
    if rows.mask.numel():
        views = rows.x.shape[0] // rows.mask.shape[0]
        others = rows.mask if views > 1 else rows.mask.triu(1) | rows.mask.tril(-1)
        return others.any()
    ids = rows.ids.sort().values
    return (ids[1:] == ids[:-1]).any()


def check_base(base_temperature: Any) -> None:
    if base_temperature is not None:
        check_number("base_temperature", base_temperature, 0, math.inf, open_end=True)
        if base_temperature == 0:
            raise ValueError("base_temperature: got 0, wanted a number > 0")


def _check_mask(mask: Any, images: int, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, wanted a torch.Tensor")
    if mask.is_complex() or mask.layout != torch.strided:
        raise TypeError(f"mask: got {mask.dtype}, {mask.layout}, wanted bool or real, dense")
    if not has_shape(mask, (images, images)):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, wanted ({images}, {images})")
    positive = mask != 0
    if mask.dtype != torch.bool:
        _check_ones(mask)
    return positive.to(device)


def _check_ones(mask: Tensor) -> None:
    """ValueError where an entry is neither 0 nor 1; where that would mean to wait for a device, in
    a compiled graph and of a subclass, torch's RuntimeError as it runs."""
    if is_transformed(mask):
        return  # it has no values of its own
    text = (
        "mask: got values other than 0 and 1, wanted which rows are positives; there are no "
        "weights, so decide with mask > t"
    )
    right = ((mask == 0) | (mask == 1)).all()
    if not right.is_cpu or type(right) is not Tensor or torch.compiler.is_compiling():
        torch._assert_async(right, text)
    elif not right:
        raise ValueError(text)


def _view_major(z: Tensor) -> Tensor:
    return z if z.dim() == 2 else z.flatten(2).transpose(0, 1).flatten(0, 1)


def _loss(
    rows: Rows, eps: Tensor, tau: Tensor, reduction: str, variant: str, positives: str,
    beta: float, tau_plus: float, base_temperature: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = rows.x.new_empty((0, 0))
    guide = none if rows.guide is None else rows.guide
    value, hard, share = ops.labelled.loss(
        rows.x, rows.x.new_empty((0, rows.x.shape[1])), rows.ids, rows.ids[:0], rows.mask,
        rows.groups, rows.ids[:0], guide, guide.new_empty((0, guide.shape[1])), eps, tau,
        ops.PAIRINGS["self"], ops.REDUCTIONS[reduction], ops.VARIANTS[variant],
        ops.POSITIVES[positives], beta, tau_plus,
    )  # fmt: skip
    if base_temperature is not None:
        value = value * (tau / float(base_temperature)).to(value)
    return value, hard, share
