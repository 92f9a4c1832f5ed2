# SPDX-License-Identifier: MIT
"""Does HEX help? Trains and measures a grid of losses and seeds, and reports the results.

    python examples/study.py list cpu
    python examples/study.py run cpu --root DIR        # several processes may share the work
    python examples/study.py run gpu --root DIR
    python examples/study.py run cpu --data folder --root DIR --superclasses FILE --rows FILE
    python examples/study.py report                    # rewrites docs/effect.md and its pictures

What is compared is declared in effect/table.py. Each run adds one row to a file of JSON lines. Runs
that have a row are not repeated, and a run that was stopped is repeated from its beginning. Needs
hex-ssl[examples].
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import data
from common.evaluate import Diverged
from common.options import check_device, positive
from common.training import console
from effect import plots, report, rows
from effect.run import Images, commit_here, run
from effect.table import STUDIES, Config, Study, plan
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "data" / "effect.jsonl"
DOCUMENT = ROOT / "docs" / "effect.md"


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except (data.DataError, rows.RowsError, ValueError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the current run is repeated from its beginning next time")
        return 130


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function in (list_runs, run_all):
        command = commands.add_parser(
            function.__name__.partition("_")[0], help=function.__doc__.partition(".")[0]
        )
        command.set_defaults(command=function)
        command.add_argument("study", choices=STUDIES)
        command.add_argument(
            "--rows", type=Path, default=ROWS, help="file of the rows; by default %(default)s"
        )
        command.add_argument("--data", choices=data.NAMES, help="by default that of the study")
    add = command.add_argument
    add("--root", type=Path, help="folder of the images: CIFAR-10, or train/ and test/")
    add("--image-size", type=positive, default=32, help="side in pixels, for --data folder")
    add("--superclasses", type=Path, metavar="FILE", help="JSON file {class: superclass}")
    add(
        "--limit",
        type=positive,
        default=sys.maxsize,
        help="the most runs that this process does",
    )
    add("--threads", type=positive, help="threads of torch; by default 1 on the CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command = commands.add_parser("report", help=write_report.__doc__.partition(".")[0])
    command.set_defaults(command=write_report)
    add = command.add_argument
    add("--rows", type=Path, default=ROWS, help="file of the rows; by default %(default)s")
    add(
        "--document",
        type=Path,
        default=DOCUMENT,
        help="%(default)s; a new document gets all tables",
    )
    return parser


def chosen_study(options: argparse.Namespace) -> Study:
    """The study on the data that --data asks for, without the regimes that name its own classes."""
    study = STUDIES[options.study]
    if options.data in (None, study.setup.data):
        return study
    regimes = {name: change for name, change in study.regimes.items() if "classes" not in change}
    if left_out := ", ".join(study.regimes.keys() - regimes.keys()):
        console.print(f"left out, because they name classes of {study.setup.data}: {left_out}")
    return replace(study, setup=replace(study.setup, data=options.data), regimes=regimes)


def known_runs(options: argparse.Namespace, study: Study) -> tuple[list[Config], rows.Rows]:
    """The runs that are known so far, as the rows decide them, and the rows.

    Raises:
        RowsError: a row has the key of a run that the table now describes differently.
    """
    there = rows.read(options.rows)
    configs = plan(options.study, study, rows.without_test(there))
    for config in configs:
        row = there.get(config.key)
        for name, value in config.described().items() if row else ():
            if row[name] != value:
                raise rows.RowsError(
                    f"{options.rows}: {config.key!r} has {name} {row[name]}, and the table now "
                    f"{value}; take another file with --rows"
                )
    return configs, there


def list_runs(options: argparse.Namespace) -> int:
    """Print the runs that are known so far. Later stages depend on results."""
    configs, there = known_runs(options, chosen_study(options))
    for config in configs:
        console.print("done " if config.key in there else "     ", config.key)
    return 0


def run_all(options: argparse.Namespace) -> int:
    """Do all runs of a study that have no row yet. Several processes may do so at once."""
    study = chosen_study(options)
    known_runs(options, study)  # a fault in the rows is reported before the images are read
    device = check_device(options.device)
    if device.type == "cpu":
        # With one thread the results do not depend on the number of cores. scikit-learn's
        # libraries have thread pools of their own.
        torch.set_num_threads(options.threads or 1)
        threadpool_limits(options.threads or 1)
    images = Images(
        study.setup.data, options.root, device, options.image_size, options.superclasses
    )
    commit, done = commit_here(), 0
    while done < options.limit:
        configs, there = known_runs(options, study)
        left = [config for config in configs if config.key not in there]
        if not left:
            console.print(f"all {len(configs)} runs are in {options.rows}")
            break
        for config in left:
            with rows.claim(options.rows, config.key) as mine:
                # Another process may have finished the run between the reading and the claim.
                if not mine or config.key in rows.read(options.rows):
                    continue
                try:
                    row = run(config, images, commit)
                except Diverged as error:
                    print(f"study.py: {config.key} diverged: {error}", file=sys.stderr)
                    return 1
                rows.append(options.rows, row)
            done += 1
            score = row["validation"]
            console.print(
                f"{time.strftime('%H:%M:%S')} {config.key}: held-out k-NN {score['knn']:.2%}, "
                f"linear {score['linear']:.2%}, {row['cost']['cpu_all']:.0f} s of CPU",
                soft_wrap=True,
            )
            break
        else:
            time.sleep(2)  # others do all known runs, and their results decide the next ones
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Draw the document's tables and pictures from the rows. The text around them stays."""
    there = rows.read(options.rows)
    if not there:
        raise ValueError(f"--rows {options.rows}: there are no rows")
    if options.document.exists():
        text = options.document.read_text()
    else:
        names = sorted({row["study"] for row in there.values()})
        text = "\n".join(report.empty(name) for name in names)
    options.document.parent.mkdir(parents=True, exist_ok=True)
    options.document.write_text(report.filled(text, STUDIES, there))
    for name, study in STUDIES.items():
        mine = {key: row for key, row in there.items() if row["study"] == name}
        for path in plots.draw(name, study, mine, options.document.parent / "images"):
            console.print(f"drawn: {path}", soft_wrap=True)
    console.print(f"filled: {options.document}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
