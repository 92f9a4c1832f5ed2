# SPDX-License-Identifier: MIT
"""benchmarks/gpu.py without a GPU, at tiny sizes: it runs, goes on where it was, and tells."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu  # noqa: E402
import gpu_methods  # noqa: E402
import gpu_report  # noqa: E402
import peers  # noqa: E402

pytestmark = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="under AddressSanitizer memory and time are mostly the sanitizer's",
)
REHEARSAL = ["--device", "cpu", "--smoke"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gpu_methods, "SAMPLES", 2)
    monkeypatch.setattr(gpu_methods, "SAMPLE_MS", 1)
    monkeypatch.setattr(gpu_methods, "WARM_UP", 1)


def records(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {r["case"]: r for r in map(json.loads, lines)}


def test_every_step_but_the_programs_runs_and_the_report_has_it(tmp_path, capsys):
    steps = ["build", "roofline", "sizes", "dtypes", "features", "queue", "repeats", "report"]
    assert gpu.main([*steps, *REHEARSAL, "--out", str(tmp_path)]) == 0
    found = records(tmp_path)
    ours = found["sizes: 192 x 192 x 24, bfloat16, hex HEXLoss"]
    assert ours["ms"] > 0 and ours["extra_mb"] >= 0 and ours["loss_error"] < 1e-5
    assert len(ours["samples_ms"]) == 2 and ours["floor_ms"] > 0
    in_a_graph = found["sizes: 192 x 192 x 24, bfloat16, hex HEXLoss, in a graph"]
    assert in_a_graph["skipped"] == "there are no graphs on a CPU"
    text = (tmp_path / "report.md").read_text()
    for line in ("| 65536 x 65536 | 13 | not measured | 67 |", "authors' form, eager", "0 differ"):
        assert line in text
    assert (tmp_path / "time.png").stat().st_size > 1000

    capsys.readouterr()  # again: all is there
    assert gpu.main([*steps, *REHEARSAL, "--out", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert "sizes" not in again and "report: report" in again


def test_it_stops_in_time_and_goes_on(tmp_path):
    arguments = ["sizes", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--seconds", "1e-9"]) == 3
    assert not (tmp_path / "results.jsonl").exists()
    assert gpu.main(arguments) == 0
    assert len(records(tmp_path)) > 10


def test_a_failure_is_told_and_tried_again(tmp_path, monkeypatch, capsys):
    wrong = gpu_methods.METHODS[0]._replace(build=gpu_methods.METHODS[2].build)  # InfoNCE
    monkeypatch.setattr(gpu_methods, "METHODS", (wrong,))
    arguments = ["sizes", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert "failed: sizes: 160 x 160 x 24, bfloat16, hex HEXLoss" in capsys.readouterr().err

    def lost(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    other = peers.HEX._replace(name="hex of another name", build=lost)
    monkeypatch.setattr(gpu_methods, "METHODS", (peers.HEX, other))
    monkeypatch.setattr(gpu_methods, "OURS", (peers.HEX, other))
    assert gpu.main(arguments) == 1  # what was not tried yet comes first, and ends it
    told = capsys.readouterr()
    assert "the device is lost" in told.err and "bfloat16, hex HEXLoss  " not in told.out
    monkeypatch.setattr(gpu_methods, "METHODS", (peers.HEX,))
    assert gpu.main(arguments) == 0


def test_results_of_another_machine_are_not_mixed_with_these(tmp_path):
    gpu.Results(tmp_path).add("build: machine", {"torch": "1.0", "hex": "0"})
    with pytest.raises(SystemExit, match="is of torch '1.0'"):
        gpu.main(["build", *REHEARSAL, "--out", str(tmp_path)])


def test_the_sanitizers_calls_reach_every_operator():
    gpu_methods.calls("cpu")


def test_the_loss_has_its_share_of_a_training_step():
    name = gpu_methods.INFO_NCE.name
    found = gpu_methods.training_step(name, "small", 4, "cpu")
    assert 0 < found["loss_ms"] and 0 < found["share_of_step"] < 1


def test_the_authors_form_is_the_released_one():
    for queue in (0, 300):
        batch = gpu_methods.batches(160, 24, torch.float32, "cpu", queue)[0]
        method = gpu_methods.AUTHORS
        found = gpu_methods.check(
            method, batch, method.step(batch)(), peers.truth(batch, method.loss)
        )
        assert found["loss_error"] < 1e-5


def test_the_report_replaces_what_stands_between_its_marks(tmp_path):
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "cuda.md").write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    gpu_report.write({}, tmp_path)
    for _ in range(2):
        gpu_report.into_docs(tmp_path, docs)
        text = (docs / "cuda.md").read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("13 | not measured") == 1
