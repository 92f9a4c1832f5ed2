# SPDX-License-Identifier: MIT
"""The extension as clang compiles it: no warning, and every level computes what the reference
computes. Part of `make thorough`; gcc's is what all other tests run.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
X86 = platform.machine() == "x86_64"

LEVELS = """
import os, sys, warnings
sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
os.environ["HEX_ISA"] = level = sys.argv[1]
from hex import _load, ops
if ops.isa() != level:
    print(_load._C.isa_problem())
else:
    import test_isa
    print(test_isa.check_all())
"""


@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not there")
def test_clang_builds_every_level_without_a_warning_and_they_compute_the_reference(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "hex", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HEX_", "CFLAGS"))}
    environment |= dict(CC="clang", HEX_WERROR="1", HEX_CUDA="0", PYTHONPATH=str(tmp_path))
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    x86 = ("base", "avx2", "avx512", "avx512_bf16", "avx512_amx")
    for level in x86 if X86 else ("base", "neon"):
        command = [sys.executable, "-c", LEVELS, level]
        said = subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        assert said == "this CPU does not have it" or int(said) > 100, (level, said)
