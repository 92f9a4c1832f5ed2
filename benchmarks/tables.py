# SPDX-License-Identifier: MIT
"""Tables of texts, made of pandas' frames, on the terminal and in the documents. Without torch."""

from __future__ import annotations

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
