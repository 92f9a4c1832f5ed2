# SPDX-License-Identifier: MIT
"""The CUDA kernels on the CPU: csrc/cuda/ compiled by g++ against emulation/cuda_emu.h and put in
the place of the CPU's kernels, so that `hex` and its tests call them with CPU tensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from hex._load import _C

HEX = torch.ops.hex
ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc/cuda"
# Some kinds of error show only where the warps' order is one way or the other: see cuda_emu.h.
SEEDS = (1, 2, 3)
# How the tensor cores add: rounded as IEEE has it, and cut off as is believed of Hopper's.
ROUNDED, TRUNCATED = -1, 2
# Processors, shared memory of a block. With one processor a block goes through several tiles, and
# the backward through several bands of rows; with as much memory as Hopper's, its blocks of 256 and
# 192 rows do.
HOPPER, SMALL, ALONE = (132, 227 * 1024), (1, 99 * 1024), (1, 227 * 1024)
DEVICES = (SMALL, HOPPER, ALONE)  # one for each seed

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DHEX_EMULATION"]
FLAGS += ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas"]
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # `make sanitize`
if SANITIZED:
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compile(output: Path, *flags: str, sources: list[Path] | None = None) -> Path:
    """Compile the kernels, or other sources, into the shared library `output`."""
    command = ["g++", *FLAGS, *flags, "-I", ROOT / "tests/emulation"]

    def compile_one(path: Path) -> Path:
        target = output.with_name(f"{output.stem}-{path.stem}.o")
        subprocess.run([*command, "-x", "c++", "-c", path, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources or sorted(SOURCE.glob("*.cu"))))
    subprocess.run([*command, "-shared", *objects, "-o", output], check=True)
    return output


class Emulator:
    """The library in use; what can be set is explained in cuda_emu.h."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.hex_emu_count.restype = ctypes.c_uint64
        self.library.hex_emu_recorded.restype = ctypes.c_char_p
        self.library.hex_emu_bracket.restype = ctypes.c_int64
        self.path = path

    @contextlib.contextmanager
    def in_use(self):
        """As one large device, its warps in one order."""
        problem = _C.load_cuda(str(self.path))
        assert problem is None, problem
        self.device(*HOPPER)
        self.seed(1)
        self.truncate(ROUNDED)
        try:
            yield self
        finally:
            _C.load_cuda(None)

    def seed(self, seed: int) -> None:
        self.library.hex_emu_seed(seed)

    def device(self, processors: int, shared: int) -> None:
        self.library.hex_emu_device(processors, shared)

    def major(self, major: int) -> None:
        """The device's compute capability is major.0."""
        self.library.hex_emu_major(major)

    def truncate(self, extra_bits: int) -> None:
        self.library.hex_emu_truncate(extra_bits)

    def no_code(self, *devices: int) -> None:
        self.library.hex_emu_no_code(sum(1 << d for d in devices))

    def least_allowed(self) -> int:
        """The least shared memory that a kernel was allowed to have since the last time."""
        return self.library.hex_emu_least_allowed()

    def launches_of(self, call: Callable[[], object]) -> list[tuple[str, int]]:
        """(file of the kernel, blocks) of each launch of the call; nothing is run."""
        self.library.hex_emu_record(True)
        try:
            call()
            found, blocks = [], ctypes.c_uint()
            while file := self.library.hex_emu_recorded(len(found), ctypes.byref(blocks)):
                found.append((Path(file.decode()).stem, blocks.value))
            return found
        finally:
            self.library.hex_emu_record(False)

    @contextlib.contextmanager
    def brackets(self, cosines: int = 0, sample: int = 1):
        """The threshold in one pass from so many cosines on, of a sample of so many columns."""
        self.limits(cosines, sample)
        try:
            yield
        finally:
            self.limits(64_000_000, 2000)

    def limits(self, cosines: int, sample: int) -> int:
        """The same. Returns how many rows the last call left to the two passes."""
        return self.library.hex_emu_bracket(ctypes.c_int64(cosines), ctypes.c_int64(sample))

    @contextlib.contextmanager
    def weights(self, tiles: int):
        """The backward of more than 128 features with memory for so many weights at a time: tiles
        of 128 rows and 64 columns in 16 bits."""
        self.library.hex_emu_weights(ctypes.c_int64(tiles * 128 * 64 * 2))
        try:
            yield
        finally:
            self.library.hex_emu_weights(ctypes.c_int64(32 << 20))

    @property
    def launches(self) -> int:
        return self.library.hex_emu_count(0)

    @property
    def conflicts(self) -> int:
        return self.library.hex_emu_count(1)


def conformance_on_a_gpu(folder: Path) -> Path:
    """emulation/conformance.cu for the current GPU: HEX_CONFORMANCE, the path of what was built
    elsewhere, or built here by nvcc."""
    if built := os.environ.get("HEX_CONFORMANCE"):
        return Path(built)
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    library, source = folder / "conform.so", ROOT / "tests/emulation/conformance.cu"
    command = ["nvcc", "-std=c++17", "-arch", arch, "-shared", "-Xcompiler", "-fPIC", "-o", library]
    subprocess.run([*command, source], check=True)
    return library
