# SPDX-License-Identifier: MIT
"""No result depends on memory that nothing wrote: the bits of every kind of problem (bits.py), at
every level of instructions that the CPU has, are the same where all memory comes full of NaN.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_isa import FLAGS, skip_unless_available

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="the library that fills memory is for Linux, and gcc builds it",
)


@pytest.fixture(scope="session")
def full_of_nan(tmp_path_factory):
    library = tmp_path_factory.mktemp("preloaded") / "unwritten_memory.so"
    source = TESTS / "unwritten_memory.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


def bits(level, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEX_ISA": level, **environment}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "bits.py", "--quick"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.splitlines()


def test_the_library_fills_memory(full_of_nan):
    code = "import torch; assert torch.empty(1000).isnan().all()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **full_of_nan}, check=True)


@pytest.mark.parametrize("level", FLAGS)
def test_bits_are_the_same_where_memory_is_full_of_nan(level, full_of_nan):
    skip_unless_available(level)
    expected = bits(level)
    assert len(expected) > 20
    assert bits(level, **full_of_nan) == expected
