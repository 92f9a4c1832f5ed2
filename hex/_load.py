# SPDX-License-Identifier: MIT
"""Brings in torch and the extension hex._C, in that order, or says in plain words what is in the way.

The extension binds to the libtorch_cpu.so that `import torch` has loaded, so torch comes first. What torch itself says
when it cannot be imported is left as it is.
"""

import re

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("hex-ssl needs torch >= 2.10, and torch is not installed") from None

_release = re.match(r"(\d+)\.(\d+)", torch.__version__)
if _release is not None and tuple(map(int, _release.groups())) < (2, 10):
    raise ImportError(
        f"hex-ssl needs torch >= 2.10; the torch that is installed is {torch.__version__}"
    )

try:
    import hex._C as _C
except ModuleNotFoundError as error:
    if error.name != "hex._C":
        raise
    raise ImportError(
        f"the extension hex._C is not built in {__file__.rpartition('_load.py')[0]}: run `pip install -e .` in the "
        "source tree, or start Python in another folder to use the hex that is installed"
    ) from None

__all__ = ["_C"]
