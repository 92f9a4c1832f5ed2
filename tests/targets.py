# SPDX-License-Identifier: MIT
"""Which GPUs a library of CUDA kernels has code for, by NVIDIA's rules of compatibility (the
compatibility guides for CUDA applications): machine code runs on its own major version with the
same or a larger minor one, PTX is compiled by the driver for its own compute capability and every
later one. What ends in "a" runs on its own compute capability alone.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import setuptools

# Those that there are, from Turing on; 8.7 and 11.0 are of systems on a chip.
CAPABILITIES = (
    (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1),
)  # fmt: skip


def setup_py() -> dict[str, Any]:
    """The names of setup.py, without running its setup()."""
    original, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        return runpy.run_path(str(Path(__file__).parent.parent / "setup.py"))
    finally:
        setuptools.setup = original


def _of(target: str) -> tuple[int, int, bool]:
    """ "90a" is 9, 0, True."""
    number, alone = re.fullmatch(r"(\d+)(a?)", target).groups()
    return int(number) // 10, int(number) % 10, bool(alone)


def has_code(capability: tuple[int, int], cubins: Iterable[str], ptx: Iterable[str]) -> bool:
    """Whether a GPU can run what was compiled for these targets of nvcc ("80", "90a")."""
    for target in cubins:
        major, minor, alone = _of(target)
        if capability == (major, minor) or (
            not alone and capability[0] == major and capability[1] > minor
        ):
            return True
    for target in ptx:
        major, minor, alone = _of(target)
        if capability == (major, minor) or (not alone and capability > (major, minor)):
            return True
    return False


def of_setting(arch: str) -> tuple[list[str], list[str]]:
    """Machine code and PTX that HEX_CUDA_ARCH asks for."""
    targets = [target.strip() for target in arch.split(",")]
    return (
        [target.partition("+")[0] for target in targets],
        [target.partition("+")[0] for target in targets if target.endswith("+PTX")],
    )
