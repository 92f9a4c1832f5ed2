# SPDX-License-Identifier: MIT
"""A table on the terminal, by rich where there is one, else as plain text with aligned columns; and
in a document."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

Line = Sequence[str] | str  # the cells of a row, or the head of a section


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    lines: Sequence[Line]
    notes: Sequence[str]


def show(title: str, columns: Sequence[str], lines: Sequence[Line], notes: Sequence[str]) -> None:
    """Prints the table: the first column to the left, the others to the right; notes below."""
    if sys.stdout.isatty():
        try:
            return _rich(title, columns, lines, notes)
        except ImportError:
            pass  # plain text then
    print(text(title, columns, lines, notes))


def text(title: str, columns: Sequence[str], lines: Sequence[Line], notes: Sequence[str]) -> str:
    rows = [columns, *(line for line in lines if not isinstance(line, str))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]

    def row(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    body = [f"\n{line}" if isinstance(line, str) else row(line) for line in lines]
    return "\n".join([title, "", row(columns), rule, *body, rule, *notes])


def markdown(table: Table) -> str:
    """As GitHub has them; what starts with a blank there is in italics."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def name(text: str) -> str:
        return f"*{text.strip()}*" if text.startswith(" ") else text

    empty = [""] * (len(table.columns) - 1)
    lines = [
        row([f"**{line}**", *empty] if isinstance(line, str) else [name(line[0]), *line[1:]])
        for line in table.lines
    ]
    parts = [f"**{table.title}**"] if table.title else []
    if lines:
        rule = row(["---", *(["---:"] * len(empty))])
        parts.append("\n".join([row(table.columns), rule, *lines]))
    return "\n\n".join(parts + ["\n\n".join(table.notes)] * bool(table.notes))


def number(value: float | None) -> str:
    """Three digits or so; nothing for None."""
    if value is None:
        return ""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"


def _rich(title: str, columns: Sequence[str], lines: Sequence[Line], notes: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        if isinstance(line, str):
            table.add_section()
            table.add_row(Text(line, style="italic"))
        else:
            table.add_row(*(Text(cell) for cell in line))
    console = Console()
    console.width = max(console.width, console.measure(table).maximum)  # rather wrapped than cut
    console.print(Text(title, style="bold"))
    console.print(table)
    for note in notes:
        console.print(Text(note, style="dim"))
