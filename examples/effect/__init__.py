# SPDX-License-Identifier: MIT
"""The parts of study.py: the table of runs, one run, its measures, the rows, the report."""
