# SPDX-License-Identifier: MIT
"""HEX_ISA=avx512_bf16 on a machine without it: the extension of a copy of the sources, built with
the level's three instructions in plain C (HEX_EMULATE_BF16), which give the same bits. It is not
optimised, for that takes longer than the tests. Part of `make thorough`.

test_isa.py tests the level where the CPU has it.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the level is for x86-64"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there to build it"),
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""), reason="it has an extension of its own"
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The environment of a process that runs the level."""
    tree = tmp_path_factory.mktemp("emulated")
    for name in ("csrc", "hex"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    setup = (ROOT / "setup.py").read_text()
    assert setup.count('"-O3"') == 2  # ours and nvcc's
    (tree / "setup.py").write_text(setup.replace('"-O3"', '"-O0"'))  # a minute sooner
    flags = "-DHEX_EMULATE_BF16 -Wno-psabi"
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree, env={**os.environ, "HEX_CUDA": "0", "CFLAGS": flags}, check=True,
    )  # fmt: skip
    return {
        **os.environ, "PYTHONPATH": str(tree), "HEX_ISA": "avx512_bf16", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def run(environment, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT / "tests", env=environment, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_it_computes_what_the_reference_computes(emulated):
    level, batches, of_labels = run(emulated, "test_isa.py").split()
    assert level == "avx512_bf16"
    assert int(batches) > 100 and int(of_labels) > 40


def test_rows_by_pairs_are_as_good_as_torch(emulated):
    """Blocks with themselves, odd batches, shared negatives, the threshold in one pass."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--override-ini", "addopts=")
    selected = "bfloat16 or (one_call and cluster)"
    out = run(emulated, "-m", "pytest", *options, "test_tiles.py", "-k", selected)
    assert "passed" in out and "failed" not in out
    assert "no tests ran" not in out


DIGITS = """
import torch
from hex import ops
from hex.functional import hex_loss

z0, z1 = torch.randn(2, 200, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
found = {}
for dtype in (torch.bfloat16, torch.float32):
    leaves = [z.to(dtype).requires_grad_() for z in (z0, z1)]
    loss = hex_loss(*leaves, eps=0.2)
    found[dtype] = (loss, *torch.autograd.grad(loss, leaves))
(narrow, *narrow_grads), (wide, *wide_grads) = found.values()
assert narrow.dtype == torch.float32 and abs(narrow - wide) < 1e-5 * wide, (narrow, wide)
half_a_place = sum(
    ((a.bfloat16() - a).norm() / a.norm()).item() for a in wide_grads
) / 2
for a, b in zip(narrow_grads, wide_grads, strict=True):
    error = ((a - b).norm() / b.norm()).item()
    assert half_a_place <= error < 1.5 * half_a_place, (error, half_a_place)
    assert not torch.equal(a, b.bfloat16())  # else nothing went by dot products
print(ops.isa())
"""


def test_what_bfloat16_costs_is_a_rounding_of_the_gradient(emulated):
    assert run(emulated, "-c", DIGITS).split() == ["avx512_bf16"]
