# SPDX-License-Identifier: MIT
"""Trains every method with its own loss and with HEX, and prints one table of the results.

    python examples/compare.py                     # digits, takes some minutes
    python examples/compare.py --only moco,byol
    python examples/compare.py --show DIR          # the table of runs that were made before

Options that this script does not know are passed on to every script, for example `--epochs 10` or
`--data cifar10 --root DIR`. Each run is a process of its own with one thread. The table is made
from the `result.json` of each run.

Needs hex-ssl[examples].
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from common.options import positive
from common.runs import console, progress
from rich.table import Table

HERE = Path(__file__).parent
METHODS = "simclr moco nnclr all4one clip supcon byol dino barlow_twins vicreg".split()
LOSSES = "base", "hex"
SHOWN = {"knn": "k-NN", "linear_1": "1 label"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--only",
        metavar="METHODS",
        default=",".join(METHODS),
        help="methods, separated by commas; by default all: %(default)s",
    )
    add(
        "--jobs",
        type=positive,
        default=os.cpu_count(),
        help="runs at the same time; by default %(default)s",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the runs; by default runs/ and a name with the time",
    )
    add("--show", type=Path, metavar="DIR", help="print only the table of the runs in this folder")
    options, passed_on = parser.parse_known_args(arguments)
    methods = options.only.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"got {', '.join(sorted(unknown))}, wanted --only of {', '.join(METHODS)}")
    if options.show is None:
        out = options.out or Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
        if out.exists():
            parser.error(f"--out {out}: the folder exists already; --show {out} prints its table")
        if not run_all(methods, passed_on, out, options.jobs):
            return 1
    elif passed_on:
        parser.error(f"got {' '.join(passed_on)} and --show, which runs nothing")
    else:
        out = options.show
    results = read(out)
    if not results:
        parser.error(f"--show {out}: found no runs there, wanted */result.json")
    console.print(table(results))
    console.print(f"runs: {out}/*/log.txt, last.ckpt and result.json", soft_wrap=True)
    return 0


def run_all(methods: list[str], options: list[str], out: Path, jobs: int) -> bool:
    """Runs all methods, `jobs` at a time. Each run's output is in its log.txt.

    Returns:
        Whether all went well. After the first failure nothing more is started.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool, progress() as bars:
        task = bars.add_task("training", total=len(methods) * len(LOSSES))
        runs = [pool.submit(run, m, loss, options, out) for m in methods for loss in LOSSES]
        try:
            for future in as_completed(runs):
                folder, process = future.result()
                bars.advance(task)
                if process.returncode != 0:
                    lines = process.stdout.strip().splitlines()[-10:]
                    command = " ".join(process.args)
                    console.print(f"{command} failed:", *lines, sep="\n", soft_wrap=True)
                    return False
                result = json.loads((folder / "result.json").read_text())
                seconds = time.perf_counter() - start
                console.print(f"{seconds:4.0f} s  {folder.name:18} k-NN {result['knn']:.2%}")
        finally:  # runs that have not begun must not begin, after Ctrl-C either
            pool.shutdown(wait=False, cancel_futures=True)
    return True


def run(
    method: str, loss: str, options: list[str], out: Path
) -> tuple[Path, subprocess.CompletedProcess]:
    """One run in a process of its own: its folder, and the process that has ended."""
    folder = out / f"{method}-{loss}"
    folder.mkdir(parents=True)
    own = "--loss", loss, "--out", str(folder)
    process = subprocess.run(
        [sys.executable, str(HERE / f"{method}.py"), *options, *own],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (folder / "log.txt").write_text(process.stdout)
    return folder, process


def read(folder: Path) -> dict[str, dict[str, dict]]:
    """The results of all runs in a folder, keyed by script and loss, in the order of METHODS."""
    results: dict[str, dict[str, dict]] = {}
    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        results.setdefault(result["script"], {})[result["loss"]] = result
    known = {name: results[name] for name in METHODS if name in results}
    return known | results


def table(results: dict[str, dict[str, dict]]) -> Table:
    """One row for each method: accuracy with its own loss, with HEX, and the difference."""
    some = next(iter(next(iter(results.values())).values()))
    made = Table(
        title=f"Accuracy on the test images (%): {some['data']}, {some['epochs']} epochs, batch "
        f"size {some['batch_size']}, seed {some['seed']}"
    )
    made.add_column("", no_wrap=True)
    for name in SHOWN.values():
        for column in (f"{name}\nbase", "\nHEX", "\ndiff."):
            made.add_column(column, justify="right", no_wrap=True)
    made.add_column("with HEX, the loss is")
    for runs in results.values():
        base, with_hex = (runs.get(loss, {}) for loss in LOSSES)
        row = [(base or with_hex)["method"]]
        for score in SHOWN:
            pair = base.get(score), with_hex.get(score)
            row += [percent(x) for x in pair]
            row.append("" if None in pair else f"{100 * (pair[1] - pair[0]):+.1f}")
        made.add_row(*row, with_hex.get("objective", ""))
    made.caption = (
        "k-NN: 20 neighbours, all labels. 1 label: logistic regression on one labelled image of "
        "each class, mean of 10 choices. One run each: with other random views k-NN moves by up to "
        "1, and 1 label by up to 3."
    )
    return made


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:.1f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
