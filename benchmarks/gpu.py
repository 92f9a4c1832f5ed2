# SPDX-License-Identifier: MIT
"""All that a GPU has to show, by one command: tests, sanitizers, times, memory.

    python benchmarks/gpu.py                       all steps, about an hour; builds first
    python benchmarks/gpu.py sizes queue report    some of them, in this order; builds nothing
    python benchmarks/gpu.py --seconds 300         ends then, whatever runs; again: goes on
    python benchmarks/gpu.py --device cpu --smoke  the same code at tiny sizes, without a GPU

Another process does the work, case by case. A case that takes it down, or is not done within its
limit, has failed: the process is killed, with all that it started, and the next case has a new one.
Each result is a line of FOLDER/results.jsonl as soon as it is there, under the card, torch and hex
that it is of, and is not measured again there. The last step, report, makes of them tables,
report.md, and a picture of time and memory against N; `--docs` puts these into docs/. Where there
are no results it takes those of the repository, benchmarks/gpu_results.jsonl. What the cases are is
in gpu_cases.py, how they are shown in gpu_report.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import faulthandler
import functools
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hex as it is in this folder

import gpu_cases
import gpu_report
import tables
from gpu_cases import ROOT, Case, Record

START, BUILD = 120, 900  # seconds to find the device; the same, with the kernels to build


class Results:
    """results.jsonl: what is there already, and a line for each new record."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log = folder / "results.jsonl", folder / "log.txt"
        self.log.touch()
        text = self.file.read_text() if self.file.exists() else ""
        if text and not text.endswith("\n"):  # a line that was cut off ends here, too
            self.file.write_text(f"{text}\n")
        self.on = ""  # card, torch and hex of what is added
        self.records = gpu_report.read(text)

    def add(self, case: str, record: Record) -> None:
        self.records[self.on, case] = record = {"on": self.on, "case": case, **record}
        with self.file.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def failed(self, case: str) -> bool | None:
        """None where there is no result."""
        record = self.records.get((self.on, case))
        return None if record is None else not record.get("ok", True)


class Worker:
    """A process that does one thing after another, and is killed with all that it started."""

    def __init__(self, log: Path) -> None:
        # This process has torch and never asks for the device, which a fork would not survive.
        fork = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(1, fork, initializer=_alone, initargs=(log,))
        self.pid = self.pool.submit(os.getpid).result()
        self.log = log

    def do(self, limit: float, work: Callable[[], Record]) -> Record:
        """The record; of what fails the reason, and where that is not told, the end of the log."""
        log_at = self.log.stat().st_size
        try:
            return self.pool.submit(_attempt, work).result(limit)
        except concurrent.futures.TimeoutError:
            note = f"not done within {limit:g} s"
            with contextlib.suppress(ProcessLookupError):  # where it is goes into the log
                os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.5)
        except BrokenProcessPool:
            note = "its process ended"
        said = self.log.read_bytes()[log_at:].decode(errors="replace").splitlines()
        return {"ok": False, "note": note, "output": said[-100:]}

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.pool.shutdown(wait=False, cancel_futures=True)


def _alone(log: Path) -> None:
    """Leads a process group that can be killed as one, and writes all its output to the log.

    Only descriptors 1 and 2 are used. A pipe of the worker before, which another thread was closing
    at the moment of the fork, may be closed here once more, under a number that is a new file's.
    """
    os.setsid()
    gc.freeze()  # or every collection would go through all that was imported
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = open(2, "a", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)


def _attempt(work: Callable[[], Record]) -> Record:
    begin = time.perf_counter()
    try:
        record = work()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        record = {"ok": False, "note": text, "output": traceback.format_exc().splitlines()[-30:]}
    return record | {"seconds": time.perf_counter() - begin}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    results = Results(options.out)
    status = 0 if options.steps == ["report"] else measure(options, results)
    if "report" in options.steps:
        records = results.records or gpu_report.read(gpu_report.RECORD.read_text())
        write(list(records.values()), options)
    return status


def write(records: list[Record], options: argparse.Namespace) -> None:
    text, file = gpu_report.text(records), options.out / "report.md"
    file.write_text(f"{text}\n")
    pictures = [options.out / "report.png", *[gpu_report.PICTURE] * options.docs]
    for picture in pictures:
        gpu_report.picture(records, picture)
    if options.docs:
        tables.fill(gpu_report.DOCUMENT, {"gpu": lambda: text})
    print("report:", file, *pictures)


def measure(options: argparse.Namespace, results: Results) -> int:
    """Does what is to do: 0, or 1 where something failed, or 3 where the time is over."""
    end, failed = time.monotonic() + options.seconds, []
    worker = Worker(results.log)
    try:
        limit = BUILD if "build" in options.steps else START
        about = worker.do(limit, functools.partial(gpu_cases.start, options))
        if not about.pop("ok", True):
            print("no start:", about["note"], *about["output"], sep="\n", file=sys.stderr)
            return 1
        del about["seconds"]
        results.on = about["on"]
        results.add("machine", about)
        cases = to_do(options, results)
        while cases and (left := end - time.monotonic()) > 0:
            case = cases[0]
            record = worker.do(min(case.limit, left), case.work)
            if not record.get("ok", True):
                if time.monotonic() >= end:
                    break
                failed.append(case.name)
                worker.end()  # what is lost to it, or the device, is not to the next case
                worker = Worker(results.log)
            results.add(cases.pop(0).name, record)
            say(results.records[results.on, case.name])
    finally:
        worker.end()
    open_ = [case.name for case in cases if results.failed(case.name) is None]
    results.add("not reached", {"cases": open_})
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    if open_:
        print(gpu_report.not_reached(open_), "The same command goes on.", file=sys.stderr)
    return 3 if cases else int(bool(failed))


def to_do(options: argparse.Namespace, results: Results) -> list[Case]:
    """What has no result yet; then what failed when it was tried before."""
    made = (gpu_cases.STEPS[step](options) for step in options.steps if step in gpu_cases.STEPS)
    cases = [case for step in made for case in step]
    return [
        case for failed in (None, True) for case in cases if results.failed(case.name) is failed
    ]


def say(record: Record) -> None:
    """A line for who watches."""
    shown = (f"{k} {v:.3g}" for k, v in record.items() if isinstance(v, float) and k != "seconds")
    state = "" if record.get("ok", True) else "  FAILED"
    why = record.get("skipped") or record.get("note") or ""
    print("  ".join((record["case"] + state, *shown, why)).rstrip(), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    steps = ["build", *gpu_cases.STEPS, "report"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help=", ".join(steps))
    add("--out", type=Path, default=ROOT / "build/gpu", metavar="FOLDER", help="of the results")
    add("--device", default="cuda", help="cuda, cuda:1, or cpu for a rehearsal")
    add("--seconds", type=float, default=math.inf, help="end after so many, whatever runs")
    add("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    add("--docs", action="store_true", help="let report write into docs/cuda.md and docs/images")
    options = parser.parse_args(arguments)
    for step in options.steps:
        if step not in steps:
            parser.error(f"STEP: got {step!r}, wanted one of {', '.join(steps)}")
    options.steps = options.steps or steps
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what it started is killed
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for a process that the device does not let go
