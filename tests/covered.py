# SPDX-License-Identifier: MIT
"""Which lines and branches of csrc the program of alone/ takes, and of hex/ the tests.

The extension is compiled with gcc's --coverage and without inlining, so that a branch of the source
is one branch, and again with its bfloat16 levels emulated. The program solves problems at every
level, has each call and each allocation fail once, and changes arguments; what is taken is merged
over levels, types and builds. Each line of which something is not taken has to be in untaken.txt
with the reason, and each line there has to be such a line; else this ends with an error. gcc does
not build csrc/cuda/: tests/test_cuda_*.py are for that.

    python tests/covered.py           csrc, then hex/ by `make test` under coverage.py
    python tests/covered.py --csrc    csrc alone
    python tests/covered.py --part    csrc by fewer problems, which HEX_SEED draws, and which need
                                      not take all: a share of lines and branches is asked for
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from standalone import ROOT, build, compile_extension, run, without
from test_import import FUNCTIONS
from test_isa import BUILT, FLAGS, cpu_flags

FOLDER = ROOT / "build" / "coverage"
LIST = Path(__file__).with_name("untaken.txt")
# The attribute of functions that are always inlined is turned into its opposite.
OPTIONS = [
    "-O1",
    "-w",
    "-Wno-psabi",
    "--coverage",
    "-fprofile-update=atomic",  # else threads' counts are lost, or below zero
    "-fno-exceptions",
    "-fno-inline",
    "-Dalways_inline=noinline",
]
EMULATED = ["avx512_bf16", "avx512_amx"]
PART = (0.94, 0.86)  # of lines, of branches: few seeds took less than 98 % and 92 %


def solve_problems(seed: int, part: bool) -> dict[Path, list[str]]:
    """The folders of the builds, with what gcc's code has counted, and the levels that ran."""
    own, emulated = FOLDER / "own", FOLDER / "emulated"
    levels = [level for level in BUILT if FLAGS[level] <= cpu_flags()]
    program = build(FOLDER / "alone")
    older = build(FOLDER / "torch_2_10", "-DTORCH_2_10")
    extension = compile_extension(own, lambda source: OPTIONS, "--coverage")

    def go(
        level: str, *command: object, to: Path = extension, by: Path = program, seed: int = seed
    ) -> None:
        print(f"{level or 'the best level'}: {' '.join(map(str, command))}", flush=True)
        run(by, to, level, seed, *command, timeout=3000)

    for level in ("", *levels):
        go(level, "import")
    for level in levels:
        go(level, "solve", 0, 96 if part else 672)
    for k, level in enumerate(levels[:1] if part else dict.fromkeys((levels[0], levels[-1]))):
        go(level, "fail", 0, 24 if part else 96)
        go(level, "fuzz", 0, 48 if part else 144, seed=seed + k)
    go("", "cuda", 0, 24, program.parent)
    go("", "threads", 0, 24)
    go("", "solve", 0, 48, by=older)
    if part:
        for always in (1, 2, 3):  # the rare ones may all be missing from 96 that are drawn
            go("", "solve", 0, 96, seed=always)
        if EMULATED[0] in levels:
            return {own: levels}
    else:
        for more in range(2, 13):
            go("", "solve", 0, 672 if more < 5 else 192, seed=more)
        for first in (144, 240, 336):  # more tiles
            go("", "fail", first, first + 24)
        go("", "fail", 543, 544, seed=5)  # positives' cosines that are several threads'
        for function in FUNCTIONS:
            try:
                run(without(program, function, FOLDER / "without"), extension, "", seed, "import")
            except AssertionError as error:
                assert f"no symbol {function}" in str(error), error
        go(levels[-1], "solve", 744, 747)  # so many rows that lists serve their quantiles
    if "avx2" not in levels:
        print(
            f"{' and '.join(EMULATED)} cannot be emulated, for this CPU has no AVX2: "
            "what only products of bfloat16 have is counted as not taken"
        )
        return {own: levels}
    bf16 = compile_extension(
        emulated, lambda source: [*OPTIONS, "-DHEX_EMULATE_BF16"], "--coverage"
    )
    for level in EMULATED:
        go(level, "solve", 0, 96, to=bf16)
    if not part and EMULATED[0] not in levels:  # only here are products of it
        for more in range(1, 5):
            go(EMULATED[0], "solve", 0, 672, to=bf16, seed=more)
        go(EMULATED[0], "fail", 0, 96, to=bf16)
    return {own: levels, emulated: EMULATED}


def read_counts(builds: dict[Path, list[str]]) -> tuple[Counter, Counter]:
    """How often each (file, line), and each (file, line, branch), was taken. What a build has of
    levels that it did not run is left out: the CPU has none such, or another build ran them."""
    lines, branches = Counter(), Counter()
    for folder, levels in builds.items():
        target = folder / "gcov"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        unused = tuple(f"{level}_f" for level in BUILT if level not in levels)
        counted = [str(p) for p in sorted(folder.glob("*.gcda")) if not p.name.startswith(unused)]
        command = ["gcov", "--branch-probabilities", "--json-format", *counted]
        subprocess.run(command, cwd=target, check=True, stdout=subprocess.DEVNULL)
        for path in target.glob("*.gz"):
            for file in json.loads(gzip.decompress(path.read_bytes()))["files"]:
                name = os.path.normpath(file["file"])
                if not name.startswith(f"{ROOT / 'csrc'}/"):
                    continue
                name = name.removeprefix(f"{ROOT / 'csrc'}/")
                for line in file["lines"]:
                    lines[name, line["line_number"]] += line["count"]
                    for number, branch in enumerate(line["branches"]):
                        branches[name, line["line_number"], number] += branch["count"]
    return lines, branches


def share(counts: Counter) -> str:
    taken = sum(map(bool, counts.values()))
    return f"{taken} of {len(counts)} ({taken / max(1, len(counts)):.1%})"


def print_table(lines: Counter, branches: Counter) -> None:
    print(f"\n{'csrc/':<26}{'lines':>26}{'branches':>26}")
    for name in (*sorted({key[0] for key in lines}), None):
        of = [
            Counter({key: n for key, n in counts.items() if name in (None, key[0])})
            for counts in (lines, branches)
        ]
        print(f"{name or 'together':<26}{share(of[0]):>26}{share(of[1]):>26}")


def untaken(lines: Counter, branches: Counter) -> dict[tuple[str, int], str]:
    """Where something was not taken: file and line, and its text."""
    where = {key[:2] for counts in (lines, branches) for key, n in counts.items() if n == 0}
    sources = {name: (ROOT / "csrc" / name).read_text().splitlines() for name, _ in where}
    return {key: sources[key[0]][key[1] - 1].strip() for key in sorted(where)}


def compare_with_list(found: dict[tuple[str, int], str]) -> list[str]:
    """What is wrong: lines that are in the one only."""
    lines = [line for line in LIST.read_text().splitlines() if line and line[0] != "#"]
    listed = {tuple(line.removeprefix("? ").split(": ", 1)) for line in lines}
    either = {tuple(line[2:].split(": ", 1)) for line in lines if line.startswith("? ")}
    wrong = [
        f"csrc/{name}:{number} has a branch that nothing takes: {text}"
        for (name, number), text in found.items()
        if (name, text) not in listed
    ]
    there = {(name, text) for (name, _), text in found.items()}
    wrong += [
        f"untaken.txt has a line whose branches are all taken, or that is no more: {name}: {code}"
        for name, code in sorted(listed - there - either)
    ]
    return wrong


def of_python() -> int:
    """The tests again, as `make test` chooses them (HEX_PYTEST), with coverage.py; its table is of
    hex/."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile"]
    command += ["--cov=hex", "--cov-branch", "--cov-report=term-missing:skip-covered"]
    command += os.environ.get("HEX_PYTEST", "").split()
    environment = {"OMP_NUM_THREADS": "1", "COVERAGE_FILE": str(FOLDER / "hex")}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Lines and branches that are taken.")
    parser.add_argument("--csrc", action="store_true", help="csrc alone")
    parser.add_argument("--part", action="store_true", help="csrc, by a part of the problems")
    given = parser.parse_args()
    seed = int(os.environ.get("HEX_SEED") or random.randrange(1_000_000)) if given.part else 1
    print(f"HEX_SEED={seed}", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    lines, branches = read_counts(solve_problems(seed, given.part))
    print_table(lines, branches)
    if given.part:
        taken = [sum(map(bool, c.values())) / len(c) for c in (lines, branches)]
        print(f"wanted: {PART[0]:.1%} of lines, {PART[1]:.1%} of branches")
        return int(taken[0] < PART[0] or taken[1] < PART[1])
    wrong = compare_with_list(untaken(lines, branches))
    print("", *wrong, f"{len(wrong)} lines of csrc and of untaken.txt are wrong", sep="\n")
    return bool(wrong) or (not given.csrc and of_python())


if __name__ == "__main__":
    sys.exit(main())
