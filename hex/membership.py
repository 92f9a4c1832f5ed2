# SPDX-License-Identifier: MIT
"""HEXLoss where H(i) is not decided on the embeddings' own cosines: given groups, or a guide.

Checks the two arguments, and lays the pairs of each mode out for the operators of ops.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .functional import Batch, check_batch, has_shape

__all__ = ["check_groups", "check_guide", "check_labels", "loss", "unknown_eps"]

Two = tuple[Tensor | None, Tensor | None]  # of anchors, of candidates where they are others

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def check_labels(name: str, labels: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Labels as int64 on the device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, wanted a torch.Tensor")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got {labels.dtype}, wanted an integer dtype")
    if not has_shape(labels, shape):
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, wanted {shape}")
    return labels.to(device, torch.int64)


def check_groups(groups: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """The group of each image, and of each negative where there are negatives."""
    z0, _, negatives = batch.inputs
    images = z0.shape[0]
    if batch.mode < ops.MODES["shared"]:
        return check_labels("groups", groups, (images,), z0.device), None
    if not isinstance(groups, tuple) or len(groups) != 2:
        raise ValueError(
            f"groups: got {type(groups).__name__}, wanted (groups, negative_groups) with negatives"
        )
    wanted = tuple(negatives.shape[:-1])
    return (
        check_labels("groups[0]", groups[0], (images,), z0.device),
        check_labels("groups[1]", groups[1], wanted, z0.device),
    )


def check_guide(guide: Any, batch: Batch, mode: str) -> Batch:
    """The guide as a batch of the same shape but for its features, without gradient."""
    z0, _, negatives = batch.inputs
    with_negatives = batch.mode >= ops.MODES["shared"]
    wanted = "(g0, g1, g_negatives)" if with_negatives else "(g0, g1)"
    if not isinstance(guide, (tuple, list)) or len(guide) != (3 if with_negatives else 2):
        got = f"{len(guide)} of them" if isinstance(guide, (tuple, list)) else type(guide).__name__
        raise ValueError(f"guide: got {got}, wanted {wanted}")
    try:
        g0, g1, g_negatives = guide if with_negatives else (*guide, None)
        checked = check_batch(g0, g1, g_negatives, mode)
    except (TypeError, ValueError) as error:
        raise type(error)(f"guide: {error}") from None
    g0, g1, g_negatives = checked.inputs
    if not has_shape(g0, (z0.shape[0], g0.shape[1])) or not has_shape(
        g_negatives, (*negatives.shape[:-1], g_negatives.shape[-1])
    ):
        raise ValueError(
            f"guide: got {[tuple(g.shape) for g in guide]}, wanted as many rows as the embeddings"
        )
    if g0.device != z0.device:
        raise ValueError(f"guide: got device {g0.device}, wanted that of z0, {z0.device}")
    return Batch((g0.detach(), g1.detach(), g_negatives.detach()), checked.mode)


def loss(
    batch: Batch, groups: tuple[Tensor, Tensor | None] | None, guide: Batch | None, eps: Tensor,
    tau: Tensor, reduction: int, variant: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As ops.loss, with H(i) by groups (eps is not looked at) or by the guide's cosines."""
    z0, z1, negatives = batch.inputs
    g0, g1, g_negatives = (None, None, None) if guide is None else guide.inputs
    own, others = (None, None) if groups is None else groups
    rows = torch.arange(z0.shape[0], device=z0.device)
    if groups is not None:
        eps = torch.zeros_like(tau, dtype=torch.float64)  # any number

    def pairs(
        pairing: str, embeddings: Two, ids: Two, groups: Two, guides: Two, eps: Tensor,
        reduction: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, y = embeddings
        assert x is not None
        no_mask = torch.empty((0, 0), dtype=torch.bool, device=x.device)
        guide, candidate_guide = guides
        if guide is None:
            guide = x.new_empty((0, 0))
        if candidate_guide is None:
            candidate_guide = guide.new_empty((0, guide.shape[1]))
        # Each a tensor of its own: torch.compile refuses one that is passed twice.
        labels: Any = [rows[:0] if t is None else t.view(-1) for t in (*ids, *groups)]
        arguments: Any = (
            x, x.new_empty((0, x.shape[1])) if y is None else y, *labels[:2], no_mask, *labels[2:],
            guide, candidate_guide,
            eps, tau, ops.PAIRINGS[pairing], reduction, variant, 0, beta, tau_plus,
        )  # fmt: skip
        return ops.labelled.loss(*arguments)

    def joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else torch.cat([first, second])

    if batch.mode == ops.MODES["ntxent"]:
        twice = joined(own, own), None
        return pairs("self", (joined(z0, z1), None), (rows.repeat(2), None), twice,
                     (joined(g0, g1), None), eps, reduction)  # fmt: skip
    if batch.mode == ops.MODES["query"]:
        return pairs("pair", (z0, z1), (rows, rows), (own, own), (g0, g1), eps, reduction)
    if batch.mode == ops.MODES["cross"]:
        first, second = (eps, eps) if eps.dim() == 0 else eps.chunk(2)
        there = pairs("pair", (z0, z1), (rows, rows), (own, own), (g0, g1), first, 0)
        back = pairs("pair", (z1, z0), (rows, rows), (own, own), (g1, g0), second, 0)
        value, hard, share = (torch.cat(both) for both in zip(there, back, strict=True))
        return reference.reduce(value, reduction), hard, share
    if batch.mode == ops.MODES["shared"]:
        nobody = torch.full((negatives.shape[0],), -1, device=z0.device)
        return pairs("queue", (z0, joined(z1, negatives)), (rows, joined(rows, nobody)),
                     (own, joined(own, others)), (g0, joined(g1, g_negatives)), eps,
                     reduction)  # fmt: skip
    # Negatives of each anchor's own: their cosines are D times smaller than they are themselves,
    # so the rows of logits are made here.
    wide = any(z.dtype == torch.float64 for z in batch.inputs)
    c = _own_cosines(batch.inputs, torch.float64 if wide else torch.float32)  # (B, 1 + K)
    if own is not None and others is not None:
        same = torch.cat([own[:, None], others], 1) == own[:, None]
        score = same.to(c.dtype)
    else:
        assert guide is not None
        score = _own_cosines(guide.inputs, c.dtype)
    return ops.logits.loss(
        c / tau.to(c), torch.zeros_like(rows), score, eps, tau, own is not None, reduction,
        variant, beta, tau_plus,
    )  # fmt: skip


def _own_cosines(inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """(B, 1 + K): of each anchor with its positive and its own negatives."""
    u0, u1, un = (reference.unit_rows(z.to(dtype)) for z in inputs)
    others = reference.dots(un, u0.unsqueeze(1)).squeeze(-1)
    return torch.cat([(u0 * u1).sum(-1, keepdim=True), others], 1)


def unknown_eps(like: Tensor) -> Tensor:
    """The statistic eps of a batch whose H(i) was given."""
    return torch.full((), math.nan, dtype=torch.float64, device=like.device)
