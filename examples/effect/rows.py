# SPDX-License-Identifier: MIT
"""The results: JSON lines, a row a run, that several processes add to; and who works on which run.

A run is claimed by a lock on a file of its own, which the system lets go when the process ends,
however it ends: nothing stale is left, and the next process repeats the run whole.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]


class RowsError(Exception):
    """The file is not what it should be; the text is for the user."""


def read(path: Path) -> Rows:
    """The rows by key. A last line without its end, from a process that died, is left out.

    Raises:
        RowsError: a line is no row, or two rows have one key.
    """
    rows: Rows = {}
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            key = row["key"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise RowsError(f"{path}:{number}: wanted a JSON object with a key") from None
        if key in rows:
            raise RowsError(f"{path}:{number}: a second row of {key!r}")
        rows[key] = row
    return rows


def without_test(rows: Rows) -> Rows:
    """The rows as what is chosen may see them."""
    return {key: {k: v for k, v in row.items() if k != "test"} for key, row in rows.items()}


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row, whole or not at all, also beside other processes."""
    text = json.dumps(row, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)  # what a process that died had begun
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def claim(path: Path, key: str) -> Iterator[bool]:
    """Whether this process may do the run of that key; until the end of the block nobody else."""
    name = hashlib.sha256(f"{path.resolve()}\n{key}".encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"hex-study-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    with open(folder / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
