# SPDX-License-Identifier: MIT
"""All that a GPU has to show, by one command: tests, sanitizers, times, memory, a training run.

    python benchmarks/gpu.py                       all steps, about an hour; builds first
    python benchmarks/gpu.py sizes queue report    some of them, in this order; builds nothing
    python benchmarks/gpu.py --seconds 300         ends then, whatever runs; again: goes on
    python benchmarks/gpu.py --device cpu --smoke  the same code at tiny sizes, without a GPU

Another process does the work, case by case. A case that takes it down, or is not done within its
limit, has failed: the process is killed, with all that it started, and the next case has a new one.
Each result is a line of FOLDER/results.jsonl as soon as it is there, under the card, torch and hex
that it is of, and is not measured again there. The last step, report, makes of them tables,
report.md, and pictures of time and memory against N; `--docs` puts these into docs/. Where there
are no results it takes those of the repository, benchmarks/gpu_results.jsonl. What the cases are is
in gpu_steps.py, what is measured in gpu_methods.py, how it is shown in gpu_report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gpu_report
import gpu_steps
from gpu_steps import ROOT, Case, Record

FORK = multiprocessing.get_context("fork")  # this process has neither torch nor the device
START, BUILD = 120, 900  # seconds to find the device; the same, with the kernels to build
ENDED = "its process ended"


class Results:
    """results.jsonl: what is there already, and a line for each new record."""

    def __init__(self, folder: Path, again: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log = folder / "results.jsonl", folder / "log.txt"
        if again:
            self.file.unlink(missing_ok=True)
        self.log.touch()
        text = self.file.read_text() if self.file.exists() else ""
        if text and not text.endswith("\n"):  # a line that was cut off ends here, too
            self.file.write_text(f"{text}\n")
        self.on = ""  # card, torch and hex of what is added
        self.tried: list[str] = []  # what was added here
        self.records = gpu_report.read(text)

    def add(self, case: str, record: Record) -> Record:
        self.records[self.on, case] = record = {"on": self.on, "case": case, **record}
        with self.file.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.tried.append(case)
        return record

    def failed(self, case: str) -> bool | None:
        """None where there is no result."""
        record = self.records.get((self.on, case))
        return None if record is None else not record.get("ok", True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.calls:
        import gpu_methods

        gpu_methods.calls(options.device)
        return 0
    results = Results(options.out, options.again)
    end = time.monotonic() + options.seconds
    status: int | None = 0 if options.steps == ["report"] else None
    while status is None:
        status, open_ = one_process(options, results, end)
        if status is not None and results.on:
            left_over(results, open_)
    failed = [case for case in results.tried if results.failed(case)]
    for case in failed:
        print(f"failed: {case}", file=sys.stderr)
    if "report" in options.steps:
        records = results.records or gpu_report.read(gpu_report.RECORD.read_text())
        files = gpu_report.write(list(records.values()), options.out)
        if options.docs:
            files += gpu_report.into_docs(options.out, ROOT / "docs")
        print("report:", *files)
    return status or bool(failed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    steps = ["build", *gpu_steps.STEPS, "report"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help=", ".join(steps))
    add("--out", type=Path, default=ROOT / "build/gpu", metavar="FOLDER", help="of the results")
    add("--device", default="cuda", help="cuda, cuda:1, or cpu for a rehearsal")
    add("--seconds", type=float, default=math.inf, help="end after so many, whatever runs")
    add("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    add("--again", action="store_true", help="forget the results that are there")
    add("--cifar", type=Path, metavar="FOLDER", help="of CIFAR-10, for the training run")
    add("--calls", action="store_true", help="a few calls of each kernel, for the sanitizer")
    add("--docs", action="store_true", help="let report write into docs/cuda.md and docs/images")
    options = parser.parse_args(arguments)
    for step in options.steps:
        if step not in steps:
            parser.error(f"STEP: got {step!r}, wanted one of {', '.join(steps)}")
    options.steps = options.steps or steps
    return options


def say(record: Record) -> None:
    """A line for who watches."""
    shown = (f"{k} {v:.3g}" for k, v in record.items() if isinstance(v, float) and k != "seconds")
    state = "" if record.get("ok", True) else "  FAILED"
    why = record.get("skipped") or record.get("note") or ""
    print("  ".join((record["case"] + state, *shown, why)).rstrip(), flush=True)


# ---- the process that measures ------------------------------------------------------------------


def work(options: argparse.Namespace, results: Results, tell: Connection) -> None:
    """Does what is to do, and tells: what is here; the cases; of each its limit, then its record.

    With the limit goes the place in the log from which on it is the case that speaks.
    """
    os.setsid()  # a group to kill
    log = results.log.open("a", buffering=1)
    sys.stdout = sys.stderr = log
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log)
    about = gpu_steps.start(options)
    results.on = about["on"]
    tell.send(about)
    cases = to_do(options, results)
    tell.send([case.name for case in cases])
    for case in cases:
        tell.send((case.name, case.limit, results.log.stat().st_size))
        begin = time.perf_counter()
        record = attempt(case)
        tell.send(record | {"seconds": time.perf_counter() - begin})
        if "CUDA error" in record.get("note", ""):
            return  # the device is lost to this process


def to_do(options: argparse.Namespace, results: Results) -> list[Case]:
    """What has no result yet; then what failed when it was tried before."""
    made = (gpu_steps.STEPS[step](options) for step in options.steps if step in gpu_steps.STEPS)
    cases = [case for step in made for case in step if case.name not in results.tried]
    return [
        case for failed in (None, True) for case in cases if results.failed(case.name) is failed
    ]


def attempt(case: Case) -> Record:
    """The record; of an error, what it says: the other cases may yet be right."""
    try:
        return case.work()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        return {"ok": False, "note": text, "output": traceback.format_exc().splitlines()[-30:]}


# ---- the process that watches it ----------------------------------------------------------------


def one_process(
    options: argparse.Namespace, results: Results, end: float
) -> tuple[int | None, list[str]]:
    """Starts one, writes down what it tells, and ends it.

    The status, None where another process should go on; and the cases that have no result.
    """
    log_at = results.log.stat().st_size
    hear, tell = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(options, results, tell))
    process.start()
    tell.close()

    def told(limit: float) -> Any:
        if not hear.poll(max(0, min(limit, end - time.monotonic()))):
            raise TimeoutError(f"not done within {limit:g} s")
        return hear.recv()  # EOFError where the process has ended

    limit = BUILD if "build" in options.steps else START
    case, open_, note = "start", [], ""
    try:
        about = told(limit)
        results.on = about["on"]
        before = results.records.get((results.on, "machine"), {})
        if before | about != before:
            results.add("machine", about)
        open_ = told(limit)
        while open_:
            case, limit, log_at = told(START)
            say(results.add(case, told(limit)))
            open_.remove(case)
    except (TimeoutError, EOFError) as error:
        note = str(error) or ENDED
    finally:
        gone = kill(process, bool(note))
    if not gone:
        print("a process cannot be killed: the device hangs", file=sys.stderr)
    if note and time.monotonic() >= end:
        print(f"{options.seconds:g} s are over: the same command goes on", file=sys.stderr)
        return 3, open_
    said = results.log.read_bytes()[log_at:].decode(errors="replace").splitlines()[-100:]
    if note and case == "start":
        print(f"no start: {note}", *said, sep="\n", file=sys.stderr)
        return 1, open_
    if case in open_:
        note += f", {ending(process.exitcode)}" if note == ENDED else ""
        say(results.add(case, {"ok": False, "note": note, "output": said}))
        open_.remove(case)
    return (1 if not gone else None if open_ else 0), open_


def ending(status: int | None) -> str:
    return signal.Signals(-status).name if status and status < 0 else f"status {status}"


def kill(process: BaseProcess, late: bool) -> bool:
    """Whether it is gone, with all that it started."""
    assert process.pid is not None
    if late:  # where it is goes into the log
        os.kill(process.pid, signal.SIGUSR1)
        process.join(0.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)
    return process.exitcode is not None


def left_over(results: Results, open_: list[str]) -> None:
    """Writes down what was not reached, now or before."""
    before = results.records.get((results.on, "not reached"), {}).get("cases", [])
    cases = [c for c in dict.fromkeys([*before, *open_]) if results.failed(c) is None]
    results.add("not reached", {"cases": cases})
    if cases:
        print(gpu_report.not_reached(cases), file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # hex as it is in this folder, built or not
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what it started is killed
    sys.exit(main())
