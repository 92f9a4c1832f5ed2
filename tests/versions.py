# SPDX-License-Identifier: MIT
"""hex-ssl with the releases of torch and Python that it says it works with: one wheel, tried with
each in a fresh environment. `make versions` runs it with a wheel that it builds, `make check-wheel`
with that of a release; it is for a person, and no part of the tests.

    python tests/versions.py                  what can be tried by fetching little
    python tests/versions.py --torch 2.10 newest --python this --most-mb 4000 --wheel dist/*.whl

Pythons are those on PATH, and pyenv's and uv's; torch is what pip finds for them, from 2.10 to the
newest, of each minor release the last. Each Python takes its newest torch, and the Python that runs
this takes every torch; --every takes all with all. What pip would fetch is said first, with its
size, and asked about. What is left out is in the table too, with the reason and the command that
has it tried. Nothing installed is changed: environments are folders that are removed again.

In an environment are torch, the wheel and pytest, and what is held there is
    the ABI    torch's libraries export what csrc/torch_shim.h names, and what torch_exports.txt has
    the tests  of BATTERY, which need no other package; they meet the parts of torch that change

The exit status is 0 where all that was tried passed, 1 where something failed, 2 where nothing was
tried.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlparse

import torch_exports

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = range(10, 16)  # 3.15 is the newest that has a torch; newer ones are taken where they are
OLDEST = (2, 10)  # torch
TOOLS = ("pytest>=8", "pytest-timeout", "hypothesis", "numpy", "setuptools")
# checkpointing comes last: with torch 2.10, 2.11 and 2.12 tests that came after it met hooks of
# checkpoints that had ended in an error.
BATTERY = """abi import ops values gradient hazards modules tracker constants transforms compile
    training_loops distributed_training checkpointing""".split()
MB = 10**6
MOST_MB = 300  # a CPU build of torch and the tools
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Python(NamedTuple):
    path: str
    version: tuple[int, int, int]

    @property
    def minor(self) -> str:
        return "3.{1}".format(*self.version)


class Fetch(NamedTuple):
    """What pip would install, and where from."""

    urls: list[str]  # each with its sha256
    remote: int  # bytes
    local: int  # bytes of files on this disk


class Row(NamedTuple):
    """A line of the table. `said` is a reason, or what the tests said."""

    python: str
    torch: str
    outcome: str  # passed, failed, skipped; "" as long as it is to be tried
    said: str
    fetch: Fetch | None = None


# ---- Pythons ----

PROBE = """
import sys, sysconfig, venv
print(*sys.version_info[:3], sys.implementation.name, sysconfig.get_config_var("Py_GIL_DISABLED"))
"""


def candidates(environment=os.environ, home: Path | None = None) -> list[str]:
    """Paths of what may be a Python: of PATH, of pyenv, of uv."""
    home = home or Path.home()
    folders = [Path(folder) for folder in environment.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(environment.get("PYENV_ROOT") or home / ".pyenv")
    uv = Path(environment.get("UV_PYTHON_INSTALL_DIR") or home / ".local/share/uv/python")
    folders += sorted(pyenv.glob("versions/*/bin")) + sorted(uv.glob("*/bin"))
    found = [path for folder in folders for path in sorted(folder.glob("python3.*"))]
    return [str(path) for path in found if re.fullmatch(r"python3\.\d+", path.name)]


def probe(path: str) -> Python | None:
    """None for what does not start (pyenv's shims of versions not chosen), for others than CPython,
    and for builds without the GIL, which have another ABI."""
    try:
        done = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    *version, name, no_gil = done.stdout.split()
    major, minor, micro = map(int, version)
    return Python(path, (major, minor, micro)) if name == "cpython" and no_gil != "1" else None


def interpreters(found: list[Python]) -> dict[str, Python]:
    """One for each minor version from 3.10 on, the newest; the running one for its own."""
    newest: dict[str, Python] = {}
    here = Python(sys.executable, sys.version_info[:3])
    for python in sorted([*found, here], key=lambda p: (p.version, p is here)):
        if python.version >= (3, PYTHONS.start):
            newest[python.minor] = python
    newest[here.minor] = here
    return newest


# ---- torch, as pip sees it ----


def pip(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """This environment's pip, at work for another Python, which then needs none."""
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def releases(listed: str) -> dict[str, str]:
    """{"2.10": "2.10.0", ...} of what `pip index versions torch` prints, the oldest first."""
    match = re.search(r"Available versions: (.*)", listed)
    newest: dict[str, str] = {}
    for version in match[1].split(", ") if match else ():  # the newest first
        major, minor = (int(n) for n in version.split(".")[:2])
        if (major, minor) >= OLDEST:
            newest.setdefault(f"{major}.{minor}", version)
    return dict(reversed(newest.items()))


def complaint(said: str) -> str:
    """The first error of pip, which says more than the last."""
    lines = [line for line in said.splitlines() if line.startswith("ERROR: ")]
    return lines[0].removeprefix("ERROR: ") if lines else "pip says nothing"


def size(url: str) -> int:
    if url.startswith("file:"):
        return os.path.getsize(unquote(urlparse(url).path))
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT"))
    head = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(head, context=context, timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def to_fetch(report: str) -> Fetch:
    """Of pip's report: what it would install."""
    urls, remote, local = [], 0, 0
    for item in json.loads(report)["install"]:
        info = item["download_info"]
        hashes = info["archive_info"].get("hashes", {})
        urls.append(info["url"] + (f"#sha256={hashes['sha256']}" if "sha256" in hashes else ""))
        if info["url"].startswith("file:"):
            local += size(info["url"])
        else:
            remote += size(info["url"])
    return Fetch(urls, remote, local)


# ---- what is tried ----


def pairs(known: dict[str, dict[str, str]], here: str, every: bool) -> list[tuple[str, str]]:
    """(Python, torch) by their minor versions, of {Python: {torch: its last release}}."""
    return [
        (python, torch)
        for python, torches in known.items()
        for torch in torches
        if every or python == here or torch == list(torches)[-1]
    ]


def command(target: str, python: str, torch: str, *more: str) -> str:
    words = ["--python", python, "--torch", torch, *more]
    return f"make {target} VERSIONS={shlex.quote(' '.join(words))}"


def decide(
    python: str, torch: str, release: str, fetch: Fetch, most_mb: int, free: int, target: str
) -> Row:
    """To be tried, or skipped because too much would be fetched, or unpacked (about three times as
    much as the wheels have), with the command that has it tried, of the Makefile's `target`."""
    wanted = -(-fetch.remote // MB)
    if wanted > most_mb:
        how = command(target, python, torch, "--most-mb", str(wanted))
        said = f"it would fetch {wanted} MB, more than {most_mb}: {how}"
        return Row(python, release, "skipped", said, fetch)
    needed = 3 * (fetch.remote + fetch.local)
    if needed > free:
        said = (
            f"it takes about {needed // MB} MB of {tempfile.gettempdir()}, where {free // MB} are "
            f"free: TMPDIR=... {command(target, python, torch)}"
        )
        return Row(python, release, "skipped", said, fetch)
    return Row(python, release, "", "", fetch)


def plan(pythons: dict[str, Python], options: argparse.Namespace) -> list[Row]:
    rows, known = [], {}
    here = "3.{1}".format(*sys.version_info)
    named = [here if python == "this" else python for python in options.python or []]
    wanted = named or sorted(
        {*(f"3.{minor}" for minor in PYTHONS), *pythons}, key=lambda p: int(p[2:])
    )
    for minor in wanted:
        if minor not in pythons:
            how = f"pip install uv && uv python install {minor}"
            rows.append(Row(minor, "every", "skipped", f"this Python is not found: {how}"))
            continue
        asked = pip(pythons[minor].path, "index", "versions", "torch")
        known[minor] = found = releases(asked.stdout)
        if not found:
            said = f"pip finds no torch >= 2.10 for it: {complaint(asked.stderr)}"
            rows.append(Row(minor, "every", "skipped", said))
            continue
        if options.torch:
            torches = [list(found)[-1] if t == "newest" else t for t in options.torch]
            for torch in torches:
                if torch not in found:
                    said = f"pip finds none for this Python, but {', '.join(found)}"
                    rows.append(Row(minor, torch, "skipped", said))
            known[minor] = {t: found[t] for t in found if t in torches}
    every = options.every or bool(options.torch and options.python)
    for python, torch in pairs(known, here, every):
        release = known[python][torch]
        report = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-")
        asked = pip(pythons[python].path, *report, f"torch=={release}", *TOOLS)
        if asked.returncode != 0:
            more = f"pip install --dry-run torch=={release} tells more"
            said = f"pip does not give it: {complaint(asked.stderr)}; {more}"
            rows.append(Row(python, release, "skipped", said))
            continue
        free = shutil.disk_usage(tempfile.gettempdir()).free
        fetch = to_fetch(asked.stdout)
        target = "check-wheel" if options.wheel else "versions"
        rows.append(decide(python, torch, release, fetch, options.most_mb, free, target))
    return rows


# ---- trying it ----


def abi(site: Path, release: str) -> str:
    """What is wrong with the exports of the torch in `site`; "" if nothing."""
    release = release.partition("+")[0]
    table, installed = torch_exports.read(), {}
    libraries = [
        p for p in site.glob("torch/lib/libtorch_c*.so") if p.stem[8:] in ("_cpu", "_cuda")
    ]
    for library in libraries:
        names = torch_exports.exported(library)
        torch_exports.add(installed, release, library.name, names)
    names = {library.name for library in libraries}
    if "libtorch_cpu.so" not in names:
        return "torch has no libtorch_cpu.so"
    needed = {key for key in torch_exports.needed(release) if key[0] in names}
    if lacking := sorted(needed - set(installed)):
        return f"torch {release} does not export {lacking}"
    listed = {key for key, having in table.items() if release in having and key[0] in names}
    if listed and (wrong := sorted(listed ^ set(installed))):
        return f"tests/torch_exports.txt is wrong about torch {release}: {wrong}"
    return ""


def summary(output: str) -> str:
    """pytest's last line, and the reasons of what was skipped."""
    lines = output.strip().splitlines() or ["pytest said nothing"]
    counts = re.sub(r"^=+ | =+$", "", lines[-1])
    reasons = [re.sub(r"^SKIPPED \[\d+\] ", "", x) for x in lines if x.startswith("SKIPPED ")]
    return "; ".join([counts, *(f"skipped {reason}" for reason in reasons)])


def call(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def attempt(row: Row, python: Python, wheel: Path, folder: Path) -> Row:
    """Install and test in `folder`, which is new."""
    assert row.fetch
    environment = folder / "environment"
    made = call(python.path, "-m", "venv", "--without-pip", environment)
    if made.returncode == 0:
        at = str(environment / "bin/python")
        install = ("install", "--quiet", "--no-deps", "--no-compile")
        made = pip(at, *install, *row.fetch.urls, str(wheel))
    if made.returncode != 0:
        return row._replace(outcome="failed", said=f"{made.stdout}{made.stderr or ''}".strip())
    # The tree without hex/, so that the tests import the wheel.
    tree = folder / "tree"
    for name in ("tests", "csrc"):
        leave = shutil.ignore_patterns("__pycache__", "recorded")
        shutil.copytree(ROOT / name, tree / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", tree)
    (site,) = environment.glob("lib/python3*/site-packages")
    wrong = abi(site, row.torch)
    files = [f"tests/test_{name}.py" for name in BATTERY]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HEX_"))}
    variables = clean | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    run = call(at, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=tree, env=variables)
    said = summary(run.stdout)
    if wrong or run.returncode != 0:
        print(run.stdout)
        return row._replace(outcome="failed", said="; ".join(filter(None, (wrong, said))))
    return row._replace(outcome="passed", said=said)


def build(folder: Path) -> Path:
    """The wheel of this tree, without CUDA kernels."""
    print("the wheel is built, which takes a minute")
    command = (
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    )
    environment = os.environ | {"HEX_CUDA": "0"}
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def show(rows: list[Row], pythons: dict[str, Python]) -> None:
    for row in rows:
        python = pythons.get(row.python)
        name = ".".join(map(str, python.version)) if python else row.python
        print(f"Python {name:8} torch {row.torch:12} {row.outcome}{row.outcome and ': '}{row.said}")


def describe(row: Row) -> Row:
    """A row of the plan, with what it fetches."""
    if row.outcome or not row.fetch:
        return row
    more = f", {row.fetch.local // MB} MB more are on this disk" if row.fetch.local else ""
    return row._replace(said=f"fetches {-(-row.fetch.remote // MB)} MB{more}")


def agreed(rows: list[Row], yes: bool) -> bool:
    """Whether what is to be fetched may be."""
    total = sum(row.fetch.remote for row in rows if row.fetch)
    print(
        f"\n{len(rows)} to be tried. They fetch {-(-total // MB)} MB at most, less what several "
        "share and what pip has in its cache."
    )
    if yes or not total:
        return True
    if not sys.stdin.isatty():
        print("Nothing is fetched unasked: --yes says that it may be.")
        return False
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="hex-ssl with many releases of torch and Python")
    parser.add_argument("--python", nargs="+", metavar="3.N", help="only these; `this` runs it")
    parser.add_argument("--torch", nargs="+", metavar="2.N", help="only these; or `newest`")
    parser.add_argument("--every", action="store_true", help="each Python with each torch")
    parser.add_argument(
        "--most-mb", type=int, default=MOST_MB, help="to fetch for one of them; default %(default)s"
    )
    parser.add_argument("--yes", action="store_true", help="fetch without asking")
    parser.add_argument("--wheel", type=Path, help="try this one, and build none")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.wheel and not options.wheel.is_file():
        sys.exit(f"--wheel: got {options.wheel}, wanted a wheel; make wheel makes one in dist/")
    pythons = interpreters([p for p in map(probe, candidates()) if p])
    print("pip is asked what each would fetch, which takes a minute")
    rows = plan(pythons, options)
    show([describe(row) for row in rows], pythons)
    if any(row.said.startswith("it would fetch") for row in rows):
        target = "check-wheel" if options.wheel else "versions"
        print(f"\nA CPU build of torch is smaller: PIP_EXTRA_INDEX_URL={CPU_INDEX} make {target}")
    if not (wanted := [row for row in rows if not row.outcome]):
        print("\nThere is nothing to try.")
        return 2
    if not agreed(wanted, options.yes):
        return 2
    with tempfile.TemporaryDirectory(prefix="hex-versions-") as name:
        wheel = options.wheel.resolve() if options.wheel else build(Path(name))
        for number, row in enumerate(rows):
            if not row.outcome:
                start = time.monotonic()
                with tempfile.TemporaryDirectory(dir=name) as folder:
                    rows[number] = attempt(row, pythons[row.python], wheel, Path(folder))
                show([rows[number]], pythons)
                print(f"    in {time.monotonic() - start:.0f} s", flush=True)
    print()
    show(rows, pythons)
    outcomes = [row.outcome for row in rows]
    print(", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped")))
    return 1 if "failed" in outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
