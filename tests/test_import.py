# SPDX-License-Identifier: MIT
"""What a person reads when `import hex` cannot work, word by word; and that it works twice.

Each case of the former is a fresh Python without site-packages (-I -S), given a copy of the package
and, where it needs one, a stand-in for torch: a torch/__init__.py that loads a libtorch_cpu.so made
here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hex

PACKAGE = Path(hex.__file__).parent
SHIM = Path(__file__).parent.parent / "csrc/torch_shim.h"
# What every torch has to have, and what newer ones have.
FUNCTIONS, NEWER = (
    re.findall(r"^ +X\(\w+, (\w+),", text, re.MULTILINE)
    for text in SHIM.read_text().split("#define HEX_TORCH_FUNCTIONS_2_11")
)
LOAD_LIBRARY = "import ctypes; ctypes.CDLL(__path__[0] + '/libtorch_cpu.so')"


@pytest.fixture
def site(tmp_path):
    """A folder to import from, holding the package."""
    shutil.copytree(PACKAGE, tmp_path / "hex", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def add_torch(site, version, code=""):
    (site / "torch").mkdir()
    (site / "torch/__init__.py").write_text(f"__version__ = '{version}'\n{code}\n")


def add_libtorch(site, functions, body="return 0;"):
    """A libtorch_cpu.so with these functions, and a torch 2.10 that loads it as torch does."""
    source = "".join(f"int {name}(void) {{ {body} }}\n" for name in functions)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so", "-xc", "-", "-o"]
        + [site / "libtorch_cpu.so"],
        input=source,
        text=True,
        check=True,
    )
    add_torch(site, "2.10.0", LOAD_LIBRARY)
    (site / "libtorch_cpu.so").rename(site / "torch/libtorch_cpu.so")


def python(site, code, **environment):
    """The last line that a fresh Python prints, on either stream."""
    run = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(site)!r}); {code}",
        ],
        capture_output=True,
        text=True,
        cwd=site,
        env=os.environ | environment,
    )
    return (run.stdout + run.stderr).strip().rpartition("\n")[2]


def test_torch_is_not_installed(site):
    assert python(site, "import hex") == (
        "ImportError: hex-ssl needs torch >= 2.10, but torch is not installed"
    )


def test_torch_cannot_be_imported_and_speaks_for_itself(site):
    add_torch(site, "2.13.0", "import something_that_torch_needs")
    assert python(site, "import hex") == (
        "ModuleNotFoundError: No module named 'something_that_torch_needs'"
    )


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cpu"])
def test_torch_is_too_old(site, version):
    add_torch(site, version)
    assert python(site, "import hex") == (
        f"ImportError: hex-ssl needs torch >= 2.10, but torch {version} is installed"
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234567", "3.0.0", "unknown"])
def test_the_extension_is_not_built_and_torch_is_new_enough(site, version):
    add_torch(site, version)
    (site / "hex/__init__.py").write_text("")  # what follows _load needs more of torch
    for extension in site.glob("hex/_C.*so"):
        extension.unlink()
    load = "import warnings; warnings.simplefilter('error'); from hex._load import _C; print(_C)"
    assert python(site, load) == (
        "RuntimeWarning: hex-ssl has no kernels, because the extension hex._C is not built in "
        f"{site / 'hex'}. Its formulas run as plain PyTorch operators, correct but slower and with "
        "N x N memory. On Linux run `pip install .` in the source tree; or, to use an installed "
        "hex-ssl, start Python in another folder. HEX_EXTENSION=0 in the environment turns this "
        "warning off"
    )
    assert python(site, load, HEX_EXTENSION="0") == "None"


@pytest.mark.parametrize("wanted", ["2", "auto", " "])
def test_hex_extension_is_neither_0_nor_1(site, wanted):
    add_torch(site, "2.10.0")
    assert python(site, "import hex", HEX_EXTENSION=wanted) == (
        f"ImportError: HEX_EXTENSION: got {wanted!r}, wanted 0 or 1"
    )


@pytest.mark.parametrize("missing", [FUNCTIONS[0], FUNCTIONS[len(FUNCTIONS) // 2], FUNCTIONS[-1]])
def test_torch_lacks_a_function(site, missing):
    """They are all found in one loop."""
    add_libtorch(site, [name for name in FUNCTIONS if name != missing])
    assert python(site, "import hex") == (
        "ImportError: hex-ssl needs torch >= 2.10: "
        f"the torch that is loaded has no symbol {missing}"
    )


@pytest.mark.parametrize("newer", [[], NEWER], ids=["2.10", "2.11"])
def test_torch_lacks_nothing(site, newer):
    add_libtorch(site, FUNCTIONS + newer)
    (site / "hex/__init__.py").write_text("")  # what follows _load needs more of torch
    assert python(site, "from hex._load import _C; print(_C.__name__)") == "hex._C"


def test_torch_refuses_the_operators(site):
    add_libtorch(site, FUNCTIONS, "return 1;")
    assert python(site, "import hex") == (
        "ImportError: hex-ssl could not register its operators with torch"
    )


def test_an_unknown_instruction_set_is_asked_for(site):
    add_libtorch(site, FUNCTIONS)
    assert python(site, "import hex", HEX_ISA="mmx") == (
        "ImportError: HEX_ISA: got 'mmx', wanted base, neon, avx2, avx512, avx512_bf16 or "
        "avx512_amx"
    )


def test_the_extension_is_damaged_and_the_loader_speaks_for_itself(site):
    add_torch(site, "2.10.0")
    next(site.glob("hex/_C.*so")).write_bytes(b"\x7fELF")
    assert python(site, "import hex") == f"ImportError: {site}/hex/_C.abi3.so: file too short"


def test_the_extension_is_loaded_by_hand_without_torch(site):
    code = f"sys.path.insert(0, {str(site / 'hex')!r}); import _C"
    assert python(site, code).startswith("ImportError: libtorch_cpu.so: cannot open shared object")


TWICE = """
import importlib, sys, warnings
import torch, hex
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch's, of vmap's rules

def step():
    loss = hex.HEXLoss()
    views = [z.clone().requires_grad_() for z in batch]
    value = loss(*views)
    value.backward()
    rows = torch.vmap(lambda z: hex.hex_loss(z, views[1], eps=0.2))(torch.stack(views))
    return value, rows, *(z.grad for z in views), *loss.state_dict().values()

batch = torch.randn(2, 101, 37).unbind()
first, expected = hex.HEXLoss, step()
importlib.reload(hex)
print(all(map(torch.equal, step(), expected)), hex.HEXLoss is first)
for name in [name for name in sys.modules if name.partition(".")[0] == "hex"]:
    del sys.modules[name]
import hex
print(all(map(torch.equal, step(), expected)), hex.HEXLoss is first)
"""


def test_hex_is_reloaded_and_imported_a_second_time():
    run = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "True True\nTrue False\n"
