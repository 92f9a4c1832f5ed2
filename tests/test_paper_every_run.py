# SPDX-License-Identifier: MIT
"""Every run of examples/paper, with every data set and network that its file names: trained for a
few steps, stopped, resumed and evaluated, in one process, and as the authors have it in two. In one
process, and with HEX in two, it has to end with the bits of a run without a break.

test_paper_runs.py has the rest, and takes a minute. This takes many. HEX_RUNS=5 in the environment,
as .ci/run has it, takes one run in five, drawn by HEX_SEED.
"""

import os
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from test_examples import photographs
from test_paper_runs import (
    CLASSES,
    RANKS,
    TESTED,
    check_parts,
    check_result,
    of,
    printed,
    seen_by_ranks,
    two_processes,
)

EVERY = [f"{name},{data},{backbone}" for name, data, backbone, _ in of.combinations()]
AUTHORS = [
    ",".join([name, *(of.read(of.FOLDER / f"{name}.yaml")[x][0] for x in ("data", "backbone"))])
    for name in of.RUNS
]

GROUPS = [name for name in of.RUNS if name.count("_") == 1]  # the methods alone
assert len(AUTHORS) == 14 and set(AUTHORS) <= set(EVERY) and len(GROUPS) == 5


def drawn(names: list[str]) -> list[str]:
    share = int(os.environ.get("HEX_RUNS", 1))
    return names[int(os.environ["HEX_SEED"]) % share :: share]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    parts = {"train": 12, "val": TESTED // CLASSES}
    return photographs(tmp_path_factory.mktemp("images"), parts, CLASSES, size=40)


@pytest.mark.parametrize("what", drawn(EVERY))
def test_a_run_stopped_and_resumed_ends_with_the_same_bits_and_result(
    what, photos, tmp_path, capsys
):
    check_parts(what, photos, tmp_path, lambda: capsys.readouterr().out)
    rmtree(tmp_path)  # checkpoints are large


@pytest.mark.parametrize("group", drawn(GROUPS))
def test_two_processes_train_resume_and_evaluate_every_run(group, photos, tmp_path):
    runs = [what for what in AUTHORS if what.startswith((f"{group},", f"{group}_"))]
    two_processes(photos, tmp_path, [("+" if "_hex," in what else "") + what for what in runs])
    seen = seen_by_ranks(tmp_path)
    assert all(set(rank["statuses"]) == {0} for rank in seen)
    for what in runs:
        result = check_result(tmp_path / f"{what} parts", what, RANKS)
        if "_hex," not in what:
            continue
        one, two = (f"{what} {part}" for part in ("whole", "parts"))
        assert seen[0]["digests"][one] == seen[0]["digests"][two], what
        assert all(torch.equal(rank["losses"][one], rank["losses"][two]) for rank in seen)
        assert check_result(tmp_path / one, what, RANKS)["linear"] == result["linear"]
    for rank, stream in ((0, "stderr"), (1, "stdout"), (1, "stderr")):
        assert printed(tmp_path, rank, stream) == ""
    rmtree(tmp_path)
