# SPDX-License-Identifier: MIT
"""The losses that are compared: ours, the same in plain PyTorch, torch.compile of that, and the
libraries on PyPI; and the check of what they give.

Each computes one of these losses of a batch (batches.py), all with tau = 0.1:

    "HEX"       L_i with the threshold of the batch, beta = 1, tau_plus = 0.1 (hex.hex_loss); of
                labels and logits with EPS, but for "HEX, measured"
    "released"  the same as the authors' code computes it (docs/released.md)
    "InfoNCE"   L_i with H empty
    "one way"   the same with z0 alone as anchors and z1 as candidates: B x B cosines, not 2B x 2B

hex.reference in float64 is the truth that all are compared with before anything is timed.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import batches
import measure
import torch
import torch.nn.functional as F
from batches import Batch, Case
from torch import Tensor, nn

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    ops,
    problem,
    reference,
)

TAU, BETA, TAU_PLUS, QUANTILE = 0.1, 1.0, 0.1, 0.99
# eps is given to labels and logits: a percent or so of the negatives is above it.
EPS = {"labels": 0.2, "logits": 0.35}
HALF = (torch.bfloat16, torch.float16)
DENSE = 4e10  # bytes that the reference may take for a dozen N x M of float64

CAPTURED = ", in a graph"  # behind the name of a method that is timed so

Function = Callable[..., Tensor]  # the leaves and others of a batch to the loss
Result = tuple[Tensor, ...]  # the loss and its gradient in each leaf
Step = Callable[[], Result]  # one forward and backward


class Method(NamedTuple):
    name: str
    loss: str
    """Of those above."""
    build: Callable[[Batch], Function]
    """From a batch, whose gradient is not wanted, the function of its leaves and others."""
    compiled: bool = False
    most: float = math.inf
    """Rows beyond which its memory is too much."""
    ranks: int = 1
    """Of so many, the second's own gradient alone."""

    def own(self, images: int) -> slice:
        """The images whose gradient it computes."""
        count = images // self.ranks
        return slice(count, 2 * count) if self.ranks > 1 else slice(images)

    def step(self, batch: Batch) -> Step:
        if self.ranks > 1:
            return one_rank(batch, self.own(len(batch.leaves[0])))
        function = self.build(batch)

        def run() -> Result:
            loss = function(*batch.leaves, *batch.others)
            return loss.detach(), *torch.autograd.grad(loss, batch.leaves)

        return run


# ---- what is right -------------------------------------------------------------------------------


class Mismatch(Exception):
    """A method gives another loss, or another gradient, than it has to."""


def checked(method: Method, case: Case, device: str = "cpu") -> tuple[Step, dict[str, Any]]:
    """The step of a method that is right, or a Mismatch; and the begin of its record."""
    batch = batches.make(case, device)
    step = method.step(batch)
    got, right = step(), truth(case, device, method.loss)
    errors = check(method, case, batch, got, right) if right else {}
    about = {"method": method.name, **case._asdict(), **errors}
    return step, about | {"peak_mb": measure.peak_mb(step, device)}


@functools.lru_cache(maxsize=4)
def truth(case: Case, device: str, loss: str) -> Result | None:
    """The loss and its gradients by hex.reference in float64.

    Where its matrices are too large they come from our own kernels for float64, which the tests
    compare with it, and on a GPU, whose time is short, there is None.
    """
    too_large = case.rows * case.candidates * 8 * 12 > DENSE
    if too_large and device != "cpu":
        return None
    batch = batches.make(case, device).to(torch.float64)
    if too_large:
        return {"HEX": HEX, "InfoNCE": INFO_NCE}[loss].step(batch)()
    value = reference_loss(batch, loss)
    return value.detach(), *torch.autograd.grad(value, batch.leaves)


def reference_loss(batch: Batch, loss: str) -> Tensor:
    inputs, mode = (*batch.leaves, *batch.others, batch.leaves[0][:0]), batch.mode
    none = torch.empty(0)
    if mode == "logits":
        table = reference.logits_table(*inputs[:2])
    elif mode == "labels":
        x, ids, empty = inputs
        table = reference.problem_table(x, empty, empty, ids, none, none, 0, True, False)
    else:
        code = reference.MODES.index("query" if loss == "one way" else mode)
        table = reference.problem_table(*inputs[:3], none, none, none, code, False, False)
    tau, eps = torch.tensor([TAU, math.inf], dtype=torch.float64, device=table.values.device)
    score = table.values * (TAU if mode == "logits" else 1)
    if loss in ("HEX", "released") and mode in EPS:
        eps = torch.full_like(tau, EPS[mode])
    elif loss in ("HEX", "HEX, measured", "released"):
        over = "all" if loss == "released" else "negatives"
        eps = reference.quantile_of(table._replace(values=score), QUANTILE, over)
    options = {"variant": "released" if loss == "released" else "paper", "logits": mode == "logits"}
    return reference.decided_loss(table, score, eps, tau, BETA, TAU_PLUS, **options)[0].mean()


def check(method: Method, case: Case, batch: Batch, got: Result, right: Result) -> dict[str, float]:
    """The relative errors of the loss and, by norm, of the gradient; a Mismatch if they are large.

    Float32 puts a cosine within rounding of the threshold on either side of it, so that a few rows
    may have another H: the gradient is compared as a whole, to a per cent. Another formula is off
    by far more (tests/test_benchmark.py). Where the batch has collapsed, terms of the size of
    1 / (tau |z|) a row cancel in the gradient to nothing but rounding: a share of them counts. A
    GPU rounds cosines of half precision as PyTorch does, and more so under autocast.
    """
    most = {"loss_error": 1e-4, "gradient_error": 1e-2}
    if case.dtype == "float64":
        most = {"loss_error": 1e-9, "gradient_error": 1e-9}
    elif method is AUTOCAST:  # bfloat16 logits
        most = {"loss_error": 1e-2, "gradient_error": 2e-1}
    elif batch.leaves[0].dtype in HALF and got[0].is_cuda:
        most = {"loss_error": 2e-3, "gradient_error": 4e-2}
    right = right[0], *(g[method.own(len(g))] for g in right[1:])
    ours, true = (torch.cat([g.double().flatten() for g in result[1:]]) for result in (got, right))
    norms = torch.cat([z.detach().double().norm(dim=-1) for z in batch.leaves])
    size = max(true.norm().item(), 1e-2 * (1 / (TAU * norms)).norm().item() / case.rows)
    errors = {
        "loss_error": ((got[0].double() - right[0]).abs() / right[0].abs()).item(),
        "gradient_error": (ours - true).norm().item() / size,
    }
    for name, error in errors.items():
        if not error <= most[name]:
            raise Mismatch(
                f"{method.name}: got a {name} of {error:.2g}, wanted at most {most[name]:.2g}, of "
                f"{case}: loss {got[0].item()} for {right[0].item()}"
            )
    return errors


# ---- plain PyTorch, written the ordinary way -----------------------------------------------------


def plain_cosines(
    z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cosines (N, M), the column of each row's positive (N,), and of the row itself if there.

    Half precision is widened first: cosines that are rounded to it give losses wrong by per cents.
    """
    views = [z0, z1] if negatives is None else [z0, z1, negatives]
    z0, z1, *rest = (F.normalize(z.float() if z.dtype in HALF else z) for z in views)
    row = torch.arange(len(z0), device=z0.device)
    if mode == "query":
        return z0 @ z1.T, row, None
    if mode == "cross":
        c = z0 @ z1.T
        return torch.cat([c, c.T]), row.repeat(2), None
    if mode == "unpaired":
        positive = (z0 * z1).sum(1, keepdim=True)
        return torch.cat([positive, z0 @ rest[0].T], 1), torch.zeros_like(row), None
    z = torch.cat([z0, z1])
    row = torch.arange(len(z), device=z.device)
    return z @ z.T, row.roll(len(z0)), row


def plain_negatives(c: Tensor, target: Tensor, self_column: Tensor | None = None) -> Tensor:
    """Which cosines are of negatives, (N, M) bool."""
    columns = torch.arange(c.shape[1], device=c.device)
    negative = columns != target[:, None]
    return negative if self_column is None else negative & (columns != self_column[:, None])


def plain_sum(
    logits: Tensor, e: Tensor, negative: Tensor, eps: Tensor | float, positive: Tensor
) -> Tensor:
    """Q + sum_G e of each row, (N,). e = exp(logits); positive: that of the positive(s), a mean."""
    above = logits.detach() > eps / TAU
    hard, rest = negative & above, negative & ~above
    count = hard.sum(1).to(e.dtype)
    weight = torch.exp(BETA * logits) * hard
    reweighted = count * (weight * e).sum(1) / weight.sum(1).clamp(min=1e-12)
    local = (reweighted - TAU_PLUS * count * positive) / (1 - TAU_PLUS)
    return torch.maximum(local, count * math.exp(-1 / TAU)) + (e * rest).sum(1)


def plain_hex(z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str) -> Tensor:
    """HEX as its formulas read, with the quantile from topk."""
    c, target, self_column = plain_cosines(z0, z1, negatives, mode)
    negative = plain_negatives(c, target, self_column)
    n = c.shape[1] - (1 if self_column is None else 2)
    among = c.detach().masked_fill(~negative, -math.inf)
    eps = among.topk(n - round(QUANTILE * (n - 1)), dim=1).values[:, -1].mean()
    logits = c / TAU
    del c, among  # or they would be held to the end
    e = torch.exp(logits)
    positive = e.gather(1, target[:, None]).squeeze(1)
    return torch.log1p(plain_sum(logits, e, negative, eps, positive) / positive).mean()


def plain_hex_labels(x: Tensor, ids: Tensor) -> Tensor:
    """HEX of several positives, the mean over them outside the logarithm."""
    z = F.normalize(x)
    logits, alike = z @ z.T / TAU, ids[:, None] == ids
    e = torch.exp(logits)
    positive = alike & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    count, positives = positive.sum(1), (e * positive).sum(1)
    whole = positives + plain_sum(logits, e, ~alike, EPS["labels"], positives / count)
    return (torch.log(whole) - (logits * positive).sum(1) / count).mean()


def plain_hex_logits(logits: Tensor, target: Tensor) -> Tensor:
    """HEX in place of F.cross_entropy."""
    e = torch.exp(logits)
    positive = e.gather(1, target[:, None]).squeeze(1)
    negative = plain_negatives(logits, target)
    return torch.log1p(plain_sum(logits, e, negative, EPS["logits"], positive) / positive).mean()


def plain_released(z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str) -> Tensor:
    """The released form as eager code has it: N x N logits, a sort for the quantile, masks."""
    c, target, self_column = plain_cosines(z0, z1, negatives, mode)
    with torch.no_grad():
        eps = c.sort(1).values[:, round(QUANTILE * (c.shape[1] - 1))].mean()
        rest = plain_negatives(c, target, self_column) & (c <= eps)
    logits = c / TAU
    logits = logits - logits.max(1, keepdim=True).values.detach()
    positive = logits.gather(1, target[:, None]).squeeze(1)
    constant = (c.shape[1] - (1 if self_column is None else 2)) * math.exp(-1 / TAU)
    return (torch.log((torch.exp(logits) * rest).sum(1)) - positive + constant).mean()


def plain_info_nce(z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str) -> Tensor:
    """InfoNCE as cross-entropy of the logits, the row itself masked."""
    c, target, self_column = plain_cosines(z0, z1, negatives, mode)
    logits = c / TAU
    if self_column is not None:
        logits = logits.masked_fill(torch.eye(len(c), dtype=torch.bool, device=c.device), -math.inf)
    return F.cross_entropy(logits, target)


def autocast_info_nce(*inputs: Tensor, mode: str) -> Tensor:
    """The same as a training loop under autocast has it: bfloat16 logits."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        return plain_info_nce(*inputs, mode=mode)


def plain_sup_con(x: Tensor, ids: Tensor) -> Tensor:
    """As SupContrast has it."""
    z = F.normalize(x)
    other = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = z @ z.T / TAU
    log_p = logits - logits.masked_fill(~other, -math.inf).logsumexp(1, keepdim=True)
    positive = (ids[:, None] == ids) & other
    return -((log_p * positive).sum(1) / positive.sum(1)).mean()


# ---- one rank of several -------------------------------------------------------------------------


def one_rank(batch: Batch, own: slice) -> Step:
    """HEXLoss of all images on the rank that has `own`: its operators, without communication.

    What other ranks would send, the numbers of their rows, was computed before; what this rank
    would send is written among them in each step.
    """
    p = problem.of_views(*(z.detach() for z in batch.leaves), None, batch.mode, TAU)
    one, paper, none = ops.POSITIVES["one"], ops.VARIANTS["paper"], ops.REDUCTIONS["none"]
    rule = p.mode, none, one, BETA, paper, TAU_PLUS, False
    tracker = ThresholdTracker.adaptive(QUANTILE)
    grad = torch.full((p.anchors,), 1 / p.anchors, dtype=torch.float64)
    mine = own.start, own.stop - own.start

    def quantiles(block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return ops.block_quantiles(
            p.measured(), QUANTILE, "negatives", ops.bytes_to_keep(None), block
        )

    def forward(q: Tensor, kept: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
        eps, _ = ops.settle(q, tracker.state, tracker.kernel_rule()[2:])
        return ops.block_forward(p.inputs, eps, p.tau, kept, rule, 0, block)[:2]

    everything = 0, p.anchors // 2
    q, kept = quantiles(everything)
    loss, stats = forward(q, kept, everything)
    my_q, my_loss, my_stats = (x.unflatten(-1, (2, -1))[..., own] for x in (q, loss, stats))

    def run() -> Result:
        low, kept = quantiles(mine)
        my_q.copy_(low.view_as(my_q))
        rows, of_rows = forward(q, kept, mine)
        my_loss.copy_(rows.view_as(my_loss))
        my_stats.copy_(of_rows.view_as(my_stats))
        value = ops.total(loss[None])[0] / p.anchors
        gradients = ops.block_backward(grad, p.inputs, p.tau, stats, kept, rule, 0b11, mine)
        return value, *gradients[:2]

    return run


# ---- all of them ---------------------------------------------------------------------------------


def ours(loss: Callable[..., nn.Module]) -> Callable[[Batch], Function]:
    """A module of ours, with its tracker's state on the batch's device."""
    return lambda batch: loss(TAU, mode=_mode(batch)).to(batch.leaves[0].device)


def hex_function(batch: Batch) -> Function:
    inputs, mode = (*batch.leaves, *batch.others), _mode(batch)
    eps = batch_threshold(*inputs, mode=mode, quantile=QUANTILE, over="negatives")
    return functools.partial(hex_loss, eps=eps, temperature=TAU, mode=mode)


def _mode(batch: Batch) -> str:
    """As ours want it: negatives are a mode by themselves."""
    return "ntxent" if batch.mode == "unpaired" else batch.mode


def of_ids(function: Function, eps: float | None = None) -> Callable[[Batch], Function]:
    """Ours for labels or logits, at the eps of theirs or at the one given."""
    return lambda b: functools.partial(function, eps=eps or EPS[b.mode], temperature=TAU)


def eager(function: Function) -> Callable[[Batch], Function]:
    return lambda batch: functools.partial(function, mode=batch.mode)


def compiled(function: Function) -> Callable[[Batch], Function]:
    """By torch.compile, anew for each shape: no time is lost to sizes kept open."""

    def build(batch: Batch) -> Function:
        torch._dynamo.config.recompile_limit = 1000  # every size is a program of its own
        program = torch.compile(function, dynamic=False, fullgraph=True)
        return functools.partial(program, mode=batch.mode)

    return build


def library(module: str, make: Callable[[Any], nn.Module]) -> Callable[[Batch], Function]:
    """A loss of a library on PyPI."""
    return lambda _: make(imported(module))


def imported(module: str) -> Any:
    """Of a library; an ImportError means that it is not installed."""
    if module.startswith(("lightly", "open_clip")):  # torchvision, whose import is repaired there
        sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
        importlib.import_module("common.vision")
    return importlib.import_module(module)


def inf_cl(batch: Batch) -> Function:
    """Inf-CL's Triton kernels: rows of z0 against rows of z1, never B x B in memory."""
    from inf_cl import cal_flash_loss

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        u0, u1 = F.normalize(z0.float()), F.normalize(z1.float())
        return cal_flash_loss(u0, u1, scale=1 / TAU, head_dim=min(256, u0.shape[1])).mean()

    return loss


HEX = Method("hex HEXLoss", "HEX", ours(HEXLoss))
GIVEN = Method("hex hex_loss, eps given", "HEX", hex_function)
INFO_NCE = Method("hex InfoNCELoss", "InfoNCE", ours(InfoNCELoss))
PLAIN_HEX = Method("plain HEX", "HEX", eager(plain_hex))
PLAIN_INFO_NCE = Method("plain InfoNCE", "InfoNCE", eager(plain_info_nce))
COMPILED_HEX, COMPILED_INFO_NCE = COMPILED = (
    Method("plain HEX, compiled", "HEX", compiled(plain_hex), compiled=True),
    Method("plain InfoNCE, compiled", "InfoNCE", compiled(plain_info_nce), compiled=True),
)
NT_XENT = library("lightly.loss", lambda m: m.NTXentLoss(TAU))
LIGHTLY = Method("lightly NTXentLoss", "InfoNCE", NT_XENT)
PAIRS = library("pytorch_metric_learning.losses", lambda m: m.SelfSupervisedLoss(m.NTXentLoss(TAU)))
ONE_WAY = library("info_nce", lambda m: m.InfoNCE(TAU))
LIBRARIES = (
    LIGHTLY,
    # Every pair of a positive and a negative pair is in memory, O(N^3).
    Method("pytorch-metric-learning NTXentLoss", "InfoNCE", PAIRS, most=512),
    Method("info-nce-pytorch InfoNCE", "one way", ONE_WAY, most=4096),
)
RANKS = tuple(HEX._replace(name=f"one rank of {ranks}", ranks=ranks) for ranks in (4, 8))
OURS = (HEX, GIVEN, INFO_NCE)
FOUR = (HEX, PLAIN_HEX, INFO_NCE, PLAIN_INFO_NCE)
METHODS = (
    HEX, GIVEN, PLAIN_HEX, COMPILED_HEX, INFO_NCE, PLAIN_INFO_NCE, COMPILED_INFO_NCE, *LIBRARIES
)  # fmt: skip

SUP_CON = library("pytorch_metric_learning.losses", lambda m: m.SupConLoss(TAU))
LABELS = (
    Method("hex_sup_con", "HEX", of_ids(hex_sup_con)),
    Method("plain HEX", "HEX", lambda _: plain_hex_labels),
    Method("hex_sup_con, H empty", "InfoNCE", of_ids(hex_sup_con, math.inf)),
    Method("plain SupCon", "InfoNCE", lambda _: plain_sup_con),
    Method("pytorch-metric-learning SupConLoss", "InfoNCE", SUP_CON),
    Method("HEXSupConLoss", "HEX, measured", lambda _: HEXSupConLoss(TAU)),
)
LOGITS = (
    Method("hex_cross_entropy", "HEX", of_ids(hex_cross_entropy)),
    Method("plain HEX", "HEX", lambda _: plain_hex_logits),
    Method("hex_cross_entropy, H empty", "InfoNCE", of_ids(hex_cross_entropy, math.inf)),
    Method("torch's cross_entropy", "InfoNCE", lambda _: F.cross_entropy),
    Method("HEXCrossEntropyLoss", "HEX, measured", lambda _: HEXCrossEntropyLoss(TAU)),
)

# On a GPU N x N is worth while up to so many rows only.
GPU_PLAIN = PLAIN_HEX._replace(most=16384), PLAIN_INFO_NCE._replace(most=16384)
AUTHORS = Method("authors' form, eager", "released", eager(plain_released), most=16384)
AUTOCAST = Method("InfoNCE under autocast", "InfoNCE", eager(autocast_info_nce), most=16384)
INF_CL = Method("Inf-CL (Triton), B x B", "one way", inf_cl)
