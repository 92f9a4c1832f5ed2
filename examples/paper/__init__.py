# SPDX-License-Identifier: MIT
"""The authors' own runs, by their settings. `python examples/paper/run.py FILE` trains one."""
