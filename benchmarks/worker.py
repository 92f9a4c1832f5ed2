# SPDX-License-Identifier: MIT
"""Work done in another process, one thing after another, each within its limit; and its records.

What takes the process down, or is not done in time, has failed: the process is killed, with all
that it started. What that tells of where it was is in the log, whose end stands in the record.
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
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Work(NamedTuple):
    name: str  # "part" or "part: " and what says all
    limit: float  # seconds
    do: Callable[[], Record]


class Results:
    """What a file has already, and a line for each new record; of a case the last one counts."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.on = file, ""  # machine, torch and code of what is added
        text = file.read_text() if file.exists() else ""
        if text and not text.endswith("\n"):  # a line that was cut off ends here, too
            file.write_text(f"{text}\n")
        self.records = read(text)

    def add(self, case: str, record: Record) -> None:
        self.records[self.on, case] = record = {"on": self.on, **record, "case": case}
        with self.file.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def failed(self, case: str) -> bool | None:
        """None where there is no result."""
        record = self.records.get((self.on, case))
        return None if record is None else not record.get("ok", True)


def read(text: str) -> dict[tuple[str, str], Record]:
    """The records by machine and case, the newest last."""
    records: dict[tuple[str, str], Record] = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # cut off
            record = json.loads(line)
            key = record.get("on", ""), record.get("case") or record["part"]
            records.pop(key, None)
            records[key] = record
    return records


class Worker:
    """The process."""

    def __init__(self, log: Path, works: Mapping[str, Callable[[], Record]]) -> None:
        # This process has torch and never asks for the device, which a fork would not survive.
        fork = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(1, fork, initializer=_alone, initargs=(log, works))
        self.pid = self.pool.submit(os.getpid).result()
        self.log = log

    def do(self, work: str, limit: float) -> Record:
        """The record; of what fails also a reason and the end of the log."""
        log_at = self.log.stat().st_size
        try:
            record = self.pool.submit(_attempt, work).result(limit)
        except concurrent.futures.TimeoutError:
            record = {"ok": False, "note": f"not done within {limit:g} s"}
            with contextlib.suppress(ProcessLookupError):  # where it is goes into the log
                os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.5)
        except BrokenProcessPool:
            record = {"ok": False, "note": "its process ended"}
        if not record.get("ok", True):
            said = self.log.read_bytes()[log_at:].decode(errors="replace")
            record["output"] = said.splitlines()[-60:]
        return record

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.pool.shutdown(wait=False, cancel_futures=True)


_works: Mapping[str, Callable[[], Record]] = {}  # in the process; few of them could be pickled


def _alone(log: Path, works: Mapping[str, Callable[[], Record]]) -> None:
    """Leads a process group that can be killed as one, and writes all its output to the log.

    Only descriptors 1 and 2 are used. A pipe of the worker before, which another thread was closing
    at the moment of the fork, may be closed here once more, under a number that is a new file's.
    """
    global _works
    _works = works
    os.setsid()
    gc.freeze()  # or every collection would go through all that was imported
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout = sys.stderr = open(2, "a", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.disable()  # else enable() would leave the handlers of signals as they are
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)


def _attempt(work: str) -> Record:
    utc = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M")
    load, begin = os.getloadavg()[0], time.perf_counter()
    try:
        record = _works[work]()
    except Exception as error:
        traceback.print_exc()
        record = {"ok": False, "note": f"{type(error).__name__}: {error}"[:500]}
    seconds = round(time.perf_counter() - begin, 1)
    loads = [round(load, 1), round(os.getloadavg()[0], 1)]
    return record | {"utc": utc, "seconds": seconds, "load": loads}
