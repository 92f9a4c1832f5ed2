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

    python benchmarks/core.py            the multiples, as CC compiles (gcc)
    python benchmarks/core.py gcc clang  the times as several compile, by turns, and their ratios
"""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
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
# What core.c knows besides two views; logits have as many rows and columns as features.
KINDS = {
    **{name: (images, 128, *batch, "alone") for name, (images, *batch) in BATCHES.items()},
    "502 rows with labels": (251, 128, 64, 0.6, 0.4, 8, "labels"),
    "1102 rows with labels": (551, 128, 64, 0.6, 0.4, 4, "labels"),
    "512 logits of 1024": (512, 1024, 64, 0.6, 0.4, 15, "logits"),
}


def flags() -> list[str]:
    """setup.py's COMPILE, as it is written there: warnings and sanitizers are added later."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILE":
            return eval(ast.unparse(node.value))
    raise LookupError("setup.py assigns no COMPILE")


def build(level: str, compiler: str | None = None) -> Path:
    """The program of a level of csrc/cpu/levels, as CC or another compiler makes it."""
    name = f"core_{level}" if compiler is None else f"core_{level}_{Path(compiler).name}"
    program = ROOT / "build" / "benchmarks" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(compiler or os.environ.get("CC", "gcc")), *flags()]
    # clang knows no whole program, and leaves out what is not called without it
    command += ["-fwhole-program", "-Wno-ignored-optimization-argument", "-g"]
    command += ["-Wno-unused-function", f'-DLEVEL_FILE="{ROOT}/csrc/cpu/levels/{level}_f32.c"']
    command += [str(Path(__file__).with_suffix(".c")), "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def compare(compilers: list[str]) -> None:
    """Prints the least time of the loss as each compiler makes it, and its ratio to the first's."""
    for missing in (c for c in compilers if shutil.which(shlex.split(c)[0]) is None):
        print(f"{missing} is not installed")
    if not (there := [c for c in compilers if shutil.which(shlex.split(c)[0])]):
        return
    programs = [build(ops.isa(), compiler) for compiler in there]
    names = "".join((c + ", ms").rjust(12) for c in there)
    print(f"{ops.isa():<29} {names}   times the first")
    for name, words in KINDS.items():
        best = [float("inf")] * len(programs)
        for _ in range(5):
            for k, program in enumerate(programs):
                said = subprocess.check_output([str(w) for w in (program, *words)], text=True)
                best[k] = min(best[k], 1e3 * float(said.split()[0]))
        times = "".join(f"{b:12.2f}" for b in best)
        print(f"{name:<29} {times}   {'  '.join(f'{b / best[0]:.2f}' for b in best[1:])}")


def main() -> None:
    if len(sys.argv) > 1:
        compare(sys.argv[1:])
        return
    program = build(ops.isa())
    print(program)
    for name, (images, *batch) in BATCHES.items():
        command = [str(word) for word in (program, images, 128, *batch)]
        runs = [subprocess.check_output(command, text=True).split() for _ in range(5)]
        ratios = sorted(float(loss) / float(ideal) for loss, ideal in runs)
        print(f"{name:<29} {ratios[2]:.2f} times the ideal, of five {ratios[0]:.2f} the least")


if __name__ == "__main__":
    main()
