# SPDX-License-Identifier: MIT
"""Tables and pictures, made of pandas' frames: on the terminal and in the documents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd


class Table(NamedTuple):
    title: str
    cells: pd.DataFrame  # of texts
    notes: Sequence[str] = ()
    corner: str = ""  # above the names of the lines

    def __str__(self) -> str:
        cells = self.cells.rename_axis(index=None, columns=None)
        return "\n".join([self.title, "", cells.to_string() if len(cells) else "", *self.notes])

    def markdown(self) -> str:
        rows = [[self.corner, *self.cells.columns], ["---", *["---:"] * len(self.cells.columns)]]
        rows += [
            [name, *row] for name, row in zip(self.cells.index, self.cells.values, strict=True)
        ]
        parts = [f"**{self.title}**"] if self.title else []
        parts += ["\n".join(f"| {' | '.join(row)} |" for row in rows)] if len(self.cells) else []
        return "\n\n".join([*parts, *self.notes])


def number(value: float | None) -> str:
    """Three digits or so; nothing for what is not there."""
    if pd.isna(value):
        return ""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def form(pattern: str) -> Callable[[float | None], str]:
    """Writes a number as the pattern says, and nothing for what is not there."""
    return lambda value: "" if pd.isna(value) else pattern.format(value)


def pivot(results: pd.DataFrame, value: str, across: str = "case") -> pd.DataFrame:
    """A line a method and a column a case, in the order in which they come."""
    found = results.pivot(index="method", columns=across, values=value)
    return found.reindex(index=results.method.unique(), columns=results[across].unique())


def filled(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A document with what stands between <!-- NAME --> and <!-- end --> made anew."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{blocks[found[1]]()}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def fill(document: Path, blocks: Mapping[str, Callable[[], str]]) -> None:
    document.write_text(filled(document.read_text(), blocks))


def draw(
    points: pd.DataFrame, styles: Mapping[str, Sequence[str]], caption: str, file: Path
) -> None:
    """Time and memory by rows, on a panel each.

    points: method, rows, ms, mb. styles: by method its label, colour and line, those to be seen
    best last. A sum in the picture tells a test what was drawn (`checksum`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ticks = sorted(set(points["rows"]))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for panel, column, title, units in (
        (panels[0], "ms", "Time of a call, forward and backward", ("s", "ms")),
        (panels[1], "mb", "Memory at the peak", ("GB", "MB")),
    ):
        for method, (label, colour, line) in styles.items():
            mine = points[points["method"] == method].sort_values("rows")
            if len(mine):
                panel.plot(mine["rows"], mine[column], line, color=colour, label=label, marker="o",
                           markersize=3.5, linewidth=1.8)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="rows N = 2B")
        panel.set_xticks(ticks, [str(n) for n in ticks], rotation=35)
        panel.set_xticks([], minor=True)
        panel.tick_params(labelsize=8)
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
        panel.yaxis.set_major_formatter(
            lambda y, _, units=units: f"{y / 1e3:g} {units[0]}" if y >= 1e3 else f"{y:g} {units[1]}"
        )
        panel.grid(which="major", color="#e4e4e4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=6, frameon=False,
                  fontsize=9)  # fmt: skip
    figure.suptitle(caption, fontsize=8.5, color="#555555", x=0.01, ha="left")
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Figures": checksum(points), "Software": "hex-ssl"}
    figure.savefig(file, dpi=150, metadata=metadata)
    pyplot.close(figure)


def checksum(points: pd.DataFrame) -> str:
    return hashlib.sha256(points.to_json().encode()).hexdigest()
