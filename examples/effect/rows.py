# SPDX-License-Identifier: MIT
"""The file of results, one row of JSON for each run, and which process works on which run.

Several processes may add rows at the same time. A process claims a run by a lock on a file of its
own. The system releases the lock when the process ends, however it ends, so that no stale lock is
left, and the next process repeats the run from its beginning.
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
    """The file is not what it should be. The text is meant for the user."""


def read(path: Path) -> Rows:
    """The rows, keyed by their "key". An incomplete last line, of a process that died, is ignored.

    Raises:
        RowsError: a line is not a row, or two rows have the same key.
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
    """The rows without test scores, by which nothing may be chosen."""
    return {key: {k: v for k, v in row.items() if k != "test"} for key, row in rows.items()}


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a complete row or nothing, even if other processes add theirs at the same time."""
    text = json.dumps(row, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        file.truncate(
            content.rfind(b"\n") + 1
        )  # drops an incomplete last line, of a process that died
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def claim(path: Path, key: str) -> Iterator[bool]:
    """Yields whether this process may do the run with this key. Until the end of the block no other
    process may."""
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
