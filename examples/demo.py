# SPDX-License-Identifier: MIT
"""Shows in about a minute what the HEX loss does, on handwritten digits.

    python examples/demo.py

The same encoder is trained twice, with InfoNCE and with HEX, from the same weights and on the same
views in the same order. Then the accuracy of both encoders' features is printed, and pictures of
what the threshold did are drawn in runs/demo/, by hex.plots.

Needs hex-ssl[examples].
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import data, evaluate, plain
from common.options import parser_of
from common.pictures import maps, plt
from common.runs import console, progress
from rich.table import Table
from simclr import SimCLR
from sklearn.manifold import TSNE
from torch import Tensor, nn

from hex import plots
from hex.watch import class_share

BATCH = 256  # images; the loss sees twice as many views
LOSSES = {"InfoNCE": "base", "HEX": "hex"}  # name here: --loss of simclr.py


class Moment(NamedTuple):
    """Two views of the first BATCH images, as the loss saw them after `epoch` epochs."""

    epoch: int
    views: tuple[Tensor, Tensor]  # (B, 1, side, side) each, in [-1, 1]
    z: tuple[Tensor, Tensor]  # (B, D) each
    eps: float
    class_share: float


class Run:
    """One training, with what the table and the pictures need of it."""

    def __init__(self, name: str, seed: int, epochs: int) -> None:
        self.name = name
        torch.manual_seed(seed)
        self.images, self.test = data.load("digits")
        options = parser_of(SimCLR, "demo").parse_args(["--loss", LOSSES[name]])
        self.model = SimCLR(options, self.images)
        self.criterion = self.model.criterion
        self.steps = len(self.images) // BATCH
        self.epochs = epochs
        self.statistics: list[tuple[float, ...]] = []  # loss, eps, mean |H| and share of each step
        self.moments: list[Moment] = []  # the same images after each epoch

    def train(self) -> None:
        tables = plain.train(self.model, self.images, self.epochs, BATCH, lr=3e-3)
        self.seconds, start = 0.0, time.perf_counter()
        with progress() as bars:
            for table in bars.track(tables, self.epochs, description=f"{self.name:8}"):
                self.seconds += time.perf_counter() - start
                self.statistics += map(tuple, table.tolist())
                epoch = len(self.statistics) // self.steps
                if self.name == "HEX":
                    self.moments.append(self.look(epoch))
                if epoch % 10 == 0:
                    loss, eps, hard, _ = table.mean(0).tolist()
                    line = f"{self.name:8} epoch {epoch:3}  loss {loss:.3f}"
                    if np.isfinite(eps):
                        line += f"  eps {eps:.3f}  mean |H| {hard:.2f}"
                    console.print(line)
                start = time.perf_counter()

    @torch.no_grad()
    def look(self, epoch: int) -> Moment:
        """The first BATCH images in two fixed views, passed through the network and the loss."""
        index = torch.arange(BATCH)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            views = self.images.views(index)
        model = copy.deepcopy(self.model).train()  # a copy, or batch norm would count this batch
        z = model.embed(torch.cat(views)).chunk(2)
        self.criterion.eval()  # so that the threshold is measured but not stored
        self.criterion(*z)
        eps = self.criterion.last.eps
        share = class_share(*z, self.images.labels[index], eps)
        return Moment(epoch, tuple(views), z, float(eps), float(share))

    def evaluate(self) -> None:
        network = self.model.backbone
        train, self.features = (evaluate.features(network, x) for x in (self.images, self.test))
        self.scores = evaluate.scores(train, self.features)


def draw(infonce: Run, hex_run: Run, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    moments, labels = hex_run.moments, hex_run.images.labels[:BATCH]
    first, *_, late = moments
    _, eps, hard, _ = zip(*hex_run.statistics, strict=True)
    shares = [math.nan] * len(eps)
    for moment in moments:
        shares[moment.epoch * hex_run.steps - 1] = moment.class_share
    chance = float(class_share(*late.z, labels, -math.inf))
    history = {"eps": eps, "hard": hard, "class_share": shares}
    plots.threshold(
        history, hex_run.steps, chance=chance, negatives=2 * BATCH - 2
    ).savefig(out / "1-threshold.png")  # fmt: skip

    highest = max(moments[1:-1], key=lambda moment: moment.eps)
    figure = plt.figure(figsize=(7.5, 9.5))
    for moment, panel in zip((first, highest, late), figure.subfigures(3, 1), strict=True):
        title = f"After epoch {moment.epoch}"
        plots.cosines(*moment.z, moment.eps, labels, title=title, into=panel)
    top = max(axis.get_ylim()[1] for axis in figure.axes)
    for axis in figure.axes:
        axis.set_ylim(0, top)
    save(figure, out / "2-cosines.png")

    ink = (-view for view in late.views)  # dark on light
    anchors = [int(torch.nonzero(labels == digit)[0]) for digit in range(6)]
    plots.neighbours(
        *ink, *late.z, late.eps, labels, anchors=anchors, title=f"After epoch {late.epoch}"
    ).savefig(out / "3-neighbours.png")

    panels = {}
    for run in (infonce, hex_run):
        knn, one_label, *_ = run.scores
        name = f"{run.name}: k-NN {knn:.1%}, linear probe {one_label:.1%} with 1 label a digit"
        panels[name] = TSNE(init="pca", perplexity=30, random_state=0).fit_transform(
            run.features[0]
        )
    title = (
        "Without a label in training, the test images fall into groups by digit\n"
        "(t-SNE of the backbone's features: who is near whom has a meaning, the axes have none)"
    )
    save(maps(panels, infonce.features[1], title), out / "4-maps.png")


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def explanation(run: Run) -> str:
    """What the third panel of the threshold's picture means for the loss."""
    return (
        f"In the end {run.moments[-1].class_share:.0%} of H, the negatives above eps, show the "
        "digit of their anchor. The paper's form of the loss, with which this was trained, repels "
        f"them, and expects only a share tau_plus = {run.criterion.tau_plus} of them to be of the "
        'anchor\'s class. HEXLoss(variant="released") leaves them out. '
        "See docs/guides/what_h_holds.md."
    )


def report(runs: list[Run], pixels: list[float], seeds: int) -> Table:
    def cell(values: list[float], form: str) -> str:
        text = form.format(np.mean(values))
        return text if len(values) == 1 else f"{text} ± {form.format(np.std(values, ddof=1))}"

    table = Table(title="Accuracy on 500 test images (%)")
    for name in ("", "loss", "k-NN", "linear, 1 label", "5 labels", "all labels", "seconds"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("pixels", "", *(f"{100 * x:.1f}" for x in pixels), "")
    for name in ("InfoNCE", "HEX"):
        mine = [run for run in runs if run.name == name]
        columns = zip(*(run.scores for run in mine), strict=True)
        scores = (cell([100 * x for x in column], "{:.1f}") for column in columns)
        losses = [float(np.mean([row[0] for row in run.statistics[-run.steps :]])) for run in mine]
        seconds = cell([run.seconds for run in mine], "{:.0f}")
        table.add_row(name, cell(losses, "{:.2f}"), *scores, seconds)
    table.caption = "loss: mean of the last epoch; the two losses are on different scales.\n" + (
        "One seed: small differences are chance; --seeds 5 repeats it"
        if seeds == 1
        else f"Mean and standard deviation of {seeds} seeds"
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60, help="epochs to train, at least 3")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each loss, for the table")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args(arguments)
    if options.epochs < 3 or options.seeds < 1:
        parser.error("wanted --epochs of at least 3 and --seeds of at least 1")
    # The images are tiny, so a second thread gains little, and the results would depend on it.
    torch.set_num_threads(1)

    images, test = data.load("digits")
    console.print(
        f"{len(images)} handwritten digits of 8 x 8 pixels to learn from, without their labels; "
        f"{len(test)} to test with"
    )
    runs = []
    for seed in range(options.seeds):
        for name in ("InfoNCE", "HEX"):
            run = Run(name, seed, options.epochs)
            try:
                run.train()
                run.evaluate()
            except evaluate.Diverged as error:
                print(f"demo.py: the training with {name} diverged: {error}", file=sys.stderr)
                return 1
            runs.append(run)
    pixels = evaluate.scores(*(evaluate.features(nn.Flatten(), split) for split in (images, test)))
    console.print(report(runs, pixels, options.seeds))
    with console.status("drawing"):
        draw(*runs[:2], options.out)
    console.print("pictures:", *sorted(map(str, options.out.glob("*.png"))), sep="\n  ")
    console.print(explanation(runs[1]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
