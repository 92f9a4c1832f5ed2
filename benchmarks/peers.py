# SPDX-License-Identifier: MIT
"""The losses that are compared: ours, the same in plain PyTorch, torch.compile of that, and the
libraries on PyPI.

Each computes one of four losses of a batch (batches.py), all with tau = 0.1:

    "HEX"       L_i with the threshold of the batch, beta = 1, tau_plus = 0.1 (hex.hex_loss)
    "released"  the same as the authors' code computes it (docs/released.md)
    "InfoNCE"   L_i with H empty
    "one way"   the same with z0 alone as anchors and z1 as candidates: B x B cosines, not 2B x 2B

What they give is compared with hex.reference in float64 before anything is timed: `check`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import libraries
import torch
import torch.nn.functional as F
from batches import Batch
from torch import Tensor, nn

from hex import (
    HEXLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    hex_loss,
    reference,
)

TAU, BETA, TAU_PLUS, QUANTILE = 0.1, 1.0, 0.1, 0.99
OVER = "all"  # the authors' rule, which all the rows on record have
HALF = (torch.bfloat16, torch.float16)

Function = Callable[..., Tensor]  # z0, z1 and, where the batch has them, negatives to the loss
Result = tuple[Tensor, Tensor, Tensor]  # the loss and its gradient in z0 and z1
Step = Callable[[], Result]  # one forward and backward


class Method(NamedTuple):
    name: str
    loss: str
    build: Callable[[Batch], Function]
    """From a batch, whose gradient is not wanted, the function of z0, z1 and its negatives."""
    any_batch: bool = False
    """For every mode and dtype; the others are symmetric, and compute in the dtype of the batch."""
    compiled: bool = False
    most: float = math.inf
    """Rows, 2B, beyond which its memory is too much."""
    note: str = ""

    def takes(self, batch: Batch) -> bool:
        usual = batch.mode == "ntxent" and batch.z0.dtype not in HALF
        return batch.rows <= self.most and (usual or self.any_batch)

    def step(self, batch: Batch) -> Step:
        function = self.build(batch)
        inputs = (batch.z0, batch.z1, batch.negatives)[: 2 if batch.negatives is None else 3]

        def run() -> Result:
            loss = function(*inputs)
            return loss.detach(), *torch.autograd.grad(loss, inputs[:2])

        return run


# ---- plain PyTorch, written the ordinary way -----------------------------------------------------


def plain_cosines(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cosines (N, M), the column of each row's positive (N,), and of the row itself if there.

    Half precision is widened first: cosines that are rounded to it give losses wrong by per cents.
    """
    if z0.dtype in HALF:
        z0, z1 = z0.float(), z1.float()
        negatives = None if negatives is None else negatives.float()
    z0, z1 = F.normalize(z0), F.normalize(z1)
    row = torch.arange(len(z0), device=z0.device)
    if mode == "query":
        return z0 @ z1.T, row, None
    if mode == "cross":
        c = z0 @ z1.T
        return torch.cat([c, c.T]), row.repeat(2), None
    if mode == "shared":
        positive = (z0 * z1).sum(1, keepdim=True)
        return torch.cat([positive, z0 @ F.normalize(negatives).T], 1), torch.zeros_like(row), None
    z = torch.cat([z0, z1])
    row = torch.arange(len(z), device=z.device)
    return z @ z.T, row.roll(len(z0)), row


def plain_hex(z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str) -> Tensor:
    """HEX as its formulas read, with the quantile from topk."""
    c, target, self_column = plain_cosines(z0, z1, negatives, mode)
    columns = torch.arange(c.shape[1], device=c.device)
    with torch.no_grad():
        rank = round(QUANTILE * (c.shape[1] - 1))
        eps = c.topk(c.shape[1] - rank, dim=1).values[:, -1].mean()
        negative = columns != target[:, None]
        if self_column is not None:
            negative &= columns != self_column[:, None]
        hard = negative & (c > eps)
        rest = negative & (c <= eps)
        count = hard.sum(1).to(c.dtype)
    e = torch.exp(c / TAU)
    positive = e.gather(1, target[:, None]).squeeze(1)
    weight = torch.exp(BETA * c / TAU) * hard
    reweighted = count * (weight * e).sum(1) / weight.sum(1).clamp(min=1e-12)
    local = (reweighted - TAU_PLUS * count * positive) / (1 - TAU_PLUS)
    local = torch.maximum(local, count * math.exp(-1 / TAU))
    loss = torch.log(positive + local + (e * rest).sum(1)) - torch.log(positive)
    return loss.mean()


def plain_info_nce(z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str) -> Tensor:
    """InfoNCE as cross-entropy of the logits, the row itself masked."""
    c, target, self_column = plain_cosines(z0, z1, negatives, mode)
    logits = c / TAU
    if self_column is not None:
        logits = logits.masked_fill(torch.eye(len(c), dtype=torch.bool, device=c.device), -math.inf)
    return F.cross_entropy(logits, target)


# ---- the reference -------------------------------------------------------------------------------


def reference_loss(
    z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str, loss: str = "HEX"
) -> Tensor:
    """hex.reference, reduced; dense, in the dtype of the inputs or float32."""
    eps = z0.new_full((), math.inf, dtype=torch.float64)
    if loss in ("HEX", "released"):
        eps = reference.threshold(z0, z1, negatives, mode, QUANTILE)
    elif loss == "one way":
        mode = "query"
    tau = torch.full((), TAU, dtype=torch.float64)
    variant = "released" if loss == "released" else "paper"
    return reference.loss_rows(z0, z1, negatives, eps, tau, mode, BETA, TAU_PLUS, variant)[0].mean()


def truth(batch: Batch, loss: str) -> Result:
    """By the reference in float64."""
    wide = Batch(
        batch.z0.detach().double().requires_grad_(),
        batch.z1.detach().double().requires_grad_(),
        None if batch.negatives is None else batch.negatives.double(),
        batch.mode,
    )
    function = functools.partial(reference_loss, mode=batch.mode, loss=loss)
    return Method("truth", loss, lambda _: function).step(wide)()


class Mismatch(Exception):
    """A method gives another loss, or another gradient, than the reference."""


def check(method: Method, batch: Batch, got: Result, right: Result) -> None:
    """Raises Mismatch unless the method got this loss and this gradient.

    Float32 puts a cosine within rounding of the threshold on either side of it, so that a few rows
    may have another H: the gradient is compared as a whole, by norm, to a per cent. Another formula
    is off by far more (tests/test_benchmark.py). Where the batch has collapsed, terms of the size
    of 1 / (tau |z|) a row cancel in the gradient to nothing but rounding: a share of them counts.
    """
    exact = got[0].dtype == torch.float64
    where = f"{batch.rows} rows, mode {batch.mode}, {batch.z0.dtype}"
    off = (got[0] - right[0]).abs().item()
    if not off <= (1e-9 if exact else 1e-4) * right[0].item():
        raise Mismatch(
            f"{method.name}: got loss {got[0].item()}, wanted {right[0].item()}, at {where}"
        )
    for name, z, ours, truth in zip(("z0", "z1"), batch[:2], got[1:], right[1:], strict=True):
        error, size = (ours - truth).norm().item(), truth.norm().item()
        terms = (1 / (TAU * z.detach().double().norm(dim=1))).norm().item() / batch.rows
        if not error <= (1e-9 if exact else 1e-2) * size + (1e-12 if exact else 1e-4) * terms:
            raise Mismatch(
                f"{method.name}: got a gradient in {name} that is off by {error}, its norm being "
                f"{size}, at {where}"
            )


# ---- all of them ---------------------------------------------------------------------------------


def _mode(batch: Batch) -> str:
    """As ours want it: negatives are a mode by themselves."""
    return batch.mode if batch.negatives is None else "ntxent"


def hex_adaptive(batch: Batch) -> Function:
    rule = ThresholdTracker.adaptive(over=OVER)
    loss = HEXLoss(TAU, threshold=rule, beta=BETA, tau_plus=TAU_PLUS, mode=_mode(batch))
    return loss.to(batch.z0.device)  # with the tracker's state


def hex_eps_given(batch: Batch) -> Function:
    eps = batch_threshold(*batch[:3], mode=_mode(batch), quantile=QUANTILE, over=OVER)
    options = {"temperature": TAU, "beta": BETA, "tau_plus": TAU_PLUS, "mode": _mode(batch)}
    return functools.partial(hex_loss, eps=eps, **options)


def hex_info_nce(batch: Batch) -> Function:
    return InfoNCELoss(TAU, mode=_mode(batch))


def eager(function: Function) -> Callable[[Batch], Function]:
    """For a function that takes a mode."""
    return lambda batch: functools.partial(function, mode=batch.mode)


def compiled(function: Function) -> Callable[[Batch], Function]:
    """The same by torch.compile, anew for each shape: no time is lost to sizes kept open."""

    def build(batch: Batch) -> Function:
        program = torch.compile(function, dynamic=False, fullgraph=True)
        return functools.partial(program, mode=batch.mode)

    return build


def library(loss: Callable[[float], nn.Module]) -> Callable[[Batch], Function]:
    return lambda batch: loss(TAU)


HEX, GIVEN, PLAIN_HEX, COMPILED_HEX = (
    Method("hex HEXLoss", "HEX", hex_adaptive, any_batch=True),
    Method("hex hex_loss, eps given", "HEX", hex_eps_given, any_batch=True),
    Method("plain HEX", "HEX", eager(plain_hex), any_batch=True),
    Method("plain HEX, compiled", "HEX", compiled(plain_hex), any_batch=True, compiled=True),
)
INFO_NCE, PLAIN_INFO_NCE = (
    Method("hex InfoNCELoss", "InfoNCE", hex_info_nce, any_batch=True),
    Method("plain InfoNCE", "InfoNCE", eager(plain_info_nce), any_batch=True),
)
METHODS = (
    HEX,
    GIVEN,
    PLAIN_HEX,
    COMPILED_HEX,
    INFO_NCE,
    PLAIN_INFO_NCE,
    Method(
        "plain InfoNCE, compiled",
        "InfoNCE",
        compiled(plain_info_nce),
        any_batch=True,
        compiled=True,
    ),
    Method("lightly NTXentLoss", "InfoNCE", library(libraries.lightly)),
    Method(
        "pytorch-metric-learning NTXentLoss",
        "InfoNCE",
        library(libraries.pytorch_metric_learning),
        most=512,
        note="pytorch-metric-learning: O(N^3) memory, so at 512 rows only.",
    ),
    Method(
        "info-nce-pytorch InfoNCE",
        "one way",
        library(libraries.info_nce_pytorch),
        most=4096,
        note="info-nce-pytorch: one direction, B x B cosines: a quarter of the others' work.",
    ),
)
