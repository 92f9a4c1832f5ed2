# SPDX-License-Identifier: MIT
"""Time, memory and heap of this process, and the machine it runs on. Linux with glibc.

Time. With one thread the clock is the CPU time of the process, for the wall clock shows the
neighbours on a busy machine. With several threads that is their sum, waiting included: then the
wall clock is read. Methods take turns, so that a slow minute hits all of them.

Memory. On the CPU what the process holds in RAM at most during a call, above what it held before:
the kernel keeps that peak (VmHWM) and forgets it when asked to. Unused heap is handed back before,
or the call would be served from pages that count already. Where a call has many large temporaries
the heap keeps holes, now more and now fewer, so that of a few calls the least counts. On a GPU the
same of torch's allocator. The results of the call are included, its inputs are not.

Heap. glibc serves a request of 32 MiB and more from fresh pages and hands them back when it is
freed, so that every large temporary is paid for with page faults; other allocators keep memory.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from hex import __version__, ops
from hex._load import cuda_problem

Step = Callable[[], object]

TURN_S = 0.01  # a turn repeats a fast call for at least this long
FEW = 3  # turns that a slow method gets, and calls whose memory is measured
ENOUGH_S = 4.0  # a method that has taken this long gets a few turns only
TOO_LONG_S = 60.0  # and one that has taken this long no more
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def timer(step: Step, threads: int = 1, device: str = "cpu") -> Timer:
    clock = time.process_time if threads == 1 else time.perf_counter
    options = {"timer": clock} if device == "cpu" else {}  # else one that waits for the device
    return Timer("step()", globals={"step": step}, num_threads=threads, **options)


def times(timers: Sequence[Timer], turns: int) -> list[list[float]]:
    """Milliseconds a call, a sample a turn; the timers by turns."""
    samples: list[list[float]] = [[] for _ in timers]
    taken = [0.0] * len(timers)
    for _ in range(turns):
        for i, one in enumerate(timers):
            if taken[i] < (ENOUGH_S if len(samples[i]) >= FEW else TOO_LONG_S):
                start = time.perf_counter()
                sample = one.blocked_autorange(min_run_time=TURN_S)
                taken[i] += time.perf_counter() - start
                samples[i].append(float(f"{sample.median * 1e3:.4g}"))
    return samples


def peak_mb(step: Step, device: str = "cpu") -> float:
    """The most memory that a call holds above what was held before, in MB (10^6 bytes).

    The step has run before: libraries, threads and compiled code are there.
    """
    peaks, end = [_peak_mb(step, device)], time.perf_counter() + ENOUGH_S
    while device == "cpu" and len(peaks) < FEW and time.perf_counter() < end:
        peaks.append(_peak_mb(step, device))
    return min(peaks)


def _peak_mb(step: Step, device: str) -> float:
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 3)
    _glibc().malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = _proc("/proc/self/status", r"VmRSS:\s*(\d+) kB")
    step()
    after = _proc("/proc/self/status", r"VmHWM:\s*(\d+) kB")
    return round((int(after) - int(before)) * 1024 / 1e6, 3)


def retain_heap() -> None:
    """From here on freed memory stays with the process. There is no way back."""
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20)):
        if _glibc().mallopt(option, value) != 1:
            raise OSError(f"mallopt({option}, {value}) failed")


def machine(device: str) -> dict[str, str]:
    """What is here and serves the device, for the head of a table; in short under "on"."""
    on = f"torch {torch.__version__}, hex-ssl {__version__} at {_commit()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 1e9:.0f} GB",
        "torch's SIMD": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cpu":
        cpu = _proc("/proc/cpuinfo", r"model name\s*: (.*)") or platform.machine()
        return {"on": f"{cpu}, HEX_ISA {ops.isa()}, {on}", **here}
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; for a rehearsal use --device cpu --smoke")
    torch.cuda.set_device(torch.device(device).index or 0)
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    if problem := cuda_problem(torch.cuda.current_device()):
        raise RuntimeError(f"no CUDA kernels: {problem}")
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    driver = driver.partition("\n")[0] or "unknown"
    here |= {"memory": f"{card.total_memory / 1e9:.0f} GB", "driver": driver}
    return {"on": f"{card.name}, {on}", **here, "CUDA": str(torch.version.cuda)}


def _commit() -> str:
    """Where what is measured differs from it, with a sum of the differences. HEX_COMMIT says it
    where there is no git."""
    if given := os.environ.get("HEX_COMMIT"):
        return given
    git = "git", "-C", str(Path(__file__).parent)
    commit = _said(*git, "rev-parse", "--short=10", "HEAD") or "unknown"
    changes = _said(*git, "diff", "HEAD", "--", ":/csrc", ":/hex", ":/benchmarks/*.py")
    digest = hashlib.sha1(changes.encode()).hexdigest()[:6]
    return commit + f"+{digest}" * bool(changes)


def _said(*command: str) -> str:
    """Its output, empty where it fails."""
    try:
        said = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.strip()


def _proc(file: str, pattern: str) -> str:
    found = re.search(pattern, Path(file).read_text())
    return found[1].strip() if found else ""


def _glibc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        raise OSError("the C library is not glibc: memory and heap cannot be measured here")
    return library
