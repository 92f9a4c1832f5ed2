# SPDX-License-Identifier: MIT
"""Makes the patch of a recipe from the lines at its head.

    git clone https://github.com/facebookresearch/moco
    python docs/recipes/make.py docs/recipes/moco.diff moco

The head names a repository, a commit, and our lines by the number of the line that each follows.
The patch is git's binary form: what is copied from the old file, by offset and size, and our lines;
no line of theirs. It names the old file by its hash, so nothing can put it elsewhere: git applies
it to that very file, or merges it into another version (--3way), or refuses; patch(1) refuses.
"""

import base64
import hashlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

REPOSITORY = re.compile(r"github\.com/([\w-]+/[\w-]+) at ([0-9a-f]{40})")
PLACE = re.compile(r"(\S+\.py), after line (\d+):")
COPY = 0xFFFF  # most bytes that one of our copying instructions copies
INSERT = 127  # most bytes that an inserting one inserts


def read(diff: str) -> tuple[str, str, dict[str, list[tuple[int, str]]]]:
    """(repository, commit, {file: [(number of the line before, line), ...]}) of a recipe's head."""
    first, *lines = head(diff).splitlines()
    repository, commit = REPOSITORY.fullmatch(first).groups()
    files: dict[str, list[tuple[int, str]]] = {}
    place = None
    for line in lines:
        if line.startswith("+"):
            files.setdefault(place[1], []).append((int(place[2]), line[1:]))
        else:
            place = PLACE.fullmatch(line)
    return repository, commit, files


def head(diff: str) -> str:
    """What a reader reads of a recipe: all before git's part."""
    return diff.partition("\ndiff --git ")[0].rstrip("\n") + "\n"


def patch(path: str, mode: str, old: bytes, added: list[tuple[int, str]]) -> str:
    """git's binary patch of a file, forwards and back."""
    lines = old.splitlines(keepends=True)
    forwards, back, new, done = [], [], b"", 0  # done: lines of the old file
    for number, line in [*added, (len(lines), None)]:
        kept = b"".join(lines[done:number])
        forwards += copies(sum(map(len, lines[:done])), len(kept))
        back += copies(len(new), len(kept))
        ours = b"" if line is None else f"{line}\n".encode()
        forwards += inserts(ours)
        new, done = new + kept + ours, number
    text = [f"diff --git a/{path} b/{path}", f"index {blob(old)}..{blob(new)} {mode}"]
    text += ["GIT binary patch", *hunk(old, new, forwards), "", *hunk(new, old, back), "", ""]
    return "\n".join(text)


def blob(contents: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


def copies(offset: int, size: int) -> list[bytes]:
    """Instructions that copy old[offset : offset + size]: four bytes of offset, two of size."""
    return [
        b"\xbf" + at.to_bytes(4, "little") + (min(COPY, offset + size - at)).to_bytes(2, "little")
        for at in range(offset, offset + size, COPY)
    ]


def inserts(contents: bytes) -> list[bytes]:
    parts = [contents[i : i + INSERT] for i in range(0, len(contents), INSERT)]
    return [bytes([len(part)]) + part for part in parts]


def hunk(old: bytes, new: bytes, instructions: list[bytes]) -> list[str]:
    """A delta in base 85, 52 bytes a line, the line's length before it as a letter."""
    delta = size(len(old)) + size(len(new)) + b"".join(instructions)
    packed = zlib.compress(delta, 9)
    lines = [f"delta {len(delta)}"]
    for i in range(0, len(packed), 52):
        part = packed[i : i + 52]
        letter = chr(ord("A") + len(part) - 1 if len(part) <= 26 else ord("a") + len(part) - 27)
        lines.append(letter + base64.b85encode(part, pad=True).decode())
    return lines


def size(n: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    found = bytearray()
    while n > 0x7F:
        found.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*found, n])


def main(diff: str, clone: str) -> None:
    """Writes the recipe's patch anew, from the commit of the clone that its head names."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", clone, *arguments], check=True, stdout=-1).stdout

    text = head(Path(diff).read_text())
    _, commit, files = read(text)
    parts = []
    for path, added in files.items():
        mode = git("ls-tree", commit, path).split()[0].decode()
        parts.append(patch(path, mode, git("show", f"{commit}:{path}"), added))
    Path(diff).write_text(text + "\n" + "".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
