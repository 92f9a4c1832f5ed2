# SPDX-License-Identifier: MIT
"""Lightning, under whichever of its two names it is installed.

`pl` is the package, or None without one, and MISSING is then the reason to skip a test.
"""

import warnings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, on import
        try:
            import lightning.pytorch as pl
        except ModuleNotFoundError:
            import pytorch_lightning as pl
except ModuleNotFoundError as error:
    pl, MISSING = None, f"no Lightning is installed: {error}"
else:
    MISSING = ""
