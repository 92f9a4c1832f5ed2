# SPDX-License-Identifier: MIT
"""Shows in about a minute what the HEX loss does, on handwritten digits.

    python examples/demo.py

The same encoder is trained twice, with InfoNCE and with HEX, from the same weights and on the same
views in the same order. Then the accuracy of both encoders' features is printed, and pictures of
what the threshold did are drawn in runs/demo/.

Needs hex-ssl[examples].
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import data, evaluate, pictures, plain
from common.options import parser_of
from common.runs import console, progress
from rich.table import Table
from simclr import SimCLR
from sklearn.manifold import TSNE
from torch import nn

BATCH = 256  # images; the loss sees twice as many views
LOSSES = {"InfoNCE": "base", "HEX": "hex"}  # name here: --loss of simclr.py


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
        self.batches: list[pictures.Batch] = []  # the same images after each epoch

    def train(self) -> None:
        tables = plain.train(self.model, self.images, self.epochs, BATCH, lr=3e-3)
        self.seconds, start = 0.0, time.perf_counter()
        with progress() as bars:
            for table in bars.track(tables, self.epochs, description=f"{self.name:8}"):
                self.seconds += time.perf_counter() - start
                self.statistics += map(tuple, table.tolist())
                epoch = len(self.statistics) // self.steps
                if self.name == "HEX":
                    self.batches.append(self.look(epoch))
                if epoch % 10 == 0:
                    loss, eps, hard, _ = table.mean(0).tolist()
                    line = f"{self.name:8} epoch {epoch:3}  loss {loss:.3f}"
                    if np.isfinite(eps):
                        line += f"  eps {eps:.3f}  mean |H| {hard:.2f}"
                    console.print(line)
                start = time.perf_counter()

    @torch.no_grad()
    def look(self, epoch: int) -> pictures.Batch:
        """The first BATCH images in two fixed views, passed through the network and the loss."""
        index = torch.arange(BATCH)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            views = torch.cat(self.images.views(index))
        model = copy.deepcopy(self.model).train()  # a copy, or batch norm would count this batch
        z = nn.functional.normalize(model.embed(views))
        self.criterion.eval()  # so that the threshold is measured but not stored
        self.criterion(*z.chunk(2))
        return pictures.Batch(
            epoch=epoch,
            views=views[:, 0].numpy(),
            labels=self.images.labels[index].repeat(2).numpy(),
            cosines=(z @ z.T).numpy(),
            eps=float(self.criterion.last.eps),
        )

    def evaluate(self) -> None:
        network = self.model.backbone
        train, self.features = (evaluate.features(network, x) for x in (self.images, self.test))
        self.scores = evaluate.scores(train, self.features)


def draw(infonce: Run, hex_run: Run, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    _, eps, hard, _ = np.array(hex_run.statistics).T
    pictures.threshold(out / "1-threshold.png", eps, hard, hex_run.steps, hex_run.batches)
    first, *_, late = hex_run.batches
    highest = max(hex_run.batches[1:-1], key=lambda batch: batch.eps)
    pictures.cosines(out / "2-cosines.png", [first, highest, late])
    anchors = [int(np.flatnonzero(late.labels == digit)[0]) for digit in range(6)]
    pictures.neighbours(out / "3-neighbours.png", late, anchors)
    panels = []
    for run in (infonce, hex_run):
        points = TSNE(init="pca", perplexity=30, random_state=0).fit_transform(run.features[0])
        knn, one_label, *_ = run.scores
        title = f"{run.name}: k-NN {knn:.1%}, linear probe {one_label:.1%} with 1 label a digit"
        panels.append((title, points, run.features[1]))
    pictures.maps(out / "4-maps.png", panels)


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
        "One seed: on 500 images a difference of a point is chance; --seeds 5 repeats it"
        if seeds == 1
        else f"Mean and standard deviation of {seeds} seeds"
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60, help="at least 3")
    parser.add_argument("--seeds", type=int, default=1, help="how often to repeat, for the table")
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
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
