# SPDX-License-Identifier: MIT
"""The pictures of docs/effect.md, drawn from the rows by matplotlib."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from common.pictures import BLUE, GREEN, GREY, ORANGE, plt

from effect.differences import MEASURES, SCORE, Runs, compared, difference, score
from effect.report import mean_of, title
from effect.rows import Rows
from effect.table import MAIN, Study

COLOURS = {
    "infonce": GREY, "decoupled": GREY, "hcl": GREEN, "paper": BLUE, "released": ORANGE
}  # fmt: skip


def draw(name: str, study: Study, rows: Rows, folder: Path) -> list[Path]:
    """Draws the pictures of a study for which there are rows enough, as effect-NAME-*.png."""
    runs, families = compared(name, study, rows), {x.name: x.family for x in study.losses}
    everywhere = {regime: compared(name, study, rows, regime) for regime in (MAIN, *study.regimes)}
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    pictures = [(picture, runs) for picture in (differences, threshold, groups, geometry)]
    for picture, shown in [*pictures, (regimes, everywhere)]:
        path = folder / f"effect-{name}-{picture.__name__}.png"
        figure = picture(shown, families)
        if figure is not None:
            figure.savefig(path)
            plt.close(figure)
            made.append(path)
    return made


def differences(runs: dict[str, Runs], families: dict[str, str]):
    """One panel for each measure: each loss minus InfoNCE, by seed, with two standard errors."""
    base = runs.get("infonce", {})
    losses = [
        x for x in runs if x != "infonce" and (d := difference(runs[x], base, SCORE)) and d.n > 1
    ]
    if not losses:
        return None
    measures = [
        m for m in MEASURES if m != SCORE and difference(runs[losses[0]], base, m) is not None
    ]
    figure, panels = plt.subplots(
        1, len(measures), figsize=(2.6 * len(measures) + 1.5, 0.36 * len(losses) + 1.6), sharey=True
    )
    for panel, measure in zip(panels, measures, strict=True):
        differences_of(panel, losses, runs, measure, families)
        panel.set_title(MEASURES[measure])
    figure.suptitle(
        "Test accuracy minus InfoNCE's at the same seed: mean ± 2 standard errors; pale: the seeds",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    return figure


def differences_of(panel, losses: list[str], runs: dict[str, Runs], measure: str, families):
    """Draws each loss minus InfoNCE, one line for each loss, even for a loss without runs."""
    base = runs["infonce"]
    places = np.arange(len(losses))[::-1]
    panel.axvline(0, color=GREY, linewidth=1)
    for loss, y in zip(losses, places, strict=True):
        found = difference(runs.get(loss, {}), base, measure)
        if found is None:
            continue
        colour = COLOURS[families[loss]]
        each = [
            100 * (score(runs[loss][s], measure) - score(base[s], measure))
            for s in runs[loss] if s in base
        ]  # fmt: skip
        panel.plot(each, [y] * len(each), "o", color=colour, alpha=0.35, markersize=4)
        if found.error is not None:
            panel.errorbar(
                100 * found.mean, y, xerr=200 * found.error, fmt="D", color=colour,
                markersize=5, capsize=3,
            )  # fmt: skip
    panel.set_yticks(places, [title(x) for x in losses])
    panel.grid(axis="x", alpha=0.25)
    panel.set_xlabel("points")


def regimes(everywhere: dict[str, dict[str, Runs]], families: dict[str, str]):
    """One panel for each regime: the score of each loss minus InfoNCE's, for the losses that ran in
    more regimes than the main one."""
    there = {name: runs for name, runs in everywhere.items() if len(runs.get("infonce", {})) > 1}
    losses = [
        x for x in families if x != "infonce"
        and any(x in runs for name, runs in there.items() if name != MAIN)
    ]  # fmt: skip
    if not losses:
        return None
    figure, panels = plt.subplots(
        1, len(there), figsize=(2.6 * len(there) + 1.5, 0.36 * len(losses) + 1.6), sharey=True,
        sharex=True, squeeze=False,
    )  # fmt: skip
    for panel, (name, runs) in zip(panels[0], there.items(), strict=True):
        differences_of(panel, losses, runs, SCORE, families)
        panel.set_title(name)
    figure.suptitle(
        "Score minus InfoNCE's at the same seed: mean ± 2 standard errors; pale: the seeds",
        x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    return figure


def threshold(runs: dict[str, Runs], families: dict[str, str]):
    """eps of every epoch, one line for each loss (the mean of its seeds)."""
    losses = [x for x in runs if families[x] in ("paper", "released")]
    if not losses:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), sharey=True)
    for panel, family in zip(panels, ("paper", "released"), strict=True):
        mine = [x for x in losses if families[x] == family]
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(2, len(mine))))
        styles = "-", "--", "-.", ":", (0, (1, 1, 4, 1)), (0, (6, 2))
        for loss, colour, style in zip(mine, shades, styles * 3, strict=False):
            epochs, values = curve(runs[loss], "curves", lambda x: x["eps"])
            label = named(loss, runs[loss]).removeprefix("HEX ")
            panel.plot(epochs, values, color=colour, linestyle=style, label=label)
        panel.set_title(f"HEX {family}")
        panel.set_xlabel("epoch")
        panel.legend(fontsize=9)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("eps (cosine), mean over the epoch")
    return figure


def groups(runs: dict[str, Runs], families: dict[str, str]):
    """The shares of the nearest 1 % of negatives of the anchor's class and superclass, by epoch."""
    shown = [x for x in ("infonce", "decoupled", "hcl") if x in runs]
    shown += [x for x in runs if x in ("paper q0.99", "paper q0.9", "released q0.99",
                                       "released q0.9")]  # fmt: skip
    if not shown:
        return None
    parts = ["class", "superclass"]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for panel, part in zip(panels, parts, strict=True):
        for loss in shown:
            epochs, values = curve(runs[loss], "looks", lambda x, part=part: x["near"][part])
            style = {"decoupled": "--", "paper q0.9": "--", "released q0.9": "--"}.get(loss, "-")
            panel.plot(
                epochs, 100 * np.array(values, float), marker="o", markersize=3, linestyle=style,
                color=COLOURS[families[loss]], label=title(loss),
            )  # fmt: skip
        chance = mean_of(r["looks"][-1]["chance"][part] for r in runs[shown[0]].values())
        if chance is not None:
            panel.axhline(100 * chance, color="black", linewidth=1, linestyle=":")
            panel.text(0, 100 * chance, "chance", va="bottom")
        panel.set_title(f"Of the anchor's {part}")
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("% of each anchor's nearest 1 % of negatives")
    panels[1].legend(fontsize=9, loc="center right")
    return figure


def geometry(runs: dict[str, Runs], families: dict[str, str]):
    """At the end of training: rank within classes against rank, uniformity against alignment."""
    if not runs:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    marks = "os^vD<>pP*Xhd8H"
    for (loss, mine), mark in zip(runs.items(), marks * 3, strict=False):
        last = [r["looks"][-1] for r in mine.values()]
        colour = COLOURS[families[loss]]
        for panel, x, y in ((left, "rank", "rank_within"), (right, "alignment", "uniformity")):
            panel.plot(
                mean_of(r[x] for r in last), mean_of(r[y] for r in last), mark, color=colour,
                label=named(loss, mine),
                markersize=7, alpha=0.8,
            )  # fmt: skip
    left.set_xlabel("effective rank of the embedding")
    left.set_ylabel("mean effective rank within a class")
    left.set_title("Local collapse would be low here")
    right.set_xlabel("alignment (distance of two views; low is good)")
    right.set_ylabel("uniformity (low is good)")
    right.set_title("Alignment and uniformity")
    for panel in (left, right):
        panel.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


def named(loss: str, runs: Runs) -> str:
    """A legend's text: the loss, its temperature, and "one seed" if there is only one."""
    tau = next(iter(runs.values()))["temperature"]
    return f"{title(loss)}, tau {tau:g}" + (", one seed" if len(runs) == 1 else "")


def curve(runs: Runs, of: str, value: Callable[[dict], float | None]) -> tuple[list, list]:
    """The epochs, and the mean over seeds at each of them, NaN where there is no value."""
    by_epoch: dict[int, list[float | None]] = {}
    for row in runs.values():
        for entry in row[of]:
            by_epoch.setdefault(entry["epoch"], []).append(value(entry))
    epochs = sorted(by_epoch)
    means = [mean_of(by_epoch[e]) for e in epochs]
    return epochs, [np.nan if x is None else x for x in means]
