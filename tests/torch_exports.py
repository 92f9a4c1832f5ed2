# SPDX-License-Identifier: MIT
"""What each release of torch exports for extensions in C: the table torch_exports.txt, which
test_abi.py holds against what hex._C needs. To add a release, from its wheel for CUDA:

    python tests/torch_exports.py 2.13.0 torch/lib/libtorch_cpu.so torch/lib/libtorch_cuda.so
"""

import re
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
CSRC = FILE.parents[1] / "csrc"
# The C functions, but for the operators that compiled graphs call.
SHIM = re.compile(r"(aoti_torch_|torch_)(?!(cpu|cuda|mps|xpu)_)\w+$")

Table = dict[tuple[str, str], set[str]]  # (library, function): the releases that export it


def read() -> Table:
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    rows = (line.split() for line in lines if line and not line.startswith("#"))
    return {(library, name): set(releases) for library, name, *releases in rows}


def write(table: Table) -> None:
    rows = (" ".join((*key, *sorted(table[key]))) for key in sorted(table))
    FILE.write_text("\n".join(["# Made by torch_exports.py.", *rows]) + "\n")


def exported(library: Path) -> list[str]:
    command = ["nm", "-D", "--defined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines]


def add(table: Table, release: str, library: str, names: list[str]) -> None:
    for name in names:
        if SHIM.match(name):
            table.setdefault((library, name), set()).add(release)


def needed(release: str) -> set[tuple[str, str]]:
    """(library, function) that hex-ssl has to find in a release: csrc/torch_shim.h names those of
    libtorch_cpu.so, with a list of their own for what 2.11 brought, and device.c asks for others.
    """
    always, newer = (CSRC / "torch_shim.h").read_text().split("define HEX_TORCH_FUNCTIONS_2_11")
    with_newer = tuple(map(int, release.split(".")[:2])) >= (2, 11)
    names = re.findall(r"^ +X\(\w+, (\w+),", always + newer * with_newer, re.M)
    by_name = re.findall(r'dlsym\(torch_cuda, "(\w+)"\)', (CSRC / "device.c").read_text())
    return {("libtorch_cpu.so", name) for name in names} | {
        ("libtorch_cuda.so", name) for name in by_name
    }


if __name__ == "__main__":
    release, *libraries = sys.argv[1:]
    table = read()
    for library in map(Path, libraries):
        add(table, release, library.name, exported(library))
    write(table)
