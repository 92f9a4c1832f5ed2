# SPDX-License-Identifier: MIT
"""The parts of the benchmark, those of a CPU and those of a GPU: methods of peers.py on batches of
batches.py. Each part gives its work, by name and with a limit.

On a CPU the methods of a part take turns in one process, for a slow minute is to hit all of them.
On a GPU each method has a case of its own, for one may hang or crash. The batch is the same in each
call, so that a small one comes from the cache, as it does from the network before.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import batches
import measure
import peers
import torch
from batches import KINDS, Batch, Case
from peers import FOUR, HEX, INFO_NCE, PLAIN_HEX, Method
from worker import Record, Work

from hex import HEXLoss, ThresholdTracker, ops
from hex._load import cuda_problem

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("base", "avx2", "avx512", "avx512_bf16")
CORES = len(os.sched_getaffinity(0))
LIMIT = 3600  # seconds, for a part on a CPU
GRAPH_CALLS = 4
IN_A_GRAPH = 8192  # rows up to which a graph is worth while

Options = argparse.Namespace  # of bench.py


class Part(NamedTuple):
    cases: Sequence[Case]
    methods: Sequence[Method] = FOUR
    heaps: Sequence[str] = ("retained",)
    threads: Sequence[int] = (1,)

    def tiny(self) -> Part:
        """For a rehearsal."""
        return self._replace(
            cases=[case.tiny(160 + 32 * i) for i, case in enumerate(self.cases[:2])],
            methods=[method for method in self.methods if not method.compiled],
        )


def start(options: Options) -> Record:
    """What is here, and serves the device; in short under "on"."""
    here: Record = {
        **measure.machine(),
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if options.device != "cpu":
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --device cpu --smoke is a rehearsal")
        torch.cuda.set_device(torch.device(options.device).index or 0)
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        if problem := cuda_problem(torch.cuda.current_device()):
            raise RuntimeError(f"no CUDA kernels: {problem}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = shutil.which("nvidia-smi") and subprocess.check_output(query, text=True)
        here |= {"card": card.name, "card_gb": card.total_memory / 1e9}
        here["driver"] = (driver or "unknown, no nvidia-smi").partition("\n")[0]
    on = f"{here.get('card', here['cpu'])}, torch {here['torch']}, hex-ssl {here['hex']}"
    return {"on": on + ", a rehearsal" * options.smoke, **here}


def measured(name: str, part: Part, options: Options, graph: bool = False) -> Record:
    """A result for every method, heap and number of threads, by turns."""
    record, timers, rows = begin(name, options), [], []
    calls = GRAPH_CALLS if graph else 1
    for case in part.cases:
        for method in OF_MODE.get(case.mode, part.methods):
            wanted = re.search(options.only, f"{name}: {case.case}, {method.name}")
            if case.rows > method.most or not wanted:
                continue
            try:
                step, row = peers.checked(method, case, options.device)
            except (ImportError, torch.OutOfMemoryError) as error:
                record["notes"].append(f"{method.name} is left out: {error}")
                continue
            step = captured(step) if graph else step
            timers += [measure.timer(step, n, options.device) for n in part.threads]
            rows += [row | {"threads": n, "graph": graph} for n in part.threads]
    for heap in part.heaps:
        if heap == "retained":
            measure.retain_heap()
        samples = measure.times(timers, options.repeats)
        record["results"] += [
            row | {"heap": heap, "isa": ops.isa(), "ms": [x / calls for x in ms]}
            for row, ms in zip(rows, samples, strict=True)
        ]
    return record


def begin(name: str, options: Options) -> Record:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="ThresholdTracker")  # that 64 rows are few
    record: Record = {"part": name, "notes": [], "results": []}
    return record if options.gpu else record | {"machine": measure.machine()}


def chosen(name: str, options: Options) -> Part:
    part = (GPU_PARTS if options.gpu else PARTS)[name]
    return part.tiny() if options.smoke else part


# ---- a CPU: methods by turns ---------------------------------------------------------------------

OF_MODE = {"labels": peers.LABELS, "logits": peers.LOGITS}
PARTS = {
    "sizes": Part(
        [*(Case(str(n), n) for n in (512, 1024, 2048, 4096, 8192)), Case("4096x512", 4096, 512)],
        peers.METHODS, heaps=("stock", "retained"),
    ),
    "data": Part([Case(kind, 4096, kind=kind) for kind in KINDS], (HEX, PLAIN_HEX)),
    "types": Part(
        [Case(name, 2048, dtype=name) for name in ("float32", "bfloat16", "float16", "float64")]
    ),
    "shapes": Part([
        Case("query", 2048, mode="query"), Case("cross", 4096, mode="cross"),
        Case("queue", 512, queue=65536, mode="unpaired"),
    ]),
    "threads": Part(
        [Case(str(n), n) for n in (512, 4096, 8192)],
        (HEX, INFO_NCE, PLAIN_HEX._replace(most=4096)), threads=sorted({1, 2, CORES}),
    ),
    "small": Part([Case("64", 64)], heaps=("stock",)),
    "large": Part([Case("65536", 65536)], (HEX,), heaps=("stock",)),
    "isa": Part(
        [Case("512", 512), Case("4096", 4096), Case("4096 bfloat16", 4096, dtype="bfloat16")]
    ),
    "labels": Part(
        [
            Case(f"2048 rows, {batches.CLASSES} labels, D = 128", 2048, mode="labels"),
            Case("256 x 65537 logits", 256, queue=65537, mode="logits"),
        ],
        heaps=("stock",),
    ),
}  # fmt: skip


def of_cpu(name: str, options: Options) -> Iterator[Work]:
    do = {"large": large, "isa": isa}.get(name, by_turns)
    yield Work(name, LIMIT, functools.partial(do, name, options))


def by_turns(name: str, options: Options) -> Record:
    return measured(name, chosen(name, options), options)


def isa(name: str, options: Options) -> Record:
    """The same at each level that the CPU has; a process has one."""
    record = begin(name, options)
    for level in LEVELS:
        at_level = {"HEX_ISA": level, "PYTHONWARNINGS": "ignore:HEX_ISA"}
        spawn = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, at_level), ProcessPoolExecutor(1, spawn) as process:
            if process.submit(ops.isa).result() == level:
                found = process.submit(by_turns, name, options).result()
                found |= {key: record[key] + found[key] for key in ("notes", "results")}
                record = found
            else:
                record["notes"].append(f"{level} is left out: this CPU does not have it")
    return record


def large(name: str, options: Options) -> Record:
    """A batch of so many rows that one call is timed and its memory measured at once.

    Some rows of the loss are compared with those of the reference, at the eps that was found: all
    of them would take it 34 GB a temporary.
    """
    record = begin(name, options)
    rule = ThresholdTracker.adaptive(over=peers.OVER)
    criterion = HEXLoss(peers.TAU, threshold=rule, reduction="none")
    (case,) = chosen(name, options).cases
    HEX.step(batches.make(case.tiny(160)))()  # what the first call sets up is there
    batch, ms, losses = batches.make(case), [], []

    def step() -> None:
        start = time.process_time()
        losses.append(criterion(*batch.leaves))
        torch.autograd.grad(losses[0].mean(), batch.leaves)
        ms.append(float(f"{(time.process_time() - start) * 1e3:.4g}"))

    peak = measure.peak_mb(step)
    z = torch.cat(batch.leaves).detach().double()
    some = range(0, case.rows, -(-case.rows // 24))
    for i in some:
        partner = (i + case.rows // 2) % case.rows
        others = torch.ones(case.rows, dtype=torch.bool)
        others[[i, partner]] = False
        one = Batch((z[i, None], z[partner, None]), (z[others],), "unpaired")
        (right,) = peers.reference_rows(one, "HEX", criterion.last.eps)
        if not abs(losses[0][i] - right) < 1e-4 * right:
            raise peers.Mismatch(f"row {i} of {case}: got {losses[0][i]}, wanted {right}")
    row = {"method": HEX.name, **case._asdict(), "heap": "stock", "compared": len(some)}
    return record | {"results": [row | {"peak_mb": peak, "ms": ms}]}


# ---- a GPU: a case for each method ---------------------------------------------------------------


def shaped(rows: int, queue: int, features: int, dtype: str = "bfloat16") -> Case:
    name = f"{rows} x {queue or rows} x {features}, {dtype}"
    return Case(name, rows, features, queue, dtype, "unpaired" if queue else "ntxent")


FEW = (*peers.OURS, *peers.GPU_PLAIN)  # where not all are measured
GPU_PARTS = {  # the most wanted batches first
    "sizes": Part(
        [shaped(n, 0, 128) for n in (512, 1024, 4096, 8192, 65536, 2048, 16384, 32768)],
        (*FEW, peers.AUTHORS, peers.AUTOCAST, peers.INF_CL),
    ),
    "queue": Part(
        [shaped(n, 65536, 128) for n in (256, 4096)], (*FEW, peers.AUTHORS, peers.AUTOCAST)
    ),
    "features": Part([shaped(n, 0, d) for d in (256, 512, 64, 2048) for n in (4096, 32768)], FEW),
    "dtypes": Part(
        [
            shaped(n, queue, 128, dtype) for dtype in ("float32", "float16")
            for n, queue in ((1024, 0), (4096, 0), (65536, 0), (4096, 65536))
        ],
        FEW,
    ),
    # Last, because torch.compile takes up to half a minute a program.
    "compiled": Part([shaped(n, 0, 128) for n in (512, 4096, 8192)], peers.COMPILED),
}  # fmt: skip


def of_gpu(name: str, options: Options) -> Iterator[Work]:
    part = chosen(name, options)
    for case in part.cases:
        case = shaped(case.rows, case.queue, case.features, case.dtype)
        for method in part.methods:
            if case.rows <= method.most:
                about, limit = f"{name}: {case.case}, {method.name}", 120 if method.compiled else 40
                alone = Part([case], [method], heaps=["stock"])
                do = functools.partial(measured, name, alone, options)
                yield Work(about, limit, do)
                if method in FEW and case.rows <= IN_A_GRAPH and options.device != "cpu":
                    yield Work(f"{about}, in a graph", limit, functools.partial(do, graph=True))


def captured(step: measure.Step) -> measure.Step:
    """A graph of several calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            step()
    return functools.partial(lambda graph, _: graph.replay(), graph, step)  # it reads their tensors


Works = Callable[[Options], Iterator[Work]]
CPU: dict[str, Works] = {name: functools.partial(of_cpu, name) for name in PARTS}
GPU: dict[str, Works] = {name: functools.partial(of_gpu, name) for name in GPU_PARTS}
