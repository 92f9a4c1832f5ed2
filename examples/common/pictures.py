# SPDX-License-Identifier: MIT
"""Draws what the HEX loss does: plain arrays become PNG files, by matplotlib.

The colours are those of Okabe and Ito, which colour-blind people can tell apart.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
SAME, OTHER = BLUE, ORANGE  # neighbours of the anchor's class, and of other classes

plt.rcParams.update({
    "font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.dpi": 110, "figure.constrained_layout.use": True,
})  # fmt: skip


@dataclass
class Batch:
    """One batch, with two views of each image, as the loss saw it after `epoch` epochs."""

    epoch: int
    views: np.ndarray  # (2B, side, side), in [-1, 1]; i and i + B are views of one image
    labels: np.ndarray  # (2B,)
    cosines: np.ndarray  # (2B, 2B)
    eps: float

    @property
    def negatives(self) -> np.ndarray:
        """(2B, 2B): all pairs, except those of an anchor with itself and with its positive."""
        n = len(self.labels)
        index = np.arange(n)
        return (index[:, None] - index) % (n // 2) != 0

    @property
    def hard(self) -> np.ndarray:
        """(2B, 2B): whether j is in H(i)."""
        return self.negatives & (self.cosines > self.eps)

    @property
    def same(self) -> np.ndarray:
        """(2B, 2B): whether j is of the class of i."""
        return self.labels[:, None] == self.labels

    @property
    def purity(self) -> float:
        """The share of the members of all H(i) that are of the class of their anchor."""
        return float(self.same[self.hard].mean()) if self.hard.any() else float("nan")


def threshold(
    path: Path, eps: np.ndarray, hard: np.ndarray, steps: int, batches: list[Batch]
) -> None:
    """Draws over the epochs: eps and mean |H| at every step, and the share of H(i) of i's class."""
    epochs = np.arange(1, len(eps) + 1) / steps
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(7.5, 7.5), sharex=True)
    peak = int(eps.argmax())
    top.plot(epochs, eps, color=BLUE)
    top.set_ylabel("threshold eps\n(cosine)")
    top.set_title(
        f"The threshold follows training: {eps[peak]:.2f} in epoch {peak // steps + 1}, "
        f"{eps[-steps:].mean():.2f} at the end"
    )
    middle.plot(epochs, hard, color=GREEN)
    middle.set_ylim(bottom=0)
    middle.set_ylabel("mean |H|\n(images)")
    negatives = len(batches[0].labels) - 2
    middle.set_title(f"Few of an anchor's {negatives} negatives are above it: they form H(i)")
    purity = 100 * np.array([batch.purity for batch in batches])
    chance = 100 * batches[0].same[batches[0].negatives].mean()
    bottom.plot([batch.epoch for batch in batches], purity, color=ORANGE)
    bottom.axhline(chance, color=GREY, linestyle="--", linewidth=1)
    bottom.text(epochs[-1], chance + 2, f"all negatives: {chance:.0f} %", color=GREY, ha="right")
    bottom.set_ylim(0, 100)
    bottom.set_ylabel("of the anchor's digit\n(% of H)")
    bottom.set_title(f"No label was used, yet in the end {purity[-1]:.0f} % of H(i) show i's digit")
    bottom.set_xlabel("epoch")
    bottom.set_xlim(0, epochs[-1])
    figure.align_ylabels()
    _save(figure, path)


def cosines(path: Path, batches: list[Batch]) -> None:
    """Draws histograms of the negatives' cosines by class, with the threshold, for each batch."""
    figure, axes = plt.subplots(
        len(batches), 1, figsize=(7.5, 2.9 * len(batches)), sharex=True, sharey=True
    )
    bins = np.linspace(-1, 1, 81)
    anchors = len(batches[0].labels)
    for axis, batch in zip(axes, batches, strict=True):
        for pairs, colour, name in (
            (batch.negatives & ~batch.same, OTHER, "other digits"),
            (batch.negatives & batch.same, SAME, "the anchor's digit"),
        ):
            values = batch.cosines[pairs]
            axis.hist(
                values, bins, weights=np.full(len(values), 100 / len(values)), color=colour,
                alpha=0.55, label=f"negatives of {name} ({len(values) / anchors:.0f} an anchor)",
            )  # fmt: skip
        axis.axvspan(batch.eps, 1, color=GREY, alpha=0.15, linewidth=0)
        axis.axvline(batch.eps, color="black")
        axis.text((batch.eps + 1) / 2, 0.9, "H", transform=axis.get_xaxis_transform(), ha="center")
        members = batch.hard.sum() / anchors
        axis.set_title(
            f"After epoch {batch.epoch}, above eps = {batch.eps:.2f}: {members:.1f} negatives an "
            f"anchor, {100 * batch.purity:.0f} % of its digit"
        )
        axis.set_ylabel("share of the pairs (%)")
    axes[0].legend(loc="upper left", fontsize=10)
    axes[-1].set_xlabel("cosine of anchor and negative")
    axes[-1].set_xlim(-1, 1)
    _save(figure, path)


def neighbours(path: Path, batch: Batch, anchors: list[int], most: int = 6) -> None:
    """Draws for each anchor its positive and the nearest `most` images in H(i), with cosines."""
    size = 1.1 * (most + 2) + 0.3, 1.45 * len(anchors) + 0.8
    figure, axes = plt.subplots(len(anchors), most + 2, figsize=size)
    n = len(batch.labels)
    for row, anchor in zip(axes, anchors, strict=True):
        members = np.flatnonzero(batch.hard[anchor])
        members = members[np.argsort(-batch.cosines[anchor, members])]
        positive = (anchor + n // 2) % n
        shown = [anchor, positive, *members[:most]]
        for axis in row:
            axis.axis("off")
        for k, (axis, j) in enumerate(zip(row, shown, strict=False)):
            axis.axis("on")
            axis.imshow(batch.views[j], cmap="gray_r", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            colour = SAME if batch.labels[j] == batch.labels[anchor] else OTHER
            for spine in axis.spines.values():
                spine.set(visible=True, color="black" if k == 0 else colour, linewidth=2.5)
            text = f"a {batch.labels[j]}"
            if k > 0:
                text += f", {batch.cosines[anchor, j]:.2f}"
            axis.set_xlabel(text, fontsize=10, color="black" if k == 0 else colour)
        if len(members) > most:
            row[-1].set_title(f"and {len(members) - most} more", fontsize=10)
        elif not len(members):
            text = "H(i) is empty: this anchor's loss is InfoNCE"
            row[2].text(0, 0.5, text, transform=row[2].transAxes, va="center", in_layout=False)
    for axis, name in zip(axes[0], ("anchor", "positive", "in H(i),\nnearest first"), strict=False):
        axis.set_title(name, fontsize=10)
    figure.suptitle(
        f"Who is in H(i) after epoch {batch.epoch}: the views above eps = {batch.eps:.2f};\n"
        f"over all anchors, {100 * batch.purity:.0f} % of them show the anchor's digit\n"
        "(under each its digit and cosine; blue: the anchor's digit, orange: another)",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    _save(figure, path)


def maps(path: Path, panels: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draws embeddings in the plane side by side: (title, (N, 2) points, (N,) labels) for each."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 6))
    colours = plt.get_cmap("tab10").colors
    for axis, (title, points, labels) in zip(axes, panels, strict=True):
        for c in np.unique(labels):  # the digit itself is the marker, so no one needs the colour
            axis.scatter(
                *points[labels == c].T, marker=f"${c}$", s=42, color=colours[c % 10], linewidths=0
            )
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("lightgrey")
    figure.suptitle(
        "Without a label in training, the test images fall into groups by digit\n"
        "(t-SNE of the backbone's features: who is near whom has a meaning, the axes have none)",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
