# SPDX-License-Identifier: MIT
"""The levels for bfloat16 on a machine without them: the extension of a copy of the sources, built
with their instructions in plain C (HEX_EMULATE_BF16), which give the same bits. It is not
optimised much, for that takes longer than the tests. Part of `make thorough`.

test_isa.py tests the levels where the CPU has them.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("avx512_bf16", "avx512_amx")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the level is for x86-64"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there to build it"),
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""), reason="it has an extension of its own"
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The environment of a process that runs such a level, which `run` names."""
    tree = tmp_path_factory.mktemp("emulated")
    for name in ("csrc", "hex"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    setup = (ROOT / "setup.py").read_text()
    assert setup.count('"-O3"') == 2  # ours and nvcc's
    (tree / "setup.py").write_text(setup.replace('"-O3"', '"-O1"'))  # a minute sooner
    flags = "-DHEX_EMULATE_BF16 -Wno-psabi"
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree, env={**os.environ, "HEX_CUDA": "0", "CFLAGS": flags}, check=True,
    )  # fmt: skip
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}


def run(environment, level, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT / "tests", env={**environment, "HEX_ISA": level},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_it_computes_what_the_reference_computes(emulated):
    level, batches, of_labels = run(emulated, "avx512_amx", "test_isa.py").split()
    assert level == "avx512_amx"
    assert int(batches) > 100 and int(of_labels) > 40


@pytest.mark.parametrize(
    "level, file", [("avx512_bf16", "test_tiles.py"), ("avx512_amx", "test_labels_by_tiles.py")]
)
def test_rows_by_pairs_are_as_good_as_torch(emulated, level, file):
    """Blocks with themselves, odd batches, shared negatives, the threshold in one pass; labels."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--override-ini", "addopts=")
    selected = "bfloat16 or (one_call and cluster)"
    out = run(emulated, level, "-m", "pytest", *options, file, "-k", selected)
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
# float32 where the person lets it be rounded: the loss of the rounded rows, at their gradient
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
leaves = [z.to(torch.bfloat16).float().requires_grad_() for z in (z0 * 1.001, z1)]
near = [(z * (1 + 2**-12)).detach().requires_grad_() for z in leaves]  # rounds to the same
exact = [z.to(torch.bfloat16).requires_grad_() for z in leaves]
results = []
for rows in (leaves, near, exact):
    loss = hex_loss(*rows, eps=0.2)
    results.append((loss, *torch.autograd.grad(loss, rows)))
for of_leaves, of_near, of_exact in zip(*results, strict=True):
    assert torch.equal(of_leaves, of_near)
    assert torch.equal(of_leaves.to(of_exact.dtype), of_exact)
print(ops.isa())
"""


@pytest.mark.parametrize("level", LEVELS)
def test_what_bfloat16_costs_is_a_rounding_of_the_gradient(emulated, level):
    assert run(emulated, level, "-c", DIGITS).split() == [level]
