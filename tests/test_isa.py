# SPDX-License-Identifier: MIT
"""Every instruction set that the CPU kernels are compiled for, on one machine, through HEX_ISA.

A level is chosen when the extension is loaded, so each has a process of its own: this file run as a
program, which compares values and gradients of every mode, variant and dtype, and of labels,
groups, guides and logits, with hex/reference.py. The level in use is that of all other tests. One
that the CPU lacks is skipped; an emulator can run the program too. What a HEX_ISA that cannot be
followed says is in test_import.py too.
"""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import operators
import pytest
import torch
from conftest import DTYPES, check, problem
from data import FORMS, MODES

from hex import ops, reference

FLAGS = {
    "base": set(),
    "neon": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16"},
    "avx512_amx": {
        "avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "avx512_bf16", "amx_tile", "amx_bf16"
    },
}  # fmt: skip
# Those of this machine, the best of which is taken.
BUILT = [name for name in FLAGS if name.startswith("avx")]
BUILT = ["base", *{"x86_64": BUILT, "aarch64": ["neon"]}.get(platform.machine(), [])]
# B, D, K around the 4 to 16 lanes of a vector, and beyond one block of rows and columns
SIZES = ((2, 1, 1), (17, 33, 31), (101, 67, 41))
PAIRS = (245, 37, 0)  # rows that are computed by pairs of blocks


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEX_ISA": level}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def skip_unless_available(level: str) -> None:
    if level not in BUILT:
        pytest.skip(f"{level} is not built for {platform.machine()}")
    missing = FLAGS[level] - cpu_flags()
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@pytest.mark.parametrize("level", FLAGS)
def test_a_level_computes_what_the_reference_computes(level):
    skip_unless_available(level)
    if level == ops.isa():
        pytest.skip(f"{level} is in use: the other tests are of it")
    result = run(level, __file__)
    assert result.returncode == 0, result.stderr[-4000:]
    batches = (5 * len(SIZES) + 1) * len(FORMS) * len(DTYPES)
    assert result.stdout.split() == [level, str(batches), "129"]


def test_an_empty_level_is_none_and_the_best_that_this_cpu_has_is_taken():
    own = [name for name in BUILT if FLAGS[name] <= cpu_flags()]
    if "avx512_bf16" in own and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        own.remove("avx512_bf16")  # which is slow there, so it has to be asked for
    best = own[-1]
    # the extension may be asked for first, and brings torch in
    code = "import hex._C, sys; print('torch' in sys.modules, hex._C.isa())"
    result = run("", "-W", "error", "-c", code)
    assert (result.stdout, result.returncode) == (f"True {best}\n", 0), result.stderr


ASK = """
import os, sys
for level in sys.argv[1:]:
    os.environ["HEX_ISA"] = level
    try:
        import hex
    except ImportError as error:
        print(error)
    for name in [name for name in sys.modules if name.partition(".")[0] == "hex"]:
        del sys.modules[name]
"""


def test_a_level_that_there_is_not_is_an_import_error():
    levels = ["nonsense", "AVX2", "avx", "avx5122", " ", "base,avx2"]
    result = run("nonsense", "-c", ASK, *levels)
    names = "base, neon, avx2, avx512, avx512_bf16 or avx512_amx"
    expected = [f"HEX_ISA: got '{level}', wanted {names}" for level in levels]
    assert result.stdout.splitlines() == expected, result.stderr


def check_all(step: int = 1) -> int:
    """Compares everything, or every so many-th, at the level in use; the number of batches."""
    count = 0
    batches = [*itertools.product(MODES, SIZES), ("ntxent", PAIRS)]
    everything = itertools.product(batches, FORMS, DTYPES)
    for (mode, (B, D, K)), variant, dtype in itertools.islice(everything, 0, None, step):
        p = problem("cluster", B, D, mode, K=K, dtype=dtype, variant=variant, seed=count)
        check(p)
        check_thresholds(p)
        count += 1
    return count


def check_thresholds(p) -> None:
    """Quantiles and ranges are cosines: they err as a dot product does."""
    z0, z1, negatives = p.raw()[:3]
    mode = ops.MODES[p.mode]
    wide = [z.double() for z in (z0, z1, negatives)]
    allowed = 4 * torch.finfo(p.dtype).eps * z0.shape[1] ** 0.5
    for over in ("all", "negatives"):
        ours = operators.threshold(z0, z1, negatives, mode, 0.7, over)
        truth = reference.threshold(*wide, p.mode, 0.7, over)
        assert abs(ours - truth) <= allowed, (over, p)
    ours, truth = operators.row_range(z0, z1, negatives, mode), reference.row_range(*wide, p.mode)
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).abs().max() <= allowed, p


if __name__ == "__main__":
    import test_labels
    import test_masks

    print(ops.isa(), check_all(), test_labels.check_half() + test_masks.check_half())
