# SPDX-License-Identifier: MIT
"""The extension as a cross compiler makes it for aarch64, where torch's own may not be at hand: no
warning, it links, and both levels, emulated, compute what the reference computes. Part of `make
thorough`; on an aarch64 test_isa.py tests its levels.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import archives
import pytest

ROOT = Path(__file__).parent.parent
TARGET = "aarch64-linux-gnu"
TOOLS = {f"{TARGET}-gcc": f"gcc-{TARGET}", "qemu-aarch64": "qemu-user"}  # and Debian's packages
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not found: apt install {' '.join(TOOLS.values())}",
)


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources, with the extension in hex/ and what it was linked from in objects/."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "hex"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    # Debian's pyconfig.h includes that of the target from here; this machine's has the same sizes.
    config = tree / "include" / TARGET / f"python{sysconfig.get_python_version()}/pyconfig.h"
    config.parent.mkdir(parents=True)
    shutil.copy(sysconfig.get_config_h_filename(), config)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HEX_")}
    environment |= dict(CC=f"{TARGET}-gcc", CFLAGS=f"-I{tree}/include")
    environment |= dict(HEX_WERROR="1", HEX_CUDA="0")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "-t", "objects"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return tree


@pytest.fixture(scope="module")
def program(tree):
    """other_machine.c, alone/torch.c and the extension's objects, all but the one with Python."""
    objects = [str(p) for p in (tree / "objects/csrc").rglob("*.o") if p.name != "module.o"]
    flags = "-std=gnu17 -O1 -Wall -Wextra -Wshadow -Werror -pthread".split()
    sources = [str(ROOT / "tests" / name) for name in ("other_machine.c", "alone/torch.c")]
    files = [*sources, *objects, "-lm", "-o", str(tree / "program")]
    run(f"{TARGET}-gcc", *flags, *files)
    return tree / "program"


def test_the_extension_is_for_aarch64_and_exports_its_init_function_only(tree):
    (extension,) = tree.glob("hex/_C*.so")
    assert "AArch64" in run(f"{TARGET}-readelf", "-h", extension)
    assert run(f"{TARGET}-nm", "-D", "--defined-only", extension).split()[2:] == ["PyInit__C"]
    assert "[libtorch_cpu.so]" in run(f"{TARGET}-readelf", "-d", extension)
    assert archives.newer_symbols(extension, f"{TARGET}-nm") == []


@pytest.mark.parametrize(("asked", "level"), [("", "neon"), ("base", "base")])
def test_a_level_computes_what_the_reference_computes(program, asked, level):
    root = Path(run(f"{TARGET}-gcc", "-print-file-name=libc.so.6")).resolve().parents[1]
    command = ["env", f"HEX_ISA={asked}", "qemu-aarch64", "-L", root, program]
    said = run(sys.executable, Path(__file__).with_name("other_machine.py"), *command)
    name, batches, of_labels, calls = said.split()
    assert name == level
    assert int(batches) > 40 and int(of_labels) > 40
    assert int(calls) > 5 * int(batches)  # else this machine's kernels were compared
