# SPDX-License-Identifier: MIT
"""Time and memory of hex against plain PyTorch, torch.compile and other libraries.

    python benchmarks/bench.py            a CPU, about twenty minutes (`make bench`)
    python benchmarks/bench.py --gpu      a GPU, with the kernels built before (`make gpu`)
    python benchmarks/bench.py --gpu sizes queue --seconds 300    ends then, whatever runs
    python benchmarks/bench.py sizes --only "4096, (hex|plain HEX)"
    python benchmarks/bench.py --smoke    tiny batches, to see that it runs; with --gpu too, which
                                          --device cpu rehearses without a GPU
    python benchmarks/bench.py --report   write the tables and pictures of the documents

Every method first computes the loss and the gradient of the very batch it is timed on, and these
have to be right. Another process does the work (worker.py): what crashes, hangs or is wrong has
failed, and the next thing begins. Each result is a line of the record as soon as it is there. With
--gpu the tables are beside it at the end, and the same command goes on where it stopped: what is
there already, of the same card, torch and version, is not measured again, and what failed is tried
again.

How time and memory are measured is in measure.py, what is compared in peers.py, on what in
batches.py, in which parts in parts.py, and how it is shown in report.py and gpu_report.py. --report
shows benchmarks/results.jsonl and benchmarks/gpu_results.jsonl.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hex as it is in this folder

import gpu_report
import parts
import report
from worker import Record, Results, Work, Worker

START = 120  # seconds to find the device


def measure(options: argparse.Namespace, results: Results) -> int:
    """Does what is to do: 0, or 1 where something failed, or 3 where the time is over."""
    named = parts.GPU if options.gpu else parts.CPU
    found = [work for part in options.parts or named for work in named[part](options)]
    cases = [work for work in found if not options.gpu or re.search(options.only, work.name)]
    works = {"start": lambda: parts.start(options), **{work.name: work.do for work in cases}}
    log = results.file.with_suffix(".log")
    log.touch()
    end, failed = time.monotonic() + options.seconds, []
    worker = Worker(log, works)
    try:
        about = worker.do("start", START)
        if not about.get("ok", True):
            print("no start:", about["note"], *about["output"], sep="\n", file=sys.stderr)
            return 1
        results.on = about.pop("on")
        to_do = cases
        if options.gpu:
            results.add("machine", about)
            to_do = [c for state in (None, True) for c in cases if results.failed(c.name) is state]
        while to_do and (left := end - time.monotonic()) > 0:
            work = to_do[0]
            if not options.gpu:
                print(f"{work.name} ...", file=sys.stderr)  # it takes minutes
            record = worker.do(work.name, min(work.limit, left))
            ok = record.get("ok", True)
            if not ok and time.monotonic() >= end:
                break
            if not ok or not options.gpu:
                worker.end()  # what is lost to it, the heap or the device, is not to the next case
                worker = Worker(log, works)
            failed += [work.name] * (not ok)
            results.add(work.name, record)
            say(options, to_do.pop(0), record)
    finally:
        worker.end()
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    for work in to_do:
        if results.failed(work.name) is None:
            print(f"not reached: {work.name}", file=sys.stderr)
    return 3 if to_do else int(bool(failed))


def say(options: argparse.Namespace, work: Work, record: Record) -> None:
    """For who watches."""
    state = "" if record.get("ok", True) else "  FAILED"
    notes = [*record.get("notes", ()), *filter(None, [record.get("note")])]
    if options.gpu:
        notes += [f"{statistics.median(r['ms']):.3g} ms" for r in record.get("results", ())]
    print("  ".join([work.name + state, *notes]), flush=True)
    if "machine" in record:
        print(report.of_part(record), end="\n\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        report.write()
        gpu_report.write()
        return 0
    results = Results(options.record)
    status = measure(options, results)
    if options.gpu:
        records = list(results.records.values())
        options.record.with_suffix(".md").write_text(f"{gpu_report.text(records)}\n")
    print("record:", options.record)
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"Parts: {', '.join(parts.CPU)}. With --gpu: {', '.join(parts.GPU)}.",
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="in this order; default all")
    add("--gpu", action="store_true", help="the parts for a GPU")
    add("--device", help="of --gpu: cuda, the default; cuda:1; cpu for a rehearsal")
    add("--smoke", action="store_true", help="tiny batches, without torch.compile")
    add("--repeats", type=int, default=10, help="turns a method; default 10, fewer of a long call")
    add("--only", default="", metavar="REGEX", help="what 'PART: BATCH, METHOD' has to match")
    add("--seconds", type=float, default=math.inf, help="end after so many, whatever runs")
    add("--record", type=Path, metavar="FILE", help="of the results; default build/bench.jsonl")
    add("--report", action="store_true", help="write the documents from the records in benchmarks/")
    options = parser.parse_args(arguments)
    named = parts.GPU if options.gpu else parts.CPU
    if wrong := [part for part in options.parts if part not in named]:
        parser.error(f"no part {wrong[0]!r}: the parts are {', '.join(named)}")
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, wanted at least 1")
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only: got {options.only!r}, wanted a regular expression: {error}")
    options.device = options.device or ("cuda" if options.gpu else "cpu")
    name = "gpu" if options.gpu else "bench"
    options.record = options.record or parts.ROOT / "build" / f"{name}.jsonl"
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what it started is killed
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for a process that the device does not let go
