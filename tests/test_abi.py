# SPDX-License-Identifier: MIT
"""The C prototypes in csrc/torch_shim.h are those of the installed torch, as its 2.10 had them.

abi_check.cpp asserts it while it is compiled; here it is compiled, and shown to notice a change.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch_exports

import hex._C

ROOT = Path(__file__).parent.parent
SHIM = (ROOT / "csrc/torch_shim.h").read_text()


def compile_check(folder, minor=10):
    """Compile abi_check.cpp with the torch_shim.h of `folder`, for what torch 2.`minor` has; "" or
    what the compiler says.
    """
    headers = Path(torch.__file__).parent / "include"
    command = [
        "g++",
        "-fsyntax-only",
        "-std=c++20",
        f"-DTORCH_TARGET_VERSION=0x02{minor:02x}{0:012}",
    ]
    command += ["-isystem", headers, "-I", folder, ROOT / "tests/abi_check.cpp"]
    return subprocess.run(command, capture_output=True, text=True).stderr


NEWEST = 11  # the functions of this minor release are used where they are there


def has_newest():
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, NEWEST)


def test_every_prototype_is_the_one_in_torchs_headers():
    assert compile_check(ROOT / "csrc") == ""


@pytest.mark.skipif(not has_newest(), reason=f"torch is older than 2.{NEWEST}")
def test_the_newer_prototypes_too(tmp_path):
    assert compile_check(ROOT / "csrc", NEWEST) == ""
    (tmp_path / "torch_shim.h").write_text(SHIM.replace("int64_t metadata_bytes", "int n"))
    assert "assertion failed: torch_from_blob" in compile_check(tmp_path, NEWEST)


CHANGES = (  # what stands in the file, what takes its place, and what the compiler complains of
    ("t, int64_t *dim)", "t, int32_t *dim)", "assertion failed: aoti_torch_get_dim"),
    ("const void **data", "void **data", "assertion failed: torch_get_const_data_ptr"),
    ("bool condition", "int32_t condition", "assertion failed: aoti_torch_check"),
    ("X(int32_t, aoti_torch_dtype_float64", "X(int64_t, aoti_torch_dtype_float64", "float64"),
    (", uint64_t abi))", "))", "assertion failed: torch_library_impl"),
    ("torch_parallel_for", "torch_exception_get_what", "torch_exception_get_what"),  # 2.13's
    ("(uint64_t)10 << 48", "(uint64_t)13 << 48", "HEX_TORCH_ABI"),
)


def test_each_changed_prototype_is_complained_of(tmp_path):
    text = SHIM
    for ours, changed, _ in CHANGES:
        assert SHIM.count(ours) == 1
        text = text.replace(ours, changed)
    (tmp_path / "torch_shim.h").write_text(text)
    errors = [line for line in compile_check(tmp_path).splitlines() if "error: " in line]
    for *_, complaint in CHANGES:
        assert any(complaint in line for line in errors), (complaint, errors)


def test_the_extension_calls_the_listed_functions_and_no_other_of_torch():
    listed = re.findall(r"^ +X\(\w+, (\w+),", SHIM, re.MULTILINE)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", hex._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert sorted(s for s in symbols if re.match("(aoti_)?torch_", s)) == sorted(listed)
    assert len(listed) > 20


def test_every_release_from_2_10_on_exports_what_is_needed_on_cpu_and_cuda():
    table = torch_exports.read()
    releases = {release for exporting in table.values() for release in exporting}
    assert {"2.10.0", "2.11.0", "2.12.0", "2.13.0"} <= releases
    assert len(torch_exports.needed("2.10.0")) > 20
    added = torch_exports.needed("2.11.0") - torch_exports.needed("2.10.0")
    assert added == {("libtorch_cpu.so", "torch_from_blob")}
    assert [key for key in torch_exports.needed("2.10.0") if key[0] == "libtorch_cuda.so"] == [
        ("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream")
    ]
    for release in releases:
        listed = {key for key, exporting in table.items() if release in exporting}
        assert torch_exports.needed(release) <= listed, release


def test_the_table_of_exports_has_the_installed_torch_right():
    release = torch.__version__.partition("+")[0]
    table = torch_exports.read()
    if release not in {release for exporting in table.values() for release in exporting}:
        pytest.skip(f"tests/torch_exports.txt has no torch {release}")
    library = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    installed: torch_exports.Table = {}
    torch_exports.add(installed, release, library.name, torch_exports.exported(library))
    listed = {key for key, exporting in table.items() if release in exporting}
    assert set(installed) == {key for key in listed if key[0] == library.name}
