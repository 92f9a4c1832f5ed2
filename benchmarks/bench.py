# SPDX-License-Identifier: MIT
"""Time and memory of hex against plain PyTorch, torch.compile and other libraries: `make bench`.

    python benchmarks/bench.py                    all parts, a quarter of an hour; a table of each
    python benchmarks/bench.py --quick            a minute, small sizes: to see that it runs
    python benchmarks/bench.py sizes --sizes 2048 4096x64 --methods hex "plain HEX"
    python benchmarks/bench.py --record FILE      append the results, a JSON line a part
    python benchmarks/bench.py --report           write the tables and pictures of the documents

Every method first computes the loss and the gradient of the very batch it is timed on, and these
have to be those of hex.reference in float64: a difference ends the run. How time and memory are
measured is in measure.py, what is compared in peers.py, on what in batches.py, which parts there
are in parts.py, and how a result is shown in report.py. --report shows benchmarks/results.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import parts
import peers
import report
import table
import torch
from cases import progress


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.report:
        return report.write()
    if options.child:
        return child(options)
    for part in options.parts:
        record = None
        for level in parts.LEVELS if part == "isa" else (None,):
            words = [part, *options.words, "--child"]
            environment = dict(os.environ)
            if level:  # what this CPU does not have is told in the notes
                environment |= {"HEX_ISA": level, "PYTHONWARNINGS": "ignore:HEX_ISA"}
            done = subprocess.run(
                [sys.executable, __file__, *words],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            progress("")
            if done.returncode != 0:
                return done.returncode
            record = joined(record, json.loads(done.stdout.splitlines()[-1]))
        for shown in report.tables(part, record):
            table.show(*shown)
            print()
        if options.record:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            with options.record.open("a") as file:
                file.write(json.dumps(record) + "\n")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times forward + backward of the HEX loss and of InfoNCE, after checking every "
        "method against hex.reference.",
        epilog="Methods: " + "; ".join(method.name for method in peers.METHODS) + ".",
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts.PARTS)}; default all")
    add("--quick", action="store_true", help="small sizes, without torch.compile")
    add("--repeats", type=int, default=5, help="samples a method; default 5, fewer of a long call")
    add("--sizes", nargs="+", default=[], metavar="2B[xD]", help="of the part `sizes`")
    add("--methods", nargs="+", default=[""], metavar="WORD", help="of the part `sizes`")
    add("--record", type=Path, metavar="FILE", help="append the results")
    add("--report", action="store_true", help="write the documents from benchmarks/results.jsonl")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.parts or list(parts.PARTS)
    for part in options.parts:
        if part not in parts.PARTS:
            parser.error(f"no part {part!r}: the parts are {', '.join(parts.PARTS)}")
    if options.repeats < 1:
        parser.error(f"--repeats: got {options.repeats}, wanted at least 1")
    for size in options.sizes:
        try:
            rows, _ = parts.shape(size)
        except ValueError:
            parser.error(f"--sizes: got {size!r}, wanted rows, 2B, or rows x features as in 512x64")
        if rows < 4 or rows % 2:
            parser.error(f"--sizes: got {size!r}, wanted an even number of rows, at least 4")
    if not methods(options):
        parser.error(f"--methods: no name holds one of {options.methods}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options.words = [*(["--quick"] if options.quick else []), "--repeats", str(options.repeats)]
    options.words += ["--methods", *options.methods] if "--methods" in given else []
    options.words += ["--sizes", *options.sizes] if options.sizes else []
    return options


def methods(options: argparse.Namespace) -> list[peers.Method]:
    words = [word.lower() for word in options.methods]
    return [m for m in peers.METHODS if any(word in m.name.lower() for word in words)]


def child(options: argparse.Namespace) -> int:
    """Runs one part in this process; its last line of output is the record."""
    torch.set_num_threads(1)
    settings = parts.Settings(options.quick, options.repeats, options.sizes, methods(options))
    try:
        record = run(options.parts[0], settings)
    except peers.Mismatch as error:
        progress("")
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n" + json.dumps(record))
    return 0


def run(part: str, settings: parts.Settings) -> dict[str, Any]:
    """The record of a part: what was measured, on what, by which code, when."""
    utc = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")
    before, start = measure.load(), time.perf_counter()
    results = parts.PARTS[part](settings)
    return {
        "part": part,
        "utc": utc.removesuffix("+00:00"),
        "quick": settings.quick,
        "seconds": round(time.perf_counter() - start),
        "load": [round(before, 1), round(measure.load(), 1)],
        "machine": measure.machine(),
        "notes": settings.notes,
        "results": results,
    }


def joined(record: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """Two records of one part, of processes of their own."""
    if record is None:
        return more
    machine = more["machine"] if more["results"] else record["machine"]
    return {
        **record,
        "seconds": record["seconds"] + more["seconds"],
        "load": [record["load"][0], more["load"][1]],
        "machine": machine,
        "notes": record["notes"] + [note for note in more["notes"] if note not in record["notes"]],
        "results": record["results"] + more["results"],
    }


if __name__ == "__main__":
    sys.exit(main())
