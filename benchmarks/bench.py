# SPDX-License-Identifier: MIT
"""Time and memory of hex against plain PyTorch, torch.compile and other libraries: `make bench`.

    python benchmarks/bench.py                    all parts, a quarter of an hour; a table of each
    python benchmarks/bench.py --quick            a minute, small sizes: to see that it runs
    python benchmarks/bench.py sizes --sizes 2048 4096x64 --methods hex "plain HEX"
    python benchmarks/bench.py --record FILE      append the results, a JSON line a part
    python benchmarks/bench.py --report           write the tables and pictures of the documents

Each part has a process of its own, for the heap, the instruction set and the threads are the
process's. Every method first computes the loss and the gradient of the very batch it is timed on,
and these have to be right: a difference ends the run. How time and memory are measured is in
measure.py, what is compared in peers.py, on what in batches.py, and how a result is shown in
report.py. --report shows benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import batches
import core
import measure
import peers
import profiler
import report
import torch
from batches import Batch
from measure import progress
from peers import FOUR, HEX, INFO_NCE, PLAIN_HEX, PLAIN_INFO_NCE, Method
from torch import Tensor

from hex import HEXLoss, ThresholdTracker, ops

LEVELS = ("base", "avx2", "avx512", "avx512_bf16")
USUAL_SIZES = ("512", "1024", "2048", "4096", "8192", "4096x512")

Result = dict[str, Any]
Case = tuple[str, Batch, Sequence[Method]]
Options = argparse.Namespace  # of `parse`; with notes, which say what was left out, and why


def methods_of(options: Options) -> list[Method]:
    """For the part `sizes`: those whose name holds one of the words."""
    words = [word.lower() for word in options.methods]
    found = [m for m in peers.METHODS if any(word in m.name.lower() for word in words)]
    return [m for m in found if not (options.quick and m.compiled)]


def shape(size: str) -> tuple[int, int]:
    """Rows and features of a size as it is written."""
    rows, _, features = size.partition("x")
    return int(rows), int(features or 128)


def square(size: str, **more: Any) -> Batch:
    rows, features = shape(size)
    return batches.views(rows // 2, features, **more)


# ---- measuring -----------------------------------------------------------------------------------


def measured(
    options: Options,
    cases: Sequence[Case],
    heaps: Sequence[str] = ("retained",),
    threads: Sequence[int] = (1,),
    together: bool = False,
    products: bool = False,
    **about: Any,
) -> list[Result]:
    """A result for every method, heap and number of threads; the methods of a case by turns, or of
    all cases together."""
    prepared = []
    for case, batch, methods in cases:
        dtype = str(batch.leaves[0].dtype).removeprefix("torch.")
        row = {"case": case, "rows": batch.rows, "candidates": batch.candidates}
        row |= {"features": batch.leaves[0].shape[1], "dtype": dtype, "mode": batch.mode, **about}
        steps = [(step, row | more) for step, more in checked(options, case, batch, methods)]
        steps += [(step, row | more) for step, more in products_beside(options) * products]
        prepared.append([
            (measure.timer(step, n, measure.clock(n)), more | {"threads": n})
            for step, more in steps
            for n in threads
        ])  # fmt: skip
    results = []
    for heap in heaps:
        if heap == "retained":
            measure.retain_heap()
        for group in [sum(prepared, [])] if together else prepared:
            names = ", ".join(dict.fromkeys(row["case"] for _, row in group))
            progress(f"timing {names}, {heap} heap")
            few = max((row["rows"] for _, row in group), default=0) <= 2048
            turns = options.repeats * (3 if few and not options.quick else 1)
            samples = measure.times(dict(enumerate(timer for timer, _ in group)), turns)
            results += [row | {"heap": heap, "ms": samples[i]} for i, (_, row) in enumerate(group)]
    return results


def checked(
    options: Options, case: str, batch: Batch, methods: Sequence[Method]
) -> list[tuple[measure.Step, Result]]:
    """The steps of the methods that take the batch and are right, with their memory."""
    right: dict[str, peers.Result] = {}
    found = []
    for method in (m for m in methods if m.takes(batch)):
        progress(f"{case}: checking {method.name}")
        try:
            step = method.step(batch)
        except ImportError as error:
            options.notes.append(f"{method.name} is left out: {error}")
            continue
        got = step()
        if method.loss and method.loss not in right:
            right[method.loss] = peers.truth(batch, method.loss)
        if method.loss:
            peers.check(method, batch, got, right[method.loss])
        found.append((step, {"method": method.name, "peak_mb": round(measure.peak_mb(step), 2)}))
    return found


def products_beside(options: Options) -> list[tuple[measure.Step, Result]]:
    """The products of torch and of the core's own tile, in cache, with their operations."""
    a, b, out = (torch.ones(512, 512) for _ in range(3))
    found = [(lambda: torch.mm(a, b, out=out), {"method": report.MM, "flop": 2.0 * 512**3})]
    try:
        product = core.product(ops.isa())
        found.append((lambda: product(50), {"method": report.PRODUCT, "flop": product(50)}))
    except core.NoCompiler as error:
        options.notes.append(f"no share of the ideal: {error}")
    return found


# ---- the parts -----------------------------------------------------------------------------------


def sizes(options: Options) -> list[Result]:
    """Every method by rows, stock and retained heap, memory; the products beside them."""
    names = options.sizes or (("200", "384x64") if options.quick else USUAL_SIZES)
    cases = [(name, square(name), methods_of(options)) for name in names]
    return measured(options, cases, ("stock", "retained"), products=True)


def data(options: Options) -> list[Result]:
    """Batches that are hard."""
    size = "384" if options.quick else "4096"
    cases = [(kind, square(size, kind=kind), FOUR[:2]) for kind in batches.KINDS]
    return measured(options, cases, together=True)


def types(options: Options) -> list[Result]:
    """float64, bfloat16, float16."""
    size = "384" if options.quick else "2048"
    names = ("float32", "bfloat16", "float16", "float64")
    cases = [(name, square(size, dtype=getattr(torch, name)), FOUR) for name in names]
    return measured(options, cases, together=True)


def shapes(options: Options) -> list[Result]:
    """Not square: queries, two ways across, a queue."""
    images, anchors, queue = (192, 32, 2000) if options.quick else (2048, 512, 65536)
    cases = [
        ("query", batches.views(images, 128, mode="query"), FOUR),
        ("cross", batches.views(images, 128, mode="cross"), FOUR),
        ("queue", batches.views(anchors, 128, mode="shared", queue=queue), FOUR),
    ]
    return measured(options, cases)


def threads(options: Options) -> list[Result]:
    """The wall clock of one thread and of more; it shows the neighbours, so the best counts."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        options.notes.append("threads are left out: there is one core")
        return []
    options = Options(**{**vars(options), "repeats": 3 * options.repeats})
    methods = (HEX, INFO_NCE, PLAIN_HEX._replace(most=4096))
    sizes = ("384",) if options.quick else ("512", "4096", "8192")
    cases = [(size, square(size), methods) for size in sizes]
    return measured(options, cases, threads=sorted({1, 2, cores}))


class Empty(torch.autograd.Function):
    """What autograd and Python cost: it keeps its inputs and returns empty tensors."""

    @staticmethod
    def forward(ctx: Any, z0: Tensor, z1: Tensor) -> Tensor:
        ctx.save_for_backward(z0, z1)
        return z0.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(z) for z in ctx.saved_tensors)


def small(options: Options) -> list[Result]:
    """64 rows: what a call costs before anything is computed."""
    warnings.filterwarnings("ignore", message="ThresholdTracker")  # that 64 rows are few
    near = ThresholdTracker.adaptive(over="negatives")
    methods = (
        HEX,
        Method(f'{HEX.name}, over="negatives"', "", lambda batch: HEXLoss(threshold=near)),
        INFO_NCE,
        PLAIN_INFO_NCE,
        Method(report.EMPTY, "", lambda batch: Empty.apply),
    )
    return measured(options, [("64", square("64"), methods)], ["stock"])


def large(options: Options) -> list[Result]:
    """65536 rows: one call, timed and its memory measured at once; and calls of a smaller batch.

    Some rows of the loss are compared with those of plain PyTorch in float64, at the eps that was
    found: all of them would take it 34 GB a temporary.
    """
    rule = ThresholdTracker.adaptive(over=peers.OVER)
    criterion = HEXLoss(peers.TAU, threshold=rule, reduction="none")
    results, some = [], 4 if options.quick else 24
    for size in ("256", "600") if options.quick else ("8192", "65536"):
        batch, losses = square(size), torch.empty(0)

        def step() -> None:
            nonlocal losses
            losses = criterion(*batch.leaves)  # noqa: B023
            torch.autograd.grad(losses.mean(), batch.leaves)  # noqa: B023

        progress(f"{size} rows")
        if results:
            start = time.process_time()
            peak = measure.peak_mb(step)
            ms = [float(f"{(time.process_time() - start) * 1e3:.4g}")]
        else:
            timer = measure.timer(step, clock=time.process_time)
            (ms,) = measure.times({size: timer}, options.repeats).values()
            peak = measure.peak_mb(step)
        for i in range(0, batch.rows, -(-batch.rows // some)):
            right = row_of(batch, i, criterion.last.eps.item())
            if not abs(losses[i] - right) < 1e-4 * right:
                raise peers.Mismatch(f"row {i} of {size}: got {losses[i]}, wanted {right}")
        row = {"case": size, "method": HEX.name, "rows": batch.rows, "features": 128}
        results.append(row | {"compared": some, "peak_mb": round(peak, 2), "ms": ms})
    return results


def row_of(batch: Batch, i: int, eps: float) -> Tensor:
    """The loss of a row of a symmetric batch, in float64."""
    z = torch.cat(batch.leaves).detach().double()
    partner = (i + batch.rows // 2) % batch.rows
    others = torch.ones(batch.rows, dtype=torch.bool)
    others[[i, partner]] = False
    return peers.plain_hex(z[i, None], z[partner, None], z[others], mode="shared", eps=eps)


def isa(options: Options) -> list[Result]:
    """At the level this process runs at, if it is the one that HEX_ISA asks for."""
    if (wanted := os.environ.get("HEX_ISA", ops.isa())) != ops.isa():
        options.notes.append(f"{wanted} is left out: this CPU does not have it")
        return []
    cases = [(s, square(s), FOUR) for s in (("384",) if options.quick else ("512", "4096"))]
    if not options.quick:
        cases.append((report.BF16, square("4096", dtype=torch.bfloat16), FOUR))
    return measured(options, cases, products=True, isa=ops.isa())


def labels(options: Options) -> list[Result]:
    """Several positives, and logits."""
    rows, shape = (256, (64, 1025)) if options.quick else (2048, (256, 65537))
    title = f"{rows} rows, {batches.CLASSES} labels, D = 128"
    cases = [
        (title, batches.labels(rows, 128), peers.LABELS),
        ("{} x {} logits".format(*shape), batches.logits(*shape, peers.TAU), peers.LOGITS),
    ]
    return measured(options, cases, ["stock"])


def profile(options: Options) -> list[Result]:
    """Where the time of the loss goes."""
    try:
        rows = (384,) if options.quick else (512, 2048, 4096)
        return [profiler.shares(ops.isa(), n, options.quick) for n in rows]
    except (profiler.NoProfiler, core.NoCompiler) as error:
        options.notes.append(f"the profile is left out: {error}")
        return []


PARTS: dict[str, Callable[[Options], list[Result]]] = {
    part.__name__: part
    for part in (sizes, data, types, shapes, threads, small, large, isa, labels, profile)
}

# ---- the command ---------------------------------------------------------------------------------


def run(part: str, options: Options) -> dict[str, Any]:
    """The record of a part: what was measured, on what, by which code, when."""
    torch.set_num_threads(1)
    utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    load, start = os.getloadavg()[0], time.perf_counter()
    results = PARTS[part](options)
    return {
        "part": part,
        "utc": utc.removesuffix("+00:00"),
        "quick": options.quick,
        "seconds": round(time.perf_counter() - start),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "machine": measure.machine(),
        "notes": list(dict.fromkeys(options.notes)),
        "results": results,
    }


def apart(part: str, options: Options, level: str | None = None) -> dict[str, Any]:
    """The same in a process of its own, at an instruction set. What the CPU lacks, notes tell."""
    at_level = {"HEX_ISA": level, "PYTHONWARNINGS": "ignore:HEX_ISA"} if level else {}
    spawn = multiprocessing.get_context("spawn")
    with environment(**at_level), ProcessPoolExecutor(1, spawn, initializer=gc.freeze) as process:
        return process.submit(run, part, options).result()


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    before = os.environ.copy()
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one part, of several processes."""
    last = next(r for r in reversed(records) if r["results"] or r is records[0])
    return {
        **records[0],
        "seconds": sum(r["seconds"] for r in records),
        "load": [records[0]["load"][0], records[-1]["load"][1]],
        "machine": last["machine"],
        "notes": list(dict.fromkeys(note for r in records for note in r["notes"])),
        "results": [result for r in records for result in r["results"]],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        return report.write()
    for part in options.parts:
        levels = LEVELS if part == "isa" else (None,)
        try:
            record = joined([apart(part, options, level) for level in levels])
        except peers.Mismatch as error:
            progress("")
            print(f"error: {error}", file=sys.stderr)
            return 1
        progress("")
        for table in report.tables(record):
            print(table, end="\n\n")
        if options.record:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            with options.record.open("a") as file:
                file.write(json.dumps(record) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times forward + backward of the HEX loss and of InfoNCE, after checking the "
        "values of every method.",
        epilog="Methods: " + "; ".join(method.name for method in peers.METHODS) + ".",
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    add("--quick", action="store_true", help="small sizes, without torch.compile")
    add("--repeats", type=int, default=5, help="turns a method; default 5, fewer of a long call")
    add("--sizes", nargs="+", default=[], metavar="2B[xD]", help="of the part `sizes`")
    add("--methods", nargs="+", default=[""], metavar="WORD", help="of the part `sizes`")
    add("--record", type=Path, metavar="FILE", help="append the results")
    add("--report", action="store_true", help="write the documents from benchmarks/results.jsonl")
    options = parser.parse_args(arguments)
    options.notes = []
    options.parts = options.parts or list(PARTS)
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part {wrong[0]!r}: the parts are {', '.join(PARTS)}")
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, wanted at least 1")
    for size in options.sizes:
        if not re.fullmatch(r"\d*[02468](x[1-9]\d*)?", size) or shape(size)[0] < 4:
            wanted = "an even number of rows, 2B, from 4 on, or rows x features as in 512x64"
            parser.error(f"--sizes: got {size!r}, wanted {wanted}")
    if not methods_of(options):
        parser.error(f"--methods: no name holds one of {options.methods}")
    return options


if __name__ == "__main__":
    sys.exit(main())
