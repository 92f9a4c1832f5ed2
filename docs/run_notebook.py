# SPDX-License-Identifier: MIT
"""Runs docs/first_run.ipynb from top to bottom and stores what it shows.

    python docs/run_notebook.py          # in its place, as `make notebook` does
    python docs/run_notebook.py COPY     # in a copy

Needs nbclient and ipykernel, which hex-ssl[test] has.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOK = Path(__file__).with_name("first_run.ipynb")


def run(notebook: Path, to: Path) -> None:
    """Without times and the version of Python, so that two runs differ in their results alone.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    content = nbformat.read(notebook, as_version=4)
    folders = [str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))  # the kernel takes this hex
    config = Config(KernelManager={"transport": "ipc"})  # no port that others could reach
    NotebookClient(
        content, config=config, timeout=600, record_timing=False, coalesce_streams=True
    ).execute()
    content.metadata["language_info"] = {"name": "python"}
    nbformat.write(content, to)


if __name__ == "__main__":
    run(NOTEBOOK, Path(sys.argv[1]) if sys.argv[1:] else NOTEBOOK)
