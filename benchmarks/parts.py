# SPDX-License-Identifier: MIT
"""The parts of the benchmark: methods of peers.py on batches of batches.py.

On a CPU the methods of a part take turns in one process, for a slow minute is to hit all of them.
On a GPU each method on each batch is a work by itself, for one may hang or crash. The batch is the
same in each call, so that a small one comes from the cache, as it does from the network before.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ddp
import measure
import peers
import torch
from batches import CLASSES, KINDS, Case
from peers import CAPTURED, FOUR, HEX, INFO_NCE, PLAIN_HEX, Method
from worker import Record, Work

from hex import ops

CORES = len(os.sched_getaffinity(0))
LIMIT = 3600  # seconds, for a part on a CPU
GRAPH_CALLS = 4
IN_A_GRAPH = 8192  # rows up to which a graph is worth while

Options = argparse.Namespace  # of bench.py
Pairs = Sequence[tuple[Case, Method]]


class Part(NamedTuple):
    cases: Sequence[Case]
    methods: Sequence[Method] = FOUR
    heaps: Sequence[str] = ("retained",)
    threads: Sequence[int] = (1,)

    def pairs(self, options: Options) -> Pairs:
        """What is measured: tiny batches for a rehearsal."""
        cases = self.cases
        if options.smoke:
            cases = [case.tiny(160 + 32 * i) for i, case in enumerate(cases[:2])]
        return [
            (case, method)
            for case in cases for method in self.methods
            if case.rows <= method.most and not (options.smoke and method.compiled)
        ]  # fmt: skip


# ---- a CPU ---------------------------------------------------------------------------------------

CPU = {
    "sizes": Part(
        [*(Case(str(n), n) for n in (512, 1024, 2048, 4096, 8192)), Case("4096 x 512", 4096, 512)],
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
    "labels": Part(
        [Case(f"{n} rows, {CLASSES} labels", n, mode="labels") for n in (2048, 4096)], peers.LABELS
    ),
    "logits": Part([Case("256 x 65537", 256, queue=65537, mode="logits")], peers.LOGITS),
    "small": Part([Case("64", 64)], heaps=("stock",)),
    "large": Part([Case("65536", 65536)], (HEX,)),
    "threads": Part(
        [Case(str(n), n) for n in (512, 4096, 8192)],
        (HEX, INFO_NCE, PLAIN_HEX._replace(most=4096)), threads=sorted({1, 2, CORES}),
    ),
    "ranks": Part([Case(str(n), n) for n in (1024, 2048, 4096)], (HEX, *peers.RANKS)),
    "ddp": None,  # of ddp.py: what is right, not what is fast
    # A process has one instruction set: HEX_ISA=base and --record FILE add another to a record.
    "isa": Part(
        [
            Case("512", 512), Case("4096", 4096), Case("4096 bfloat16", 4096, dtype="bfloat16"),
            Case("4096 x 512 bfloat16", 4096, 512, dtype="bfloat16"),
        ]
    ),
}  # fmt: skip


# ---- a GPU ---------------------------------------------------------------------------------------


def shaped(rows: int, queue: int = 0, features: int = 128, dtype: str = "bfloat16") -> Case:
    name = f"{rows} x {queue or rows}"
    if (features, dtype) != (128, "bfloat16"):
        name += f", D {features}, {dtype}"
    return Case(name, rows, features, queue, dtype, "unpaired" if queue else "ntxent")


FEW = (*peers.OURS, *peers.GPU_PLAIN)  # where not all are measured
MORE = (*FEW, peers.AUTHORS, peers.AUTOCAST)
GPU = {  # the most wanted batches first
    "sizes": Part(
        [shaped(n) for n in (512, 1024, 4096, 8192, 65536, 2048, 16384, 32768, 34000)],
        (*MORE, peers.INF_CL),
    ),
    "queue": Part([shaped(n, 65536) for n in (256, 4096)], MORE),
    "features": Part([shaped(n, 0, d) for d in (256, 512, 64, 2048) for n in (4096, 32768)], FEW),
    "dtypes": Part(
        [
            shaped(n, queue, 128, dtype) for dtype in ("float32", "float16")
            for n, queue in ((1024, 0), (4096, 0), (65536, 0), (4096, 65536))
        ],
        FEW,
    ),
    "labels": Part(
        [Case(f"{n} rows, {CLASSES} labels", n, mode="labels") for n in (4096, 16384)], peers.LABELS
    ),
    "logits": Part([Case("256 x 65537", 256, queue=65537, mode="logits")], peers.LOGITS),
    # Last, because torch.compile takes up to half a minute a program.
    "compiled": Part([shaped(n) for n in (512, 4096, 8192)], peers.COMPILED),
}  # fmt: skip


# ---- the work ------------------------------------------------------------------------------------


def works(options: Options) -> Iterator[Work]:
    """Of a CPU one for each part, of a GPU one for each method on each batch."""
    known, turns = GPU if options.gpu else CPU, f"{options.repeats} turns"
    for name in dict.fromkeys(options.parts or known):
        part = known[name]
        if part is None:
            names = [m.name for m in ddp.METHODS if re.search(options.only, f"{name}: {m.name}")]
            do = functools.partial(ddp.measured, names, (2,) if options.smoke else (2, 3))
            if names:
                yield Work(name, LIMIT, do, f"of {options.only!r}")
            continue
        found = [
            (about, case, method, graph)
            for case, method in part.pairs(options)
            for graph in (False, True)[: 1 + can_be_captured(case, method, options)]
            for about in [f"{name}: {case.case}, {method.name}" + CAPTURED * graph]
            if re.search(options.only, about)
        ]
        if options.gpu:
            for about, case, method, graph in found:
                do = functools.partial(measured, part, [(case, method)], options, graph)
                yield Work(about, 120 if method.compiled else 40, do, turns)
        elif found:
            pairs = [(case, method) for _, case, method, _ in found]
            do = functools.partial(measured, part, pairs, options)
            yield Work(name, LIMIT, do, f"{turns} of {options.only!r}")


def can_be_captured(case: Case, method: Method, options: Options) -> bool:
    here = options.gpu and options.device != "cpu"
    return here and method in FEW and case.rows <= IN_A_GRAPH


def does(options: Options) -> dict[str, Callable[[], Record]]:
    """What to do, by name."""
    machine = functools.partial(measure.machine, options.device)
    return {"machine": machine} | {work.name: work.do for work in works(options)}


def measured(part: Part, pairs: Pairs, options: Options, graph: bool = False) -> Record:
    """A result for every method, heap and number of threads, by turns."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="ThresholdTracker")  # that 64 rows are few
    timers, rows, notes, results = [], [], [], []
    calls = GRAPH_CALLS if graph else 1
    for case, method in pairs:
        try:
            step, row = peers.checked(method, case, options.device)
        except (ImportError, torch.OutOfMemoryError) as error:
            notes.append(f"{method.name} is left out: {error}")
            continue
        step = captured(step) if graph else step
        for n in part.threads:
            among = f", threads: {n}" * (len(part.threads) > 1) + CAPTURED * graph
            timers.append(measure.timer(step, n, options.device))
            rows.append(row | {"method": method.name + among})
    for heap in [""] if options.gpu else part.heaps:
        if heap == "retained":
            measure.retain_heap()
        for row, ms in zip(rows, measure.times(timers, options.repeats), strict=True):
            about = {"heap": heap, "isa": ops.isa() if heap else ""}
            results.append(row | about | {"ms": [x / calls for x in ms]})
    return {"notes": notes, "results": results}


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
