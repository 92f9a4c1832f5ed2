# SPDX-License-Identifier: MIT
"""The files of a release: takes what a build has made, makes of it what can be published, and says
which files and metadata are missing or do not belong there. `make wheel` and `make wheel-cuda` run
it, test_build.py uses it.

    python tests/archives.py build/dist/*.tar.gz build/dist/*.whl --into dist

The source archive is copied. auditwheel names the wheel by the oldest glibc that will do, which is
2.17. With CUDA kernels it can be as new as 2.34, for NVIDIA's library, which is linked into them,
takes what the build's glibc gives. The exit status is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import base64
import csv
import email
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
GLIBC = (2, 17)  # the oldest that the extension may need
OLDEST = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
DATE = "1580601600"  # of the files in a wheel, as setup.py has it
NOT_IN_SDIST = {".gitignore"}
GENERATED = r"PKG-INFO|setup\.cfg|hex_ssl\.egg-info/.*"  # by setuptools, into the source archive
DIST_INFO = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")


def sources(*more: str) -> set[str]:
    """The files of this tree that the source archive holds: those that git has, with `more` options
    of its ls-files; in an unpacked archive those that it names itself."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", *more]
        listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        names = set(filter(None, listed.stdout.split("\0")))
    else:
        lines = (ROOT / "hex_ssl.egg-info/SOURCES.txt").read_text().splitlines()
        names = {str(Path(line)) for line in lines}  # some begin with ./
    return {n for n in names - NOT_IN_SDIST if not re.fullmatch(GENERATED, n)}


def version() -> str:
    """Of the sources."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "hex/__init__.py").read_text(), re.M)
    assert found
    return found[1]


def address() -> str:
    """Of the repository, as pyproject.toml has it."""
    found = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert found
    return found[1]


def extras() -> list[str]:
    """The names that pyproject.toml has, as a Python before 3.11 can read them."""
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    return re.findall(r"^([a-z]+) = \[", table.partition("\n[")[0], re.M)


def differences(found: set[str], wanted: set[str]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(wanted - found)]
    return missing + [f"{name} does not belong there" for name in sorted(found - wanted)]


def wrong_in_metadata(text: str, release: str) -> list[str]:
    """Of PKG-INFO in the source archive, and of METADATA in a wheel."""
    metadata = email.message_from_string(text)
    needed = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    return [
        f"{name}: got {got!r}, wanted {wanted!r}"
        for name, got, wanted in (
            ("Name", metadata["Name"], "hex-ssl"),
            ("Version", metadata["Version"], release),
            ("Requires-Python", metadata["Requires-Python"], ">=3.10"),
            ("Requires-Dist", needed, ["torch>=2.10"]),
            ("Provides-Extra", metadata.get_all("Provides-Extra"), extras()),
            ("License-Expression", metadata["License-Expression"], "MIT"),
            ("License-File", metadata["License-File"], "LICENSE"),
            ("Description-Content-Type", metadata["Description-Content-Type"], "text/markdown"),
        )
        if got != wanted
    ]


def wrong_in_sdist(path: Path, wanted: set[str]) -> list[str]:
    """`wanted`: the files of the tree it was made of."""
    folder = f"hex_ssl-{version()}"
    if path.name != f"{folder}.tar.gz":
        return [f"its name is not {folder}.tar.gz"]
    with tarfile.open(path) as archive:
        names = [member.name for member in archive if not member.isdir()]
        info = archive.extractfile(f"{folder}/PKG-INFO")
        assert info
        text = info.read().decode()
    found = {name.removeprefix(f"{folder}/") for name in names}
    ours = {name for name in found if not re.fullmatch(GENERATED, name)}
    return differences(ours, wanted) + wrong_in_metadata(text, version())


def wrong_in_wheel(path: Path, wanted: set[str], *, published: bool = True) -> list[str]:
    """`wanted` as above. A local version, such as 1.0+cu130, says that it has the CUDA kernels."""
    _, release, _, tags = parse_wheel_filename(path.name)
    platforms = {tag.platform for tag in tags}
    wrong = []
    if str(release.public) != version():
        wrong.append(f"version: got {release}, wanted {version()}")
    if (others := {f"{t.interpreter}-{t.abi}" for t in tags}) != {"cp310-abi3"}:
        wrong.append(f"tags: got {others}, wanted cp310-abi3")
    if published and not all(p.startswith(("manylinux", "musllinux")) for p in platforms):
        wrong.append(f"platform: got {platforms}, wanted a manylinux")
    if published and not release.local and has_oldest() and OLDEST not in platforms:
        wrong.append(f"platform: got {platforms}, wanted {OLDEST}")

    info = f"hex_ssl-{release}.dist-info"
    package = {n for n in wanted if re.fullmatch(r"hex/[^/]+\.(py|pyi|typed)", n)}
    assert {"hex/__init__.py", "hex/_C.pyi", "hex/py.typed"} <= package
    binaries = ["hex/_C.abi3.so"] + (["hex/_cuda.so"] if release.local else [])
    with zipfile.ZipFile(path) as archive:
        held = {e.filename: archive.read(e) for e in archive.infolist() if not e.is_dir()}
    everything = {*package, *binaries, *(f"{info}/{name}" for name in DIST_INFO)}
    if missing := differences(set(held), everything):
        return wrong + missing
    wrong += wrong_in_metadata(held[f"{info}/METADATA"].decode(), str(release))
    wheel = email.message_from_bytes(held[f"{info}/WHEEL"])
    if set(wheel.get_all("Tag", [])) != set(map(str, tags)):
        wrong.append(f"WHEEL: its tags {wheel.get_all('Tag')} are not those of the name")
    if wheel["Root-Is-Purelib"] != "false":
        wrong.append("WHEEL: Root-Is-Purelib is not false")
    recorded = {f"{info}/RECORD": ["", ""]}
    for name, content in held.items():
        if not name.endswith("/RECORD"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            recorded[name] = [f"sha256={digest.decode()}", str(len(content))]
    listed = {
        name: rest for name, *rest in csv.reader(held[f"{info}/RECORD"].decode().split("\n")[:-1])
    }
    if listed != recorded:
        wrong.append("RECORD: its files, hashes and sizes are not those of the wheel")
    return wrong


def has_oldest() -> bool:
    """Whether GLIBC is a promise on this machine: csrc/glibc.h has it for two."""
    return platform.machine() in ("x86_64", "aarch64") and platform.libc_ver()[0] == "glibc"


def newer_symbols(library: Path, nm: str = "nm") -> list[str]:
    """What a library takes of a glibc that is newer than GLIBC, such as exp@GLIBC_2.29."""
    command = [nm, "-D", "--undefined-only", "--with-symbol-versions", str(library)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [
        f"{name}@GLIBC_{release}"
        for name, release in re.findall(r"(\w+)@+GLIBC_([\d.]+)", said)
        if tuple(map(int, release.split("."))) > GLIBC
    ]


def publish(path: Path, folder: Path) -> Path:
    """The file for an index, in `folder`, which is made: the same bytes from the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".whl":
        return Path(shutil.copy(path, folder))
    command = [sys.executable, "-m", "auditwheel", "repair"]
    # libtorch_cpu.so is torch's. Without a patcher any change of a library is an error.
    command += ["--exclude", "libtorch_cpu.so", "--patcher", "none", str(path)]
    environment = {"SOURCE_DATE_EPOCH": DATE, **os.environ}
    with tempfile.TemporaryDirectory(dir=folder) as apart:
        command += ["--wheel-dir", apart]
        subprocess.run(command, check=True, env=environment, umask=0o022)
        (made,) = Path(apart).iterdir()
        return made.replace(folder / made.name)  # and that of an earlier run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The files of a release")
    parser.add_argument("file", nargs="+", type=Path, help="a source archive or a wheel")
    parser.add_argument("--into", type=Path, required=True, help="the folder of those to publish")
    options = parser.parse_args(arguments)
    bad, files = 0, sources()
    for path in (publish(file, options.into) for file in options.file):
        wrong = (wrong_in_wheel if path.suffix == ".whl" else wrong_in_sdist)(path, files)
        bad += bool(wrong)
        print(f"{path}: {'; '.join(wrong) or 'holds what it has to hold, and nothing else'}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
