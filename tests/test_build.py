# SPDX-License-Identifier: MIT
"""The source archive, and the wheel that is built from it: what is in them (archives.py says what
should be), what the extension exports and needs, of an old glibc too, which instructions its
portable part has, what a type checker finds, there and in an editable install; that two builds give
the same bytes, and auditwheel; what a build says and does where nvcc is old or fails.

`make wheel` builds them, with an extension of their own, in an environment of their own. Here they
are made with the setuptools that is installed, and hold the extension under test, but where two
builds are compared: compiling it takes a minute. test_clang.py and test_aarch64.py compile it, with
clang and for aarch64.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import archives
import pytest

import hex._C

ROOT = Path(__file__).parent.parent
X86 = platform.machine() == "x86_64"
GENERATED = shutil.ignore_patterns("__pycache__", "*.so")


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


# What the backend does but for the extension: that is the one of these tests.
BACKEND = """
import shutil, sys
from pathlib import Path
from setuptools import build_meta
from setuptools.command.build_ext import build_ext

_, kind, folder, built = sys.argv

def copy(self):
    for extension in self.extensions:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, target)

build_ext.run = copy
getattr(build_meta, "build_" + kind)(folder)
"""


def build(kind, source, target):
    """What pip calls: make the sdist or the wheel of the tree `source`, in the folder `target`.

    With an nvcc that fails: test_cuda_build.py compiles the CUDA kernels, once.
    """
    environment = {**os.environ, "HEX_CUDA": "auto", "NVCC": shutil.which("false")}
    command = [sys.executable, "-c", BACKEND, kind, target, hex._C.__file__]
    return run(*command, cwd=source, env=environment)


class Built(NamedTuple):
    sdist: Path
    source: Path  # the sdist unpacked, in which the wheel was built
    wheel: Path
    site: Path  # the wheel unpacked
    said: str  # by the build of the wheel

    @property
    def extension(self):
        return self.site / "hex/_C.abi3.so"


FILES = sorted(archives.sources("--cached", "--others", "--exclude-standard"))


def copy_tree(tree):
    """The sources, into the new folder `tree`."""
    for name in FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    copy_tree(tree)
    build("sdist", tree, folder)
    (sdist,) = folder.glob("*.tar.gz")
    source = folder / sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    said = build("wheel", source, folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return Built(sdist, source, wheel, folder / "site", said)


def test_one_wheel_serves_every_python_from_3_10_on(built):
    assert re.fullmatch(r"hex_ssl-[\d.]+-cp310-abi3-\w+\.whl", built.wheel.name)


def test_the_archives_hold_what_they_have_to_hold_and_nothing_else(built):
    assert archives.wrong_in_sdist(built.sdist, set(FILES)) == []
    assert archives.wrong_in_wheel(built.wheel, set(FILES), published=False) == []


@pytest.mark.skipif(
    sys.platform != "linux" or find_spec("auditwheel") is None, reason="auditwheel is not installed"
)
def test_auditwheel_leaves_the_extension_and_gives_the_same_bytes(built, tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    one = archives.publish(built.wheel, tmp_path / "one")
    assert archives.wrong_in_wheel(one, set(FILES)) == []
    with zipfile.ZipFile(one) as archive:
        assert archive.read("hex/_C.abi3.so") == built.extension.read_bytes()
        assert {entry.date_time[:3] for entry in archive.infolist()} == {(2020, 2, 2)}
    os.utime(built.wheel, (10**9, 10**9))
    before = os.umask(0o077)
    try:
        other = archives.publish(built.wheel, tmp_path / "other")
    finally:
        os.umask(before)
    assert other.read_bytes() == one.read_bytes()


@pytest.mark.skipif(not archives.has_oldest(), reason="csrc/glibc.h has nothing for this system")
def test_the_extension_takes_nothing_of_a_glibc_newer_than_2_17(built, tmp_path):
    assert archives.newer_symbols(built.extension) == []
    assert "exp@GLIBC_" in run("nm", "-D", "--with-symbol-versions", built.extension)
    # On a glibc that has a newer one.
    (tmp_path / "new.c").write_text("double exp(double); double f(double x) { return exp(x); }")
    run("gcc", "-shared", "-fPIC", tmp_path / "new.c", "-lm", "-o", tmp_path / "new.so")
    new = tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 29)
    assert archives.newer_symbols(tmp_path / "new.so") == (["exp@GLIBC_2.29"] if new else [])


def test_the_extension_exports_its_init_function_only(built):
    assert run("nm", "-D", "--defined-only", built.extension).split()[2:] == ["PyInit__C"]


def test_the_extension_has_no_executable_stack_and_nothing_to_be_written_over_or_found(built):
    """BIND_NOW with RELRO: the table of functions is filled at the start and then read-only."""
    segments = run("readelf", "-lW", built.extension)
    (stack,) = re.findall(r"GNU_STACK.* (R.?.?) +0x", segments)
    assert stack.strip() == "RW"
    assert "GNU_RELRO" in segments
    dynamic = run("readelf", "-dW", built.extension)
    assert re.search(r"\(FLAGS\).*BIND_NOW", dynamic)
    assert not re.search(r"RPATH|RUNPATH|TEXTREL", dynamic)


def test_the_extension_needs_libtorch_cpu_and_the_c_library(built):
    dynamic = run("readelf", "-d", built.extension)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert {"libtorch_cpu.so", "libc.so.6"} <= needed
    others = {"libm.so.6", "libdl.so.2", "libgcc_s.so.1"}
    assert needed <= {"libtorch_cpu.so", "libc.so.6"} | others


def test_the_extension_has_no_openmp_and_no_cpp(built):
    undefined = run("nm", "-D", "--undefined-only", built.extension)
    assert "PyModule" in undefined
    assert not re.search(r"\b(GOMP|omp_|__kmpc|_Z|__cxa_(?!finalize)|__gxx)", undefined)


@pytest.mark.skipif(not X86, reason="the vector levels are for x86-64")
def test_no_instruction_beyond_the_baseline_outside_the_vector_levels(tmp_path):
    """Each file is compiled for a CPU of its own, so that it may go without optimisation."""
    registers = re.compile(r"%(ymm|zmm)")
    sources = [p for p in (ROOT / "csrc").rglob("*.c") if not p.name.startswith("avx")]
    sources.append(ROOT / "csrc/cpu/levels/avx2_f32.c")
    assert len(sources) > 6
    options = ["-std=gnu17", "-O0", "-fopenmp-simd", "-I", sysconfig.get_paths()["include"]]
    for path in sources:
        run("gcc", *options, "-c", path, "-o", tmp_path / "unit.o")
        found = registers.search(run("objdump", "-d", tmp_path / "unit.o"))
        assert bool(found) == path.name.startswith("avx"), path


def test_the_wheel_works_without_this_tree(built):
    code = "import hex; print(hex.__file__, hex._C.isa())"
    environment = os.environ | {"PYTHONPATH": str(built.site)}
    environment.pop("HEX_ISA", None)
    file, isa = run(sys.executable, "-c", code, cwd=built.site, env=environment).split()
    assert Path(file) == built.site / "hex/__init__.py"
    assert isa in ("base", "neon", "avx2", "avx512", "avx512_bf16", "avx512_amx")


# ---- two builds ----

# Without optimisation, which takes half the time and writes the same paths.
QUICK = """#!/bin/sh
exec gcc "$@" -O0
"""
# The source archive, and from it the wheel, as `python -m build` does.
TWICE = """
import os, sys, tarfile
from setuptools import build_meta
os.umask(int(sys.argv[1], 8))
sdist = build_meta.build_sdist("..")
with tarfile.open("../" + sdist) as archive:
    archive.extractall("unpacked", filter="data")
os.chdir("unpacked/" + sdist.removesuffix(".tar.gz"))
build_meta.build_wheel("../../..")
"""


@pytest.mark.timeout(1800)  # it took ten minutes on two cores that fifteen processes shared
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not there")
def test_two_builds_in_two_folders_on_two_days_give_the_same_bytes(tmp_path):
    (tmp_path / "quick").write_text(QUICK)
    (tmp_path / "quick").chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "SOURCE_DATE_EPOCH")}
    environment = {**kept, "HEX_CUDA": "0", "CC": str(tmp_path / "quick")}
    # Another folder, umask, zone and date of all files.
    for folder, umask, zone in (("one", "022", "UTC"), ("an other", "077", "Asia/Tokyo")):
        tree = tmp_path / folder / f"tree of {folder}"
        copy_tree(tree)
        if umask == "077":
            for path in tree.rglob("*"):
                os.utime(path, (10**9, 10**9))
                path.chmod(path.stat().st_mode & 0o700)
        run(sys.executable, "-c", TWICE, umask, cwd=tree, env={**environment, "TZ": zone})
    for pattern in ("*.tar.gz", "*.whl"):
        (one,), (other,) = ((tmp_path / f).glob(pattern) for f in ("one", "an other"))
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes(), pattern
    wheel = zipfile.ZipFile(one)
    assert {entry.date_time[:3] for entry in wheel.infolist()} == {(2020, 2, 2)}
    modes = {e.filename: e.external_attr >> 16 & 0o777 for e in wheel.infolist()}
    del modes[next(name for name in modes if name.endswith("/RECORD"))]  # a constant of its writer
    assert set(modes.values()) <= {0o644, 0o755}
    (extension,) = (name for name in wheel.namelist() if name.endswith(".so"))
    assert str(tmp_path).encode() not in wheel.read(extension)


def test_a_date_that_the_environment_gives_is_taken(tmp_path):
    copy_tree(tmp_path / "tree")
    environment = {"SOURCE_DATE_EPOCH": "1700000000", "HEX_EXTENSION": "0"}
    run(sys.executable, "-c", TWICE, "022", cwd=tmp_path / "tree", env=os.environ | environment)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    dates = {entry.date_time[:3] for entry in zipfile.ZipFile(wheel).infolist()}
    assert dates == {(2023, 11, 14)}
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert {member.mtime for member in members} == {1700000000}
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, "", "")
    }


# ---- type checkers ----

TYPED = """
from hex import HEXLoss, ThresholdTracker
ThresholdTracker.adaptive(over="q")
HEXLoss(beta="1")
"""
EDITABLE = """
from setuptools import build_meta
from setuptools.command.build_ext import build_ext
build_ext.run = lambda self: None  # which writes elsewhere
build_meta.build_editable("..")
"""


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """What `pip install -e` puts into site-packages, and the tree where it was called."""
    folder = tmp_path_factory.mktemp("editable")
    shutil.copytree(ROOT / "hex", folder / "tree/hex", ignore=GENERATED)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    environment = {**os.environ, "HEX_CUDA": "0"}
    run(sys.executable, "-c", EDITABLE, cwd=folder / "tree", env=environment)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site", folder / "tree"


def test_an_editable_install_is_a_path_and_no_hook(editable):
    site, tree = editable
    (path,) = (p for p in site.iterdir() if p.is_file())
    assert path.suffix == ".pth"
    assert path.read_text().split() == [str(tree)]


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
@pytest.mark.parametrize("kind", ("wheel", "editable"))
def test_mypy_finds_the_types_of_what_is_installed(kind, request, tmp_path):
    if kind == "wheel":
        site = request.getfixturevalue("built").site
    else:
        site, _ = request.getfixturevalue("editable")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    shutil.copytree(site, packages, dirs_exist_ok=True)
    (tmp_path / "typed.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--python-executable", tmp_path / "venv/bin/python"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [*command, "typed.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    over, beta, found = done.stdout.splitlines()
    assert over.startswith('typed.py:3: error: Argument "over" to "adaptive" of "ThresholdTracker"')
    assert beta.startswith('typed.py:4: error: Argument "beta" to "HEXLoss" has incompatible type')
    assert found.startswith("Found 2 errors")


# ---- nvcc: what it does not know, and where it fails ----

# Knows the targets of $KNOWN, fails to compile the file $FAILS, and writes down what it was asked.
NVCC = """#!/bin/sh
echo "$@" >> "$LOG"
while [ $# -gt 0 ]; do
    case $1 in
    -dryrun) dry=1 ;;
    -gencode)
        arch=${2#arch=compute_}
        case " $KNOWN " in *" ${arch%%,*} "*) ;; *) echo "nvcc fatal: $2" >&2; exit 1 ;; esac
        shift ;;
    -c) source=$2; shift ;;
    -o) object=$2; shift ;;
    esac
    shift
done
[ "$dry" ] && { echo "#$ TOP=$TOP" >&2; exit 0; }
[ "${source##*/}" = "$FAILS" ] && { echo "nvcc error: no" >&2; exit 2; }
gcc -xc -c /dev/null -o "$object"
"""
MAKE = """
import runpy, setuptools, sys
from pathlib import Path
setuptools.setup = lambda **_: None
runpy.run_path("setup.py")["make_cuda"](Path(sys.argv[1]), Path(sys.argv[2]))
"""
EVERY = "80+PTX,86,89,90a,100,120+PTX"  # as setup.py has it
linux_with_gcc = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="the library is for Linux"
)


@pytest.fixture
def cuda(tmp_path):
    """Builds hex/_cuda.so by what is no nvcc; gives the process, the library, what was asked."""
    nvcc, library, log = tmp_path / "nvcc", tmp_path / "hex/_cuda.so", tmp_path / "log"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    (tmp_path / "top/lib64").mkdir(parents=True)
    for name in ("cudart_static", "culibos"):
        run("ar", "rcs", tmp_path / f"top/lib64/lib{name}.a")

    def make(known="80 86 89 90a 100 120", **environment):
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HEX_", "CC"))},
            **dict(NVCC=str(nvcc), KNOWN=known, TOP=str(tmp_path / "top"), LOG=str(log)),
            **environment,
        }
        command = [sys.executable, "-c", MAKE, tmp_path / "objects", library]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        asked = log.read_text().splitlines() if log.exists() else []
        return done, library, [line for line in asked if "-dryrun" not in line]

    return make


@linux_with_gcc
def test_a_build_of_the_cuda_kernels_says_what_it_does(cuda):
    done, library, compiled = cuda()
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert library.exists()
    files = sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu"))
    first, *others = done.stdout.splitlines()
    n = len(files)
    assert first.startswith(f"hex-ssl: compiling {n} CUDA files for {EVERY}, which takes")
    assert first.endswith("HEX_CUDA=0 leaves them out")
    said = sorted(others, key=lambda line: int(line.split()[1]))
    assert [line.split(",")[0] for line in said] == [
        f"hex-ssl: {i} of {n}" for i in range(1, n + 1)
    ]
    assert sorted(line.rpartition("/")[2] for line in said) == files
    assert len(compiled) == n
    for line in compiled:
        assert line.count("-gencode") == 6
        assert "arch=compute_120,code=[sm_120,compute_120]" in line


@linux_with_gcc
def test_targets_that_nvcc_does_not_know_are_left_out_and_named_once(cuda):
    done, library, compiled = cuda(known="75 80 86 89 90a")
    assert done.returncode == 0, done.stderr
    assert library.exists()
    assert done.stdout.count("does not know the GPU targets 100,120+PTX: they are left out") == 1
    assert "CUDA files for 80+PTX,86,89,90a, which" in done.stdout
    assert all("compute_90a" in line and "compute_100" not in line for line in compiled)
    assert all("code=[sm_80,compute_80]" in line for line in compiled)  # for newer GPUs


@linux_with_gcc
@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(known="75"), f"does not know the GPU targets {EVERY}"),
        (dict(HEX_CUDA_ARCH="90b"), "does not know the GPU targets 90b"),
        (dict(FAILS="forward.cu"), "returned non-zero exit status 2"),
        (dict(TOP="/nowhere"), "returned non-zero exit status"),  # no library to link with
        (dict(NVCC="/bin/false"), f"/bin/false does not know the GPU targets {EVERY}"),
    ],
    ids=["no target", "no target asked for", "it fails", "linking fails", "it always fails"],
)
def test_where_nvcc_fails_the_build_goes_on_without_unless_it_was_asked_for(cuda, given, why):
    assert (ROOT / "csrc/cuda/forward.cu").exists()
    _, library, _ = cuda()
    assert library.exists()
    done, library, _ = cuda(**given)
    assert done.returncode == 0, done.stderr
    (last,) = [line for line in done.stdout.splitlines() if "goes on" in line]
    assert last.startswith("hex-ssl: this build goes on without CUDA kernels, for they cannot be")
    assert why in last and last.endswith("HEX_CUDA=1 makes that an error, HEX_CUDA=0 does not try")
    assert "Traceback" not in done.stderr
    assert not library.exists()  # nor that of the build before

    done, library, _ = cuda(**given, HEX_CUDA="1")
    assert done.returncode == 1
    assert "HEX_CUDA=1, but the CUDA kernels cannot be built: " in done.stderr
    assert why in done.stderr and "Traceback" not in done.stderr
    assert not library.exists()


@linux_with_gcc
def test_with_hex_cuda_1_every_target_must_be_known(cuda):
    done, library, compiled = cuda(known="80 86 89 90a", HEX_CUDA="1")
    assert done.returncode == 1
    assert "does not know the GPU targets 100,120+PTX" in done.stderr
    assert not compiled and not library.exists()
    done, library, _ = cuda(known="80", HEX_CUDA="1", HEX_CUDA_ARCH="80")
    assert done.returncode == 0, done.stderr
    assert library.exists()


@linux_with_gcc
def test_hex_cuda_0_asks_no_nvcc(cuda):
    done, library, compiled = cuda(HEX_CUDA="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not compiled and not library.exists()


@linux_with_gcc
def test_where_nvcc_fails_the_wheel_is_made_all_the_same(built):
    assert built.said.count("this build goes on without CUDA kernels") == 1
