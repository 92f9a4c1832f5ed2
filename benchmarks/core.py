# SPDX-License-Identifier: MIT
"""Compiles core.c, the CPU core without torch, with the flags of setup.py: what its own register
tile can reach, and the loss beside it. As a program: the time of the loss as a multiple of its
ideal, at the level in use.

The ideal is 4 N^2 D operations in matrix products of blocks in cache, by the core's own register
tile. Loss and ideal take turns on one thread of one process, and the least CPU time of each counts,
so the multiple does not know the machine's clock, and on a machine with twice as many processes as
cores it repeated within 5 % in 75 runs. But it knows the CPU and its vectors, for products gain
more by wide ones than the rest does (on Zen 3, 1.2 to 1.4 at the level base, 1.3 to 1.7 at avx2),
so no limit of it holds everywhere: it is compared with itself, on one machine, before and after a
change. What holds everywhere is the count of the work (../tests/test_work.py).

A level's code takes some seconds to compile; what was compiled is kept in build/, under a name made
of the sources and the flags.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class NoCompiler(Exception):
    """There is nothing to compile with."""


def flags() -> list[str]:
    """setup.py's COMPILE, as it is written there: warnings and sanitizers are added later."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILE":
            return eval(ast.unparse(node.value))
    raise LookupError("setup.py assigns no COMPILE")


def build(level: str, *, program: bool, csrc: Path = ROOT / "csrc") -> Path:
    """The library, or the program, of the level "base", "avx2" or "avx512", from the sources in
    csrc."""
    compiler = os.environ.get("CC", "gcc").split()
    if shutil.which(compiler[0]) is None:
        raise NoCompiler(f"{compiler[0]} is not there")
    source = Path(__file__).with_suffix(".c")
    # Of the program profiler.py reads the lines, at fixed addresses; the code stays the same.
    kind = ["-g", "-fPIE", "-no-pie"] if program else ["-fPIC", "-shared"]
    command = [*compiler, *flags(), "-fwhole-program", "-Wno-unused-function", *kind]
    command += [f'-DLEVEL_FILE="{csrc}/cpu/levels/{level}_f32.c"', str(source)]
    text = b"".join(path.read_bytes() for path in [source, *sorted(csrc.rglob("*.*"))])
    name = hashlib.sha256(text + repr(command).encode()).hexdigest()[:16]
    target = ROOT / "build" / "benchmarks" / f"core_{level}_{name}{'' if program else '.so'}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")  # two processes may be at it
        subprocess.run([*command, "-o", str(partial), "-lm"], check=True)
        partial.replace(target)
    return target


def ratio(
    program: Path, images: int, classes: int, spread: float, moved: float, turns: int
) -> float:
    """How many times as long as its ideal, 4 N^2 D operations in products, the loss takes: D = 128,
    CPU time of both by turns in one process, the best of each."""
    words = [images, 128, classes, spread, moved, turns]
    done = subprocess.run(
        [str(program), *map(str, words)], capture_output=True, text=True, check=True
    )
    loss, ideal = map(float, done.stdout.split())
    return loss / ideal


@functools.cache
def product(level: str) -> Callable[[int], float]:
    """Multiplies two blocks in cache by the level's float tile, so many times, and returns the
    floating-point operations that took."""
    function = ctypes.CDLL(str(build(level, program=False))).product
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
    return function


# Images, classes, spread and shift of the views; turns. Blocks are of 96 rows up to 1024 and of 192
# beyond; tight classes are the hard case of the threshold.
BATCHES = {
    "502 rows": (251, 64, 0.6, 0.4, 15),
    "1102 rows": (551, 64, 0.6, 0.4, 8),
    "1102 rows in 4 tight classes": (551, 4, 0.08, 0.06, 8),
}


def main() -> None:
    from hex import ops

    program = build(ops.isa(), program=True)
    for name, batch in BATCHES.items():
        ratios = sorted(ratio(program, *batch) for _ in range(5))
        print(f"{name:<29} {ratios[2]:.2f} times the ideal, of five {ratios[0]:.2f} the least")


if __name__ == "__main__":
    main()
