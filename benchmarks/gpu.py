# SPDX-License-Identifier: MIT
"""Tests and measures the CUDA kernels in a quarter of an hour, what matters most first.

    python benchmarks/gpu.py --prepare      where nvcc is, without a GPU: build what is carried
    python benchmarks/gpu.py                on the GPU; it compiles nothing and ends after 540 s
    python benchmarks/gpu.py tests ncu      these stages, after those that all others need
    python benchmarks/gpu.py --rehearse     on a CPU, with stages planted that hang and crash

--prepare fills build/gpu/, the only thing to carry beside the sources: a library for each of
HEX_CUDA_ARCH (by default 90a, which is Hopper with all its instructions, and 90, which has mma.sync
only), the primitives of each (tests/emulation/conformance.cu), the extension, and a manifest.

Each stage is a process group that is killed at its limit with all it started. After a stage that
failed a small operation has to succeed on the device, or the run ends; it ends, too, where a stage
fails without which the rest would say nothing. The first library whose primitives are right is put
into hex/ and serves the other stages.

A stage is a line of the record as soon as it ends, and names card and code; tests and measurements
have lines of their own. With --record FILE a run goes on where FILE ends: what this card and code
have there already is not done again, and what failed is. What the stages do is in gpu_stages.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import carried
from carried import ROOT
from worker import Results

LEAST = 5  # seconds that are worth while for a stage
LINES = 60  # of a stage's output, in the record of its failure
SECONDS = "SECONDS"  # in a command: how many it has
PROBES = {"cuda": "import torch; torch.ones(1, device='cuda').sum().item()", "cpu": ""}

# ---- the stages ----------------------------------------------------------------------------------


class Stage(NamedTuple):
    name: str
    limit: float  # seconds
    command: Sequence[str]
    gate: bool = False  # where it fails the run ends
    asked: str = ""  # as a Work's


FIRST = ("manifest", "conformance")  # so the names of those begin that all others need


def stages(device: str, builds: Sequence[str], record: Path, seconds: float) -> list[Stage]:
    """In order."""

    def python(script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name(script)), *arguments]

    def bench(*arguments: str) -> list[str]:
        smoke = ["--device", device, "--smoke"] if device == "cpu" else []
        options = ["--gpu", "--record", str(record), "--seconds", SECONDS]
        return python("bench.py", *options, *smoke, *arguments)

    goals = r": (256|1024|4096|8192|32768|34000|65536) x \d+, hex HEXLoss"
    peers = ["sizes", "--only", "1024 x"] if device == "cpu" else []
    return [
        Stage("manifest", 45, python("gpu_stages.py", "manifest"), gate=True),
        *(
            Stage(f"conformance {build}", 20, python("gpu_stages.py", "conformance", build))
            for build in builds
        ),
        Stage("first step", 40, python("gpu_stages.py", "first_step"), gate=True),
        Stage("battery", 40, python("gpu_stages.py", "battery"), gate=True),
        Stage("battery of sets", 60, python("gpu_stages.py", "battery_of_sets")),
        Stage("goals", 65, bench("queue", "sizes", "--only", goals)),
        Stage("kernels", 25, python("gpu_stages.py", "kernels")),
        Stage("tests", 110, python("gpu_stages.py", "tests")),
        Stage("sanitizers", 90, python("gpu_stages.py", "sanitizers")),
        Stage("ncu", 60, python("gpu_stages.py", "ncu")),
        Stage("peers", seconds, bench(*peers)),
    ]


def planted() -> list[Stage]:
    """What a rehearsal has besides. All but the last fail; its child outlives it."""
    child = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session={}); "
    deaf = "trap '' TERM INT HUP ABRT; while :; do sleep 0.1; done"
    return [
        Stage("hangs", 1, [sys.executable, "-c", child.format(True) + "time.sleep(600)"]),
        Stage("crashes", 10, [sys.executable, "-c", "import os; os.abort()"]),
        Stage("deaf to SIGTERM", 1, ["bash", "-c", deaf]),
        Stage("leaves a child", 10, [sys.executable, "-c", child.format(False)]),
    ]


# ---- the supervisor ------------------------------------------------------------------------------


class Run:
    """Stages one after another, each within its limit and none of it left behind."""

    def __init__(self, results: Results, seconds: float, device: str) -> None:
        self.results, self.end, self.device = results, time.monotonic() + seconds, device
        self.log = results.file.with_suffix(".log")
        self.about: dict[str, str] = {}  # what stands in each record
        mark = f"{os.getpid()}.{time.time_ns()}"
        self.mark = f"HEX_GPU_RUN={mark}".encode()
        cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        self.environment = os.environ | {
            "HEX_GPU_RUN": mark, "HEX_GPU_RECORD": str(results.file), "HEX_GPU_ON": results.on,
            "HEX_GPU_DEVICE": device, "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT}/tests:{os.environ.get('PYTHONPATH', '')}",
            "PATH": f"{os.environ['PATH']}:{cuda}/bin",
        }  # fmt: skip

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def do(self, stage: Stage) -> bool:
        """Whether it is done; the record says more."""
        begin, limit = time.monotonic(), min(stage.limit, self.left)
        utc = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
        print(f"{stage.name:<24}", end="", flush=True)
        command = [str(max(1, round(limit) - 4)) if x == SECONDS else x for x in stage.command]
        with self.log.open("ab") as log:
            log.write(f"\n---- {stage.name}\n".encode())
            log.flush()
            log_at = log.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                env=self.environment, start_new_session=True,
            )  # fmt: skip
        note = ""
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            note = f"not done within {limit:.0f} s"
            os.killpg(process.pid, signal.SIGABRT)  # Python writes into the log where it hangs
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        finally:
            note += self.kill(process)  # also what is left of one that ended
        if not note and process.returncode:
            note = f"ended with {process.returncode}"
        record = {"utc": utc, "seconds": round(time.monotonic() - begin, 1), "ok": not note}
        if note:
            with self.log.open("rb") as log:
                log.seek(log_at)
                lines = log.read().decode(errors="replace").splitlines()[-LINES:]
            record |= {"note": note, "output": lines}
        self.results.add(stage.name, {"asked": stage.asked, **self.about, **record})
        print(f"{'FAILED' if note else 'ok':<7}{record['seconds']:6.1f} s  {note}", flush=True)
        for line in record.get("output", ())[-12:]:
            print(f"    {line}", flush=True)
        return not note

    def kill(self, process: subprocess.Popen[bytes]) -> str:
        """It and all it started, in other sessions too, for these have its environment. What is to
        be noted of that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for _ in range(5):  # one may just be starting another
            found = [*self.alive()]
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not found:
                break
            time.sleep(0.05)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            return "; it cannot be killed: the driver does not let go of it"
        return ""

    def alive(self) -> Iterator[int]:
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # another user's, or just ended
                if folder.name.isdigit() and self.mark in (folder / "environ").read_bytes():
                    yield int(folder.name)


def supervise(options: argparse.Namespace) -> int:
    """0, or 1 where something failed, or 3 where something was not reached."""
    device = "cpu" if options.rehearse else "cuda"
    if not (card := "a CPU" if options.rehearse else carried.asked_of_card("name")):
        print("nvidia-smi finds no GPU; use --rehearse on a CPU", file=sys.stderr)
        return 1
    builds = carried.manifest(options.carried)["builds"]
    code = carried.code(options.carried)
    if options.build:
        builds, code = [options.build], f"{code}, {options.build} alone"
    results = Results(options.record)
    results.on = f"{card}, hex-ssl at {code}" + ", a rehearsal" * options.rehearse
    print(results.on, flush=True)
    run = Run(results, options.seconds, device)
    run.environment |= {"HEX_GPU_CARRIED": str(options.carried), "HEX_COMMIT": code}
    plan = stages(device, builds, options.record, options.seconds)
    if options.rehearse:
        plan[1:1] = planted()
    else:
        carried.put(options.carried / "_C.abi3.so", ROOT / "hex" / "_C.abi3.so")
    known = [stage.name for stage in plan]
    if wrong := [name for name in options.stages if name not in known]:
        print(f"no stage {wrong[0]!r}: the stages are {', '.join(known)}", file=sys.stderr)
        return 2
    wanted = options.stages or known
    to_do = [s for s in plan if s.name in wanted or s.name.startswith(FIRST)]
    stale = "manifest" if any(carried.changed(options.carried)) else ""  # since it was done
    to_do = [stage for stage in to_do if not results.ok(stage) or stage.name == stale]
    failed = work_through(run, to_do, lambda: choose(run, builds, options))
    for stage in to_do:
        print(f"not reached: {stage.name}", file=sys.stderr)
    if (tables := options.record.with_suffix(".md")).exists():  # of bench.py
        print(tables.read_text())
    print(f"record: {options.record}")
    if options.rehearse:
        failed = [stage for stage in failed if stage not in planted()]
    return 1 if failed else 3 if to_do else 0


def work_through(run: Run, to_do: list[Stage], has_library: Callable[[], bool]) -> list[Stage]:
    """What of it failed; what was not reached is left in the list."""
    failed = []
    while to_do and run.left > LEAST:
        stage = to_do[0]
        if not (stage.name.startswith(FIRST) or stage in planted() or has_library()):
            print("stopped: no library passes the tests of its primitives", flush=True)
            break
        to_do.pop(0)
        if run.do(stage):
            continue
        failed.append(stage)
        if stage.gate:
            print("stopped: the other stages rely on this one", flush=True)
            break
        probe = Stage(f"probe: {stage.name}", 15, [sys.executable, "-c", PROBES[run.device]])
        if run.left > LEAST and not run.do(probe):
            print("stopped: the device no longer answers", flush=True)
            break
    return failed


def choose(run: Run, builds: Sequence[str], options: argparse.Namespace) -> bool:
    """Puts the first library whose primitives are right into hex/, and has the tests use them."""
    for build in builds:
        if run.results.ok(Stage(f"conformance {build}", 0, ())):
            run.about = {"build": build}
            primitives = options.carried / f"conformance_{build}.so"
            run.environment["HEX_CONFORMANCE"] = str(primitives)
            if not options.rehearse:
                carried.put(options.carried / f"cuda_{build}.so", ROOT / "hex" / "_cuda.so")
            return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    known = ", ".join(s.name for s in stages("", carried.BUILDS.split(","), Path(), 0))
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"Stages: {known}."
    )
    add = parser.add_argument
    add("stages", nargs="*", metavar="STAGE", help="default: all; quote a name that has a space")
    add("--prepare", action="store_true", help="build the libraries; needs nvcc, but no GPU")
    add("--rehearse", action="store_true", help="run on a CPU, as a rehearsal")
    add("--build", metavar="ARCH", help="use only the library for this architecture, such as 90")
    add("--seconds", type=float, default=540, help="stop after so many (default: %(default)s)")
    add("--record", type=Path, metavar="FILE", help="file to continue (default: new, in build/)")
    add("--carried", type=Path, default=carried.FOLDER, metavar="DIR",
        help="the folder of the libraries (default: build/gpu)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.carried = options.carried.resolve()
    if options.prepare:
        return carried.prepare(options.carried)
    if not (options.carried / "manifest.json").exists():
        parser.error(f"{options.carried} has no manifest; run --prepare first, where nvcc is")
    if options.build and options.build not in carried.manifest(options.carried)["builds"]:
        parser.error(f"--build: got {options.build}, which {options.carried} has no library for")
    name = time.strftime("gpu-run-%Y%m%d-%H%M%S.jsonl")
    options.record = (options.record or ROOT / "build" / name).resolve()
    return supervise(options)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # and its stage ends
    sys.exit(main())
