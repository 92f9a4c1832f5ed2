# SPDX-License-Identifier: MIT
"""What is compared on a GPU, on which batches, and how it is timed there; gpu.py is the command.

Time: CUDA events around as many calls as fill a sample, the median of the samples; a graph, where
one is wanted, is captured of a few calls. The batch is the same in each, so that a small one comes
from the cache, as it does from the network before. Beside it the time until the host has handed a
call over. Memory: the most that torch's allocator gives out in a call above what it had given out
before. On the CPU, for tests, the clock and the process's memory stand in.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import measure
import peers
import torch
import torch.nn.functional as F
from batches import Batch, make
from peers import QUANTILE, TAU, Method
from torch import Tensor, nn

from hex import HEXLoss, InfoNCELoss, ThresholdTracker, hex_loss, ops

SAMPLES, SAMPLE_MS, WARM_UP = 7, 10, 3
IN_A_GRAPH, GRAPH_CALLS = 8192, 4  # rows up to which a graph is worth while; calls in it
EAGER = 16384  # rows up to which N x N is worth while
CHECKED = 40e9  # bytes that the reference may take, N x N in float64

# ---- methods ------------------------------------------------------------------------------------


def authors_hex(z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str) -> Tensor:
    """The released form as eager code has it: N x N logits, a sort for the quantile, masks."""
    c, target, self_column = peers.plain_cosines(z0, z1, negatives, mode)
    columns = torch.arange(c.shape[1], device=c.device)
    negative = columns != target[:, None]
    if self_column is not None:
        negative &= columns != self_column[:, None]
    with torch.no_grad():
        eps = c.sort(1).values[:, round(QUANTILE * (c.shape[1] - 1))].mean()
        rest = negative & (c <= eps)
    logits = c / TAU
    logits = logits - logits.max(1, keepdim=True).values.detach()
    positive = logits.gather(1, target[:, None]).squeeze(1)
    constant = (c.shape[1] - (1 if self_column is None else 2)) * math.exp(-1 / TAU)
    return (torch.log((torch.exp(logits) * rest).sum(1)) - positive + constant).mean()


def inf_cl(batch: Batch) -> peers.Function:
    """Inf-CL's Triton kernels: rows of z0 against rows of z1, never B x B in memory."""
    from inf_cl import cal_flash_loss

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        u0, u1 = F.normalize(z0.float()), F.normalize(z1.float())
        return cal_flash_loss(u0, u1, scale=1 / TAU, head_dim=min(256, u0.shape[1])).mean()

    return loss


def autocast_info_nce(
    z0: Tensor, z1: Tensor, negatives: Tensor | None = None, *, mode: str
) -> Tensor:
    """InfoNCE by F.cross_entropy as a training loop under autocast has it: bfloat16 logits."""
    with torch.autocast(z0.device.type, torch.bfloat16):
        return peers.plain_info_nce(z0, z1, negatives, mode=mode)


HEX, EPS_GIVEN, INFO_NCE = peers.HEX, peers.GIVEN, peers.INFO_NCE
PLAIN_HEX, PLAIN_INFO_NCE = (
    m._replace(most=EAGER) for m in (peers.PLAIN_HEX, peers.PLAIN_INFO_NCE)
)
AUTHORS = Method(
    "authors' form, eager", "released", peers.eager(authors_hex), any_batch=True, most=EAGER
)
AUTOCAST = Method(
    "InfoNCE under autocast", "InfoNCE", peers.eager(autocast_info_nce), any_batch=True, most=EAGER
)
INF_CL = Method("Inf-CL (Triton), B x B", "one way", inf_cl)  # a quarter of the others' cosines
OURS = (HEX, EPS_GIVEN, INFO_NCE)
METHODS = (*OURS, PLAIN_HEX, AUTHORS, PLAIN_INFO_NCE, AUTOCAST, INF_CL)
COMPILED = tuple(m for m in peers.METHODS if m.compiled)
FEW = (*OURS, PLAIN_HEX, PLAIN_INFO_NCE)  # where not all are measured


# Products of N x M x D that a method of ours needs, times 2 operations: the threshold two, the
# forward one, the backward two; float32 three times as many (docs/cuda.md).
def products(method: Method, batch: Batch) -> int:
    return (5 if method is HEX else 3) * (3 if batch.z0.dtype == torch.float32 else 1)


# ---- batches ------------------------------------------------------------------------------------


class Shape(NamedTuple):
    rows: int
    queue: int
    features: int
    dtype: str


@functools.lru_cache(maxsize=1)
def batch_of(shape: Shape, device: str) -> Batch:
    """A batch of so many anchors."""
    rows, queue, features, dtype = shape
    mode = "shared" if queue else "ntxent"
    batch = make(
        rows if queue else rows // 2, features, dtype=getattr(torch, dtype), mode=mode, queue=queue
    )
    z0, z1 = (z.detach().to(device).requires_grad_() for z in batch[:2])
    return Batch(z0, z1, None if batch.negatives is None else batch.negatives.to(device), mode)


@functools.lru_cache(maxsize=4)
def truth(shape: Shape, device: str, loss: str) -> peers.Result | None:
    """By the reference, or None where that takes too much memory."""
    batch = batch_of(shape, device)
    if batch.rows * batch.candidates * 8 * 12 > CHECKED:
        return None
    try:
        return peers.truth(batch, loss)
    except torch.OutOfMemoryError:
        return None


# ---- right --------------------------------------------------------------------------------------


def errors(batch: Batch, got: peers.Result, right: peers.Result) -> dict[str, float]:
    """Of the loss and of both gradients by their norm, relative."""
    ours, truth = (torch.cat([r[1].double(), r[2].double()]) for r in (got, right))
    return {
        "loss_error": ((got[0].double() - right[0]).abs() / right[0].abs()).item(),
        "gradient_error": ((ours - truth).norm() / truth.norm()).item(),
    }


# A member of H that rounding puts on the other side of the threshold moves its row's loss by a per
# cent (docs/cuda.md); another formula is off by far more.
ALLOWED = {
    torch.float32: {"loss_error": 1e-4, "gradient_error": 1e-2},
    torch.float16: {"loss_error": 2e-3, "gradient_error": 4e-2},
    torch.bfloat16: {"loss_error": 2e-3, "gradient_error": 4e-2},
}


def check(method: Method, batch: Batch, got: peers.Result, right: peers.Result) -> dict[str, float]:
    """The errors; Mismatch where they are those of another loss."""
    found = errors(batch, got, right)
    for name, allowed in ALLOWED[batch.z0.dtype].items():
        allowed *= 5 if method is AUTOCAST else 1  # bfloat16 logits
        if not found[name] <= allowed:
            raise peers.Mismatch(f"{method.name}: {name} {found[name]:.2g}, allowed {allowed:.2g}")
    return found


# ---- time and memory ----------------------------------------------------------------------------


def timed(run: Callable[[], object], calls: int, cuda: bool) -> tuple[float, float]:
    """Milliseconds of `run`, which makes so many calls, for one of them; and the host's alone."""
    if cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
    start = time.perf_counter()
    run()
    host = (time.perf_counter() - start) * 1e3 / calls
    if not cuda:
        return host, host
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls, host


def times(step: Callable[[], object], cuda: bool, graph: bool = False) -> dict[str, Any]:
    """The median and the samples of the time of a call, and the median of the host's."""
    for _ in range(WARM_UP):
        step()
    run, calls = step, 1
    if graph:
        run, calls = captured(step).replay, GRAPH_CALLS
        run()
    once = timed(run, 1, cuda)[0]
    rounds = max(1, math.ceil(SAMPLE_MS / max(once, 1e-3)))

    def sample() -> None:
        for _ in range(rounds):
            run()

    whole, host = zip(*(timed(sample, rounds * calls, cuda) for _ in range(SAMPLES)), strict=True)
    middle = statistics.median
    return {"ms": middle(whole), "host_ms": middle(host), "samples_ms": list(whole)}


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            step()
    return graph


def extra_mb(step: Callable[[], object], cuda: bool) -> float:
    """The most memory a call takes beside its inputs, in MB of 10^6 bytes; its results count."""
    if not cuda:
        return measure.peak_mb(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def roofline(device: str, size: int) -> dict[str, float]:
    """What this device reaches: products of size^3 in half precision, copies of 1 GiB or less."""
    cuda = device != "cpu"
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    x = torch.randn(min(1 << 28, 16 * size * size), device=device)
    y = torch.empty_like(x)
    product = times(functools.partial(torch.mm, a, b), cuda)["ms"]
    copy = times(lambda: y.copy_(x), cuda)["ms"]
    return {
        "tflops": 2 * size**3 / product / 1e9,
        "copy_gb_s": 2 * x.numel() * 4 / copy / 1e6,
    }


def case(method: Method, shape: Shape, device: str, graph: bool) -> dict[str, Any]:
    """Checks the method where the truth is known, then measures it; or why not, of another's."""
    about: dict[str, Any] = {"method": method.name, "graph": graph, **shape._asdict()}
    cuda = device != "cpu"
    if method.compiled:
        torch._dynamo.config.recompile_limit = 1000  # every size is a program of its own
    try:
        batch = batch_of(shape, device)
        step, right = method.step(batch), truth(shape, device, method.loss)
        got = step()
        if right is not None:
            about |= check(method, batch, got, right)
        about["extra_mb"] = extra_mb(step, cuda)
        about |= times(step, cuda, graph)
    except ImportError as error:
        return about | {"skipped": f"not installed: {error}"}
    except torch.OutOfMemoryError:
        return about | {"skipped": "out of memory"}
    except Exception as error:
        if (method is not INF_CL and not method.compiled) or "CUDA error" in str(error):
            raise
        return about | {"skipped": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if cuda:
            torch.cuda.empty_cache()
    if method in OURS:
        negatives = batch.rows if batch.negatives is None else len(batch.negatives)
        about["flop"] = 2 * batch.rows * negatives * shape.features * products(method, batch)
    return about


def repeats(shape: Shape, device: str, count: int) -> dict[str, Any]:
    """How many of so many calls give other bits than the first."""
    # eps given: the tracker's state would move from call to call
    step = EPS_GIVEN.step(batch_of(shape, device))
    first = step()
    differ = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(count):
        differ += torch.stack([(a != b).any() for a, b in zip(first, step(), strict=True)]).any()
    return {"ok": not differ, "repeats": count, "note": f"{int(differ)} differ of {count}"}


# ---- for compute-sanitizer ----------------------------------------------------------------------


def calls(device: str) -> None:
    """Each kernel a few times, on small batches with tails: the sanitizer is slow."""
    for dtype in ("float32", "bfloat16", "float64"):
        for rows, features, queue in ((160, 72, 0), (192, 130, 0), (70, 40, 200)):
            batch = batch_of(Shape(rows, queue, features, dtype), device)
            HEX.step(batch)()
            for loss in (
                HEXLoss(TAU, threshold=ThresholdTracker.fixed(0.5, normalize_rows=True)),
                HEXLoss(0.01, variant="released", reduction="none"),
            ):
                loss.to(device)(*batch[: 3 if queue else 2]).sum().backward()
        own = torch.randn(6, 40, 72, dtype=getattr(torch, dtype)).to(device).requires_grad_()
        z0, z1 = (own.detach()[:, k].clone().requires_grad_() for k in range(2))
        hex_loss(z0, z1, own, eps=0.1, temperature=TAU).backward()
        none = z0.new_empty((0, 72))
        ops.threshold(z0, z1, none, ops.MODES["cross"], 0.9, "negatives")
    if device != "cpu":
        torch.cuda.synchronize()


# ---- within a training step ---------------------------------------------------------------------


class _Plain(nn.Module):
    def __init__(self, function: peers.Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return self.function(z0, z1, mode="ntxent")


CRITERIA: dict[str, Callable[[], nn.Module]] = {
    HEX.name: lambda: HEXLoss(TAU, threshold=ThresholdTracker.adaptive(over="negatives")),
    INFO_NCE.name: lambda: InfoNCELoss(TAU),
    PLAIN_INFO_NCE.name: lambda: _Plain(peers.plain_info_nce),
    PLAIN_HEX.name: lambda: _Plain(peers.plain_hex),
}


def training_step(name: str, backbone: str, images: int, device: str) -> dict[str, Any]:
    """Milliseconds and memory of SimCLR's step with a loss, and of the loss in it.

    The images are noise: what a step costs does not depend on them. Mixed precision in bfloat16.
    """
    examples = str(Path(__file__).resolve().parents[1] / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    from common import encoder

    cuda = device != "cpu"
    network, width = encoder.backbone(backbone, 32)
    model = nn.Sequential(network, encoder.projector(width, 128)).to(device)
    criterion = CRITERIA[name]().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    views = torch.randn(2 * images, 3, 32, 32, device=device)
    views = views.to(memory_format=torch.channels_last)
    z0, z1 = (
        torch.randn(images, 128, device=device).to(torch.bfloat16).requires_grad_()
        for _ in range(2)
    )

    def step() -> None:
        with torch.autocast(views.device.type, torch.bfloat16):
            loss = criterion(*model(views).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def loss_alone() -> None:
        with torch.autocast(views.device.type, torch.bfloat16):
            loss = criterion(z0, z1)
        torch.autograd.grad(loss, (z0, z1))

    step()  # the optimizer's state is there from now on
    memory = {"step_extra_mb": extra_mb(step, cuda)}
    whole, alone = (times(f, cuda)["ms"] for f in (step, loss_alone))
    memory["loss_extra_mb"] = extra_mb(loss_alone, cuda)
    return {"step_ms": whole, "loss_ms": alone, "share_of_step": alone / whole, **memory}
