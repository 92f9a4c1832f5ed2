# SPDX-License-Identifier: MIT
"""What gpu.py does on a GPU, step by step: each step gives its cases, by name, with a limit.

The kernels are compared with what peers.py has, on the batches of batches.py. The batch is the same
in each call, so that a small one comes from the cache, as it does from the network before. A graph,
where one is wanted, is captured of a few calls. Memory is the most that torch's allocator gives out
in a call above what it had given out before; on the CPU, for a rehearsal, that of the process.

    python benchmarks/gpu_cases.py cuda     a few calls of each kernel: for compute-sanitizer
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import batches
import measure
import peers
import torch
from batches import Batch
from peers import HEX, INF_CL, OURS, TAU, Method

from hex import HEXLoss, ThresholdTracker, batch_threshold, hex_loss
from hex._load import cuda_is_built, cuda_problem

ROOT = Path(__file__).resolve().parents[1]
FEW = (*OURS, *peers.GPU_PLAIN)  # where not all are measured
SAMPLE_S, HOST_CALLS, GRAPH_CALLS = 0.1, 10, 4
IN_A_GRAPH = 8192  # rows up to which a graph is worth while
CHECKED = 40e9  # bytes that the truth may take, N x N in float64

Record = dict[str, Any]
Shape = tuple[int, int, int]  # rows, negatives in the queue or 0, features


class Case(NamedTuple):
    name: str  # "step: " and what says all
    limit: float  # seconds
    work: Callable[[], Record]


def start(options: argparse.Namespace) -> Record:
    """What is here, once the kernels are there and serve the device; in short under "on"."""
    here = measure.machine()
    here |= {"cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    if options.device != "cpu":
        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device; --device cpu --smoke is a rehearsal")
        torch.cuda.set_device(torch.device(options.device).index or 0)
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        if "build" in options.steps and not cuda_is_built():
            arch = f"{card.major}{card.minor}" + ("a" if card.major == 9 else "")
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            run(command, HEX_CUDA="1", HEX_CUDA_ARCH=arch)
        if problem := cuda_problem(torch.cuda.current_device()):
            raise RuntimeError(f"no CUDA kernels: {problem}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = shutil.which("nvidia-smi") and subprocess.check_output(query, text=True)
        here |= {"card": card.name, "card_gb": card.total_memory / 1e9}
        here["driver"] = (driver or "unknown, no nvidia-smi").partition("\n")[0]
    return {
        "on": f"{here.get('card', here['cpu'])}, torch {here['torch']}, hex-ssl {here['hex']}",
        **here,
    }


def run(command: Sequence[object], **environment: str) -> Record:
    """Whether a program succeeded, and the end of what it said; all of that goes into the log."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = [""]
    for line in process.stdout:
        print(line, end="")
        lines.append(line.rstrip())
    record: Record = {"ok": process.wait() == 0, "note": lines[-1].strip("= ")}
    return record if record["ok"] else record | {"output": lines[-60:]}


# ---- right --------------------------------------------------------------------------------------


def tests(options: argparse.Namespace) -> Iterator[Case]:
    """The suite for a GPU. A test that hangs in the device ends its process, the others go on."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    command += ["-p", "pytest_timeout", "--timeout", "120", "--timeout-method", "thread"]
    command += ["--collect-only"] if options.smoke else ["-p", "xdist", "-n", "4"]
    work = functools.partial(run, command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    yield Case("tests: gpu", 300, work)


def sanitizer(options: argparse.Namespace) -> Iterator[Case]:
    """compute-sanitizer's tools over a few calls of each kernel. Each tensor is an allocation of
    its own, so that what is past its end is nobody's."""
    command = [sys.executable, "benchmarks/gpu_cases.py", options.device]
    if options.device == "cpu":
        yield Case("sanitizer: calls alone", 300, functools.partial(run, command))
        return
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        with_tool = [program, "--tool", tool, "--error-exitcode", 9, *command]
        work = functools.partial(run, with_tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        yield Case(f"sanitizer: {tool}", 300, work)


def calls(device: str) -> None:
    """Each kernel a few times, on small batches with tails: the sanitizer is slow."""
    for name in ("float32", "bfloat16", "float64"):
        for rows, features, queue in ((160, 72, 0), (192, 130, 0), (70, 40, 200)):
            batch = batch_of((rows, queue, features), name, device)
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


# ---- fast ---------------------------------------------------------------------------------------


def roofline(options: argparse.Namespace) -> Iterator[Case]:
    size = 256 if options.smoke else 8192
    yield Case("roofline: roofline", 60, functools.partial(reached, options.device, size))


def reached(device: str, size: int) -> Record:
    """What this device reaches: products of size^3 in half precision, copies of 1 GiB or less."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    x = torch.randn(min(1 << 28, 16 * size * size), device=device)
    y = torch.empty_like(x)
    product = times(lambda: torch.mm(a, b), device)["ms"]
    copy = times(lambda: y.copy_(x), device)["ms"]
    return {"tflops": 2 * size**3 / product / 1e9, "copy_gb_s": 2 * x.numel() * 4 / copy / 1e6}


# Of each step the shapes, those of --smoke, the methods and the dtypes. torch.compile takes up to
# half a minute a program, so it has a step of its own.
MEASURED: dict[str, tuple[list[Shape], list[Shape], Sequence[Method], Sequence[str]]] = {
    "sizes": (
        [(n, 0, 128) for n in (512, 1024, 4096, 8192, 65536, 2048, 16384, 32768)],
        [(160, 0, 24), (192, 0, 24)], peers.GPU_METHODS, ["bfloat16"],
    ),
    "queue": (
        [(256, 65536, 128), (4096, 65536, 128)], [(128, 320, 24)], peers.GPU_METHODS, ["bfloat16"],
    ),
    "features": (
        [(n, 0, d) for d in (256, 512, 64, 2048) for n in (4096, 32768)],
        [(160, 0, 70)], FEW, ["bfloat16"],
    ),
    "dtypes": (
        [(1024, 0, 128), (4096, 0, 128), (65536, 0, 128), (4096, 65536, 128)],
        [(160, 0, 24)], FEW, ["float32", "float16"],
    ),
    "compiled": (
        [(n, 0, 128) for n in (512, 4096, 8192)],
        [(160, 0, 24)], [m for m in peers.METHODS if m.compiled], ["bfloat16"],
    ),
}  # fmt: skip


def measured(step: str, options: argparse.Namespace) -> Iterator[Case]:
    """The methods on batches of these shapes, dtype by dtype."""
    shapes, smoke, methods, dtypes = MEASURED[step]
    for dtype, shape in itertools.product(dtypes, smoke if options.smoke else shapes):
        rows, queue, features = shape
        for method in methods:
            if rows > method.most or (queue and method.symmetric):
                continue
            name = f"{step}: {rows} x {queue or rows} x {features}, {dtype}, {method.name}"
            work = functools.partial(one_method, method.name, shape, dtype, options.device)
            yield Case(name, 120 if method.compiled else 40, functools.partial(work, False))
            if method in FEW and rows <= IN_A_GRAPH and options.device != "cpu":
                yield Case(f"{name}, in a graph", 40, functools.partial(work, True))


def one_method(name: str, shape: Shape, dtype: str, device: str, graph: bool) -> Record:
    """Checks the method where the truth is known, then measures it; or why not, of another's."""
    methods = (*peers.GPU_METHODS, *peers.METHODS)
    method = next(m for m in methods if m.name == name)
    rows, queue, features = shape
    about: Record = {"method": name, "graph": graph, "rows": rows, "queue": queue}
    about |= {"features": features, "dtype": dtype}
    try:
        batch = batch_of(shape, dtype, device)
        step, right = method.step(batch), truth(shape, dtype, device, method.loss)
        got = step()
        if right is not None:
            about |= peers.check(method, batch, got, right)
        about["extra_mb"] = extra_mb(step, device)
        about |= times(step, device, graph)
    except ImportError as error:
        return about | {"skipped": f"not installed: {error}"}
    except torch.OutOfMemoryError:
        return about | {"skipped": "out of memory"}
    except Exception as error:
        if (name != INF_CL.name and not method.compiled) or "CUDA error" in str(error):
            raise
        return about | {"skipped": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if device != "cpu":
            torch.cuda.empty_cache()
    if method in OURS:
        # Products of N x M x D, times 2 operations: the threshold two, the forward one, the
        # backward two; float32 three times as many (docs/cuda.md).
        products = (5 if method is HEX else 3) * (3 if dtype == "float32" else 1)
        about["flop"] = 2 * rows * (queue or rows) * features * products
    return about


@functools.lru_cache(maxsize=1)
def batch_of(shape: Shape, dtype: str, device: str) -> Batch:
    """A batch of so many anchors."""
    rows, queue, features = shape
    images, mode = (rows, "shared") if queue else (rows // 2, "ntxent")
    kind = getattr(torch, dtype)
    return batches.views(images, features, dtype=kind, mode=mode, queue=queue).to(device)


@functools.lru_cache(maxsize=4)
def truth(shape: Shape, dtype: str, device: str, loss: str) -> peers.Result | None:
    """In float64, or None where that takes too much memory."""
    batch = batch_of(shape, dtype, device)
    if batch.rows * batch.candidates * 8 * 12 > CHECKED:
        return None
    try:
        return peers.truth(batch, loss)
    except torch.OutOfMemoryError:
        return None


def times(step: measure.Step, device: str, graph: bool = False) -> Record:
    """Milliseconds a call: the median and the range; and the host's alone, which does not wait."""
    run, calls = (captured(step).replay, GRAPH_CALLS) if graph else (step, 1)
    sample = measure.timer(run).blocked_autorange(min_run_time=SAMPLE_S)
    host = measure.timer(run, clock=time.perf_counter)
    host = sample if device == "cpu" else host.timeit(HOST_CALLS)
    ms = [seconds * 1e3 / calls for seconds in sample.times]
    middle, of_host = sample.median * 1e3 / calls, host.median * 1e3 / calls
    return {"ms": middle, "host_ms": of_host, "low_ms": min(ms), "high_ms": max(ms)}


def captured(step: measure.Step) -> torch.cuda.CUDAGraph:
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


def extra_mb(step: measure.Step, device: str) -> float:
    """The most memory a call takes beside its inputs, in MB of 10^6 bytes; its results count."""
    if device == "cpu":
        return measure.peak_mb(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---- within a training step ---------------------------------------------------------------------


def training(options: argparse.Namespace) -> Iterator[Case]:
    """The loss within a training step of ResNet-18 on 32 x 32 images."""
    backbone, sizes = ("small", (16,)) if options.smoke else ("resnet18", (512, 2048))
    for images, method in itertools.product(sizes, peers.FOUR):
        work = functools.partial(training_step, method.name, backbone, images, options.device)
        yield Case(f"training: {backbone}, {images} images, {method.name}", 60, work)


def training_step(name: str, backbone: str, images: int, device: str) -> Record:
    """Milliseconds and memory of SimCLR's step with a loss, and of the loss in it.

    The images are noise: what a step costs does not depend on them. Mixed precision in bfloat16.
    """
    sys.path.append(str(ROOT / "examples"))
    from common import encoder

    network, width = encoder.backbone(backbone, 32)
    model = torch.nn.Sequential(network, encoder.projector(width, 128)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    views = torch.randn(2 * images, 3, 32, 32, device=device)
    views = views.to(memory_format=torch.channels_last)
    batch = batch_of((2 * images, 0, 128), "bfloat16", device)
    criterion = next(m for m in peers.FOUR if m.name == name).build(batch)

    def step() -> None:
        with torch.autocast(views.device.type, torch.bfloat16):
            loss = criterion(*model(views).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def loss_alone() -> None:
        with torch.autocast(views.device.type, torch.bfloat16):
            loss = criterion(*batch.leaves)
        torch.autograd.grad(loss, batch.leaves)

    step()  # the optimizer's state is there from now on
    memory = {"step_extra_mb": extra_mb(step, device)}
    whole, alone = (times(f, device)["ms"] for f in (step, loss_alone))
    memory["loss_extra_mb"] = extra_mb(loss_alone, device)
    return {"step_ms": whole, "loss_ms": alone, "share_of_step": alone / whole, **memory}


STEPS: dict[str, Callable[[argparse.Namespace], Iterator[Case]]] = {
    "tests": tests,
    "sanitizer": sanitizer,
    "roofline": roofline,
    **{
        name: functools.partial(measured, name) for name in ("sizes", "queue", "features", "dtypes")
    },
    "training": training,
    "compiled": functools.partial(measured, "compiled"),
}

if __name__ == "__main__":
    calls(sys.argv[1])
