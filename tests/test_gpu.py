# SPDX-License-Identifier: MIT
"""The CUDA kernels on a GPU: `pytest -m gpu`, with hex built by HEX_CUDA=1.

What only a device can show, and the battery that the emulation has passed. Where there is no device
every test here is skipped, with that as its reason.
"""

import subprocess

import emulator
import pytest
import torch
from conftest import check_gradients, check_loss, problem
from emulator import assert_half_is_right, assert_threshold_is_right

from hex import HEXLoss, ops
from hex._load import cuda_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
MODES = ("ntxent", "query", "cross", "shared", "own")


@pytest.fixture(autouse=True)
def kernels():
    assert cuda_problem(torch.cuda.current_device()) is None


def test_the_primitives_do_what_plain_arithmetic_does(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    library, source = tmp_path / "conform.so", "tests/emulation/conformance.cu"
    command = ["nvcc", "-std=c++17", "-arch", arch, "-shared", "-Xcompiler", "-fPIC", "-o", library]
    subprocess.run([*command, source], check=True, cwd=emulator.ROOT)
    emulator.assert_conforms(library, "cuda")


def test_the_battery_is_right():
    emulator.battery("cuda")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_right_at_the_sizes_of_training(mode):
    for B, D, K in ((128, 128, 256), (1024, 128, 4096), (513, 500, 100)):
        if mode == "own":
            B, K = B // 8, K // 8
        p = problem("cluster", B, D, mode, K=K, dtype=torch.float32, device="cuda")
        check_loss(p)
        check_gradients(p)
        assert_threshold_is_right(p)
        q = problem("cluster", B, D, mode, K=K, dtype=torch.bfloat16, device="cuda")
        assert_half_is_right(q)


def step(loss, z0, z1):
    value = loss(z0, z1)
    value.backward()
    return value


@pytest.fixture
def batch():
    p = problem("cluster", 512, 128, dtype=torch.float32, device="cuda")
    return [z.requires_grad_() for z in p.inputs]


def test_the_bits_are_the_same_on_every_run():
    p = problem("cluster", 600, 130, dtype=torch.bfloat16, device="cuda")
    first, threshold = p.ours(), ops.threshold(*p.raw()[:3], 0, 0.99, "all")
    for _ in range(20):
        again = p.ours()
        assert torch.equal(first.loss, again.loss)
        assert all(torch.equal(first.grads[k], again.grads[k]) for k in p.names)
        assert torch.equal(threshold, ops.threshold(*p.raw()[:3], 0, 0.99, "all"))


def test_a_training_step_never_waits_for_the_device(batch):
    loss = HEXLoss(0.1).cuda()
    step(loss, *batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, *batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_can_be_captured_in_a_graph(batch):
    loss = HEXLoss(0.1).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the stream in use is not the default one
        for _ in range(3):
            step(loss, *batch)
    torch.cuda.current_stream().wait_stream(side)
    for z in batch:
        z.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, *batch)
    with torch.no_grad():
        for z in batch:
            z.add_(torch.randn_like(z))
    for z in batch:
        z.grad.zero_()
    graph.replay()
    got = [captured.clone(), *(z.grad.clone() for z in batch)]
    for z in batch:
        z.grad = None
    want = [step(loss, *batch), *(z.grad for z in batch)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_memory_does_not_grow_with_the_square_of_the_batch():
    peaks = []
    for B in (2048, 8192):
        z0, z1 = (torch.randn(B, 128, device="cuda", requires_grad=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(HEXLoss(0.1).cuda(), z0, z1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 6 * peaks[0]  # 16 if it did


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one_is_used():
    p = problem("cluster", 40, 30, dtype=torch.float32, device="cuda:1")
    check_loss(p)
    assert torch.cuda.current_device() == 0
