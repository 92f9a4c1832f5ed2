# SPDX-License-Identifier: MIT
"""All that a GPU has to show, by one command: tests, sanitizers, times, memory, a training run.

    python benchmarks/gpu.py                       all steps, about an hour; builds first
    python benchmarks/gpu.py tests sizes           some of them
    python benchmarks/gpu.py --seconds 500         begins nothing after that; again: goes on
    python benchmarks/gpu.py --device cpu --smoke  the same code at tiny sizes, without a GPU

Each result is a line of FOLDER/results.jsonl as soon as it is there, and is not measured again. The
last step, report, makes of them a table, report.md, and pictures of time and memory against N.
`--docs` puts these into docs/. What is measured is in gpu_methods.py, how it is shown in
gpu_report.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REPEATS = 1000

Record = dict[str, Any]
Work = Callable[[], Record]
Case = tuple[str, Work]  # a name that says all, and what gives its record


class Results:
    """results.jsonl: what is there already, and a line for each new record."""

    def __init__(self, folder: Path, again: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "results.jsonl"
        if again:
            self.file.unlink(missing_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.records: dict[str, Record] = {(r := json.loads(line))["case"]: r for line in lines}

    def add(self, case: str, record: Record) -> None:
        self.records[case] = {"case": case, **record}
        with self.file.open("a") as file:
            file.write(json.dumps(self.records[case], default=str) + "\n")

    def done(self, case: str) -> bool:
        """A failure is tried again."""
        return case in self.records and self.records[case].get("ok", True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.calls:
        import gpu_methods

        gpu_methods.calls(options.device)
        return 0
    results = Results(options.out, options.again)
    end = time.monotonic() + options.seconds if options.seconds else None
    failed = []
    for case, work in to_do(options, results):
        if end and time.monotonic() > end:
            print(f"{options.seconds:g} s are over: the same command goes on", file=sys.stderr)
            return 3
        start = time.perf_counter()
        record = attempt(work)
        results.add(case, {**record, "seconds": time.perf_counter() - start})
        say(results.records[case])
        if not record.get("ok", True):
            failed.append(case)
        if "CUDA error" in record.get("note", ""):
            print("the device is lost to this process: the same command goes on", file=sys.stderr)
            break
    for case in failed:
        print(f"failed: {case}", file=sys.stderr)
    return 1 if failed else 0


def to_do(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """What has no result yet; then what failed when it was tried before; the report last."""
    tried = {case for case, record in results.records.items() if not record.get("ok", True)}
    for again in (False, True):
        for step in options.steps:
            if step == ("build" if again else "report"):
                continue
            for name, work in STEPS[step](options, results):
                case = f"{step}: {name}"
                open_ = not results.done(case) and (case in tried) == again
                if open_ or step in ("build", "report"):
                    yield case, work


def attempt(work: Work) -> Record:
    """The record; of an error, what it says: the other cases may yet be right."""
    try:
        return work()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        return {"ok": False, "note": text, "output": traceback.format_exc().splitlines()[-30:]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    add("--out", type=Path, default=ROOT / "build/gpu", metavar="FOLDER", help="of the results")
    add("--device", default="cuda", help="cuda, cuda:1, or cpu for a rehearsal")
    add("--seconds", type=float, help="begin nothing new after so many")
    add("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    add("--again", action="store_true", help="forget the results that are there")
    add("--cifar", type=Path, metavar="FOLDER", help="of CIFAR-10, for the training run")
    add("--calls", action="store_true", help="a few calls of each kernel, for the sanitizer")
    add("--docs", action="store_true", help="let report write into docs/cuda.md and docs/images")
    options = parser.parse_args(arguments)
    for step in options.steps:
        if step not in STEPS:
            parser.error(f"STEP: got {step!r}, wanted one of {', '.join(STEPS)}")
    options.steps = options.steps or list(STEPS)
    return options


def say(record: Record) -> None:
    """A line for who watches."""
    shown = (f"{k} {v:.3g}" for k, v in record.items() if isinstance(v, float) and k != "seconds")
    state = "" if record.get("ok", True) else "  FAILED"
    why = record.get("skipped") or record.get("note") or ""
    print("  ".join((record["case"] + state, *shown, why)).rstrip(), flush=True)


def run(command: Sequence[object], **environment: str) -> Record:
    """Whether a program succeeded, and the end of what it said."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.strip().splitlines() or [""]
    record: Record = {"ok": done.returncode == 0, "note": lines[-1]}
    return record if record["ok"] else record | {"output": lines[-60:]}


# ---- steps: each gives its cases ----------------------------------------------------------------


def build(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """The kernels, where this folder has none, for the GPU that is here; and what is here."""

    def kernels() -> Record:
        if options.device == "cpu" or (ROOT / "hex/_cuda.so").exists():
            return {"note": "built already" if options.device != "cpu" else "not wanted"}
        import torch

        major, minor = torch.cuda.get_device_capability(options.device)
        arch = f"{major}{minor}" + ("a" if major == 9 else "")
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return run(command, HEX_CUDA="1", HEX_CUDA_ARCH=arch)

    def machine() -> Record:
        import measure
        import torch

        here = {k: v for k, v in measure.machine().items() if k != "threads"}
        here["cuda"] = torch.version.cuda
        if options.device != "cpu":
            about = torch.cuda.get_device_properties(options.device)
            here |= {"card": about.name, "card_gb": about.total_memory / 1e9}
            here["driver"] = _driver()
        before = results.records.get("build: machine", here)
        for key in ("card", "torch", "hex"):
            if before.get(key) != here.get(key):
                raise SystemExit(
                    f"{results.file} is of {key} {before.get(key)!r}, here is {here.get(key)!r}: "
                    "take another --out, or --again"
                )
        return here

    yield "kernels", kernels
    yield "machine", machine


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown, no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]


def tests(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """The suite for a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    if options.smoke:
        yield "collected", lambda: run([*command, "--collect-only"])
    else:
        yield "gpu", lambda: run(command)


def sanitizer(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """compute-sanitizer's tools over a few calls of each kernel."""
    program = shutil.which("compute-sanitizer")
    program = program or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    calls = [sys.executable, "benchmarks/gpu.py", "--calls", "--device", options.device]
    if options.device == "cpu":
        yield "calls alone", lambda: run(calls)
        return
    for tool in TOOLS:
        if program is None:
            yield tool, lambda: {"ok": False, "note": "compute-sanitizer is not found"}
            continue
        command = [program, "--tool", tool, "--error-exitcode", 9, *calls]
        # Each tensor an allocation of its own, so that what is past its end is nobody's.
        yield tool, lambda command=command: run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def roofline(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    import gpu_methods

    size = 256 if options.smoke else 8192
    yield "roofline", lambda: gpu_methods.roofline(options.device, size)


def measured(
    options: argparse.Namespace,
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[str],
    methods: Sequence[Any] | None = None,
) -> Iterator[Case]:
    """The methods, by default all but compiled ones, on batches of (rows, queue, features)."""
    import gpu_methods as g
    import peers
    import torch

    if options.device != "cpu":
        torch.cuda.set_device(options.device)
    torch._dynamo.config.recompile_limit = 1000  # every size is a program of its own
    for rows, queue, features in shapes:
        for dtype in dtypes:
            copies: list[Any] = []
            truths: dict[str, Any] = {}

            def work(
                method: Any, graph: bool, copies: Any = copies, truths: Any = truths,
                rows: int = rows, queue: int = queue, features: int = features, dtype: str = dtype,
            ) -> Record:  # fmt: skip
                if not copies:
                    made = g.batches(rows, features, getattr(torch, dtype), options.device, queue)
                    copies.extend(made)
                batch = copies[0]
                about: Record = {
                    "method": method.name, "graph": graph, "rows": rows, "queue": queue,
                    "features": features, "dtype": dtype,
                }  # fmt: skip
                if graph and options.device == "cpu":
                    return about | {"skipped": "there are no graphs on a CPU"}
                try:
                    dense = rows * batch.candidates * 8 * 12  # bytes, of the reference in float64
                    if method.loss not in truths and dense < 24e9:
                        truths[method.loss] = peers.truth(batch, method.loss)
                    about |= g.one_case(method, copies, graph, truths.get(method.loss))
                except ImportError as error:
                    return about | {"skipped": f"not installed: {error}"}
                except torch.OutOfMemoryError:
                    return about | {"skipped": "out of memory"}
                except peers.Mismatch as error:
                    return about | {"ok": False, "note": str(error)}
                except Exception as error:  # another's code: a line about it, and on
                    if method in g.OURS:
                        raise
                    return about | {"skipped": f"{type(error).__name__}: {error}"[:300]}
                finally:
                    if options.device != "cpu":
                        torch.cuda.empty_cache()
                return about | floor(method, batch, about["ms"], results_of(options))

            for method in methods or g.METHODS:
                if queue and not method.any_batch:
                    continue
                for graph in (False, True):
                    if graph and (method not in g.FEW or rows > g.IN_A_GRAPH):
                        continue
                    shape = f"{rows} x {queue or rows} x {features}, {dtype}"
                    name = f"{shape}, {method.name}" + (", in a graph" if graph else "")
                    yield name, lambda work=work, method=method, graph=graph: work(method, graph)


def results_of(options: argparse.Namespace) -> Results:
    return Results(options.out)


def floor(method: Any, batch: Any, ms: float, results: Results) -> Record:
    """The time of the products alone at the rate this card reaches, and its share of ours."""
    import gpu_methods as g

    rate = results.records.get("roofline: roofline", {}).get("tflops")
    if method not in g.OURS or rate is None:
        return {}
    cells = batch.rows * (batch.rows if batch.negatives is None else len(batch.negatives))
    flop = 2 * cells * batch.z0.shape[1] * g.products(method, batch)
    least = flop / rate / 1e9
    return {"floor_ms": least, "share_of_roofline": least / ms}


HALF, ALL = ("bfloat16",), ("bfloat16", "float16", "float32")


def sizes(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    rows = (160, 192) if options.smoke else [512 << k for k in range(8)]  # to 65,536
    return measured(options, [(n, 0, 24 if options.smoke else 128) for n in rows], HALF)


def compiled(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """torch.compile takes half a minute a program, so it has a step of its own."""
    import gpu_methods as g

    rows = (160,) if options.smoke else [512 << k for k in range(7)]
    features = 24 if options.smoke else 128
    return measured(options, [(n, 0, features) for n in rows], HALF, g.COMPILED)


def _few() -> Sequence[Any]:
    import gpu_methods as g

    return g.FEW


def dtypes(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    shapes = [(160, 0, 24)] if options.smoke else [(n, 0, 128) for n in (1024, 4096, 16384, 65536)]
    return measured(options, shapes, ("float32", "float16"), _few())


def features(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    shapes = [(n, 0, d) for n in (4096, 32768) for d in (64, 256, 512, 2048)]
    return measured(options, [(160, 0, 70)] if options.smoke else shapes, HALF, _few())


def queue(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    shapes = [(128, 320, 24)] if options.smoke else [(4096, 65536, 128)]
    return measured(options, shapes, HALF if options.smoke else ALL)


def repeats(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """The same bits a thousand times."""
    import gpu_methods as g
    import torch

    def work(dtype: str) -> Record:
        count = 3 if options.smoke else REPEATS
        rows, features = (160, 24) if options.smoke else (4096, 128)
        batch = g.batches(rows, features, getattr(torch, dtype), options.device)[0]
        # eps given: the tracker's state would move from call to call
        step = g.EPS_GIVEN.step(batch)
        first = step()
        differ = torch.zeros((), dtype=torch.int64, device=options.device)
        for _ in range(count):
            for a, b in zip(first, step(), strict=True):
                differ += (a != b).any()
        return {
            "ok": int(differ) == 0,
            "repeats": count,
            "note": f"{int(differ)} differ of {count}",
        }

    for dtype in ALL:
        yield dtype, lambda dtype=dtype: work(dtype)


def training(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    """The loss within a training step of ResNet-18 on 32 x 32 images; and a run, with CIFAR-10."""
    import gpu_methods as g

    backbone, sizes = ("small", (16,)) if options.smoke else ("resnet18", (512, 2048))
    for images in sizes:
        for name in g.CRITERIA:
            yield (
                f"{backbone}, {images} images, {name}",
                lambda name=name, images=images: g.training_step(
                    name, backbone, images, options.device
                ),
            )
    for loss in ("base", "hex"):
        out = options.out / f"run-{loss}"
        short = ["--epochs", 2, "--stop-after", 1] if options.smoke else ["--epochs", 20]
        data = ["cifar10", "--root", options.cifar] if options.cifar else ["digits"]
        backbone = "resnet18" if options.cifar else "small"
        command = [sys.executable, "examples/simclr.py", "--data", *data, "--backbone", backbone]
        command += ["--loss", loss, "--batch-size", 512 if options.cifar else 256, *short]
        command += ["--amp", "off" if options.device == "cpu" else "bf16", "--out", out]
        command += ["--device", options.device, "--knn-every", 0]

        def train(command: Any = command, out: Path = out) -> Record:
            shutil.rmtree(out, ignore_errors=True)  # of a try that was cut off
            record = run(command)
            file = out / "result.json"
            scores = json.loads(file.read_text()) if file.exists() else {}
            return record | {k: scores[k] for k in ("knn", "linear") if k in scores}

        yield f"simclr, {data[0]}, {backbone}, {loss}", train


def report(options: argparse.Namespace, results: Results) -> Iterator[Case]:
    import gpu_report

    def work() -> Record:
        files = gpu_report.write(results.records, options.out)
        if options.docs:
            files += gpu_report.into_docs(options.out, ROOT / "docs")
        return {"note": " ".join(map(str, files))}

    yield "report", work


STEPS: dict[str, Callable[[argparse.Namespace, Results], Iterator[Case]]] = {
    step.__name__: step
    for step in (
        build, tests, sanitizer, roofline, sizes, queue, repeats, features, dtypes, training,
        compiled, report,
    )
}  # fmt: skip


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # hex as it is in this folder, built or not
    sys.exit(main())
