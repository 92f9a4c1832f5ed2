# SPDX-License-Identifier: MIT
"""The heap stays as large as a few steps make it. In a process of its own, for each loss: what
fifty steps add to the memory in use is less than a tenth of what they kept for their backwards.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss

QUERIES, FEATURES, FIRST, MORE = 2048, 128, 10, 50
KEPT = QUERIES * QUERIES * 4  # bytes, at least, in each
CASES = {  # the loss, and what it takes of two views and a queue
    "adaptive query": (HEXLoss(mode="query"), lambda z, x: z),
    "adaptive cross": (HEXLoss(mode="cross"), lambda z, x: z),
    "adaptive ntxent": (HEXLoss(), lambda z, x: z),
    "InfoNCE query": (InfoNCELoss(mode="query"), lambda z, x: z),
    "queue": (HEXLoss(), lambda z, x: (*z, x)),
    "labels": (HEXSupConLoss(), lambda z, x: (torch.cat(z), torch.arange(2 * QUERIES) % 64)),
}

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.10."),
        reason="torch 2.10 allocates the outputs, and glibc before 2.38 does not use that twice",
    ),
]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(case):
    """By how many bytes the process is larger after MORE steps."""
    torch.manual_seed(0)
    z = [torch.randn(QUERIES, FEATURES, requires_grad=True) for _ in range(2)]
    x = torch.randn(QUERIES, FEATURES)
    criterion, inputs = CASES[case]
    before = 0
    for step in range(FIRST + MORE):
        if step == FIRST:
            before = resident()
        criterion(*inputs(z, x)).backward()
    return resident() - before


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_more_need_no_more_memory_than_ten(case):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, case],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout) < MORE * KEPT / 10


if __name__ == "__main__":
    print(grown(sys.argv[1]))
