# SPDX-License-Identifier: MIT
"""What `make bench` measures, a function a part: each in a process of its own (bench.py), for the
heap, the instruction set and the threads are the process's.

    sizes    every method by rows, stock and retained heap, memory; the core's product beside them
    data     batches that are hard
    types    float64, bfloat16, float16
    shapes   not square: queries, two ways across, a queue
    threads  the wall clock of one thread and of more
    small    64 rows: what a call costs before anything is computed
    large    65536 rows: memory, and whether the time grows more than the pairs do
    isa      the levels of the core, each with plain PyTorch beside it, a process a level
    labels   several positives, and logits
    profile  where the time of the loss goes
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import classes
import core
import measure
import peers
import profiler
import torch
from batches import KINDS, Batch, make
from cases import Case, Result, in_threads, prepare, progress, timed
from peers import HEX, INFO_NCE, METHODS, PLAIN_HEX, PLAIN_INFO_NCE, Method
from torch import Tensor

from hex import HEXLoss, InfoNCELoss, ThresholdTracker, ops, reference

FOUR = (HEX, PLAIN_HEX, INFO_NCE, PLAIN_INFO_NCE)
PRODUCT, MM = "tile product", "torch.mm"
LEVELS = ("base", "avx2", "avx512", "avx512_bf16")
BF16 = "4096 bfloat16"


@dataclasses.dataclass
class Settings:
    quick: bool = False
    repeats: int = 5
    sizes: Sequence[str] = ()  # "4096" or "4096x512": rows, features if not 128
    methods: Sequence[Method] = METHODS
    notes: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.quick:
            self.repeats = min(self.repeats, 3)
            self.methods = [method for method in self.methods if not method.compiled]
        if not self.sizes:
            usual = ("512", "1024", "2048", "4096", "8192", "4096x512")
            self.sizes = ("200", "384x64") if self.quick else usual


def shape(size: str) -> tuple[int, int]:
    """Rows and features of a size as it is written."""
    rows, _, features = size.partition("x")
    return int(rows), int(features or 128)


# ---- the parts ----------------------------------------------------------------------------------


def sizes(settings: Settings) -> list[Result]:
    torch._dynamo.config.recompile_limit = 1000  # every size is a program of its own
    cases = []
    for size in settings.sizes:
        rows, features = shape(size)
        case = prepare(Case(size, make(rows // 2, features)), settings.methods, settings.notes)
        cases.append(with_products(case, settings.notes))
    results = []
    for heap in ("stock", "retained"):
        if heap == "retained":
            measure.retain_heap()
        for case in cases:
            more = 3 if case.batch.rows <= 2048 and not settings.quick else 1
            results += timed([case], more * settings.repeats, heap)
    return results


def data(settings: Settings) -> list[Result]:
    rows = 384 if settings.quick else 4096
    cases = [
        prepare(Case(kind, make(rows // 2, 128, kind=kind), kind), FOUR[:2], settings.notes)
        for kind in KINDS
    ]
    measure.retain_heap()
    return timed(cases, settings.repeats, "retained")


def types(settings: Settings) -> list[Result]:
    rows = 384 if settings.quick else 2048
    cases = [
        prepare(Case(name, make(rows // 2, 128, dtype=getattr(torch, name))), FOUR, settings.notes)
        for name in ("float32", "bfloat16", "float16", "float64")
    ]
    measure.retain_heap()
    return timed(cases, settings.repeats, "retained")


def shapes(settings: Settings) -> list[Result]:
    images, queue, keys = (192, 32, 2000) if settings.quick else (2048, 512, 65536)
    batches = {
        "query": make(images, 128, mode="query"),
        "cross": make(images, 128, mode="cross"),
        "queue": make(queue, 128, mode="shared", queue=keys),
    }
    cases = [prepare(Case(name, batch), FOUR, settings.notes) for name, batch in batches.items()]
    measure.retain_heap()
    return timed(cases, settings.repeats, "retained")


def threads(settings: Settings) -> list[Result]:
    """The wall clock, which shows the neighbours: many samples, of which the best counts."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        settings.notes.append("threads are left out: there is one core")
        return []
    results: list[Result] = []
    counts = sorted({1, 2, cores})
    measure.retain_heap()
    for size, repeats in (("512", 40), ("4096", 15), ("8192", 6)):
        if settings.quick and results:
            break
        rows, features = shape(size)
        few = (HEX, INFO_NCE, PLAIN_HEX) if rows < 8192 else (HEX, INFO_NCE)
        case = prepare(Case(size, make(rows // 2, features)), few, settings.notes)
        steps = {
            (name, count): in_threads(step, count)
            for name, step in case.steps.items()
            for count in counts
        }
        progress(f"{size}: {counts} threads")
        samples = measure.times(steps, 2 if settings.quick else repeats, measure.clock(2))
        results += [
            case.result(name, samples[name, count], heap="retained", threads=count)
            for name, count in steps
        ]
        torch.set_num_threads(1)
    return results


def small(settings: Settings) -> list[Result]:
    """The modules as they are called in training, with .backward(); no checks of values here."""
    warnings.filterwarnings("ignore", message="ThresholdTracker")  # that 64 rows are few
    batch = make(32, 128)
    z0, z1 = batch[:2]

    def whole(loss: Callable[[Tensor, Tensor], Tensor]) -> measure.Step:
        def step() -> None:
            z0.grad = z1.grad = None
            loss(z0, z1).backward()

        return step

    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z0: Tensor, z1: Tensor) -> Tensor:
            ctx.save_for_backward(z0, z1)
            return z0.new_empty(())

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return tuple(torch.empty_like(z) for z in ctx.saved_tensors)

    near, rows = (ThresholdTracker.adaptive(over=over) for over in ("negatives", peers.OVER))
    case = Case("64", batch)
    case.steps = {
        "hex HEXLoss": whole(HEXLoss(threshold=rows)),
        'hex HEXLoss, over="negatives"': whole(HEXLoss(threshold=near)),
        "hex InfoNCELoss": whole(InfoNCELoss()),
        "plain InfoNCE": whole(functools.partial(peers.plain_info_nce, mode="ntxent")),
        "empty autograd.Function": whole(Empty.apply),
    }
    return timed([case], 5 * settings.repeats, "stock")


def large(settings: Settings) -> list[Result]:
    """One call of 65536 rows, timed and its memory measured at once, and calls of a smaller batch:
    warm ones, for what a first call costs more is nothing to a minute."""
    sizes = (256, 600) if settings.quick else (8192, 65536)
    rule = ThresholdTracker.adaptive(over=peers.OVER)
    criterion = HEXLoss(peers.TAU, threshold=rule, reduction="none")
    losses: list[Tensor] = []
    results = []

    def step(batch: Batch) -> None:
        losses[:] = [criterion(*batch[:2])]
        torch.autograd.grad(losses[0].mean(), batch[:2])

    step(make(256, 128))
    for rows in sizes:
        case = Case(str(rows), make(rows // 2, 128))
        progress(f"{rows} rows: {'a call' if results else 'some calls'}")
        now = measure.clock(1)
        start = now()
        case.peak_mb[HEX.name] = measure.peak_mb(lambda: step(case.batch))  # noqa: B023
        ms = [(now() - start) * 1e3]
        if not results:
            step_of = {HEX.name: lambda: step(case.batch)}  # noqa: B023
            ms = measure.times(step_of, settings.repeats, now)[HEX.name]
        progress(f"{rows} rows: checking")
        compared = check_rows(
            case.batch, losses[0], criterion.last.eps, 4 if settings.quick else 24
        )
        results.append(case.result(HEX.name, ms, heap="stock", compared=compared))
    return results


def check_rows(batch: Batch, losses: Tensor, eps: Tensor, some: int) -> int:
    """Compares some rows of the loss with hex.reference in float64, at the eps that was found: all
    of 65536 would take it 34 GB a temporary. Returns how many."""
    z, rows = torch.cat(batch[:2]).detach().double(), batch.rows
    tau = torch.tensor(peers.TAU, dtype=torch.float64)
    for i in (n * rows // some for n in range(some)):
        p = (i + rows // 2) % rows
        others = torch.ones(rows, dtype=torch.bool)
        others[[i, p]] = False
        inputs = z[i : i + 1], z[p : p + 1], z[others], eps.double(), tau
        right = reference.loss_rows(*inputs, "shared", peers.BETA, peers.TAU_PLUS)[0]
        if not abs(losses[i] - right) < 1e-4 * right:
            raise peers.Mismatch(f"row {i} of {rows}: got {losses[i]}, wanted {right}")
    return some


def isa(settings: Settings) -> list[Result]:
    """At the level this process runs at, if it is the one that HEX_ISA asks for."""
    if (wanted := os.environ.get("HEX_ISA", ops.isa())) != ops.isa():
        settings.notes.append(f"{wanted} is left out: this CPU does not have it")
        return []
    cases = []
    for size in ("384",) if settings.quick else ("512", "4096"):
        rows, features = shape(size)
        case = prepare(Case(size, make(rows // 2, features)), FOUR, settings.notes)
        cases.append(with_products(case, settings.notes))
    if not settings.quick:
        batch = make(2048, 128, dtype=torch.bfloat16)
        cases.append(prepare(Case(BF16, batch), FOUR, settings.notes))
    measure.retain_heap()
    repeats = settings.repeats
    return [row for case in cases for row in timed([case], repeats, "retained", isa=ops.isa())]


def labels(settings: Settings) -> list[Result]:
    results = []
    for rows in classes.groups(settings.quick, settings.notes):
        results += classes.measured(rows, settings.repeats)
    return results


def profile(settings: Settings) -> list[Result]:
    try:
        rows = (384,) if settings.quick else (512, 2048, 4096)
        return [profiler.shares(ops.isa(), n, settings.quick) for n in rows]
    except (profiler.NoProfiler, core.NoCompiler) as error:
        settings.notes.append(f"the profile is left out: {error}")
        return []


PARTS: dict[str, Callable[[Settings], list[Result]]] = {
    part.__name__: part
    for part in (sizes, data, types, shapes, threads, small, large, isa, labels, profile)
}


def with_products(case: Case, notes: list[str]) -> Case:
    """Beside the methods the products of the core's tile and of torch, in cache."""
    a, b, out = (torch.ones(512, 512) for _ in range(3))
    case.steps[MM] = lambda: torch.mm(a, b, out=out)
    case.flop[MM] = 2.0 * 512**3
    try:
        product = core.product(ops.isa())
    except core.NoCompiler as error:
        if (note := f"no share of the ideal: {error}") not in notes:
            notes.append(note)
        return case
    case.steps[PRODUCT] = lambda: product(50)
    case.flop[PRODUCT] = product(50)
    return case
