# SPDX-License-Identifier: MIT
"""Time and memory of the loss, forward and backward: hex, plain PyTorch, torch.compile, libraries.

    python benchmarks/loss.py              two tables in about six minutes, most of it torch.compile
    python benchmarks/loss.py --quick      half a minute
    python benchmarks/loss.py --help

Every method first computes the loss and the gradient of the very batch it is timed on, and these
have to be those of hex.reference in float64: a difference ends the run. How time and memory are
measured is in measure.py, what is compared in peers.py, on what in batches.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
import peers
import table
import torch
from batches import KINDS, Batch, make
from peers import HEX, INFO_NCE, METHODS, PLAIN_HEX, PLAIN_INFO_NCE, Method

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
SIZES = ["256", "512", "1024", "2048", "4096", "4096x512"]
OTHER_ROWS = 2048  # of the batches in the second table, with
FOUR = (HEX, PLAIN_HEX, INFO_NCE, PLAIN_INFO_NCE)
RATIOS = ((PLAIN_HEX, HEX), (PLAIN_INFO_NCE, HEX), (PLAIN_INFO_NCE, INFO_NCE))  # slow over fast

HEAPS = {
    "stock": "Stock heap: as in any run of Python. glibc serves a request of 32 MiB or more (N x N "
    "in float32 from N = 2897 on) from fresh pages: that costs the methods with N x N temporaries "
    "much and hex nothing, so it flatters hex.",
    "retained": "Retained heap: glibc keeps what is freed, as with MALLOC_MMAP_MAX_=0 "
    "MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_TOP_PAD_=67108864 in the environment, or as other "
    "allocators do: the dense methods at their best. These ratios are the ones to quote.",
}
MKL_ON_AMD = ["On AMD the MKL in torch takes its AVX2 path, at under half speed: it flatters hex."]


@dataclasses.dataclass
class Case:
    """A batch; by method that gave the right loss and gradient on it, its step and figures."""

    name: str
    batch: Batch
    steps: dict[str, peers.Step] = dataclasses.field(default_factory=dict)
    peak_mb: dict[str, float] = dataclasses.field(default_factory=dict)
    samples_ms: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)

    def ms(self, heap: str, method: Method) -> float | None:
        samples = self.samples_ms[heap].get(method.name)
        return samples and statistics.median(samples)

    def ratio(self, heap: str, slow: Method, fast: Method) -> float | None:
        above, below = self.ms(heap, slow), self.ms(heap, fast)
        return above / below if above and below else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    about = {"machine": measure.machine(), "load": [measure.load()]}
    start = time.perf_counter()
    notes: list[str] = []
    try:
        methods, full = methods_of(options), options.full
        if any(method.compiled for method in methods):
            torch._dynamo.config.recompile_limit = 1000  # every size is a program of its own
        sizes = [prepare(case, methods, full, notes) for case in cases_by_size(options)]
        others = [prepare(case, FOUR, full, notes) for case in other_cases(options)]
    except peers.Mismatch as error:
        progress("")
        print(f"error: {error}", file=sys.stderr)
        return 1
    heaps = list(HEAPS) if options.heap == "both" else [options.heap]
    for heap in heaps:
        if heap == "retained":
            measure.retain_heap()
        for case in sizes + (others if heap == heaps[-1] else []):
            progress(f"{case.name}, {heap} heap: timing")
            now = measure.clock(options.threads)
            case.samples_ms[heap] = measure.times(case.steps, options.repeats, now)
    progress("")
    about |= {"load": [*about["load"], measure.load()], "seconds": time.perf_counter() - start}
    show_sizes(options, sizes, heaps, about, notes)
    if others:
        show_others(options, others, heaps[-1])
    if options.json:
        write(options, about, {"sizes": sizes, "others": others})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times forward + backward of the HEX loss and of InfoNCE, after checking every "
        "method against hex.reference.",
        epilog="Methods: " + "; ".join(method.name for method in METHODS) + ".",
    )
    add = parser.add_argument
    add("--sizes", nargs="+", metavar="2B[xD]", help=f"rows, 2B; default {' '.join(SIZES)}")
    add("--dim", type=int, default=128, help="features of sizes that name none; default 128")
    add("--threads", type=int, default=1, help="of torch; more than 1 reads the wall clock")
    add("--dtype", choices=DTYPES, default="float32", help="of the embeddings; default float32")
    add("--repeats", type=int, help="samples a method; default 5 (3 where a call takes 0.5 s)")
    add("--methods", nargs="+", metavar="WORD", help="only those whose names hold one of the words")
    add("--quick", action="store_true", help="256 and 1024 rows, 3 samples, no compile, one table")
    add(
        "--full",
        action="store_true",
        help="also 8192 rows, a queue, the reference at every size (5 GB)",
    )
    add("--heap", choices=("stock", "retained", "both"), default="both", help="default both")
    add("--json", type=Path, metavar="FILE", help="write every sample there")
    options = parser.parse_args(arguments)
    if options.sizes is None:
        options.sizes = ["256", "1024"] if options.quick else SIZES + ["8192"] * options.full
    if options.repeats is None:
        options.repeats = 3 if options.quick else 5
    for name in ("dim", "threads", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, wanted at least 1")
    for size in options.sizes:
        try:
            rows, _ = shape(size, options.dim)
        except ValueError:
            parser.error(f"--sizes: got {size!r}, wanted rows, 2B, or rows x features as in 512x64")
        if rows < 4 or rows % 2:
            parser.error(f"--sizes: got {size!r}, wanted an even number of rows, at least 4")
    if not methods_of(options):
        parser.error(f"--methods: no name holds one of {options.methods}")
    return options


def shape(size: str, features: int) -> tuple[int, int]:
    """Rows and features of a size as it is written: "4096", "4096x512"."""
    rows, _, own = size.partition("x")
    return int(rows), int(own) if own else features


def methods_of(options: argparse.Namespace) -> list[Method]:
    words = [word.lower() for word in options.methods or [""]]
    return [
        method
        for method in METHODS
        if any(word in method.name.lower() for word in words)
        and not (options.quick and method.compiled)
    ]


def progress(what: str) -> None:
    """One line, written over and over, for a person who waits."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


# ---- what is measured ---------------------------------------------------------------------------


def cases_by_size(options: argparse.Namespace) -> Iterator[Case]:
    """Of the first table."""
    for size in options.sizes:
        rows, features = shape(size, options.dim)
        yield Case(size, make(rows // 2, features, dtype=DTYPES[options.dtype]))


def other_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Of the second: data that is hard, then other dtypes and modes."""
    if options.quick:
        return
    dim, dtype = options.dim, DTYPES[options.dtype]
    for kind in KINDS:
        yield Case(kind, make(OTHER_ROWS // 2, dim, kind=kind, dtype=dtype))
    for name, other in DTYPES.items():
        if other != dtype:
            yield Case(name, make(OTHER_ROWS // 2, dim, dtype=other))
    yield Case('mode="query"', make(OTHER_ROWS, dim, dtype=dtype, mode="query"))
    yield Case('mode="cross"', make(OTHER_ROWS // 2, dim, dtype=dtype, mode="cross"))
    if options.full:
        yield Case("queue", make(512, dim, dtype=dtype, mode="shared", queue=65536))


def prepare(case: Case, methods: Sequence[Method], full: bool, notes: list[str]) -> Case:
    """Checks the methods that take the batch, and measures their memory."""
    right: dict[str, peers.Result] = {}
    for method in methods:
        if not method.takes(case.batch) or (case.batch.rows > method.usual and not full):
            continue
        progress(f"{case.name}: checking {method.name}")
        if method.loss not in right:
            right[method.loss] = peers.truth(case.batch, method.loss)
        try:
            step = method.step(case.batch)
        except ImportError as error:
            if (note := f"{method.name} is left out: {error}") not in notes:
                notes.append(note)
            continue
        peers.check(method, case.batch, step(), right[method.loss])
        case.steps[method.name] = step
        case.peak_mb[method.name] = measure.peak_mb(step)
    return case


# ---- what is shown ------------------------------------------------------------------------------


def show_sizes(
    options: argparse.Namespace,
    cases: list[Case],
    heaps: list[str],
    about: dict[str, Any],
    notes: list[str],
) -> None:
    lines: list[table.Line] = []
    methods = [m for m in methods_of(options) if any(m.name in case.steps for case in cases)]

    def row(name: str, values: Iterable[float | None], form: Callable[..., str]) -> None:
        cells = [form(value) for value in values]
        if any(cells):
            lines.append([name, *cells])

    for heap in heaps:
        lines.append(f"ms, {heap} heap")
        for method in methods:
            row(method.name, (case.ms(heap, method) for case in cases), table.number)
        for slow, fast in RATIOS:
            name = f"{slow.name} / {fast.name}"
            row(name, (case.ratio(heap, slow, fast) for case in cases), table.ratio)
    lines.append("peak MB")
    for method in methods:
        row(method.name, (case.peak_mb.get(method.name) for case in cases), table.number)

    one = options.threads == 1
    machine = about["machine"]
    table.show(
        f"Forward + backward, {options.dtype}, by rows N = 2B"
        f" (D = {options.dim} where a column names none)",
        ["", *(case.name.replace("x", " x ") for case in cases)],
        lines,
        [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; torch "
            f"{machine['torch']} ({machine['torch_simd']}), hex {machine['hex']} "
            f"({machine['hex_isa']}), threads: {machine['threads']}.",
            f"ms: {'CPU time of the process' if one else 'wall clock'} a call, median of "
            f"{options.repeats}, the methods by turns. Each was first checked against "
            "hex.reference in float64. Tau 0.1, 64 clusters.",
            *(HEAPS[heap] for heap in heaps),
            "peak MB: what the process holds at most in a call above what it held before, stock "
            "heap.",
            *(method.note for method in methods if method.note),
            *MKL_ON_AMD[: "AMD" in machine["cpu"]],
            *notes,
            f"Took {about['seconds']:.0f} s; load of the machine {about['load'][0]:.1f} at the "
            f"start, {about['load'][1]:.1f} at the end.",
        ],
    )


def show_others(options: argparse.Namespace, cases: list[Case], heap: str) -> None:
    lines = []
    for case in cases:
        cells = [case.name, f"{case.batch.rows} x {case.batch.candidates}"]
        for ours, plain in ((HEX, PLAIN_HEX), (INFO_NCE, PLAIN_INFO_NCE)):
            cells += [table.number(case.ms(heap, method)) for method in (ours, plain)]
            cells.append(table.ratio(case.ratio(heap, plain, ours)))
        cells += [table.number(case.peak_mb[method.name]) for method in (HEX, PLAIN_HEX)]
        lines.append(cells)
    print()
    table.show(
        f"The same in ms on other batches: {heap} heap, D = {options.dim}, {options.dtype} where "
        "no dtype is named",
        ["", "cosines", "HEXLoss", "plain", "", "InfoNCELoss", "plain", "", "MB HEXLoss", "plain"],
        lines,
        [
            "tight: 4 classes of cosines about 0.99. half collapsed: every second image in one "
            "direction. collapsed: all of them.",
            "Plain PyTorch widens half precision to float32, as hex does inside.",
        ],
    )


def write(
    options: argparse.Namespace, about: dict[str, Any], tables: dict[str, list[Case]]
) -> None:
    """The options, the machine and every sample, as JSON."""
    content: dict[str, Any] = {"options": vars(options), **about}
    for name, cases in tables.items():
        content[name] = [
            {
                "name": case.name,
                "rows": case.batch.rows,
                "candidates": case.batch.candidates,
                "features": case.batch.z0.shape[1],
                "dtype": str(case.batch.z0.dtype).removeprefix("torch."),
                "mode": case.batch.mode,
                "samples_ms": case.samples_ms,
                "peak_mb": case.peak_mb,
            }
            for case in cases
        ]
    options.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
