# SPDX-License-Identifier: MIT
"""Time and memory of hex against plain PyTorch, torch.compile and other libraries.

    python benchmarks/bench.py              a CPU, about half an hour (`make bench`)
    python benchmarks/bench.py --gpu        a GPU, with the kernels built before (`make gpu`)
    python benchmarks/bench.py sizes --only "4096, (hex|plain HEX)"
    python benchmarks/bench.py --gpu sizes queue --seconds 300      ends then, whatever runs
    python benchmarks/bench.py --smoke      tiny batches, to see that it runs; with --gpu too, which
                                            --device cpu rehearses without a GPU
    python benchmarks/bench.py --report     write the tables and pictures of the documents

Every method first computes the loss and the gradient of the very batch it is timed on, and these
have to be right. Another process does the work: what crashes, hangs or is wrong has failed, and the
next thing begins. Each result is a line of the record as soon as it is there; the tables are beside
the record at the end. With --record FILE a run goes on where FILE ends: what this machine and code
have there already is not measured again, and what failed is tried again.

What is compared is in peers.py, on what in batches.py, in which parts in parts.py; how time and
memory are measured is in measure.py, how works are kept apart in worker.py, and how results are
shown in report.py. What becomes of losses under DDP is in ddp.py, a model of a cluster in cost.py.
--report shows benchmarks/results.jsonl and benchmarks/gpu_results.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hex as it is in this folder

import parts
import report
from worker import Results, Worker

START = 120  # seconds to find the device


def run(options: argparse.Namespace, results: Results) -> int:
    """Does what is to do: 0, or 1 where something failed, or 3 where the time is over."""
    if not (works := list(parts.works(options))):
        print(f"--only: nothing matches {options.only!r}", file=sys.stderr)
        return 2
    does = functools.partial(parts.does, options)
    log = results.file.with_suffix(".log")
    log.touch()
    end, failed = time.monotonic() + options.seconds, False
    worker = Worker(log, does)
    try:
        machine = worker.do("machine", min(START, options.seconds))
        if not machine.get("ok", True):
            print("cannot start:", machine["note"], *machine["output"], sep="\n", file=sys.stderr)
            return 1
        rehearsal = options.smoke or (options.gpu and options.device == "cpu")
        results.on = machine.pop("on") + ", a rehearsal" * rehearsal
        results.add("machine", machine)
        to_do = [work for ok in (None, False) for work in works if results.ok(work) is ok]
        while to_do and (left := end - time.monotonic()) > 0:
            work = to_do[0]
            print(work.name, end="", flush=True)
            record = worker.do(work.name, min(work.limit, left))
            ok = record.get("ok", True)
            if not ok and time.monotonic() >= end:
                print(flush=True)
                break
            results.add(work.name, {"asked": work.asked, **record})
            print("" if ok else f"  FAILED: {record['note']}", flush=True)
            failed |= not ok
            to_do.pop(0)
            if to_do and (not ok or not options.gpu):
                worker.end()  # what is lost to it, the heap or the device, is not to the next work
                worker = Worker(log, does)
    finally:
        worker.end()
    for work in to_do:
        if results.ok(work) is None:
            print(f"not reached: {work.name}", file=sys.stderr)
    return 3 if to_do else int(failed)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        report.write()
        return 0
    try:
        results = Results(options.record)
    except (OSError, ValueError) as error:
        print(f"--record {options.record}: {error}", file=sys.stderr)
        return 2
    try:
        status = run(options, results)
    except KeyboardInterrupt:
        print(flush=True)
        status = 130
    if results.on:
        tables = report.text([r for r in results.records.values() if r["on"] == results.on])
        options.record.with_suffix(".md").write_text(tables)
        print(tables, f"record: {options.record}", sep="\n")
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=f"Parts: {', '.join(parts.CPU)}. With --gpu: {', '.join(parts.GPU)}.",
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="what to measure, in this order (default: all)")
    add("--gpu", action="store_true", help="run the parts for a GPU")
    add("--device", help="with --gpu: cuda (default), cuda:1, or cpu for a rehearsal")
    add("--smoke", action="store_true", help="use tiny batches and no torch.compile")
    add("--repeats", type=int, default=10, help="how often to time a method (default 10)")
    add(
        "--only",
        default="",
        metavar="REGEX",
        help="run only what this finds in 'PART: BATCH, METHOD'",
    )
    add("--seconds", type=float, default=math.inf, help="stop after so many, even during a run")
    add("--record", type=Path, metavar="FILE", help="file to continue (default: new, in build/)")
    add("--report", action="store_true", help="write the documents from the records in benchmarks/")
    options = parser.parse_args(arguments)
    known = parts.GPU if options.gpu else parts.CPU
    if wrong := [part for part in options.parts if part not in known]:
        parser.error(f"no part {wrong[0]!r}: the parts are {', '.join(known)}")
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, wanted at least 1")
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only: got {options.only!r}, wanted a regular expression: {error}")
    if options.device and not options.gpu:
        parser.error(f"--device: got {options.device} without --gpu, wanted --gpu with it")
    options.device = options.device or ("cuda" if options.gpu else "cpu")
    if options.record is None:
        name = time.strftime(f"{'gpu' if options.gpu else 'bench'}-%Y%m%d-%H%M%S.jsonl")
        options.record = Path(__file__).resolve().parents[1] / "build" / name
    if options.record.suffix != ".jsonl":
        parser.error(f"--record: got {str(options.record)!r}, wanted a name with .jsonl at the end")
    return options


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # and all it started ends
    status = main()
    end = threading.Timer(10, os._exit, [status])  # should the device not let go of a process
    end.daemon = True
    end.start()
    sys.exit(status)
