# SPDX-License-Identifier: MIT
"""Imports torch and then the extension hex._C, or says what is in the way.

In that order: the extension calls the libtorch_cpu.so that `import torch` has loaded. What torch
itself says when it cannot be imported is left as it is.
"""

import os
import re

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("hex-ssl needs torch >= 2.10, and torch is not installed") from None

_release = re.match(r"(\d+)\.(\d+)", torch.__version__)
if _release and tuple(map(int, _release.groups())) < (2, 10):
    raise ImportError(f"hex-ssl needs torch >= 2.10, and torch {torch.__version__} is installed")

try:
    import hex._C as _C
except ModuleNotFoundError as error:
    if error.name != "hex._C":
        raise
    raise ImportError(
        f"the extension hex._C is not built in {os.path.dirname(__file__)}: run `pip install -e .` "
        "in the source tree, or, to use an installed hex-ssl, start Python in another folder"
    ) from None

__all__ = ["_C"]
