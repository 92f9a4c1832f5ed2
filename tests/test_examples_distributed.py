# SPDX-License-Identifier: MIT
"""The examples for several devices, in two processes on the CPU: simclr_ddp.py by torchrun,
simclr.py by torchrun and by Lightning's own launcher.

Both ranks see one loss and one threshold, a resumed run ends with the bits of one without a break,
only rank 0 prints and evaluates, and no rank waits for one that has stopped. Most of it is from the
runs of example_ranks.py. NCCL is the same code and was not tried.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

for name in ("torchvision", "sklearn", "rich", "tensorboard", "lightning"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

import example_ranks  # noqa: E402
from common.options import LAST  # noqa: E402
from example_ranks import BATCH, EPOCHS, IMAGES, MODULES, OPTIONS, OTHERS  # noqa: E402
from test_examples import EXAMPLES, bits, interrupted, photographs, started  # noqa: E402

RANKS = 2
STEPS = IMAGES // RANKS // (BATCH // RANKS)  # an epoch


def start(*command: object) -> subprocess.CompletedProcess:
    """A command of the examples, in a new process with a thread."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def torchrun(*command: object) -> subprocess.CompletedProcess:
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS, *command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs of example_ranks.py are, and what each rank has printed."""
    folder = tmp_path_factory.mktemp("ranks")
    logs = "--log-dir", folder / "logs", "--redirects", "3"
    done = torchrun(*logs, example_ranks.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def seen(folder) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def printed(folder: Path, rank: int, stream: str) -> str:
    (file,) = folder.glob(f"logs/*/attempt_0/{rank}/{stream}.log")
    return file.read_text()


def weights(folder: Path, name: str, run: str) -> dict[str, Tensor]:
    state = torch.load(folder / run / LAST, weights_only=True)
    return state["model" if name == "ddp" else "state_dict"]


@pytest.mark.parametrize("name", MODULES)
def test_both_ranks_have_the_loss_and_the_threshold_of_the_whole_batch(name, seen):
    for run in ("whole", "parts", "parts-resumed", "wild"):
        (_, one, _, _), (_, two, _, _) = (rank[f"{name}-{run}"] for rank in seen)
        assert bits(one) == bits(two)
    loss, eps, hard, share = seen[0][f"{name}-whole"][1].T
    # At random a loss is the logarithm of the number of candidates, of all ranks.
    assert abs(loss[0] - torch.tensor(2.0 * BATCH - 1).log()) < 0.5
    assert all(-1 < x < 1 for x in eps) and eps.unique().numel() == len(eps)
    assert all(hard > 0) and all((share > 0) & (share < 1))


@pytest.mark.parametrize("name", OTHERS)
def test_both_ranks_of_other_methods_have_the_loss_and_the_threshold_of_the_whole_batch(name, seen):
    (status, one, views, _), (_, two, others, _) = (rank[name] for rank in seen)
    assert status == 0 and bits(one) == bits(two)
    assert not set(views) & set(others)
    loss, eps, hard, _ = one.T
    assert loss.isfinite().all() and all(hard > 0) and all(abs(eps) < 1)


@pytest.mark.parametrize("name", MODULES)
def test_the_images_that_fill_no_batch_are_left_out(name, seen):
    assert IMAGES // RANKS % (BATCH // RANKS) > 1
    for rank in seen:
        status, figures, _, _ = rank[f"{name}-whole"]
        assert status == 0
        assert figures.shape == (EPOCHS * STEPS, 4)


@pytest.mark.parametrize("name", MODULES)
def test_no_two_batches_have_the_same_views(name, seen):
    """Nor those of two ranks, nor those of a run's parts."""
    for runs in (("whole",), ("parts", "parts-resumed")):
        views = [x for rank in seen for run in runs for x in rank[f"{name}-{run}"][2]]
        assert len(set(views)) == len(views) == RANKS * EPOCHS * STEPS


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_stopped_and_resumed_end_with_the_bits_of_a_run_without_a_break(
    name, folder, seen
):
    whole, parts = (weights(folder, name, f"{name}-{run}") for run in ("whole", "parts"))
    assert bits(whole) == bits(parts)
    tracker = whole["criterion.threshold.state"]
    assert tracker.isfinite().any()
    for rank in seen:
        _, figures, views, _ = rank[f"{name}-whole"]
        _, rest, more, _ = rank[f"{name}-parts-resumed"]
        assert bits(figures[STEPS:]) == bits(rest)
        assert views[STEPS:] == more
    one, two = (
        json.loads((folder / f"{name}-{run}/result.json").read_text()) for run in ("whole", "parts")
    )
    for score in ("knn", "linear_1", "linear_5", "linear"):
        assert one[score] == two[score] > 0.2  # ten classes
    assert one["seconds"] > 0 and two["seconds"] is None


@pytest.mark.parametrize(
    "name, optimizer", [("ddp", "optimizer"), ("lightning", "optimizer_states")]
)
def test_a_resumed_optimizer_has_the_bits_too(name, optimizer, folder):
    one, two = (
        torch.load(folder / f"{name}-{run}" / LAST, weights_only=True) for run in ("whole", "parts")
    )
    assert bits(one[optimizer]) == bits(two[optimizer])
    assert one["epoch"] == two["epoch"] == EPOCHS - 1


def test_lightning_trains_as_the_plain_script(folder, seen):
    for one, two in ((rank["ddp-whole"], rank["lightning-whole"]) for rank in seen):
        assert bits(one[1]) == bits(two[1])
        assert one[2] == two[2]
    assert bits(weights(folder, "ddp", "ddp-whole")) == bits(
        weights(folder, "lightning", "lightning-whole")
    )


@pytest.mark.parametrize("name", MODULES)
def test_only_rank_0_evaluates(name, seen):
    # An epoch is checked with a batch, and then the test by neighbours has two splits.
    for run, epochs, ends in (("whole", EPOCHS, 1), ("parts", 1, 0), ("parts-resumed", 1, 1)):
        counts = [rank[f"{name}-{run}"][3] for rank in seen]
        assert counts == [3 * epochs + 2 * ends, 0]


def test_only_rank_0_prints_and_neither_is_warned(folder, seen):
    lines = printed(folder, 0, "stdout").splitlines()
    runs = 2 * len(MODULES) + len(OTHERS)
    assert sum(line.startswith("epoch   1 ") for line in lines) == runs
    assert sum("Accuracy on 500 test images" in line for line in lines) == runs
    said = printed(folder, 0, "stderr").splitlines()
    assert len(said) == len(MODULES) and all("training diverged" in line for line in said)
    assert printed(folder, 1, "stderr") == ""
    assert printed(folder, 1, "stdout").splitlines() == [f"== {run}" for run in seen[0]]


@pytest.mark.parametrize("name, other", [("ddp", 1), ("lightning", 0)])
def test_a_training_that_diverges_ends_on_both_ranks(name, other, folder, seen):
    assert [rank[f"{name}-wild"][0] for rank in seen] == [1, other]  # Lightning: see the script
    script = Path(MODULES[name].__file__).name
    assert re.search(f"^{script}: training diverged: .*", printed(folder, 0, "stderr"), re.M)
    assert not (folder / f"{name}-wild/result.json").exists()


# ---- commands, as a user gives them -------------------------------------------------------------


def pictures(folder: Path) -> Sequence[object]:
    """Options of a run on a folder of 22 images: for two ranks two batches and a short one."""
    root = photographs(folder / "data", {"train": 11, "test": 5}, size=40)
    return [
        "--data", "folder", "--root", root, "--image-size", 32, "--batch-size", 8, "--epochs", 1,
        "--device", "cpu", "--out", folder / "out", "--workers", 1,
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_two_processes_train_on_a_folder_of_images(name, tmp_path):
    script = EXAMPLES / Path(MODULES[name].__file__).name
    if name == "ddp":
        done = torchrun(script, *pictures(tmp_path))
    else:
        done = start(script, *pictures(tmp_path), "--devices", RANKS)
    assert done.returncode == 0, done.stderr
    assert "on 22 images, 2 steps an epoch, 0 of 1 epochs done" in done.stdout
    assert done.stdout.count("Accuracy on 10 test images") == 1
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out/result.json").read_text())["knn"] == 1


def test_ctrl_c_ends_both_processes_and_leaves_the_last_whole_epoch(tmp_path):
    arguments = ["--epochs", 500, "--device", "cpu", "--devices", RANKS, "--out", tmp_path]
    with started(sys.executable, EXAMPLES / "simclr.py", *arguments) as process:
        said, errors = interrupted(process)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    epochs = int(re.search(r"as it was after (\d+) whole epochs", said)[1])
    assert torch.load(tmp_path / LAST, weights_only=True)["epoch"] + 1 == epochs >= 1


# ---- one process, without torchrun --------------------------------------------------------------


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr(example_ranks.evaluate.linear_probe, "__defaults__", (None, 1))
    load = example_ranks.sklearn.datasets.load_digits
    monkeypatch.setattr(example_ranks.sklearn.datasets, "load_digits", load)
    example_ranks.few_digits()


def run(name: str, *arguments: object) -> int:
    return MODULES[name].main([str(argument) for argument in arguments])


@pytest.mark.parametrize("name", MODULES)
def test_one_process_stopped_and_resumed_ends_with_the_same_bits(
    name, few_digits, tmp_path, capsys
):
    assert run(name, *OPTIONS, "--out", tmp_path / "whole") == 0
    assert run(name, *OPTIONS, "--out", tmp_path / "parts", "--stop-after", 1) == 0
    assert not (tmp_path / "parts/result.json").exists()
    torch.manual_seed(9)
    assert run(name, "--resume", tmp_path / "parts") == 0
    whole, parts = (weights(tmp_path, name, run) for run in ("whole", "parts"))
    assert bits(whole) == bits(parts)
    assert not torch.distributed.is_initialized()


def test_a_run_of_two_processes_goes_on_in_one(folder, few_digits, tmp_path, capsys):
    shutil.copytree(folder / "ddp-parts", tmp_path / "run")
    assert run("ddp", "--resume", tmp_path / "run", "--epochs", EPOCHS + 1) == 0
    assert f"{EPOCHS} of {EPOCHS + 1} epochs done" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["epoch"] == EPOCHS


@pytest.mark.parametrize("name", MODULES)
def test_a_run_is_not_written_over_nor_resumed_from_another_file(name, folder, tmp_path, capsys):
    assert run(name, *OPTIONS, "--out", folder / f"{name}-parts") == 2
    assert "already holds a run" in capsys.readouterr().err
    (tmp_path / "file").write_text("nothing")
    for where, text in ((tmp_path / "none", "no such checkpoint"), (tmp_path / "file", "not a")):
        assert run(name, "--resume", where) == 2
        errors = capsys.readouterr().err
        assert text in errors and errors.count("\n") == 1


def test_a_batch_that_is_no_multiple_of_the_processes_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(MODULES["ddp"], "RANKS", 2)
    assert run("ddp", "--batch-size", 51, "--out", tmp_path / "out") == 2
    assert "--batch-size: got 51 for 2 processes, wanted a mul" in capsys.readouterr().err
    assert run("lightning", "--batch-size", 51, "--devices", 2, "--out", tmp_path / "out") == 2
    assert "--batch-size: got 51 for 2 devices, wanted a mul" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_processes_than_devices_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    assert run("lightning", "--out", tmp_path / "out") == 2
    assert "--devices: got 1, and torchrun has 2 processes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
