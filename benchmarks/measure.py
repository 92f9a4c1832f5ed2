# SPDX-License-Identifier: MIT
"""Time, memory and heap of this process, and the machine it runs on. Linux with glibc.

Time. torch.utils.benchmark repeats a fast call until the clock can tell its time. On a busy machine
the wall clock shows the neighbours, so with one thread the clock is the CPU time of the process,
which repeats within a few per cent. With several threads that is their sum, waiting included, and
says nothing about how long the user waits: then the wall clock is read. With a GPU
torch.utils.benchmark waits for the device first. Methods take turns, so that a slow minute hits all
of them, and the median of their turns counts.

Memory. What the process holds in RAM at most during a call, above what it held before: the kernel
keeps that peak (VmHWM) and forgets it when asked to (/proc/self/clear_refs). Unused heap is handed
back before, or the call would be served from pages that count already. The results of the call are
included, its inputs are not. The kernel counts in batches of pages: right to a few 0.1 MB.

Heap. glibc serves a request of 32 MiB and more from fresh pages and hands them back when it is
freed, so that every large temporary is paid for with page faults; other allocators and the CUDA one
keep memory. `retain_heap` makes glibc keep it, as MALLOC_MMAP_MAX_=0 with a large
MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ in the environment would from the start.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.benchmark import Timer

from hex import __version__, ops

Step = Callable[[], object]
K = TypeVar("K")

TURN_S = 0.01  # a turn repeats a fast call for at least this long
ENOUGH_S = 4.0  # a method that has taken this long gets no more turns

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def times(steps: Mapping[K, Timer], turns: int) -> dict[K, list[float]]:
    """Milliseconds a call, a sample a turn; the steps by turns."""
    samples: dict[K, list[float]] = {name: [] for name in steps}
    taken = dict.fromkeys(steps, 0.0)
    for _ in range(turns):
        for name, timer in steps.items():
            if taken[name] < ENOUGH_S:
                start = time.perf_counter()
                sample = timer.blocked_autorange(min_run_time=TURN_S)
                taken[name] += time.perf_counter() - start
                samples[name].append(float(f"{sample.median * 1e3:.4g}"))
    return samples


def timer(step: Step, threads: int = 1, clock: Callable[[], float] | None = None) -> Timer:
    """On that clock, or on the one of torch.utils.benchmark, which waits for a GPU."""
    clocks = {"timer": clock} if clock else {}
    return Timer("step()", globals={"step": step}, num_threads=threads, **clocks)


def clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def peak_mb(step: Step) -> float:
    """The most memory that a call holds above what was held before, in MB (10^6 bytes).

    The step has run before: libraries, threads and compiled code are there.
    """
    gc.collect()
    _glibc().malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1e6


def retain_heap() -> None:
    """From here on freed memory stays with the process. There is no way back."""
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
        if _glibc().mallopt(option, value) != 1:
            raise OSError(f"mallopt({option}, {value}) failed")


def machine() -> dict[str, object]:
    """The machine and the libraries, for the head of a table."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "hex": __version__,
        "hex_isa": ops.isa(),
        "commit": _commit(),
    }


def progress(what: str) -> None:
    """One line, written over and over, for a person who waits."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _commit() -> str:
    """Of the sources this file lies in; with a plus where the library differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ":/csrc", ":/hex")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()  # other architectures have no such line


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _glibc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        raise OSError("the C library is not glibc: memory and heap cannot be measured here")
    return library
