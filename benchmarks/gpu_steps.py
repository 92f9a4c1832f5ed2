# SPDX-License-Identifier: MIT
"""The steps of gpu.py: each gives its cases, by name, with a limit and what does the work.

torch is imported where it is used: the process that only watches has none.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
HALF = ("bfloat16",)

Record = dict[str, Any]


class Case(NamedTuple):
    name: str  # "step: " and what says all
    limit: float  # seconds
    work: Callable[[], Record]


Step = Callable[[argparse.Namespace], Iterator[Case]]


def start(options: argparse.Namespace) -> Record:
    """What is here, once the kernels are there and serve the device; in short under "on"."""
    import measure
    import torch

    from hex._load import cuda_is_built, cuda_problem

    here = {k: v for k, v in measure.machine().items() if k != "threads"}
    here |= {"cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    if options.device != "cpu":
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; --device cpu --smoke is a rehearsal")
        torch.cuda.set_device(torch.device(options.device).index or 0)
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        if "build" in options.steps and not cuda_is_built():
            arch = f"{card.major}{card.minor}" + ("a" if card.major == 9 else "")
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            run(command, HEX_CUDA="1", HEX_CUDA_ARCH=arch)
        problem = cuda_problem(torch.cuda.current_device())
        if problem:
            raise SystemExit(f"no CUDA kernels: {problem}")
        here |= {"card": card.name, "card_gb": card.total_memory / 1e9, "driver": _driver()}
    name = here.get("card", here["cpu"])
    return {"on": f"{name}, torch {here['torch']}, hex-ssl {here['hex']}", **here}


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown, no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]


def run(command: Sequence[object], **environment: str) -> Record:
    """Whether a program succeeded, and the end of what it said; all of that goes into the log."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [""]
    for line in process.stdout:
        print(line, end="")
        lines.append(line.rstrip())
    record: Record = {"ok": process.wait() == 0, "note": lines[-1]}
    return record if record["ok"] else record | {"output": lines[-60:]}


# ---- right --------------------------------------------------------------------------------------


def tests(options: argparse.Namespace) -> Iterator[Case]:
    """The suite for a GPU. A test that hangs in the device ends its process, the others go on."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    command += ["-p", "pytest_timeout", "--timeout", "120", "--timeout-method", "thread"]
    command += ["--collect-only"] if options.smoke else ["-p", "xdist", "-n", "4"]
    yield Case("tests: gpu", 300, lambda: run(command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"))


def sanitizer(options: argparse.Namespace) -> Iterator[Case]:
    """compute-sanitizer's tools over a few calls of each kernel, all at once."""
    program = shutil.which("compute-sanitizer")
    program = program or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    command = [sys.executable, "benchmarks/gpu.py", "--calls", "--device", options.device]

    def work() -> Record:
        if options.device == "cpu":
            return run(command)
        if program is None:
            return {"ok": False, "note": "compute-sanitizer is not found"}

        def one(tool: str) -> Record:
            # Each tensor an allocation of its own, so that what is past its end is nobody's.
            with_tool = [program, "--tool", tool, "--error-exitcode", 9, *command]
            return run(with_tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

        with ThreadPoolExecutor(len(TOOLS)) as pool:
            found = dict(zip(TOOLS, pool.map(one, TOOLS), strict=True))
        return {
            "ok": all(r["ok"] for r in found.values()),
            "note": "; ".join(f"{t}: {r['note'].strip('= ')}" for t, r in found.items()),
            "output": [line for r in found.values() for line in r.get("output", [])],
        }

    yield Case(f"sanitizer: {'calls alone' if options.device == 'cpu' else 'tools'}", 300, work)


def repeats(options: argparse.Namespace) -> Iterator[Case]:
    """The same bits a thousand times."""

    def work(dtype: str) -> Record:
        import gpu_methods

        shape = (160, 0, 24, dtype) if options.smoke else (4096, 0, 128, dtype)
        return gpu_methods.repeats(shape, options.device, 3 if options.smoke else 1000)

    for dtype in ("bfloat16", "float16", "float32"):
        yield Case(f"repeats: {dtype}", 120, functools.partial(work, dtype))


# ---- fast ---------------------------------------------------------------------------------------


def roofline(options: argparse.Namespace) -> Iterator[Case]:
    def work() -> Record:
        import gpu_methods

        return gpu_methods.roofline(options.device, 256 if options.smoke else 8192)

    yield Case("roofline: roofline", 60, work)


def measured(
    step: str,
    options: argparse.Namespace,
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[str] = HALF,
    methods: str = "METHODS",
) -> Iterator[Case]:
    """The methods of gpu_methods on batches of (rows, queue, features), dtype by dtype."""
    import gpu_methods as g

    for dtype, (rows, queue, features) in itertools.product(dtypes, shapes):
        for method in getattr(g, methods):
            if rows > method.most or (queue and not method.any_batch):
                continue
            shape = g.Shape(rows, queue, features, dtype)
            name = f"{step}: {rows} x {queue or rows} x {features}, {dtype}, {method.name}"
            work = functools.partial(g.case, method, shape, options.device)
            yield Case(name, 120 if method.compiled else 40, functools.partial(work, graph=False))
            if method in g.FEW and rows <= g.IN_A_GRAPH and options.device != "cpu":
                yield Case(f"{name}, in a graph", 40, functools.partial(work, graph=True))


def sizes(options: argparse.Namespace) -> Iterator[Case]:
    rows = (512, 1024, 4096, 8192, 65536, 2048, 16384, 32768)
    shapes = [(160, 0, 24), (192, 0, 24)] if options.smoke else [(n, 0, 128) for n in rows]
    return measured("sizes", options, shapes)


def queue(options: argparse.Namespace) -> Iterator[Case]:
    shapes = [(128, 320, 24)] if options.smoke else [(256, 65536, 128), (4096, 65536, 128)]
    return measured("queue", options, shapes)


def features(options: argparse.Namespace) -> Iterator[Case]:
    shapes = [(n, 0, d) for d in (256, 512, 64, 2048) for n in (4096, 32768)]
    shapes = [(160, 0, 70)] if options.smoke else shapes
    return measured("features", options, shapes, methods="FEW")


def dtypes(options: argparse.Namespace) -> Iterator[Case]:
    shapes = [(1024, 0, 128), (4096, 0, 128), (65536, 0, 128), (4096, 65536, 128)]
    shapes = [(160, 0, 24)] if options.smoke else shapes
    return measured("dtypes", options, shapes, ("float32", "float16"), methods="FEW")


def compiled(options: argparse.Namespace) -> Iterator[Case]:
    """torch.compile takes up to half a minute a program, so it has a step of its own."""
    shapes = [(160, 0, 24)] if options.smoke else [(n, 0, 128) for n in (512, 4096, 8192)]
    return measured("compiled", options, shapes, methods="COMPILED")


def training(options: argparse.Namespace) -> Iterator[Case]:
    """The loss within a training step of ResNet-18 on 32 x 32 images."""
    import gpu_methods as g

    backbone, sizes = ("small", (16,)) if options.smoke else ("resnet18", (512, 2048))
    for images, name in itertools.product(sizes, g.CRITERIA):
        work = functools.partial(g.training_step, name, backbone, images, options.device)
        yield Case(f"training: {backbone}, {images} images, {name}", 60, work)


def runs(options: argparse.Namespace) -> Iterator[Case]:
    """Training with either loss, of digits, or of CIFAR-10 where it is."""
    for loss in ("base", "hex"):
        out = options.out / f"run-{loss}"
        short = ["--epochs", 2, "--stop-after", 1] if options.smoke else ["--epochs", 20]
        data = ["cifar10", "--root", options.cifar] if options.cifar else ["digits"]
        backbone = "resnet18" if options.cifar else "small"
        command = [sys.executable, "examples/simclr.py", "--data", *data, "--backbone", backbone]
        command += ["--loss", loss, "--batch-size", 512 if options.cifar else 256, *short]
        command += ["--amp", "off" if options.device == "cpu" else "bf16", "--out", out]
        command += ["--device", options.device, "--knn-every", 0]

        def train(command: Sequence[object] = command, out: Path = out) -> Record:
            shutil.rmtree(out, ignore_errors=True)  # of a try that was cut off
            record = run(command)
            file = out / "result.json"
            scores = json.loads(file.read_text()) if file.exists() else {}
            return record | {k: scores[k] for k in ("knn", "linear") if k in scores}

        yield Case(f"runs: simclr, {data[0]}, {backbone}, {loss}", 1200, train)


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (
        tests, sanitizer, roofline, sizes, queue, features, dtypes, repeats, training, compiled,
        runs,
    )
}  # fmt: skip
