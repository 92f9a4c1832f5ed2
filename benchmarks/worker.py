# SPDX-License-Identifier: MIT
"""Work done in another process, one thing after another, each within its limit; and its records.

What takes the process down, or is not done in time, has failed: the process is killed with all that
it started. The end of the log, which stands in the record then, tells where it was.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

# Not "fork": in a forked process hex computes on one thread (csrc/parallel.c).
START_METHOD = "spawn"
IMPORTS = 120  # seconds to import torch and the rest

Record = dict[str, Any]
Works = Callable[[], Mapping[str, Callable[[], Record]]]  # made in the process


class Work(NamedTuple):
    name: str  # "part", or "part: " and what it measures
    limit: float  # seconds
    do: Callable[[], Record]
    asked: str = ""  # what else makes it another work


class Results:
    """The records of a file, and a line for each new one. Of a work the last one counts."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.on = file, ""  # on: the machine and the code of what is added
        text = file.read_text() if file.exists() else ""
        if text and not text.endswith("\n"):  # a line that was cut off ends here, too
            file.write_text(f"{text}\n")
        self.records = read(text)

    def add(self, name: str, record: Record) -> None:
        record = {"on": self.on, "name": name, **record}
        self.records.pop((self.on, name), None)  # it comes last
        self.records[self.on, name] = record
        append(self.file, record)

    def ok(self, work: Work) -> bool | None:
        """None where there is no result."""
        record = self.records.get((self.on, work.name))
        return record.get("ok", True) if record and record.get("asked") == work.asked else None


def append(file: Path, record: Record) -> None:
    """A line that is on the disk when this returns."""
    with file.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def read(text: str) -> dict[tuple[str, str], Record]:
    """The records by machine and name, the newest last; ValueError where a line is no record."""
    records: dict[tuple[str, str], Record] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off
        if not isinstance(record, dict) or not record.keys() >= {"on", "name"}:
            raise ValueError(f"line {number} is no record of this benchmark: {line[:60]}")
        records.pop((record["on"], record["name"]), None)
        records[record["on"], record["name"]] = record
    return records


class Worker:
    """The process."""

    def __init__(self, log: Path, works: Works) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self.pool = ProcessPoolExecutor(1, context, initializer=_alone, initargs=(log, works))
        self.pid = self.pool.submit(os.getpid).result(IMPORTS)
        self.log = log

    def do(self, name: str, limit: float) -> Record:
        """The record. That of what fails has "ok": False, a reason and the end of the log."""
        log_at = self.log.stat().st_size
        try:
            record = self.pool.submit(_attempt, name, limit).result(limit + 1)
        except concurrent.futures.TimeoutError:
            record = {"ok": False, "note": f"not done within {limit:g} s"}
        except BrokenProcessPool:
            record = {"ok": False, "note": "its process ended"}
        if not record.get("ok", True):
            said = self.log.read_bytes()[log_at:].decode(errors="replace")
            record["output"] = said.splitlines()[-100:]
        return record

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.pool.shutdown(wait=False, cancel_futures=True)


_works: Mapping[str, Callable[[], Record]] = {}  # in the process, for few of them can be pickled


def _alone(log: Path, works: Works) -> None:
    """Leads a process group that can be killed as one, and writes all its output to the log."""
    global _works
    _works = works()
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # or every collection would go through all that was imported
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = open(2, "a", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.disable()  # else enable() would leave the handlers of signals as they are
    faulthandler.enable(2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _attempt(name: str, limit: float) -> Record:
    utc = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M")
    load, begin = os.getloadavg()[0], time.perf_counter()
    faulthandler.dump_traceback_later(limit, file=2)  # where it hangs goes into the log
    try:
        record = _works[name]()
    except Exception as error:
        traceback.print_exc()
        record = {"ok": False, "note": f"{type(error).__name__}: {error}"[:500]}
    faulthandler.cancel_dump_traceback_later()
    seconds = round(time.perf_counter() - begin, 1)
    return record | {"utc": utc, "seconds": seconds, "load": [load, os.getloadavg()[0]]}
