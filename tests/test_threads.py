# SPDX-License-Identifier: MIT
"""Threads, forks and memory: the same bits for any number of threads, in threads of Python's and in
a forked child, a quiet end, and never an N x N buffer.

The fork, the end and the memory are tried in processes of their own: a child that hangs must not
take the tests with it, and a peak of memory is the whole process's.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import operators
import pytest
import torch
from conftest import problem
from data import FORMS, MODES
from torch import Tensor

from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker, ops

THREADS = (1, 2, 3, 4)


def everything(p) -> list[Tensor]:
    """The outputs of every operator, forward and backward."""
    z0, z1, negatives, eps, tau, mode, reduction, variant, beta, tau_plus, *_ = p.raw()
    loss, stats, kept = operators.forward(*p.raw())
    mean = operators.forward(*p.raw()[:6], ops.REDUCTIONS["mean"], *p.raw()[7:])[0]
    grads = operators.backward(
        p.grad_output(), z0, z1, negatives, tau, stats, kept, mode, reduction, beta, 15
    )
    low, high = operators.row_range(z0, z1, negatives, mode)
    eps = [operators.threshold(z0, z1, negatives, mode, 0.9, over) for over in ("all", "negatives")]
    return [loss, stats, mean, *grads, low, high, *eps]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_every_output_has_the_same_bits_for_any_number_of_threads_and_on_every_run(
    mode, variant, dtype, threads
):
    # Of some million operations; a thread gets a quarter of a million or more (csrc/parallel.c).
    p = problem("cluster", 151, 61, mode, K=149, dtype=dtype, variant=variant)
    threads(1)
    expected = everything(p)
    assert all(x.isfinite().all() for x in expected)
    for count in THREADS:
        threads(count)
        for _ in range(2):
            for a, b in zip(everything(p), expected, strict=True):
                assert torch.equal(a, b), count


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_do_not_depend_on_what_ran_before(mode, threads):
    """Scratch memory is reused: what another batch left in it must not matter."""
    p = problem("cluster", 101, 13, mode, dtype=torch.float32)
    expected = everything(p)
    for other in (problem("gauss", 211, 67, mode), problem("collapsed", 3, 5, mode)):
        everything(other)
        assert all(map(torch.equal, everything(p), expected))


LABELS = torch.arange(151) % 7
CALLS = (
    (HEXLoss, lambda loss, z: loss(z, z.roll(1, 0))),
    (HEXLoss, lambda loss, z: loss(z, z.roll(1, 0), z[:97])),
    (lambda **o: HEXLoss(mode="cross", **o), lambda loss, z: loss(z, z.flip(1))),
    (HEXSupConLoss, lambda loss, z: loss(z, LABELS)),
    (lambda **o: HEXCrossEntropyLoss(0.1, **o), lambda loss, z: loss(z @ z.T / 61, LABELS)),
    (lambda **_: InfoNCELoss(mode="query"), lambda loss, z: loss(z, z.roll(1, 0))),
)


def test_python_threads_with_a_loss_each_get_the_bits_of_one_thread(threads):
    start = threading.Barrier(len(CALLS))

    def train(number: int, wait=lambda: None) -> list[Tensor]:
        make, call = CALLS[number]
        loss = make(threshold=ThresholdTracker.adaptive(0.9, momentum=0.5))
        generator = torch.Generator().manual_seed(number)
        results = []
        for _ in range(20):
            z = torch.randn(151, 61, generator=generator).requires_grad_()
            wait()
            value = call(loss, z)
            value.backward()
            results += [value.detach(), z.grad, *(x.clone() for x in loss.state_dict().values())]
        return results

    threads(1)
    expected = [train(number) for number in range(len(CALLS))]
    threads(2)
    with ThreadPoolExecutor(len(CALLS)) as pool:
        running = [pool.submit(train, number, start.wait) for number in range(len(CALLS))]
        found = [each.result(120) for each in running]
    for number, (ours, alone) in enumerate(zip(found, expected, strict=True)):
        assert all(map(torch.equal, ours, alone)), number


def process(code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stderr
    return run


def python(code: str, timeout: float) -> str:
    """What a process of its own prints."""
    return process(code, timeout).stdout.strip()


# Takes the place of torch's function, and fails at the loop numbered `fail`.
POOL = """
#include <dlfcn.h>
#include <stdint.h>

typedef void (*function)(int64_t, int64_t, void *);
int64_t loops, fail = -1;

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, function body, void *context)
{
    static int32_t (*of_torch)(int64_t, int64_t, int64_t, function, void *);
    if (!of_torch)
        *(void **)&of_torch =
            dlsym(dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD), "torch_parallel_for");
    return loops++ == fail ? 1 : of_torch(begin, end, grain, body, context);
}
"""
WITHOUT = """
import ctypes, torch
from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss, ThresholdTracker, batch_threshold

pool = ctypes.CDLL(None)
loops, fail = (ctypes.c_int64.in_dll(pool, name) for name in ("loops", "fail"))
B, D = 601, 61  # loops over rows are shared out too
z = torch.randn(B, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
other, labels = z.detach().roll(1, 0), torch.arange(B) % 7
own = z.detach()[:, None].expand(B, 97, D)

def step(make, *args):
    value = make(threshold=ThresholdTracker.adaptive(over="negatives"))(*args)
    return value, *torch.autograd.grad(value, z)

calls = [
    lambda: step(HEXLoss, z, other),
    lambda: step(HEXLoss, z, other, other),
    lambda: step(HEXLoss, z, other, own),
    lambda: step(lambda **o: HEXLoss(mode="cross", **o), z, other),
    lambda: step(HEXSupConLoss, z, labels),
    lambda: step(lambda **o: HEXCrossEntropyLoss(0.1, **o), z @ other.T / 61, labels),
    lambda: [batch_threshold(z, other)],
]
for call in calls:
    loops.value, fail.value = 0, -1
    expected = call()
    assert loops.value > 0
    for number in range(loops.value):
        loops.value, fail.value = 0, number
        try:
            call()
        except RuntimeError as error:
            assert "the thread pool could not run the loop" in str(error), error
        else:
            raise AssertionError(f"loop {number} did not run, and nothing was said")
        fail.value = -1
        assert all(map(torch.equal, call(), expected))
"""


def test_a_pool_that_cannot_run_a_loop_is_an_error_and_the_next_call_is_right(
    tmp_path, monkeypatch
):
    library = tmp_path / "pool.so"
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", library]
    subprocess.run(command, input=POOL, text=True, check=True)
    preload = (os.environ.get("LD_PRELOAD", ""), str(library))
    monkeypatch.setenv("LD_PRELOAD", " ".join(filter(None, preload)))
    process(WITHOUT, timeout=120)


END = """
import atexit, threading, torch
from hex import HEXLoss

def step():
    HEXLoss()(*torch.randn(2, 301, 37).requires_grad_()).backward()
    print("a step")

torch.set_num_threads(2)
step()
atexit.register(step)
threading.Thread(target=lambda: (threading.main_thread().join(), step())).start()
"""


def test_a_process_ends_without_a_word_with_steps_after_its_last_line():
    run = process(END, timeout=120)
    assert run.stdout.split("\n") == 3 * ["a step"] + [""]
    assert run.stderr == ""


FORK = """
import os, signal, torch
from hex import HEXLoss

def threads():
    return len(os.listdir("/proc/self/task"))

def step():
    z0, z1 = (z.clone().requires_grad_() for z in views)
    loss = HEXLoss()(z0, z1)
    loss.backward()
    return b"".join(x.detach().numpy().tobytes() for x in (loss, z0.grad, z1.grad))

torch.set_num_threads(4)
views = torch.randn(2, 301, 37, generator=torch.Generator().manual_seed(0)).unbind(0)
before = threads()
expected = step()
assert threads() > before, "the parent used one thread only"
children = []
for _ in range(2):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(60)  # ends a child that waits for threads it has not
        try:
            os.write(write, b"same" if step() == expected else b"other")
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        print(answer.read().decode())
    os.waitpid(child, 0)
print("same" if step() == expected else "other")
"""


def test_children_forked_after_parallel_work_compute_the_same_bits():
    assert python(FORK, timeout=120).split() == ["same"] * 3  # two children, then the parent


MEMORY = """
import torch
from hex import HEXLoss

def kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field + ":"))

torch.set_num_threads(2)
for mode, batch in (("ntxent", 4096), ("query", 8192)):
    loss = HEXLoss(mode=mode, cache_bytes=CACHE_BYTES)
    for size in (211, batch):  # the first loads all that is loaded once
        z0, z1 = (z.requires_grad_() for z in torch.randn(2, size, 16).unbind(0))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak, VmHWM, begins anew
        before = kib("VmRSS")
        loss(z0, z1).backward()
    print(1024 * (kib("VmHWM") - before))
    assert z0.grad.isfinite().all() and z0.grad.any()
"""


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="under AddressSanitizer memory and time are mostly the sanitizer's",
)
@pytest.mark.parametrize("cache_bytes", [0, 200 << 20, 1 << 30])
def test_cosines_take_no_more_memory_than_they_may(cache_bytes):
    """Without them an eighth of a matrix is enough; plain InfoNCE holds three at its peak."""
    cosines = 4 * 8192**2  # bytes
    said = python(MEMORY.replace("CACHE_BYTES", str(cache_bytes)), timeout=300).split()
    # of two views the pairs are kept, half of the matrix and the padding of tiles
    for batch, kept, raised in zip((4096, 8192), (0.56, 1.1), said, strict=True):
        gradients, room = 2 * batch * 16 * 4, kept * cosines
        kept_bytes = room if room <= cache_bytes else 0
        most = kept_bytes + cosines / 8 + 2 * gradients
        assert gradients / 2 + kept_bytes / 2 < int(raised) < most <= 3 * cosines / 2
