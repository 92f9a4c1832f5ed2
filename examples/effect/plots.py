# SPDX-License-Identifier: MIT
"""The pictures of docs/effect.md, drawn from the rows by matplotlib.

Losses are compared in one way: each has a line with its differences from InfoNCE at the same seed,
as pale dots, and with their mean ± two standard errors. Its colour is that of its family.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common.pictures import BLUE, GREEN, GREY, ORANGE, plt

from effect.differences import MEASURES, SCORE, Runs, compared, paired, score
from effect.report import mean_of, planned, scaled, title
from effect.rows import Rows
from effect.table import MAIN, Study, sizes

COLOURS = {  # in the order of the lines
    "infonce": GREY, "decoupled": GREY, "hcl": GREEN, "paper": BLUE, "released": ORANGE
}  # fmt: skip
WIDTH = 10  # inches, so that text is large enough where a page makes the picture narrower
LINE = 0.27  # inches of a loss
MINUS = "minus InfoNCE's at the same seed"
MARKS = "diamonds: mean ± 2 standard errors; pale dots: the seeds"
Families = dict[str, str]  # of the losses, by name
Value = Callable[[dict[str, Any]], float | None]  # of a row


def draw(name: str, study: Study, rows: Rows, folder: Path) -> list[Path]:
    """Draws the pictures of a study for which there are rows enough, as effect-NAME-*.png."""
    runs, families = compared(name, study, rows), {x.name: x.family for x in study.losses}
    everywhere = {regime: compared(name, study, rows, regime) for regime in (MAIN, *study.regimes)}
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    pictures: dict[str, Callable[[], Any]] = {
        picture.__name__: partial(picture, runs, families)
        for picture in (differences, threshold, groups, geometry)
    }
    pictures["regimes"] = partial(regimes, everywhere, families)
    of_size = {batch: everywhere[regime] for batch, regime in sizes(study).items()}
    pictures["batches"] = partial(batches, of_size, families, planned(study))
    for picture in study.pictures:
        path = folder / f"effect-{name}-{picture}.png"
        figure = pictures[picture]()
        if figure is not None:
            figure.savefig(path)
            plt.close(figure)
            made.append(path)
    return made


def differences(runs: dict[str, Runs], families: Families):
    """One panel for each measure of the test images, each loss minus InfoNCE."""
    losses = repeated(runs, families)
    if not losses:
        return None
    measures = [m for m in MEASURES if paired(runs[losses[0]], runs["infonce"], tested(m))]
    figure, panels = grid(len(measures), len(losses), columns=3, sharex=True)
    for panel, measure in zip(panels, measures, strict=True):
        dots(panel, losses, runs, tested(measure), families)
        panel.set_title(MEASURES[measure])
        panel.tick_params(labelbottom=True)
    return headed(figure, f"Accuracy on the test images {MINUS}, in points", MARKS)


def regimes(everywhere: dict[str, dict[str, Runs]], families: Families):
    """One panel for each regime, with the losses that ran in more regimes than the main one."""
    there = {name: runs for name, runs in everywhere.items() if len(runs.get("infonce", {})) > 1}
    more = {x for name, runs in there.items() if name != MAIN for x in runs} - {"infonce"}
    if not more:
        return None
    losses = in_order(more, families)
    figure, panels = grid(len(there), len(losses), columns=4, sharex=True)
    for panel, (name, runs) in zip(panels, there.items(), strict=True):
        dots(panel, losses, runs, tested(SCORE), families)
        panel.set_title(name)
    return headed(figure, f"Score in each regime {MINUS}, in points", MARKS)


def batches(of_size: dict[int, dict[str, Runs]], families: Families, pairs: list[tuple[str, str]]):
    """The differences of the score over the batch sizes: one panel for each pair of losses."""
    found = {
        (pair, batch): paired(runs.get(pair[0], {}), runs.get(pair[1], {}), tested(SCORE))
        for pair in pairs for batch, runs in of_size.items()
    }  # fmt: skip
    if all(x is None or x.error is None for x in found.values()):
        return None
    figure, panels = plt.subplots(
        1, len(pairs), figsize=(WIDTH, 3.8), sharex=True, sharey=True, squeeze=False
    )
    places = range(len(of_size))
    for panel, (loss, baseline) in zip(panels[0], pairs, strict=True):
        panel.axhline(0, color=GREY, linewidth=1)
        colour = COLOURS[families[loss]]
        for x, batch in zip(places, of_size, strict=True):
            one = found[(loss, baseline), batch]
            if one is None:
                continue
            panel.plot([x] * one.n, one.values, "o", color=colour, alpha=0.35, markersize=5)
            if one.error is not None:
                panel.errorbar(
                    x, one.mean, yerr=2 * one.error, fmt="D", color=colour, markersize=5, capsize=3
                )
        panel.set_title(textwrap.fill(f"{title(loss)} minus {title(baseline)}", 20))
        panel.set_xticks(places, [str(batch) for batch in of_size])
        panel.set_xlim(-0.5, len(of_size) - 0.5)
        panel.set_xlabel("batch size")
        panel.grid(axis="y", alpha=0.25)
    return headed(figure, "Score by batch size, difference at the same seed, in points", MARKS)


def geometry(runs: dict[str, Runs], families: Families):
    """One panel for each measure of the embedding at the end of training. The losses are sorted by
    the rank within classes, which local collapse would make low."""
    shown = {
        "rank_within": ("rank within a class", "← local collapse"),
        "rank": ("rank over all images", "← collapse"),
        "alignment": ("alignment", "← better"),
        "uniformity": ("uniformity", "← better"),
    }
    losses = repeated(runs, families)
    if not losses:
        return None
    base = runs["infonce"]
    losses.sort(key=lambda x: -paired(runs[x], base, last("rank_within")).mean)
    figure, panels = grid(len(shown), len(losses), columns=4)
    for panel, (measure, (name, meaning)) in zip(panels, shown.items(), strict=True):
        dots(panel, losses, runs, last(measure), families)
        own = mean_of(map(last(measure), base.values()))
        panel.set_title(f"{name}\n(InfoNCE: {own:.3g})")
        panel.set_xlabel(meaning)
        panel.locator_params(axis="x", nbins=5)
    taus = {x: next(iter(runs[x].values()))["temperature"] for x in ("infonce", *losses)}
    others = [f"{title(x)}: {tau:g}" for x, tau in taus.items() if tau != taus["infonce"]]
    at = f"temperature {taus['infonce']:g}" + f" ({', '.join(others)})" * bool(others)
    return headed(figure, f"Geometry of held-out images after training, {MINUS}", f"{at}; {MARKS}")


def groups(runs: dict[str, Runs], families: Families):
    """The shares of the nearest 1 % of negatives of the anchor's class and superclass: InfoNCE's
    over the epochs, and below them each loss minus InfoNCE after the last epoch."""
    losses = repeated(runs, families)
    if not losses:
        return None
    base = runs["infonce"]
    row = next(iter(base.values()))
    parts = [part for part in ("class", "superclass") if near(part)(row) is not None]
    height = LINE * len(losses) + 0.6
    figure, panels = plt.subplots(
        2, len(parts), figsize=(WIDTH, height + 4.2), height_ratios=(2.4, height), sharex="row",
        squeeze=False,
    )  # fmt: skip
    for (curves, ends), part in zip(panels.T, parts, strict=True):
        epochs, shares = curve(base, "looks", lambda x, part=part: scaled(x["near"][part]))
        curves.plot(epochs, shares, "o-", color=GREY, markersize=5)
        chance = mean_of(scaled(r["looks"][-1]["chance"][part]) for r in base.values())
        curves.axhline(chance, color="black", linewidth=1, linestyle=":")
        curves.text(max(epochs), chance, "chance", va="bottom", ha="right")
        curves.set_title(f"InfoNCE: of the anchor's {part}, in %")
        curves.set_xlabel("epoch")
        curves.locator_params(axis="y", steps=[1, 2, 5, 10])
        curves.grid(alpha=0.25)
        dots(ends, losses, runs, near(part), families)
        ends.set_title(f"{part}: each loss minus InfoNCE")
        ends.set_xlabel("points, after the last epoch")
        ends.tick_params(labelleft=ends is panels[1, 0])
    of = " or ".join(parts)
    return headed(
        figure, f"Share of each anchor's nearest 1 % of negatives that is of its {of}", MARKS
    )


def threshold(runs: dict[str, Runs], families: Families):
    """eps of every epoch, the mean of the seeds: one panel for each setting, one line a form."""
    forms = ("paper", "released")
    settings = in_order((x for x in runs if families[x] in forms), families)
    settings = [*dict.fromkeys(x.removeprefix(families[x]).strip() for x in settings)]
    if not settings:
        return None
    figure, panels = grid(len(settings), 7, columns=3, sharex=True)
    for panel, setting in zip(panels, settings, strict=True):
        for form in forms:
            if (mine := runs.get(f"{form} {setting}")) is not None:
                epochs, values = curve(mine, "curves", lambda x: x["eps"])
                panel.plot(epochs, values, color=COLOURS[form], linewidth=2)
        panel.set_title(title(setting))
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.25)
    lines = [plt.Line2D([], [], color=COLOURS[x], linewidth=2, label=title(x)) for x in forms]
    panels[0].legend(handles=lines)
    return headed(figure, "eps (a cosine), mean over the epoch and the seeds")


def repeated(runs: dict[str, Runs], families: Families) -> list[str]:
    """The losses that have two seeds or more in common with InfoNCE."""
    base = runs.get("infonce", {})
    return in_order(
        (x for x in runs if x != "infonce" and len(runs[x].keys() & base.keys()) > 1), families
    )


def in_order(losses: Iterable[str], families: Families) -> list[str]:
    """By family, then by name."""
    return sorted(losses, key=lambda x: ([*COLOURS].index(families[x]), title(x)))


def tested(measure: str) -> Value:
    """A measure of the test images, in %."""
    return lambda row: scaled(score(row, measure))


def last(measure: str) -> Value:
    """A measure of the embedding after the last epoch."""
    return lambda row: row["looks"][-1][measure]


def near(part: str) -> Value:
    """A share of the nearest 1 % of negatives after the last epoch, in %."""
    return lambda row: scaled(row["looks"][-1]["near"][part])


def headed(figure, *lines: str):
    """The figure, with a title above its panels."""
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=12)
    return figure


def grid(count: int, lines: int, columns: int, **options):
    """A figure, and its panels that have a height for so many lines."""
    rows = math.ceil(count / columns)
    figure, panels = plt.subplots(
        rows, min(columns, count), figsize=(WIDTH, rows * (LINE * lines + 1) + 0.6), sharey=True,
        squeeze=False, **options,
    )  # fmt: skip
    for spare in panels.flat[count:]:
        spare.remove()
    return figure, panels.flat[:count]


def dots(panel, losses: list[str], runs: dict[str, Runs], value: Value, families: Families):
    """Draws each loss minus InfoNCE, one line for each loss, even for a loss without runs."""
    base = runs["infonce"]
    places = range(len(losses))[::-1]
    panel.axvline(0, color=GREY, linewidth=1)
    for loss, y in zip(losses, places, strict=True):
        found = paired(runs.get(loss, {}), base, value)
        if found is None:
            continue
        colour = COLOURS[families[loss]]
        panel.plot(found.values, [y] * found.n, "o", color=colour, alpha=0.35, markersize=5)
        if found.error is not None:
            panel.errorbar(
                found.mean, y, xerr=2 * found.error, fmt="D", color=colour, markersize=5, capsize=3
            )
    panel.set_yticks(places, [title(x) for x in losses])
    panel.set_ylim(-0.7, len(losses) - 0.3)
    panel.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
    panel.grid(axis="x", alpha=0.25)


def curve(runs: Runs, of: str, value: Value) -> tuple[list, list]:
    """The epochs, and the mean over seeds at each of them, NaN where there is no value."""
    by_epoch: dict[int, list[float | None]] = {}
    for row in runs.values():
        for entry in row[of]:
            by_epoch.setdefault(entry["epoch"], []).append(value(entry))
    epochs = sorted(by_epoch)
    means = [mean_of(by_epoch[e]) for e in epochs]
    return epochs, [np.nan if x is None else x for x in means]
