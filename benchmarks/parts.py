# SPDX-License-Identifier: MIT
"""The parts of the benchmark, those of a CPU and those of a GPU: methods of peers.py on batches of
batches.py, and what else a GPU has to show. Each part gives its work, by name and with a limit.

On a CPU the methods of a part take turns in one process, for a slow minute is to hit all of them.
On a GPU each method has a case of its own, for one may hang or crash. The batch is the same in each
call, so that a small one comes from the cache, as it does from the network before.

    python benchmarks/parts.py cuda     a few calls of each kernel: for compute-sanitizer
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import batches
import core
import measure
import peers
import torch
from batches import KINDS, Batch, Case
from peers import (
    AUTHORS,
    AUTOCAST,
    COMPILED,
    FOUR,
    GPU_PLAIN,
    HEX,
    INF_CL,
    INFO_NCE,
    OURS,
    PLAIN_HEX,
    TAU,
    Method,
)
from torch import Tensor
from worker import Record, Work

from hex import HEXLoss, ThresholdTracker, batch_threshold, hex_loss, ops
from hex._load import cuda_is_built, cuda_problem

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
    products: bool = False

    def tiny(self) -> Part:
        """For a rehearsal."""
        methods = [method for method in self.methods if not method.compiled]
        return self._replace(
            cases=[case.tiny(160 + 32 * i) for i, case in enumerate(self.cases[:2])],
            methods=methods,
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
        if not options.parts and not cuda_is_built():  # where parts are named, time is short
            arch = f"{card.major}{card.minor}" + "a" * (card.major == 9)
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            run(command, HEX_CUDA="1", HEX_CUDA_ARCH=arch)
        if problem := cuda_problem(torch.cuda.current_device()):
            raise RuntimeError(f"no CUDA kernels: {problem}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = shutil.which("nvidia-smi") and subprocess.check_output(query, text=True)
        here |= {"card": card.name, "card_gb": card.total_memory / 1e9}
        here["driver"] = (driver or "unknown, no nvidia-smi").partition("\n")[0]
    on = f"{here.get('card', here['cpu'])}, torch {here['torch']}, hex-ssl {here['hex']}"
    return {"on": on + ", a rehearsal" * options.smoke, **here}


# ---- a CPU: methods by turns ---------------------------------------------------------------------


class Empty(torch.autograd.Function):
    """What autograd and Python cost: it keeps its inputs and returns empty tensors."""

    @staticmethod
    def forward(ctx: Any, z0: Tensor, z1: Tensor) -> Tensor:
        ctx.save_for_backward(z0, z1)
        return z0.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(z) for z in ctx.saved_tensors)


def near(batch: Batch) -> HEXLoss:
    return HEXLoss(threshold=ThresholdTracker.adaptive(over="negatives"))


OVERHEAD = (
    Method(f'{HEX.name}, over="negatives"', "", near),
    Method("empty autograd.Function", "", lambda _: Empty.apply),
)
OF_MODE = {"labels": peers.LABELS, "logits": peers.LOGITS}
PARTS = {
    "sizes": Part(
        [*(Case(str(n), n) for n in (512, 1024, 2048, 4096, 8192)), Case("4096x512", 4096, 512)],
        peers.METHODS, heaps=("stock", "retained"), products=True,
    ),
    "data": Part([Case(kind, 4096, kind=kind) for kind in KINDS], (HEX, PLAIN_HEX)),
    "types": Part(
        [Case(name, 2048, dtype=name) for name in ("float32", "bfloat16", "float16", "float64")]
    ),
    "shapes": Part([
        Case("query", 2048, mode="query"), Case("cross", 4096, mode="cross"),
        Case("queue", 512, queue=65536, mode="shared"),
    ]),
    "threads": Part(
        [Case(str(n), n) for n in (512, 4096, 8192)],
        (HEX, INFO_NCE, PLAIN_HEX._replace(most=4096)), threads=sorted({1, 2, CORES}),
    ),
    "small": Part([Case("64", 64)], (*FOUR, *OVERHEAD), heaps=("stock",)),
    "large": Part([Case("8192", 8192), Case("65536", 65536)]),
    "isa": Part(
        [Case("512", 512), Case("4096", 4096), Case("4096 bfloat16", 4096, dtype="bfloat16")],
        products=True,
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


def chosen(name: str, options: Options) -> Part:
    part = (GPU_PARTS if options.gpu else PARTS)[name]
    return part.tiny() if options.smoke else part


def by_turns(name: str, options: Options) -> Record:
    return measured(name, chosen(name, options), options)


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
            if options.gpu:
                step = captured(step) if graph else step
                row |= {"graph": graph, "host_ms": measure.host_ms(step) / calls}
            timers += [measure.timer(step, n, options.device) for n in part.threads]
            rows += [row | {"threads": n} for n in part.threads]
    if part.products and rows:
        a, b, out = (torch.ones(512, 512) for _ in range(3))
        timers.append(measure.timer(lambda: torch.mm(a, b, out=out)))
        rows.append({"method": "torch.mm", "flop": 2.0 * 512**3})
    for heap in part.heaps:
        if heap == "retained":
            measure.retain_heap()
        samples = measure.times(timers, options.repeats)
        found = [
            row | {"ms": [x / calls for x in ms]} for row, ms in zip(rows, samples, strict=True)
        ]
        if (
            part.products and rows and core.has_compiler()
        ):  # what the core's own tile reaches, in cache
            ms = [1e3 * core.best(core.build(ops.isa()))[1] for _ in range(5)]
            found.append({"method": "tile product", "flop": 4.0 * 502**2 * 128, "ms": ms})
        record["results"] += [row | {"heap": heap, "isa": ops.isa()} for row in found]
    return record


def begin(name: str, options: Options) -> Record:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="ThresholdTracker")  # that 64 rows are few
    record: Record = {"part": name, "notes": [], "results": []}
    return record if options.gpu else record | {"machine": measure.machine()}


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
    """65536 rows: one call, timed and its memory measured at once; and calls of a smaller batch.

    Some rows of the loss are compared with those of the reference, at the eps that was found: all
    of them would take it 34 GB a temporary.
    """
    record = begin(name, options)
    rule = ThresholdTracker.adaptive(over=peers.OVER)
    criterion = HEXLoss(TAU, threshold=rule, reduction="none")
    for case, calls in zip(chosen(name, options).cases, (6, 1), strict=True):
        batch, ms, losses = batches.make(case), [], torch.empty(0)

        def step() -> None:
            nonlocal losses
            start = time.process_time()
            losses = criterion(*batch.leaves)  # noqa: B023
            torch.autograd.grad(losses.mean(), batch.leaves)  # noqa: B023
            ms.append(float(f"{(time.process_time() - start) * 1e3:.4g}"))  # noqa: B023

        for _ in range(calls - 1):
            step()
        peak = measure.peak_mb(step)
        z = torch.cat(batch.leaves).detach().double()
        some = range(0, case.rows, -(-case.rows // 24))
        for i in some:
            partner = (i + case.rows // 2) % case.rows
            others = torch.ones(case.rows, dtype=torch.bool)
            others[[i, partner]] = False
            one = Batch((z[i, None], z[partner, None]), (z[others],), "shared")
            (right,) = peers.reference_rows(one, "HEX", criterion.last.eps)
            if not abs(losses[i] - right) < 1e-4 * right:
                raise peers.Mismatch(f"row {i} of {case}: got {losses[i]}, wanted {right}")
        row = {"method": HEX.name, **case._asdict(), "heap": "stock", "compared": len(some)}
        record["results"].append(row | {"peak_mb": peak, "ms": ms})
    return record


# ---- a GPU: a case for each method ---------------------------------------------------------------


def shaped(rows: int, queue: int, features: int, dtype: str = "bfloat16") -> Case:
    name = f"{rows} x {queue or rows} x {features}, {dtype}"
    return Case(name, rows, features, queue, dtype, "shared" if queue else "ntxent")


FEW = (*OURS, *GPU_PLAIN)  # where not all are measured
GPU_PARTS = {  # the most wanted batches first
    "sizes": Part(
        [shaped(n, 0, 128) for n in (512, 1024, 4096, 8192, 65536, 2048, 16384, 32768)],
        (*FEW, AUTHORS, AUTOCAST, INF_CL),
    ),
    "queue": Part([shaped(n, 65536, 128) for n in (256, 4096)], (*FEW, AUTHORS, AUTOCAST)),
    "features": Part([shaped(n, 0, d) for d in (256, 512, 64, 2048) for n in (4096, 32768)], FEW),
    "dtypes": Part(
        [
            shaped(n, queue, 128, dtype) for dtype in ("float32", "float16")
            for n, queue in ((1024, 0), (4096, 0), (65536, 0), (4096, 65536))
        ],
        FEW,
    ),
    "compiled": Part([shaped(n, 0, 128) for n in (512, 4096, 8192)], COMPILED),
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


# ---- a GPU: the rest -----------------------------------------------------------------------------


def median_ms(step: measure.Step, options: Options) -> float:
    (samples,) = measure.times([measure.timer(step, 1, options.device)], options.repeats)
    return sorted(samples)[len(samples) // 2]


def roofline(options: Options) -> Iterator[Work]:
    """What this device reaches: large products in half precision, copies of 1 GiB or less."""

    def reached() -> Record:
        n = 256 if options.smoke else 8192
        a, b = (torch.randn(n, n, device=options.device).to(torch.bfloat16) for _ in range(2))
        x = torch.randn(min(1 << 28, 16 * n * n), device=options.device)
        y = torch.empty_like(x)
        steps = lambda: torch.mm(a, b), lambda: y.copy_(x)
        product, copy = (median_ms(step, options) for step in steps)
        return {"tflops": 2 * n**3 / product / 1e9, "copy_gb_s": 2 * x.numel() * 4 / copy / 1e6}

    yield Work("roofline: roofline", 60, reached)


def training(options: Options) -> Iterator[Work]:
    """SimCLR's step with a loss: ResNet-18 on 32 x 32 images, bfloat16, as many rows as in "sizes".

    The images are noise: what a step costs does not depend on them.
    """
    backbone, sizes = ("small", (80,)) if options.smoke else ("resnet18", (512, 2048))
    for images in sizes:
        for method in FOUR:
            do = functools.partial(training_step, method, backbone, images, options)
            yield Work(f"training: {backbone}, {images} images, {method.name}", 60, do)


def training_step(method: Method, backbone: str, images: int, options: Options) -> Record:
    """Milliseconds and memory."""
    sys.path.append(str(ROOT / "examples"))
    from common import encoder

    network, width = encoder.backbone(backbone, 32)
    model = torch.nn.Sequential(network, encoder.projector(width, 128)).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters())
    views = torch.randn(2 * images, 3, 32, 32, device=options.device)
    views = views.to(memory_format=torch.channels_last)
    criterion = method.build(batches.make(shaped(2 * images, 0, 128), options.device))

    def step() -> None:
        with torch.autocast(views.device.type, torch.bfloat16):
            loss = criterion(*model(views).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # the optimizer's state is there from now on
    peak = measure.peak_mb(step, options.device)
    return {"step_peak_mb": peak, "step_ms": median_ms(step, options)}


def run(command: Sequence[object], **environment: str) -> Record:
    """Whether a program succeeded, and the last that it said; all of that goes into the log."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said = ""
    for line in process.stdout or ():
        print(line, end="")
        said = line.strip("= \n") or said
    return {"ok": process.wait() == 0, "note": said}


def tests(options: Options) -> Iterator[Work]:
    """The suite for a GPU. A test that hangs in the device ends its process, the others go on."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    command += ["-p", "pytest_timeout", "--timeout", "120", "--timeout-method", "thread"]
    command += ["--collect-only"] if options.smoke else ["-p", "xdist", "-n", "4"]
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    yield Work("tests: gpu", 300, functools.partial(run, command, **plain))


def sanitizer(options: Options) -> Iterator[Work]:
    """compute-sanitizer's tools over a few calls of each kernel. Each tensor is an allocation of
    its own, so that what is past its end is nobody's."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", 9] * (options.device != "cpu")
        command += [sys.executable, __file__, options.device]
        do = functools.partial(run, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        yield Work(f"sanitizer: {tool}", 300, do)


def calls(device: str) -> None:
    """Each kernel a few times, on small batches with tails: the sanitizer is slow."""
    for name in ("float32", "bfloat16", "float64"):
        for rows, features, queue in ((160, 72, 0), (192, 130, 0), (70, 40, 200)):
            batch = batches.make(shaped(rows, queue, features, name), device)
            HEX.step(batch)()
            for loss in (
                HEXLoss(TAU, threshold=ThresholdTracker.fixed(0.5, normalize_rows=True)),
                HEXLoss(0.01, variant="released", reduction="none"),
            ):
                loss.to(device)(*batch.leaves, *batch.others).sum().backward()
        own = torch.randn(6, 40, 72, dtype=getattr(torch, name)).to(device).requires_grad_()
        z0, z1 = (own.detach()[:, k].clone().requires_grad_() for k in range(2))
        hex_loss(z0, z1, own, eps=0.1, temperature=TAU).backward()
        batch_threshold(z0, z1, mode="cross", quantile=0.9)
    if device != "cpu":
        torch.cuda.synchronize()


Works = Callable[[Options], Iterator[Work]]
CPU: dict[str, Works] = {name: functools.partial(of_cpu, name) for name in PARTS}
GPU: dict[str, Works] = {  # torch.compile takes up to half a minute a program, so it comes last
    "tests": tests,
    "sanitizer": sanitizer,
    "roofline": roofline,
    **{name: functools.partial(of_gpu, name) for name in GPU_PARTS if name != "compiled"},
    "training": training,
    "compiled": functools.partial(of_gpu, "compiled"),
}

if __name__ == "__main__":
    calls(sys.argv[1])
