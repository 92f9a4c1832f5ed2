# SPDX-License-Identifier: MIT
"""The tables of docs/paper_runs.md: the runs, paper against ours, and what the runs cost.

    python examples/paper/table.py                # write the tables anew
    python examples/paper/table.py runs/NAME ...  # take over the results of runs first

The results are in examples/paper/results.json: what the paper reports for a run, and what our runs
gave. A table is between two comments of the page.
"""

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import encoder  # noqa: E402

from paper import settings as of  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "paper_runs.md"
RESULTS = of.FOLDER / "results.json"
NAMES = {
    "imagenet": "ImageNet", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
    "resnet18": "ResNet-18", "resnet50": "ResNet-50",
    "simclr": "SimCLR", "nnclr": "NNCLR", "barlow": "Barlow Twins",
}  # fmt: skip

# The training images of each data set.
IMAGES = {"imagenet": 1281167, "cifar10": 50000, "cifar100": 50000}
# Images a second that a ResNet-50 is trained with, at 224 pixels, on 8 GPUs: docs/paper_runs.md has
# the sources. lightly's 35 minutes an epoch are of two views of each image, on 2 GPUs.
RATES = {"fast": 16621.0, "slow": 2 * IMAGES["imagenet"] / (35 * 60) * 8 / 2}
FORWARD = 1 / 3  # of a step's work: the backward is two thirds


def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())


def key(run: str, data: str, backbone: str) -> str:
    return f"{run} {data} {backbone}"


def taken_over(known: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The results with those of a run's folder.

    Raises:
        ValueError: it is no finished run, or one of --tiny. The text is meant for the user.
    """
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; wanted the result of a finished run") from None
    if result.get("tiny") is not False:
        raise ValueError(f"{file}: got a run of --tiny or of another script, wanted a whole run")
    own = key(*(result[name] for name in ("run", "data", "backbone")))
    row = {name: result[name] for name in ("variant", "seed", "devices", "linear")}
    rows = [
        x for x in known["ours"].get(own, []) if any(x[n] != row[n] for n in ("variant", "seed"))
    ]
    return known | {"ours": known["ours"] | {own: [*rows, row]}}


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def runs_table() -> str:
    rows = []
    for name in of.RUNS:
        settings = of.read(of.FOLDER / f"{name}.yaml")
        batch, times = settings["batch"], settings["accumulate"]
        rows.append([
            f"`{name}`",
            NAMES[settings["method"]],
            _threshold(settings),
            f"{settings['epochs']}",
            f"{batch}" if times == 1 else f"{batch * times} = {times} x {batch}",
            f"{of.learning_rate(settings):g}",
            f"{settings['weight_decay']:g}",
        ])  # fmt: skip
    return table(
        ["file", "method", "threshold", "epochs", "images in a step", "learning rate", "decay"],
        rows,
    )


def _threshold(settings: of.Settings) -> str:
    if settings["loss"] == "base":
        return "none: the method alone"
    rule = settings["threshold"]
    if isinstance(rule, str):
        return f'`authors_threshold("{rule}")`'
    options = ", ".join(f"{name}={value!r}" for name, value in rule.items() if name != "rule")
    return f"`{rule['rule']}({options})`"


def results_table() -> str:
    known, rows = results(), []
    for name, data, backbone, settings in of.combinations():
        own = key(name, data, backbone)
        reported = known["paper"].get(own)
        ours = known["ours"].get(own, [])
        parts = [ours]  # the method alone has no form
        if settings["loss"] == "hex":
            parts = [[x for x in ours if x["variant"] == form] for form in ("released", "paper")]
        cells = ["; ".join(map(_scores, part)) or "not run" for part in parts]
        rows.append([
            f"`{name}`", NAMES[data], NAMES[backbone],
            "not found by us" if reported is None else f"{reported:.2f}",
            *(cells if len(cells) == 2 else [cells[0], ""]),
        ])  # fmt: skip
    return table(
        ["file", "data", "network", "paper", "ours, released form", "ours, paper's form"], rows
    )


def _scores(result: dict[str, Any]) -> str:
    """Top 1 for each share of the labels."""
    scores = result["linear"].items()
    return ", ".join(f"{100 * first:.2f} ({float(part):.0%})" for part, (first, _) in scores)


@cache
def work(data: str, backbone: str) -> float:
    """The multiplications of a network's forward for an image, as a share of those of a ResNet-50
    at 224 pixels."""
    return _flops(backbone, of.CROP[data]) / _flops("resnet50", 224)


def _flops(backbone: str, size: int) -> int:
    with torch.device("meta"):
        network, _ = encoder.backbone(backbone, size)
        if size <= 64:
            network.conv1.padding = 2, 2  # as in methods.py
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def cost(data: str, backbone: str, settings: of.Settings) -> tuple[float, float]:
    """The views that a run trains on and the views of its probes, both in millions of images of a
    ResNet-50 at 224 pixels that is trained."""
    share = IMAGES[data] / 1e6 * work(data, backbone)
    probe = settings["probe"]
    training = 2 * share * settings["epochs"]
    return training, FORWARD * share * probe["epochs"] * sum(probe["fractions"])


def cost_table() -> str:
    """A row for all files that cost the same."""
    files: dict[tuple[str, ...], list[str]] = {}
    for name, data, backbone, settings in of.combinations():
        hours = (
            " to ".join(f"{x * 1e6 / RATES[rate] / 3600:.2g}" for rate in ("fast", "slow"))
            for x in cost(data, backbone, settings)
        )
        same = "ImageNet" if data == "imagenet" else "CIFAR"
        what = (
            same,
            NAMES[backbone],
            f"{settings['epochs']}",
            f"{work(data, backbone):.2f}",
            *hours,
        )
        of_row = files.setdefault(what, [])
        if f"`{name}`" not in of_row:
            of_row.append(f"`{name}`")
    rows = [[*what, ", ".join(names)] for what, names in files.items()]
    return table(
        ["images", "network", "epochs", "w", "training, hours", "probes, hours", "files"], rows
    )


TABLES = {"runs": runs_table, "results": results_table, "cost": cost_table}


def written(page: str) -> str:
    """A page with its tables made anew."""
    for name, make in TABLES.items():
        page, found = re.subn(
            f"(<!-- paper {name} -->\n\n).*?(\n<!-- end -->)",
            lambda match, make=make: match[1] + make() + match[2],
            page,
            flags=re.S,
        )
        assert found == 1, f"{PAGE}: {found} places for the table {name}"
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of docs/paper_runs.md.")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs")
    known = results()
    try:
        for folder in parser.parse_args(arguments).runs:
            known = taken_over(known, folder)
    except ValueError as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return 2
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")
    PAGE.write_text(written(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
