# SPDX-License-Identifier: MIT
"""hex/_cuda.so as it is built: what it needs and exports, and for each target what the compiler
made of the kernels, by the disassembler from PyPI.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import cuda_tensor
from targets import CAPABILITIES, has_code, setup_py

from hex import _load, ops

# Six targets, a part of an hour on a machine with two cores.
pytestmark = pytest.mark.timeout(3600)

ROOT = Path(__file__).parent.parent
TARGETS = ("80", "86", "89", "90a", "100", "120")
# Kernels on the tensor cores, by the beginning of their mangled names: how many there are, and the
# most registers of a thread. A processor has 65536, for 512 threads of these kernels or 384 (bounds
# and the gather of 12 warps); in the other gathers and the product they hold up to 128 rows x 256
# features of the gradient for 256 threads, and as many fill a processor's shared memory in the last
# two.
SETS = r"Lb1EEv"  # of labels, masks, groups and guides: the last of a template's arguments
PLAIN = r"Lb0EEv"
TILES = {
    **{rf"forward_tilesILi{w}E.*{PLAIN}": (n, 128) for w, n in ((4, 4), (8, 4), (16, 2))},
    **{rf"forward_tilesILi{warps}E.*{SETS}": (2, 255) for warps in (4, 8)},
    **{rf"count_tiles.*{PLAIN}": (8, 128), rf"count_tiles.*{SETS}": (4, 168)},
    **{rf"bound_tiles.*{PLAIN}": (4, 168), rf"bound_tiles.*{SETS}": (2, 168)},
    **{"gather_tilesILi12E": (2, 168), "gather_tilesILi8E": (6, 255)},
    **{
        rf"weigh_tiles.*{PLAIN}": (2, 128),
        rf"weigh_tiles.*{SETS}": (2, 255),
        "multiply_tiles": (2, 255),
    },
    **{"sample_tiles": (6, 255), "bracket_tiles": (6, 255)},
}
PER_ELEMENT = 9.5  # instructions of the forward's inner loop: 9.4 for 10.0, 9 at most for others
SPILLED = 96  # bytes of a thread; seen are 32 at most
PER_PAIR = 6  # of what every pair of cosines goes through in the brackets


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    names = setup_py()
    nvcc = names["find_nvcc"]()
    if not nvcc:
        pytest.skip("nvcc is not found: the kernels are not compiled here")
    folder, before = tmp_path_factory.mktemp("cuda"), os.getcwd()
    os.chdir(ROOT)
    try:
        names["build_cuda"](nvcc, folder / "build", folder / "_cuda.so")
    finally:
        os.chdir(before)
    return folder / "_cuda.so"


def cuobjdump(library, *options):
    tools = next(Path(p) for p in __import__("nvidia").__path__) / "cu13/bin"
    tool = tools / "cuobjdump" if tools.is_dir() else shutil.which("cuobjdump")
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tool, *options, library]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@pytest.fixture(scope="module")
def resources(library):
    """{target: {kernel: {"REG": ..., "STACK": ...}}}"""
    found, target = {}, None
    for line in cuobjdump(library, "-res-usage").splitlines():
        if match := re.search(r"sm_(\d+a?)", line):
            target = found.setdefault(match[1], {})
        elif match := re.search(r"Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            target[kernel] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.fixture(scope="module")
def blocks(library):
    """{target: {kernel: its basic blocks, each a list of instructions}}"""
    found = {}
    for target in TARGETS:
        kernels = found.setdefault(target, {})
        for line in cuobjdump(library, "-sass", "-arch", f"sm_{target}").splitlines():
            if match := re.search(r"Function : (\w+)", line):
                current = kernels.setdefault(match[1], [[]])
            elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                current[-1].append(match[1])
                if re.search(r"\b(BRA|EXIT|CALL|RET|BSYNC|BSSY|WARPSYNC)\b", match[1]):
                    current.append([])
    return found


def of_tiles(kernels):
    """The kernels on the tensor cores, by name."""
    return {k: v for k, v in kernels.items() if any(re.search(name, k) for name in TILES)}


def test_it_needs_libc_only_and_exports_one_table(library):
    dynamic = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"} | {
        f"lib{name}"
        for name in ("rt.so.1", "pthread.so.0", "dl.so.2")  # part of older glibc
    }
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["hex_cuda_core"]


def test_it_loads_without_a_driver_and_says_so(library):
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    ctypes.CDLL(str(library))
    problem = _load._C.load_cuda(str(library))
    assert re.match("the CUDA driver answers with error (35|100)", problem)


@pytest.fixture(scope="module")
def code(library):
    """The targets with machine code in the library, and those with PTX; of each source file."""
    kinds = []
    for option, end in (("-lelf", "cubin"), ("-lptx", "ptx")):
        lines = cuobjdump(library, option)
        targets = re.findall(rf"\.sm_(\w+)\.{end}$", lines, re.MULTILINE)
        assert targets, lines
        kinds.append(targets)
    return kinds


def test_there_is_code_for_every_target_and_ptx_for_later_ones(code, resources):
    assert set(resources) == set(TARGETS)
    cubins, ptx = code
    assert set(cubins) == set(TARGETS) and set(ptx) == {"80", "120"}
    files = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    assert all(cubins.count(target) == files for target in TARGETS)
    assert all(ptx.count(target) == files for target in ("80", "120"))


@pytest.mark.parametrize("capability", CAPABILITIES, ids="{0[0]}.{0[1]}".format)
def test_a_gpu_has_code_in_the_library_or_the_fallback(
    code, capability, fresh_cuda, monkeypatch, recwarn
):
    """There is code from 8.0 on; what each GPU runs is of the library, by NVIDIA's rules."""
    served = has_code(capability, *code)
    assert served == (capability >= (8, 0))
    fresh_cuda(capability)
    monkeypatch.setattr(_load._C, "probe_cuda", lambda index: 0 if served else 209)
    for _ in range(2):
        assert ops._has_kernel(cuda_tensor()) == served
    assert len(recwarn) == (not served)


def test_kernels_keep_within_their_registers(resources):
    for target, kernels in resources.items():
        for kernel, used in of_tiles(kernels).items():
            (limit,) = (most for name, (_, most) in TILES.items() if re.search(name, kernel))
            assert used["REG"] <= limit, (target, kernel, used)


def test_no_kernel_has_more_than_a_few_bytes_in_local_memory(resources, blocks):
    """Registers that do not suffice for a few numbers beside the loops; no array, and no call."""
    for target in TARGETS:
        assert set(resources[target]) == set(blocks[target]) and len(blocks[target]) > 20
        for kernel, used in resources[target].items():
            assert used["STACK"] <= SPILLED and used["LOCAL"] == 0, (target, kernel, used)
        for kernel, code in blocks[target].items():
            local = [x for block in code for x in block if re.search(r"\b(LDL|STL)\b", x)]
            assert len(local) <= 2 * SPILLED, (target, kernel, local)


def test_every_kernel_is_there_once(resources):
    for target, kernels in resources.items():
        for name, (n, _) in TILES.items():
            assert sum(bool(re.search(name, kernel)) for kernel in kernels) == n, (target, name)


def test_the_tensor_cores_are_used_and_on_hopper_the_copy_engine(blocks):
    for target, kernels in blocks.items():
        for kernel, code in of_tiles(kernels).items():
            text = "\n".join(x for block in code for x in block)
            for of_hopper in ("HGMMA", "UBLKCP", "SYNCS"):
                assert (of_hopper in text) == (target == "90a"), (target, kernel, of_hopper)
            for of_others in (r"\bHMMA", "LDGSTS"):
                found = re.search(of_others, text) is not None
                assert found == (target != "90a"), (target, kernel, of_others)


def test_the_inner_loop_of_the_forward_is_short(blocks):
    """The block without index comparisons that holds the exponentials of 16 elements."""
    for target, kernels in blocks.items():
        for kernel, code in kernels.items():
            if re.search(f"forward_tiles.*{PLAIN}", kernel):
                loops = [b for b in code if sum("MUFU.EX2" in x for x in b) >= 16]
                assert loops, (target, kernel)
                shortest = min(len(b) / sum("MUFU.EX2" in x for x in b) for b in loops)
                assert shortest <= PER_ELEMENT, (target, kernel, shortest)


def test_what_is_below_a_bracket_costs_a_comparison(blocks):
    """The block without index comparisons that may set 8 pairs aside."""
    for target, kernels in blocks.items():
        for kernel, code in kernels.items():
            if "bracket_tiles" in kernel:
                loops = [b for b in code if sum("STS.64" in x for x in b) == 8]
                assert loops, (target, kernel)
                assert min(map(len, loops)) <= 8 * PER_PAIR, (target, kernel)


def test_two_blocks_of_the_sample_fit_in_a_processor_of_a_hopper(resources):
    for kernel, used in resources["90a"].items():
        assert "sample_tiles" not in kernel or used["REG"] <= 128, (kernel, used)
