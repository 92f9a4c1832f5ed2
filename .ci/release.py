# SPDX-License-Identifier: MIT
"""Keeps what the texts say about the release and the repository in line with where it is held.

    python .ci/release.py                     says what is out of line; exit status 1 if anything is
    python .ci/release.py --tag v0.1.0        the same, also if that tag is not the newest release's
    python .ci/release.py --version 0.1.0     a release of today: rewrites the texts
    python .ci/release.py --next 0.2.0        work on the next version begins: rewrites the texts
    python .ci/release.py --mend              rewrites what is out of line
    python .ci/release.py --address URL       the repository moves: rewrites the texts

The address and the name on PyPI are held by pyproject.toml, the version by hex/__init__.py, and
whether there has been a release by CHANGELOG.md, where the heading of a release has its date. What
follows from these is the line by which the README and the notebook install the package, the version
and the date in CITATION.cff, and every address of a file of the repository.
"""

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT, INIT, CHANGES = "pyproject.toml", "hex/__init__.py", "CHANGELOG.md"
README, NOTEBOOK, CITATION = "README.md", "docs/first_run.ipynb", "CITATION.cff"
UNRELEASED = "not released yet"
VERSION = re.compile(r'(?<=^__version__ = ")[^"]+', re.MULTILINE)
HEADING = re.compile(r"^## (\S+) \((.+)\)$", re.MULTILINE)
HOST = "https://github.com/"


class Texts(dict[str, str]):
    """The files of the repository, by path, as they are to be. Read when they are asked for."""

    def __missing__(self, path: str) -> str:
        self[path] = (ROOT / path).read_text()
        return self[path]

    def change(self, path: str, pattern: str, new: str) -> None:
        """Replaces the only match of a pattern."""
        text, count = re.subn(pattern, lambda _: new, self[path], flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{path}: got {count} matches of {pattern!r}, wanted one")
        self[path] = text

    def differing(self) -> list[str]:
        return [path for path, text in self.items() if text != (ROOT / path).read_text()]


def address(texts: Texts) -> str:
    return re.search(r'^Source = "(.+)"$', texts[PYPROJECT], re.MULTILINE)[1]


def move(texts: Texts, new: str) -> None:
    """Replaces the address everywhere, also where pictures are shown from."""
    if not re.fullmatch(HOST + r"[\w.-]+/[\w.-]+(?<!\.git)", new):
        raise SystemExit(f"--address: got {new!r}, wanted {HOST}OWNER/NAME")
    old = address(texts).removeprefix(HOST)
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for path in filter(None, files.split("\0")):
        try:
            found = old in texts[path]
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; a file that was removed
            texts.pop(path, None)
            continue
        if found:
            texts[path] = re.sub(re.escape(old) + r"(?![\w-])", new.removeprefix(HOST), texts[path])


def begin(texts: Texts, version: str) -> None:
    """Makes `version` the one that is worked on."""
    newest = newest_of(texts)
    texts[INIT] = VERSION.sub(wanted(texts, "--next", version), texts[INIT])
    heading = f"## {version} ({UNRELEASED})"
    if newest[2] == UNRELEASED:  # the same work gets another number
        texts.change(CHANGES, f"^{re.escape(newest[0])}$", heading)
    else:
        texts.change(CHANGES, f"^{re.escape(newest[0])}$", f"{heading}\n\n{newest[0]}")


def release(texts: Texts, version: str, date: str) -> None:
    """Gives the newest section of CHANGELOG.md its version and date."""
    newest = newest_of(texts)
    if newest[2] != UNRELEASED:
        raise SystemExit(f"{CHANGES}: {newest[1]} is of {newest[2]}; --next begins another version")
    texts[INIT] = VERSION.sub(wanted(texts, "--version", version), texts[INIT])
    texts.change(CHANGES, f"^{re.escape(newest[0])}$", f"## {version} ({date})")


def newest_of(texts: Texts) -> re.Match[str]:
    """The first heading of CHANGELOG.md: all of it, the version, and the date."""
    if (found := HEADING.search(texts[CHANGES])) is None:
        raise SystemExit(f"{CHANGES}: there is no heading such as ## 0.1.0 ({UNRELEASED})")
    return found


def wanted(texts: Texts, option: str, version: str) -> str:
    for heading in HEADING.finditer(texts[CHANGES]):
        if heading[1] == version and heading[2] != UNRELEASED:
            raise SystemExit(f"{option}: got {version}, which was released on {heading[2]}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SystemExit(f"{option}: got {version!r}, wanted three numbers such as 0.1.0")
    return version


def follow(texts: Texts) -> None:
    """Rewrites what follows from the address, the version and the dates."""
    name = re.search(r'^name = "(.+)"$', texts[PYPROJECT], re.MULTILINE)[1]
    newest_of(texts)
    releases = [match for match in HEADING.finditer(texts[CHANGES]) if match[2] != UNRELEASED]
    if releases:
        command, source = f"pip install {name}", f"{name}[plots]"
        note = "from PyPI"
    else:
        command, source = "pip install .", f"{name}[plots] @ git+{address(texts)}"
        note = "in a clone of this repository: no release is on PyPI yet"
    texts.change(README, r"^    pip install \S+ +# .*$", f"    {command:<15}  # {note}")
    if (ROOT / NOTEBOOK).exists():
        texts.change(NOTEBOOK, rf"(?<=[\"'])({name}\[plots\])[^\"'\\]*(?=\\?[\"'])", source)
    texts.change(CITATION, r"^version: .*$", f"version: {VERSION.search(texts[INIT])[0]}")
    texts[CITATION] = re.sub(r"^date-released: .*\n", "", texts[CITATION], flags=re.MULTILINE)
    if newest_of(texts)[2] != UNRELEASED:
        date = f"version: {releases[0][1]}\ndate-released: {releases[0][2]}"
        texts.change(CITATION, r"^version: .*$", date)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tag")
    parser.add_argument("--version")
    parser.add_argument("--next")
    parser.add_argument("--address")
    parser.add_argument("--mend", action="store_true")
    options = parser.parse_args(arguments)
    texts = Texts()
    if options.address:
        move(texts, options.address)
    if options.version:
        release(texts, options.version, datetime.date.today().isoformat())
    if options.next:
        begin(texts, options.next)
    follow(texts)
    changed = texts.differing()
    if options.address or options.version or options.next or options.mend:
        for path in changed:
            (ROOT / path).write_text(texts[path])
        print(f"rewritten: {', '.join(changed) or 'nothing'}")
        return 0
    newest, version = newest_of(texts), VERSION.search(texts[INIT])[0]
    wrong = [f"{path} is out of line; {sys.argv[0]} --mend rewrites it" for path in changed]
    if newest[1] != version:
        wrong.append(f"{CHANGES} begins with {newest[1]}, {INIT} has {version}")
    if options.tag and (options.tag != f"v{version}" or newest[2] == UNRELEASED):
        wrong.append(f"--tag: got {options.tag}, and {CHANGES} begins with {newest[0][3:]}")
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
