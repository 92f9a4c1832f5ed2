# SPDX-License-Identifier: MIT
"""Imports torch and then the extension hex._C, which has the kernels.

torch comes first, because the extension calls into the libtorch_cpu.so that `import torch` has
loaded. If torch is missing, the ImportError says so; if it is installed but cannot be imported, its
own error is passed on unchanged.

Where the extension was not built, `_C` is None, the formulas of reference.py serve every device
(ops.py), and one warning says so. With HEX_EXTENSION=0 in the environment it is not looked for, and
nothing is said. One that is there and cannot be loaded is an ImportError.
"""

import functools
import os
import re
import warnings
from typing import Any

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("hex-ssl needs torch >= 2.10, but torch is not installed") from None

_release = re.match(r"(\d+)\.(\d+)", torch.__version__)
if _release and tuple(map(int, _release.groups())) < (2, 10):
    raise ImportError(f"hex-ssl needs torch >= 2.10, but torch {torch.__version__} is installed")

_C: Any = None
_wanted = os.environ.get("HEX_EXTENSION") or "1"
if _wanted not in ("0", "1"):
    raise ImportError(f"HEX_EXTENSION: got {_wanted!r}, wanted 0 or 1")
if _wanted == "1":
    try:
        import hex._C as _C
    except ModuleNotFoundError as error:
        if error.name != "hex._C":
            raise
        folder = os.path.dirname(__file__)
        warnings.warn(
            f"hex-ssl has no kernels, because the extension hex._C is not built in {folder}. Its "
            "formulas run as plain PyTorch operators, correct but slower and with N x N memory. On "
            "Linux run `pip install .` in the source tree; or, to use an installed hex-ssl, start "
            "Python in another folder. HEX_EXTENSION=0 in the environment turns this warning off",
            RuntimeWarning,
            stacklevel=3,  # the line that imports hex
        )

__all__ = ["_C", "cuda_is_built", "cuda_problem"]

_CUDA_LIBRARY = os.path.join(os.path.dirname(__file__), "_cuda.so")
_NO_CODE = (98, 209)  # cudaErrorInvalidDeviceFunction, cudaErrorNoKernelImageForDevice


def _how(options: str = "") -> str:
    """How to get the CUDA kernels: the end of the messages below."""
    return (
        f"build hex-ssl where nvcc of CUDA 13 is installed: HEX_CUDA=1 {options}pip install "
        "--no-binary hex-ssl hex-ssl (docs/cuda.md)"
    )


def cuda_is_built() -> bool:
    """Whether this build has the CUDA kernels."""
    return os.path.exists(_CUDA_LIBRARY)


@functools.cache
def _cuda_core_problem() -> str | None:
    """Loads hex/_cuda.so, once. Returns None, or why it cannot be used."""
    wanted = os.environ.get("HEX_CUDA_KERNELS") or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"HEX_CUDA_KERNELS: got {wanted!r}, wanted 0 or 1")
    if wanted == "0":
        return "HEX_CUDA_KERNELS=0 turns them off"
    if _C is None:
        return "hex-ssl runs without its extension hex._C"
    if not cuda_is_built():
        return f"this build of hex-ssl has none; {_how()}"
    problem: str | None = _C.load_cuda(_CUDA_LIBRARY)
    return problem and f"hex/_cuda.so cannot be used: {problem}"


@functools.cache
def cuda_problem(index: int) -> str | None:
    """None if the CUDA kernels serve the device with this index, else why not and what to do.

    The kernels are loaded by the first call, so a program without CUDA tensors never loads them.

    Raises:
        ValueError: HEX_CUDA_KERNELS in the environment is neither 0 nor 1.
    """
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"they need compute capability 8.0 or newer, and this GPU has {major}.{minor}"
    problem = _cuda_core_problem()
    error = 0 if problem else _C.probe_cuda(index)
    if error in _NO_CODE:
        arch = f"{major}{minor}{'a' if major == 9 else ''}"  # the name of nvcc, 90a for Hopper
        return (
            f"hex/_cuda.so has no code for this GPU, of compute capability {major}.{minor}; "
            f"{_how(f'HEX_CUDA_ARCH={arch} ')}"
        )
    if error:
        return f"hex/_cuda.so cannot be used: this GPU answers with CUDA error {error}"
    return problem
