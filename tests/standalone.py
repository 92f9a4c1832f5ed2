# SPDX-License-Identifier: MIT
"""The extension without torch and without Python: builds the program of alone/, runs it on a built
extension, and compiles the extension again with other options.

    build(folder)       the program, and the stand-ins for the CUDA core
    compile_extension   csrc as a library, each file with options of its own
    run                 the program on an extension, at a level of instructions
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALONE = ROOT / "tests" / "alone"
CC = os.environ.get("CC", "gcc").split()
INCLUDE = f"-I{sysconfig.get_paths()['include']}"
# As setup.py compiles, but for what makes it fast.
LANGUAGE = ["-std=gnu17", "-fexceptions", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
STRICT = ["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes"]
if os.environ.get("HEX_WERROR") == "1":
    STRICT += ["-Werror"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv"]
CUDA_CORES = {  # what stands in for hex/_cuda.so and for libtorch_cuda.so
    "cuda.so": [],
    "emulated.so": ["-DEMULATED"],
    "another_version.so": ["-DANOTHER_VERSION"],
    "no_driver.so": ["-DDRIVER=35"],
    "broken_driver.so": ["-DDRIVER=1"],
    "libtorch_cuda.so": ["-DTORCH_CUDA", "-Wl,-soname,libtorch_cuda.so"],
}


class Counts(NamedTuple):
    calls: int
    refused: int
    failures: int


def gcc(*arguments: str | Path) -> None:
    subprocess.run([*CC, *map(str, arguments)], check=True)


def build(folder: Path, *options: str) -> Path:
    """The program, linked as `options` say (a sanitizer)."""
    folder.mkdir(parents=True, exist_ok=True)
    # what the extension needs by name; its functions are the program's
    gcc(
        "-shared",
        "-xc",
        "/dev/null",
        "-Wl,-soname,libtorch_cpu.so",
        "-o",
        folder / "libtorch_cpu.so",
    )
    sources = [source for source in sorted(ALONE.glob("*.c")) if source.name != "cuda.c"]
    program = folder / "alone"
    gcc(
        *("-std=gnu17", "-O1", "-g", *STRICT, INCLUDE, *options, "-rdynamic"),
        *(*sources, "-o", program, "-lpthread", "-ldl", "-lm"),
    )
    for name, defines in CUDA_CORES.items():
        gcc("-shared", "-fPIC", *STRICT, *defines, ALONE / "cuda.c", "-o", folder / name)
    return program


def without(program: Path, function: str, folder: Path) -> Path:
    """The program as an older torch, in which this function has another name."""
    shutil.copytree(program.parent, folder, dirs_exist_ok=True)
    older = folder / program.name
    name = b"\0" + function.encode() + b"\0"
    data = older.read_bytes()
    assert name in data  # in the tables of symbols, for debuggers and for the loader
    older.write_bytes(data.replace(name, name[:-2] + b"_\0"))
    return older


def sources(csrc: Path) -> list[Path]:
    """Of the extension, the largest first."""
    found = [*csrc.glob("*.c"), *csrc.glob("cpu/*.c"), *csrc.glob("cpu/levels/*.c")]
    return sorted(found, key=lambda source: "levels" not in source.parts)


def compile_extension(
    folder: Path,
    options: Callable[[Path], Sequence[str]],
    *link: str,
    csrc: Path = ROOT / "csrc",
    only: Sequence[Path] | None = None,
) -> Path:
    """Each source with its `options`, as many at a time as there are processors. `only`: those that
    are not in the folder yet, or have changed."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> None:
        target = folder / f"{source.stem}.o"
        gcc(*LANGUAGE, INCLUDE, *options(source), "-c", source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources(csrc) if only is None else only))
    library = folder / "_C.abi3.so"
    stub = folder / "libtorch_cpu.so"
    gcc("-shared", "-xc", "/dev/null", "-Wl,-soname,libtorch_cpu.so", "-o", stub)
    gcc("-shared", *link, *sorted(folder.glob("*.o")), "-Wl,--no-as-needed", stub, "-lm", "-ldl",
        "-o", library)  # fmt: skip
    return library


def run(
    program: Path,
    extension: Path,
    level: str,
    seed: int,
    *command: object,
    timeout: float = 600,
    **environment: str,
) -> Counts:
    """What the program counts, in its last line. AssertionError with all it says where it fails."""
    result = subprocess.run(
        list(map(str, (program, extension, seed, *command))),
        env={
            **{k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")},
            "LD_LIBRARY_PATH": str(program.parent),
            "HEX_ISA": level,
            "ASAN_OPTIONS": "allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    report = result.stderr[-6000:]  # a sanitizer's may be long; what the program says is not
    said = f"{' '.join(map(str, command))} at {level}, seed {seed}\n{result.stdout}{report}"
    assert result.returncode == 0, said
    return Counts(
        *map(int, re.findall(r"(\d+) (?:calls|of them refused|with a failure)", said)[-3:])
    )
