# SPDX-License-Identifier: MIT
"""Whether the CUDA kernels are used, and what is said where they cannot be: no nvcc, no GPU."""

import functools
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from hex import _load, ops

ROOT = Path(__file__).parent.parent


def test_what_is_no_cuda_library_is_refused(tmp_path):
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    assert "_cuda.so" in _load._C.load_cuda(str(tmp_path / "_cuda.so"))


def on_cuda(index=0):
    device = types.SimpleNamespace(type="cuda", index=index)
    return types.SimpleNamespace(device=device, is_cpu=False, is_cuda=True)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing asked yet, nothing warned of yet; set what the GPU and the build are."""

    def set_up(capability, library):
        _load.cuda_problem.cache_clear()
        _load._cuda_core_problem.cache_clear()
        monkeypatch.setattr(ops, "_warned", set())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(_load, "_CUDA_LIBRARY", str(library))

    yield set_up
    _load.cuda_problem.cache_clear()
    _load._cuda_core_problem.cache_clear()


def test_a_build_without_kernels_warns_once_and_says_how_to_get_them(fresh, tmp_path):
    fresh((9, 0), tmp_path / "none.so")
    with pytest.warns(RuntimeWarning, match=r"'cuda:0' \(this build of hex-ssl has none; build .*"):
        assert not ops._has_kernel(on_cuda(), "forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops._has_kernel(on_cuda(), "forward")


def test_an_old_gpu_warns_with_its_capability(fresh, tmp_path):
    fresh((7, 5), tmp_path / "none.so")
    with pytest.warns(RuntimeWarning, match="need compute capability 8.0, and this GPU has 7.5"):
        assert not ops._has_kernel(on_cuda(), "forward")


def test_an_operator_without_a_kernel_is_composed_though_others_have_one(fresh, monkeypatch):
    fresh((9, 0), "")
    monkeypatch.setattr(_load, "_cuda_core_problem", functools.cache(lambda: None))
    assert ops._has_kernel(on_cuda(), "forward")
    with pytest.warns(RuntimeWarning, match="'another' has none"):
        assert not ops._has_kernel(on_cuda(), "another")


def test_torchs_switch_for_float32_products_is_passed_on(fresh, monkeypatch):
    fresh((9, 0), "")
    monkeypatch.setattr(_load, "_cuda_core_problem", functools.cache(lambda: None))
    assert ops._mode(on_cuda(), 2) == 2
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert ops._mode(on_cuda(), 2) == 2 | ops._ONE_PRODUCT
    finally:
        torch.set_float32_matmul_precision(before)
    cpu = torch.zeros(2, 3)
    assert ops._mode(cpu, 2) == 2


def test_loss_and_threshold_are_one_call_where_the_kernels_are(fresh, monkeypatch, tmp_path):
    fresh((9, 0), tmp_path / "none.so")
    assert not ops.has_adaptive(on_cuda())
    fresh((9, 0), "")
    monkeypatch.setattr(_load, "_cuda_core_problem", functools.cache(lambda: None))
    assert ops.has_adaptive(on_cuda())


@pytest.mark.parametrize("value, complaint", [("2", "wanted auto, 0 or 1"), ("1", "nvcc is not")])
def test_a_wrong_setting_ends_the_build(value, complaint):
    environment = {**os.environ, "HEX_CUDA": value, "NVCC": "/none", "CUDA_HOME": "/none"}
    done = subprocess.run(
        [sys.executable, "-c", """
import setuptools, runpy
made = {}
setuptools.setup = lambda **options: made.update(options)
runpy.run_path("setup.py")
command = made["cmdclass"]["build_ext"](setuptools.Distribution())
command.extensions = []
command.run()
"""],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and complaint in done.stderr
