# SPDX-License-Identifier: MIT
"""Whether the CUDA kernels are used, and what is said where they cannot be: no nvcc, no GPU."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import cuda_tensor
from targets import CAPABILITIES, has_code, of_setting, setup_py

from hex import _load, ops

ROOT = Path(__file__).parent.parent


def test_what_is_no_cuda_library_is_refused(tmp_path):
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    assert "_cuda.so" in _load._C.load_cuda(str(tmp_path / "_cuda.so"))


def test_a_build_without_kernels_warns_once_and_says_how_to_get_them(fresh_cuda, tmp_path):
    fresh_cuda((9, 0), tmp_path / "none.so")
    with pytest.warns(RuntimeWarning, match=r"'cuda:0' \(this build of hex-ssl has none; build .*"):
        assert not ops._has_kernel(cuda_tensor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ops._has_kernel(cuda_tensor())


def test_the_kernels_can_be_turned_off_when_a_program_is_started(fresh_cuda, monkeypatch):
    fresh_cuda((9, 0))
    assert ops._has_kernel(cuda_tensor())
    fresh_cuda((9, 0))
    monkeypatch.setenv("HEX_CUDA_KERNELS", "0")
    with pytest.warns(RuntimeWarning, match=r"'cuda:0' \(HEX_CUDA_KERNELS=0 turns them off\)"):
        assert not ops._has_kernel(cuda_tensor())
    assert not ops._has_kernel(cuda_tensor())  # and is silent from now on
    assert not ops.has_adaptive(cuda_tensor())


@pytest.mark.parametrize("value", ("1", ""))
def test_the_kernels_are_used_where_the_switch_does_not_say_otherwise(
    fresh_cuda, monkeypatch, value
):
    monkeypatch.setenv("HEX_CUDA_KERNELS", value)
    fresh_cuda((9, 0))
    assert ops._has_kernel(cuda_tensor())


def test_a_switch_that_is_neither_on_nor_off_is_an_error(fresh_cuda, monkeypatch):
    monkeypatch.setenv("HEX_CUDA_KERNELS", "no")
    fresh_cuda((9, 0))
    with pytest.raises(ValueError, match="HEX_CUDA_KERNELS: got 'no', wanted 0 or 1"):
        ops._has_kernel(cuda_tensor())


@pytest.mark.parametrize(
    "error, what",
    (
        (98, "no code for this GPU, of compute capability 8.6; .* HEX_CUDA_ARCH=86 pip install"),
        (209, "no code for this GPU, of compute capability 8.6; .* HEX_CUDA_ARCH=86 pip install"),
        (222, "cannot be used: this GPU answers with CUDA error 222"),
    ),
)
def test_a_gpu_that_cannot_run_the_library_says_why(fresh_cuda, monkeypatch, error, what):
    fresh_cuda((8, 6))
    monkeypatch.setattr(_load._C, "probe_cuda", lambda index: error)
    with pytest.warns(RuntimeWarning, match=what):
        assert not ops._has_kernel(cuda_tensor())


def test_machine_code_is_for_one_major_version_and_ptx_for_what_is_newer():
    assert has_code((8, 6), ["80"], []) and not has_code((8, 0), ["86"], [])
    assert not has_code((9, 0), ["80"], []) and has_code((9, 0), ["80"], ["80"])
    assert has_code((10, 3), ["100"], []) and has_code((9, 0), ["90a"], [])
    assert not has_code((9, 1), ["90a"], ["90a"])
    assert not has_code((11, 0), ["100", "120"], ["120"]) and has_code((11, 0), [], ["100"])
    assert has_code((13, 0), ["120"], ["120"])


# What is built by default, what an nvcc older than 12.8 knows of it, and some that users may want.
SETTINGS = (setup_py()["CUDA_ARCH"], "80+PTX,86,89,90a", "80,86,89,90a,100,120+PTX", "90a", "100")


@pytest.mark.parametrize("capability", CAPABILITIES, ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_gpu_without_code_is_told_once_what_to_build_for_it(
    fresh_cuda, monkeypatch, setting, capability
):
    served = has_code(capability, *of_setting(setting))
    if setting in SETTINGS[:2]:
        assert served == (capability >= (8, 0))
    fresh_cuda(capability)
    monkeypatch.setattr(_load._C, "probe_cuda", lambda index: 0 if served else 209)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert ops._has_kernel(cuda_tensor()) == served
    assert len(said) == (not served)
    if not served and capability >= (8, 0):
        arch = re.search("HEX_CUDA_ARCH=([^ ]+) ", str(said[0].message))[1]
        assert has_code(capability, *of_setting(arch))


def test_an_old_gpu_warns_with_its_capability(fresh_cuda, tmp_path):
    fresh_cuda((7, 5), tmp_path / "none.so")
    with pytest.warns(
        RuntimeWarning, match="need compute capability 8.0 or newer, and this GPU has 7.5"
    ):
        assert not ops._has_kernel(cuda_tensor())


def test_torchs_switch_for_float32_products_is_passed_on(fresh_cuda):
    fresh_cuda((9, 0))
    assert not ops._allow_tf32(cuda_tensor())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert ops._allow_tf32(cuda_tensor())
        assert not ops._allow_tf32(torch.zeros(2, 3))
    finally:
        torch.set_float32_matmul_precision(before)


def test_loss_and_threshold_are_one_call_where_the_kernels_are(fresh_cuda, tmp_path):
    fresh_cuda((9, 0), tmp_path / "none.so")
    assert not ops.has_adaptive(cuda_tensor())
    fresh_cuda((9, 0))
    assert ops.has_adaptive(cuda_tensor())


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
command.ensure_finalized()
command.extensions = []
command.run()
"""],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and complaint in done.stderr
