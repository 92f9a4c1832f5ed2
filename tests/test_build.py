# SPDX-License-Identifier: MIT
"""The source archive, and the wheel that is built from it: what is in them, what the extension
exports and needs, which instructions its portable part has.

`make wheel` builds them in an environment of their own; here, to save its download, with the
setuptools that is installed.
"""

import email
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
X86 = platform.machine() == "x86_64"
FOLDERS = ("csrc", "hex", "tests")
GENERATED = shutil.ignore_patterns("__pycache__", "*.so")


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def build(kind, source, target):
    """What pip calls: make the sdist or the wheel of the tree `source`, in the folder `target`."""
    backend = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(target)!r})"
    # test_cuda_build.py compiles the CUDA kernels, once
    run(sys.executable, "-c", backend, cwd=source, env={**os.environ, "HEX_CUDA": "0"})


class Built(NamedTuple):
    sdist: Path
    source: Path  # the sdist unpacked, in which the wheel was built
    wheel: Path
    site: Path  # the wheel unpacked

    @property
    def extension(self):
        return self.site / "hex/_C.abi3.so"

    def object(self, name):
        (found,) = self.source.glob(f"build/temp*/csrc/{name}.o")
        return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=GENERATED)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    build("sdist", tree, folder)
    (sdist,) = folder.glob("*.tar.gz")
    source = folder / sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build("wheel", source, folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return Built(sdist, source, wheel, folder / "site")


def test_one_wheel_serves_every_python_from_3_10_on(built):
    assert re.fullmatch(r"hex_ssl-[\d.]+-cp310-abi3-\w+\.whl", built.wheel.name)


def test_the_wheel_holds_the_package_and_no_sources_of_the_extension(built):
    files = {str(p.relative_to(built.site)) for p in built.site.rglob("*") if p.is_file()}
    package = {f for f in files if ".dist-info/" not in f}
    modules = {f"hex/{p.name}" for p in (ROOT / "hex").glob("*.py")}
    assert package == modules | {"hex/_C.abi3.so", "hex/_C.pyi", "hex/py.typed"}
    assert any(f.endswith("licenses/LICENSE") for f in files)


def test_the_wheel_asks_for_torch_and_nothing_else(built):
    (path,) = built.site.glob("*.dist-info/METADATA")
    metadata = email.message_from_string(path.read_text())
    needed = metadata.get_all("Requires-Dist")
    assert [r for r in needed if "extra ==" not in r] == ["torch>=2.10"]
    assert metadata.get_all("Provides-Extra") == ["lightning", "examples", "test", "dev"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def test_the_source_archive_holds_what_building_and_testing_take(built):
    for name in FOLDERS:
        files = [p.relative_to(ROOT) for p in (ROOT / name).rglob("*") if p.is_file()]
        wanted = {p for p in files if p.suffix != ".so" and "__pycache__" not in p.parts}
        found = (built.source / name).rglob("*")
        assert {p.relative_to(built.source) for p in found if p.is_file()} == wanted


def test_the_extension_exports_its_init_function_only(built):
    assert run("nm", "-D", "--defined-only", built.extension).split()[2:] == ["PyInit__C"]


def test_the_extension_needs_libtorch_cpu_and_the_c_library(built):
    dynamic = run("readelf", "-d", built.extension)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert {"libtorch_cpu.so", "libc.so.6"} <= needed
    assert needed <= {"libtorch_cpu.so", "libc.so.6", "libm.so.6", "libgcc_s.so.1"}
    assert "BIND_NOW" in dynamic
    assert "TEXTREL" not in dynamic


def test_the_extension_has_no_openmp_and_no_cpp(built):
    undefined = run("nm", "-D", "--undefined-only", built.extension)
    assert "PyModule" in undefined
    assert not re.search(r"\b(GOMP|omp_|__kmpc|_Z|__cxa_(?!finalize)|__gxx)", undefined)


@pytest.mark.skipif(not X86, reason="the vector levels are for x86-64")
def test_no_instruction_beyond_the_baseline_outside_the_vector_levels(built):
    registers = re.compile(r"%(ymm|zmm)")
    assert registers.search(run("objdump", "-d", built.object("cpu/isa_avx2")))
    for path in built.source.glob("build/temp*/csrc/**/*.o"):
        if not path.name.startswith("isa_avx"):
            assert not registers.search(run("objdump", "-d", path)), path.name
    assert built.object("cpu/isa_base").exists()


def test_the_wheel_works_without_this_tree(built):
    code = "import hex; print(hex.__file__, hex._C.isa())"
    environment = os.environ | {"PYTHONPATH": str(built.site)}
    environment.pop("HEX_ISA", None)
    file, isa = run(sys.executable, "-c", code, cwd=built.site, env=environment).split()
    assert Path(file) == built.site / "hex/__init__.py"
    assert isa in ("base", "avx2", "avx512")
