# SPDX-License-Identifier: MIT
"""What gpu.py needs beside the sources on the machine with the GPU: built on another machine, and
found unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu"
BUILDS = "90a,90"  # the most wanted first
SOURCES = ("csrc/**/*.[ch]", "csrc/**/*.cu*", "setup.py", "tests/emulation/conformance.cu")

Manifest = dict[str, Any]


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def of_sources() -> str:
    return digest(*sorted(file for pattern in SOURCES for file in ROOT.glob(pattern)))


def said(*command: str) -> str:
    """Its output, empty where it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def asked_of_card(field: str) -> str:
    """The first card's, by nvidia-smi; empty where there is none."""
    return said("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").partition("\n")[0]


def write_manifest(folder: Path, builds: Sequence[str], nvcc: str) -> None:
    """Of the files in the folder, and of the sources they were built from."""
    about = {
        "commit": said("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown",
        "nvcc": nvcc, "builds": builds, "sources": of_sources(),
        "files": {file.name: digest(file) for file in sorted(folder.glob("*.so"))},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(about, indent=2) + "\n")


def changed(folder: Path) -> Iterator[str]:
    """What is not as the manifest says."""
    about = manifest(folder)
    for name, sum_ in about["files"].items():
        if not (folder / name).exists():
            yield f"{name} is missing"
        elif digest(folder / name) != sum_:
            yield f"{name} is another file than was built"
    if of_sources() != about["sources"]:
        yield "the sources in csrc/ are others than those it was built from"


def manifest(folder: Path) -> Manifest:
    return json.loads((folder / "manifest.json").read_text())


def code(folder: Path) -> str:
    """What is measured, in short."""
    return f"{manifest(folder)['commit']}+{digest(folder / 'manifest.json')[:6]}"


def prepare(folder: Path) -> int:
    """Builds by setup.py what differs from what is there; 0, or 1 where there is no nvcc."""
    import setuptools

    setup, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        names = runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = setup
    if not (nvcc := names["find_nvcc"]()):
        print("nvcc is not found: set NVCC or CUDA_HOME", file=sys.stderr)
        return 1
    version = said(nvcc, "--version").splitlines()[-2]
    builds = (os.environ.get("HEX_CUDA_ARCH") or BUILDS).split(",")
    with contextlib.suppress(OSError, ValueError):
        before = manifest(folder)
        if (before["nvcc"], before["builds"]) == (version, builds) and not [*changed(folder)]:
            write_manifest(folder, builds, version)  # the commit may be another
            print(f"{folder} was already built from these sources")
            return 0
    objects = folder.with_name("gpu-objects")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(ROOT)
    # The same instructions, and beside them the lines that compute-sanitizer and ncu can name.
    os.environ["NVCC_APPEND_FLAGS"] = "-lineinfo"
    for build in builds:
        os.environ["HEX_CUDA_ARCH"] = build
        names["build_cuda"](nvcc, objects / build, folder / f"cuda_{build}.so")
        options = [*names["NVCC_FLAGS"], *names["gencode"]([build]), "-shared"]
        output = folder / f"conformance_{build}.so"
        source = "tests/emulation/conformance.cu"
        subprocess.run([nvcc, *options, "-o", output, source], check=True)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", objects / "lib"]
    command += ["--build-temp", objects / "temp"]
    subprocess.run(command, check=True, env=os.environ | {"HEX_CUDA": "0"})
    shutil.copy(objects / "lib" / "hex" / "_C.abi3.so", folder)
    write_manifest(folder, builds, version)
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 1e6:7.2f} MB  {file}")
    return 0


def put(file: Path, target: Path) -> None:
    """A copy in one step, for others may have the old one open."""
    if not target.exists() or digest(target) != digest(file):
        shutil.copy(file, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)
