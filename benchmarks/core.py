# SPDX-License-Identifier: MIT
"""The CPU core without torch: the time of the loss as a multiple of its ideal, at the level in use.

core.c is compiled with the flags of setup.py into a program that runs the loss and, beside it, what
its own register tile can reach. The ideal is 4 N^2 D operations in matrix products of blocks in
cache, by that tile. Loss and ideal take turns on one thread of one process, and the least CPU time
of each counts, so the multiple does not know the machine's clock, and on a machine with twice as
many processes as cores it repeated within 5 % in 75 runs. But it knows the CPU and its vectors, for
products gain more by wide ones than the rest does (on Zen 3, 1.2 to 1.4 at the level base, 1.3 to
1.7 at avx2), so no limit of it holds everywhere: it is compared with itself, on one machine, before
and after a change. What holds everywhere is the count of the work (../tests/test_work.py).

The program, whose path is printed, stays in build/ and has line numbers, for perf to read.
"""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

from hex import ops

ROOT = Path(__file__).resolve().parents[1]

# Images, classes, spread and shift of the views; turns. Blocks are of 96 rows up to 1024 and of 192
# beyond; tight classes are the hard case of the threshold.
BATCHES = {
    "502 rows": (251, 64, 0.6, 0.4, 15),
    "1102 rows": (551, 64, 0.6, 0.4, 8),
    "1102 rows in 4 tight classes": (551, 4, 0.08, 0.06, 8),
}


def flags() -> list[str]:
    """setup.py's COMPILE, as it is written there: warnings and sanitizers are added later."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILE":
            return eval(ast.unparse(node.value))
    raise LookupError("setup.py assigns no COMPILE")


def build(level: str) -> Path:
    """The program of a level of csrc/cpu/levels."""
    program = ROOT / "build" / "benchmarks" / f"core_{level}"
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [*os.environ.get("CC", "gcc").split(), *flags(), "-fwhole-program", "-g"]
    command += ["-Wno-unused-function", f'-DLEVEL_FILE="{ROOT}/csrc/cpu/levels/{level}_f32.c"']
    command += [str(Path(__file__).with_suffix(".c")), "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def main() -> None:
    program = build(ops.isa())
    print(program)
    for name, (images, *batch) in BATCHES.items():
        command = [str(word) for word in (program, images, 128, *batch)]
        runs = [subprocess.check_output(command, text=True).split() for _ in range(5)]
        ratios = sorted(float(loss) / float(ideal) for loss, ideal in runs)
        print(f"{name:<29} {ratios[2]:.2f} times the ideal, of five {ratios[0]:.2f} the least")


if __name__ == "__main__":
    main()
