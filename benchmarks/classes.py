# SPDX-License-Identifier: MIT
"""Labels and logits, forward and backward: hex, plain PyTorch, a library.

Every method first computes the loss and gradient of the batch it is timed on, and they have to be
near those of hex.reference in float64, or of the same formula with the local term off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import measure
import peers
import torch
import torch.nn.functional as F
from cases import progress
from torch import Tensor

from hex import hex_cross_entropy, hex_sup_con, reference

TAU, CLASSES, FEATURES = 0.1, 64, 128
Loss = Callable[[Tensor], Tensor]


class Group(NamedTuple):
    """An input, and by name a loss of it and what that has to be in float64."""

    name: str
    x: Tensor
    methods: dict[str, tuple[Loss, Loss]]


def groups(quick: bool, notes: list[str]) -> list[Group]:
    rows, logits = (256, (64, 1025)) if quick else (2048, (256, 65537))
    return [labels(rows, notes), queue(*logits)]


def measured(group: Group, repeats: int) -> list[dict[str, Any]]:
    """A result a method, after its value and gradient were found right; stock heap."""

    def step(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    steps, peaks = {}, {}
    wide = group.x.detach().double().requires_grad_()
    for name, (loss, truth) in group.methods.items():
        progress(f"{group.name}: checking {name}")
        for got, right in zip(step(loss, group.x), step(truth, wide), strict=True):
            error = (got.double() - right).abs().max() / right.abs().max()
            if not error < 1e-4:
                raise peers.Mismatch(f"{name} is off by {error:.1e}")
        del right
        steps[name] = lambda loss=loss: step(loss, group.x)
        peaks[name] = measure.peak_mb(steps[name])
    progress(f"{group.name}: timing")
    samples = measure.times(steps, repeats, measure.clock(1))
    return [
        {
            "case": group.name,
            "method": name,
            "heap": "stock",
            "peak_mb": round(peaks[name], 2),
            "ms": [float(f"{ms:.4g}") for ms in samples[name]],
        }
        for name in steps
    ]


def labels(rows: int, notes: list[str]) -> Group:
    """rows embeddings of 64 classes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows) % CLASSES  # none alone: the library leaves such rows out
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    x = centres[ids] + 0.8 * torch.randn(rows, FEATURES, generator=generator)
    x.requires_grad_()
    eps = 0.2  # a percent or so of the other classes
    none = ids[:0]

    def plain(x: Tensor, eps: float) -> Tensor:
        empty = x.new_empty((0, 0))
        return reference.labelled_rows(
            x, x[:0], ids, none, empty.bool(), none, none, empty, empty,
            torch.tensor(eps, dtype=torch.float64), torch.tensor(TAU, dtype=torch.float64),
            0, 1.0, 0.1, "paper", "outside",
        )[0].mean()  # fmt: skip

    def sup_contrast(x: Tensor) -> Tensor:
        z = F.normalize(x)
        other = ~torch.eye(rows, dtype=torch.bool)
        logits = z @ z.T / TAU
        log_p = logits - logits.masked_fill(~other, -math.inf).logsumexp(1, keepdim=True)
        positive = (ids[:, None] == ids) & other
        return -((log_p * positive).sum(1) / positive.sum(1)).mean()

    def hex_truth(x: Tensor) -> Tensor:
        return plain(x, eps)

    def sup_con_truth(x: Tensor) -> Tensor:
        return plain(x, math.inf)

    methods: dict[str, tuple[Loss, Loss]] = {
        "hex_sup_con": (lambda x: hex_sup_con(x, ids, eps=eps, temperature=TAU), hex_truth),
        "HEX in plain PyTorch": (hex_truth, hex_truth),
        "hex_sup_con, H empty": (
            lambda x: hex_sup_con(x, ids, eps=math.inf, temperature=TAU), sup_con_truth),
        "SupContrast in plain PyTorch": (sup_contrast, sup_con_truth),
    }  # fmt: skip
    try:
        from pytorch_metric_learning.losses import SupConLoss

        peer = SupConLoss(TAU)
        methods["pytorch-metric-learning SupConLoss"] = (lambda x: peer(x, ids), sup_con_truth)
    except ImportError as error:
        notes.append(f"pytorch-metric-learning is left out: {error}")
    return Group(f"{rows} rows, {CLASSES} labels, D = {FEATURES}", x, methods)


def queue(rows: int, columns: int) -> Group:
    """Logits of a queue, the positive first."""
    generator = torch.Generator().manual_seed(0)
    cosines = 0.15 * torch.randn(rows, columns, generator=generator)
    cosines[:, 0] = 0.8
    logits = (cosines.clamp(-1, 1) / TAU).requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    eps = torch.tensor(0.35, dtype=torch.float64)

    def plain(x: Tensor) -> Tensor:
        tau = torch.tensor(TAU, dtype=torch.float64)
        empty = x.new_empty((0, 0))
        return reference.logits_rows(x, target, empty, eps, tau, False, 1.0, 0.1, "paper")[0].mean()

    def cross_entropy(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target)

    methods: dict[str, tuple[Loss, Loss]] = {
        "hex_cross_entropy": (
            lambda x: hex_cross_entropy(x, target, eps=eps, temperature=TAU), plain),
        "HEX in plain PyTorch": (plain, plain),
        "hex_cross_entropy, H empty": (
            lambda x: hex_cross_entropy(x, target, eps=math.inf, temperature=TAU), cross_entropy),
        "torch's cross_entropy": (cross_entropy, cross_entropy),
    }  # fmt: skip
    return Group(f"{rows} x {columns} logits", logits, methods)
