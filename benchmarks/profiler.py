# SPDX-License-Identifier: MIT
"""Where the time of the loss goes: samples of the program of core.c, taken by perf on the clock of
the CPU, and each laid to what the source says at that instruction, inlined functions included.

The compiler mixes what belongs together in the source, so a share is right to a few per cent.
"""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import core

# What a sample is laid to: the first whose pattern is in the chain of its functions and files.
PARTS = {
    "not the loss": r"\b(product|main|make|noise)\b",
    "matrix products": r"\b(any|dot)_tile",
    "exponentials": r"\bexp2",
    "unit rows": r"unit\.h|product\.h|dot_",
    "threshold and lists": r"onepass\.h|quantile\.h|push|select",
    "sums and coefficients": r"tiles\.h|row\.h|blocks\.h|schedule\.h|real\.h",
}


class NoProfiler(Exception):
    """perf is not there, or may not sample."""


def shares(level: str, rows: int, quick: bool = False) -> dict[str, object]:
    """The share of each part in the time of forward and backward, in per cent."""
    for tool in ("perf", "addr2line"):
        if shutil.which(tool) is None:
            raise NoProfiler(f"{tool} is not there: apt install linux-perf binutils")
    program = core.build(level, program=True)
    turns = 2 if quick else max(10, 3 * (4096 // rows) ** 2)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "perf.data")
        record = ["perf", "record", "-q", "-e", "cpu-clock:u", "-F", "4000", "-o", file]
        run([*record, program, rows // 2, 128, 64, 0.6, 0.4, turns, "alone"])
        script = run(["perf", "script", "-i", file, "-F", "ip,dso"])
    addresses = re.findall(rf"([0-9a-f]+) \(\S*{re.escape(program.name)}\)", script)
    if not addresses:
        raise NoProfiler("perf took no samples")
    found = collections.Counter(laid_to(chain) for chain in chains(program, addresses))
    elsewhere = len(script.splitlines()) - len(addresses)  # the C library
    del found["not the loss"]
    found["the C library"] = elsewhere
    total = sum(found.values())
    return {
        "case": str(rows),
        "method": "shares of the time of HEXLoss",
        "samples": total,
        "percent": {name: round(100 * n / total, 1) for name, n in found.most_common()},
    }


def chains(program: Path, addresses: list[str]) -> list[str]:
    """Of each address the functions it is in, inlined ones first, and their files, as one text."""
    listed = run(["addr2line", "-a", "-f", "-i", "-e", program], "\n".join(addresses))
    return re.split(r"^0x[0-9a-f]+$", listed, flags=re.MULTILINE)[1:]


def laid_to(chain: str) -> str:
    return next((name for name, text in PARTS.items() if re.search(text, chain)), "other")


def run(words: list[object], text: str | None = None) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise NoProfiler(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
